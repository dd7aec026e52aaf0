"""What the tests of a fit look at: random rows, a causal layer, and the fit of one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

import hf_polyattn as hp
from hf_polyattn.adaptation.capture import Observation
from hf_polyattn.adaptation.fitting.layer import LayerFit
from hf_polyattn.adaptation.fitting.packing import packed_rows
from hf_polyattn.adaptation.fitting.predictor import PredictorChoice
from hf_polyattn.adaptation.fitting.rows import Rows
from hf_polyattn.patching.core import PolyAttention

CPU = torch.device("cpu")
HEADS, GROUPS, KEYS, DIM = 4, 2, 7, 5
SCALING = 0.4


def random_rows(queries: int = 60, spread: float = 1.0) -> Rows:
    """Returns rows of two batch entries that see some of the keys; the last ten of the second one are padding."""
    visible = torch.rand(2, 1, queries, KEYS) < 0.7
    visible[..., 0] = True
    weight = torch.ones(2, HEADS, queries)
    weight[1, :, -10:] = 0.0
    query, key = torch.randn(2, HEADS, queries, DIM), spread * torch.randn(2, GROUPS, KEYS, DIM)
    scores = SCALING * query @ key.repeat_interleave(HEADS // GROUPS, 1).mT
    return Rows(
        query=query, value=torch.randn(2, GROUPS, KEYS, 3), target=torch.zeros(2, HEADS, queries, 3),
        scores=scores * visible, visible=visible.float(), count=visible.sum(-1).float(), weight=weight, scaling=SCALING,
    )  # fmt: skip


def parts(seen: Rows) -> list[Rows]:
    """Returns the same rows in three chunks, one a batch entry and one of queries."""

    def part(entries: slice, queries: slice) -> Rows:
        one = {name: getattr(seen, name)[entries, :, queries] for name in ("query", "target", "scores", "visible")}
        one |= {name: getattr(seen, name)[entries, :, queries] for name in ("count", "weight")}
        return replace(seen, value=seen.value[entries], **one)

    return [part(slice(0, 1), slice(0, 20)), part(slice(0, 1), slice(20, None)), part(slice(1, 2), slice(None))]


def observation(spread: float = 1.0, length: int = 40) -> Observation:
    """Returns what a causal layer sees, two heads a key head, padding at the end of the second entry."""
    sharpness = spread * torch.linspace(0.5, 3.0, HEADS)[:, None, None]
    query = sharpness * torch.randn(2, HEADS, length, DIM)
    key, value = torch.randn(2, GROUPS, length, DIM), torch.randn(2, GROUPS, length, 3)
    real = torch.ones(2, length, dtype=torch.bool)
    real[1, -9:] = False
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True, scale=SCALING
    )
    return Observation(query, key, value, output.transpose(1, 2), None, True, None, SCALING, real)


def fitted(
    spec: str, seen: Observation, granularity: Any = "head", row_shift: str = "linear", rows_of: Any = packed_rows
) -> LayerFit:
    child = PolyAttention(hp.PolyAttentionConfig(spec, granularity=granularity), HEADS, DIM)
    choice = PredictorChoice(row_shift, None, worth_it=True)
    fit = LayerFit("layer", child, hp.Polynomial.parse(spec), choice)
    with torch.no_grad():
        for step in fit.passes():
            for chunk in rows_of("layer", seen, step.stride):
                step.see(chunk)
    return fit
