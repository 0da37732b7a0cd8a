"""Vocabularies that were resized in ``configure_model``."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.models import save_checkpoint
from helpers.ranks import run_ranks
from helpers.training import CausalLM, loader, make_strategy, make_trainer
from lowrank_dist.zero3.partition import gathered


class Resized(CausalLM):
    rows = 263

    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            self.model.resize_token_embeddings(self.rows, mean_resizing=False)


def train(pretrained: Path, rows: int, saved: list[str] | None) -> tuple[list[Tensor], list[float], list[str]]:
    lines: list[str] = []
    with patch("lowrank_dist.training.model_strategy.rank_zero_info", lines.append):
        return *fit(pretrained, rows, saved), lines


def fit(pretrained: Path, rows: int, saved: list[str] | None) -> tuple[list[Tensor], list[float]]:
    module, tables = Resized(pretrained), []
    module.rows = rows
    adapter = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved)
    trainer = make_trainer(make_strategy(pretrained, adapter=adapter, quantization=None), steps=1)
    trainer.validate(module, loader(0, 1, 1), verbose=False)
    for layer in (module.model.get_input_embeddings(), module.model.get_output_embeddings()):
        (parameter,) = (p for n, p in layer.named_parameters() if "original_module" not in n)
        with gathered([parameter]):
            tables.append(parameter.detach().clone())
    module = Resized(pretrained)
    module.rows = rows
    trainer = make_trainer(make_strategy(pretrained, adapter=adapter, quantization=None), steps=1)
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size, 1))
    return tables, module.losses


@pytest.mark.parametrize(
    ("rows", "saved", "tied"),
    [(263, None, False), (263, ["embed_tokens", "lm_head"], False), (263, None, True)],
)
def test_new_rows_start_at_the_mean(tmp_path: Path, rows: int, saved: list[str] | None, tied: bool) -> None:
    base = save_checkpoint(tmp_path, "llama", tie_word_embeddings=tied)
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    stored = [layer.weight.detach() for layer in (stock.get_input_embeddings(), stock.get_output_embeddings())]
    for tables, losses, lines in run_ranks(2, train, base, rows, saved):
        end = "frozen; name the layer in modules_to_save to train them" if saved is None else "trained"
        said = f"{rows - 256} rows beyond the 256 stored ones start at their mean and are {end}"
        assert f"model.embed_tokens.weight: {said}" in lines
        for table, old in zip(tables, stored, strict=True):
            assert table.shape == (rows, 64)
            assert torch.equal(table[:256], old)
            torch.testing.assert_close(table[256:], old.mean(0).expand(rows - 256, -1), rtol=1e-5, atol=1e-7)
        assert len(losses) == 1
