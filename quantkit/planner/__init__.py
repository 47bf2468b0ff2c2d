"""`quantkit plan`: what a run would make and take, before any weight is read. Start in estimate.py.

estimate.py         the verdict: sizes, memory, time, and whether it fits
model_inventory.py  parameters and matrices of a model, counted from config.json and headers
calibration_size.py how much calibration text is read
linear_groups.py    linears that share an input
run_memory.py       memory of a run
run_time.py         seconds of a run
output_size.py      bytes of the result
advice.py           changes of the recipe that make it fit
serving.py          with --gpu: how the model is served on a device; traffic.py: what is asked
devices.py          the devices, each figure with its source
roofline.py         seconds of products, memory and links: arithmetic alone
served_model.py     what serving a model moves and multiplies
candidate_schemes.py  the schemes that an engine runs there
serving_advice.py   which of them to take
this_machine.py     free memory and disk, and how fast this machine is
"""
