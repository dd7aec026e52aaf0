"""Times polynomial attention next to softmax attention on this machine; every timed case is verified first.

    polyattn bench --device cpu --output outputs/bench     # or python -m hf_polyattn bench

Only ratios of times measured in turns in one run mean something: speedup = the fastest softmax's median / ours. Softmax
is `torch.nn.functional.scaled_dot_product_attention` as PyTorch dispatches it by default and, on a GPU, its cuDNN
backend and FlashAttention where they can be imported. Beside each case stands the limit that no attention of two
products can pass: what its multiplications take at the rate of one large matrix product, measured in the same run.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..errors import InputError, PolyAttnError
from ..files import written_beside
from ..ops import polynomial_attention
from ..patching.patch import patch_model
from ..spec import PolyAttentionConfig, Polynomial
from ..tables import format_table

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Case:
    """One timed shape: batch, query heads, key/value heads, queries, keys, head dim, and whether it is causal."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    causal: bool = False
    queries: int | None = None

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        decode = "" if self.queries is None else f"-q{self.queries}"
        return f"B{self.batch}-H{heads}-T{self.length}-D{self.head_dim}{'-causal' if self.causal else ''}{decode}"

    def tensors(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        """Returns random query, key and value, laid out (B, T, H, D) in memory as Transformers does."""
        lengths = (self.queries or self.length, self.length, self.length)
        heads = (self.heads, self.kv_heads, self.kv_heads)
        return [
            torch.randn(self.batch, length, count, self.head_dim, device=device, dtype=dtype).transpose(1, 2)
            for length, count in zip(lengths, heads, strict=True)
        ]

    @property
    def flops(self) -> float:
        """Multiplications and additions of the two products of a forward pass."""
        pairs = (self.queries or self.length) * self.length * (0.5 if self.causal else 1.0)
        return 4.0 * self.batch * self.heads * pairs * self.head_dim


CASES = {
    "cpu": (
        Case(8, 12, 12, 128, 64),
        Case(4, 12, 12, 512, 64),
        Case(4, 12, 12, 197, 64),
        Case(1, 12, 12, 2048, 64),
        Case(1, 16, 16, 2048, 128),
        Case(1, 8, 2, 4096, 64, causal=True),
        Case(1, 8, 2, 8192, 64, queries=1),
    ),
    "cuda": (
        *(Case(32768 // n, 16, 16, n, 64, causal) for n in (2048, 4096, 16384) for causal in (False, True)),
        *(Case(32768 // n, 16, 16, n, 128, causal) for n in (2048, 4096, 16384) for causal in (False, True)),
        Case(4, 32, 8, 32768, 128, queries=1),
    ),
}
MEMORY = {"cpu": Case(1, 8, 8, 8192, 64), "cuda": Case(1, 16, 16, 16384, 64)}


@dataclass(frozen=True, slots=True)
class Spec:
    """A polynomial as a model has it: bare and frozen, or calibrated, with all its parameters trained."""

    spec: str
    calibrated: bool

    def __str__(self) -> str:
        return f"{self.spec}{' calibrated' if self.calibrated else ' bare'}"


SPECS = (Spec("poly3", False), Spec("poly3", True), Spec("poly6-l1", True), Spec("poly3^16-l1", True))


class VerificationError(PolyAttnError):
    """A backend whose result is not that of the oracle within the error budget; it is not timed."""


def bench(device: str, dtype: torch.dtype, backend: str, repeats: int) -> list[dict[str, Any]]:
    """Returns one row for each case and spec: median milliseconds of ours and of every softmax, and the speedups.

    Raises:
        VerificationError: a case is wrong.
    """
    rows = []
    cases = CASES[device]
    progress = tqdm(total=len(cases), desc=f"bench {str(dtype).removeprefix('torch.')}")
    for case in cases:
        tensors = case.tensors(device, dtype)
        ours = {str(spec): _polynomial(spec, case, tensors, backend) for spec in SPECS}
        for name, attend in ours.items():
            _verify(attend, tensors, f"{case} {name}")
        everyone: dict[str, Attention] = {**_softmaxes(device, dtype, case), **ours}
        passes = ("forward",) if case.queries else ("forward", "forward_backward")
        times = {
            name: _alternate({k: partial(_step, f, tensors, name) for k, f in everyone.items()}, repeats, device)
            for name in passes
        }
        rate = _matmul_rate(device, dtype)
        for spec in SPECS:
            row: dict[str, Any] = {"case": str(case), **asdict(case), "spec": str(spec), "dtype": _name(dtype)}
            for name in passes:
                softmax = {peer: ms for peer, ms in times[name].items() if peer not in ours}
                ms, best = times[name][str(spec)], min(softmax.values())
                limit = case.flops * (1.0 if name == "forward" else 3.5) / rate / 1e6
                row[name] = {
                    "ms": ms,
                    "softmax_ms": softmax,
                    "speedup": round(best / ms, 3),
                    "limit_ms": round(limit, 3),
                    "limit_speedup": round(best / limit, 3),
                }
            rows.append(row)
        progress.update()
    progress.close()
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _polynomial(spec: Spec, case: Case, tensors: list[Tensor], backend: str) -> Callable[..., Tensor]:
    """Returns the operator as a patched layer calls it."""
    polynomial = Polynomial.parse(spec.spec)
    query = tensors[0]
    coefficients = torch.tensor([polynomial.initial_coefficients()] * case.heads, device=query.device)
    settings: dict[str, Any] = {"monomial": not spec.calibrated}
    if spec.calibrated:
        coefficients = (coefficients + 0.1).requires_grad_()
        center = torch.full(query.shape[:3], 0.5, device=query.device, requires_grad=True)
        settings = {"center": center, "radius": torch.full((case.heads,), 6.0, device=query.device), "clamp": True}

    def attend(query: Tensor, key: Tensor, value: Tensor, backend: str = backend) -> Tensor:
        batch, _, q_len, _ = query.shape
        own = {name: value[:batch, :, :q_len] if name == "center" else value for name, value in settings.items()}
        output: Tensor = polynomial_attention(
            query,
            key,
            value,
            coefficients,
            causal=case.causal,
            power=polynomial.power,
            normalizer=polynomial.normalizer,
            backend=backend,
            **own,
        )
        return output

    return attend


def _softmaxes(device: str, dtype: torch.dtype, case: Case) -> dict[str, Attention]:
    """Returns the softmax attentions that run here, by name."""
    grouped = case.heads != case.kv_heads

    def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=case.causal, enable_gqa=grouped)

    found: dict[str, Attention] = {"sdpa": sdpa}
    if device == "cpu":
        return found

    from torch.nn.attention import SDPBackend, sdpa_kernel

    def cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(query, key, value)

    found["cudnn"] = cudnn
    for name, package in (("flash_attention_3", "flash_attn_interface"), ("flash_attention_2", "flash_attn")):
        try:
            function = __import__(package).flash_attn_func
        except ImportError:
            continue
        found[name] = partial(_flash, function, case.causal)
    tensors = replace(case, batch=1).tensors(device, dtype)
    return {name: attend for name, attend in found.items() if _runs(attend, tensors)}


def _flash(function: Callable[..., Any], causal: bool, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    result = function(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), causal=causal)
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


def _runs(attend: Attention, tensors: list[Tensor]) -> bool:
    try:
        attend(*tensors)
    except RuntimeError:  # a kernel that does not know this dtype, head dim or device
        return False
    return True


def _verify(attend: Callable[..., Tensor], tensors: list[Tensor], name: str) -> None:
    """Compares with the float64 oracle: the output of one batch entry, and the gradients of its first 512 tokens.

    An error may be at most twice that of the same-dtype reference, plus one unit in the last place. All three are root
    mean squares: the largest error of a few thousand elements is luck, and one wrong element shows in both.
    """

    def results(part: list[Tensor], gradients: bool, **options: Any) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_(gradients) for tensor in part]
        with torch.set_grad_enabled(gradients):
            output = attend(*leaves, **options)
        return [*torch.autograd.grad(output.sum(), leaves)] if gradients else [output]

    def size(tensor: Tensor) -> float:
        return float(tensor.double().square().mean().sqrt())

    for gradients, part in ((False, [t[:1] for t in tensors]), (True, [t[:1, :, :512] for t in tensors])):
        exact = results([tensor.double() for tensor in part], gradients, backend="reference")
        same_dtype = results(part, gradients, backend="reference")
        for ours, reference, truth in zip(results(part, gradients), same_dtype, exact, strict=True):
            error, budget = (
                size(ours - truth),
                2.0 * size(reference - truth) + torch.finfo(ours.dtype).eps * size(truth),
            )
            if not error <= budget:
                raise VerificationError(f"{name}: error {error:.3g} exceeds the budget {budget:.3g}; not timed")


def _step(attend: Attention, tensors: list[Tensor], kind: str) -> None:
    if kind == "forward":
        with torch.no_grad():
            attend(*tensors)
        return
    output = attend(*(tensor.detach().requires_grad_() for tensor in tensors))
    output.backward(torch.ones_like(output))  # type: ignore[no-untyped-call]


def _alternate(steps: Mapping[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Returns each step's median milliseconds; the steps take turns, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            _synchronize(device)
            started = time.perf_counter()
            step()
            _synchronize(device)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: round(statistics.median(record), 3) for name, record in times.items()}


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Returns the GFLOP/s of one large square matrix product: the best of five."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        _synchronize(device)
        started = time.perf_counter()
        a @ b
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best / 1e9


# Memory ---------------------------------------------------------------------------------------------------------


def memory(device: str, dtype: torch.dtype, backend: str) -> dict[str, Any]:
    """Returns the peak of extra memory, in MiB, of a forward and backward pass of one long sequence."""
    names = ["sdpa", *(str(spec) for spec in SPECS)]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        peaks = [pool.submit(_peak, name, device, dtype, backend).result() for name in names]
    return {"case": str(MEMORY[device]), "dtype": _name(dtype), "mib": dict(zip(names, peaks, strict=True))}


def _peak(name: str, device: str, dtype: torch.dtype, backend: str) -> float:
    case = MEMORY[device]
    small = replace(case, length=128).tensors(device, dtype)
    tensors = case.tensors(device, dtype)

    def attention(tensors: list[Tensor], case: Case) -> Attention:
        if name == "sdpa":
            return _softmaxes(device, dtype, case)["sdpa"]
        return _polynomial(next(spec for spec in SPECS if str(spec) == name), case, tensors, backend)

    _step(attention(small, replace(case, length=128)), small, "forward_backward")  # libraries load
    attend = attention(tensors, case)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _step(attend, tensors, "forward_backward")
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    status = Path("/proc/self/status")

    def field(key: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(key)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = field("VmRSS")
    _step(attend, tensors, "forward_backward")
    return round((field("VmHWM") - before) / 2**10, 1)


# Whole models ---------------------------------------------------------------------------------------------------


def _bert(layers: int, hidden: int, heads: int) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * hidden
    )
    return BertModel(config, add_pooling_layer=False)


def _vit(hidden: int, heads: int) -> Any:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden)
    return ViTModel(config, add_pooling_layer=False)


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config())


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(
        LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64,
        )
    )  # fmt: skip


# Random weights of real shapes: the speed is that of the checkpoint. Batch and length are the input's.
MODELS: dict[str, dict[str, tuple[Callable[[], Any], int, int]]] = {
    "cpu": {"MiniLM-L6": (partial(_bert, 6, 384, 12), 8, 128), "ViT-tiny": (partial(_vit, 192, 3), 4, 197)},
    "cuda": {
        "BERT-base": (partial(_bert, 12, 768, 12), 32, 512),
        "GPT-2": (_gpt2, 16, 1024),
        "Llama-1B": (_llama, 2, 4096),
        "ViT-B": (partial(_vit, 768, 12), 64, 197),
    },
}


def models(device: str, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """Returns one row for each model and spec: milliseconds of inference and of a training step next to SDPA's."""
    rows = []
    for name, (make, batch, length) in MODELS[device].items():
        with torch.device(device):
            original = make().to(dtype).eval()
            original.set_attn_implementation("sdpa")
            inputs = _inputs(original, batch, length, dtype)
        contestants = {"softmax": original}
        for spec in SPECS:
            patched = make().to(device, dtype).eval()
            patched.load_state_dict(original.state_dict())
            config = PolyAttentionConfig(
                Polynomial.parse(spec.spec),
                learnable=spec.calibrated,
                interval=spec.calibrated,
                clamp=spec.calibrated,
                key_shift=spec.calibrated,
            )
            contestants[str(spec)] = patch_model(patched, config)
        times = {
            kind: _alternate({key: partial(run, model, inputs) for key, model in contestants.items()}, repeats, device)
            for kind, run in (("infer", _infer), ("train", _train))
        }
        for spec in SPECS:
            row: dict[str, Any] = {"model": name, "batch": batch, "length": length, "dtype": _name(dtype)}
            row["spec"] = str(spec)
            for kind, ms in times.items():
                ours, softmax = ms[str(spec)], ms["softmax"]
                row[kind] = {"ms": ours, "softmax_ms": softmax, "latency": round(ours / softmax, 3)}
            rows.append(row)
    return rows


def _inputs(model: Any, batch: int, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(batch, 3, 224, 224, dtype=dtype)}
    return {"input_ids": torch.randint(5, 1000, (batch, length))}


@torch.no_grad()
def _infer(model: Any, inputs: dict[str, Tensor]) -> None:
    model(**inputs)


def _train(model: Any, inputs: dict[str, Tensor]) -> None:
    model(**inputs).last_hidden_state.float().square().mean().backward()
    model.zero_grad(set_to_none=True)


# Output ---------------------------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> str:
    """Returns the results as tables for a terminal."""
    rows = [
        (row["case"], row["dtype"], row["spec"], *(_cell(row.get(kind)) for kind in ("forward", "forward_backward")))
        for row in results["rows"]
    ]
    parts = [
        "times softmax's speed (and what it would be at the rate of one large matrix product)",
        format_table(("case", "dtype", "polynomial", "forward", "forward+backward"), rows),
    ]
    latencies = [
        (row["model"], row["dtype"], row["spec"], *(f"{row[kind]['latency']:.2f}" for kind in ("infer", "train")))
        for row in results["models"]
    ]
    parts += [
        "\nwhole models: time divided by softmax's",
        format_table(("model", "dtype", "polynomial", "inference", "training step"), latencies),
    ]
    for row in results["memory"]:
        peaks = ", ".join(f"{name} {peak:.0f}" for name, peak in row["mib"].items())
        parts.append(f"\npeak of extra memory, forward and backward, {row['case']} {row['dtype']}, in MiB: {peaks}")
    return "\n".join(parts)


def _cell(times: dict[str, float] | None) -> str:
    return "" if times is None else f"{times['speedup']:.2f} ({times['limit_speedup']:.2f})"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws the forward and forward+backward speedups of every case as bars; needs matplotlib."""
    from matplotlib.figure import Figure

    kinds = ("forward", "forward_backward")
    dtypes = sorted({row["dtype"] for row in results["rows"]})
    figure = Figure(figsize=(7 * len(dtypes), 7), layout="constrained")
    axes = figure.subplots(len(kinds), len(dtypes), squeeze=False)
    for line, kind in enumerate(kinds):
        for column, dtype in enumerate(dtypes):
            axis = axes[line][column]
            rows = [row for row in results["rows"] if row["dtype"] == dtype and kind in row]
            cases = list(dict.fromkeys(row["case"] for row in rows))
            for offset, spec in enumerate(SPECS):
                own = [row for row in rows if row["spec"] == str(spec)]
                places = [cases.index(row["case"]) + 0.2 * (offset - 1.5) for row in own]
                axis.bar(places, [row[kind]["speedup"] for row in own], 0.18, label=str(spec))
            limits = {row["case"]: row[kind]["limit_speedup"] for row in rows}
            for place, case in enumerate(cases):
                axis.plot([place - 0.4, place + 0.4], [limits[case]] * 2, color="black", linewidth=1)
            axis.axhline(1.0, color="gray", linewidth=0.8, linestyle="--")
            axis.set_xticks(range(len(cases)), cases, rotation=25, ha="right", fontsize=7)
            axis.set_title(f"{kind.replace('_', ' + ')}, {dtype}")
            axis.set_ylabel("times softmax's speed")
    axes[0][0].legend(fontsize=7, title="black line: one large matrix product")
    figure.suptitle(results["device"])
    figure.savefig(path, dpi=120)


def run(
    device: str | None, dtypes: list[str] | None, backend: str, repeats: int, output: Path, *, tune: bool = False
) -> None:
    """Runs the benchmark, prints its tables and writes `bench.json` and, with matplotlib, `bench.png`.

    Args:
        device: cpu or cuda; None takes a GPU if there is one.
        dtypes: names of `DTYPES`; None takes bfloat16, and float32 on a CPU.
        backend: of the operator.
        repeats: runs of which the median is taken.
        output: folder of the files.
        tune: write a table of the fastest Triton configurations first.

    Raises:
        InputError: the device is neither.
        VerificationError: a case is wrong.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in CASES:
        raise InputError(f"device must be one of {[*CASES]}, got {device!r}")
    if tune:
        from ..ops.triton.tune import tune as write_table

        print(f"written: {write_table(torch.device(device), _device_name(device))}")
    kinds = [DTYPES[name] for name in dtypes or (["bfloat16"] if device == "cuda" else ["bfloat16", "float32"])]
    results: dict[str, Any] = {
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "backend": backend,
        "repeats": repeats,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "matmul_gflops": {_name(dtype): round(_matmul_rate(device, dtype), 1) for dtype in kinds},
        "rows": _joined(bench(device, dtype, backend, repeats) for dtype in kinds),
        "models": _joined(models(device, dtype, repeats) for dtype in kinds),
        "memory": [memory(device, dtype, backend) for dtype in kinds],
    }
    print(tables(results))
    with written_beside(output / "bench.json") as partial_file:
        partial_file.write_text(json.dumps(results, indent=1) + "\n")
    try:
        plot(results, output / "bench.png")
    except ImportError:
        print("bench.png needs matplotlib: pip install matplotlib")


def _joined(parts: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [row for part in parts for row in part]


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return f"{model or platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
