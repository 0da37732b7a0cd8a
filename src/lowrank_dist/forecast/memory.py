"""Memory of one rank: resident bytes (exact, padding included) and transient bytes of a step (an upper bound)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from lowrank_dist.forecast.activations import Activations
from lowrank_dist.forecast.job import ModelShapes, Parameter, RunSpec, parameters
from lowrank_dist.quantization.stacks import decoding_bytes, experts_at_a_time

#: Parts of `Memory.resident`, in the order of the table.
RESIDENT = {
    "codes": "codes of the residual",
    "maxima": "their block scales",
    "dense": "dense residual",
    "other": "other frozen parameters",
    "trained": "trained parameters",
    "reference": "what they were at step 0",
    "buffers": "buffers of the tuner",
    "gradients": "their gradients",
    "masters": "optimizer's fp32 copy",
    "moments": "optimizer's moments",
    "importance": "importance of AdaLoRA's triplets",
}
_OPTIMIZER = ("masters", "moments", "gradients", "importance")
_TWO_MOMENTS = 8.0  # in fp32; of optimizers given by import path too, whose state is not known here
_PROJECTED = ("galore", "apollo")
_MOMENT_BYTES = {"muon": 4.0, "paged_adamw_8bit": 2 + 2 * 4 / 256}
_DS_BUCKET = 200_000_000  # Lightning's default, elements


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank.

    Attributes
    ----------
    resident
        Bytes by kind (`RESIDENT`), on the device unless offloaded.
    offloaded
        Kinds of `resident` in host memory.
    bucket
        Buffer in which gradients are reduced.
    waiting
        Gradients of layers that wait until they fill it, and those of the layer in use; and their copy, if DeepSpeed
        has the buffer for gradients of other modules.
    layers
        Gathered decoder layers, at most: the layer in use, twice while it is put together, and the prefetched ones.
    head
        The largest other gathered parameter (the head, the embedding), twice while it is put together.
    decoded
        The largest dequantized matrix, or all of a layer that keeps them from its recomputation to its backward, and
        the experts that are decoded at a time.
    kept, recomputed, logits
        Activations: those kept until the backward, those recomputed in one layer's backward, logits and loss.
    step
        Temporary memory of the optimizer's step beside its state.
    host
        Host memory: initial factors, the copy from which a checkpoint is written, and offloaded kinds.
    """

    resident: Mapping[str, int]
    offloaded: tuple[str, ...]
    bucket: int
    waiting: int
    layers: int
    head: int
    decoded: int
    kept: int
    recomputed: int
    logits: int
    step: int
    host: int

    @property
    def stays(self) -> int:
        """Resident bytes on the device."""
        return sum(nbytes for kind, nbytes in self.resident.items() if kind not in self.offloaded)

    @property
    def phases(self) -> dict[str, int]:
        """Upper bounds of the bytes on the device, by phase of a step."""
        base = self.stays + self.bucket
        return {
            "logits and loss": base + self.head + self.layers + self.kept + self.logits,
            "backward of a layer": sum(
                (base, self.waiting, self.head, self.layers, self.decoded, self.kept, self.recomputed)
            ),
            "optimizer step": base + self.step,
        }

    @property
    def peak(self) -> int:
        """Upper bound of the bytes on the device."""
        return max(self.phases.values())


def memory(shapes: ModelShapes, job: RunSpec, activations: Activations) -> Memory:
    """Memory of one rank of `job`. It is the same for all ranks, since shards are padded to the same length."""
    every = list(parameters(shapes, job))
    trained = [p for p in every if p.kind == "trained"]
    count = sum(p.shard_numel for p in trained)
    owned = count if job.stage in (0, 3) else -(-count // job.ranks)  # elements that this rank steps
    reduced = owned if job.stage >= 2 else count
    resident = dict.fromkeys(RESIDENT, 0)
    for p in every:
        resident[p.kind] += p.shard_bytes
    resident["reference"] = resident["trained"] if job.keeps_step_zero else 0
    in_fp32 = job.adapts and job.accumulate > 1  # the strategy's default
    resident["gradients"] = reduced * (4 if in_fp32 else job.factor_dtype.itemsize)
    resident["masters"] = 4 * owned if job.stage else 0
    resident["moments"] = int(owned * _MOMENT_BYTES.get(job.optimizer if job.on_gpu else "adamw", _TWO_MOMENTS))
    scored = set() if shapes.tuner is None else set(shapes.tuner.scored)
    importance = sum(p.shard_numel for p in trained if p.name in scored)
    resident["importance"] = 8 * importance  # sensitivity and uncertainty
    step = 4 * owned if job.stage and job.factor_dtype.itemsize != 4 else 0
    if job.optimizer in _PROJECTED:
        resident["moments"], beside = projected_state(shapes, job, trained)
        step += beside
    if importance:  # a copy of the gradients lasts over the step; then values and gradients of the factors are copied
        step = 4 * owned + max(step, 8 * importance)
    offloaded = (_OPTIMIZER if job.offload_optimizer else ()) + (
        tuple(kind for kind in RESIDENT if kind not in (*_OPTIMIZER, "buffers")) if job.offload_parameters else ()
    )
    kept = activations.inputs if job.gradient_checkpointing else sum(activations.layers)
    copied = 0
    if job.adapts:  # initial factors, and the copied state from which a checkpoint is written
        copied = resident["trained"] + sum(resident[kind] for kind in ("trained", "masters", "moments", "importance"))
    gradients = sum(p.whole_bytes for p in trained)
    bucket = _bucket(job, gradients)
    return Memory(
        resident=resident,
        offloaded=offloaded,
        bucket=bucket,
        waiting=_waiting(_by_layer(shapes, trained, lambda p: p.whole_bytes), gradients, bucket) if job.adapts else 0,
        layers=_gathered_layers(shapes, job, every),
        head=_largest_other(shapes, job, every),
        decoded=_decoded(shapes, job),
        kept=kept + activations.outside,
        recomputed=max(activations.layers, default=0) if job.gradient_checkpointing else 0,
        logits=activations.fused if job.fused_cross_entropy else activations.logits,
        step=step,
        host=copied + sum(resident[kind] for kind in offloaded),
    )


def projected_state(shapes: ModelShapes, job: RunSpec, trained: Iterable[Parameter]) -> tuple[int, int]:
    """Bytes of the state of GaLore or APOLLO, and of what a step has beside it.

    A matrix of m by n, m >= n, has moments of ``[m, r]`` and a projection of ``[r, n]``; other parameters have two
    moments. When projections are made again, GaLore's n singular vectors of every matrix are there until the step ends.
    """
    backbone, state, beside = shapes.backbone, 0, 0
    head = backbone.get_output_embeddings()
    for p in trained:
        whole, owner = backbone.get_parameter(p.name), backbone.get_submodule(p.name.rpartition(".")[0])
        table = owner is head or isinstance(owner, nn.Embedding)
        if whole.ndim != 2 or table or "norm" in type(owner).__name__.lower():
            state += 8 * whole.numel()
            continue
        small, large = sorted(whole.shape)
        rank = min(job.optimizer_rank, small) if job.optimizer == "galore" else job.optimizer_rank
        state += 8 * rank * large + 4 * rank * small
        beside += 4 * (small - rank) * small if job.optimizer == "galore" else 0
    return state, beside


def _bucket(job: RunSpec, trained: int) -> int:
    """Bytes of the reduction buffer: a copy of all gradients in DDP, at most all gradients in DeepSpeed."""
    if job.stage == 0:
        return trained
    default = 50_000_000 if job.adapts else _DS_BUCKET
    return min(trained, (job.bucket or default) * job.factor_dtype.itemsize)


def _waiting(layers: list[int], gradients: int, bucket: int) -> int:
    """Bytes of gradients, given those of each layer and of all, and of the bucket."""
    waiting = min(sum(layers), bucket + max(layers))
    return waiting if sum(layers) == gradients else 2 * waiting


def _gathered_layers(shapes: ModelShapes, job: RunSpec, every: list[Parameter]) -> int:
    """Gathered bytes of the layer in use, twice while its parts are put together, and of `live_layers` more.

    Each is counted as the largest layer. Trained parameters that stay gathered are all counted.
    """
    if job.stage < 3:
        return 0
    if job.keeps_trained:  # each is put together once; the shards of frozen parameters are the parameters
        shared = [p for p in every if p.ranks > 1]
        return sum(p.gathered_bytes for p in shared) + (job.live_layers + 1) * _largest_layer(shapes, shared)
    return (job.live_layers + 2) * _largest_layer(shapes, every)


def _largest_layer(shapes: ModelShapes, every: list[Parameter]) -> int:
    """Gathered bytes of the largest decoder layer."""
    # on one rank a shard is the parameter and is not gathered
    return max(_by_layer(shapes, every, lambda p: p.gathered_bytes if p.ranks > 1 else 0))


def _by_layer(shapes: ModelShapes, every: list[Parameter], nbytes: Callable[[Parameter], int]) -> list[int]:
    """Sums over the parameters of each decoder layer; at last, nothing."""
    sizes = dict.fromkeys([*shapes.layers, ""], 0)
    for p in every:
        layer = next((prefix for prefix in _prefixes(p.name) if prefix in sizes), None)
        if layer is not None:
            sizes[layer] += nbytes(p)
    return list(sizes.values())


def _largest_other(shapes: ModelShapes, job: RunSpec, every: list[Parameter]) -> int:
    if job.stage < 3 or job.keeps_trained:
        return 0
    inside = set(shapes.layers)
    outside = (p for p in every if p.ranks > 1 and not inside.intersection(_prefixes(p.name)))
    return 2 * max((p.gathered_bytes for p in outside), default=0)


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _decoded(shapes: ModelShapes, job: RunSpec) -> int:
    if job.residual is None:
        return 0
    itemsize, wrapped, single, largest_scratch = job.compute_dtype.itemsize, 0, 0, 0
    layers, kept = set(shapes.layers), Counter[str]()
    for planned in shapes.plan.matrices:
        residual = job.residual.of_matrix(planned.key)
        elements = planned.rows * planned.columns * planned.experts
        if planned.wrapped:
            partition = planned.row_partition(job.shard_ranks if job.stage == 3 else 1, block=residual.block)
            count = experts_at_a_time(job.experts_at_a_time, planned.experts, partition, job.compute_dtype)
            wrapped = max(wrapped, decoding_bytes(residual, partition, count, job.compute_dtype))
        elif not job.residual.exact and not planned.lookup:
            scratch = residual.scratch_bytes(elements)
            single, largest_scratch = max(single, elements * itemsize + scratch), max(largest_scratch, scratch)
            kept.update(dict.fromkeys(layers.intersection(_prefixes(planned.layer)), elements * itemsize))
    if job.keeps_decoded:
        return max(max(kept.values(), default=0) + largest_scratch + wrapped, single)
    return max(single, wrapped)
