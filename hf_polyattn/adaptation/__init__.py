"""How a patched model gets softmax's quality back: polynomials in closed form, and training.

Imports `patching` and below. Other rooms come for `calibration.calibrate` and `capture.observe`.
"""
