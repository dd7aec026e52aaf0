"""Rows without padding and unseen keys are the rows that count, and are made once where memory allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fitting_cases import CPU, DIM, HEADS, SCALING, fitted, observation
from torch import Tensor

from hf_polyattn.adaptation.capture import Observation
from hf_polyattn.adaptation.fitting import packing
from hf_polyattn.adaptation.fitting.packing import packed_rows
from hf_polyattn.adaptation.fitting.row_shift import Predictor, RowShift
from hf_polyattn.adaptation.fitting.row_store import RowStore
from hf_polyattn.adaptation.fitting.rows import observed_rows


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def encoder(side: str = "right", lengths: tuple[int, ...] = (3, 30, 11, 29, 2, 12), longest: int = 40) -> Observation:
    """Returns what an encoder's layer sees of texts of these lengths, padded on a side to the longest."""
    ends = torch.arange(longest)
    real = torch.stack([ends < n if side == "right" else ends >= longest - n for n in lengths])
    query, output = torch.zeros(len(lengths), HEADS, longest, DIM), torch.zeros(len(lengths), longest, HEADS, 3)
    key, value = torch.zeros(len(lengths), 2, longest, DIM), torch.zeros(len(lengths), 2, longest, 3)
    for entry, count in enumerate(lengths):
        generator, at = torch.Generator().manual_seed(count), real[entry]
        q, k, v = (
            torch.randn(heads, count, size, generator=generator) for heads, size in ((HEADS, DIM), (2, DIM), (2, 3))
        )
        query[entry, :, at], key[entry, :, at], value[entry, :, at] = 2.0 * q, k, v
        attended = torch.nn.functional.scaled_dot_product_attention(
            2.0 * q[None], k[None], v[None], enable_gqa=True, scale=SCALING
        )
        output[entry, at] = attended[0].transpose(0, 1)
    return Observation(query, key, value, output, real[:, None, None], False, None, SCALING, real)


CASES: dict[str, Callable[[], Observation]] = {
    "padded right": encoder,
    "padded left": lambda: encoder("left"),
    "causal": lambda: observation(length=150),
    "window": lambda: replace(observation(length=150), window=20),
    "masks of heads": lambda: replace(encoder(), mask=torch.rand(6, HEADS, 40, 40) < 0.3),
}


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_packed_rows_are_those_that_count(name: str, stride: int) -> None:
    seen = CASES[name]()
    packed = list(packed_rows("layer", seen, stride))
    facts: list[dict[tuple[float, ...], Tensor]] = []
    for of in (observed_rows("layer", seen, stride), packed):
        found = {}
        for rows in of:
            shares = torch.stack([rows.log_partition_sums(), *rows.moments(), rows.count.expand_as(rows.weight)], -1)
            weights = (rows.scores - rows.log_partition_sums()[..., None]).exp() * rows.visible
            shares = torch.cat([shares, rows.apply(weights.float()), rows.target], -1)  # softmax again
            for entry, head, row in (rows.weight > 0.0).nonzero().tolist():
                found[tuple(rows.query[entry, head, row].tolist())] = shares[entry, head, row].double()
        facts.append(found)
    assert facts[0].keys() == facts[1].keys()
    assert len(facts[0]) > 50
    for query, expected in facts[0].items():
        torch.testing.assert_close(facts[1][query], expected, rtol=1e-4, atol=1e-5)
    held, all_scores = (
        sum(rows.scores.numel() for rows in packed),
        sum(rows.scores.numel() for rows in observed_rows("layer", seen, stride)),
    )
    assert stride > 1 or held < 0.8 * all_scores


def test_rows_know_their_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_BLOCK_ROWS", 8)
    seen, entries = encoder(), set()
    for rows in packed_rows("layer", seen, 1, first=10):
        assert rows.entries is not None
        assert rows.query.shape[2] <= 8
        for place, number in enumerate(rows.entries.tolist()):
            real = rows.weight[place, 0] > 0.0
            entries |= {number} if real.any() else set()
            of_entry = seen.query[number - 10].transpose(0, 1).tolist()
            assert all(row in of_entry for row in rows.query[place].transpose(0, 1)[real].tolist())
    assert entries == set(range(10, 16))


@pytest.mark.parametrize("spec", ["poly3~1", "poly4-l1"])
def test_padding_changes_nothing(spec: str) -> None:
    def differences(of: Any) -> tuple[float, ...]:
        paddings = (encoder("right", LENGTHS, 60), encoder("left", LENGTHS, 77))
        one, other = (fitted(spec, seen, row_shift="moments", rows_of=of) for seen in paddings)
        pairs = ((one.coefficients, other.coefficients), (one.shift._solution, other.shift._solution))
        return tuple(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)

    assert max(differences(packed_rows)) < 1e-8
    assert min(differences(observed_rows)) > 1e-8  # in float32, padding among the sums


LENGTHS = tuple(range(3, 60, 5))


# ---------------------------------------------------------------- rows that are kept


def test_rows_are_made_once_and_numbered_through() -> None:
    store, numbers = RowStore(), []
    first = []
    for _ in range(2):
        store.restart()
        for seen in (encoder(), encoder(lengths=(7, 5))):
            for rows in store.rows("layer", seen, 1):
                assert rows.entries is not None
                numbers.append(rows.entries.tolist())
                first.append(rows)
    half = len(first) // 2
    assert all(one is other for one, other in zip(first[:half], first[half:], strict=True))
    assert {entry for part in numbers for entry in part} == set(range(8))
    assert store.size == sum(rows.bytes for rows in first[:half])


def test_rows_beyond_the_limit_are_made_again() -> None:
    seen = encoder()
    size = sum(rows.bytes for rows in packed_rows("layer", seen, 1))
    store = RowStore(limit=size // 2)
    passes = []
    for _ in range(2):
        store.restart()
        passes.append(list(store.rows("layer", seen, 1)))
    assert store.size == 0
    for one, other in zip(*passes, strict=True):
        assert one is not other
        assert torch.equal(one.scores, other.scores)


def test_rows_of_another_stride_make_room() -> None:
    seen = encoder()
    store = RowStore(limit=sum(rows.bytes for rows in packed_rows("layer", seen, 1)))
    for stride in (1, 3):
        store.restart()
        made = list(store.rows("layer", seen, stride))
        assert store.size == sum(rows.bytes for rows in made)
    store.restart()
    assert all(one is other for one, other in zip(store.rows("layer", seen, 3), made, strict=True))


def test_held_out_entries_do_not_depend_on_their_order() -> None:
    """Rows come by length; which are held out is by number."""
    seen = encoder(lengths=(30, 5, 28, 6, 33, 31, 7, 29))
    shifts = []
    for of in (observed_rows, packed_rows):
        shift = RowShift(HEADS, DIM, 0.5, CPU)
        for rows in of("layer", seen, 1):
            shift.see(rows)
        shifts.append(shift)
    one, other = shifts
    assert (one._held_out.count, one._fitted.count) == (6 + 29, 30 + 5 + 28 + 33 + 31 + 7)
    assert (other._held_out.count, other._fitted.count) == (one._held_out.count, one._fitted.count)
    for shift in shifts:
        shift.solve(Predictor("moments"))
    torch.testing.assert_close(one._held_out.gram, other._held_out.gram, rtol=1e-4, atol=1e-3)
