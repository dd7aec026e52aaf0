"""What the pictures of a model show, as plain data: maps of one head, curves of one layer's heads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adaptation.calibration import CalibrationReport
from ..adaptation.capture import Observation, model_inputs, observe
from ..diagnosis.inspection import interval_scores, scaled_scores, weights_and_slopes
from ..errors import InputError, PatchError
from ..figures import AttentionMap, HeadCurve
from ..patching.core import PolyAttention, is_patched
from ..patching.patched import patched_layers, pretrained_model

BINS = 60
POINTS = 200
_HALF_WIDTH = 6.0  # nats, of what is drawn of a polynomial without an interval when no scores are at hand


@torch.no_grad()
def attention_map(
    model: nn.Module,
    inputs: Any,
    layer: int | str,
    head: int,
    *,
    tokens: Sequence[str] | None = None,
    query: int | None = None,
) -> AttentionMap:
    """Returns the maps of one head; see `maps`."""
    path, child = layer_of(model, layer)
    if not 0 <= head < child.heads:
        raise InputError(f"layer {path!r} has heads 0 to {child.heads - 1}, got {head!r}")
    prepared = model_inputs(model, inputs)
    seen = _observed(model, prepared, path)
    _, weights = child(seen.query, seen.key, seen.value, return_weights=True, **seen.pattern)
    scores, visible = _scores(seen)
    softmax = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
    rows, keys = _real(seen)
    ours, theirs = (part[0, head].float()[rows][:, keys].cpu() for part in (weights, softmax))
    picture, grid = _picture(model, prepared, int(keys.sum()))
    if query is not None and not 0 <= query < len(ours):
        raise InputError(f"there are query rows 0 to {len(ours) - 1}, got {query!r}")
    if query is not None:
        ours, theirs = ours[query : query + 1], theirs[query : query + 1]
    names = _names(tokens, keys), _names(tokens, rows)
    return AttentionMap(
        title=f"{path}, head {head}",
        softmax=theirs.numpy(),
        polynomial=ours.numpy(),
        rows=names[1] if query is None else names[1][query : query + 1],
        keys=names[0],
        picture=picture,
        grid=grid,
    )


@torch.no_grad()
def head_curves(
    model: nn.Module,
    report: CalibrationReport | None,
    *,
    layer: int | str | None = None,
    batches: Iterable[Any] | None = None,
) -> tuple[str, list[HeadCurve]]:
    """Returns the title of a layer and the curves of its heads; see `heads`."""
    if layer is None:
        layer = _worst(report)
    path, child = layer_of(model, layer)
    fits = {} if report is None else {own.path: own for own in report.layers}
    fit = fits.get(path)
    middle = torch.zeros(child.heads, dtype=torch.float64)
    if fit is not None:
        middle = torch.tensor([(low + high) / 2.0 for low, high in fit.interval], dtype=torch.float64)
    edges, shares = _histogram(model, path, child, batches)
    low, high = (edges[:, 0], edges[:, -1]) if shares is not None else _ends(child)
    t = low[:, None] + (high - low)[:, None] * torch.linspace(0.0, 1.0, POINTS, dtype=torch.float64)
    every = torch.ones(1, 1, 1, POINTS, dtype=torch.bool)
    weight, _ = weights_and_slopes(child, t[None, :, None].to(child.coefficients.device), every.to(child.radius.device))
    weight = weight[0, :, 0].double().cpu()
    radius = child.radius.double().cpu() if child.config.interval else torch.ones(child.heads, dtype=torch.float64)
    exponential = _exponential(child, t * radius[:, None], middle, weight, edges, shares, t, exact=fit is not None)
    curves = []
    for head in range(child.heads):
        explained = f" · explained {fit.explained_variance[head]:.4f}" if fit is not None else ""
        curves.append(
            HeadCurve(
                title=f"head {head}{explained}",
                scores=(middle[head] + radius[head] * t[head]).tolist(),
                polynomial=weight[head].tolist(),
                exponential=exponential[head].tolist(),
                edges=(middle[head] + radius[head] * edges[head]).tolist() if shares is not None else (),
                counts=shares[head].tolist() if shares is not None else (),
            )
        )
    return f"{path} · {child.config.spec}", curves


def layer_of(model: nn.Module, layer: int | str) -> tuple[str, PolyAttention]:
    """Returns path and polynomial of a patched layer, by number among them or by path.

    Raises:
        PatchError: the model is not patched.
        InputError: there is no such layer.
    """
    if not is_patched(model):
        raise PatchError(f"{type(model).__name__} is not patched; call patch_model(model, spec) first")
    layers = patched_layers(model)
    if isinstance(layer, str):
        found = dict(layers).get(layer)
        if found is not None:
            return layer, found
    elif 0 <= layer < len(layers):
        return layers[layer]
    paths = [path for path, _ in layers]
    raise InputError(f"patched layers are 0 to {len(layers) - 1}, at {paths}; got {layer!r}")


def _worst(report: CalibrationReport | None) -> int | str:
    if report is None:
        return 0
    return min(report.layers, key=lambda own: sum(own.explained_variance) / len(own.explained_variance)).path


def _observed(model: nn.Module, inputs: Any, wanted: str) -> Observation:
    """Returns what one layer sees of one batch, softmax running."""
    found: list[Observation] = []

    def observer(path: str, child: PolyAttention, seen: Observation) -> None:
        if path == wanted and not found:
            found.append(seen)

    observe(model, [inputs], observer, progress=False)
    if not found:
        raise InputError(f"no query of these inputs reaches {wanted!r}; pass inputs that run this layer")
    return found[0]


def _scores(seen: Observation) -> tuple[Tensor, Tensor]:
    """Returns the scaled scores and which of them are visible, (B, H, Tq, Tk)."""
    scores = scaled_scores(seen.query.float(), seen.key.float(), seen.scaling)
    return scores, seen.visible().expand(scores.shape[0], scores.shape[1], -1, -1)


def _real(seen: Observation) -> tuple[Tensor, Tensor]:
    """Returns which query rows, and which keys, of the first sequence are no padding."""
    q_len, k_len = seen.query.shape[2], seen.key.shape[2]
    everything = torch.ones(q_len, dtype=torch.bool), torch.ones(k_len, dtype=torch.bool)
    if seen.real is None:
        return everything
    rows = seen.real[0].cpu()
    return rows, rows if k_len == q_len else everything[1]


def _names(tokens: Sequence[str] | None, chosen: Tensor) -> tuple[str, ...]:
    if tokens is None or len(tokens) < len(chosen):
        return () if tokens is None or len(tokens) != int(chosen.sum()) else tuple(tokens)
    return tuple(token for token, real in zip(tokens, chosen.tolist(), strict=False) if real)


def _picture(model: nn.Module, inputs: dict[str, Any], keys: int) -> tuple[Any, tuple[int, int] | None]:
    """Returns the picture of a model of images and its grid of patches, if the keys are such."""
    pixels, config = inputs.get("pixel_values"), pretrained_model(model).config
    size = getattr(config, "patch_size", None)
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or size is None:
        return None, None
    high, wide = (size, size) if isinstance(size, int) else tuple(size)
    grid = pixels.shape[2] // high, pixels.shape[3] // wide
    if not 0 < grid[0] * grid[1] <= keys:  # windows of patches, or a hierarchy of them
        return None, None
    picture = pixels[0].float().permute(1, 2, 0).cpu()
    picture = (picture - picture.min()) / (picture.max() - picture.min()).clamp(min=1e-12)
    return picture.expand(-1, -1, 3).numpy(), grid


def _ends(child: PolyAttention) -> tuple[Tensor, Tensor]:
    half = torch.ones(child.heads, dtype=torch.float64) * (1.0 if child.config.interval else _HALF_WIDTH)
    return -half, half


def _histogram(
    model: nn.Module, path: str, child: PolyAttention, batches: Iterable[Any] | None
) -> tuple[Tensor, Tensor | None]:
    """Returns edges (H, BINS + 1) in units of t, and the share of the visible scores in each bin; None without data.

    With an interval the ends are a fifth beyond it on both sides, and scores outside count at the ends.
    """
    low, high = _ends(child)
    if batches is None:
        return torch.stack([low, high], -1), None
    seen_t: list[Tensor] = []

    def observer(where: str, layer: PolyAttention, seen: Observation) -> None:
        if where != path:
            return
        scores, visible = _scores(seen)
        if seen.real is not None:
            visible = visible & seen.real[:, None, :, None]
        t = interval_scores(layer, seen.query.float(), scores, visible, seen.scaling)
        seen_t.append(t.masked_fill(~visible, torch.nan).transpose(0, 1).flatten(1).double().cpu())

    observe(model, batches, observer, progress=False)
    if not seen_t:
        raise InputError(f"no query of these batches reaches {path!r}; pass batches that run this layer")
    t = torch.cat(seen_t, 1)
    if not child.config.interval:
        low, high = t.nan_to_num(math.inf).amin(1), t.nan_to_num(-math.inf).amax(1)
    low, high = low - 0.1 * (high - low), high + 0.1 * (high - low)
    edges = low[:, None] + (high - low)[:, None] * torch.linspace(0.0, 1.0, BINS + 1, dtype=torch.float64)
    place = ((t - low[:, None]) / (high - low)[:, None] * BINS).clamp(0, BINS - 1)
    shares = torch.stack([torch.bincount(own[~own.isnan()].long(), minlength=BINS).double() for own in place])
    return edges, shares / shares.sum(1, keepdim=True)


def _exponential(
    child: PolyAttention,
    scores: Tensor,
    middle: Tensor,
    weight: Tensor,
    edges: Tensor,
    shares: Tensor | None,
    t: Tensor,
    *,
    exact: bool,
) -> Tensor:
    """Returns what the polynomials stand in for, (H, POINTS): exp of the shifted scores.

    A row sum leaves its scale open, and so does a calibration that nobody reports: then it is the least squares fit to
    the polynomial, weighed by where the scores are.
    """
    if exact and child.config.spec.normalizer != "l1":
        return (scores + middle[:, None]).exp()
    exponential = (scores - scores.amax(1, keepdim=True)).exp()
    weighed = torch.ones_like(exponential)
    if shares is not None:
        place = ((t - edges[:, :1]) / (edges[:, -1:] - edges[:, :1]) * BINS).long().clamp(0, BINS - 1)
        weighed = shares.gather(1, place)
    scale = (weighed * weight * exponential).sum(1) / (weighed * exponential.square()).sum(1).clamp(min=1e-300)
    return exponential * scale[:, None]
