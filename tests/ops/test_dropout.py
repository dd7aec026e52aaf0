"""Every backend, forward and backward, drops the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from error_budget import operands, outputs_and_gradients
from formula import backends, distance, normalizers
from kernel_cases import (
    dropout_pattern,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_polyattn import polynomial_attention
from hf_polyattn.ops import chunked

pytestmark = pytest.mark.usefixtures("small_blocks")


def test_backends_drop_the_same_weights() -> None:
    pattern = dropout_pattern("chunked", 0.3)
    assert torch.equal(pattern, dropout_pattern("reference", 0.3))
    assert not torch.equal(pattern, dropout_pattern("reference", 0.3, seed=1))


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropped_fraction_is_the_probability(probability: float) -> None:
    pattern = dropout_pattern("chunked", probability, (256, 256))
    kept = pattern > 0
    assert torch.allclose(pattern[kept], torch.tensor(1.0 / (1.0 - probability)))
    deviation = (probability * (1.0 - probability)) ** 0.5
    # Binomial bounds of 5 standard deviations: over all weights, each row, each column, and pairs of neighbours.
    assert abs(kept.double().mean() - (1.0 - probability)) < 5 * deviation / kept.numel() ** 0.5
    for axis, count in ((-1, 256), (1, 256)):
        fractions = kept.double().mean(axis)
        assert (fractions - (1.0 - probability)).abs().max() < 5 * deviation / count**0.5
    centered = kept.double() - (1.0 - probability)
    for axis in range(4):
        size = centered.shape[axis] - 1
        product = centered.narrow(axis, 0, size) * centered.narrow(axis, 1, size)
        assert abs(product.mean()) < 5 * deviation**2 / product.numel() ** 0.5


def test_dropout_preserves_the_expectation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_BLOCK_WEIGHTS_CPU", 10**6)
    tensors = [tensor.detach() for tensor in operands()]
    torch.manual_seed(0)
    draws = torch.stack([polynomial_attention(*tensors, normalizer="l1", dropout=0.3) for _ in range(400)])
    error = (draws.mean(0) - polynomial_attention(*tensors, normalizer="l1")).abs()
    assert bool((error < 5 * draws.std(0) / 400**0.5).all())
    assert draws.std(0).min() > 0.0


@normalizers
def test_backward_drops_what_forward_dropped(normalizer: str) -> None:
    settings = {"normalizer": normalizer, "power": 2, "causal": True, "window": 3, "dropout": 0.4}
    results = []
    for backend, seed in (("reference", 0), ("chunked", 0), ("chunked", 1)):
        torch.manual_seed(seed)
        results.append(outputs_and_gradients(operands(), **settings, backend=backend))
    for name, expected in results[0].items():
        assert distance(results[1][name], expected) < 1e-12
        assert distance(results[2][name], expected) > 1e-2


@backends
def test_no_dropout_draws_no_random_numbers(backend: str) -> None:
    tensors = operands()
    state = torch.get_rng_state()
    output = polynomial_attention(*tensors, dropout=0.0, backend=backend)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(output, polynomial_attention(*tensors, backend=backend))
    assert not torch.equal(output, polynomial_attention(*tensors, dropout=0.5, backend=backend))
    assert not torch.equal(torch.get_rng_state(), state)


@backends
def test_manual_seed_governs_dropout(backend: str) -> None:
    tensors = operands()
    torch.manual_seed(3)
    first, second = (polynomial_attention(*tensors, dropout=0.5, backend=backend) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(polynomial_attention(*tensors, dropout=0.5, backend=backend), first)
    assert not torch.equal(first, second)


@backends
def test_checkpointing_recomputes_the_same_dropout(backend: str) -> None:
    tensors = operands()

    def gradient(run: Callable[..., Tensor], **options: Any) -> Tensor:
        torch.manual_seed(0)
        output = run(lambda *t: polynomial_attention(*t, dropout=0.4, backend=backend), *tensors, **options)
        return torch.autograd.grad(output.square().sum(), tensors[0])[0]

    expected = gradient(lambda function, *args: function(*args))
    assert torch.equal(gradient(checkpoint, use_reentrant=False), expected)
    assert not torch.equal(gradient(checkpoint, use_reentrant=False, preserve_rng_state=False), expected)
