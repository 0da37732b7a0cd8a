"""DPO over the sharded base: its reference is the model of step 0, whatever the method, the ranks and the resumes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig, VeraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.ranks import run_ranks
from helpers.sft import save_material, write_jsonl
from helpers.training import make_strategy
from lowrank_dist import CausalLMModule, InputError, LoRA, PreferenceModule, SFTDataModule
from lowrank_dist.errors import CheckpointError
from lowrank_dist.training.token_losses import token_log_probs

PAIRS = [
    {"prompt": f"what is {a} and {b}? ", "chosen": "four" + " one" * a, "rejected": "hello" + " two" * b}
    for a in (1, 2, 3)
    for b in (1, 2)
]
STEPS = 4
GLOBAL_BATCH = 4
# Losses of several pairs are sums over 30 tokens; in fp32 another order of summation over ranks changes the 7th digit,
# and AdamW's first steps turn it into the 5th.
FP32 = 1e-4
DENSE: dict[str, Any] = {"quantization": None}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_material(tmp_path_factory.mktemp("pairs"), PAIRS)
    write_jsonl(directory / "sft.jsonl", [{"prompt": p["prompt"], "completion": p["chosen"]} for p in PAIRS])
    return directory


class Recorded(PreferenceModule):
    """Keeps its losses by step, and log-probabilities of the reference."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.of_steps: dict[int, float] = {}
        self.references: list[tuple[dict[str, Tensor], Tensor]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.loss == "dpo":
            with self.reference():
                inputs = {name: values for name, values in batch.items() if name != "labels"}
                found = token_log_probs(self(**inputs).logits, batch["labels"]).sum(1)
            self.references.append((batch, found))
        loss = super().training_step(batch, batch_idx)
        if "train_loss" in self.trainer.callback_metrics or not self.trainer.fit_loop._should_accumulate():
            self.of_steps[self.trainer.global_step] = float(self.trainer.callback_metrics["train_loss"])
        return loss


def run(
    material: Path,
    steps: int = STEPS,
    *,
    resume: Path | None = None,
    save: Path | None = None,
    accumulate: int = 1,
    loss: str = "dpo",
    **strategy: Any,
) -> Recorded:
    """Fit with four pairs a step; every second epoch of six pairs ends in a step of two."""
    size = torch.distributed.get_world_size()
    options = {"adapter": LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", lora_dropout=0.5), **strategy}
    if loss == "dpo" and not isinstance(options["adapter"], LoraConfig):
        options["init"] = None
    made = make_strategy(material / "model", **options)
    trainer = L.Trainer(
        strategy=made,
        accelerator="cpu",
        devices=size,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    module = Recorded(str(material / "model"), lr=2e-2, scheduler="constant", warmup_ratio=0.0, loss=loss)
    # dropout is drawn by rank, and would hide what is compared: only the reference's absence of it is tested
    module.on_train_start = lambda: _without_dropout(module) if made.quantization is not None else None  # type: ignore[method-assign]
    data = SFTDataModule(
        str(material / "model"), str(material / "data.jsonl"), batch_size=GLOBAL_BATCH // size // accumulate
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=False)
    if save is not None:
        trainer.save_checkpoint(save)
    return module


def _without_dropout(module: Any) -> None:
    for child in module.modules():
        if isinstance(child, torch.nn.Dropout):
            child.p = 0.0


def reference_is_the_pretrained_model(material: Path, **strategy: Any) -> float:
    """Largest difference of log-probabilities from stock transformers' on the pretrained weights, in any step."""
    module = run(material, **strategy)
    assert len(module.references) == STEPS
    stock = AutoModelForCausalLM.from_pretrained(material / "model", dtype=torch.float32).eval()
    worst = 0.0
    for batch, found in module.references:
        with torch.no_grad():
            logits = stock(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        expected = token_log_probs(logits, batch["labels"]).sum(1)
        worst = max(worst, float((found - expected).abs().max()))
    assert module.of_steps[0] == pytest.approx(math.log(2), abs=0.2)  # dropout is on in what is trained
    return worst


def references(material: Path, tmp: Path) -> dict[str, float]:
    found = {
        "PiSSA": reference_is_the_pretrained_model(material, **DENSE),
        "kept on every rank": reference_is_the_pretrained_model(material, **DENSE, shard_within="rank"),
        "LoRA, folded": reference_is_the_pretrained_model(material, **DENSE, init=LoRA(), fold_adapters="always"),
    }
    with pytest.raises(InputError, match="keeps_step_zero"), make_strategy(material / "model").at_step_zero():
        pass
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_reference_is_the_pretrained_model_in_every_step(ranks: int, material: Path, tmp_path: Path) -> None:
    """Without quantization base and initial adapter are the pretrained model, to fp32 rounding of 30 tokens."""
    for found in run_ranks(ranks, references, material, tmp_path):
        assert all(worst < 5e-4 for worst in found.values()), found


def trained(material: Path, tmp: Path) -> dict[str, dict[int, float]]:
    found = {"whole": run(material).of_steps}
    found["ORPO"] = run(material, loss="orpo").of_steps
    found["SimPO"] = run(material, loss="simpo").of_steps
    ranks = torch.distributed.get_world_size()
    run(material, 2, save=tmp / f"two-of-{ranks}")
    return found


def resumed(material: Path, tmp: Path, ranks: int) -> dict[int, float]:
    return run(material, resume=tmp / f"two-of-{ranks}").of_steps


def test_losses_are_the_same_on_any_number_of_ranks_and_after_resuming(material: Path, tmp_path: Path) -> None:
    one = run_ranks(1, trained, material, tmp_path)[0]
    two, other = run_ranks(2, trained, material, tmp_path)
    assert two == other
    assert one["whole"][0] == pytest.approx(math.log(2), rel=1e-5)
    assert one["whole"][STEPS - 1] < 0.65
    for name, losses in one.items():
        assert two[name] == pytest.approx(losses, rel=FP32), name
    again = run_ranks(2, resumed, material, tmp_path, 2)[0]
    assert again == {step: loss for step, loss in two["whole"].items() if step >= 2}  # bit for bit
    elsewhere = run_ranks(1, resumed, material, tmp_path, 2)[0]
    assert elsewhere == pytest.approx(again, rel=FP32)


def accumulated(material: Path, loss: str) -> dict[int, float]:
    return run(material, accumulate=2, loss=loss).of_steps


def begun_from(material: Path, tmp: Path) -> None:
    """From an adapter: it is the reference. From a run without a reference: refused. From other values: refused."""
    base = str(material / "model")
    sft = make_strategy(material / "model")
    trainer = L.Trainer(
        strategy=sft,
        accelerator="cpu",
        devices=1,
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(CausalLMModule(base, lr=1e-2), SFTDataModule(base, str(material / "sft.jsonl")))
    trainer.save_checkpoint(tmp / "sft")
    with pytest.raises(CheckpointError, match=r"run without a reference.* adapter=.*sft/lora"):
        run(material, resume=tmp / "sft")
    start = {"adapter": tmp / "sft" / "lora", "init": None, "quantization": None}
    begun = run(material, 2, save=tmp / "begun", **start)
    assert begun.of_steps[0] == pytest.approx(math.log(2), rel=1e-5)
    whole = run(material, 3, **start)
    again = run(material, 3, resume=tmp / "begun", **start)
    assert again.of_steps[2] == whole.of_steps[2]
    assert torch.equal(again.references[0][1], whole.references[2][1])
    other = run(material, 1, adapter=VeraConfig(r=4, target_modules=["q_proj"], vera_dropout=0.0), save=tmp / "vera")
    assert other.of_steps[0] == pytest.approx(math.log(2), rel=1e-5)
    weights = tmp / "sft" / "lora" / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    changed = load_file(weights)
    save_file({name: value * (1.5 if "lora_B" in name else 1) for name, value in changed.items()}, weights)
    with pytest.raises(CheckpointError):
        run(material, 3, resume=tmp / "begun", **start)


def test_a_run_that_begins_from_an_adapter(material: Path, tmp_path: Path) -> None:
    run_ranks(1, begun_from, material, tmp_path)


def test_accumulated_batches_weigh_their_pairs(material: Path) -> None:
    for loss in ("dpo", "orpo"):
        one = run_ranks(1, accumulated, material, loss)[0]
        two = run_ranks(2, accumulated, material, loss)[0]
        assert one == pytest.approx(two, rel=FP32)
