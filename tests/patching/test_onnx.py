"""An exported polynomial model is plain ONNX: no exponential, no softmax, and the numbers of the original."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

import hf_polyattn as hp
from hf_polyattn.patching.patched import patched_layers

AUTO_CLASS = {"minilm": "AutoModel", "vit": "AutoModelForImageClassification", "gpt2-zinc": "AutoModelForCausalLM"}
DYNAMIC_AXES = {"input_ids": (0, 1), "attention_mask": (0, 1), "pixel_values": (0,)}  # batch and length
FREE = " clamp-free"
SOFTMAX = {"Exp", "Softmax", "LogSoftmax", "ReduceLogSumExp", "ReduceMax"}


@pytest.fixture(scope="module", autouse=True)
def _silence() -> Iterator[None]:
    logging.disable(logging.ERROR)  # pytest keeps every record of torch's tracing, and formatting them takes longer
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def exported(pretrained: Any, batch: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`exported(name, spec, layers)`: the calibrated model of the first layers, and the file it was exported to."""
    made: dict[Any, tuple[Any, Path]] = {}

    def export(name: str, spec: str, layers: int) -> tuple[Any, Path]:
        if (name, spec, layers) not in made:
            model = pretrained(name, AUTO_CLASS[name], num_hidden_layers=layers)
            if spec != "softmax":
                clamp = False if spec.endswith(FREE) else None
                hp.patch_model(model, hp.PolyAttentionConfig(spec.removesuffix(FREE), clamp=clamp))
                moments = "~" in spec or spec.endswith(FREE)
                shift: Any = {"row_shift": "moments", "squares": 4} if moments else {}
                hp.calibrate(model, [batch(name, 5, 32)], progress=False, **shift)
            path = tmp_path_factory.mktemp("onnx") / "model.onnx"
            to_onnx(model, batch(name), path)
            made[name, spec, layers] = model, path
        return made[name, spec, layers]

    return export


def to_onnx(model: Any, inputs: dict[str, Tensor], path: Path) -> None:
    """Exports as a user would, with a batch and a length that may change."""
    extra = {"use_cache": False} if hasattr(model, "generation_config") else {}
    axes = {name: dict.fromkeys(DYNAMIC_AXES[name], torch.export.Dim.DYNAMIC) for name in inputs}
    torch.onnx.export(
        model,
        (),
        path,
        kwargs={**inputs, **extra},
        dynamo=True,
        dynamic_shapes={**axes, **dict.fromkeys(extra)},
        external_data=False,
        verbose=False,
    )


def run(path: Path, inputs: dict[str, Tensor]) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])


@torch.no_grad()
def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs)[0]


def difference(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference, relative to the largest expected number."""
    return float((found - expected).abs().max() / expected.abs().max())


def node_counts(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


CASES = {
    "minilm-poly3": ("minilm", "poly3", 3),
    "minilm-poly3^16-l1": ("minilm", "poly3^16-l1", 2),
    "vit-poly6-l1": ("vit", "poly6-l1", 2),
    "gpt2-zinc-poly3": ("gpt2-zinc", "poly3", 1),
    "minilm-poly3~1": ("minilm", "poly3~1", 2),
    "minilm-poly3-clamp-free": ("minilm", f"poly3{FREE}", 2),
    "gpt2-zinc-poly3~1": ("gpt2-zinc", "poly3~1", 1),
}


@pytest.mark.parametrize("case", CASES)
def test_an_exported_model_has_no_exponential_and_equals_the_original(case: str, exported: Any, batch: Any) -> None:
    name, spec, layers = CASES[case]
    model, path = exported(name, spec, layers)
    assert len(patched_layers(model)) == layers
    assert SOFTMAX.isdisjoint(node_counts(path))
    assert {node.domain for node in onnx.load(path).graph.node} == {""}  # no operator but ONNX's own
    for inputs in (batch(name), batch(name, 3, 40)):  # another batch and another length than it was exported with
        assert difference(run(path, inputs), output(model, inputs)) < 1e-5
        with hp.softmax_attention(model):
            assert difference(run(path, inputs), output(model, inputs)) > (1e-5 if spec == "poly3^16-l1" else 1e-3)
    if name != "vit":
        inputs = {**batch(name), "attention_mask": torch.ones_like(batch(name)["attention_mask"])}
        assert difference(run(path, batch(name)), run(path, inputs)) > 1e-2  # padding is in the graph


def test_the_softmax_original_has_exponentials(exported: Any, batch: Any) -> None:
    model, path = exported("minilm", "softmax", 1)
    assert node_counts(path)["Softmax"] == 1
    assert difference(run(path, batch("minilm")), output(model, batch("minilm"))) < 1e-5


def decided_by_data(graph: Any) -> set[str]:
    """Returns what depends on the embeddings of the tokens; the mask and the shapes, and so n, do not."""
    tables = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    found: set[str] = set()
    for node in graph.node:  # in order
        looked_up = node.op_type == "Gather" and node.input[0] in tables
        if looked_up or (node.op_type not in ("Shape", "Size") and found & set(node.input)):
            found.update(node.output)
    return found


@pytest.mark.parametrize(
    ("case", "divisions"),
    [("minilm-poly3", 0), ("minilm-poly3~1", 0), ("minilm-poly3-clamp-free", 0), ("minilm-poly3^16-l1", 2)],
)
def test_only_row_sums_divide_by_data(case: str, divisions: int, exported: Any) -> None:
    """Beside them there are the radius, a constant, and n^(-1/2), which a model computes once."""
    graph = onnx.load(exported(*CASES[case])[1]).graph
    decided = decided_by_data(graph)
    divide = [node for node in graph.node if node.op_type in ("Div", "Reciprocal", "Sqrt", "Pow")]
    by_data = [node.op_type for node in divide if node.input[-1] in decided]
    assert by_data == ["Div"] * divisions
    if "~" not in case and FREE not in CASES[case][1]:  # whose moments have powers of their own
        assert sum(node.op_type == "Pow" for node in divide) == (case == "minilm-poly3")


COMPARING = {"Clip", "Max", "Min", "ReduceMax", "ReduceMin", "Relu", "Abs", "Sign", "Greater", "Less", "IsNaN"}
COMPARING |= {"GreaterOrEqual", "LessOrEqual", "Equal", "Exp", "Log", "Softmax", "Where"}


def attention_nodes(graph: Any) -> list[Any]:
    """Returns the nodes before the first dense layer behind the attention, whose GELU compares: those of one layer."""
    last = next(number for number, node in enumerate(graph.node) if node.op_type in ("Gelu", "Erf"))
    return list(graph.node)[:last]


def compared(graph: Any) -> set[str]:
    """Returns the operators that compare, or choose by, what data decide."""
    decided = decided_by_data(graph)
    return {
        node.op_type
        for node in attention_nodes(graph)
        # of a Where what chooses, of a Clip what is limited
        if node.op_type in COMPARING and decided & set(node.input[:1] if node.op_type == "Where" else node.input)
    }


def test_without_a_clamp_nothing_looks_at_the_scores(exported: Any) -> None:
    """With a mask in the graph there are comparisons of lengths, and n is at least 1; of data there are none."""
    graph = onnx.load(exported(*CASES["minilm-poly3-clamp-free"])[1]).graph
    assert compared(graph) == set()
    assert "Clip" in compared(onnx.load(exported(*CASES["minilm-poly3"])[1]).graph)
    assert "Softmax" in compared(onnx.load(exported("minilm", "softmax", 1)[1]).graph)


def test_without_a_clamp_and_without_a_mask_nothing_compares(pretrained: Any, batch: Any, tmp_path: Path) -> None:
    found = {}
    tokens = {"input_ids": batch("minilm")["input_ids"][:1]}
    for clamp in (False, None):
        model = hp.patch_model(pretrained("minilm", num_hidden_layers=1), hp.PolyAttentionConfig("poly3", clamp=clamp))
        hp.calibrate(model, [batch("minilm", 5, 32)], row_shift="moments", progress=False)
        path = tmp_path / f"{clamp}.onnx"
        torch.onnx.export(model, (), path, kwargs=tokens, dynamo=True, external_data=False, verbose=False)
        assert difference(run(path, tokens), output(model, tokens)) < 1e-5
        found[clamp] = set(node_counts(path)) & (COMPARING - {"Where"})
    assert found[False] == set()
    assert found[None] == {"Clip"}


def test_torch_export_is_plain_aten(exported: Any, batch: Any) -> None:
    model, inputs = exported("minilm", "poly3^16-l1", 2)[0], batch("minilm")
    program = torch.export.export(model, (), kwargs=inputs)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("polyattn" in target or "softmax" in target for target in targets)
    assert difference(output(program.module(), inputs), output(model, inputs)) < 1e-5


def test_a_backend_asked_for_by_name_stays_in_torch_export_and_is_the_formula_in_onnx(
    pretrained: Any, batch: Any, tmp_path: Path
) -> None:
    model = pretrained("minilm", num_hidden_layers=1)
    hp.patch_model(model, hp.PolyAttentionConfig("poly3", backend="chunked"))
    program = torch.export.export(model, (), kwargs=batch("minilm"))
    assert any("polyattn" in str(node.target) for node in program.graph.nodes)
    to_onnx(model, batch("minilm"), tmp_path / "model.onnx")
    assert {node.domain for node in onnx.load(tmp_path / "model.onnx").graph.node} == {""}
