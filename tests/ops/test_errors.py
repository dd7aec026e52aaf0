"""Wrong input and backends that cannot run a call are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from error_budget import operands

from hf_polyattn import BackendError, InputError, polynomial_attention

pytestmark = pytest.mark.usefixtures("small_blocks")

MASK = torch.ones(2, 1, 5, 7, dtype=torch.bool)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "three-dimensions": ({"query": torch.ones(4, 5, 4)}, r"need 4 dimensions .* got query \(4, 5, 4\)"),
    "batch": ({"key": torch.ones(3, 2, 7, 4)}, r"shapes do not fit: .* key \(3, 2, 7, 4\).*Allowed: query \(B, H"),
    "head-dim": ({"query": torch.ones(2, 4, 5, 8)}, r"shapes do not fit: query \(2, 4, 5, 8\)"),
    "no-head-dim": ({"query": torch.ones(2, 4, 5, 0), "key": torch.ones(2, 2, 7, 0)}, "shapes do not fit.*D >= 1"),
    "value-length": ({"value": torch.ones(2, 2, 6, 3)}, r"shapes do not fit: .* value \(2, 2, 6, 3\)"),
    "heads": ({"query": torch.ones(2, 3, 5, 4)}, "must be a multiple of key/value heads; got 3 and 2"),
    "mixed-dtypes": ({"key": torch.ones(2, 2, 7, 4).half()}, "need one dtype of .* got torch.float32, torch.float16"),
    "integers": ({n: torch.ones(s).long() for n, s in (("query", (2, 4, 5, 4)), ("key", (2, 2, 7, 4)),
                  ("value", (2, 2, 7, 3)))}, "got torch.int64"),
    "coefficients-heads": ({"coefficients": torch.ones(3, 4)}, r"\(H, P \+ 1\) or \(1, P \+ 1\) with H = 4; got"),
    "coefficients-dtype": ({"coefficients": torch.ones(4, 4).long()}, "coefficients must be float .* torch.int64"),
    "degree-0": ({"coefficients": torch.ones(4, 1)}, r"degree must be in 1\.\.8; got 1 coefficients"),
    "degree-9": ({"coefficients": torch.ones(4, 10)}, r"degree must be in 1\.\.8; got 10 coefficients"),
    "device": ({"coefficients": torch.ones(4, 4, device="meta")}, "must share a device; got cpu, cpu, cpu, meta"),
    "mask-dtype": ({"mask": MASK.float()}, "mask must be bool, True = visible; got torch.float32.*mask == 0"),
    "mask-shape": ({"mask": MASK[..., :6]}, r"mask \(2, 1, 5, 6\) does not fit; allowed: .* Tk = 7"),
    "mask-keys-1": ({"mask": MASK[..., :1]}, r"mask \(2, 1, 5, 1\) does not fit"),
    "mask-2d": ({"mask": MASK[:, 0, 0]}, r"mask \(2, 7\) does not fit"),
    "ranges-dtype": ({"ranges": torch.ones(2, 5, 2)}, "ranges must be int, .*; got torch.float32"),
    "ranges-shape": ({"ranges": torch.ones(2, 4, 2, dtype=torch.int32)}, r"ranges \(2, 4, 2\) do not fit; .* Tq = 5"),
    "ranges-device": ({"ranges": torch.ones(1, 1, 2, dtype=torch.int32, device="meta")}, "ranges are on meta"),
    "mask-device": ({"mask": MASK.to("meta")}, "mask is on meta, query on cpu"),
    "normalizer": ({"normalizer": "softmax"}, "normalizer 'softmax' is not one of .*'l1'"),
    "power": ({"power": 3}, r"power 3 is not one of \(1, 2, 4, 8, 16, 32\)"),
    "window": ({"window": 0}, "window must be at least 1 key, got 0"),
    "dropout-1": ({"dropout": 1.0}, r"dropout must be a probability in \[0, 1\), got 1.0"),
    "dropout-negative": ({"dropout": -0.1}, r"dropout must be a probability in \[0, 1\), got -0.1"),
    "center-shape": ({"center": torch.ones(5)}, r"center must be a float, \(H,\) or \(B, H, Tq\) .* got \(5,\)"),
    "center-device": ({"center": torch.ones(4, device="meta")}, "center is on meta, query on cpu"),
    "radius-0": ({"radius": 0.0}, "radius must be positive, got 0.0"),
    "radius-nan": ({"radius": float("nan")}, "radius must be positive, got nan"),
    "radius-shape": ({"radius": torch.ones(2)}, r"radius must be a float or \(H,\) with H = 4; got \(2,\)"),
    "radius-device": ({"radius": torch.ones(4, device="meta")}, "radius is on meta, query on cpu"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named_with_what_is_allowed(case: str) -> None:
    right = dict(zip(("query", "key", "value", "coefficients"), operands(dtype=torch.float32), strict=True))
    polynomial_attention(**right)
    wrong, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        polynomial_attention(**{**right, **wrong})


def test_unknown_backend_is_named_with_the_known_ones() -> None:
    with pytest.raises(
        BackendError,
        match=r"backend 'cuda' does not exist. Use one of \['auto', 'triton', 'cpu', 'chunked', 'reference'\]",
    ):
        polynomial_attention(*operands(), backend="cuda")


def test_backend_asked_for_by_name_never_falls_back() -> None:
    message = r"backend 'chunked' cannot run this call: .*return_weights=True.*Use backend='reference' or 'auto'"
    with pytest.raises(BackendError, match=message):
        polynomial_attention(*operands(), backend="chunked", return_weights=True)
    output, _ = polynomial_attention(*operands(), backend="auto", return_weights=True)
    assert torch.equal(output, polynomial_attention(*operands(), backend="reference"))


def test_auto_takes_the_chunked_backend() -> None:
    assert "GeneratedBackward" in type(polynomial_attention(*operands()).grad_fn).__name__
    assert "GeneratedBackward" not in type(polynomial_attention(*operands(), backend="reference").grad_fn).__name__


@pytest.mark.parametrize("number", [0.0, -1.0, float("nan")])
def test_a_radius_in_a_tensor_must_be_positive_too(number: float) -> None:
    query, key, value = torch.randn(3, 1, 2, 5, 8).unbind()
    coefficients, radius = torch.ones(2, 4), torch.tensor([1.0, number])
    with pytest.raises(InputError, match="radius must be positive"):
        polynomial_attention(query, key, value, coefficients, radius=radius)
    radius.requires_grad_(True)
    with pytest.raises(InputError, match="radius must be positive"):
        polynomial_attention(query, key, value, coefficients, radius=radius, backend="reference")
    assert (
        polynomial_attention(query, key, value, coefficients, radius=radius.detach().nan_to_num(1.0).clamp(min=0.1))[0]
        .isfinite()
        .all()
    )
