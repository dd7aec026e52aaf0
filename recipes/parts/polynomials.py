"""From softmax to the polynomial that an arm starts with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

import hf_polyattn
from hf_polyattn import InputError, PolyAttentionConfig, Polynomial
from hf_polyattn.patching.patched import patched_layers

from .arguments import CONTROL, FinetuningArguments


def make_polynomial(
    model: PreTrainedModel, spec: str, arguments: FinetuningArguments, options: dict[str, Any]
) -> PreTrainedModel:
    """Patches a model in place with the polynomial of an arm, bare or with --initial_coefficients and --row_shift.

    Args:
        model: softmax.
        spec: of the arm.
        arguments: of the run.
        options: of `hf_polyattn.patch_model`.
    """
    config = PolyAttentionConfig(Polynomial.parse(spec), learnable=arguments.learnable, row_shift=arguments.row_shift)
    hf_polyattn.patch_model(model, config, **options)
    given = arguments.initial_coefficients
    if given:
        with torch.no_grad():
            for _, layer in patched_layers(model):
                layer.coefficients.copy_(layer.coefficients.new_tensor(given).expand_as(layer.coefficients))
    return model


def check_coefficients(arguments: FinetuningArguments) -> None:
    """Raises InputError if --initial_coefficients or --row_shift do not fit an arm, or leave it nothing to train."""
    given = arguments.initial_coefficients
    for name, value in (("initial_coefficients", given), ("row_shift", arguments.row_shift != "none")):
        if value and arguments.adapt != "none":
            raise InputError(f"--{name} would be calibrated away; set --adapt none")
    if not given:
        return
    for spec in arguments.spec:
        wanted = 0 if spec == CONTROL else Polynomial.parse(spec).degree + 1
        if wanted and len(given) != wanted:
            raise InputError(f"{spec} has {wanted} coefficients, of t^0 … t^{wanted - 1}; got {len(given)}")
    if not arguments.learnable and not any(given[1:]):
        raise InputError(
            "a polynomial that is frozen without a power of t cannot train: its queries and keys get no gradient. Set "
            "--learnable true, or a coefficient of t or of a higher power"
        )
