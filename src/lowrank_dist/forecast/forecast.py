"""The forecast of a run, and the settings that would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from lowrank_dist.decomposition.schedule import Sharding
from lowrank_dist.forecast.activations import measure_activations
from lowrank_dist.forecast.checkpoint import checkpoint_bytes
from lowrank_dist.forecast.job import ModelShapes, RunSpec, parameters
from lowrank_dist.forecast.memory import Memory, memory
from lowrank_dist.forecast.rates import Cluster
from lowrank_dist.forecast.sharding import ShardingChoice, alternatives, choose_sharding
from lowrank_dist.forecast.startup import Seconds, decomposed_bytes, predict
from lowrank_dist.forecast.traffic import Traffic, traffic
from lowrank_dist.quantization.four_bit import FourBit
from lowrank_dist.quantization.nf4 import NF4


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step at assumed rates.

    Attributes
    ----------
    compute
        Products, and dequantization of the frozen matrices.
    communicate
        Collectives.
    """

    compute: float
    communicate: float

    @property
    def least(self) -> float:
        """Time of a step that hides as much communication as possible."""
        return max(self.compute, self.communicate)

    @property
    def most(self) -> float:
        """Time of a step that hides no communication."""
        return self.compute + self.communicate


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Predicted needs of a run.

    Attributes
    ----------
    job
        The run.
    memory
        Memory of one rank.
    traffic
        Communication of one step.
    activations_measured
        Whether `Memory.recomputed` (`kept`, without gradient checkpointing) was measured on the architecture. False:
        it is an estimate.
    initialisation
        Seconds of the walk, or of reading a residual model, on a GPU cluster. None without adapters or without GPUs.
        ``write`` is the time to write the residual model to a cache and to read it back.
    step
        Seconds of one step on a GPU cluster. None without GPUs.
    disk_reads
        Bytes that all ranks together read at the start: the pretrained weights and, if one is written, the cache.
    checkpoint
        Bytes of each checkpoint that the run writes.
    limit
        Bytes of a rank's device available to the run. None: unknown.
    sharding
        The groups of ranks that could share the frozen parameters, and the smallest within which the run fits. None
        without adapters, or if no parameters are partitioned.
    remedies
        Settings, if the run does not fit, each of which alone would make it fit; of each the mildest value.
    """

    job: RunSpec
    memory: Memory
    traffic: Traffic
    activations_measured: bool
    initialisation: Seconds | None
    step: StepTime | None
    disk_reads: int
    checkpoint: int
    limit: int | None
    sharding: ShardingChoice | None
    remedies: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the limit; None without a limit."""
        return None if self.limit is None else self.memory.peak <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """Values for JSON, in bytes and seconds."""
        job = self.job
        start, step = self.initialisation, self.step
        return {
            "ranks": job.ranks,
            "nodes": job.nodes,
            "gpus_per_node": job.gpus_per_node,
            "global_batch": job.global_batch,
            "steps": job.steps,
            "memory": asdict(self.memory)
            | {"stays": self.memory.stays, "phases": self.memory.phases, "peak": self.memory.peak},
            "limit": self.limit,
            "fits": self.fits,
            "shard_within": None
            if self.sharding is None
            else {"used": self.job.shard_within, "smallest": self.sharding.within, "peaks": self.sharding.peaks},
            "remedies": list(self.remedies),
            "activations_measured": self.activations_measured,
            "initialisation_seconds": None
            if start is None
            else asdict(start) | {"in_memory": start.in_memory, "total": start.total},
            "step_seconds": None if step is None else asdict(step) | {"least": step.least, "most": step.most},
            "traffic": {
                "per_rank": self.traffic.per_rank,
                "into_node": self.traffic.into_node,
                "collectives": [asdict(c) | {"over_a_link": c.over_a_link} for c in self.traffic.collectives],
            },
            "disk_reads": self.disk_reads,
            "checkpoint": self.checkpoint,
        }


def forecast(
    shapes: ModelShapes,
    job: RunSpec,
    *,
    limit: int | None = None,
    cluster: Cluster | None = None,
    automatic: bool = False,
) -> Forecast:
    """Predict the needs of a run. Reads, sends and allocates nothing.

    Parameters
    ----------
    shapes
        Shapes of the model.
    job
        Settings of the run.
    limit
        Bytes of a device available to the run. None: unknown.
    cluster
        Assumed rates, from which seconds are computed.
    automatic
        Predict the run with the smallest group of ranks within which it fits, in place of ``job.shard_within``.
    """
    cluster = replace(cluster or Cluster(), node=job.gpus_per_node)
    # seconds for a model of many layers, so it is done once
    activations = measure_activations(shapes.backbone, length=job.length, dtype=job.compute_dtype)
    sharding = choose_sharding(shapes, job, limit, activations) if job.adapts and job.stage == 3 else None
    if automatic and sharding is not None:
        job = replace(job, shard_within=sharding.within)

    def needed(job: RunSpec) -> Memory:
        return memory(shapes, job, activations.times(job.batch_size))

    needs = needed(job)
    remedies = []
    if limit is not None and needs.peak > limit:
        for setting in _alternatives(job):
            remedies += [text for text, other in setting if needed(other).peak <= limit][:1]
    return Forecast(
        job=job,
        memory=needs,
        traffic=traffic(shapes, job),
        activations_measured=activations.measured,
        initialisation=_initialisation(shapes, job, cluster),
        step=_step_time(shapes, job, cluster) if job.on_gpu else None,
        disk_reads=_disk_reads(shapes, job),
        checkpoint=checkpoint_bytes(shapes, job),
        limit=limit,
        sharding=sharding,
        remedies=tuple(remedies),
    )


def _alternatives(job: RunSpec) -> Iterator[list[tuple[str, RunSpec]]]:
    """For each setting, jobs with its other values, the mildest first. Only more nodes change the global batch."""
    if not job.gradient_checkpointing:
        yield [("gradient_checkpointing: true", replace(job, gradient_checkpointing=True))]
    yield list(_smaller_batches(job))
    if job.on_gpu and not job.fused_cross_entropy:
        yield [("model.fused_cross_entropy: true", replace(job, fused_cross_entropy=True))]
    if job.optimizer != "paged_adamw_8bit":
        yield [("model.optimizer: paged_adamw_8bit", replace(job, optimizer="paged_adamw_8bit"))]
    if job.adapts:
        groups = alternatives(job)
        larger = groups[groups.index(job.shard_within) + 1 :] if job.shard_within in groups else []
        yield [(f"shard_within: {within}", replace(job, shard_within=within)) for within in larger]
        if job.keeps_decoded:
            yield [("keep_decoded: false", replace(job, keep_decoded=False))]
        yield [
            (f"live_layers: {layers}", replace(job, live_layers=layers)) for layers in reversed(range(job.live_layers))
        ]
    if job.init is not None:  # without it, the files on disk determine the format
        if isinstance(job.residual, FourBit) and not job.residual.double_quant:
            smaller = replace(job, residual=replace(job.residual, double_quant=True))
            yield [(f"quantization: {type(job.residual).__name__} with double_quant: true", smaller)]
        elif not isinstance(job.residual, FourBit):
            yield [("quantization: NF4", replace(job, residual=NF4()))]
    if job.stage and not job.offload_optimizer:
        yield [("offload_optimizer: true", replace(job, offload_optimizer=True))]
    if job.stage == 3 and not job.offload_parameters:
        yield [("offload_parameters: true", replace(job, offload_parameters=True))]
    yield [
        (f"trainer.num_nodes: {nodes} (the global batch grows with them)", replace(job, nodes=nodes))
        for nodes in (2 * job.nodes, 4 * job.nodes, 8 * job.nodes)
    ]


def _smaller_batches(job: RunSpec) -> Iterator[tuple[str, RunSpec]]:
    """Jobs with a half, a quarter, ... of the batch, and as many more of them in a step."""
    items, parts = job.batch_size // job.item_rows, 2
    while items % parts == 0:
        option = f"data.batch_size: {items // parts}"
        if job.tokens_per_batch is not None:
            option = f"data.tokens_per_batch: {job.tokens_per_batch // parts}"
            if job.tokens_per_batch // parts < -(-job.length // 8) * 8:  # a row is padded to a multiple of 8
                return
        accumulate = job.accumulate * parts
        smaller = replace(job, batch_size=job.batch_size // parts, accumulate=accumulate)
        yield f"{option} and trainer.accumulate_grad_batches: {accumulate}", smaller
        parts *= 2


def _disk_reads(shapes: ModelShapes, job: RunSpec) -> int:
    """Bytes read at the start: every byte once, but undecomposed frozen parameters once per shard group."""
    if not job.adapts:
        return shapes.checkpoint_bytes * job.ranks  # transformers loads all of it in every rank
    repeated = shapes.frozen_bytes * (job.ranks // job.shard_ranks - 1)
    return shapes.checkpoint_bytes + repeated + (_cached_bytes(shapes, job) if job.fills_cache else 0)


def _cached_bytes(shapes: ModelShapes, job: RunSpec) -> int:
    """Approximate bytes of a cache, without headers and without the JSON beside 4-bit weights."""
    assert job.residual is not None
    return round(decomposed_bytes(shapes.plan.matrices, job.residual)) + shapes.copied_bytes


def _initialisation(shapes: ModelShapes, job: RunSpec, cluster: Cluster) -> Seconds | None:
    """Seconds of the walk, without the calibration pass that some methods need."""
    if job.residual is None or not job.on_gpu:
        return None
    read = cluster.read_rate(job.ranks)
    if job.init is None:
        seconds = Seconds(read=_disk_reads(shapes, job) / read)
    else:
        seconds = predict(
            shapes.plan.matrices,
            job.init,
            job.residual,
            cluster.host(job.ranks, job.residual),
            job.ranks,
            sharding=Sharding(ranks_per_node=job.gpus_per_node),
            read=read,
        )
    if job.fills_cache:
        cached = _cached_bytes(shapes, job)
        seconds.write = cached / cluster.write_rate(job.ranks) + cached / read
    if job.shard_ranks < job.ranks:  # every node receives all residuals
        received = sum(p.shard_bytes for p in parameters(shapes, job) if p.kind in ("codes", "maxima", "dense"))
        seconds.communicate += received / cluster.bandwidth[1]
    return seconds


def _step_time(shapes: ModelShapes, job: RunSpec, cluster: Cluster) -> StepTime:
    """Time of a step from two flops per weight and token in every pass; frozen weights need no gradients."""
    passes = 2 + job.gradient_checkpointing  # forward, recomputation, and backward through the inputs
    active = getattr(shapes.backbone.config.get_text_config(), "num_experts_per_tok", None) or 1
    used = {m.name: min(1.0, active / m.experts) for m in shapes.plan.matrices}  # the share of tokens that it sees
    frozen = sum(used[m.name] * m.rows * m.columns for m in shapes.plan.matrices)
    adapters = sum(used[m.name] * m.rank * (m.rows + m.columns) for m in shapes.plan.matrices)
    others, trained = 0.0, 0.0
    embedding = shapes.backbone.get_input_embeddings().weight
    for tensor in shapes.plan.parameters:
        parameter = shapes.backbone.get_parameter(tensor.names[0])
        if parameter.ndim > 1 and (parameter is not embedding or len(tensor.names) > 1):  # looked up, not multiplied
            share = min(1.0, active / len(parameter)) if parameter.ndim == 3 else 1.0  # of stacked experts
            others += share * parameter.numel()
            trained += share * parameter.numel() * tensor.trainable
    flops = 2 * job.tokens * (passes * (frozen + adapters + others) + adapters + trained)
    seconds = flops / cluster.flops
    if job.residual is not None and not job.residual.exact:
        moved = sum(m.rows * m.columns for m in shapes.plan.matrices) * job.compute_dtype.itemsize
        moved += sum(p.whole_bytes for p in parameters(shapes, job) if p.kind in ("codes", "maxima"))
        seconds += passes * moved / cluster.memory_rate
    # the rates are those of an all-reduce, which is a reduce-scatter and a gather; each takes half of its time
    communicate = sum(c.nbytes / (2 * cluster.bandwidth[c.crosses]) for c in traffic(shapes, job).collectives)
    return StepTime(compute=job.accumulate * seconds, communicate=communicate)
