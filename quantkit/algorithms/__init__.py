"""How codes are chosen: pure functions of tensors. No module, file or recipe is known here.

interface.py           what an algorithm asks for, is given and returns
rtn.py                 rounding to nearest
gptq.py                GPTQ as linear feedback, with the exact re-fit
coordinate_descent.py  sweeps over the codes after GPTQ
awq.py                 AWQ's search for a scale per channel
smoothquant.py         SmoothQuant's scale per channel
rotation.py            block Hadamard rotations with random signs
outliers.py            how far the largest weights and inputs stand out
activation_range.py    histograms of activations, and ranges chosen from them
"""

from quantkit.algorithms import gptq, rtn
from quantkit.algorithms.interface import Algorithm as Algorithm
from quantkit.algorithms.interface import Evidence as Evidence
from quantkit.algorithms.interface import Needs as Needs
from quantkit.algorithms.interface import Quantized as Quantized

ALGORITHMS: dict[str, Algorithm] = {
    "rtn": Algorithm(rtn.needs, rtn.quantize),
    "gptq": Algorithm(gptq.needs, gptq.quantize, gptq.refusal),
}
