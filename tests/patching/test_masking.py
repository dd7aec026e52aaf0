"""Padding, causality, windows and packed sequences reach the operator as ranges that equal Transformers' own mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, masking_utils

from hf_polyattn import InputError
from hf_polyattn.ops import packed_ranges
from hf_polyattn.patching.masking import packed_mask, polyattn_mask, split_mask, visible_scores
from hf_polyattn.patching.range_mask import RangeMask

FUNCTIONS: dict[str, Any] = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(3),
    "window-both": masking_utils.sliding_window_bidirectional_mask_function(2),
}
PADDING = {
    "none": None,
    "left": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]),
    "right": torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]]),
    "both": torch.tensor([[0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0]]),
    "nothing-visible": torch.tensor([[0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]]),
}
# q_length, kv_length, q_offset, kv_offset: full pass, chunk of a cached prefill, one token, static and sliding cache
GEOMETRY = {
    "full": (7, 7, 0, 0),
    "chunk": (3, 7, 4, 0),
    "token": (1, 7, 6, 0),
    "static": (4, 7, 0, 0),
    "slid": (2, 4, 5, 3),
}


def masks(function: Any, padding: Tensor | None, geometry: str, **options: Any) -> tuple[Tensor | None, Tensor]:
    """Our mask, and that of Transformers, dense."""
    sizes = GEOMETRY[geometry]
    padding = None if padding is None else padding.bool()
    ours = polyattn_mask(2, *sizes, function, padding, **options)
    dense = masking_utils.sdpa_mask(2, *sizes, function, padding, allow_is_causal_skip=False)
    assert dense is not None
    return ours, dense


@pytest.mark.parametrize("geometry", GEOMETRY)
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_ranges_equal_the_dense_mask(function: str, padding: str, geometry: str) -> None:
    ours, dense = masks(FUNCTIONS[function], PADDING[padding], geometry, allow_is_causal_skip=False)
    assert isinstance(ours, RangeMask)
    assert ours.shape == dense.shape
    assert ours.ranges is not None
    assert torch.equal(ours.dense(), dense)


@pytest.mark.parametrize("geometry", GEOMETRY)
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("function", ["causal", "window"])
def test_a_mask_is_left_out_only_where_causality_says_all(function: str, padding: str, geometry: str) -> None:
    ours, dense = masks(FUNCTIONS[function], PADDING[padding], geometry)
    implied = torch.ones(dense.shape, dtype=torch.bool)
    if dense.shape[2] > 1:
        implied = implied.tril()
    assert (ours is None) == torch.equal(dense, implied)


@pytest.mark.parametrize("padding", PADDING)
def test_a_bidirectional_mask_is_left_out_only_where_all_is_visible(padding: str) -> None:
    function = FUNCTIONS["bidirectional"]
    ours, dense = masks(
        function, PADDING[padding], "full", allow_is_causal_skip=False, allow_is_bidirectional_skip=True
    )
    assert (ours is None) == bool(dense.all())


@pytest.mark.parametrize("window", [None, 3])
def test_packed_sequences_are_ranges(window: int | None) -> None:
    config = LlamaConfig(sliding_window=window, attn_implementation="polyattn_test")
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0]])
    make = masking_utils.create_causal_mask if window is None else masking_utils.create_sliding_window_causal_mask
    found = {}
    for name, function in (("ranges", polyattn_mask), ("dense", masking_utils.sdpa_mask)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "polyattn_test", function)
            patch.setattr(config, "_attn_implementation_internal", "polyattn_test")
            found[name] = make(config, torch.zeros(1, 9, 4), None, past_key_values=None, position_ids=positions)
    ours = found["ranges"]
    assert isinstance(ours, RangeMask)
    assert torch.equal(ours.dense(), found["dense"])
    if window is None:
        assert ours.ranges is not None
        assert torch.equal(ours.ranges[..., 0], packed_ranges(torch.tensor([0, 3, 8, 9]), 9)[..., 0])


def test_packed_ranges_end_with_the_last_sequence() -> None:
    ranges = packed_ranges(torch.tensor([0, 2, 2, 5]), 7)
    assert ranges.tolist() == [[[0, 2]] * 2 + [[2, 5]] * 3 + [[5, 5]] * 2]


HOLES = torch.tensor([[1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
BLOCKS = masking_utils.and_masks(
    masking_utils.causal_mask_function, masking_utils.chunked_overlay(3, torch.zeros(2, dtype=torch.int))
)


@pytest.mark.parametrize(
    ("function", "padding"),
    [
        (FUNCTIONS["causal"], HOLES),
        (BLOCKS, None),
        (masking_utils.or_masks(FUNCTIONS["causal"], FUNCTIONS["bidirectional"]), None),
        (lambda batch, head, query, key: key <= query + 1, None),
    ],
    ids=["padding-with-holes", "chunked", "or", "foreign"],
)
def test_what_is_no_range_becomes_the_dense_mask(function: Any, padding: Tensor | None) -> None:
    ours, dense = masks(function, padding, "full", allow_is_causal_skip=False)
    assert ours is not None
    assert torch.equal(ours, dense)
    assert split_mask(ours) == (ours, None)


def test_a_padded_batch_makes_no_tensor_of_queries_times_keys(pretrained: Any, polynomial: Any) -> None:
    model = polynomial(pretrained("minilm", "AutoModel"))
    seen: list[dict[str, Any]] = []
    layer = model.encoder.layer[0].attention.self.polyattn
    layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    attention_mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    model(input_ids=torch.full((2, 5), 7), attention_mask=attention_mask)
    assert seen[0]["mask"] is None
    assert seen[0]["ranges"].tolist() == [[[0, 4]], [[0, 5]]]


def range_mask() -> RangeMask:
    return RangeMask(torch.tensor([[[1, 3]], [[0, 2]]], dtype=torch.int32), 2, 4)


DENSE = torch.tensor([[[[False, True, True, False]] * 2], [[[True, True, False, False]] * 2]])


def test_a_range_mask_is_a_bool_mask_to_any_operation() -> None:
    mask = range_mask()
    assert mask.dtype == torch.bool
    assert mask.shape == DENSE.shape
    assert torch.equal(mask & True, DENSE)
    assert torch.equal(torch.zeros(DENSE.shape).masked_fill(mask, 1.0), DENSE.float())
    assert torch.equal(torch.cat([mask, mask], dim=-1), torch.cat([DENSE, DENSE], dim=-1))
    assert split_mask(mask)[1] is not None


def change(mask: Tensor) -> None:
    mask[:, :, 1, 2] = False


def change_through_a_view(mask: Tensor) -> None:
    mask[0].fill_(False)


def change_in_place(mask: Tensor) -> None:
    mask &= torch.tensor([True, False, True, True])


@pytest.mark.parametrize("edit", [change, change_through_a_view, change_in_place])
def test_a_range_mask_that_a_model_edits_becomes_dense(edit: Any) -> None:
    mask, expected = range_mask(), DENSE.clone()
    edit(mask)
    edit(expected)
    dense, ranges = split_mask(mask)
    assert ranges is None
    assert dense is not None
    assert torch.equal(dense, expected)


def test_a_compiled_model_takes_a_range_mask(pretrained: Any, polynomial: Any) -> None:
    model = polynomial(pretrained("gpt2-zinc", "AutoModelForCausalLM", n_layer=1)).double()
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
    mask = RangeMask(torch.tensor([[[1, 1], [1, 2], [1, 3], [1, 4]]], dtype=torch.int32).expand(2, -1, -1), 4, 4)
    expected = model(input_ids=ids, attention_mask=mask).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(input_ids=ids, attention_mask=mask).logits, expected, rtol=1e-9)
    assert not torch.allclose(model(input_ids=ids).logits, expected, rtol=1e-3)


def test_an_integer_mask_is_refused() -> None:
    with pytest.raises(InputError, match=r"must be bool or additive float, got torch.int64"):
        visible_scores(torch.ones(1, 1, 3, 3, dtype=torch.int64))


def test_borders_of_packed_sequences_are_turned_into_ranges_once_a_forward_pass() -> None:
    query = torch.zeros(1, 2, 6, 4)
    borders, others = (torch.tensor(edges, dtype=torch.int32) for edges in ([0, 2, 6], [0, 4, 6]))
    padding = RangeMask(torch.tensor([[[0, 5]]], dtype=torch.int32), 6, 6)

    def packed(borders: Tensor, mask: Any = None, causal: bool = True, window: int | None = None) -> Any:
        return packed_mask(mask, (borders, borders), query, query, causal, window)

    first = packed(borders)
    assert packed(borders) is first  # the second layer's
    assert first.ranges[0, :, 0].tolist() == [0, 0, 2, 2, 2, 2]
    assert packed(borders, causal=False).ranges[0, :, 1].tolist() == [2, 2, 6, 6, 6, 6]
    assert packed(borders, window=1).ranges[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert packed(borders, padding, causal=False).ranges[0, :, 1].tolist() == [2, 2, 5, 5, 5, 5]
    assert packed(others).ranges[0, :, 0].tolist() == [0, 0, 0, 0, 4, 4]
    borders.copy_(others)  # the next batch, in the same memory
    assert packed(borders).ranges[0, :, 0].tolist() == [0, 0, 0, 0, 4, 4]
    with torch.inference_mode():  # whose tensors do not say when they change
        assert packed(borders.clone()).ranges[0, :, 0].tolist() == [0, 0, 0, 0, 4, 4]
