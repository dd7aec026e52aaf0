"""The monitor, on a real checkpoint: it names the layer where a training diverges, and has scalars of each."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from monitored import attention, path
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_polyattn import (
    DivergenceError,
    InputError,
    Monitor,
    MonitorCallback,
    PatchError,
    diagnose,
    patch_model,
)

Batch = dict[str, Tensor]
LAYERS = 5  # of the Llama


@pytest.fixture
def monitor(llama: Any) -> Iterator[Monitor]:
    with Monitor(llama) as monitor:
        yield monitor


# ---------------------------------------------------------------- where it began


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_the_layer_whose_output_is_first_not_finite_is_named(
    llama: Any, inputs: Batch, monitor: Monitor, layer: int
) -> None:
    llama(**inputs).loss.backward()
    monitor.check()
    monitor.step()
    with torch.no_grad():
        attention(llama, layer).v_proj.weight[0, 0] = torch.nan
    llama(**inputs).loss.backward()  # every layer's gradient is NaN, and the output of every later layer
    with pytest.raises(
        DivergenceError, match=rf"after 1 updates, the output of '{path(layer)}' .*polynomial is finite"
    ):
        monitor.check()
    monitor.check()  # what was raised is forgotten


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_the_layer_whose_gradient_is_first_not_finite_is_named(
    llama: Any, inputs: Batch, monitor: Monitor, layer: int
) -> None:
    def spoil(module: Any, arguments: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient * torch.nan)

    handle = attention(llama, layer).polyattn.register_forward_hook(spoil)
    llama(**inputs).loss.backward()  # backward, NaN goes from this layer down to the first
    handle.remove()
    fp16, other = SimpleNamespace(scaler=object()), SimpleNamespace(scaler=None)
    callback = MonitorCallback(monitor)
    callback.on_pre_optimizer_step(None, None, None, optimizer=fp16)  # the scaler skips the update
    with pytest.raises(DivergenceError, match=rf"the gradient of the polynomial of '{path(layer)}'"):
        callback.on_pre_optimizer_step(None, None, None, optimizer=other)
    llama(**inputs).loss.backward()
    monitor.check()


def test_a_late_check_still_names_where_it_began(llama: Any, inputs: Batch, monitor: Monitor) -> None:
    optimizer = torch.optim.SGD(llama.parameters(), lr=1e-3)
    for step in range(4):
        if step == 2:
            with torch.no_grad():
                attention(llama, 3).v_proj.weight[0, 0] = torch.nan
        llama(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step()
    assert attention(llama, 0).q_proj.weight.isnan().any()  # by now the first layer is broken too
    with pytest.raises(DivergenceError, match=rf"after 2 updates, the output of '{path(3)}'"):
        monitor.check()


def test_broken_parameters_are_found_without_a_forward_pass(llama: Any, monitor: Monitor) -> None:
    monitor.check()
    monitor.check_weights()
    with torch.no_grad():
        attention(llama, 1).polyattn.coefficients[0, 1] = torch.inf
        llama.model.norm.weight[0] = torch.nan
    with pytest.raises(DivergenceError, match=rf"a parameter of the polynomial of '{path(1)}'"):
        monitor.check()
    with torch.no_grad():
        attention(llama, 1).polyattn.coefficients[0, 1] = 0.0
    monitor.check()
    with pytest.raises(DivergenceError, match=r"the weight 'model\.norm\.weight' is not finite; .* not be saved"):
        monitor.check_weights()


def test_a_compiled_model_is_watched_in_backward_only_and_the_error_says_so(llama: Any, inputs: Batch) -> None:
    torch.compiler.reset()
    compiled = torch.compile(llama, backend="eager", fullgraph=True)
    with Monitor(llama) as monitor:
        compiled(**inputs, use_cache=False).loss.backward()
        monitor.check()
        assert monitor.scalars() == {}
        with torch.no_grad():
            attention(llama, 1).v_proj.weight[0, 0] = torch.nan
        compiled(**inputs, use_cache=False).loss.backward()
        with pytest.raises(DivergenceError, match=r"Forward passes were not seen.* run a step without torch\.compile"):
            monitor.check()


def one_of_two(rank: int, folder: str, checkpoint: str) -> None:
    """A process whose data breaks the third layer, if its rank is 1."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model = patch_model(AutoModelForCausalLM.from_pretrained(checkpoint), "poly4-l1").train()
    ids = torch.arange(3, 40)[None]
    with Monitor(model) as monitor:
        model(input_ids=ids)
        monitor.check()
        if rank == 1:
            with torch.no_grad():
                attention(model, 2).v_proj.weight[0, 0] = torch.nan
        model(input_ids=ids)
        try:
            monitor.check()
        except DivergenceError as error:
            (Path(folder) / f"error-{rank}").write_text(str(error))
    torch.distributed.destroy_process_group()


def test_every_process_raises_what_one_has_seen(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path), str(checkpoint("llama"))), nprocs=2)  # type: ignore[no-untyped-call]
    for rank in (0, 1):
        assert f"the output of '{path(2)}' is not finite" in (tmp_path / f"error-{rank}").read_text()


# ---------------------------------------------------------------- scalars


def test_scalars_are_those_of_the_layer(llama: Any, inputs: Batch, monitor: Monitor) -> None:
    outputs: list[Tensor] = []
    attention(llama, 2).polyattn.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    few = {name: value[:, :8] for name, value in inputs.items()}  # as many rows as are sampled
    with torch.no_grad():
        llama(**few)
    assert monitor.scalars() == {}  # evaluation is not recorded
    with torch.no_grad():  # scores of the first layer leave their interval
        attention(llama, 0).q_proj.weight.mul_(3.0)
    outputs.clear()
    llama(**few)
    scalars = monitor.scalars()
    assert len(scalars) == 5 * LAYERS
    assert scalars[f"polyattn/output_rms/{path(2)}"] == pytest.approx(outputs[0].square().mean().sqrt().item())
    assert scalars[f"polyattn/output_max/{path(2)}"] == pytest.approx(outputs[0].abs().max().item())
    coefficients = attention(llama, 2).polyattn.coefficients
    assert scalars[f"polyattn/coefficient_max/{path(2)}"] == pytest.approx(coefficients.abs().max().item())
    first = diagnose(llama, [few], progress=False).layers[0]
    assert first.above is not None
    assert first.below is not None
    above, below = (sum(shares) / len(shares) for shares in (first.above, first.below))
    assert above > 0.01
    assert scalars[f"polyattn/above/{path(0)}"] == pytest.approx(above)
    assert scalars[f"polyattn/outside/{path(0)}"] == pytest.approx(above + below)


def test_scalars_are_recorded_at_first_and_then_on_every_nth_step(llama: Any, inputs: Batch) -> None:
    seen = []
    with Monitor(llama, every=3) as monitor:
        for step in range(7):
            with torch.no_grad():
                attention(llama, 0).polyattn.coefficients[0, 0] = 1000.0 + step
            llama(**inputs)
            seen.append(monitor.scalars()[f"polyattn/coefficient_max/{path(0)}"] - 1000.0)
            monitor.step()
    assert seen == [0.0, 0.0, 2.0, 2.0, 2.0, 5.0, 5.0]


def test_a_closed_monitor_leaves_no_trace_and_copies_have_none(llama: Any, inputs: Batch) -> None:
    def traces(model: Any) -> list[int]:
        layers = [attention(model, i).polyattn for i in range(LAYERS)]
        kinds = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks", "_backward_hooks")
        counts = [len(getattr(layer, kind)) for layer in layers for kind in kinds]
        return [*counts, *(len(p._backward_hooks or ()) for layer in layers for p in layer.parameters())]

    before, state = traces(llama), copy.deepcopy(llama.state_dict())
    assert not any(before)
    with Monitor(llama) as monitor:
        assert sum(traces(llama)) == LAYERS * (2 + 3)  # a forward hook is counted twice; three parameters
        copied = copy.deepcopy(llama)
        pickled = pickle.loads(pickle.dumps(llama))
        for other in (copied, pickled):
            other(**inputs).loss.backward()
        assert monitor.scalars() == {}
        llama(**inputs)
        assert monitor.scalars()
    assert traces(llama) == before
    monitor.close()
    for name, tensor in llama.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)
    buffer = io.BytesIO()
    torch.save(llama, buffer)
    assert b"Monitor" not in buffer.getvalue()
    assert not any(traces(copy.deepcopy(llama)))


def test_what_cannot_be_monitored_raises(llama: Any, pretrained: Callable[..., Any]) -> None:
    with pytest.raises(PatchError, match=r"not patched; call patch_model\(model, spec\)"):
        Monitor(pretrained("llama", "AutoModelForCausalLM"))
    with pytest.raises(InputError, match="every must be at least 1 step, got 0"):
        Monitor(llama, every=0)
