"""What recipes/private_inference.py is made of.

`preparing` and `reporting` run in the project's environment, all else in that of SPU, where there is no torch:
`checkpoint` reads a saved model, `owner` prepares its attention in plain text, `attention` and `models` are the forward
pass in JAX, `engine` runs it among parties, `ranges` says what a fixed-point number cannot hold, `measuring` times.
"""
