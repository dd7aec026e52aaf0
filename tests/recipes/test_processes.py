"""Several processes give what one gives, and Accelerate knows its configurations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from recipe_runs import ROOT, environment, losses, options
from safetensors.torch import load_file


def test_two_processes_give_what_one_gives(
    told: tuple[Path, dict[str, Any]], stories: list[str], tmp_path: Path
) -> None:
    words = [*stories, "--spec", "poly3", "--max_steps", "4", "--per_device_train_batch_size", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "recipes/causal_lm.py"]
    subprocess.run([*command, *words, *options(tmp_path)], cwd=ROOT, env=environment(), check=True)
    results = json.loads((tmp_path / "all_results.json").read_text())
    two, one = results["arms"]["poly3"], told[1]["arms"]["poly3"]
    assert results["device"]["processes"] == 2
    assert two["spent"] == one["spent"]
    assert two["reload_is_equal"]
    for stage, values in one["stages"].items():
        assert two["stages"][stage]["nll"] == pytest.approx(values["nll"], rel=1e-4), stage
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert losses(two)[3] != pytest.approx(losses(two)[0], rel=1e-3)  # batches and steps do differ by more
    ours, theirs = (load_file(folder / "poly3/model/model.safetensors") for folder in (tmp_path, told[0]))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)


@pytest.mark.parametrize("name", ["cpu", "one_gpu", "multi_gpu", "fsdp2", "deepspeed_zero3"])
def test_accelerate_understands_its_configurations(name: str) -> None:
    file = ROOT / "recipes/configs" / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert (
        config.to_dict().items()
        >= {k: v for k, v in yaml.safe_load(file.read_text()).items() if k != "use_cpu"}.items()
    )
