"""``shard_within``: within nodes, and on every rank alone, the same training; fewer bytes are communicated."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig

from helpers.models import save_checkpoint
from helpers.ranks import alone, run_ranks, run_ranks_catching
from helpers.sft import save_material
from helpers.traffic import Traffic
from helpers.training import STEPS, CausalLM, loader, make_strategy, make_trainer
from lowrank_dist import (
    NF4,
    AdapterCheckpoint,
    CausalLMModule,
    CorDA,
    LoRA,
    LoRAXS,
    PiSSA,
    PiSSAStrategy,
    PreferenceModule,
    SFTDataModule,
)
from lowrank_dist.forecast import ModelShapes, RunSpec, forecast
from lowrank_dist.forecast.job import parameters
from lowrank_dist.forecast.traffic import traffic
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.training.sharding import run_spec
from lowrank_dist.zero3.partition import local_shard

NODES, CUT = 2, 3
LINEARS: dict[str, Any] = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear"}
EXPERTS: dict[str, Any] = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]} | {
    "target_parameters": ["mlp.experts.down_proj"]
}


def on_nodes(mixed: bool = False) -> dict[str, Any]:
    """Tell this rank that it is on one of two nodes, their ranks in turn with `mixed`; options of the Trainer."""
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    each = ranks // NODES
    node, number = (rank % NODES, rank // NODES) if mixed else (rank // each, rank % each)
    os.environ.update(LOCAL_RANK=str(number), LOCAL_WORLD_SIZE=str(each), GROUP_RANK=str(node))
    return {"num_nodes": NODES, "devices": each}


@alone
def train(pretrained: Path, within: str, adapter: dict[str, Any], options: dict[str, Any]) -> Any:
    """Losses, bytes of frozen parameters held, bytes that all ranks read, collectives of the third step."""
    calls, module, begun = Traffic(), CausalLM(pretrained), []
    strategy = make_strategy(
        pretrained, adapter=LoraConfig(**adapter), shard_within=within, live_layers=0, ranks_per_matrix=1, **options
    )
    trainer = make_trainer(strategy, **on_nodes())
    module.on_train_batch_start = lambda *_: begun.append(len(calls.calls))
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size))
    frozen = [local_shard(p) for p in module.model.parameters() if not p.requires_grad]
    held = sum(shard.numel() * shard.element_size() for shard in frozen)
    return module.losses, held, strategy.init_report.bytes_read, calls.calls[begun[2] : begun[3]]


def crossing(step: list[tuple[str, tuple[int, ...], int]], each: int) -> dict[str, int]:
    """Bytes of collectives over groups with ranks of several nodes of `each` ranks, by their names."""
    found = {"all_gather_into_tensor": 0, "reduce_scatter_tensor": 0, "all_reduce": 0}
    for name, ranks, nbytes in step:
        if len({rank // each for rank in ranks}) > 1:
            found[name] += nbytes
    return found


CASES = {
    "qpissa, two ranks a node": (4, LINEARS, {"init": PiSSA(quantization_iterations=2)}),
    "dense, one rank a node": (2, LINEARS, {"init": PiSSA(), "quantization": None}),
    "frozen factors, one rank a node": (2, LINEARS, {"init": LoRAXS()}),
    "from a cache, one rank a node": (2, LINEARS, {"init": PiSSA(), "quantization": NF4(double_quant=True)}),
    "experts, two ranks a node": (4, EXPERTS, {"init": LoRA(), "gradient_checkpointing": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_losses_and_adapters_alone_between_nodes(
    name: str, llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bit for bit: the walk is the same, and so are sums of gradients; only where frozen bytes lie differs."""
    ranks, adapter, options = CASES[name]
    if "cache" in name:  # written by all ranks for all ranks, then read for nodes
        options = options | {"init_cache": str(tmp_path_factory.mktemp("cache"))}
    pretrained = save_checkpoint(tmp_path_factory.mktemp("experts"), "mixtral") if adapter is EXPERTS else llama
    world = run_ranks(ranks, train, pretrained, "world", adapter, options)
    node = run_ranks(ranks, train, pretrained, "node", adapter, options)
    job = RunSpec(
        nodes=NODES,
        gpus_per_node=ranks // NODES,
        compute_dtype=torch.float32,
        factor_dtype=torch.float32,
        init=options["init"],
        residual=options.get("quantization", NF4()) or Dense(dtype=torch.float32),
        shard_within="node",
        on_gpu=False,
    )
    shapes = ModelShapes.of(pretrained, LoraConfig(**adapter), init=options["init"])
    said = {c.what: c.nbytes for c in traffic(shapes, job).collectives if c.crosses}
    frozen = sum(p.shard_bytes for p in parameters(shapes, job) if p.kind != "trained")
    for (losses, held, read, step), (others, held_by_world, _, step_of_world) in zip(node, world, strict=True):
        assert losses == others
        assert len(losses) == STEPS
        assert held == frozen > held_by_world
        assert read == forecast(shapes, job).disk_reads or "cache" in name  # which is another checkpoint
        crosses, before = crossing(step, ranks // NODES), crossing(step_of_world, ranks // NODES)
        assert crosses["all_gather_into_tensor"] == said["gather"] < before["all_gather_into_tensor"]
        assert crosses["reduce_scatter_tensor"] == said["reduce"] == before["reduce_scatter_tensor"]
        assert crosses["all_reduce"] == before["all_reduce"]


@alone
def train_on_every_rank(
    pretrained: Path, within: str, adapter: dict[str, Any], options: dict[str, Any], accumulate: int
) -> Any:
    """Losses, bytes of frozen parameters held, and gathered bytes of the third step."""
    calls, module, begun = Traffic(), CausalLM(pretrained), []
    strategy = make_strategy(pretrained, adapter=LoraConfig(**adapter), shard_within=within, **options)
    trainer = make_trainer(strategy, accumulate_grad_batches=accumulate)
    module.on_train_batch_start = lambda *_: begun.append(len(calls.calls))
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size, micro_batches=accumulate))
    frozen = [local_shard(p) for p in module.model.parameters() if not p.requires_grad]
    held = sum(shard.numel() * shard.element_size() for shard in frozen)
    step = slice(begun[2 * accumulate], begun[3 * accumulate])
    return module.losses, held, calls.nbytes("all_gather_into_tensor", calls=step)


ALONE: dict[str, tuple[int, dict[str, Any], dict[str, Any], int]] = {
    "qpissa": (2, LINEARS, {"init": PiSSA(quantization_iterations=2)}, 1),
    "qpissa, two batches a step": (2, LINEARS, {"init": PiSSA()}, 2),
    "dense, no gradient checkpointing": (3, LINEARS, {"quantization": None, "gradient_checkpointing": False}, 1),
    "frozen factors, reentrant": (2, LINEARS, {"init": LoRAXS(), "use_reentrant": True}, 1),
    "experts": (2, EXPERTS, {"init": LoRA()}, 1),
}


@pytest.mark.parametrize("name", ALONE)
def test_ranks_that_hold_everything_gather_adapters_once_a_step(
    name: str, llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bit for bit the losses of shards over all ranks; every rank holds every frozen byte."""
    ranks, adapter, options, accumulate = ALONE[name]
    pretrained = save_checkpoint(tmp_path_factory.mktemp("experts"), "mixtral") if adapter is EXPERTS else llama
    world = run_ranks(ranks, train_on_every_rank, pretrained, "world", adapter, options, accumulate)
    each = run_ranks(ranks, train_on_every_rank, pretrained, "rank", adapter, options, accumulate)
    init = options.get("init", PiSSA())
    job = RunSpec(
        nodes=1,
        gpus_per_node=ranks,
        accumulate=accumulate,
        compute_dtype=torch.float32,
        factor_dtype=torch.float32,
        init=init,
        residual=options.get("quantization", NF4()) or Dense(dtype=torch.float32),
        shard_within="rank",
        on_gpu=False,
    )
    shapes = ModelShapes.of(pretrained, LoraConfig(**adapter), init=init)
    every = list(parameters(shapes, job))
    (said,) = (c.nbytes for c in traffic(shapes, job).collectives if c.what == "gather")
    assert said == sum(p.gathered_bytes for p in every if p.ranks > 1)
    for (losses, held, gathered), (others, held_by_world, gathered_by_world) in zip(each, world, strict=True):
        assert losses == others
        assert held == sum(p.shard_bytes for p in every if p.kind != "trained") > held_by_world
        assert gathered == {ranks: said}
        assert said < gathered_by_world[ranks]


def train_and_save(pretrained: Path, output: Path, within: str = "node") -> list[float]:
    callback = AdapterCheckpoint(dirpath=output, filename="{step}", every_n_train_steps=CUT, save_top_k=-1)
    strategy, module = make_strategy(pretrained, shard_within=within), CausalLM(pretrained)
    nodes = on_nodes() if within == "node" else {}
    trainer = make_trainer(strategy, callbacks=[callback], enable_checkpointing=True, **nodes)
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size))
    return module.losses


def resume(pretrained: Path, checkpoint: Path, within: Any) -> list[float]:
    module, nodes = CausalLM(pretrained), on_nodes() if within == "node" else {}
    trainer = make_trainer(make_strategy(pretrained, shard_within=within), **nodes)
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size, first=CUT), ckpt_path=checkpoint)
    return module.losses


def test_checkpoints_go_from_one_sharding_to_the_other(llama: Path, tmp_path: Path) -> None:
    """With as many ranks the same numbers; with others to fp32 rounding of sums."""
    whole = run_ranks(4, train_and_save, llama, tmp_path)[0]
    assert run_ranks(4, resume, llama, tmp_path / f"step={CUT}", "node")[0] == whole[CUT:]
    assert run_ranks(2, resume, llama, tmp_path / f"step={CUT}", "world")[0] == pytest.approx(whole[CUT:], rel=1e-5)


def test_checkpoints_go_from_and_to_ranks_that_hold_everything(llama: Path, tmp_path: Path) -> None:
    whole = run_ranks(2, train_and_save, llama, tmp_path / "rank", "rank")[0]
    assert run_ranks(2, train_and_save, llama, tmp_path / "world", "world")[0] == whole
    for saved, resumed in (("rank", "rank"), ("rank", "world"), ("world", "rank")):
        assert run_ranks(2, resume, llama, tmp_path / saved / f"step={CUT}", resumed)[0] == whole[CUT:]


def start_in_turn(pretrained: Path) -> None:
    trainer = make_trainer(make_strategy(pretrained, shard_within="node"), **on_nodes(mixed=True))
    trainer.fit(CausalLM(pretrained), loader(trainer.global_rank, trainer.world_size))


def test_ranks_that_alternate_between_nodes_are_refused_on_all_of_them(llama: Path) -> None:
    for _, error in run_ranks_catching(4, start_in_turn, llama):
        assert "srun --distribution=block" in str(error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_within": "rack"}, "'rack' is none of auto, rank, node, world"),
        ({"shard_within": "node", "init": CorDA()}, "calibration pass reads weights from the shards of all ranks"),
        ({"shard_within": "rank", "init": CorDA()}, "calibration pass reads weights from the shards of all ranks"),
    ],
    ids=["unknown", "calibrated", "calibrated on every rank"],
)
def test_what_does_not_go_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PiSSAStrategy(tmp_path, LoraConfig(**LINEARS), **options)


def start_by_itself(pretrained: Path) -> tuple[int, int]:
    strategy, module = make_strategy(pretrained, shard_within="auto"), CausalLM(pretrained)
    make_trainer(strategy, steps=1).fit(
        module, loader(torch.distributed.get_rank(), torch.distributed.get_world_size())
    )
    report = strategy.init_report
    return report.residual_bytes_per_rank, report.residual_bytes


def test_ranks_of_a_host_share_its_memory(llama: Path) -> None:
    """On CPUs auto is the world: each rank has half."""
    for mine, of_all in run_ranks(2, start_by_itself, llama):
        assert 2 * mine == of_all


PAIR = {"prompt": "what is 1 and 2? ", "chosen": "four", "rejected": "hello"}


class Forecasts(L.Callback):
    """Asks for what ``shard_within="auto"`` looks at on a device."""

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        found = run_spec(trainer.strategy)
        self.found = found.batch_size, found.length, found.keeps_step_zero


def forecast_of(material: Path, cases: list[tuple[Any, dict[str, Any]]]) -> list[tuple[int, int, bool]]:
    model, found = str(material / "model"), []
    for module, options in cases:
        asks = Forecasts()
        trainer = make_trainer(make_strategy(model), steps=1, callbacks=[asks])
        trainer.fit(module(model), SFTDataModule(model, str(material / "data.jsonl"), max_length=64, **options))
        found.append(asks.found)
    return found


def test_the_rows_of_a_batch_are_those_that_memory_is_for(tmp_path: Path) -> None:
    """Batches of so many tokens, streams, which make batches themselves, and pairs, which are two rows."""
    pairs = partial(PreferenceModule, loss="dpo"), partial(PreferenceModule, loss="orpo")
    cases = [(CausalLMModule, {"batch_size": 3}), (CausalLMModule, {"tokens_per_batch": 256})]
    cases += [(CausalLMModule, {"batch_size": 2, "streaming": True}), *((kind, {"batch_size": 2}) for kind in pairs)]
    records = [PAIR | {"completion": PAIR["chosen"]}] * 8
    (found,) = run_ranks(1, forecast_of, save_material(tmp_path, records), cases)
    assert found == [(3, 64, False), (4, 64, False), (2, 64, False), (4, 64, True), (4, 64, False)]
