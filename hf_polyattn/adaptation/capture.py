"""Teacher-forced passes: softmax runs, and every patched layer observes its inputs and softmax's output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import CalibrationError
from ..ops.masks import visible_keys
from ..patching.core import PolyAttention
from ..patching.masking import real_positions
from ..patching.patched import patched_layers, pretrained_model, require_in_memory
from ..patching.running import require_polynomial
from .batches import require_several
from .progress import hidden
from .training import evaluating


@dataclass(frozen=True, slots=True)
class Observation:
    """What one patched attention module saw in one batch.

    Attributes:
        query: (B, H, Tq, D).
        key: (B, G, Tk, D).
        value: (B, G, Tk, Dv).
        output: softmax's attention output, (B, Tq, H, Dv).
        mask: bool, broadcastable to (B, H, Tq, Tk), True = visible; None where only the pattern counts.
        causal, window: the pattern of `hf_polyattn.ops.masks.band`.
        scaling: of the scores.
        real: bool (B, Tq), False for padding; None where every query row is real.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    mask: Tensor | None
    causal: bool
    window: int | None
    scaling: float
    real: Tensor | None

    @property
    def pattern(self) -> dict[str, Any]:
        """What of it `PolyAttention` takes beside query, key and value."""
        return {"mask": self.mask, "causal": self.causal, "window": self.window, "scaling": self.scaling}

    def visible(self, rows: range | None = None, entries: slice = slice(None)) -> Tensor:
        """Returns which keys query rows see, bool (B or 1, H or 1, rows, Tk).

        Args:
            rows: numbers of the query rows; may have a step. None for all.
            entries: of the batch.
        """
        mask = self.mask if self.mask is None or self.mask.shape[0] == 1 else self.mask[entries]
        return visible_keys(
            range(self.query.shape[2]) if rows is None else rows,
            self.key.shape[2],
            mask=mask,
            ranges=None,
            causal=self.causal,
            window=self.window,
            device=self.query.device,
        )


Observer = Callable[[str, PolyAttention, Observation], None]


def model_inputs(model: nn.Module, batch: Any) -> dict[str, Any]:
    """Returns a batch as keyword arguments of the model, on its device.

    Args:
        model: the model.
        batch: a mapping of model inputs, or one tensor for the model's main input.

    Raises:
        CalibrationError: anything else.
    """
    root = pretrained_model(model)
    if isinstance(batch, Tensor):
        batch = {root.main_input_name: batch}
    if not isinstance(batch, Mapping):
        raise CalibrationError(
            f"a batch must be a mapping of model inputs or one tensor for {root.main_input_name!r}, "
            f"got {type(batch).__name__}"
        )
    return {name: value.to(root.device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def take_batches(batches: Iterable[Any], max_batches: int | None) -> list[Any]:
    """Returns at most `max_batches` batches as a list, so that several passes see the same ones.

    Raises:
        CalibrationError: there is none.
        InputError: a single batch.
    """
    require_several(batches)
    taken = list(islice(batches, max_batches))
    if not taken:
        raise CalibrationError("no batches were given; pass an iterable of model inputs with at least one batch")
    return taken


@torch.no_grad()
def observe(
    model: nn.Module, batches: Iterable[Any], observer: Observer, *, progress: bool = True, title: str = "observe"
) -> None:
    """Runs the softmax model over batches; the observer sees each patched layer's inputs and output in turn.

    Args:
        model: a patched model; evaluation mode inside, its modes and its polynomials are as before outside.
        batches: model inputs, see `model_inputs`.
        observer: called with (path of the attention module, its `PolyAttention`, `Observation`).
        progress: show a progress bar.
        title: of the progress bar.

    Raises:
        PatchError: the model is not patched, is not running its polynomials, or is offloaded.
        CalibrationError: a batch that is not a model input.
        InputError: a single batch.
    """
    root = require_polynomial(model)
    require_several(batches)
    require_in_memory(root, "calibrated or diagnosed")
    extra = {"use_cache": False} if "use_cache" in inspect.signature(root.forward).parameters else {}
    with evaluating(model):
        for batch in tqdm(batches, desc=title, disable=hidden(progress), leave=False):
            inputs = model_inputs(model, batch)
            with ExitStack() as stack:
                for path, child in patched_layers(model):
                    stack.enter_context(observing(root, path, child, inputs, observer))
                model(**{**extra, **inputs})


class Replay:
    """Several passes over the same batches, of which softmax runs only the first if its observations fit in memory.

    Args:
        model: a patched model.
        batches: model inputs, see `model_inputs`.
        limit: bytes of queries, keys, values and outputs that may be kept; beyond it every pass runs softmax.
        progress: show a progress bar for each pass.
    """

    def __init__(self, model: nn.Module, batches: list[Any], *, limit: int = 2**30, progress: bool = True) -> None:
        self.model = model
        self.batches = batches
        self.limit = limit
        self.progress = progress
        self.kept: list[tuple[str, PolyAttention, Observation]] | None = []
        self.size = 0

    def run(self, observer: Observer, title: str) -> None:
        """Shows every observation to the observer, in the same order in each pass."""
        if self.kept:  # a pass came before, and all of it is here
            for seen in tqdm(self.kept, desc=title, disable=hidden(self.progress), leave=False):
                observer(*seen)
            return

        def observe_and_keep(path: str, child: PolyAttention, seen: Observation) -> None:
            observer(path, child, seen)
            if self.kept is not None:
                self.kept.append((path, child, seen))
                tensors = (seen.query, seen.key, seen.value, seen.output)
                self.size += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
                if self.size > self.limit:
                    self.kept = None

        observe(self.model, self.batches, observe_and_keep, progress=self.progress, title=title)


@contextmanager
def observing(
    model: nn.Module, path: str, child: PolyAttention, inputs: Mapping[str, Any], observer: Observer
) -> Iterator[None]:
    """Within, a patched attention module runs softmax, and the observer sees what it saw.

    Args:
        model: patched.
        path: of the attention module.
        child: its `PolyAttention`.
        inputs: the model's, of which the padding is read.
        observer: called once for each forward pass.
    """
    decoder = "decoder" in path.split(".") and pretrained_model(model).config.is_encoder_decoder
    child.observer = partial(_deliver, observer, path, child, real_positions(inputs, decoder=decoder))
    try:
        yield
    finally:
        child.observer = None


def _deliver(
    observer: Observer,
    path: str,
    child: PolyAttention,
    real: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    *,
    scaling: float | None,
    **pattern: Any,
) -> None:
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if real is not None:  # of queries only: of cross-attention, the padding of the keys is in its mask
        real = real.bool() if real.shape == (query.shape[0], query.shape[2]) else None
    observer(path, child, Observation(query, key, value, output, scaling=scaling, real=real, **pattern))
