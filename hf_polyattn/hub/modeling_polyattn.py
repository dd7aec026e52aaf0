"""Polynomial attention for one checkpoint, without the package that made it: torch and transformers only.

    t_ij  = (scaling · q_i·k_j − center_i) / radius_h    center_i = c_h + s_i, see `shift` ; with clamp: in [−1, 1]
    w_ij  = m_ij · p_h(t_ij)^s                           p_h(t) = Σ_k (c_h + δ_h A_h)_k t^k ; m_ij ∈ {0,1} visible
    out_i = r_i · Σ_j w_ij v_j                           r_i = n_i^(-1/2) rsqrt | 1/n_i mean | 1 none | 1/Σ_j |w_ij| l1

After `pip install hf_polyattn` this file steps aside: then there are kernels, attention weights and calibration.
Made by `hf_polyattn.export_remote_code`; below stand the classes and the heads of this checkpoint.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

try:
    import hf_polyattn
except ImportError:
    hf_polyattn = None  # type: ignore[assignment]

NAME = "polyattn (pip install hf_polyattn)"  # what config.json calls this attention; refusals quote it
ROWS_AT_ONCE = 256  # queries whose weights are formed together
EPSILON = 1e-37
SWITCHES = ("interval", "clamp", "key_shift")
SHIFT = ("row_shift", "squares", "lengths")
CHANGES = ("delta", "directions")  # of the coefficients, by training; earlier versions saved none
FIX = "pip install hf_polyattn, and import it before loading this model."


class _Tensors(nn.Module):
    """Named parameters of given shapes, some of which may be a polynomial's."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            learns = name not in ("coefficients", "directions")
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=learns))

    def changed(self) -> Tensor:
        """Returns the coefficients c + δA."""
        changed: Tensor = self.coefficients + (self.delta.unsqueeze(-1) * self.directions).sum(-2)
        return changed

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class PolyAttention(_Tensors):
    """The polynomial of one attention module, as `hf_polyattn.patching.core.PolyAttention` saves it.

    Args:
        spec: such as poly6-l1 or poly3^16-l1.
        heads: H, query heads.
        head_dim: D, of queries and keys.
        settings: the model's `polyattn_config`.
    """

    def __init__(self, spec: str, heads: int, head_dim: int, settings: dict[str, Any]) -> None:
        match = re.fullmatch(
            r"(?:poly|taylor)([1-8])(?:\^(1|2|4|8|16|32))?(?:~([12]))?(?:-(rsqrt|mean|none|l1))?", spec
        )
        if match is None:
            raise ValueError(f"this file does not know the polynomial {spec!r}. {FIX}")
        rows, count = heads if settings["granularity"] == "head" else 1, int(match[1]) + 1
        polynomial = {"coefficients": (rows, count), "delta": (rows, count), "directions": (rows, count, count)}
        super().__init__(**polynomial)
        self.power, self.normalizer = int(match[2] or 1), match[4] or "rsqrt"
        self.interval, self.clamp, self.key_shifted = (settings[name] for name in SWITCHES)
        # n_i^(−alpha) is the row scale, and the row sum of a refinement has the same
        self.alpha = {"rsqrt": 0.5, "mean": 1.0}.get(self.normalizer, 0.0)
        self.center = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.key_shift = nn.Parameter(torch.empty(heads, head_dim, dtype=torch.float32))
        self.radius = nn.Parameter(torch.empty(heads, dtype=torch.float32), requires_grad=False)
        squares = settings.get("squares", 0)
        self.moments = None
        if settings.get("row_shift") == "moments":
            self.moments = _Tensors(
                weights=(heads, 8 + squares), means=(heads, 8 + squares), scales=(heads, 8 + squares), lengths=(2,),
                length_shift=(heads, head_dim), squares=(heads, squares, head_dim),
            )  # fmt: skip
        shapes = {**polynomial, "steps": (heads, 5), "center": (heads,), "radius": (heads,)}
        self.refinements = nn.ModuleList(_Tensors(**shapes) for _ in range(int(match[3] or 0)))
        self.expected = {"version": 2, "spec": spec, **{name: settings.get(name) for name in (*SWITCHES, *SHIFT)}}
        if settings["format_version"] > 1:
            self.register_buffer("settings", torch.zeros(256, dtype=torch.uint8))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scaling: float, dropout: float
    ) -> Tensor:
        """Returns the attention output (B, H, Tq, Dv) of (B, H, T, D) operands; visible: bool, None for all keys."""
        outputs = []
        for start in range(0, query.shape[2], ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            part = visible if visible is None or visible.shape[2] == 1 else visible[:, :, rows]
            outputs.append(self._rows(query[:, :, rows], key, value, part, scaling, dropout))
        return torch.cat(outputs, dim=2)

    def _rows(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scaling: float, dropout: float
    ) -> Tensor:
        scores = query @ key.transpose(-1, -2) * scaling
        n = scores.new_full((), scores.shape[-1]) if visible is None else visible.sum(-1, keepdim=True).to(scores.dtype)
        n = n.clamp(min=1)
        center = self._center(query * scaling, scores, visible, n)
        w = self._weights(scores, center, self.radius if self.interval else None, self.changed(), visible)
        w = w / (EPSILON + w.abs().sum(-1, keepdim=True)) if self.normalizer == "l1" else w * n**-self.alpha
        return nn.functional.dropout(w, dropout, training=dropout > 0.0) @ value

    def _weights(
        self, scores: Tensor, center: Tensor, radius: Tensor | None, coefficients: Tensor, visible: Tensor | None
    ) -> Tensor:
        t = scores - center
        t = t if radius is None else t / radius[:, None, None]
        t = t.clamp(-1.0, 1.0) if self.clamp else t
        c = coefficients[:, :, None, None]
        w = torch.zeros_like(t) + c[:, -1]
        for k in range(c.shape[1] - 2, -1, -1):
            w = w * t + c[:, k]
        if visible is not None:  # before the power, which may overflow where it is hidden
            w = w.masked_fill(~visible, 0.0)
        for _ in range(self.power.bit_length() - 1):
            w = w * w
        return w

    def _center(self, query: Tensor, scores: Tensor, visible: Tensor | None, n: Tensor) -> Tensor:
        """Returns where each row's interval lies: the key shift, the moments of the row, its refinements."""
        if not (self.key_shifted or self.refinements):
            return self.center[:, None, None] if self.interval else scores.new_zeros(())
        center = self.center[:, None, None] + query @ self.key_shift.to(query.dtype).unsqueeze(-1)
        if self.moments is not None:
            p = self.moments
            seen = scores if visible is None else scores.masked_fill(~visible, 0.0)
            m = seen.sum(-1, keepdim=True) / n
            v = scores - m if visible is None else (scores - m).masked_fill(~visible, 0.0)
            v = v.square().sum(-1, keepdim=True) / n
            known = n.clamp(p.lengths[0], p.lengths[1]).expand_as(m)
            listed = [m, v, m * m, m * v, v**2, v**3, known.log(), 1.0 / known]
            features = torch.cat([*listed, (query @ p.squares.transpose(-1, -2)).square()], -1)
            learned = ((features - p.means[:, None]) * (p.weights / p.scales)[:, None]).sum(-1, keepdim=True)
            by_length = (known.log() - p.means[:, None, 6:7]) * (query @ p.length_shift.unsqueeze(-1))
            center = center + m + v / 2.0 + (1.0 - self.alpha) * n.log() + learned + by_length
        r: Any
        for r in self.refinements:
            w = self._weights(scores, center + r.center[:, None, None], r.radius, r.changed(), visible)
            z = (w.sum(-1, keepdim=True) * n**-self.alpha).clamp(0.2, 5.0) - 1.0
            g = torch.zeros_like(z)
            for k in range(4, -1, -1):
                g = g * z + r.steps[:, k, None, None]
            center = center + g
        return center

    def _apply(self, fn: Any, recurse: bool = True) -> PolyAttention:
        def keep_precision(tensor: Tensor) -> Tensor:
            applied: Tensor = fn(tensor)
            return tensor.to(applied.device) if applied.dtype in (torch.bfloat16, torch.float16) else applied

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Returns the output of an attention module as Transformers expects it; softmax where it has no polynomial."""
    polynomial: Any = module._modules.get("polyattn")
    if polynomial is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    unsupported = ("softcap", "position_bias", "s_aux", "sinks", "cache", "attn_bias", "output_attentions")
    given = [name for name in unsupported if kwargs.get(name) not in (None, False)]
    if given:
        raise ValueError(f"{type(module).__name__} passes {given[0]!r}, which this file does not support. {FIX}")
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    visible = attention_mask
    if attention_mask is None and causal and query.shape[2] > 1:
        visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
        if kwargs.get("sliding_window") is not None:
            visible = visible.triu(1 - kwargs["sliding_window"])
    elif attention_mask is not None and attention_mask.dtype != torch.bool:
        visible = attention_mask > -1e4  # additive: 0 where visible
        if (attention_mask * visible).any():
            raise ValueError(
                f"{type(module).__name__} adds a bias to its scores, which polynomials cannot carry. {FIX}"
            )
    scaling = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    groups = query.shape[1] // key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(device_type=query.device.type, enabled=False):
        key, value = (x.to(dtype).repeat_interleave(groups, dim=1) for x in (key, value))
        output = polynomial(query.to(dtype), key, value, visible, scaling, kwargs.get("dropout", 0.0))
    return output.transpose(1, 2).contiguous().to(query.dtype), None


class PolynomialModel(PreTrainedModel):  # type: ignore[misc]
    """Gives a model of Transformers the polynomials of this checkpoint, before its weights are loaded."""

    _keep_in_fp32_modules_strict: set[str] | list[str] | None

    def post_init(self) -> None:
        """Adds the polynomials when all other modules are there."""
        if hf_polyattn is None:
            attach(self)
        super().post_init()
        self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or []), "polyattn"}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model; refuses to return attention weights, which are never formed as a whole."""
        if hf_polyattn is None and kwargs.get("output_attentions", self.config.output_attentions):
            raise ValueError(f"output_attentions: this file forms no attention weights. {FIX}")
        return super().__call__(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads the model; refuses a checkpoint that lacks polynomials."""
        wanted = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = {key for key in info["missing_keys"] if ".polyattn." in key}
        parts = {key.rpartition(".")[0] for key in missing}
        if missing == {key for key in model.state_dict() if key.endswith(CHANGES) and key.rpartition(".")[0] in parts}:
            for key in missing:
                tensor = model.get_parameter(key).data
                tensor.copy_(torch.eye(tensor.shape[-1]) if key.endswith("directions") else torch.zeros(()))
            info["missing_keys"] = {*info["missing_keys"]} - missing
        elif missing:
            raise ValueError(f"the checkpoint lacks {sorted(missing)[:4]}, which its config names; download it again")
        for path, module in model.named_modules():
            if hf_polyattn is None and isinstance(module, PolyAttention) and hasattr(module, "settings"):
                module.settings = module.settings.to(torch.uint8)
                found = json.loads(bytes(module.settings.tolist()).rstrip(b"\0"))
                if found != module.expected:
                    raise ValueError(f"{path} has the settings {found}, but config.json says {module.expected}. {FIX}")
        return (model, info) if wanted else model


def attach(model: Any) -> None:
    """Adds a `PolyAttention` to each attention module that the config names and the model has."""
    settings = model.config.polyattn_config
    if settings.get("format_version") not in (1, 2):
        raise ValueError(f"this file reads polyattn_config of format_version 1 and 2, not of a later one. {FIX}")
    modules, prefix, count = dict(model.named_modules()), model.base_model_prefix, 0
    for path, spec in settings["modules"].items():
        module = modules.get(f"{prefix}.{path}", modules.get(path))
        if module is not None:  # a model may be loaded with fewer layers
            module.add_module("polyattn", PolyAttention(spec, *HEADS[path], settings))
            module.config._attn_implementation_internal = NAME
            count += 1
    if not count:
        raise ValueError(f"{type(model).__name__} has none of the modules that polyattn_config names. {FIX}")
    for part in model.modules():  # consumed at load; saved again, it keeps others from running the model as softmax
        if hasattr(getattr(part, "config", None), "polyattn_config"):
            part.config.attn_implementation = NAME


if hf_polyattn is None:
    for name in (NAME, "polyattn"):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, sdpa_mask)

# ---------------------------------------------------------------- this checkpoint

# Query heads and head dim of each attention module.
HEADS: dict[str, tuple[int, int]] = {}
