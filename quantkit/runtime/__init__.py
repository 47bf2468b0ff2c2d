"""Running what was quantized: a linear with packed weights, and loading a folder of them."""
