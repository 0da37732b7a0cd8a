"""Packed rows on sharded models: the loss of the examples padded, or a refusal on every rank before the first step."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from helpers.models import ARCHITECTURES, save_checkpoint
from helpers.ranks import run_ranks
from helpers.training import CausalLM, make_strategy, make_trainer
from lowrank_dist import CausalLMModule
from lowrank_dist.data.packing import Collator, TokenDataset
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import InputError
from lowrank_dist.training.packed_examples import PackedExamples

LFM2 = ARCHITECTURES["llama"] | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64, "block_multiple_of": 8}
LENGTHS = (9, 4, 12, 7, 3, 6, 11, 5)


class WithCache(CausalLM):
    """A user's module that passes batches on as they are."""

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return self.model(**batch).loss


def loader_of(rank: int, ranks: int, *, packed: bool) -> DataLoader:
    """This rank's examples in one batch, twice; all their tokens are labels, those that nothing precedes too."""
    generator = torch.Generator().manual_seed(5)
    tokens = [torch.randint(3, 256, (length,), generator=generator, dtype=torch.int32) for length in LENGTHS]
    mine = TokenDataset([torch.stack([ids, ids]) for ids in tokens[rank::ranks]], capacity=16 if packed else None)
    for index in range(len(mine)):
        assert packed == ("position_ids" in mine[index])
    return DataLoader([Collator(0)([mine[index] for index in range(len(mine))])] * 2, batch_size=None)


def train(pretrained: Path, kind: Any, options: dict[str, Any], *, packed: bool) -> list[float]:
    module = kind(str(pretrained))
    trainer = make_trainer(make_strategy(pretrained, **options), steps=2)
    losses: list[float] = []
    module.on_train_batch_end = lambda *_: losses.append(float(trainer.callback_metrics["train_loss"]))
    trainer.fit(module, loader_of(trainer.global_rank, trainer.world_size, packed=packed))
    return losses


def compare(pretrained: Path) -> tuple[list[float], list[float]]:
    kind = partial(CausalLMModule, lr=1e-2, warmup_ratio=0.0)
    return train(pretrained, kind, {}, packed=True), train(pretrained, kind, {}, packed=False)


def refusal(pretrained: Path, kind: Any, options: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        train(pretrained, kind, options, packed=True)
    return str(caught.value)


def refusals(cases: list[tuple[Path, Any, dict[str, Any]]]) -> list[str]:
    return [refusal(*case) for case in cases]


def asked(pretrained: list[Path], extra: list[dict[str, Any]]) -> tuple[str, str]:
    """What a rank with a model and arguments of its own is told: an error, a warning."""
    rank = torch.distributed.get_rank()
    model = AutoModelForCausalLM.from_pretrained(pretrained[rank])
    PackedExamples(model, ShardGroup())
    ids, positions = torch.arange(3, 27)[None], torch.cat([torch.arange(9), torch.arange(15)])[None]
    error = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model(input_ids=ids, position_ids=positions, use_cache=False, **extra[rank])
        except InputError as raised:
            error = str(raised)
    return error, " ".join(str(one.message) for one in caught if "it was not checked" in str(one.message))


def test_ranks_that_differ_do_not_wait_for_each_other(tmp_path):
    """In what they find, and in whether they can ask: one rank has a tensor that cannot be made for 16 tokens."""
    lfm2, llama = save_checkpoint(tmp_path / "lfm2", "lfm2", **LFM2), save_checkpoint(tmp_path / "llama")
    for error, _ in run_ranks(2, asked, [llama, lfm2], [{}, {}]):
        assert "packed examples see each other" in error
    found = run_ranks(2, asked, [llama, lfm2], [{}, {"cu_seq_lens_q": torch.tensor([0, 9, 24])}])
    assert [error for error, _ in found] == ["", ""]
    assert any("with cu_seq_lens_q: it was not checked" in warning for _, warning in found)


@pytest.mark.parametrize(("ranks", "kind"), [(1, "llama"), (2, "llama"), (2, "gpt_oss")])
def test_packed_and_padded_examples_have_the_same_losses(tmp_path, ranks, kind):
    """gpt-oss is given masks."""
    pretrained = save_checkpoint(tmp_path / "model", kind)
    for packed, padded in run_ranks(ranks, compare, pretrained):
        assert packed == pytest.approx(padded, rel=1e-5)
        assert packed[1] != packed[0]


def test_refused_on_every_rank(tmp_path):
    lfm2, llama = save_checkpoint(tmp_path / "lfm2", "lfm2", **LFM2), save_checkpoint(tmp_path / "llama")
    attention = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    virtual = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    cases = [
        (lfm2, CausalLMModule, {"adapter": attention}),
        (llama, WithCache, {"gradient_checkpointing": False}),
        (llama, CausalLMModule, {"adapter": virtual, "init": None}),
    ]
    for said in run_ranks(2, refusals, cases):
        assert "packed examples see each other in Lfm2ForCausalLM" in said[0]
        assert "pass use_cache=False" in said[1]
        assert "packed examples would attend to each other" in said[2]
