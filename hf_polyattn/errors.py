"""The errors of the package. Each says what was given, what is allowed and what to do next."""

from __future__ import annotations


class PolyAttnError(ValueError):
    """Base class of every error that `hf_polyattn` raises for its user's input."""


class SpecError(PolyAttnError):
    """A polynomial spec or a `PolyAttentionConfig` that cannot be read."""


class InputError(PolyAttnError):
    """Tensors or arguments that the operator cannot accept."""


class BackendError(PolyAttnError):
    """A backend that does not exist, or that cannot run the call it was asked for."""


class PatchError(PolyAttnError):
    """A model that cannot be patched, or that is not in the state the call needs."""


class UnsupportedArgumentError(PolyAttnError):
    """An attention argument of a model that polynomial attention cannot honour."""


class CheckpointError(PolyAttnError):
    """A saved polynomial model that is damaged, incomplete or not safe to load."""


class CalibrationError(PolyAttnError):
    """Calibration data or models from which no coefficients can be computed."""


class DivergenceError(PolyAttnError):
    """A training in which outputs, gradients or weights stopped being finite numbers."""


class TrainingError(PolyAttnError):
    """A training that went wrong: the loss or its gradient is not a finite number."""


class SaveError(PolyAttnError, OSError):
    """A file or folder that could not be written, for example because the disk is full; nothing of it is left."""
