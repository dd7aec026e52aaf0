"""A tiny model of any family of Transformers, with inputs: built from the names of config fields and arguments."""

from __future__ import annotations

import importlib
import inspect
import re
import zlib
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 512
MAX_PARAMETERS = 40_000_000
BATCH, LENGTH, DECODER_LENGTH = 2, 11, 7

Inputs = dict[str, Tensor]

# Small values by field name; the first pattern that matches the whole name decides. Defaults are never enlarged.
_SMALL = [
    (re.compile(pattern), value)
    for pattern, value in (
        (r".*vocab_size.*", VOCABULARY),
        (r"pad_token_id", 0),
        (r"bos_token_id|decoder_start_token_id", 1),
        (r"eos_token_id", 2),
        (r".*key_value_heads|num_kv_heads|multi_query_group_num", 2),
        (r".*heads?", 4),
        (r"attention_head_size|d_kv|d_head|dim_head|(.*_)?head_dim", 8),
        (r"(q|kv|o)_lora_rank", 16),
        (r"encoder_hidden_dim", 256),  # RT-DETR and its kin: what decoder_in_channels expects
        (r"d_model|n_embd|.*hidden_size|.*hidden_dim|embedding_size|.*embed(ding)?_dim|(emb_|enc_)?dim", 32),
        (r"output_channels|output_dim|.*proj(ect)?(ion)?_dim", 32),
        (r".*intermediate_(size|dim)|.*ffn_dim|.*ffn_hidden_size|.*feed_?forward(_dim|_size)?", 64),
        (r"mlp_dim|d_ff|dff|d_inner", 64),
        (r"n_layers?|(.*_)?layers|.*_layer_num|(.*_)?depth|num_blocks", 2),
        (r"n_positions|n_ctx|max_.*positions?(_embeddings)?|max_seq_len|seq_len(gth)?|max_sequence_length", 64),
        (r"(pretrain_)?image_size|img_size", 32),
        (r"patch_size", 8),
        (r"num_(local_)?experts|n_routed_experts|moe_num_experts", 4),
        (r"num_experts_per_tok|moe_topk|moe_k|top_k", 2),
        (r"n_group|topk_group", 1),
        (r"num_mel_bins|feature_size", 16),
        (r"sliding_window", 5),  # shorter than the inputs, as are the next
        (r"rotary_dim|index_topk|index_block_size", 4),
        (r"num_queries|num_denoising|num_query_tokens|.*num_latents|.*_n_latents|latent_query_num", 10),
        (r"query_pre_attn_scalar", 8),
        (r"upsample_groups", 32),
    )
]
_OWN_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
_INHERITED = {field.name for field in fields(PreTrainedConfig)} - set(_OWN_TOKENS)

# What families need beyond the rules above.
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}
_HALF_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}}
_OVERRIDES: dict[str, dict[str, Any]] = {
    family: values
    for families, values in (
        ("qwen2_vl_text qwen2_5_vl_text qwen2_5_omni_text qwen2_5_omni_talker paddleocr_vl_text", _MROPE),
        ("cosmos3_edge_text", _MROPE),
        ("glm4v_text glm4v_moe_text glm_image_text glm_ocr_text", _HALF_MROPE),
        ("swin swinv2 donut-swin maskformer-swin", {"image_size": 64, "window_size": 2, "encoder_stride": 4}),
        (
            "sam_vision_model sam_hq_vision_model slanext_vision pp_formulanet_vision",
            {"image_size": 64, "window_size": 2, "num_pos_feats": 16, "global_attn_indexes": [1]},
        ),
        ("sam_prompt_encoder sam_hq_prompt_encoder", {"image_size": 64}),
        ("sam_hq_mask_decoder", {"vit_dim": 32}),
        ("sam2_hiera_det_model", {"hidden_size": 96}),
        (
            "autoformer informer time_series_transformer",
            {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2, 3]},
        ),
        ("qwen3_next qwen3_5_text qwen3_5_moe_text qwen4_exp_text", {"num_hidden_layers": 4}),  # the 4th has attention
        ("jamba", {"num_hidden_layers": 6}),
        ("bamba", {"attn_layer_indices": [1]}),
        ("granitemoehybrid", {"layer_types": ["mamba", "attention"]}),
        ("recurrent_gemma", {"num_hidden_layers": 3}),
        ("mllama_text_model", {"cross_attention_layers": [1]}),
        ("musicgen_decoder musicgen_melody_decoder", {"num_codebooks": 1}),
        ("chameleon", {"vocabulary_map": {"<image>": 300}}),
        ("deepseek_v2 deepseek_ocr2_text", {"num_experts_per_tok": 2}),
        ("pix2struct_vision_model kosmos_2_5_vision_model", {"patch_embed_hidden_size": 192}),
        ("bridgetower_vision_model", {"hidden_size": 64}),
        ("esm", {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 3}),
        ("glm5_next_text", {"index_kpool": 2, "num_key_value_heads": 4}),
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]]}),
        ("layoutlmv3", {"coordinate_size": 5, "shape_size": 6}),
        ("led", {"attention_window": 4}),
        ("lilt", {"hidden_size": 48}),
        ("nemotron", {"num_key_value_heads": 2}),
        ("reformer", {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 4}),
        ("step3p5", {"sliding_window": 5}),
        ("videomae", {"num_frames": 4, "tubelet_size": 2}),
        ("vivit", {"num_frames": 4, "tubelet_size": [2, 8, 8]}),
        ("xmod", {"default_language": "en_XX"}),
    )
    for family in families.split()
}


class UnavailableError(Exception):
    """A family that cannot be built or run here, and why."""


def tiny_config(kind: type[PreTrainedConfig], **overrides: Any) -> PreTrainedConfig:
    """Returns a config of two layers, width 32 and four heads, its sub-configs included."""
    values: dict[str, Any] = {}
    for field in fields(kind):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if field.name not in _INHERITED and default is not MISSING:
            values[field.name] = _small(field.name, default)
    for name, spec in kind.sub_configs_defaults.items():
        if not spec.optional and name not in overrides:
            own = issubclass(spec.config_class, PreTrainedConfig)
            sub_kind = spec.config_class if own else CONFIG_MAPPING[spec.model_type]
            given = {key: _small(key, value) for key, value in spec.init_kwargs.items()}
            stages = {"out_features", "out_indices"} & given.keys()
            if stages and hasattr(sub_kind, "num_hidden_layers"):  # a backbone: all its stages must be there
                given["num_hidden_layers"] = spec.init_kwargs.get("num_hidden_layers", 12)
            values[name] = tiny_config(sub_kind, **given)
    if "kv_lora_rank" in values:  # multi-head latent attention has as many key heads as query heads
        values["num_key_value_heads"] = 4
    values |= _OVERRIDES.get(kind.model_type, {}) | overrides
    return kind(**values)


def _small(name: str, default: Any) -> Any:
    if name == "head_dim" and default is None:
        return 8
    if name.endswith("num_heads") and isinstance(default, (list, tuple)):
        return type(default)(2 ** (stage + 1) for stage in range(len(default)))
    if name in ("image_size", "patch_size") and isinstance(default, (list, tuple)):
        return type(default)(_small(name, side) for side in default)
    if isinstance(default, float) and "drop" in name:
        return 0.0
    if not isinstance(default, int) or isinstance(default, bool):
        return default
    if re.search(r"_(id|index)$", name) and name not in _OWN_TOKENS:
        return default if default < VOCABULARY // 2 else VOCABULARY // 2 + zlib.crc32(name.encode()) % (VOCABULARY // 2)
    for pattern, value in _SMALL:
        if pattern.fullmatch(name):
            return value if name in _OWN_TOKENS else min(value, default)
    return default


def model_class(model_type: str) -> type[PreTrainedModel]:
    """Returns the class that the auto classes build for a model type, else the one that names its config.

    Raises:
        UnavailableError: there is none.
    """
    tables = ["MODEL_MAPPING_NAMES", *sorted(n for n in dir(modeling_auto) if re.fullmatch("MODEL_FOR_.*_NAMES", n))]
    for table in tables:
        name = getattr(modeling_auto, table).get(model_type)
        if name is not None:
            return getattr(transformers, name if isinstance(name, str) else name[0])
    kind = CONFIG_MAPPING[model_type]
    try:
        module = importlib.import_module(kind.__module__.replace("configuration_", "modeling_"))
    except ModuleNotFoundError as error:
        raise UnavailableError("it has no model of its own") from error
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, PreTrainedModel)
        and getattr(value, "config_class", None) is kind
        and not value.__name__.endswith("PreTrainedModel")
    ]
    if not classes:
        raise UnavailableError("it has no model of its own: a part of others")
    return min(classes, key=lambda value: (not value.__name__.endswith("Model"), len(value.__name__)))


def tiny_model(family: str, dtype: torch.dtype) -> PreTrainedModel:
    """Returns a model with weights of such a size that attention scores are far from zero.

    The initialisation of Transformers leaves every score near zero, where softmax and any polynomial are flat.

    Raises:
        UnavailableError: the family cannot be built here.
    """
    try:
        kind = model_class(family)
        config = tiny_config(CONFIG_MAPPING[family])
        config._experts_implementation = "eager"  # the grouped matrix products know no float64
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in kind(config).parameters())
        if size > MAX_PARAMETERS:
            raise UnavailableError(f"its smallest model here has {size / 1e6:.0f} million parameters")
        torch.manual_seed(0)
        model = kind(config).eval().to(dtype)
    except UnavailableError:
        raise
    except Exception as error:  # whatever a config says of sizes that do not fit
        raise UnavailableError(f"not built: {type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.is_floating_point():
                gain = 1.5 if parameter.dim() == 2 else 1.0
                parameter.normal_(0.0, gain * max(1, parameter[:1].numel()) ** -0.5)
    return model


def candidate_inputs(model: PreTrainedModel) -> Iterator[Inputs]:
    """Yields inputs that the arguments of `model.forward` suggest, the richest first; not all of them will fit."""
    names = inspect.signature(model.forward).parameters
    text = {name: value for name, value in text_inputs(model).items() if name in names}
    for other in [*_image_inputs(model), *_audio_inputs(model), *_series_inputs(model)]:
        other = {name: value for name, value in other.items() if name in names}
        if other and "input_ids" in text:
            yield _with_placeholders(model, text, other) | other
        if other:
            yield other | {name: value for name, value in text.items() if name.startswith("decoder")}
    if text:
        yield text


def text_inputs(model: PreTrainedModel, padding: str = "right") -> Inputs:
    """Returns token ids, the second row padded by three, and decoder ids where the model is an encoder-decoder."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 200, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    if padding == "left":
        mask = mask.flip(1)
    boxes = torch.tensor([2, 3, 7, 9]).expand(BATCH, LENGTH, 4)
    inputs = {"input_ids": ids, "attention_mask": mask, "bbox": boxes}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(5, 200, (BATCH, DECODER_LENGTH), generator=generator)
    return inputs


def _image_inputs(model: PreTrainedModel) -> Iterator[Inputs]:
    config = getattr(model.config, "vision_config", None) or model.config
    size, patch = _side(config, "image_size", 32), _side(config, "patch_size", 8)
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    channels = channels if isinstance(channels, int) else 3
    frames = getattr(config, "num_frames", 2)
    if "query_embeds" in inspect.signature(model.forward).parameters:
        yield {"query_embeds": _noise(BATCH, 6, 32), "encoder_hidden_states": _noise(BATCH, 5, 32)}
    for shape in ((channels, size, size), (frames, channels, size, size), (1, channels, size, size)):
        pixels = _noise(BATCH, *shape)
        names = ("pixel_values", "pixel_values_videos", "image", "prompt_pixel_values")
        images = dict.fromkeys(names, pixels) | {"qformer_input_ids": torch.ones(BATCH, 4, dtype=torch.long)}
        yield images
        yield images | {"image_sizes": torch.tensor([[size, size]] * BATCH)}
    tiles = {"aspect_ratio_ids": torch.ones(BATCH, 1).long(), "aspect_ratio_mask": torch.ones(BATCH, 1, 4).long()}
    yield {"pixel_values": _noise(BATCH, 1, 4, channels, size, size), **tiles}

    depth = getattr(config, "temporal_patch_size", 1)
    grid = torch.tensor([[1, 4, 4]] * BATCH)
    patches = _noise(BATCH * 16, channels * depth * patch * patch)
    grids = {"grid_thw": grid, "image_grid_thw": grid, "merge_sizes": torch.ones(BATCH).long()}
    yield {"pixel_values": patches, "hidden_states": patches, **grids}

    rows = patches.view(BATCH, 16, -1)
    shapes = {"pixel_attention_mask": torch.ones(BATCH, 16).long(), "spatial_shapes": torch.tensor([[4, 4]] * BATCH)}
    places = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).expand(BATCH, -1, -1) + 1
    yield {"pixel_values": rows, "flattened_patches": torch.cat([places, rows], dim=-1), **shapes}


def _audio_inputs(model: PreTrainedModel) -> Iterator[Inputs]:
    config = getattr(model.config, "audio_config", None) or model.config
    default = getattr(config, "feature_projection_input_dim", None) or getattr(config, "input_feat_per_channel", 16)
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or default
    frames = 2 * getattr(config, "max_source_positions", 32)
    mask = torch.ones(BATCH, frames).long()
    for shape in ((bins, frames), (frames, bins)):
        masks = {"input_features_mask": mask, "feature_attention_mask": mask}
        yield {"input_features": _noise(BATCH, *shape), "input_values": _noise(BATCH, *shape), **masks}
    for shape in ((4000,), (1, 4000)):
        yield {"input_values": _noise(BATCH, *shape)}


def _series_inputs(model: PreTrainedModel) -> Iterator[Inputs]:
    config = model.config
    length = getattr(config, "context_length", None) or 32
    lagged = length + max(getattr(config, "lags_sequence", None) or [0])
    yield {"past_values": _noise(BATCH, length, getattr(config, "num_input_channels", 1))}
    yield {"past_values": _noise(BATCH, length)}
    yield {
        "past_values": _noise(BATCH, lagged),
        "past_time_features": _noise(BATCH, lagged, 0),
        "past_observed_mask": torch.ones(BATCH, lagged),
        "future_values": _noise(BATCH, 8),
        "future_time_features": _noise(BATCH, 8, 0),
    }


def _with_placeholders(model: PreTrainedModel, text: Inputs, features: Inputs) -> Inputs:
    """Returns the text with one image token for each row of image features that the model puts into it."""
    token = getattr(model.config, "image_token_id", None) or getattr(model.config, "image_token_index", None)
    if token is None or not hasattr(model, "get_image_features"):
        return text
    names = inspect.signature(model.get_image_features).parameters
    try:
        with torch.no_grad():
            output = model.get_image_features(**{name: x for name, x in features.items() if name in names})
        rows = output.pooler_output if hasattr(output, "pooler_output") else output
        count = sum(row.flatten(0, -2).shape[0] for row in rows) // BATCH
    except Exception:  # features of another kind: the forward pass will say so
        return text
    fillers = {"input_ids": token, "attention_mask": 1}
    filled = text | {
        name: torch.cat([text[name][:, :4], torch.full((BATCH, count), filler), text[name][:, 4:]], dim=1)
        for name, filler in fillers.items()
        if name in text
    }
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        filled["mm_token_type_ids"] = (filled["input_ids"] == token).long()
    return filled


def _side(config: PreTrainedConfig, name: str, default: int) -> int:
    size = getattr(config, name, default)
    while isinstance(size, (list, tuple)):
        size = size[0]
    return size if isinstance(size, int) else default


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
