"""AdaLoRA on the frozen, sharded base, against stock PEFT on the same decoded weights in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from helpers.adalora import TOTAL, Kept, config, train_sharded, train_stock
from helpers.models import save_checkpoint
from helpers.ranks import run_ranks, run_ranks_catching
from helpers.training import make_strategy
from helpers.tuners import decoded, logits
from lowrank_dist import NF4, InputError, PiSSA, convert_checkpoint, inspect
from lowrank_dist.cli import report
from lowrank_dist.cli.plan.model import with_adapters
from lowrank_dist.forecast import RunSpec, forecast
from lowrank_dist.storage.layout import MANIFEST

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns that it does not save tied embeddings


def train(ranks: int, pretrained: Path, options: dict[str, Any], **more: Any) -> tuple[list[float], list[Kept]]:
    return run_ranks(ranks, train_with, pretrained, options, more)[0]


def refused(ranks: int, pretrained: Path, options: dict[str, Any], **more: Any) -> list[str]:
    """The errors of the ranks."""
    return [error for _, error in run_ranks_catching(ranks, train_with, pretrained, options, more)]


def train_with(pretrained: Path, options: dict[str, Any], more: dict[str, Any]) -> tuple[list[float], list[Kept]]:
    return train_sharded(pretrained, options, **more)


def sums(kept: list[Kept]) -> list[int]:
    return [sum(map(sum, layers.values())) for layers in kept]


def check_adapter(pretrained: Path, directory: Path, stock: PeftModel, quantization: NF4 | None, saved: Path) -> None:
    """`directory` holds the tensors and ranks that stock PEFT saves, and stock PEFT computes the same with them."""
    stock.save_pretrained(saved)
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (directory, saved))
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5)
    patterns = [json.loads((path / "adapter_config.json").read_text())["rank_pattern"] for path in (directory, saved)]
    assert patterns[0] == patterns[1]
    assert {sum(keeps) for keeps in patterns[0].values()} != {3}, "no rank has moved from a layer to another"
    loaded = PeftModel.from_pretrained(decoded(pretrained, quantization, "adalora"), directory)
    base = logits(decoded(pretrained, quantization, "adalora"), "adalora")
    assert (logits(stock, "adalora") - base).abs().max() > 0.01, "the adapter does nothing"
    torch.testing.assert_close(logits(loaded, "adalora"), logits(stock, "adalora"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("ranks", "quantization"), [(1, None), (2, NF4()), (3, NF4())])
def test_losses_budgets_and_adapter_are_those_of_stock_peft(
    llama: Path, tmp_path: Path, ranks: int, quantization: NF4 | None
) -> None:
    saved = {TOTAL: tmp_path / "end"}
    losses, kept = train(ranks, llama, {}, quantization=quantization, saves=saved)
    expected, budgets, stock = train_stock(llama, {}, quantization)
    assert losses == pytest.approx(expected, rel=1e-6)
    assert kept == budgets
    assert sums(kept) == [0, 0, 27, 21, 19, 18, 18, 18]
    check_adapter(llama, saved[TOTAL] / "adapter", stock, quantization, tmp_path / "stock")
    lora = PeftModel.from_pretrained(decoded(llama, quantization, "adalora"), saved[TOTAL] / "lora")
    assert type(lora.peft_config["default"]) is LoraConfig
    assert lora.peft_config["default"].r == max(sum(keeps) for keeps in kept[-1].values())
    torch.testing.assert_close(logits(lora, "adalora"), logits(stock, "adalora"), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match=f"{saved[TOTAL]}/lora is the exact LoRA already"):
        convert_checkpoint(saved[TOTAL], saved[TOTAL].with_name("converted"))


def test_accumulation_clipping_and_interval(llama: Path) -> None:
    """Three batches a step: importance changes, and triplets are chosen, once a step and not in every step."""
    options = {"deltaT": 3, "orth_reg_weight": 0.1, "beta1": 0.5, "lora_dropout": 0.0}
    losses, kept = train(2, llama, options, accumulate_grad_batches=3, gradient_clip_val=0.05)
    expected, budgets, _ = train_stock(llama, options, clip=0.05)
    steps = torch.tensor(losses).view(TOTAL, 3).mean(1)
    torch.testing.assert_close(steps, torch.tensor(expected), rtol=1e-6, atol=0)
    assert kept == budgets
    assert sums(kept) == [0, 0, 0, 21, 21, 21, 18, 18]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llama"), "llama", tie_word_embeddings=False)


@pytest.mark.parametrize(
    ("options", "strategy"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, {}),
        ({"modules_to_save": ["lm_head"], "lora_alpha": -1}, {"use_reentrant": True}),
        ({}, {"shard_within": "rank"}),
        ({"orth_reg_weight": 0.0}, {"gradient_checkpointing": False, "offload_optimizer": True}),
    ],
    ids=["adapted head", "trained head", "whole base", "offloaded"],
)
def test_other_ways_to_hold_what_is_trained(untied: Path, options: dict[str, Any], strategy: dict[str, Any]) -> None:
    losses, kept = train(2, untied, options, strategy_options=strategy)
    expected, budgets, _ = train_stock(untied, options)
    assert losses == pytest.approx(expected, rel=1e-6)
    assert kept == budgets


@pytest.mark.parametrize(("first", "then", "at"), [(2, 1, 3), (1, 2, 7)], ids=["falling", "fixed"])
def test_resumes_on_other_ranks(llama: Path, tmp_path: Path, first: int, then: int, at: int) -> None:
    """In the middle of the schedule, and after the choice is fixed; as the run that nothing interrupted."""
    middle, end, whole = tmp_path / "middle", tmp_path / "end", tmp_path / "whole"
    losses, kept = train(first, llama, {}, quantization=NF4(), saves={at: middle, TOTAL: whole})
    resumed, further = train(then, llama, {}, quantization=NF4(), saves={TOTAL: end}, resume=(at, middle))
    assert resumed == pytest.approx(losses[at:], rel=1e-6)
    assert further[at:] == kept[at:]
    ours, theirs = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (end, whole))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5)
    by_layer = json.loads((end / MANIFEST).read_text())["rank_by_layer"]
    assert by_layer == {layer: sum(keeps) for layer, keeps in kept[-1].items()}


@pytest.mark.parametrize("quantization", [None, NF4()], ids=["dense", "nf4"])
def test_the_report_has_the_ranks_by_type(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quantization: NF4 | None
) -> None:
    end, figures, picture = tmp_path / "end", tmp_path / "report.json", tmp_path / "report.png"
    _, kept = train(1, llama, {}, quantization=quantization, saves={TOTAL: end})
    assert report.run([str(end), "--json", str(figures), "--picture", str(picture)]) == 0
    by_layer = {layer: sum(keeps) for layer, keeps in kept[-1].items()}
    assert json.loads(figures.read_text())["rank_by_layer"] == by_layer
    said = {words[0]: words[1:] for line in capsys.readouterr().out.splitlines() if len(words := line.split()) == 6}
    assert said["all"][:3] == ["6", "18", "3.00"]
    of_type = [rank for layer, rank in by_layer.items() if layer.endswith("down_proj")]
    assert said["down_proj"] == [
        "2",
        str(sum(of_type)),
        f"{sum(of_type) / 2:.2f}",
        str(min(of_type)),
        str(max(of_type)),
    ]
    assert picture.stat().st_size > 10_000
    facts = inspect(end).facts
    assert (facts["rank"], facts["rank pattern"], facts["scaling"]) == (6, by_layer, pytest.approx(400 / 6))


def held(pretrained: Path, save: Path) -> int:
    """Bytes of importance that a rank holds; saves before anything is pruned."""
    captured: list[int] = []

    class Counting(Callback):
        def on_before_zero_grad(self, trainer: Trainer, *_: Any) -> None:
            allocation = trainer.strategy.saver.writer.allocation
            captured.append(sum(shard.nbytes for _, _, shard in allocation.shards()))

    train_sharded(pretrained, {}, NF4(), saves={2: save}, precision="bf16-true", callbacks=[Counting()])
    return max(captured)


def test_the_forecast_counts_its_state(llama: Path, tmp_path: Path) -> None:
    (importance, other) = run_ranks(2, held, llama, tmp_path / "early")
    strategy = make_strategy(llama, adapter=config(), init=None, quantization=NF4())
    job = RunSpec(
        nodes=1,
        gpus_per_node=2,
        batch_size=6,
        length=16,
        compute_dtype=torch.bfloat16,
        factor_dtype=torch.bfloat16,
        init=None,
        residual=NF4(),
        on_gpu=False,
    )
    said = forecast(*with_adapters(strategy, llama, job))
    assert said.memory.resident["importance"] == importance == other
    assert said.memory.step > importance
    files = [path for path in (tmp_path / "early").rglob("*.safetensors") if path.name != "state.safetensors"]
    assert said.checkpoint == pytest.approx(sum(path.stat().st_size for path in files), rel=0.02)  # names differ


def test_a_resumed_run_has_the_schedule_of_the_first(llama: Path, tmp_path: Path) -> None:
    train(1, llama, {}, saves={3: tmp_path / "middle"})
    for error in refused(2, llama, {"target_r": 2}, resume=(3, tmp_path / "middle")):
        assert "AdaLoRA's target was 3 in the run that wrote the checkpoint and is 2 now" in error


def test_bf16(llama: Path, tmp_path: Path) -> None:
    """Importance comes from the fp32 copies; the budget is the same, and the loss nearly."""
    saved = {TOTAL: tmp_path / "end"}
    losses, kept = train(2, llama, {}, quantization=NF4(), precision="bf16-true", saves=saved)
    expected, budgets, _ = train_stock(llama, {}, NF4())
    assert losses == pytest.approx(expected, rel=0.02)
    assert sums(kept) == sums(budgets)
    trained = json.loads((saved[TOTAL] / MANIFEST).read_text())["trained"]
    assert {name.split(".")[-2] for name in trained} == {"lora_A", "lora_E", "lora_B"}
    tensors = load_file(saved[TOTAL] / "adapter" / "adapter_model.safetensors")
    assert sum(len(t) for name, t in tensors.items() if "lora_E" in name) == sums(kept)[-1]
    assert all((t != 0).all() for name, t in tensors.items() if "lora_E" in name)


def test_total_step_is_the_number_of_steps(llama: Path) -> None:
    for error in refused(2, llama, {"total_step": TOTAL + 2}):
        assert "total_step=10 of AdaLoraConfig" in error
        assert "8 optimizer steps; pass total_step=8" in error


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_r": 8}, "target_r=8 is more than init_r=6"),
        ({"target_r": 0}, "target_r=0 must be at least 1"),
        ({"deltaT": 0}, "deltaT=0 must be at least 1"),
        ({"beta1": 1.0}, "beta1=1.0 must be between 0 and 1"),
        ({"tfinal": 0, "deltaT": 3}, "triplets are chosen for the last time at step 6 of 8"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(llama: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_strategy(llama, adapter=config(**options), init=None)


def test_it_starts_from_zero_only(llama: Path) -> None:
    with pytest.raises(ValueError, match="an AdaLoraConfig, which starts from zero"):
        make_strategy(llama, adapter=config(), init=PiSSA())
