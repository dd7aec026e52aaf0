"""A patched model sharded by FSDP2, over gloo in two processes, trains like an unsharded one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

TRAIN = """
import json, os, sys
import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
import hf_polyattn

source, folder = sys.argv[1:]
distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.manual_seed(0)
tokens = torch.randint(3, 512, (4, 32))
held_out = torch.randint(3, 512, (2, 32))

def patched():
    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    hf_polyattn.patch_model(model, "poly4-l1")
    hf_polyattn.calibrate(model, [{"input_ids": tokens}], progress=False)
    return model

def train(model, rows):
    groups = hf_polyattn.param_groups(model, 1e-3, coefficient_lr=1e-3)
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for _ in range(3):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)

whole = patched()
before = whole(held_out).logits.detach()
expected = train(whole, tokens)

sharded = patched()
mesh = init_device_mesh("cpu", (2,))
for layer in sharded.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(sharded, mesh=mesh)
found = train(sharded, tokens[2 * rank : 2 * rank + 2])
distributed.all_reduce(found)
coefficients = sharded.model.layers[0].self_attn.polyattn.coefficients
state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    saved = patched()
    saved.load_state_dict(state)
    saved.save_pretrained(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    logits = reloaded(held_out).logits
    print(json.dumps({
        "sharded": isinstance(coefficients, DTensor) and coefficients.to_local().shape[0] * 2 == coefficients.shape[0],
        "losses": [expected.tolist(), (found / 2).tolist()],
        "error": (logits - whole(held_out).logits).abs().max().item(),
        "change": (logits - before).abs().max().item(),
    }))
distributed.barrier()
sys.stdout.flush()
os._exit(0)  # threads of gloo that free a tensor while the interpreter is torn down abort it (pytorch/pytorch#179291)
"""


def test_sharded_model_trains_saves_and_reloads_like_an_unsharded_one(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [str(checkpoint("llama")), str(tmp_path / "model")]
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    whole, sharded = results["losses"]
    assert results["sharded"]
    assert sharded == pytest.approx(whole, rel=1e-4)
    assert whole[2] != pytest.approx(whole[0], rel=1e-2)
    assert results["error"] < 0.01 * results["change"]


BF16 = """
import json, os, sys
import torch
import hf_polyattn
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

source, dtype, layers_apart = sys.argv[1], sys.argv[2], sys.argv[3] == "layers"
distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.manual_seed(0)
tokens = torch.randint(3, 512, (4, 32))

def patched():
    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32" if dtype == "mixed" else dtype)
    hf_polyattn.patch_model(model, "poly3")
    hf_polyattn.calibrate(model, [{"input_ids": tokens}], progress=False)
    return model

def gradients(model, rows):
    loss = model(input_ids=rows, labels=rows, use_cache=False).loss
    loss.backward()
    children = [layer.self_attn.polyattn for layer in model.model.layers]
    return loss.detach(), [child.delta.grad for child in children]

whole = patched()
expected_loss, expected = gradients(whole, tokens)
sharded, mesh = patched(), init_device_mesh("cpu", (2,))
policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)} if dtype == "mixed" else {}
for layer in sharded.model.layers if layers_apart else []:
    fully_shard(layer, mesh=mesh, **policy)
fully_shard(sharded, mesh=mesh, **policy)
seen = []
sharded.model.layers[0].self_attn.polyattn.register_forward_hook(
    lambda child, *_: seen.append([str(child.coefficients.dtype), child.coefficients.shape[0]])
)
loss, found = gradients(sharded, tokens[2 * rank : 2 * rank + 2])
distributed.all_reduce(loss)
full = [gradient.full_tensor() for gradient in found]
if rank == 0:
    print(json.dumps({
        "sharded": all(isinstance(gradient, DTensor) for gradient in found),
        "dtypes": sorted({str(gradient.dtype) for gradient in full}),
        "seen": seen,
        "loss": [expected_loss.item(), loss.item() / 2],
        "error": max(((a - b).norm() / b.norm()).item() for a, b in zip(full, expected)),
    }))
distributed.barrier()
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize(
    ("dtype", "how"),
    [("bfloat16", "layers"), ("bfloat16", "whole"), ("mixed", "layers"), ("float32", "layers")],
    ids=["bf16, layer by layer", "bf16, as a whole", "bf16 by a policy", "fp32"],
)
def test_float32_polynomials_inside_a_sharded_model_keep_their_dtype(
    dtype: str, how: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(BF16)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [str(checkpoint("llama")), dtype, how]
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert results["sharded"]
    assert results["dtypes"] == ["torch.float32"]
    assert results["seen"] == [["torch.float32", 8]]  # whole, inside of the forward pass
    rounding = 1e-4 if dtype == "float32" else 0.1
    assert results["loss"][1] == pytest.approx(results["loss"][0], rel=rounding / 10)
    assert results["error"] < rounding


FSDP1 = """
import functools, json, os, sys
import torch
import hf_polyattn
from torch import distributed
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, MixedPrecision, StateDictType
from torch.distributed.fsdp.wrap import CustomPolicy, ModuleWrapPolicy, transformer_auto_wrap_policy
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from hf_polyattn.patching.patched import patched_layers

source, how, dtype, learnable = sys.argv[1:]
flat = learnable == "frozen"
distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.manual_seed(0)
tokens = torch.randint(3, 512, (4, 32))

def patched():
    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32" if dtype == "mixed" else dtype)
    hf_polyattn.patch_model(model, hf_polyattn.PolyAttentionConfig("poly3", learnable=not flat))
    hf_polyattn.calibrate(model, [{"input_ids": tokens}], progress=False)
    return model

def train(model, rows):
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=1e-4), []
    for _ in range(2):
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)

whole = patched()
before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
expected = train(whole, tokens)
policies = {
    "whole": None,
    "layers": functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer}),
    "module policy": ModuleWrapPolicy({LlamaDecoderLayer}),
    "custom policy": CustomPolicy(lambda module: isinstance(module, LlamaDecoderLayer)),
}
options = {"device_id": torch.device("cpu"), "use_orig_params": not flat}
if dtype == "mixed":
    options["mixed_precision"] = MixedPrecision(param_dtype=torch.bfloat16)
refused = None
try:
    FullyShardedDataParallel(patched(), device_id=torch.device("cpu"), use_orig_params=False)
except hf_polyattn.PatchError as error:
    refused = str(error)
sharded = FullyShardedDataParallel(patched(), auto_wrap_policy=policies[how], **options)
layers = len(patched_layers(sharded))
seen = []
patched_layers(sharded)[0][1].register_forward_hook(
    lambda child, inputs, _: seen.append([str(child.coefficients.dtype), str(inputs[0].dtype)])
)
found = train(sharded, tokens[2 * rank : 2 * rank + 2])
distributed.all_reduce(found)
with FullyShardedDataParallel.state_dict_type(sharded, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
    state = sharded.state_dict()
if rank == 0:
    watched = "q_proj.weight" if flat else "delta"
    trained = {name: tensor for name, tensor in whole.state_dict().items() if name.endswith(watched)}
    polynomials = {name: tensor for name, tensor in state.items() if ".polyattn." in name and "settings" not in name}
    print(json.dumps({
        "layers": layers,
        "names": sorted(state) == sorted(before),
        "dtypes": sorted({str(tensor.dtype) for tensor in polynomials.values()}),
        "seen": seen[0],
        "refused": refused,
        "losses": [expected.tolist(), (found / 2).tolist()],
        "error": max((state[name] - tensor).norm().item() for name, tensor in trained.items()),
        "change": max((before[name] - tensor).norm().item() for name, tensor in trained.items()),
    }))
distributed.barrier()
sys.stdout.flush()
os._exit(0)
"""


FSDP1_CASES = [
    ("layers", "bfloat16", "trained"),
    ("whole", "bfloat16", "trained"),
    ("layers", "mixed", "trained"),
    ("custom policy", "mixed", "trained"),
    ("module policy", "mixed", "frozen"),
]


@pytest.mark.parametrize(("how", "dtype", "learnable"), FSDP1_CASES, ids=map(", ".join, FSDP1_CASES))
def test_polynomials_stay_float32_and_train_under_fsdp1(
    how: str, dtype: str, learnable: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Frozen ones with `use_orig_params=False`, which is refused for those that train."""
    script = tmp_path / "train.py"
    script.write_text(FSDP1)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [str(checkpoint("llama")), how, dtype, learnable]
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert results["layers"] == 5
    assert results["names"]
    assert results["dtypes"] == ["torch.float32"]
    assert results["seen"] == ["torch.float32", "torch.bfloat16"]
    assert results["losses"][1] == pytest.approx(results["losses"][0], rel=1e-2)
    assert 0 < results["error"] < 0.1 * results["change"]
    if learnable == "trained":
        assert "Pass use_orig_params=True, or shard with fully_shard" in results["refused"]
    else:
        assert results["refused"] is None
