"""Attention modules of Transformers that run a polynomial instead of softmax: finding, patching and configuring them.

Imports `ops` and below. Other rooms come for `patch.patch_model`, `patched.patched_layers` and
`core.PolyAttention`.
Nothing is imported here: `saved_config` is read before torch is.
"""
