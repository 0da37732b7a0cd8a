"""The gradient of a step is that of the mean over its trained tokens, however its records are split.

The reference is in fp64, one record at a time, without padding, Lightning or DeepSpeed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from helpers.ranks import alone, run_ranks
from helpers.traffic import Traffic
from helpers.training import dense_state, make_strategy, make_trainer
from lowrank_dist import CausalLMModule, PiSSAStrategy, SFTDataModule
from lowrank_dist.data.tokenizing import IGNORE_INDEX

#: Prompt and answer tokens of every record. The last one has no answer.
RECORDS = ((5, 3), (9, 300), (4, 40), (30, 7), (12, 120), (3, 1), (20, 0))
EMPTY = len(RECORDS) - 1
#: By rank the accumulated batches of a step, as records.
Split = list[list[list[int]]]
ONE_BATCH: Split = [[[0, 1, 2, 3, 4, 5]]]
ONE_BY_ONE: Split = [[[0], [1], [2], [3], [4], [5]]]
TWO_RANKS: Split = [[[0, 1, 2]], [[3, 4, 5]]]
UNEVEN: Split = [[[0], [1, 2]], [[3, 4], [5]]]
THREE_RANKS: Split = [[[0], [1]], [[2], [3]], [[4], [5]]]
SPLITS = {
    "one batch": ONE_BATCH,
    "one by one": ONE_BY_ONE,
    "two ranks": TWO_RANKS,
    "two ranks, uneven batches": UNEVEN,
    "three ranks": THREE_RANKS,
    "an empty batch first": [[[EMPTY], [0, 1], [2, 3, 4, 5]]],
    "an empty batch last": [[[0, 1, 2, 3, 4, 5], [EMPTY]]],
    "an empty rank": [[[0, 1, 2, 3, 4, 5]], [[EMPTY]]],
}
# Bound of the relative distance between gradients of these models in fp32 and in fp64. fp32 rounds by 6e-8, and entries
# have passed some ten sums and products, which makes 4e-7: in one batch as in every split of it. A mean of batch means
# is off by 6.
FP32 = 2e-6
# The same of a step that is taken as a difference of weights. fp32 rounds a weight of 0.1 by up to 4e-9, and entries of
# a clipped gradient of norm 0.05 are 4e-4 on average, which makes 1e-5.
CLIPPED = 5e-5


def example(index: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels of a record, int64."""
    prompt, answer = RECORDS[index]
    ids = torch.randint(3, 256, (prompt + answer,), generator=torch.Generator().manual_seed(index))
    labels = ids.clone()
    labels[:prompt] = IGNORE_INDEX
    return ids, labels


def batch_of(records: list[int]) -> dict[str, Tensor]:
    """The records, padded on the right."""
    examples = [example(index) for index in records]
    size = max(len(ids) for ids, _ in examples)
    found: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for ids, labels in examples:
        pad = (0, size - len(ids))
        found["input_ids"].append(functional.pad(ids, pad))
        found["labels"].append(functional.pad(labels, pad, value=IGNORE_INDEX))
        found["attention_mask"].append(functional.pad(torch.ones_like(ids), pad))
    return {name: torch.stack(values) for name, values in found.items()}


class Descent(CausalLMModule):
    """SGD, which forgives no factor; keeps the gradients that clipping and the optimizer get."""

    def __init__(self, pretrained: Path, rate: float, average: str) -> None:
        super().__init__(str(pretrained), scheduler="constant", average_loss_over=average)  # type: ignore[arg-type]
        self.rate = rate
        self.steps: list[tuple[dict[str, Tensor], float]] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.rate)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        sharded = isinstance(self.trainer.strategy, PiSSAStrategy)
        trained = [(n.removeprefix("model."), p) for n, p in self.named_parameters() if p.requires_grad]
        gradients = {name: (safe_get_full_grad(p) if sharded else p.grad).float().clone() for name, p in trained}
        self.steps.append((gradients, float(self.trainer.callback_metrics["train_loss"])))

    def on_train_batch_end(self, *_: Any) -> None:
        if isinstance(self.trainer.strategy, PiSSAStrategy) and not self.trainer.fit_loop._should_accumulate():
            assert not self.trainer.strategy.deepspeed_engine.optimizer.grad_partitions_flat_buffer.any()


def loader_of(steps: list[Split], rank: int) -> DataLoader:
    """This rank's batches."""
    return DataLoader([batch_of(records) for split in steps for records in split[rank]], batch_size=None)


def descend(pretrained: Path, steps: list[Split], options: dict[str, Any]) -> tuple[Any, ...]:
    """Gradients and ``train_loss`` of every step under PiSSAStrategy; all weights before, the trained ones after."""
    module = Descent(pretrained, options.pop("rate", 0.0), options.pop("average", "tokens"))
    strategy = make_strategy(pretrained, **options.pop("strategy", {}))
    trainer = make_trainer(strategy, steps=len(steps), accumulate_grad_batches=len(steps[0][0]), **options)
    trainer.fit(module, loader_of(steps, trainer.global_rank))
    after = strategy.lightning_module_state_dict()
    return module.steps, dense_state(strategy), {name.removeprefix("model."): w for name, w in after.items()}


def reference(pretrained: Path, state: dict[str, Tensor]) -> Any:
    """The model of `state` in fp64, with the same parameters trained."""
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    if any("lora_" in name for name in state):
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"), model)
    assert not model.load_state_dict(state, strict=False).missing_keys
    return model.double()


def mean_over_tokens(model: Any, records: list[int]) -> tuple[dict[str, Tensor], float]:
    """Gradients and value of the mean loss over all answer tokens of the records."""
    model.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for ids, labels in map(example, records):
        logits = model(input_ids=ids[None]).logits[0]
        loss = loss + functional.cross_entropy(
            logits[:-1], labels[1:], reduction="sum", ignore_index=IGNORE_INDEX
        ) / sum(RECORDS[index][1] for index in records)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}, loss.item()


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of all gradients, relative to that of the expected ones."""
    assert set(found) == set(expected)
    difference = sum(float((found[name].double() - expected[name]).square().sum()) for name in expected)
    return (difference / sum(float(g.double().square().sum()) for g in expected.values())) ** 0.5


def norm(gradients: dict[str, Tensor]) -> float:
    return sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5


# -- PiSSAStrategy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_any_split_is_one_batch(llama: Path, split: Split) -> None:
    """fp32; `FP32` has the bound. Twice, so that nothing is left from the step before, the second time reversed."""
    backwards = [batches[::-1] for batches in split[::-1]]
    steps, state, _ = run_ranks(len(split), descend, llama, [split, backwards], {})[0]
    expected, loss = mean_over_tokens(reference(llama, state), ONE_BATCH[0][0])
    assert len(steps) == 2
    for gradients, train_loss in steps:
        assert distance(gradients, expected) < FP32
        assert train_loss == pytest.approx(loss, rel=1e-6)  # one rounding to fp32, and the rounding of token losses


@pytest.mark.parametrize(
    "options",
    [{"offload_optimizer": True}, {"use_reentrant": True}, {"gradient_checkpointing": False}],
    ids=str,
)
def test_options_of_the_strategy_change_nothing(llama: Path, options: dict[str, Any]) -> None:
    """fp32; `FP32` has the bound. With an offloaded optimizer, accumulated gradients are on the host."""
    steps, state, _ = run_ranks(2, descend, llama, [UNEVEN, UNEVEN], {"strategy": options})[0]
    expected, _ = mean_over_tokens(reference(llama, state), ONE_BATCH[0][0])
    for gradients, _ in steps:
        assert distance(gradients, expected) < FP32


@pytest.mark.parametrize("split", [ONE_BATCH, ONE_BY_ONE, UNEVEN, THREE_RANKS], ids=str)
def test_clipping_sees_the_mean(llama: Path, split: Split) -> None:
    """A rate of 1 subtracts the clipped gradient: that of one batch, scaled to the norm, which was 0.164.

    fp32; `CLIPPED` has the bound.
    """
    options = {"rate": 1.0, "gradient_clip_val": 0.05}
    _, before, after = run_ranks(len(split), descend, llama, [split], options)[0]
    expected, _ = mean_over_tokens(reference(llama, before), ONE_BATCH[0][0])
    check_clipped(before, after, expected, 0.05)


def check_clipped(before: dict[str, Tensor], after: dict[str, Tensor], expected: dict[str, Tensor], to: float) -> None:
    size = norm(expected)
    assert size > 3 * to
    step = {name: before[name].double() - after[name] for name in expected}
    assert distance(step, {name: gradient * to / size for name, gradient in expected.items()}) < CLIPPED


def test_bf16(llama: Path) -> None:
    """bf16 rounds by 2^-9 = 0.002: activations, gradients, their sums and their rescaling each, which makes 0.005."""
    (one, *_) = run_ranks(1, descend, llama, [ONE_BATCH], {"precision": "bf16-true"})[0]
    (split, *_) = run_ranks(2, descend, llama, [UNEVEN], {"precision": "bf16-true"})[0]
    (batches, *_) = run_ranks(2, descend, llama, [UNEVEN], {"precision": "bf16-true", "average": "batches"})[0]
    assert distance(split[0][0], one[0][0]) < 0.02
    assert distance(batches[0][0], one[0][0]) > 1


def test_a_mean_of_batch_means_by_option(llama: Path) -> None:
    """fp32; `FP32` has the bound. The reference averages the gradients of the batches."""
    steps, state, _ = run_ranks(2, descend, llama, [UNEVEN], {"average": "batches"})[0]
    model = reference(llama, state)
    parts = [mean_over_tokens(model, records) for batches in UNEVEN for records in batches]
    expected = {name: sum(part[name] for part, _ in parts) / len(parts) for name in parts[0][0]}
    assert distance(steps[0][0], expected) < FP32
    assert steps[0][1] == pytest.approx(sum(loss for _, loss in parts) / len(parts), rel=1e-6)
    over_tokens, _ = mean_over_tokens(model, ONE_BATCH[0][0])
    assert distance(expected, over_tokens) > 1


def test_a_step_without_trained_tokens(llama: Path) -> None:
    """Its gradient is exactly 0, as is its loss; the next step is not affected."""
    nothing: Split = [[[EMPTY], [EMPTY]], [[EMPTY], [EMPTY]]]
    options = {"rate": 1.0, "gradient_clip_val": 1e6}
    steps, before, after = run_ranks(2, descend, llama, [nothing, UNEVEN], options)[0]
    assert norm(steps[0][0]) == steps[0][1] == 0
    expected, loss = mean_over_tokens(reference(llama, before), ONE_BATCH[0][0])
    assert distance(steps[1][0], expected) < FP32
    assert steps[1][1] == pytest.approx(loss, rel=1e-6)
    assert all(weight.isfinite().all() for weight in after.values())


@alone
def communicate(pretrained: Path, average: str) -> list[int]:
    """Bytes of the all-reduces of a run."""
    traffic = Traffic()
    descend(pretrained, [UNEVEN, UNEVEN, UNEVEN], {"average": average})
    return [nbytes for name, ranks, nbytes in traffic.calls if name == "all_reduce" and len(ranks) == 2]


def test_one_small_all_reduce_a_step(llama: Path) -> None:
    """Of two fp64 numbers. The old way has two of 4 bytes for every batch, four a step."""
    tokens, batches = (run_ranks(2, communicate, llama, average)[0] for average in ("tokens", "batches"))
    assert tokens.count(16) - batches.count(16) == 3
    assert batches.count(4) - tokens.count(4) == 12
    assert sorted(n for n in tokens if n not in (4, 16)) == sorted(n for n in batches if n not in (4, 16))


class Saving(L.Callback):
    """Saves after one batch, and keeps ``train_loss`` of every step."""

    def __init__(self, path: Path, after: int | None) -> None:
        self.path, self.after = path, after
        self.losses: dict[int, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.losses[trainer.global_step] = float(trainer.callback_metrics["train_loss"])
        if args[-1] == self.after:
            trainer.save_checkpoint(self.path)


def tune(material: Path, path: Path, resume: bool) -> dict[int, float]:
    """Losses of the steps; the first run saves after the first batch of its third step."""
    saving = Saving(path, None if resume else 4)
    data = SFTDataModule(str(material / "model"), str(material / "data.jsonl"), batch_size=2)
    trainer = make_trainer(make_strategy(material / "model"), steps=5, accumulate_grad_batches=2, callbacks=[saving])
    trainer.fit(CausalLMModule(str(material / "model"), lr=1e-3), data, ckpt_path=path if resume else None)
    return saving.losses


def test_a_save_within_a_step(material: Path, tmp_path: Path) -> None:
    """The resumed run repeats the batches of the unfinished step, with the same sums."""
    whole = run_ranks(2, tune, material, tmp_path / "saved", False)[0]
    rest = run_ranks(2, tune, material, tmp_path / "saved", True)[0]
    assert list(whole) == [1, 2, 3, 4, 5]
    assert rest == {step: loss for step, loss in whole.items() if step > 2}


def epochs(material: Path, limit: int, batch_size: int, average: str) -> list[float]:
    """``train_loss`` of the steps of two epochs of `limit` records."""
    data = SFTDataModule(str(material / "model"), str(material / "data.jsonl"), batch_size=batch_size, limit=limit)
    module = CausalLMModule(str(material / "model"), lr=1e-3, average_loss_over=average)  # type: ignore[arg-type]
    losses: list[float] = []
    record = lambda *_: losses.append(float(module.trainer.callback_metrics["train_loss"]))  # noqa: E731
    module.on_train_batch_end = record
    make_trainer(make_strategy(material / "model"), steps=-1, max_epochs=2).fit(module, data)
    return losses


@pytest.mark.parametrize("limit", [20, 22])
def test_the_tail_of_an_epoch_trains_on_no_fillers(material: Path, limit: int) -> None:
    """Steps of 6 records; the last has 2, of which 3 ranks get none or one each, or 4. fp32, four steps of rounding."""
    one, three = (run_ranks(ranks, epochs, material, limit, 6 // ranks, "tokens")[0] for ranks in (1, 3))
    assert len(one) == 8
    assert three == pytest.approx(one, rel=2e-5)
    batches = run_ranks(3, epochs, material, limit, 2, "batches")
    # of 2 records the ranks with one each have the mean of all; each weighs the same, however long
    assert all(loss == pytest.approx(expected, rel=0.1) for loss, expected in zip(batches[0], one, strict=True))


# -- Lightning's own strategies ---------------------------------------------------------------------------------------


def descend_whole(pretrained: Path, split: Split, options: dict[str, Any]) -> tuple[Any, ...]:
    """As `descend`, for two steps, every parameter trained, under a strategy of Lightning."""
    module = Descent(pretrained, options.pop("rate", 0.0), "tokens")
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=len(split),
        strategy="ddp" if len(split) > 1 else "auto",
        max_steps=options.pop("steps", 2),
        accumulate_grad_batches=len(split[0]),
        use_distributed_sampler=False,
        **quiet,
        **options,
    )
    trainer.fit(module, loader_of([split, split], trainer.global_rank))
    before = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32).state_dict()
    return module.steps, before, {name: w.detach() for name, w in module.model.named_parameters()}


@pytest.mark.parametrize("name", ["one by one", "two ranks", "two ranks, uneven batches", "an empty batch first"])
def test_strategies_of_lightning(llama: Path, name: str) -> None:
    """A single device and DDP, fp32; `FP32` has the bound."""
    split = SPLITS[name]
    steps, state, _ = run_ranks(len(split), descend_whole, llama, split, {})[0]
    expected, loss = mean_over_tokens(reference(llama, state), ONE_BATCH[0][0])
    assert len(steps) == 2
    for gradients, train_loss in steps:
        assert distance(gradients, expected) < FP32
        assert train_loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("split", [ONE_BY_ONE, UNEVEN], ids=str)
def test_clipping_under_strategies_of_lightning(llama: Path, split: Split) -> None:
    """As `test_clipping_sees_the_mean`; the norm was larger, as all weights are trained."""
    options = {"rate": 1.0, "steps": 1, "gradient_clip_val": 0.05}
    _, before, after = run_ranks(len(split), descend_whole, llama, split, options)[0]
    expected, _ = mean_over_tokens(reference(llama, before), ONE_BATCH[0][0])
    check_clipped(before, after, expected, 0.05)
