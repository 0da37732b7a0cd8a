"""``shard_within="auto"``: a run as the forecast sees it, and the ranks that share its frozen parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.forecast.job import RunSpec, ShardWithin, planned_run
from lowrank_dist.forecast.sharding import choose_sharding
from lowrank_dist.initialization.open import OpenedModel
from lowrank_dist.training.optim import OPTIMIZERS
from lowrank_dist.training.stage3 import Stage3Strategy

_LENGTH = 4096  # tokens of a sequence, where the data module does not say


def run_spec(strategy: Stage3Strategy, **options: Any) -> RunSpec:
    """The run of a strategy that is being set up, for the forecast.

    Parameters
    ----------
    strategy
        Its module and data module say what they can: optimizer, fused loss, DPO's reference, rows of a batch and
        longest sequence.
    **options
        Further attributes of `RunSpec`.
    """
    module, zero = strategy.lightning_module, strategy._deepspeed_config["zero_optimization"]
    assert module is not None
    optimizer, data = getattr(module, "optimizer", None), getattr(module.trainer, "datamodule", None)
    return RunSpec(
        nodes=strategy.num_nodes,
        gpus_per_node=strategy.world_size // strategy.num_nodes,
        batch_size=getattr(data, "full_rows", None) or strategy._auto_select_batch_size(),
        length=getattr(data, "max_length", None) or _LENGTH,
        accumulate=module.trainer.accumulate_grad_batches,
        optimizer=optimizer if isinstance(optimizer, str) and optimizer in OPTIMIZERS else "adamw",
        keeps_step_zero=getattr(module, "keeps_step_zero", False),
        fused_cross_entropy=getattr(module, "fused_cross_entropy", False),
        offload_optimizer="offload_optimizer" in zero,
        offload_parameters="offload_param" in zero,
        on_gpu=strategy.root_device.type == "cuda",
        **options,
    )


def smallest_group(
    opened: OpenedModel, run: Callable[[], RunSpec], device: torch.device, *, announce: Callable[[str], object]
) -> ShardWithin:
    """The smallest group of ranks within which a run fits; the world on CPUs, and for methods that look at data.

    Collective on CUDA: ranks agree on the least free memory of their devices. `run`, which asks for the training data,
    is called only then, and its errors are raised on every rank.
    """
    init, group = opened.source.init, ShardGroup(device=device)
    calibrated = init is not None and init.statistic is not None
    if group.size == 1:
        return "world"
    if calibrated or device.type != "cuda":
        why = f"{init} reads the shards of all ranks" if calibrated else "ranks on CPUs share the memory of their host"
        announce(f"shard_within=auto takes world: {why}")
        return "world"
    with group.shared_errors():
        job = run()
        shapes, job = planned_run(opened, job)
        free, _ = torch.cuda.mem_get_info(device)
    choice = choose_sharding(shapes, job, min(group.gather_objects(free)))
    announce(f"shard_within=auto takes {choice}; sequences of {job.length} tokens, {job.batch_size} a batch")
    return choice.within
