"""What a config.json says of polynomial attention, read with limits: anyone can upload one.

The standard library only: configs are read before torch and the models of Transformers are imported.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import wraps
from reprlib import repr as short
from typing import Any

from ..errors import PatchError, SpecError
from ..spec import PolyAttentionConfig, Polynomial

CONFIG_KEY = "polyattn_config"
IMPLEMENTATION = "polyattn"
# The same, as saved configs name it: a Transformers without this package quotes it when it refuses the model.
SAVED_IMPLEMENTATION = "polyattn (pip install hf_polyattn)"
IMPLEMENTATIONS = (IMPLEMENTATION, SAVED_IMPLEMENTATION)

# Fields that version 1 did not have.
_SINCE_2 = {"row_shift", "squares", "lengths"}
# A patched model of 200 layers needs 20 kB and 200 entries, 5 levels deep.
MAX_BYTES = 16 * 2**20
MAX_ENTRIES = 10_000
MAX_LENGTH = 1_000
MAX_DEPTH = 64

# Of a saved model, beside the fields of `PolyAttentionConfig`.
_SAVED = ("modules", "softmax_implementation")
_MODULE_PATH = re.compile(r"\w+(\.\w+)*", re.ASCII)


def read_state(state: Any, source: str) -> PolyAttentionConfig:
    """Returns the `PolyAttentionConfig` in a model's `polyattn_config`.

    One with `modules`, the specs by module path, is of a saved model and must have every key; one written by hand
    beside a softmax checkpoint needs a version and a spec.

    Args:
        state: what stands under `polyattn_config`.
        source: the file or model it is from, named by errors.

    Raises:
        SpecError: it cannot be read, or is larger than any model's.
    """
    try:
        return _read(state)
    except SpecError as error:
        reason = str(error)
        reason = reason if len(reason) <= MAX_LENGTH else f"{reason[:MAX_LENGTH]} …"
        raise SpecError(f"{source}: cannot read {CONFIG_KEY}: {reason}") from None


def install_on_configs(configuration_utils: Any) -> None:
    """Checks `polyattn_config` where Transformers reads config.json: whole, within limits, and naming the file.

    And lets configs of polynomial models say `output_attentions`, which Transformers has for "eager" only, take
    `attn_implementation=None` for what it says, nothing, and refuse to be set to another attention than they have.
    """
    config_class = configuration_utils.PreTrainedConfig
    _allow_output_attentions(config_class)
    _guard_implementation(config_class)
    read = config_class._dict_from_json_file.__func__

    @wraps(read)
    def read_with_polyattn(cls: Any, json_file: str | os.PathLike[str]) -> Any:
        mentioned = mentions_polyattn(json_file)
        if mentioned and os.path.getsize(json_file) > MAX_BYTES:
            raise SpecError(f"{json_file} has {os.path.getsize(json_file)} bytes; a config has at most {MAX_BYTES}")
        try:
            content = read(cls, json_file)
        except RecursionError:
            raise SpecError(f"{json_file} is nested too deeply for a config; download or save it again") from None
        if mentioned:
            for state in _states(content, str(json_file)):
                read_state(state, str(json_file))
        return content

    config_class._dict_from_json_file = classmethod(read_with_polyattn)


def _allow_output_attentions(config_class: Any) -> None:
    attribute, validate = config_class.output_attentions, config_class.validate_output_attentions

    def set_output_attentions(self: Any, value: bool) -> None:
        if value and self._attn_implementation in IMPLEMENTATIONS:
            self._output_attentions = value
        else:
            attribute.fset(self, value)

    @wraps(validate)
    def validate_with_polyattn(self: Any) -> None:
        if self._attn_implementation not in IMPLEMENTATIONS:
            validate(self)

    config_class.output_attentions = attribute.setter(set_output_attentions)
    config_class.validate_output_attentions = validate_with_polyattn
    classes = [config_class]
    while classes:  # each class of configs keeps a list of its validators
        kind = classes.pop()
        classes += kind.__subclasses__()
        validators = vars(kind).get("__class_validators__", [])
        validators[:] = [validate_with_polyattn if one is validate else one for one in validators]


def _guard_implementation(config_class: Any) -> None:
    implementation, from_dict = config_class._attn_implementation, config_class.from_dict.__func__

    def set_implementation(self: Any, value: Any) -> None:
        for config, asked in _requests(self, value):
            polynomial = is_armed(config) and config._attn_implementation in IMPLEMENTATIONS
            if polynomial and asked is not None and asked not in IMPLEMENTATIONS:
                raise PatchError(refusal(f"the model of this {type(config).__name__}", asked))
        if value is not None or getattr(self, "_attn_implementation_internal", None) not in IMPLEMENTATIONS:
            implementation.fset(self, value)

    @wraps(from_dict)
    def from_dict_with_polyattn(cls: Any, config_dict: Any, **kwargs: Any) -> Any:
        if CONFIG_KEY in config_dict and kwargs.get("attn_implementation", "") is None:
            del kwargs["attn_implementation"]
        return from_dict(cls, config_dict, **kwargs)

    config_class._attn_implementation = implementation.setter(set_implementation)
    config_class.from_dict = classmethod(from_dict_with_polyattn)  # type: ignore[arg-type]


def _requests(config: Any, value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields what setting `_attn_implementation` asks of a config and of each one inside."""
    if not isinstance(value, dict):
        yield config, value
    elif "" in value:
        yield config, value[""]
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is not None and (not isinstance(value, dict) or name in value):
            yield from _requests(inner, value[name] if isinstance(value, dict) else value)


def _read(state: Any) -> PolyAttentionConfig:
    if not isinstance(state, Mapping):
        raise SpecError(f"it must be a mapping, got {type(state).__name__} {short(state)}")
    _check_size(state)
    config = PolyAttentionConfig.from_dict({key: value for key, value in state.items() if key not in _SAVED})
    if "modules" not in state:
        return config
    needed = {*_SAVED, *(field.name for field in fields(PolyAttentionConfig))}
    missing = sorted(needed - state.keys() - (_SINCE_2 if state.get("format_version") == 1 else set()))
    if missing:
        raise SpecError(f"it lacks {missing}, which a saved model has. Save the model again with save_pretrained.")
    if not isinstance(state["softmax_implementation"], str):
        raise SpecError(f"softmax_implementation must be a string, got {short(state['softmax_implementation'])}")
    modules = state["modules"]
    if not isinstance(modules, Mapping):
        raise SpecError(f"modules must map module paths to specs, got {type(modules).__name__} {short(modules)}")
    for path, spec in modules.items():
        if not isinstance(path, str) or not _MODULE_PATH.fullmatch(path):
            raise SpecError(f"modules: {short(path)} is not the path of a module, such as 'layers.0.self_attn'")
        try:
            Polynomial.parse(spec)
        except SpecError as error:
            raise SpecError(f"modules: {path!r}: {error}") from None
    return config


def _check_size(state: Mapping[Any, Any]) -> None:
    """Raises SpecError if there is more in a config than any model needs, so that no later message quotes it."""
    for key, value in [(CONFIG_KEY, state), *state.items()]:
        if isinstance(value, (Mapping, list, tuple)) and len(value) > MAX_ENTRIES:
            raise SpecError(f"{short(key)} has {len(value)} entries; at most {MAX_ENTRIES} are read")
    if any(len(text) > MAX_LENGTH for text, _ in _walk(state) if isinstance(text, str)):
        raise SpecError(f"a name or value in it is longer than {MAX_LENGTH} characters")


def _states(content: Any, source: str) -> Iterator[Any]:
    """Yields each `polyattn_config` in a config.json: of the model and of its submodels."""
    for value, depth in _walk(content):
        if depth > MAX_DEPTH:
            raise SpecError(f"{source} is nested more than {MAX_DEPTH} levels deep, which no config is")
        if isinstance(value, Mapping) and value.get(CONFIG_KEY) is not None:
            yield value[CONFIG_KEY]


def _walk(value: Any) -> Iterator[tuple[Any, int]]:
    """Yields a value, and the keys and values inside it, each with its depth, without recursion."""
    waiting = [(value, 0)]
    while waiting:
        value, depth = waiting.pop()
        yield value, depth
        if isinstance(value, Mapping):
            waiting += [(inner, depth + 1) for pair in value.items() for inner in pair]
        elif isinstance(value, (list, tuple)):
            waiting += [(inner, depth + 1) for inner in value]


def is_armed(config: Any) -> bool:
    """Whether a config is of a patched model; one that was only read from a checkpoint is not yet."""
    return "attn_implementation" in vars(config)


def refusal(of: str, asked: Any) -> str:
    """Returns why what has polynomial attention does not take another one: the one rule of softmax on request."""
    return (
        f"{of} has polynomial attention, and attn_implementation {asked!r} was asked for. Call unpatch_model(model) "
        "first, after which it is free, or use softmax_attention(model) for a while."
    )


def mentions_polyattn(json_file: str | os.PathLike[str]) -> bool:
    """Whether a file mentions `polyattn_config`; other models' configs are none of this package's business."""
    if os.path.getsize(json_file) == 0:
        return False
    with open(json_file, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(CONFIG_KEY.encode()) >= 0
