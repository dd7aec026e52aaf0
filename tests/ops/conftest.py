"""What the tests of the operator share is rewritten as tests are, and found by those in folders below."""

import pytest

from hf_polyattn.ops import chunked

pytest.register_assert_rewrite("kernel_cases", "formula")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every call cross block boundaries in batch, heads and rows."""
    monkeypatch.setattr(chunked, "_BLOCK_WEIGHTS_CPU", 32)
    monkeypatch.setattr(chunked, "_BAND_ROWS", 2)
