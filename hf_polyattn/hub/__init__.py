"""Saving, loading, pushing and exporting: the hooks in Transformers and PEFT, guards on checkpoints, model cards.

Imports `patching` and below. Other rooms come for `cards.model_card`, `remote_code.export_remote_code` and
`kernel.export_kernel`. Nothing is imported here: `hooks` may run in the middle of an import of Transformers.
"""
