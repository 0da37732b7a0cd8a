"""Every tuner of PEFT on the frozen, sharded base, against stock PEFT on the same decoded weights in one process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.tuner_table import DOCUMENT
from helpers.tuners import CASES, logits, reloaded, train_stock, train_tuned
from lowrank_dist import NF4
from lowrank_dist.errors import ModelError
from lowrank_dist.tuners.tuner import Tuner, TunerPlan

# PEFT warns of what tuners cannot be merged, of tied weights, and of extensions that it builds on CUDA
pytestmark = pytest.mark.filterwarnings("ignore")

#: Steps on the first ranks, then steps of the resumed run on others.
BEFORE, AFTER = 3, 2
#: What these compute depends on the samples that a rank's batch holds, or on random numbers of every forward.
DEPEND_ON_RANKS = {"lily": 3e-3, "lora+velora": 1e-3, "poly": 1e-3, "pvera": 3e-3}


def train(pretrained: Path, name: str, options: dict[str, Any]) -> list[float]:
    return train_tuned(pretrained, name, **options)


def check(pretrained: Path, directory: Path, name: str, first: int, then: int, quantization: NF4 | None) -> None:
    """`first` ranks train and save, `then` ranks resume: losses and the adapter in between are stock PEFT's."""
    tolerance = DEPEND_ON_RANKS.get(name, 1e-5)
    options: dict[str, Any] = {"quantization": quantization}
    save = directory / "step-3"
    losses = run_ranks(first, train, pretrained, name, {**options, "steps": BEFORE, "save": save})[0]
    losses += run_ranks(then, train, pretrained, name, {**options, "steps": BEFORE + AFTER, "resume": save})[0]
    expected, _ = train_stock(pretrained, name, quantization, BEFORE + AFTER)
    assert losses == pytest.approx(expected, rel=tolerance)
    _, stock = train_stock(pretrained, name, quantization, BEFORE)
    here, there = logits(reloaded(pretrained, name, quantization, save / "adapter"), name), logits(stock, name)
    torch.testing.assert_close(here, there, rtol=0, atol=10 * tolerance * float(there.abs().max()))


@pytest.mark.table
@pytest.mark.parametrize("name", CASES)
def test_trains_resumes_and_reloads_as_stock_peft(llama: Path, tmp_path: Path, name: str) -> None:
    """NF4, two ranks and then one; fp32, so that only the order of sums differs."""
    check(llama, tmp_path, name, 2, 1, NF4())


@pytest.mark.matrix
@pytest.mark.parametrize("ranks", [(1, 3), (3, 2)], ids=["1-3", "3-2"])
@pytest.mark.parametrize("quantization", [None, NF4(double_quant=True)], ids=["dense", "nf4"])
@pytest.mark.parametrize("name", CASES)
def test_on_other_ranks_and_formats(
    llama: Path, tmp_path: Path, name: str, quantization: NF4 | None, ranks: tuple[int, int]
) -> None:
    check(llama, tmp_path, name, *ranks, quantization)


#: PEFT's layer multiplies fp32 scores and bf16 values under autocast.
NOT_IN_MIXED = "adaption_prompt"


def in_bf16() -> Iterator[Any]:
    for name in CASES:
        yield pytest.param(name, "bf16-true")
        fails = [pytest.mark.xfail(reason="PEFT mixes dtypes")] if name == NOT_IN_MIXED else []
        yield pytest.param(name, "bf16-mixed", marks=fails)


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "precision"), list(in_bf16()))
def test_in_bf16(llama: Path, tmp_path: Path, name: str, precision: str) -> None:
    """Losses are those of stock PEFT in fp32 up to bf16's rounding; stock PEFT loads what is saved."""
    save = tmp_path / "save"
    options = {"quantization": NF4(), "steps": BEFORE, "save": save, "precision": precision}
    losses = run_ranks(2, train, llama, name, options)[0]
    expected, _ = train_stock(llama, name, NF4(), BEFORE)
    assert losses == pytest.approx(expected, rel=1e-2)
    assert logits(reloaded(llama, name, NF4(), save / "adapter"), name).isfinite().all()


def unplanned(pretrained: Path, first: tuple[int, ...] | None) -> str:
    """What is said of a tuner whose first parameter is planned with another shape, or not at all."""
    plan = Tuner.plan

    def on_meta(self: Tuner, skeleton: Any) -> TunerPlan:
        found = plan(self, skeleton)
        name, *_ = found.trained
        trained = {**found.trained, name: first}
        return replace(found, trained={name: shape for name, shape in trained.items() if shape is not None})

    with patch.object(Tuner, "plan", on_meta), pytest.raises(ModelError) as caught:
        train_tuned(pretrained, "ia3", quantization=NF4(), steps=1)
    return str(caught.value)


def test_what_was_not_planned_is_not_trained(llama: Path) -> None:
    for said in run_ranks(2, unplanned, llama, None):
        assert re.match(r"adapter is a IA3 of PEFT, which trains .*ia3_l.* only where weights have values: ", said)
    for said in run_ranks(2, unplanned, llama, (3,)):
        assert re.search(r"ia3_l.* is \[.*\] for these weights and \[3\] without values: ", said)


def test_the_documents_have_a_row_for_each() -> None:
    rows = [line.split("|")[1].strip() for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    assert not set(CASES) - set(rows), "run `make test-matrix`"
