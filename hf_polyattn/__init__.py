"""hf_polyattn: pretrained softmax Transformers as polynomial-attention models.

Importing it registers "polyattn" with Transformers and lets `from_pretrained` load patched checkpoints.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._activation import activate

if TYPE_CHECKING:
    from .alignment import align
    from .annealing import AnnealReport, anneal
    from .calibration import CalibrationReport, calibrate
    from .callback import MonitorCallback
    from .cards import Measurement, model_card
    from .conversion import ConversionReport, QualityError, convert
    from .diagnosis import Diagnosis, diagnose
    from .distillation import distill
    from .errors import (
        BackendError,
        CalibrationError,
        CheckpointError,
        DivergenceError,
        InputError,
        PatchError,
        PolyAttnError,
        SpecError,
        TrainingError,
        UnsupportedArgumentError,
    )
    from .hub_kernel import export_kernel
    from .layerwise import match_layers
    from .monitor import Monitor
    from .ops import polynomial_attention
    from .patch import describe, is_patched, patch_model, softmax_attention, unpatch_model
    from .quality import similarity
    from .remote_code import export_remote_code
    from .spec import PolyAttentionConfig, Polynomial
    from .training import TrainingReport, param_groups

__version__ = "0.1.0"

_HOME = {
    "AnnealReport": "annealing",
    "BackendError": "errors",
    "CalibrationError": "errors",
    "CalibrationReport": "calibration",
    "CheckpointError": "errors",
    "Diagnosis": "diagnosis",
    "DivergenceError": "errors",
    "ConversionReport": "conversion",
    "InputError": "errors",
    "Measurement": "cards",
    "Monitor": "monitor",
    "MonitorCallback": "callback",
    "PatchError": "errors",
    "PolyAttentionConfig": "spec",
    "PolyAttnError": "errors",
    "Polynomial": "spec",
    "QualityError": "conversion",
    "SpecError": "errors",
    "TrainingError": "errors",
    "TrainingReport": "training",
    "UnsupportedArgumentError": "errors",
    "align": "alignment",
    "anneal": "annealing",
    "calibrate": "calibration",
    "convert": "conversion",
    "describe": "patch",
    "diagnose": "diagnosis",
    "distill": "distillation",
    "export_kernel": "hub_kernel",
    "export_remote_code": "remote_code",
    "is_patched": "patch",
    "match_layers": "layerwise",
    "model_card": "cards",
    "param_groups": "training",
    "patch_model": "patch",
    "polynomial_attention": "ops",
    "similarity": "quality",
    "softmax_attention": "patch",
    "unpatch_model": "patch",
}

__all__ = [
    "AnnealReport",
    "BackendError",
    "CalibrationError",
    "CalibrationReport",
    "CheckpointError",
    "ConversionReport",
    "Diagnosis",
    "DivergenceError",
    "InputError",
    "Measurement",
    "Monitor",
    "MonitorCallback",
    "PatchError",
    "PolyAttentionConfig",
    "PolyAttnError",
    "Polynomial",
    "QualityError",
    "SpecError",
    "TrainingError",
    "TrainingReport",
    "UnsupportedArgumentError",
    "align",
    "anneal",
    "calibrate",
    "convert",
    "describe",
    "diagnose",
    "distill",
    "export_kernel",
    "export_remote_code",
    "is_patched",
    "match_layers",
    "model_card",
    "param_groups",
    "patch_model",
    "polynomial_attention",
    "similarity",
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
