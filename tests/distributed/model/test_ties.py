"""Heads that are stored beside the embedding they are tied to, on ranks: as stock transformers loads the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from helpers.covering import covering
from helpers.models import save_checkpoint, stored, with_head
from helpers.ranks import run_ranks
from helpers.training import CausalLM, loader, make_strategy, make_trainer
from lowrank_dist import NF4, AdapterCheckpoint, PiSSA, merge_checkpoint
from lowrank_dist.decomposition.walk import Walk
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.model.plan import open_plan
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.residual_model.create import decompose
from lowrank_dist.storage.reader import CheckpointReader

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
HEADS = ("equal", "all rows differ", "the last row differs")
STEPS, CUT = 4, 2
FP32 = torch.float32


def base_with(head: str, llama: Path, tmp_path: Path) -> Path:
    """The tiny LLaMA, tied by its configuration, with `head` beside its embedding."""
    weight = stored(llama)[TABLE]
    if head == "all rows differ":
        weight = weight.flip(0)
    elif head == "the last row differs":  # of which rank 0 reads nothing
        weight[-1] *= -1
    return with_head(llama, tmp_path / "base", weight.contiguous())


class First(CausalLM):
    """Keeps the first batch of this rank, and its logits before the first step."""

    first: tuple[Tensor, Tensor] | None = None

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        if self.first is None:
            (ids,) = batch
            with torch.no_grad():
                self.first = ids, self.model(input_ids=ids, labels=ids, use_cache=False).logits.clone()
        return super().training_step(batch, index)


def train(
    pretrained: Path,
    targets: list[str],
    options: dict[str, Any],
    auto_class: Any = AutoModelForCausalLM,
    output: Path | None = None,
    resumed: bool = False,
) -> tuple[Any, list[float]]:
    """First batch and logits of this rank; losses of all steps. With a checkpoint at the cut, or resumed from there."""
    adapter = LoraConfig(r=4, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM")
    strategy = make_strategy(pretrained, **{"adapter": adapter, "quantization": None, **options})
    callbacks = []
    if output is not None:
        callbacks = [AdapterCheckpoint(dirpath=output, filename="{step}", every_n_train_steps=CUT, save_top_k=-1)]
    trainer = make_trainer(strategy, steps=STEPS, callbacks=callbacks, enable_checkpointing=bool(callbacks))
    module = First(pretrained, auto_class)
    first = CUT if resumed else 0
    batches = loader(trainer.global_rank, trainer.world_size, 2 * STEPS, first=first)
    trainer.fit(module, batches, ckpt_path=output / f"step={CUT}" if resumed and output is not None else None)
    return module.first, module.losses


def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids, **inputs).logits
    return found


def assert_close(found: Tensor, expected: Tensor) -> None:
    """fp32: only the order of sums differs."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@covering(1, {"head": HEADS, "world_size": [1, 2]})
def test_step_0_is_the_stock_model(head: str, world_size: int, llama: Path, tmp_path: Path) -> None:
    base = base_with(head, llama, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=FP32)
    assert (stock.lm_head.weight is stock.model.embed_tokens.weight) == (head == "equal")
    for (ids, found), _ in run_ranks(world_size, train, base, ["q_proj"], {}):
        assert_close(found, logits(stock, ids))
    if head != "equal":  # a target without `untie_embeddings`
        for (ids, found), _ in run_ranks(world_size, train, base, ["q_proj", "lm_head"], {}):
            assert_close(found, logits(stock, ids))


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_encoder_decoder_with_a_head_of_its_own(world_size: int, tmp_path: Path) -> None:
    """As T5 1.1 and Flan-T5."""
    small = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 1, "vocab_size": 256}
    changes = {
        "tie_word_embeddings": False,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
        "max_shard_size": "1GB",
        **small,
    }
    base = save_checkpoint(tmp_path / "base", "t5", auto_class=AutoModelForSeq2SeqLM, **changes)
    tensors = load_file(base / "model.safetensors")
    save_file(
        tensors | {HEAD: tensors["shared.weight"].flip(0).contiguous()},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    stock = AutoModelForSeq2SeqLM.from_pretrained(base, dtype=FP32)
    for targets in (["q"], ["q", "lm_head"]):
        for (ids, found), _ in run_ranks(world_size, train, base, targets, {}, AutoModelForSeq2SeqLM):
            assert_close(found, logits(stock, ids, labels=ids))


def write(pretrained: Path, output: Path, targets: list[str], residual: Any) -> None:
    reader, group = CheckpointReader(pretrained), ShardGroup()
    adapter = LoraConfig(r=4, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM")
    plan = open_plan(reader, adapter, group=group).plan
    walk = Walk(reader, group, init=PiSSA(), residual=residual, factor_dtype=FP32)
    decompose(plan, walk, output, adapter=adapter, base=str(pretrained))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@covering(1, {"head": HEADS, "world_size": [1, 2]})
def test_residual_models(head: str, world_size: int, llama: Path, tmp_path: Path) -> None:
    """Stock transformers and peft compute from it what they compute from the original, and so does the strategy."""
    base = base_with(head, llama, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=FP32)
    for number, targets in enumerate([["q_proj"]] if head == "equal" else [["q_proj"], ["q_proj", "lm_head"]]):
        output = tmp_path / str(number)
        run_ranks(world_size, write, base, output, targets, Dense(dtype=FP32))
        for (ids, found), _ in run_ranks(world_size, train, output, targets, {}):
            expected = logits(stock, ids)
            assert_close(found, expected)
            residual = AutoModelForCausalLM.from_pretrained(output, dtype=FP32)
            assert_close(logits(PeftModel.from_pretrained(residual, output / "pissa_init"), ids), expected)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=str)
def test_residual_models_in_4_bits(targets: list[str], tmp_path: Path) -> None:
    """The strategy computes from it what stock transformers and peft do, and what a walk of its own gives."""
    llama = save_checkpoint(tmp_path / "llama", tie_word_embeddings=True, hidden_size=128)
    base, output = base_with("all rows differ", llama, tmp_path), tmp_path / "out"
    run_ranks(2, write, base, output, targets, NF4())
    residual = AutoModelForCausalLM.from_pretrained(output, dtype=FP32)
    peft = PeftModel.from_pretrained(residual, output / "pissa_init")
    walked = run_ranks(2, train, base, targets, {"quantization": NF4()})
    read = run_ranks(2, train, output, targets, {"quantization": NF4()})
    for ((ids, expected), losses), ((_, found), same_losses) in zip(walked, read, strict=True):
        assert torch.equal(found, expected)
        assert same_losses == losses
        assert_close(logits(peft, ids), expected)


def test_both_in_4_bits(llama: Path, tmp_path: Path) -> None:
    """A head of twice the embedding has the same codes, and other scales."""
    base = with_head(llama, tmp_path / "base", 2 * stored(llama)[TABLE])
    targets = ["embed_tokens", "lm_head"]
    run_ranks(2, write, base, tmp_path / "out", targets, NF4())
    (walked, _), _ = run_ranks(2, train, base, targets, {"quantization": NF4()})
    (read, _), _ = run_ranks(2, train, tmp_path / "out", targets, {"quantization": NF4()})
    assert torch.equal(read[1], walked[1])


@pytest.mark.parametrize("options", [{}, {"init_cache": "cache"}], ids=["", "cache"])
def test_a_resumed_run_decides_the_same(llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """To fp32 rounding of sums over another number of ranks."""
    base, output, targets = base_with("all rows differ", llama, tmp_path), tmp_path / "out", ["q_proj", "lm_head"]
    options = {name: str(tmp_path / value) for name, value in options.items()} | {"quantization": NF4()}
    _, whole = run_ranks(2, train, base, targets, options, AutoModelForCausalLM, output)[0]
    _, rest = run_ranks(1, train, base, targets, options, AutoModelForCausalLM, output, True)[0]
    assert rest == pytest.approx(whole[CUT:], rel=1e-5)


def compare(pretrained: Path) -> tuple[int, bool]:
    """Bytes that this rank reads for a plan, and whether the head is tied."""
    reader = CheckpointReader(pretrained)
    backbone = open_plan(reader, None, group=ShardGroup()).backbone
    return reader.bytes_read, backbone.lm_head.weight is backbone.model.embed_tokens.weight


@covering(1, {"head": HEADS, "world_size": [1, 2, 3]})
def test_the_ranks_share_the_comparison(head: str, world_size: int, llama: Path, tmp_path: Path) -> None:
    """Every byte of the two once, whatever the number of ranks; all ranks decide the same."""
    read, tied = zip(*run_ranks(world_size, compare, base_with(head, llama, tmp_path)), strict=True)
    assert sum(read) == 2 * 256 * 64 * 4
    assert set(tied) == {head == "equal"}


def compare_on_a_bad_disk(pretrained: Path) -> str:
    """The error of this rank where rank 1 cannot read."""

    class Reader(CheckpointReader):
        def flat(self, name: str, start: int, stop: int) -> Tensor:
            if group.rank == 1:
                raise OSError(5, "Input/output error")
            return super().flat(name, start, stop)

    group = ShardGroup()
    try:
        open_plan(Reader(pretrained), None, group=group)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def test_an_error_of_one_rank_is_raised_on_all(llama: Path, tmp_path: Path) -> None:
    errors = run_ranks(2, compare_on_a_bad_disk, base_with("equal", llama, tmp_path))
    assert all("Input/output error" in error for error in errors)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_the_merged_model(llama: Path, tmp_path: Path) -> None:
    """Stock transformers load it as the base and the adapter together."""
    base, output = base_with("all rows differ", llama, tmp_path), tmp_path / "out"
    ids, _ = run_ranks(2, train, base, ["q_proj", "lm_head"], {}, AutoModelForCausalLM, output)[0][0]
    merge_checkpoint(output / f"step={CUT}", tmp_path / "merged")
    converted = output / f"step={CUT}" / "lora"
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=FP32), converted)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=FP32)
    assert_close(logits(merged, ids), logits(adapted, ids))
