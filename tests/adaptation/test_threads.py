"""Threads that share a model: an observed or softmax region of one is not another's, or says so."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_polyattn as hp
from hf_polyattn.adaptation.capture import observe, observing
from hf_polyattn.adaptation.fitting.layer import LayerFit
from hf_polyattn.patching.patched import patched_layers

NAMES = {"minilm": "AutoModel", "llama": "AutoModelForCausalLM"}
both = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def model(name: str, pretrained: Any, polynomial: Any) -> Any:
    return polynomial(pretrained(name, NAMES[name], num_hidden_layers=2))


@torch.no_grad()
def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs)[0]
    return found


def elsewhere(function: Callable[[], Any]) -> Any:
    """Returns what a function gives, or the error that it raises, in another thread."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


@both
def test_an_observed_region_is_its_threads_own(name: str, model: Any, batch: Any) -> None:
    inputs, expected = batch(name), output(model, batch(name))
    seen: list[str] = []
    others: list[Tensor] = []

    def observer(path: str, child: Any, observation: Any) -> None:
        seen.append(path)
        others.append(elsewhere(lambda: output(model, inputs)))

    observe(model, [inputs], observer, progress=False)
    assert len(seen) == len(patched_layers(model)) == len(others)
    for found in others:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with hp.softmax_attention(model):
        assert float((output(model, inputs) - expected).abs().max()) > 1e-2


@both
def test_two_threads_observe_the_same_model(name: str, model: Any, batch: Any) -> None:
    """Each sees its own batch, and softmax's outputs."""
    first, second = batch(name), {key: value[:, :10] for key, value in batch(name).items()}
    lengths: dict[str, set[int]] = {"first": set(), "second": set()}

    def look(who: str) -> Callable[..., None]:
        return lambda path, child, seen: lengths[who].add(seen.query.shape[2])

    def observer(path: str, child: Any, seen: Any) -> None:
        elsewhere(lambda: observe(model, [second], look("second"), progress=False))
        look("first")(path, child, seen)

    observe(model, [first], observer, progress=False)
    assert lengths == {"first": {first["input_ids"].shape[1]}, "second": {10}}
    assert all(layer.observer is None and not layer._observers for _, layer in patched_layers(model))


@both
@pytest.mark.parametrize("part", ["whole", "base model"])
def test_softmax_of_one_thread_is_refused_to_the_others(name: str, part: str, model: Any, batch: Any) -> None:
    inputs, expected = batch(name), output(model, batch(name))
    outer = model if part == "whole" else getattr(model, "model", model)
    with hp.softmax_attention(outer):
        softmax = output(model, inputs)
        with pytest.raises(hp.errors.PatchError, match=r"another thread has this .* in softmax_attention"):
            raise elsewhere(lambda: output(model, inputs))
        with pytest.raises(hp.errors.PatchError, match="another thread"):
            raise elsewhere(lambda: hp.softmax_attention(model).__enter__())
        with hp.softmax_attention(model):  # of the same thread it may be inside of itself
            assert torch.equal(output(model, inputs), softmax)
        with pytest.raises(hp.errors.PatchError, match="another thread"):
            raise elsewhere(lambda: output(model, inputs))
        copied = copy.deepcopy(model)
        assert torch.equal(elsewhere(lambda: output(copied, inputs)), softmax)
    assert torch.equal(elsewhere(lambda: output(model, inputs)), expected)
    assert float((softmax - expected).abs().max()) > 1e-2


@both
def test_a_pass_that_softmax_overtakes_is_refused(name: str, model: Any, batch: Any) -> None:
    """Half of its layers would be polynomial and half softmax."""
    inputs = batch(name)
    halfway, entered = threading.Event(), threading.Event()
    first = patched_layers(model)[0][1]

    def wait(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            halfway.set()
            assert entered.wait(30)

    found: list[Any] = []
    handle = first.register_forward_hook(wait)
    thread = threading.Thread(target=lambda: found.append(elsewhere(lambda: output(model, inputs))))
    thread.start()
    assert halfway.wait(30)
    with hp.softmax_attention(model):
        entered.set()
        thread.join()
    handle.remove()
    with pytest.raises(hp.errors.PatchError, match="another thread"):
        raise found[0]


@both
def test_calibration_refuses_other_threads_while_it_writes(
    name: str, model: Any, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, before = batch(name), output(model, batch(name))
    meanwhile: list[Any] = []
    see, write = LayerFit.passes, LayerFit.write

    def fit(self: LayerFit) -> Any:
        for step in see(self):
            meanwhile.append(elsewhere(lambda: output(model, inputs)))
            yield step

    def write_and_look(self: LayerFit) -> None:
        write(self)
        with pytest.raises(hp.errors.PatchError, match=r"another thread has this .* in calibrate"):
            raise elsewhere(lambda: output(model, inputs))

    monkeypatch.setattr(LayerFit, "passes", fit)
    monkeypatch.setattr(LayerFit, "write", write_and_look)
    hp.calibrate(model, [inputs], progress=False)
    assert len(meanwhile) >= 2
    assert all(torch.equal(found, before) for found in meanwhile)
    after = output(model, inputs)
    assert float((after - before).abs().max()) > 1e-2
    assert torch.equal(elsewhere(lambda: output(model, inputs)), after)


def test_checkpointed_passes_see_the_observer_of_their_thread(pretrained: Any, polynomial: Any, batch: Any) -> None:
    model = polynomial(pretrained("llama", "AutoModelForCausalLM", num_hidden_layers=1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    (path, child), inputs, seen = patched_layers(model)[0], batch("llama"), []
    with observing(model, path, child, inputs, lambda *_: seen.append(threading.get_ident())):
        model(**inputs, use_cache=False)[0].square().sum().backward()
    assert len(seen) == 2  # forward, and again in backward
