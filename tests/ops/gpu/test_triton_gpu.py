"""The Triton kernels on a real GPU: the matrix of the interpreter's tests on longer sequences, and in bfloat16 too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from error_budget import operands, outputs_and_gradients
from kernel_cases import BUMP, CASES, Case, errors, inputs, stretched
from layer_cases import PATTERNS, TOLERANCES, B, error_of, module

from hf_polyattn import polynomial_attention
from hf_polyattn.ops.triton import tune
from hf_polyattn.ops.triton.tuning import Configuration

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@pytest.fixture(autouse=True)
def _poison() -> Any:
    """Fills memory that a kernel should write with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@dtypes
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("factor", [1, 9], ids=["short", "long"])
def test_kernels_are_within_the_error_budget(case: str, dtype: torch.dtype, factor: int) -> None:
    for name, error in errors(stretched(CASES[case], factor), dtype, device="cuda").items():
        assert error <= 1.0, name


@dtypes
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (128, 128), (256, 256)], ids=lambda dims: f"D{dims[0]}")
@pytest.mark.parametrize("spec", ["monomial3", "taylor4-l1", "power16"])
def test_long_sequences_are_within_the_error_budget(spec: str, dims: tuple[int, int], dtype: torch.dtype) -> None:
    case = CASES[spec]._replace(shape=(1, 4, 2, 1000, 1000), dims=dims)
    for name, error in errors(case, dtype, device="cuda", draws=1).items():
        assert error <= 1.0, name


@pytest.mark.parametrize("keys", [4097, 32768])
@pytest.mark.parametrize("spec", ["degree3", "power16"])
def test_decode_against_a_long_cache_is_within_the_error_budget(spec: str, keys: int) -> None:
    case = CASES[spec]._replace(
        settings=lambda shape: {name: value for name, value in CASES[spec].settings(shape).items() if name != "causal"},
        shape=(2, 8, 2, 1, keys),
        dims=(128, 128),
    )
    assert errors(case, torch.bfloat16, device="cuda", draws=1)["output"] <= 1.0


def test_the_gpu_drops_the_weights_that_the_cpu_drops() -> None:
    from hf_polyattn.ops.call import Call
    from hf_polyattn.ops.chunked import forward as chunked
    from hf_polyattn.ops.triton.launch import forward as triton

    def output(forward: Any, device: str) -> torch.Tensor:
        query, values = torch.zeros(2, 3, 64, 16), torch.eye(64).expand(2, 3, 64, 64)
        tensors = [tensor.to(device) for tensor in (query, query, values, torch.tensor([[1.0, 0.0]] * 3))]
        seed = torch.tensor([12345], device=device)
        settings = (False, None, 1.0, 1, "none", False, False, 0.3)
        return forward(Call(*tensors, None, None, None, None, seed, *settings))[0].cpu()  # type: ignore[no-any-return]

    assert torch.equal(output(triton, "cuda"), output(chunked, "cpu"))


def test_two_runs_are_equal_to_the_bit() -> None:
    tensors, settings = inputs(stretched(CASES["dropout-l1-mask"], 20), torch.bfloat16, 0, "cuda")
    runs = []
    for _ in range(3):
        torch.manual_seed(0)
        runs.append(outputs_and_gradients(tensors, **settings, backend="triton"))
    assert all(torch.equal(run[name], runs[0][name]) for run in runs for name in runs[0])


def test_auto_takes_the_triton_backend() -> None:
    tensors = [tensor.detach().cuda() for tensor in operands(head_dim=64, value_dim=64, dtype=torch.bfloat16)]
    auto, triton = (polynomial_attention(*tensors, backend=backend) for backend in ("auto", "triton"))
    assert torch.equal(auto, triton)


def test_compiled_training_step_equals_eager() -> None:
    case = Case(lambda shape: {"causal": True}, BUMP, (2, 4, 2, 130, 130))
    tensors, settings = inputs(case, torch.bfloat16, 0, "cuda")
    leaves = [tensor.requires_grad_() for tensor in tensors]

    def step(*inputs: torch.Tensor) -> torch.Tensor:
        return polynomial_attention(*inputs, **settings, backend="triton").float().square().sum()

    gradients = [torch.autograd.grad(run(*leaves), leaves) for run in (torch.compile(step, fullgraph=True), step)]
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_tuning_writes_a_table_that_is_used(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_polyattn.ops.triton import tuning

    monkeypatch.setenv("POLYATTN_TUNING", str(tmp_path))
    row = Configuration(64, 32, 4, 2)
    name = torch.cuda.get_device_name()
    device = torch.device("cuda", 0)
    candidates = {"forward": (row,)}
    tune.tune(device, name, dtypes=[torch.bfloat16], widths=[64], candidates=candidates, report=lambda line: None)
    assert tuning.configuration("forward", tuning.keys(torch.bfloat16, 64, True), device) == row
    tuning.configuration.cache_clear()


LAYERS: dict[str, dict[str, Any]] = {
    **PATTERNS,
    "long": {"q_len": 1100, "k_len": 1100, "causal": True},  # moments by sums over the keys
    "long, all": {"q_len": 1100, "k_len": 1100},
    "long window": {"q_len": 1100, "k_len": 1100, "causal": True, "window": 200},
    "long decode": {"q_len": 1, "k_len": 9000},
    "mask": {"mask": torch.rand(B, 1, 40, 40, generator=torch.Generator().manual_seed(4)) > 0.3},
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("spec", ["poly3", "poly6-l1", "poly3~1", "poly4~2-l1"])
@pytest.mark.parametrize("call", LAYERS)
def test_a_whole_module_is_what_pytorch_computes(call: str, spec: str, dtype: torch.dtype) -> None:
    assert error_of(module(spec), LAYERS[call], dtype, device="cuda") < TOLERANCES[dtype]
