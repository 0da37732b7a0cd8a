"""A batch with images on one rank, and only text on the other."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import DataLoader
from transformers import AutoConfig

from helpers.families import FAMILIES
from helpers.family_runs import FamilyModule, adapter_of, share
from helpers.ranks import run_ranks_catching
from helpers.training import make_strategy, make_trainer


def train(pretrained: Path, images_on: tuple[int, ...]) -> list[float]:
    import torch

    family, rank = FAMILIES["qwen3_vl"], torch.distributed.get_rank()
    batch = share(family.batches(AutoConfig.from_pretrained(pretrained), 1)[0], rank, 2)
    if rank not in images_on:
        ids = batch["input_ids"][:, 5:]
        batch = {"input_ids": ids, "labels": ids} | ({"attention_mask": torch.ones_like(ids)} if rank else {})
    module = FamilyModule(pretrained, family.auto_class)
    strategy = make_strategy(pretrained, adapter=adapter_of(family), quantization=None)
    make_trainer(strategy, steps=1).fit(module, DataLoader([batch], batch_size=None))
    return module.losses


def test_ranks_that_differ_are_refused_by_name_and_others_train(tmp_path: Path) -> None:
    base = FAMILIES["qwen3_vl"].save(tmp_path)
    for _, error in run_ranks_catching(2, train, base, (1,)):
        assert (
            "the batch of rank 1 has image_grid_thw, mm_token_type_ids, pixel_values, that of rank 0 has not" in error
        )
    for losses, error in run_ranks_catching(2, train, base, ()):  # text on both: the towers are not used
        assert error is None, error
        assert len(losses) == 1
