"""Adapters on disk: what they hold, that they mean the trained model, and that they are complete or absent."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from helpers.models import save_checkpoint
from helpers.ranks import run_ranks, run_ranks_catching
from helpers.training import STEPS, CausalLM, dense_state, loader, make_strategy, make_trainer
from lowrank_dist import AdapterCheckpoint, LoftQ, LoRA, convert_checkpoint, merge_checkpoint
from lowrank_dist.storage.reader import CheckpointReader


class Evaluated(CausalLM):
    """Keeps the logits of the last validation batch."""

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.seen, self.logits = batch[0], self.model(input_ids=batch[0], use_cache=False).logits


def train_and_save(pretrained: Path, output: Path, options: dict[str, Any], every: int = STEPS) -> dict[str, Any]:
    module = Evaluated(pretrained)
    callback = AdapterCheckpoint(dirpath=output, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    trainer = make_trainer(make_strategy(pretrained, **options), callbacks=[callback], enable_checkpointing=True)
    rank, size = trainer.global_rank, trainer.world_size
    trainer.fit(module, loader(rank, size), loader(rank, size, 1))
    state = trainer.strategy.lightning_module_state_dict()
    return {
        "ids": module.seen,
        "logits": module.logits,
        "dense": dense_state(trainer.strategy),
        "state_dict": {name: tuple(t.shape) for name, t in state.items()},
        "best": callback.best_model_path,
    }


def logits_of(base: Path, adapter: Path, ids: Tensor) -> Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(
    "adapter", [{}, {"use_rslora": True}, {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 7}}], ids=str
)
def test_converted_lora_on_the_base_is_the_trained_model(llama: Path, tmp_path: Path, adapter: dict[str, Any]) -> None:
    """Without quantization: equal to fp32 rounding of sums over the layers, under stock transformers + PEFT."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **adapter})
    results = run_ranks(2, train_and_save, llama, tmp_path, {"quantization": None, "adapter": config})
    exact = convert_checkpoint(tmp_path / f"step={STEPS}", tmp_path / "converted")
    uniform = convert_checkpoint(tmp_path / f"step={STEPS}", tmp_path / "uniform", rank=exact.rank)
    for result in results:
        for directory in (tmp_path / f"step={STEPS}" / "lora", exact.path, uniform.path):
            torch.testing.assert_close(
                logits_of(llama, directory, result["ids"]), result["logits"], rtol=1e-4, atol=1e-4
            )
    before = AutoModelForCausalLM.from_pretrained(llama)(results[0]["ids"]).logits
    assert (results[0]["logits"] - before).abs().max() > 0.05  # training changed something to be converted


def test_gpt2s_conv1d_is_converted_the_right_way_round(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "gpt2", "gpt2")
    result = run_ranks(3, train_and_save, base, tmp_path / "out", {"quantization": None})[0]
    lora = tmp_path / "out" / f"step={STEPS}" / "lora"
    torch.testing.assert_close(logits_of(base, lora, result["ids"]), result["logits"], rtol=1e-4, atol=1e-4)


def test_the_leftover_of_quantization_is_measured_and_written(llama: Path, tmp_path: Path) -> None:
    result = run_ranks(2, train_and_save, llama, tmp_path, {})[0]
    manifest = json.loads((tmp_path / f"step={STEPS}" / "lowrank_dist.json").read_text())
    assert len(manifest["matrices"]) == 14
    reader = CheckpointReader(llama)
    for entry in manifest["matrices"]:
        name, dense = entry["name"], result["dense"]
        w = reader.rows(f"{name}.weight", 0, entry["rows"])
        a, b = (dense[f"{name}.lora_{part}.default.weight"] for part in "AB")
        leftover = w - dense[f"{name}.base_layer.weight"] - b @ a
        assert entry["error"] == pytest.approx(float(leftover.norm()), rel=1e-4)
        assert entry["error_reduction"] == pytest.approx(1 - entry["error"] / entry["quantization_error"])


def test_a_checkpoint_holds_adapters_only(llama: Path, tmp_path: Path) -> None:
    result = run_ranks(2, train_and_save, llama, tmp_path, {}, 3)[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step=3", "step=5"]
    assert result["best"] == str(tmp_path / "step=5")
    files = sorted(str(p.relative_to(tmp_path / "step=5")) for p in (tmp_path / "step=5").rglob("*") if p.is_file())
    adapters = [
        f"{d}/{f}"
        for d in ("adapter", "adapter_init", "lora")
        for f in ("adapter_config.json", "adapter_model.safetensors")
    ]
    state = ["optimizer.safetensors", "state.json", "state.safetensors"]
    assert files == sorted([*adapters, *state, "lowrank_dist.json"])
    assert len({(tmp_path / "step=5" / file).stat().st_mode for file in files}) == 1  # that of the umask
    for directory in ("adapter", "adapter_init", "lora"):
        names = set(load_file(tmp_path / "step=5" / directory / "adapter_model.safetensors"))
        assert len(names) == 28
        assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    assert len(result["state_dict"]) == 28
    assert (4, 64) in result["state_dict"].values()
    earlier = load_file(tmp_path / "step=3" / "adapter_init" / "adapter_model.safetensors")
    later = load_file(tmp_path / "step=5" / "adapter_init" / "adapter_model.safetensors")
    assert all(torch.equal(earlier[name], later[name]) for name in later)


def test_the_last_step_is_saved_whatever_the_interval(llama: Path, tmp_path: Path) -> None:
    run_ranks(1, train_and_save, llama, tmp_path, {}, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step=3", "step=5"]


@pytest.mark.parametrize(("init", "rank"), [(LoRA(), 4), (LoftQ(), 8)], ids=str)
def test_lora_is_a_lora_already_and_loftq_is_not(llama: Path, tmp_path: Path, init: Any, rank: int) -> None:
    run_ranks(2, train_and_save, llama, tmp_path, {"init": init})
    checkpoint = tmp_path / f"step={STEPS}"
    assert json.loads((checkpoint / "lora" / "adapter_config.json").read_text())["r"] == rank
    converted = load_file(convert_checkpoint(checkpoint, tmp_path / "c").path / "adapter_model.safetensors")
    assert {t.shape[0] for n, t in converted.items() if "lora_A" in n} == {rank}


def killed_while_writing(pretrained: Path, output: Path) -> None:
    import lowrank_dist.checkpoints.writer as writer

    def write_json_and_die(path: Path, value: Any) -> None:
        path.write_text("{")
        os.kill(os.getpid(), signal.SIGKILL)

    writer.write_json = write_json_and_die
    train_and_save(pretrained, output, {})


def test_a_rank_killed_while_writing_leaves_nothing_half_written(llama: Path, tmp_path: Path) -> None:
    """kill -9 of the writer: no checkpoint appears, the other rank ends too, the next run sweeps and saves."""
    outcomes = run_ranks_catching(2, killed_while_writing, llama, tmp_path)
    assert all(error is not None for _, error in outcomes)
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith(".")]
    run_ranks(2, train_and_save, llama, tmp_path, {})
    assert [p.name for p in tmp_path.iterdir()] == [f"step={STEPS}"]


def full_disk(pretrained: Path, output: Path) -> None:
    import lowrank_dist.checkpoints.writer as writer

    def write_to_full(path: Path, value: Any) -> None:
        path.symlink_to("/dev/full")
        path.write_text("x" * 10_000)

    writer.write_json = write_to_full
    train_and_save(pretrained, output, {})


def test_a_full_disk_is_an_error_on_every_rank(llama: Path, tmp_path: Path) -> None:
    outcomes = run_ranks_catching(2, full_disk, llama, tmp_path)
    assert all("No space left" in str(error) for _, error in outcomes)
    assert list(tmp_path.iterdir()) == []


class Classifier(Evaluated):
    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[0][:, 0] % 2).loss


def train_classifier(pretrained: Path, output: Path) -> tuple[Tensor, Tensor]:
    adapter = LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=["query", "value"],
        modules_to_save=["pooler", "classifier"],
        task_type="SEQ_CLS",
        inference_mode=True,  # as a configuration that was saved before
    )
    module = Classifier(pretrained, AutoModelForSequenceClassification)
    callback = AdapterCheckpoint(dirpath=output, filename="{step}", every_n_train_steps=STEPS)
    strategy = make_strategy(pretrained, adapter=adapter, quantization=None)
    trainer = make_trainer(strategy, callbacks=[callback], enable_checkpointing=True)
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size), loader(0, 1, 1))
    return module.seen, module.logits


def test_a_trained_head_travels_with_the_lora(tmp_path: Path) -> None:
    """An encoder whose head and pooler the checkpoint lacks: stock PEFT puts in the saved ones, with equal results;
    merged, transformers itself does.
    """
    base = save_checkpoint(tmp_path / "bert", "bert", auto_class=AutoModelForMaskedLM)
    ids, logits = run_ranks(2, train_classifier, base, tmp_path / "out")[0]
    checkpoint = tmp_path / "out" / f"step={STEPS}"
    uniform = convert_checkpoint(checkpoint, tmp_path / "uniform", rank=8)
    torch.manual_seed(123)  # the head that transformers makes up here must not matter
    for directory in (checkpoint / "lora", uniform.path):
        model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32)
        converted = PeftModel.from_pretrained(model, directory).eval()
        with torch.no_grad():
            torch.testing.assert_close(converted(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-5)
    merged = AutoModelForSequenceClassification.from_pretrained(merge_checkpoint(checkpoint, tmp_path / "merged"))
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-5)
