"""``PiSSAStrategy(compile_layers=...)``: compiled decoder layers under gathers, checkpointing and reductions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.models import save_checkpoint
from helpers.ranks import alone, run_ranks
from helpers.training import CausalLM, loader, make_strategy, make_trainer
from lowrank_dist import NF4
from lowrank_dist.quantization import nf4

STEPS, LAYERS, MATRICES = 4, 3, 7


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(
        tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=LAYERS, tie_word_embeddings=False
    )


@alone
def fit(
    pretrained: Path, precision: str, options: dict[str, Any]
) -> tuple[list[float], list[tuple[int, int, int]], bool]:
    """Losses; by the end of each step, what was compiled, graph breaks and decoded matrices; whether inductor ran."""
    counters, found, decoded = torch._dynamo.utils.counters, [], []
    plain = nf4.NF4.decode_with_bitsandbytes

    def decode(*args: Any) -> torch.Tensor:
        decoded.append(1)
        return plain(*args)

    nf4.NF4.decode_with_bitsandbytes = decode  # type: ignore[method-assign]

    class Counting(CausalLM):
        def on_train_batch_end(self, *_: Any) -> None:
            breaks = sum(counters["graph_break"].values())
            found.append((counters["frames"]["total"], breaks, len(decoded)))
            decoded.clear()

    trainer = make_trainer(make_strategy(pretrained, **options), precision=precision, steps=STEPS)
    module = Counting(pretrained)
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size, STEPS))
    return module.losses, found, bool(counters["inductor"])


@pytest.mark.parametrize(
    ("world_size", "precision", "options"),
    [
        (1, "32-true", {}),
        (2, "32-true", {"quantization": NF4(double_quant=True), "live_layers": 0}),
        (2, "32-true", {"use_reentrant": True, "shard_within": "rank"}),
        (2, "bf16-mixed", {"fold_adapters": "always"}),
    ],
    ids=str,
)
def test_losses_are_those_of_layers_as_they_are(
    llama: Path, world_size: int, precision: str, options: dict[str, Any]
) -> None:
    """To the bit, with a backend that runs the operators of the graph one by one.

    One graph for all layers, nothing compiled after the first step, and two decodings a step of each matrix.
    """
    ((expected, *_), *_) = run_ranks(world_size, fit, llama, precision, options)
    ((losses, found, _), *_) = run_ranks(world_size, fit, llama, precision, options | {"compile_layers": "aot_eager"})
    assert losses == expected
    assert len(set(losses)) == STEPS
    assert found == [(1, 0, 2 * LAYERS * MATRICES)] * STEPS


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on CPUs")
def test_inductor(llama: Path) -> None:
    """It fuses operators, which may round differently."""
    ((expected, *_),) = run_ranks(1, fit, llama, "32-true", {})
    ((losses, found, ran),) = run_ranks(1, fit, llama, "32-true", {"compile_layers": "inductor"})
    assert losses == pytest.approx(expected, rel=1e-5)
    assert ran
    assert [compiled for compiled, _, _ in found] == [1] * STEPS


@pytest.mark.parametrize(
    ("options", "needs"),
    [({"gradient_checkpointing": False}, "gradient_checkpointing=True"), ({"fold_adapters": "measured"}, "'never'")],
)
def test_what_cannot_be_compiled_is_refused(options: dict[str, Any], needs: str) -> None:
    with pytest.raises(ValueError, match=f"compile_layers='inductor'.*{needs}"):
        make_strategy(Path("somewhere"), compile_layers="inductor", **options)
