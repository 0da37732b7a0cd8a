"""Loads a checkpoint into a sharded model, on any number of ranks. Each rank reads only its own flat ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_dist.adapters.files import read_config
from lowrank_dist.adapters.source import copied_blocks
from lowrank_dist.checkpoints.layout import TrainingCheckpoint
from lowrank_dist.decomposition.report import MatrixReport
from lowrank_dist.decomposition.restore import Resume
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatPartition
from lowrank_dist.errors import CheckpointError
from lowrank_dist.model.adapter_files import AdapterFiles
from lowrank_dist.storage.layout import ADAPTER_DIR, OPTIMIZER
from lowrank_dist.storage.reader import CheckpointReader
from lowrank_dist.tuners.adalora.allocation import STATES, RankAllocation
from lowrank_dist.zero3.optimizer import MASTER, ShardedOptimizer
from lowrank_dist.zero3.partition import local_shard, whole_shape


def load_parameters(
    checkpoint: TrainingCheckpoint, trained: Mapping[str, Tensor], files: AdapterFiles, group: ShardGroup
) -> None:
    """Overwrite this rank's partitions of `trained` parameters with their values in `checkpoint`.

    Must be called before DeepSpeed's engine exists, which copies its fp32 masters from the parameters. Collective.

    Raises
    ------
    CheckpointError
        On every rank, if a parameter is missing or has another shape.
    """
    with group.shared_errors():
        before = checkpoint.manifest["trained"]
        if len(before) != len(trained):
            odd = sorted(set(before) ^ set(trained))[0]
            raise CheckpointError(
                f"{checkpoint.directory}: the run that wrote it trained {len(before)} tensors, this run trains "
                f"{len(trained)} (the first that one of them lacks: {odd}); resume with the same adapter"
            )
        for name, parameter in trained.items():
            key = files.stored_as(name)
            part, key = (OPTIMIZER, name) if key is None else (ADAPTER_DIR, key)
            if part not in checkpoint.manifest["hashes"]:
                raise CheckpointError(f"{checkpoint.directory}: holds no {name}: it was saved with weights_only")
            shard = _own_range(checkpoint, part, key, whole_shape(parameter), group)
            local = local_shard(parameter)
            local[: shard.numel()].copy_(shard)


def load_optimizer(
    checkpoint: TrainingCheckpoint,
    trained: Mapping[str, Tensor],
    optimizer: ShardedOptimizer,
    group: ShardGroup,
    *,
    steps: int,
    settings: list[dict[str, Any]],
    scalars: list[dict[str, Any]] | None,
) -> None:
    """Set the optimizer's state of `trained` parameters, and the settings of their groups. Collective.

    Raises
    ------
    CheckpointError
        On every rank, if a tensor is missing or has another shape.
    InputError
        On every rank, if the groups are others, or the optimizer keeps another state.
    """
    names = {id(parameter): name for name, parameter in trained.items()}
    kinds = {key.rpartition(".")[2] for key in checkpoint.part(OPTIMIZER) if key not in trained} - set(STATES)

    def shards(parameter: Tensor) -> dict[str, Tensor]:
        name, found = names[id(parameter)], {}
        for kind in kinds:
            key = f"{name}.{kind}"
            if kind != MASTER or key in checkpoint.part(OPTIMIZER):
                found[kind] = _own_range(checkpoint, OPTIMIZER, key, whole_shape(parameter), group)
        return found

    with group.shared_errors():
        optimizer.settings = settings
        optimizer.load(shards, steps, scalars)


def load_allocation(
    checkpoint: TrainingCheckpoint,
    trained: Mapping[str, Tensor],
    allocation: RankAllocation,
    engine: Any,
    group: ShardGroup,
    *,
    state: Mapping[str, Any],
) -> None:
    """Continue an allocation of ranks. Collective.

    Raises
    ------
    CheckpointError
        On every rank, if a tensor is missing or has another shape, or if the schedule is another.
    """

    def shard(name: str, kind: str) -> Tensor:
        return _own_range(checkpoint, OPTIMIZER, f"{name}.{kind}", whole_shape(trained[name]), group)

    with group.shared_errors():
        allocation.load(state, shard, engine)


def _own_range(checkpoint: TrainingCheckpoint, part: str, key: str, shape: torch.Size, group: ShardGroup) -> Tensor:
    reader: CheckpointReader = checkpoint.part(part)
    stored = reader.stored(key).shape if key in reader else None
    if stored != tuple(shape):
        what = "is missing" if stored is None else f"has shape {list(stored)}"
        raise CheckpointError(
            f"{checkpoint.directory}: {key} {list(shape)} {what} in {part}; resume with the adapter, the model and the "
            "strategy's options of the run that wrote it"
        )
    return reader.flat(key, *FlatPartition(numel=shape.numel(), world_size=group.size).bounds(group.rank))


def earlier_run(checkpoint: TrainingCheckpoint) -> Resume:
    """Files and reports from which the residual is formed again, and what they belong to."""
    reports = (MatrixReport.from_dict(entry) for entry in checkpoint.manifest["matrices"])
    has_adapter = copied_blocks(checkpoint.manifest) is None
    adapter = read_config(checkpoint.directory / ADAPTER_DIR) if has_adapter else None
    return Resume.from_facts(checkpoint.directory, checkpoint.manifest, reports, adapter)
