"""A damaged or hostile repository raises one clear error, before anything of it runs, and writes nothing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import hf_polyattn as hp
from hf_polyattn.patching.patched import patched_layers

FIRST = "transformer.h.0.attn.polyattn"
Break = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(pretrained: Any, polynomial: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patched checkpoint with nothing wrong."""
    folder = tmp_path_factory.mktemp("whole")
    polynomial(pretrained("gpt2-zinc", "AutoModelForCausalLM")).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- ways to break it


def config(change: Callable[[dict[str, Any]], object]) -> Break:
    """Edits config.json."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        change(content)
        (folder / "config.json").write_text(json.dumps(content))

    return apply


def state(**changes: Any) -> Break:
    """Edits `polyattn_config`; a key whose new value is ... is taken away."""

    def change(content: dict[str, Any]) -> None:
        new = content["polyattn_config"] | changes
        content["polyattn_config"] = {key: value for key, value in new.items() if value is not ...}

    return config(change)


def modules(**changes: Any) -> Break:
    """Adds to the specs by module."""
    return config(lambda content: content["polyattn_config"]["modules"].update(changes))


def weights(change: Callable[[dict[str, Tensor]], object]) -> Break:
    """Edits model.safetensors."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def fill(name: str, value: float) -> Break:
    return weights(lambda tensors: tensors[f"{FIRST}.{name}"].view(-1)[0].fill_(value))


def reshape(name: str, change: Callable[[Tensor], Tensor]) -> Break:
    """Changes all tensors of a name, as the checkpoint of another model has them."""

    def apply(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.endswith(f"polyattn.{name}")]:
            tensors[key] = change(tensors[key]).contiguous()

    return weights(apply)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def absurd_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + file.read_bytes()[8:])


class Bomb:
    """Unpickled, it leaves a file: a pickle can run any code."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder.parent / "exploded")))
    config(lambda content: content.pop("dtype"))(folder)  # Transformers then reads weights to find it out


def sharded(shard: str) -> Break:
    """Makes an index that names a shard."""

    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        names = list(load_file(file))
        file.rename(folder / "inside.safetensors")
        shutil.copy(folder / "inside.safetensors", folder.parent / "outside.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "inside.safetensors") | {names[0]: shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return apply


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def without_polynomials(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if "polyattn" in key]:
        del tensors[key]


def bomb_of_text(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text()[:-2] + ',"a":' + "[" * 100_000 + "]" * 100_000 + "}")


def heavy_config(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text() + " " * (17 * 2**20))


def settings(**changes: Any) -> Break:
    """Edits the settings beside the first polynomial."""

    def change(tensors: dict[str, Tensor]) -> None:
        content = json.loads(bytes(tensors[f"{FIRST}.settings"].tolist()).rstrip(b"\0")) | changes
        tensors[f"{FIRST}.settings"] = torch.tensor(
            list(json.dumps(content).encode().ljust(256, b"\0")), dtype=torch.uint8
        )

    return weights(change)


CHECKPOINT, SPEC, PATCH = hp.CheckpointError, hp.SpecError, hp.PatchError
BROKEN: dict[str, tuple[Break, type[Exception], str]] = {
    # name: how, the error, what its message says
    "truncated-safetensors": (truncate, CHECKPOINT, r"model.safetensors cannot be read as safetensors.*Download"),
    "absurd-header": (absurd_header, CHECKPOINT, r"model.safetensors cannot be read as safetensors.*Download"),
    "empty-safetensors": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""), CHECKPOINT, "model.safetensors cannot be read"
    ),
    "pickle": (pickled, CHECKPOINT, r"pytorch_model.bin is not a safetensors file.*a pickle can run code"),
    "shard-outside": (sharded("../outside.safetensors"), CHECKPOINT, r"outside.safetensors.*outside the checkpoint"),
    "shard-anywhere": (sharded("/etc/shadow.safetensors"), CHECKPOINT, "'/etc/shadow.safetensors', outside"),
    "nan-coefficient": (fill("coefficients", float("nan")), CHECKPOINT, rf"model.safetensors.*{FIRST}.coef.*has NaN"),
    "inf-radius": (fill("radius", float("inf")), CHECKPOINT, rf"model.safetensors.*{FIRST}.radius.*has NaN or inf"),
    "no-settings": (weights(lambda tensors: tensors.pop(f"{FIRST}.settings")), CHECKPOINT, r"\['settings'\] of the"),
    "settings-of-the-future": (settings(version=99), CHECKPOINT, rf"{FIRST}.settings' has version 99.*--upgrade"),
    "settings-unknown": (settings(row_sums=1), CHECKPOINT, rf"{FIRST}.settings' has unknown fields \['row_sums'\]"),
    "settings-of-another": (settings(spec="poly3-l1"), CHECKPOINT, rf"{FIRST}.settings is of .*poly3-l1, but conf"),
    "settings-garbled": (fill("settings", 7), CHECKPOINT, rf"{FIRST}.settings' holds no JSON"),
    "settings-short": (reshape("settings", lambda t: t[:9]), CHECKPOINT, r"settings' is torch.uint8 with shape \(9,\)"),
    "zero-radius": (fill("radius", 0.0), CHECKPOINT, rf"model.safetensors.*{FIRST}.radius.*must be positive"),
    "nan-center": (fill("center", float("nan")), CHECKPOINT, rf"{FIRST}.center.*has NaN"),
    "nan-key-shift": (fill("key_shift", float("nan")), CHECKPOINT, rf"{FIRST}.key_shift.*has NaN"),
    "integers": (reshape("center", Tensor.int), CHECKPOINT, "center.*int32.*must be floating point"),
    "wrong-heads": (
        reshape("coefficients", lambda t: t.repeat(2, 1)), CHECKPOINT, r"coef.*\(2, 4\), but 1 heads.*need \(1, 4\)"
    ),
    "wrong-degree": (
        reshape("coefficients", lambda t: t[:, :3]), CHECKPOINT, r"coef.*\(1, 3\).*the spec poly3 need \(1, 4\)"
    ),
    "wrong-dimensions": (reshape("radius", lambda t: t[None]), CHECKPOINT, "radius.*with 1 dimensions"),
    "missing-tensor": (
        weights(lambda t: t.pop(f"{FIRST}.key_shift")), CHECKPOINT, rf"\['key_shift'\] of the polynomial '{FIRST}' are"
    ),
    "missing-tensors": (weights(without_polynomials), CHECKPOINT, "'coefficients', .* of the polynomial .* missing"),
    "unknown-tensor": (
        weights(lambda t: t.update({f"{FIRST}.spline": torch.ones(4)})), CHECKPOINT, "spline' is no tensor.*pip install"
    ),
    "polynomial-of-softmax": (
        config(lambda c: c["polyattn_config"]["modules"].pop("h.0.attn")), PATCH, "'transformer.h.0.attn'.*silently"
    ),
    "no-config": (lambda folder: (folder / "config.json").unlink(), ValueError, "config.json"),
    "no-polyattn-config": (config(lambda c: c.pop("polyattn_config")), PATCH, "'transformer.h.0.attn'.*silently"),
    "softmax-that-asks-for-polyattn": (
        lambda folder: (config(lambda c: c.pop("polyattn_config"))(folder), weights(without_polynomials)(folder)),
        PATCH, "there is no polyattn_config",
    ),
    "version-from-the-future": (state(format_version=3), SPEC, "config.json.*format_version 3.*pip install --upgrade"),
    "version-missing": (state(format_version=...), SPEC, "config.json.*no format_version"),
    "version-of-a-wrong-type": (state(format_version=True), SPEC, "config.json.*format_version True"),
    "extra-keys": (state(kernel="x", url="y"), SPEC, r"config.json.*unknown keys \['kernel', 'url'\]"),
    "missing-key": (state(clamp=...), SPEC, r"config.json.*lacks \['clamp'\]"),
    "unknown-spec": (state(spec="spline3"), SPEC, "config.json.*spec 'spline3' does not follow the grammar"),
    "unknown-normalizer": (modules(**{"h.0.attn": "poly3-max"}), SPEC, "'h.0.attn'.*normalizer 'max'"),
    "unknown-backend": (state(backend="quantum"), SPEC, "backend 'quantum' does not exist"),
    "state-of-a-wrong-type": (config(lambda c: c.update(polyattn_config=["poly3"])), SPEC, "a mapping, got list"),
    "modules-of-a-wrong-type": (state(modules=["h.0.attn"]), SPEC, "modules must map.*got list"),
    "module-spec-of-a-wrong-type": (modules(**{"h.0.attn": 3}), SPEC, "'h.0.attn': a spec is a string, got int"),
    "relative-path": (modules(**{"../../x": "poly3"}), SPEC, "'../../x' is not the path of a module"),
    "absolute-path": (modules(**{"/etc/passwd": "poly3"}), SPEC, "'/etc/passwd' is not the path of a module"),
    "glob-path": (modules(**{"h.*.attn": "poly3"}), SPEC, r"'h.\*.attn' is not the path of a module"),
    "module-that-is-not-there": (modules(**{"h.99.attn": "poly3"}), CHECKPOINT, r"\['h.99.attn'\].*no such modules"),
    "module-that-is-no-attention": (modules(**{"h.0.mlp": "poly3"}), CHECKPOINT, r"\['h.0.mlp'\].*no such modules"),
    "too-many-modules": (
        state(modules={f"h.{i}.attn": "poly3" for i in range(10_001)}), SPEC, "'modules' has 10001 entries"
    ),
    "long-names": (state(exclude=["*" * 100_000]), SPEC, "longer than 1000 characters"),
    "long-number": (state(spec="poly" + "9" * 100_000), SPEC, "longer than 1000 characters"),
    "nested-config": (config(lambda c: c.update(extra=nested(300))), SPEC, "config.json is nested more than"),
    "nested-text": (bomb_of_text, SPEC, "config.json is nested too deeply"),
    "heavy-config": (heavy_config, SPEC, "config.json has .* bytes"),
}  # fmt: skip


def files_below(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*")}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_repository_raises_one_clear_error(name: str, whole: Path, tmp_path: Path) -> None:
    change, error, message = BROKEN[name]
    folder = tmp_path / "repository"
    shutil.copytree(whole, folder)
    change(folder)
    before = files_below(tmp_path)
    with pytest.raises(error, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert type(caught.value) is error
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 2_000
    assert files_below(tmp_path) == before


def test_the_whole_repository_loads(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "repository")
    before = files_below(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "repository")
    assert len(patched_layers(model)) == 4
    assert files_below(tmp_path) == before


def test_whole_shards_load(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "repository")
    sharded("inside.safetensors")(tmp_path / "repository")
    assert len(patched_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "repository"))) == 4


def test_the_pickle_of_this_file_would_run_code(tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    pickle.loads((tmp_path / "model.pickle").read_bytes())
    assert (tmp_path / "exploded").is_dir()


def test_mismatched_polynomials_are_never_drawn_anew(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "repository")
    BROKEN["wrong-degree"][0](tmp_path / "repository")
    with pytest.raises(CHECKPOINT, match=r"\(1, 3\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "repository", ignore_mismatched_sizes=True)


def test_a_softmax_checkpoint_with_part_of_a_polynomial_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    shutil.copytree(whole, folder)
    state(modules=...)(folder)  # as written by hand
    hand_written = AutoModelForCausalLM.from_pretrained(folder)
    assert len(patched_layers(hand_written)) == 4
    BROKEN["missing-tensor"][0](folder)
    with pytest.raises(CHECKPOINT, match=r"\['key_shift'\] of the polynomial"):
        AutoModelForCausalLM.from_pretrained(folder)
    weights(without_polynomials)(folder)
    assert len(patched_layers(AutoModelForCausalLM.from_pretrained(folder))) == 4


def test_other_models_configs_are_left_alone(checkpoint: Any, tmp_path: Path) -> None:
    shutil.copytree(checkpoint("gpt2-zinc"), tmp_path / "softmax")
    heavy_config(tmp_path / "softmax")
    config(lambda content: content.update(extra=nested(40)))(tmp_path / "softmax")
    assert not hp.is_patched(AutoModelForCausalLM.from_pretrained(tmp_path / "softmax"))
