"""Converted LoRAs in vLLM's own loader, on the CPU: ``make test-serving`` makes its environment."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.checkpoints import make_checkpoint
from helpers.models import save_checkpoint
from lowrank_dist.export.convert import convert_checkpoint
from lowrank_dist.export.serving import objections

PYTHON = os.environ.get("LOWRANK_DIST_VLLM")
LOADER = Path(__file__).parents[1] / "helpers" / "vllm_loader.py"
#: What vLLM puts a LoRA around in a LLaMA or Mixtral.
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODULES = ",".join([*LINEARS, "embed_tokens", "lm_head", "experts", "experts.base_layer"])
REFUSED = 3

pytestmark = pytest.mark.skipif(PYTHON is None, reason="needs an environment with vLLM: make test-serving")


def served(lora: Path, output: Path, max_rank: int = 512) -> dict[str, Tensor] | str:
    """The factors by the name of the layer, with the scaling in B; or the error of vLLM."""
    assert PYTHON is not None
    command = [PYTHON, str(LOADER), str(lora), str(max_rank), MODULES, str(output)]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    if done.returncode == REFUSED:
        return done.stdout.splitlines()[-1]
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(output)


def converted(tmp_path: Path, config: LoraConfig, *, architecture: str = "llama", **options: Any) -> tuple[Path, Any]:
    base = save_checkpoint(tmp_path / "base", architecture)
    made = make_checkpoint(tmp_path / "step", base, config)
    return convert_checkpoint(made.directory, tmp_path / "lora", **options).path, made


SHAPES: dict[str, dict[str, Any]] = {
    "one rank": {},
    "ranks, scalings": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.up_proj": 3}},
    "rsLoRA": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_it_serves_the_exact_update(shape: str, tmp_path: Path) -> None:
    lora, made = converted(tmp_path, LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, **SHAPES[shape]))
    found = served(lora, tmp_path / "found.safetensors")
    assert isinstance(found, dict)
    assert objections(lora) == []
    assert {name.rpartition(".")[0] for name in found} == {name.removesuffix(".weight") for name in made.updates}
    for name, update in made.updates.items():
        layer = name.removesuffix(".weight")
        torch.testing.assert_close(found[f"{layer}.b"] @ found[f"{layer}.a"], update.float(), rtol=0, atol=1e-6)


def test_it_serves_a_lower_rank(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, rank_pattern={"q_proj": 2})
    lora, made = converted(tmp_path, config, rank=8)
    found = served(lora, tmp_path / "found.safetensors", max_rank=8)
    assert isinstance(found, dict)
    for name, update in made.updates.items():  # of rank 8 at most
        layer = name.removesuffix(".weight")
        assert found[f"{layer}.a"].shape[0] == 8
        torch.testing.assert_close(found[f"{layer}.b"] @ found[f"{layer}.a"], update.float(), rtol=0, atol=1e-5)


def test_ranks_above_its_limit_are_refused(tmp_path: Path) -> None:
    lora, _ = converted(tmp_path, LoraConfig(r=10, target_modules=LINEARS))
    assert "LoRA rank 20 is greater than max_lora_rank 16" in served(lora, tmp_path / "found.safetensors", 16)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"modules_to_save": ["lm_head"]}, "vLLM only supports modules_to_save being either None or"),
        ({"use_dora": True}, "vLLM does not yet support DoRA."),
    ],
)
def test_what_is_said_to_be_refused_is(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    lora, _ = converted(tmp_path, LoraConfig(r=4, target_modules=["q_proj"], **options))
    assert says in served(lora, tmp_path / "found.safetensors")
    assert objections(lora) or options.get("use_dora")  # of which `convert` itself speaks


@pytest.mark.parametrize("saved", [["score"], []])
def test_a_head_for_classification_is_taken_where_the_configuration_names_it(saved: list[str], tmp_path: Path) -> None:
    lora, made = converted(tmp_path, LoraConfig(r=4, target_modules=["q_proj"]))
    file, head = lora / "adapter_model.safetensors", torch.ones(2, 64)
    save_file({**load_file(file), "base_model.model.score.weight": head}, file)
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": saved}))
    found = served(lora, tmp_path / "found.safetensors")
    assert bool(objections(lora)) == isinstance(found, str) == (not saved)
    if not isinstance(found, str):
        torch.testing.assert_close(found["score.whole"], head)
        assert len(found) == 2 * len(made.updates) + 1


def test_embeddings_are_taken_where_the_model_declares_them(tmp_path: Path) -> None:
    lora, _ = converted(tmp_path, LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]))
    found = served(lora, tmp_path / "found.safetensors")
    assert isinstance(found, dict)
    assert {"model.embed_tokens.a", "model.embed_tokens.b"} <= found.keys()
    (line,) = objections(lora)
    assert line.startswith("It adapts the embedding model.embed_tokens, which vLLM takes for models that declare it")


def test_experts_in_one_tensor_are_read(tmp_path: Path) -> None:
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=stacks)
    lora, _ = converted(tmp_path, config, architecture="mixtral")
    found = served(lora, tmp_path / "found.safetensors")
    assert isinstance(found, dict), found
    assert {name for name in found if ".experts" in name}
    (line,) = objections(lora)
    assert line.startswith("It adapts experts in one tensor")
