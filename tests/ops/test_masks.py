"""The longest row of a call, counted from its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_polyattn.ops.masks import longest_visible, visible_keys

PADDED = torch.zeros(2, 1, 1, 64, dtype=torch.bool)
PADDED[0, ..., :7], PADDED[1, ..., 50:] = True, True
CASES: dict[str, tuple[int, dict[str, Any], int]] = {
    "all": (5, {}, 64),
    "causal": (20, {"causal": True}, 20),
    "window": (64, {"window": 4}, 7),
    "window-one-row": (1, {"window": 4}, 4),
    "causal-window": (64, {"causal": True, "window": 9}, 9),
    "padded-to-a-length": (64, {"mask": PADDED}, 14),
    "padded-causal": (64, {"mask": PADDED, "causal": True}, 14),
    "static-cache": (1, {"ranges": torch.tensor([[[0, 15]]])}, 15),
    "ranges-of-two": (8, {"ranges": torch.tensor([[[3, 10]], [[0, 23]]])}, 23),
    "ranges-causal": (8, {"ranges": torch.tensor([[[3, 10]], [[0, 23]]]), "causal": True}, 8),
    "one-long-row": (2, {"ranges": torch.tensor([[[0, 2], [1, 63]]])}, 62),
}


@pytest.mark.parametrize("case", CASES)
def test_the_longest_row_is_that_of_the_visible_keys(case: str) -> None:
    queries, settings, expected = CASES[case]
    every = {"mask": None, "ranges": None, "causal": False, "window": None} | settings
    seen = visible_keys(range(queries), 64, device=torch.device("cpu"), **every)
    assert seen.sum(-1).max() == expected
    assert longest_visible(queries, 64, torch.device("cpu"), **settings) == expected


def test_a_batch_without_rows_has_no_length() -> None:
    assert longest_visible(0, 64, torch.device("cpu"), window=3) == 0
