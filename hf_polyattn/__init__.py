"""hf_polyattn: pretrained softmax Transformers as polynomial-attention models.

Importing it registers "polyattn" with Transformers and lets `from_pretrained` load patched checkpoints.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._activation import activate

if TYPE_CHECKING:
    from . import plot as plot
    from .adaptation.alignment import align
    from .adaptation.annealing import AnnealReport, anneal
    from .adaptation.calibration import CalibrationReport, calibrate
    from .adaptation.conversion import ConversionReport, QualityError, convert
    from .adaptation.distillation import distill
    from .adaptation.layerwise import match_layers
    from .adaptation.quality import similarity
    from .adaptation.training import TrainingReport, param_groups
    from .diagnosis.callback import MonitorCallback
    from .diagnosis.diagnosis import diagnose
    from .diagnosis.monitor import Monitor
    from .diagnosis.polynomials import Polynomials, polynomials
    from .diagnosis.report import Diagnosis
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
    from .hub.cards import Measurement, model_card
    from .hub.kernel import export_kernel
    from .hub.remote_code import export_remote_code
    from .ops import polynomial_attention
    from .patching.core import is_patched
    from .patching.description import describe
    from .patching.patch import patch_model, softmax_attention, unpatch_model
    from .spec import PolyAttentionConfig, Polynomial

__version__ = "0.1.0"

#: Rooms that are public as such, beside the names.
_ROOMS = ("plot",)

_HOME = {
    "AnnealReport": "adaptation.annealing",
    "BackendError": "errors",
    "CalibrationError": "errors",
    "CalibrationReport": "adaptation.calibration",
    "CheckpointError": "errors",
    "Diagnosis": "diagnosis.report",
    "DivergenceError": "errors",
    "ConversionReport": "adaptation.conversion",
    "InputError": "errors",
    "Measurement": "hub.cards",
    "Monitor": "diagnosis.monitor",
    "MonitorCallback": "diagnosis.callback",
    "PatchError": "errors",
    "PolyAttentionConfig": "spec",
    "PolyAttnError": "errors",
    "Polynomial": "spec",
    "Polynomials": "diagnosis.polynomials",
    "QualityError": "adaptation.conversion",
    "SpecError": "errors",
    "TrainingError": "errors",
    "TrainingReport": "adaptation.training",
    "UnsupportedArgumentError": "errors",
    "align": "adaptation.alignment",
    "anneal": "adaptation.annealing",
    "calibrate": "adaptation.calibration",
    "convert": "adaptation.conversion",
    "describe": "patching.description",
    "diagnose": "diagnosis.diagnosis",
    "distill": "adaptation.distillation",
    "export_kernel": "hub.kernel",
    "export_remote_code": "hub.remote_code",
    "is_patched": "patching.core",
    "match_layers": "adaptation.layerwise",
    "model_card": "hub.cards",
    "param_groups": "adaptation.training",
    "patch_model": "patching.patch",
    "polynomial_attention": "ops",
    "polynomials": "diagnosis.polynomials",
    "similarity": "adaptation.quality",
    "softmax_attention": "patching.patch",
    "unpatch_model": "patching.patch",
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
    "Polynomials",
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
    "polynomials",
    "similarity",
    "softmax_attention",
    "unpatch_model",
]


def __getattr__(name: str) -> Any:
    """Imports a public name from its module at first use."""
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})


activate()
