"""hf_polyattn: pretrained softmax Transformers as polynomial-attention models.

Importing it registers "polyattn" with Transformers and lets `from_pretrained` load patched checkpoints.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._activation import activate

if TYPE_CHECKING:
    from .calibration import CalibrationReport, calibrate
    from .callback import MonitorCallback
    from .diagnosis import Diagnosis, diagnose
    from .distillation import distill, param_groups
    from .errors import (
        BackendError,
        CalibrationError,
        DivergenceError,
        InputError,
        PatchError,
        PolyAttnError,
        SpecError,
        UnsupportedArgumentError,
    )
    from .monitor import Monitor
    from .ops import polynomial_attention
    from .patch import describe, is_patched, patch_model, softmax_attention, unpatch_model
    from .spec import PolyAttentionConfig, Polynomial

__version__ = "0.1.0"

_HOME = {
    "BackendError": "errors",
    "CalibrationError": "errors",
    "CalibrationReport": "calibration",
    "Diagnosis": "diagnosis",
    "DivergenceError": "errors",
    "InputError": "errors",
    "Monitor": "monitor",
    "MonitorCallback": "callback",
    "PatchError": "errors",
    "PolyAttentionConfig": "spec",
    "PolyAttnError": "errors",
    "Polynomial": "spec",
    "SpecError": "errors",
    "UnsupportedArgumentError": "errors",
    "calibrate": "calibration",
    "describe": "patch",
    "diagnose": "diagnosis",
    "distill": "distillation",
    "is_patched": "patch",
    "param_groups": "distillation",
    "patch_model": "patch",
    "polynomial_attention": "ops",
    "softmax_attention": "patch",
    "unpatch_model": "patch",
}

__all__ = [
    "BackendError",
    "CalibrationError",
    "CalibrationReport",
    "Diagnosis",
    "DivergenceError",
    "InputError",
    "Monitor",
    "MonitorCallback",
    "PatchError",
    "PolyAttentionConfig",
    "PolyAttnError",
    "Polynomial",
    "SpecError",
    "UnsupportedArgumentError",
    "calibrate",
    "describe",
    "diagnose",
    "distill",
    "is_patched",
    "param_groups",
    "patch_model",
    "polynomial_attention",
    "softmax_attention",
    "unpatch_model",
]


def __getattr__(name: str) -> Any:
    """Imports a public name from its module at first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


activate()
