"""Residual models of methods that look at data: keyed by the data, the same as in place, continued when killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from helpers.checkpoints import load_lora
from helpers.command import lowrank_dist
from helpers.faults import kill_after_commits
from helpers.ranks import alone, run_ranks, run_ranks_catching
from helpers.staging import staging_of
from helpers.training import BATCHES, ByStep, CausalLM, initial_factors, loader, make_strategy, make_trainer, tokens
from lowrank_dist import EVA, NF4, QERA, AdapterCheckpoint, Calibration, CorDA, LoRAGA, PiSSAStrategy
from lowrank_dist.calibration.measure import draw, step_name
from lowrank_dist.data.datamodule import SFTDataModule
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import InputError
from lowrank_dist.methods import Method
from lowrank_dist.model.names import peft_name
from lowrank_dist.training.module import CausalLMModule


def loss_of(backbone: Any, batch: list[Tensor]) -> Tensor:
    (ids,) = batch
    return backbone(input_ids=ids, labels=ids).loss


class Seeing(CausalLM):
    """Keeps the logits of the last validation batch, and those before the first step."""

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.logits = self.model(input_ids=batch[0], use_cache=False).logits


def strategy_of(pretrained: Path, init: Method, quantization: Any, **options: Any) -> PiSSAStrategy:
    """Its batches are given to it, this rank's part of two global ones, from `first` on."""
    rank, size, first = torch.distributed.get_rank(), torch.distributed.get_world_size(), options.pop("first", 0)
    data = loader(rank, size, BATCHES, first=first)
    calibration = Calibration(batches=2, step=loss_of, data=data, **options.pop("how", {}))
    return make_strategy(pretrained, init=init, quantization=quantization, calibration=calibration, **options)


def step_0(strategy: PiSSAStrategy) -> Tensor:
    module = Seeing(Path(strategy.pretrained))
    make_trainer(strategy).validate(module, loader(0, 1, 1), verbose=False)
    return module.logits


def all_ways(pretrained: Path, cache: Path, init: Method, quantization: Any) -> dict[str, Any]:
    """Logits at step 0 in place, with a cache that is written and one that is there; what the cache then holds."""
    expected = step_0(strategy_of(pretrained, init, quantization))
    written = step_0(strategy_of(pretrained, init, quantization, init_cache=cache))
    (entry,) = cache.iterdir()
    before = (entry / "lowrank_dist.json").stat().st_mtime_ns
    found = step_0(strategy_of(pretrained, init, quantization, init_cache=cache))
    assert (entry / "lowrank_dist.json").stat().st_mtime_ns == before
    return {"expected": expected, "written": written, "found": found}


def from_directory(directory: Path) -> Tensor:
    return step_0(PiSSAStrategy(directory, show_progress=False))


@pytest.mark.parametrize(
    ("init", "quantization", "world_size"),
    [
        (CorDA(), None, 2),
        (CorDA(corda_method="kpm"), NF4(double_quant=True), 1),
        (EVA(), NF4(), 3),
        (QERA(), NF4(), 2),
        (LoRAGA(), None, 1),
        (LoRAGA(), NF4(), 2),
    ],
    ids=str,
)
def test_step_0_is_that_of_decomposing_in_place(
    llama: Path, tmp_path: Path, init: Method, quantization: Any, world_size: int
) -> None:
    """Bit for bit by the same ranks; stock transformers + peft compute the same from the same files."""
    cache = tmp_path / "cache"
    for result in run_ranks(world_size, all_ways, llama, cache, init, quantization):
        assert torch.equal(result["written"], result["expected"])
        assert torch.equal(result["found"], result["expected"])
    (entry,) = cache.iterdir()
    torch.testing.assert_close(run_ranks(2, from_directory, entry)[0], result["expected"], rtol=1e-4, atol=1e-4)
    (initial,) = entry.glob("*_init")
    with torch.no_grad():
        stock = load_lora(entry, initial)(input_ids=tokens(1)[0]).logits
    torch.testing.assert_close(stock, result["expected"], rtol=1e-4, atol=1e-4)


def fill(pretrained: Path, cache: Path, calls: list[dict[str, Any]]) -> list[int]:
    """Entries of the cache after each of `calls`."""
    counts = []
    for options in calls:
        step_0(strategy_of(pretrained, EVA(), None, init_cache=cache, **options))
        counts.append(len(list(cache.iterdir())))
    return counts


def test_other_data_and_another_look_at_them_make_another_model(llama: Path, tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = [{}, {"first": 1}, {"how": {"positions": "all"}}, {"first": 1}, {"first": 8}]
    assert run_ranks(2, fill, llama, tmp_path / "cache", calls)[0] == [1, 2, 3, 3, 3]  # 8 steps: as from 0


def write_until(pretrained: Path, cache: Path, commits: int) -> None:
    """Write, and die of `kill_after_commits`."""
    kill_after_commits(commits)
    step_0(strategy_of(pretrained, CorDA(), NF4(), init_cache=cache))


@alone
def go_on(pretrained: Path, cache: Path) -> list[str]:
    """Names of the matrices that were decomposed."""
    import lowrank_dist.decomposition.walk as module

    run, seen = module.Walk.run, []

    def watched(walk: Any, batches: Any) -> Iterator[Any]:
        for matrix in run(walk, batches):
            if walk.init == CorDA():
                seen.append(matrix.planned.name)
            yield matrix

    module.Walk.run = watched
    step_0(strategy_of(pretrained, CorDA(), NF4(), init_cache=cache))
    return seen


def test_a_rerun_decomposes_only_what_the_journal_lacks(llama: Path, tmp_path: Path) -> None:
    """And ends in the undisturbed bytes."""
    everything = run_ranks(2, go_on, llama, tmp_path / "whole")[0]
    assert len(everything) == 14
    (whole,) = (tmp_path / "whole").iterdir()
    cache = tmp_path / "cache"
    run_ranks_catching(2, write_until, llama, cache, 5)
    journal = (staging_of(cache / whole.name) / "journal.jsonl").read_text().splitlines()
    done = [json.loads(line)["name"] for line in journal[1:]]
    assert len(done) == 5
    assert run_ranks(2, go_on, llama, cache)[0] == [name for name in everything if name not in done]
    for path in whole.rglob("*.safetensors"):
        assert (cache / whole.name / path.relative_to(whole)).read_bytes() == path.read_bytes()


def train(pretrained: Path, output: Path, steps: int, ckpt_path: Path | None) -> tuple[list[float], str]:
    strategy = make_strategy(
        pretrained, init=EVA(), calibration=Calibration(batches=2, step=loss_of), init_cache=output / "cache"
    )
    callback = AdapterCheckpoint(dirpath=output, filename="{step}", every_n_train_steps=2)
    trainer = make_trainer(strategy, steps=steps, callbacks=[callback], enable_checkpointing=True)
    module = ByStep(pretrained)
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size), ckpt_path=ckpt_path)
    manifest = json.loads((output / f"step={steps}" / "lowrank_dist.json").read_text())
    return module.losses, manifest["source"]


def test_a_run_is_resumed_from_the_cache_it_began_with(llama: Path, tmp_path: Path) -> None:
    """On another number of ranks, which would calibrate on other batches."""
    whole, source = run_ranks(2, train, llama, tmp_path / "a", 4, None)[0]
    run_ranks(2, train, llama, tmp_path / "b", 2, None)
    losses, again = run_ranks(3, train, llama, tmp_path / "b", 4, tmp_path / "b" / "step=2")[0]
    assert again == source
    assert losses == pytest.approx(whole[2:], rel=1e-4)
    assert len(list((tmp_path / "b" / "cache").iterdir())) == 1


# -- the command ------------------------------------------------------------------------------------------------------


def fit_with_the_same_data(material: Path, init: Method) -> dict[str, Tensor]:
    """A0 and B0 of a fit that looks at the first two batches of its own data module."""
    model = material / "model"
    data = SFTDataModule(str(model), str(material / "data.jsonl"), batch_size=2, max_length=48, seed=3)
    strategy = make_strategy(
        model,
        adapter=LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"),
        init=init,
        quantization=None,
        calibration=Calibration(batches=2),
    )
    trainer = make_trainer(strategy, steps=1)
    trainer.fit(CausalLMModule(str(model), lr=1e-4), data)
    return {peft_name(name): tensor for name, tensor in initial_factors(strategy).items()}


@pytest.mark.parametrize(
    ("method", "init", "devices"), [("lora-ga", LoRAGA(scale="unit"), 2), ("corda", CorDA(damping=0.1), 1)]
)
def test_the_command_looks_at_what_fit_would_begin_with(
    material: Path, tmp_path: Path, method: str, init: Method, devices: int
) -> None:
    """The same factors as a fit with as many ranks, bit for bit; a second call finds them."""
    options = ["--pretrained", material / "model", "--output", tmp_path / "out", "--method", method, "--rank", "4"]
    options += ["--init.scale", "unit"] if method == "lora-ga" else ["--init.damping", "0.1"]
    options += ["--calibration_data", material / "data.jsonl", "--calibration.batches", "2"]
    options += ["--data.batch_size", "2", "--data.max_length", "48", "--data.seed", "3"]
    ranks = devices if devices > 1 else None
    done = lowrank_dist("decompose", *options, ranks=ranks)
    assert done.returncode == 0, done.stderr
    (initial,) = (tmp_path / "out").glob("*_init")
    stored = load_file(initial / "adapter_model.safetensors")
    expected = run_ranks(devices, fit_with_the_same_data, material, init)[0]
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(stored[name], tensor), name
    before = (tmp_path / "out" / "lowrank_dist.json").stat().st_mtime_ns
    assert lowrank_dist("decompose", *options, ranks=ranks).returncode == 0
    assert (tmp_path / "out" / "lowrank_dist.json").stat().st_mtime_ns == before
    done = lowrank_dist("decompose", *options[:-1], "4", ranks=ranks)  # another order of the data
    assert done.returncode == 1
    assert "exists, and is not this model decomposed with these settings" in done.stderr


# -- the digest of batches --------------------------------------------------------------------------------------------


def digest(batches: Any, most: int = 8) -> str:
    return draw(batches, most, ShardGroup.single())[1]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text("ab", max_size=2) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2),
    max_leaves=4,
)


@given(one=VALUES, other=VALUES)
def test_equal_batches_have_equal_digests_and_others_have_not(one: Any, other: Any) -> None:
    assert (digest([one]) == digest([other])) == (repr(_sorted(one)) == repr(_sorted(other)))


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(entry) for entry in value] if isinstance(value, list) else value


def test_tensors_differ_in_value_shape_and_dtype() -> None:
    ids = torch.arange(6)
    different = [ids, ids.view(2, 3), ids.int(), ids.flip(0), ids.float(), ids.bfloat16(), torch.tensor(0)]
    batches = [[{"input_ids": tensor}] for tensor in different]
    assert len({digest(batch) for batch in batches}) == len(batches)
    assert digest(batches[0]) == digest([{"input_ids": ids.clone()}])
    assert digest([1, 2, 3], most=2) == digest([1, 2])
    with pytest.raises(InputError, match="a batch contains a ndarray, which cannot be hashed"):
        digest([np.zeros(2)])


def test_what_is_run_for_a_batch_has_a_name() -> None:
    assert step_name(None) == "lowrank_dist.calibration.measure.model_loss"
    assert step_name(loss_of).endswith("test_create_calibrated.loss_of")
