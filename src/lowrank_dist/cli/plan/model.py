"""Shapes of a planned run with adapters, from a pretrained model, a residual model, or dimensions alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from peft import LoraConfig, PeftConfig
from transformers import PreTrainedModel

from lowrank_dist.adapters.files import read_config as read_adapter_config
from lowrank_dist.decoding.sizes import shapes_only
from lowrank_dist.decomposition.schedule import Sharding
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import InputError
from lowrank_dist.forecast import ModelShapes, RunSpec
from lowrank_dist.forecast.job import planned_run
from lowrank_dist.initialization.starting_adapter import StartingAdapter
from lowrank_dist.methods import LoRA
from lowrank_dist.model.skeleton import build_skeleton, read_config
from lowrank_dist.quantization.format import AS_STORED
from lowrank_dist.storage.find_weights import holds_weights
from lowrank_dist.storage.source import WeightSource
from lowrank_dist.training.strategy import PiSSAStrategy
from lowrank_dist.tuners.support import is_for_peft, needs_peft


def with_adapters(strategy: PiSSAStrategy, source: Path, job: RunSpec) -> tuple[ModelShapes, RunSpec]:
    """Shapes of the model at `source`, and `job` with the settings that depend on that model.

    If the weights are on disk, everything that the set-up of a run refuses is refused. A residual model is planned as
    it is stored. If ``init_cache`` holds a complete residual model, that one is planned, because the run will read it.

    Raises
    ------
    CheckpointError, ModelError, InputError
        As in the set-up of a run.
    """
    adapter = _local_adapter(strategy.adapter, strategy.adapter_revision)
    backbone = build_skeleton(source, read_config(source))
    pretrained: str | WeightSource = str(source)
    if not holds_weights(source):
        if strategy.quantization == AS_STORED:
            raise InputError(
                f"plan: quantization={AS_STORED!r} is planned from the headers of the weights, and {source} has none; "
                "pass a directory with the weights, or plan with quantization FP8 or MXFP4, which take about the same "
                "bytes"
            )
        if not _made_by_peft(adapter, strategy) and strategy.expand_blocks is None:
            return _of_dimensions(strategy, adapter, source, job, backbone)
        pretrained = shapes_only(backbone)
    found = replace(strategy.recipe, pretrained=pretrained, adapter=adapter, revision=None, adapter_revision=None)
    opened = found.open(
        backbone,
        ShardGroup.single(),
        compute_dtype=job.compute_dtype,
        sharding=Sharding(ranks_per_matrix=strategy.ranks_per_matrix, ranks_per_node=job.gpus_per_node),
        announce=lambda _: None,
        resume=None,
    )
    try:
        opened = opened.from_cache(job.factor_dtype)
        return planned_run(opened, job)
    finally:
        opened.close()


def _made_by_peft(adapter: PeftConfig | str | Path | None, strategy: PiSSAStrategy) -> bool:
    if isinstance(adapter, PeftConfig):
        return is_for_peft(adapter, strategy.init)
    return adapter is not None and needs_peft(read_adapter_config(Path(adapter)))


def _of_dimensions(
    strategy: PiSSAStrategy,
    adapter: PeftConfig | str | Path | None,
    source: Path,
    job: RunSpec,
    backbone: PreTrainedModel,
) -> tuple[ModelShapes, RunSpec]:
    if adapter is None:
        raise InputError("plan: the strategy has no adapter: pass adapter=LoraConfig(...) with the layers to decompose")
    if not isinstance(adapter, PeftConfig):
        start = StartingAdapter(Path(adapter), for_residual=False)
        start.close()
        adapter, job = start.config, replace(job, init=LoRA())
    assert isinstance(adapter, LoraConfig)
    shapes = ModelShapes.of(
        source,
        adapter,
        init=job.init,
        untie=strategy.untie_embeddings,
        encode_all=strategy.encode == "all-linear",
        also=strategy.train_also,
        backbone=backbone,
    )
    return shapes, replace(job, fills_cache=strategy.init_cache is not None)


def _local_adapter(adapter: PeftConfig | str | Path | None, revision: str | None) -> PeftConfig | str | Path | None:
    """`adapter`, where a hub id becomes its directory in the hub's cache; nothing is downloaded."""
    if adapter is None or isinstance(adapter, PeftConfig) or Path(adapter).is_dir():
        return adapter
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(str(adapter), "adapter_config.json", revision=revision)
    except HFValidationError:  # a path
        cached = None
    if not isinstance(cached, str):
        raise InputError(f"plan: adapter={str(adapter)!r} is neither a directory nor in the hub's cache")
    return Path(cached).parent
