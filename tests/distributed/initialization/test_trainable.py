"""How a filled model is prepared: the inputs that require gradients, and what a model may do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.ranks import run_ranks
from helpers.training import CausalLM, loader, make_strategy, make_trainer


class InPlace(CausalLM):
    """Scales its embeddings where they lie, as CTRL does."""

    def on_train_start(self) -> None:
        self.model.get_input_embeddings().register_forward_hook(lambda *called: called[-1].mul_(2.0))


class Apart(CausalLM):
    """Computes the same in new memory."""

    def on_train_start(self) -> None:
        self.model.get_input_embeddings().register_forward_hook(lambda *called: called[-1] * 2.0)


def losses(pretrained: Path, kind: type[CausalLM], options: dict[str, Any]) -> list[float]:
    module, trainer = kind(pretrained), make_trainer(make_strategy(pretrained, **options))
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size))
    return module.losses


@pytest.mark.parametrize(
    "options",
    [{"gradient_checkpointing": False}, {"gradient_checkpointing": True}, {"use_reentrant": True}],
    ids=str,
)
def test_embeddings_can_be_changed_in_place(llama: Path, options: dict[str, Any]) -> None:
    expected = run_ranks(1, losses, llama, Apart, options)[0]
    assert run_ranks(2, losses, llama, InPlace, options)[0] == pytest.approx(expected, rel=1e-5)
    assert expected[-1] != pytest.approx(expected[0], rel=1e-3)
