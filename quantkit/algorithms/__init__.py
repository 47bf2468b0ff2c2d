"""How codes are chosen: pure functions of tensors. No module, file or recipe is known here.

rtn.py                 rounding to nearest
clip.py                ranges by each group's output error
gptq.py                GPTQ as linear feedback, with the exact re-fit
coordinate_descent.py  sweeps over the codes after GPTQ
awq.py                 AWQ's search for a scale per channel
smoothquant.py         SmoothQuant's scale per channel
rotation.py            block Hadamard rotations with random signs
activation_range.py    histograms of activations, and ranges chosen from them
"""
