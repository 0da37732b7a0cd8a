"""What is trained is what is opened: a checkpoint computes, on any number of ranks, what its run computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, VeraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.families import Family
from helpers.ranks import RankFailedError, run_ranks
from helpers.training import fit
from lowrank_dist import NF4, LoRA, LoRAXS, PiSSA
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import CheckpointError, InputError
from lowrank_dist.inference.on_disk import ModelOnDisk, Stage

IDS = torch.arange(5, 29).view(2, 12)
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear"}
RUNS: dict[str, dict[str, Any]] = {
    "pissa": {"quantization": None},
    "qpissa": {"init": PiSSA(quantization_iterations=2), "quantization": NF4(double_quant=True)},
    "qlora, all layers, norms": {
        "init": LoRA(),
        "encode": "all-linear",
        "adapter": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        "train_also": ["*norm*"],
    },
    "untied head": {"adapter": LoraConfig(**LORA, modules_to_save=["lm_head"]), "untie_embeddings": True},
    "dora": {"adapter": LoraConfig(**LORA, use_dora=True), "init": LoRA()},
    "lora-xs": {"init": LoRAXS(), "quantization": None},
    "prompt tuning": {"adapter": PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "init": None},
    "copied layers": {"adapter": None, "init": None, "expand_blocks": 2, "quantization": NF4()},
    "vera": {"adapter": VeraConfig(r=4, target_modules=["q_proj", "v_proj"]), "init": None},
}


def trained(pretrained: Path, directory: Path, name: str, precision: str) -> Tensor:
    """Train, save to `directory`, and return the logits of the trained model."""
    options = RUNS[name] | ({"fp32_norms": True} if precision == "bf16-mixed" else {})
    looked = Look(directory)
    fit(pretrained, precision=precision, callbacks=looked, **options)
    return looked.logits


class Look(L.Callback):
    """Saves, and keeps the logits, at the end of training."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.directory)
        model = trainer.strategy.inference_model()
        with model.evaluating():
            self.logits = model(IDS).logits


def opened(directory: Path, stage: Stage = "trained", options: dict[str, Any] | None = None) -> tuple[str, Tensor]:
    found = ModelOnDisk(directory, stage=stage, **(options or {}))
    with found.loaded(ShardGroup()) as model:
        logits = model(IDS).logits
    found.close()
    return found.kind, logits


#: The others are run by `make test-matrix`.
BY_DEFAULT = {
    ("pissa", "32-true"),
    ("qlora, all layers, norms", "32-true"),
    ("vera", "32-true"),
    ("copied layers", "bf16-true"),
    ("prompt tuning", "32-true"),
    ("qpissa", "bf16-true"),
}
CASES = [
    *((name, "32-true") for name in RUNS),
    ("qpissa", "bf16-true"),
    ("copied layers", "bf16-true"),
    ("pissa", "bf16-mixed"),
]


@pytest.mark.parametrize(
    ("name", "precision"),
    [pytest.param(*case, marks=() if case in BY_DEFAULT else pytest.mark.matrix) for case in CASES],
)
def test_a_checkpoint_computes_what_its_run_computed(llama: Path, tmp_path: Path, name: str, precision: str) -> None:
    expected = run_ranks(2, trained, llama, tmp_path / "saved", name, precision)[0]
    if name == "prompt tuning":
        with pytest.raises(RankFailedError, match="virtual tokens answer on one rank only, not on 2"):
            run_ranks(2, opened, tmp_path / "saved")
    else:
        kind, found = run_ranks(2, opened, tmp_path / "saved")[1]
        assert "trained for 5 steps" in kind
        assert torch.equal(found, expected)
    if precision == "32-true":
        torch.testing.assert_close(run_ranks(1, opened, tmp_path / "saved")[0][1], expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def saved(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    run_ranks(2, trained, llama, directory / "pissa", "pissa", "32-true")
    return directory / "pissa"


def test_every_stage_is_the_model_that_it_says(llama: Path, saved: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    with torch.no_grad():
        base = original(IDS).logits
        converted = PeftModel.from_pretrained(original, saved / "lora")(IDS).logits
    assert (converted - base).abs().max() > 0.05
    for stage, expected in (("base", base), ("step0", base), ("trained", converted), ("converted", converted)):
        _, found = run_ranks(2, opened, saved, stage)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=stage)


def test_an_adapter_and_a_base_are_opened_by_themselves(llama: Path, saved: Path) -> None:
    kind, found = run_ranks(2, opened, saved / "lora")[0]
    assert kind == f"adapter (LORA) on {llama}"
    torch.testing.assert_close(found, run_ranks(1, opened, saved)[0][1], rtol=1e-4, atol=1e-4)
    kind, dense = run_ranks(2, opened, llama)[0]
    assert kind == "pretrained model, without an adapter"
    (_, encoded) = run_ranks(2, opened, llama, "trained", {"quantization": NF4()})[0]
    assert 0.01 < (dense - encoded).abs().max() < 1


def test_a_model_in_bf16_computes_in_fp32_as_stock_does(tmp_path: Path) -> None:
    """Also with what is rounded when the model is built: the rotary table of GPT-J."""
    base = Family("gptj", config={"rotary_dim": 8}).save(tmp_path)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}), encoding="utf-8")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()(IDS).logits
    torch.testing.assert_close(run_ranks(1, opened, base)[0][1], expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_opened_is_refused_before_weights_are_read(llama: Path, saved: Path, tmp_path: Path) -> None:
    for options, says in (
        ({"model": saved.parent}, "holds checkpoints; pass one of them, such as the newest"),
        ({"model": saved, "quantization": NF4()}, "a checkpoint says itself how its base is held"),
        ({"model": saved / "lora", "stage": "step0"}, "only a checkpoint of a run has a step0 model"),
        ({"model": llama, "base": str(llama)}, "holds no adapter"),
        ({"model": saved, "precision": "16-true"}, "valid choices: 32-true"),
    ):
        with pytest.raises(InputError, match=says):
            ModelOnDisk(**options)
    with pytest.raises(CheckpointError, match="for a residual, not for the original model"):
        ModelOnDisk(saved / "adapter")


def open_on_other(directory: Path, base: Path) -> str:
    try:
        opened(directory, "trained", {"base": str(base)})
    except CheckpointError as error:
        return str(error)
    raise AssertionError("opened")


def test_an_adapter_for_other_weights_is_refused(llama: Path, saved: Path, tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0] += 0.1
    other.save_pretrained(tmp_path / "other")
    for model in (saved, saved / "lora"):
        first, second = run_ranks(2, open_on_other, model, tmp_path / "other")
        assert "other weights" in first or "weights have changed" in first
        assert "fingerprint" in second
