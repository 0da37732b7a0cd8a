"""Streamed data under ZeRO-3: ranks have shares of their own, and each goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.ranks import run_ranks
from helpers.sft import save_material, write_jsonl
from helpers.training import make_strategy, make_trainer
from lowrank_dist import CausalLMModule, InputError, SFTDataModule

RECORDS = [{"prompt": f"hello {index:02}", "completion": " world" * (1 + index % 5)} for index in range(37)]


class Recorded(CausalLMModule):
    """Notes the batches and the losses."""

    seen: list[tuple[list[list[int]], float]]

    def training_step(self, batch: Any, index: int) -> Any:
        loss = super().training_step(batch, index)
        self.seen.append((batch["input_ids"].tolist(), float(loss.detach())))
        return loss


def fit(material: Path, steps: int, *, resume: Path | None = None, save: Path | None = None, **options: Any) -> Any:
    model = str(material / "model")
    data = SFTDataModule(
        model,
        **{"train": str(material / "data.jsonl"), "max_length": 64, "packing": True, "shuffle_buffer": 5, **options},
        streaming=True,
    )
    module = Recorded(model, lr=1e-2, scheduler="constant", warmup_ratio=0.0)
    module.seen = []
    trainer = make_trainer(make_strategy(model), steps=steps, accumulate_grad_batches=2)
    trainer.fit(module, data, ckpt_path=resume, weights_only=False)
    if save is not None:
        trainer.save_checkpoint(save)
    return module.seen


def runs(material: Path, tmp: Path) -> dict[str, Any]:
    whole = fit(material, 7)
    fit(material, 3, save=tmp / "three")
    found = {"whole": whole, "rest": fit(material, 7, resume=tmp / "three")}
    # one record for two ranks: none waits for the other
    found["one record"] = fit(material, 2, train=str(material / "one.jsonl"), packing=False)
    with pytest.raises(InputError, match="streaming=True with max_steps=-1"):
        fit(material, -1)
    return found


def resumed(material: Path, tmp: Path) -> None:
    with pytest.raises(InputError, match="streamed its data on 2 ranks, and this one has 1: .* same number of ranks"):
        fit(material, 7, resume=tmp / "three")


def test_ranks_go_on_where_they_were(tmp_path: Path) -> None:
    material = save_material(tmp_path / "material", RECORDS)
    write_jsonl(material / "one.jsonl", RECORDS[:1])
    one, two = run_ranks(2, runs, material, tmp_path)
    for found in (one, two):
        assert len(found["whole"]) == 14
        assert found["rest"] == found["whole"][6:]
        assert len({str(batch) for batch, _ in found["one record"]}) == 1
    assert one["whole"][0] != two["whole"][0]
    run_ranks(1, resumed, material, tmp_path)
