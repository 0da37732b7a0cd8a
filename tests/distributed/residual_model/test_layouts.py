"""Residual models of every kind of weight and method: read back they are the model that was decomposed in place.

Stock transformers + peft load those that they have a layout for; the others are refused there by the name of the file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.checkpoints import load_lora
from helpers.covering import covering
from helpers.faults import kill_after_commits
from helpers.models import save_checkpoint
from helpers.ranks import run_ranks, run_ranks_catching
from helpers.staging import staging_of
from helpers.training import CausalLM, loader, make_strategy, make_trainer, tokens
from lowrank_dist import FP4, FP8, INT8, MXFP4, NF4, SVFT, LoRA, LoRAXS, PiSSA, PiSSAStrategy
from lowrank_dist.decomposition.schedule import Sharding
from lowrank_dist.decomposition.walk import Walk
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.model.plan import open_plan
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.residual_model.create import decompose
from lowrank_dist.storage.inspect import inspect
from lowrank_dist.storage.reader import CheckpointReader

FP32 = torch.float32


@dataclass(frozen=True)
class Case:
    """A model and what of it is adapted, and whether stock transformers has a layout for it in 4 bits."""

    architecture: str
    adapter: dict[str, Any]
    stock_in_4_bits: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    init: Any = field(default_factory=PiSSA)


def experts(prefix: str) -> dict[str, Any]:
    return {
        "target_modules": ["q_proj"],
        "target_parameters": [f"{prefix}.experts.gate_up_proj", f"{prefix}.experts.down_proj"],
        "rank_pattern": {r".*\.down_proj": 3},
    }


CASES = {
    "mixtral": Case("mixtral", experts("mlp")),  # one by one in the file, w1 and w3 apart
    "mixtral fused": Case("mixtral", experts("mlp"), model={"save_original_format": False}),
    "gpt_oss": Case("gpt_oss", experts("mlp")),  # [in, out]
    "parameter": Case("llama", {"target_modules": ["q_proj"], "target_parameters": ["up_proj.weight"]}),
    "conv1d": Case("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"]}),
    "embedding": Case("llama", {"target_modules": ["v_proj", "embed_tokens"]}),
    "linear": Case("llama", {"target_modules": "all-linear"}, stock_in_4_bits=True),
    "lora_xs": Case("llama", {"target_modules": "all-linear"}, stock_in_4_bits=True, init=LoRAXS(core_std=0.1)),
    "svft": Case("llama", {"target_modules": "all-linear"}, stock_in_4_bits=True, init=SVFT()),
}


def adapter_of(case: Case) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **case.adapter})


def write(base: Path, output: Path, case: Case, residual: Any, ranks_per_matrix: int | None = None) -> int:
    """Decompose; the bytes that this rank has read."""
    reader, config = CheckpointReader(base), adapter_of(case)
    plan = open_plan(reader, config).plan
    walk = Walk(reader, ShardGroup(), init=case.init, residual=residual or Dense(dtype=FP32), factor_dtype=FP32)
    sharding = Sharding(ranks_per_matrix=ranks_per_matrix)
    decompose(plan, walk, output, adapter=config, base=str(base), sharding=sharding)
    return reader.bytes_read


class Seeing(CausalLM):
    """Keeps the logits of the last validation batch."""

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.logits = self.model(input_ids=batch[0], use_cache=False).logits


def step_0(config: Path, strategy: PiSSAStrategy) -> Tensor:
    module = Seeing(config)
    make_trainer(strategy).validate(module, loader(0, 1, 1), verbose=False)
    return module.logits


def in_place(base: Path, case: Case, residual: Any, **options: Any) -> Tensor:
    # what the cost model measures may differ from run to run, and with it how sums are rounded
    options |= {"adapter": adapter_of(case), "init": case.init, "quantization": residual, "ranks_per_matrix": 1}
    return step_0(base, make_strategy(base, **options))


def all_ways(base: Path, output: Path, case: Case, residual: Any) -> dict[str, Any]:
    """Logits at step 0: decomposed in place, from a directory, from a cache that is written, from one that is there."""
    read = write(base, output, case, residual)
    expected = in_place(base, case, residual)
    written = in_place(base, case, residual, init_cache=output.parent / "cache")
    (entry,) = (output.parent / "cache").iterdir()
    before = (entry / "lowrank_dist.json").stat().st_mtime_ns
    found = in_place(base, case, residual, init_cache=output.parent / "cache")
    assert (entry / "lowrank_dist.json").stat().st_mtime_ns == before
    return {"read": read, "expected": expected, "written": written, "found": found}


def from_directory(directory: Path) -> Tensor:
    return step_0(directory, PiSSAStrategy(directory, show_progress=False))


@covering(1, {"name": CASES, "residual": [None, NF4(double_quant=True)]}, ids=str)
def test_step_0_is_that_of_decomposing_in_place(tmp_path: Path, name: str, residual: Any) -> None:
    """By the same ranks bit for bit, by others to the rounding of sums. Stock transformers + peft compute the same in
    fp32 where they load it, else refuse.
    """
    case = CASES[name]
    base, output = save_checkpoint(tmp_path / "base", case.architecture, **case.model), tmp_path / "out"
    results = run_ranks(2, all_ways, base, output, case, residual)
    assert sum(result["read"] for result in results) == CheckpointReader(base).nbytes
    expected = results[0]["expected"]
    for result in results:
        assert torch.equal(result["written"], expected)
        assert torch.equal(result["found"], expected)
    torch.testing.assert_close(run_ranks(3, from_directory, output)[0], expected, rtol=1e-4, atol=1e-4)
    described = inspect(output)
    assert not described.problems
    assert described.facts["residual"] == ("dense" if residual is None else str(residual))
    if residual is None or case.stock_in_4_bits:
        (initial,) = output.glob("*_init")
        with torch.no_grad():
            stock = load_lora(output, initial)(input_ids=tokens(1)[0]).logits
        torch.testing.assert_close(stock, expected, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            AutoModelForCausalLM.from_pretrained(output)


def write_all(base: Path, output: Path, case: Case, formats: list[Any]) -> None:
    for residual in formats:
        write(base, output / str(residual), case, residual, 1)


@pytest.mark.parametrize("name", [pytest.param("mixtral", marks=pytest.mark.matrix), "linear"])
def test_formats_are_read_back_on_other_ranks(tmp_path: Path, name: str) -> None:
    """The files have the same bytes on 1, 2 and 3 ranks. Stock transformers loads FP4, which bitsandbytes knows."""
    case, formats = CASES[name], [FP4(double_quant=True), INT8(), FP8(block_size=64), MXFP4()]
    base = save_checkpoint(tmp_path / "base", case.architecture)
    zero = replace(case, init=LoRA())
    for ranks in (1, 2, 3):
        run_ranks(ranks, write_all, base, tmp_path / str(ranks), zero, formats)
    for residual in formats:
        one, two, three = (tmp_path / str(ranks) / str(residual) for ranks in (1, 2, 3))
        stock = isinstance(residual, FP4) and name == "linear"
        file = "{}.safetensors".format("model" if stock else "residual")
        if isinstance(residual, FP4):  # the JSON holds a mean, which is summed exactly
            assert load_file(one / file).keys() == load_file(two / file).keys()
        assert (one / file).read_bytes() == (two / file).read_bytes() == (three / file).read_bytes()
        described = inspect(two)
        assert not described.problems
        assert described.facts["residual"] == str(residual)
        expected = run_ranks(2, in_place, base, zero, residual)[0]
        found = run_ranks(3, from_directory, two)[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        if stock:
            with torch.no_grad():
                logits = load_lora(two, two / "lora_init")(input_ids=tokens(1)[0]).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        else:
            with pytest.raises(OSError, match=r"no file named model\.safetensors"):
                AutoModelForCausalLM.from_pretrained(two)


@pytest.mark.parametrize("residual", [None, NF4()], ids=str)
def test_who_shares_a_matrix_does_not_matter(tmp_path: Path, residual: Any) -> None:
    """Experts by one rank each or by all: the same model, to the rounding of sums over ranks."""
    base = save_checkpoint(tmp_path / "base", "mixtral")
    for ranks in (1, 3):
        run_ranks(3, write, base, tmp_path / str(ranks), CASES["mixtral"], residual, ranks)
    for path in ("pissa_init/adapter_model.safetensors", "{}.safetensors".format("residual" if residual else "model")):
        one, other = (load_file(tmp_path / ranks / path) for ranks in ("1", "3"))
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5)


def test_lora_xs_keeps_what_is_trained_apart(llama: Path, tmp_path: Path) -> None:
    """The adapter is A and B R; B, which R was folded into, lies beside it. A checkpoint of a run that began there and
    one that began from the original are the same.
    """
    case = CASES["lora_xs"]
    run_ranks(1, write, llama, tmp_path / "out", case, None)
    initial = tmp_path / "out" / "loraxs_init"
    folded, frozen = load_file(initial / "adapter_model.safetensors"), load_file(initial / "frozen_factors.safetensors")
    assert frozen.keys() == {name for name in folded if "lora_B" in name}
    for name, b in frozen.items():
        r = torch.linalg.lstsq(b.double(), folded[name].double()).solution
        torch.testing.assert_close(b.double() @ r, folded[name].double(), rtol=0, atol=1e-6)
        assert 0.02 < float(r.std()) < 0.3
    losses = run_ranks(2, cores_trained, llama, tmp_path / "out", case)[0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][-1] != pytest.approx(losses[0][0], rel=1e-4)


def test_an_svft_goes_on_from_its_residual_model(llama: Path, tmp_path: Path) -> None:
    """The manifest holds the pattern; B lies beside the adapter, whose B M is zero."""
    case = CASES["svft"]
    run_ranks(1, write, llama, tmp_path / "out", case, None)
    folded = load_file(tmp_path / "out" / "svft_init" / "adapter_model.safetensors")
    assert all(float(tensor.abs().max()) == 0 for name, tensor in folded.items() if "lora_B" in name)
    losses = run_ranks(2, cores_trained, llama, tmp_path / "out", case)[0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][-1] != pytest.approx(losses[0][0], rel=1e-4)


def cores_trained(base: Path, output: Path, case: Case) -> list[list[float]]:
    """Losses of a run from the original and of one from the residual model; only cores are trained."""
    losses = []
    options = {"adapter": adapter_of(case), "init": case.init, "quantization": None}
    for pretrained, given in ((base, options), (output, dict.fromkeys(options))):
        module, strategy = CausalLM(pretrained), make_strategy(pretrained, **given)
        trainer = make_trainer(strategy, steps=3)
        trainer.fit(module, loader(trainer.global_rank, trainer.world_size, 3))
        shape = (4, 4) if isinstance(case.init, LoRAXS) else (4,)
        assert {tuple(p.ds_shape) for p in module.parameters() if p.requires_grad} == {shape}
        losses.append(module.losses)
    return losses


def write_until(base: Path, output: Path, case: Case, commits: int) -> None:
    """Write, and die of `kill_after_commits`."""
    kill_after_commits(commits)
    write(base, output, case, NF4(), 2)


def test_stacks_are_journalled_whole(tmp_path: Path) -> None:
    """Killed within a stack of experts, or with one of its lines lost: a rerun decomposes that stack again, no other,
    and gives the undisturbed bytes.
    """
    case, base, output = CASES["mixtral"], save_checkpoint(tmp_path / "base", "mixtral"), tmp_path / "out"
    run_ranks(2, write, base, tmp_path / "whole", case, NF4(), 2)
    run_ranks_catching(2, write_until, base, output, case, 7)
    journal = staging_of(output) / "journal.jsonl"
    head, *lines = journal.read_text().splitlines(keepends=True)
    names = [json.loads(line)["name"] for line in lines]
    stacks = {name.partition("[")[0] for name in names if "[" in name}
    assert stacks
    assert all(f"{stack}[{expert}]" in names for stack in stacks for expert in range(4))
    lost = next(line for line in lines if "[2]" in line)
    journal.write_text("".join([head, *(line for line in lines if line is not lost)]))
    again = json.loads(lost)["name"].partition("[")[0]
    done = sum(entry["nbytes"] for entry in map(json.loads, lines) if entry["name"].partition("[")[0] != again)
    assert sum(run_ranks(2, write, base, output, case, NF4(), 2)) == CheckpointReader(base).nbytes - done
    for path in (tmp_path / "whole").rglob("*.safetensors"):
        assert (output / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


def test_a_dense_residual_keeps_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    """Experts one by one stay so; what is not adapted is the same."""
    base = save_checkpoint(tmp_path / "base", "mixtral")
    run_ranks(1, write, base, tmp_path / "out", CASES["mixtral"], None)
    source, found = CheckpointReader(base), CheckpointReader(tmp_path / "out")
    assert {name: source.info(name) for name in source} == {name: found.info(name) for name in found}
    assert any(name.endswith("experts.3.w1.weight") for name in found)
