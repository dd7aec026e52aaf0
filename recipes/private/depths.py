"""Multiplicative depth and secret products of attention by spec and length, as `hp.polynomials` counts them."""

from __future__ import annotations

from transformers import BertConfig, BertModel

import hf_polyattn as hp

SPECS = ("poly2", "poly3", "poly4", "poly3~1", "poly3-l1", "poly6-l1", "poly1^16-l1", "poly3^4-l1", "poly3^16-l1")
SHIFTED = ("poly3", "poly4", "poly3~1")
LENGTHS = (32, 128, 512)
SLOTS = 2**15


def rows() -> list[tuple[str, ...]]:
    """Returns (spec, depth, inverses a row, and for each length millions of products / those of ciphertexts).

    Of one layer of MiniLM's shape, 12 heads of 32.
    """
    sizes = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 8, "num_hidden_layers": 1}
    model = BertModel(BertConfig(vocab_size=8, max_position_embeddings=8, **sizes), add_pooling_layer=False)
    found = []
    for spec, shift in [*((spec, "none") for spec in SPECS), *((spec, "moments") for spec in SHIFTED)]:
        hp.patch_model(model, hp.PolyAttentionConfig(spec, interval=True, clamp=False, row_shift=shift))
        layer = hp.polynomials(model).layers[0]
        counts = [f"{sum(layer.products(n).values()) / 1e6:.2f} / {layer.ciphertexts(n, SLOTS)}" for n in LENGTHS]
        name = f"`{spec}`" if shift == "none" else f"`{spec}`, moments"
        found.append((name, str(layer.depth), str(layer.divisions), *counts))
        hp.unpatch_model(model)
    return found


HEADER = ("spec", "depth", "inverses a row", *(f"{length} tokens" for length in LENGTHS))
