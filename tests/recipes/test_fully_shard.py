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
