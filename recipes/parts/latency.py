"""How long a model takes beside the softmax checkpoint."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class Latency:
    """Times a forward pass of a model and of softmax in turns.

    Attributes:
        batch: of held-out examples.
        repeats: timed passes of each model.
    """

    batch: Mapping[str, Tensor]
    repeats: int

    def __call__(self, model: PreTrainedModel, softmax: PreTrainedModel) -> dict[str, float]:
        """Returns the median times in milliseconds, `latency_ms` and `softmax_latency_ms`."""
        pairs = [(model, []), (softmax, [])]
        batch = {name: tensor.to(softmax.device) for name, tensor in self.batch.items()}
        with torch.inference_mode():
            for turn in range(self.repeats + 1):
                for timed, times in pairs:
                    started = time.perf_counter()
                    timed(**batch)
                    if softmax.device.type == "cuda":
                        torch.cuda.synchronize(softmax.device)
                    if turn > 0:  # the first is warm-up
                        times.append(1e3 * (time.perf_counter() - started))
        own, theirs = (round(statistics.median(times), 3) for _, times in pairs)
        return {"latency_ms": own, "softmax_latency_ms": theirs}
