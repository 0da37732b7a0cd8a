"""A forecast as text."""

from __future__ import annotations

from collections.abc import Iterator

from lowrank_dist.cli.units import size
from lowrank_dist.forecast import Forecast
from lowrank_dist.forecast.memory import RESIDENT
from lowrank_dist.forecast.sharding import MARGIN


def as_table(found: Forecast) -> str:
    """Sections of ``name  value`` lines."""
    return "\n".join(
        [*_memory(found), "", *_verdict(found), *_sharding(found), "", *_network(found), "", *_rest(found)]
    )


def _memory(found: Forecast) -> Iterator[str]:
    job, memory = found.job, found.memory
    device = "GPU" if job.on_gpu else "rank"
    yield (
        f"{job.nodes} node{'s'[: job.nodes > 1]} of {job.gpus_per_node} {device}{'s'[: job.gpus_per_node > 1]}, "
        f"{job.batch_size} x {job.length} tokens each, {job.accumulate} batch{'es' * (job.accumulate > 1)} a step: "
        f"{job.global_batch} sequences a step"
    )
    yield ""
    yield f"Per {device}, all the time (exact)"
    for kind, text in RESIDENT.items():
        if memory.resident[kind]:
            yield _line(text + (" (on the host)" * (kind in memory.offloaded)), memory.resident[kind])
    yield _line("sum on the device", memory.stays)
    yield ""
    estimate = "" if found.activations_measured else ", estimated"
    kept = "inputs of checkpointed layers, and other saved tensors" if job.gradient_checkpointing else "activations"
    gathered = "gathered adapters" if job.keeps_trained else f"gathered layers ({job.live_layers + 1} at a time)"
    yield f"Per {device}, within a step (at most)"
    for text, nbytes in (
        ("gradients being reduced", memory.bucket + memory.waiting),
        (gathered, memory.layers),
        ("head or embedding, gathered", memory.head),
        ("dequantized weights of a layer" if job.keeps_decoded else "largest dequantized weight", memory.decoded),
        (kept, memory.kept),
        (f"activations of one layer{estimate}", memory.recomputed),
        ("logits and loss", memory.logits),
        ("fp32 gradients of the optimizer step", memory.step),
    ):
        if nbytes:
            yield _line(text, nbytes)
    for text, nbytes in memory.phases.items():
        yield _line(f"peak: {text}", nbytes)
    yield _line("host memory of a rank", memory.host)


def _verdict(found: Forecast) -> Iterator[str]:
    if found.limit is None:
        yield (
            "No memory limit is given: whether it fits is unknown."
            if found.job.on_gpu
            else "The ranks share the memory of their host, which is unknown here: whether it fits is too."
        )
        return
    peak = found.memory.peak
    relation = "fits" if found.fits else "does not fit"
    yield f"It {relation}: {size(peak)} of {size(found.limit)}"
    if not found.fits:
        if not found.remedies:
            several = (
                "train adapters" if not found.job.adapts else "combine NF4, checkpointing, small batches, more nodes"
            )
            yield f"  no single setting makes it fit: {several}"
        for remedy in found.remedies:
            yield f"  would fit with {remedy}"


def _sharding(found: Forecast) -> Iterator[str]:
    if found.sharding is None or len(found.sharding.peaks) < 2:
        return
    yield ""
    yield "Frozen parameters shared within (shard_within), and the peak then"
    for within, peak in found.sharding.peaks.items():
        yield _line(f"{within}{' (planned)' * (within == found.job.shard_within)}", peak)
    if found.limit is not None:
        yield f"  auto takes: {found.sharding.within}, the smallest that fits with {MARGIN:.0%} to spare"


def _network(found: Forecast) -> Iterator[str]:
    traffic = found.traffic
    yield "Communication of a step"
    yield _line("sent by every rank", traffic.per_rank)
    yield _line("into every node from others", traffic.into_node)
    for c in traffic.collectives:
        where = "across nodes" if c.crosses else "within a node"
        yield _line(f"  {c.what} over {c.ranks} ranks, {where}", c.nbytes)


def _rest(found: Forecast) -> Iterator[str]:
    start, step, job = found.initialisation, found.step, found.job
    yield "Disk and time"
    yield _line("read at the start, all ranks", found.disk_reads)
    yield _line("a checkpoint", found.checkpoint)
    if start is not None:
        parts = ", ".join(
            f"{name} {value:.1f}"
            for name, value in (
                ("reading", start.read),
                ("products", start.products),
                ("small problems", start.small),
                ("communication", start.communicate),
                ("quantizing", start.encode),
                ("writing and reading the cache", start.write),
            )
            if value
        )
        yield f"  initialisation: {start.total:.1f} s ({parts})"
    if step is not None:
        yield (
            f"  step: {step.least:.2f} to {step.most:.2f} s ({step.compute:.2f} computing, {step.communicate:.2f} "
            + ("communicating)")
        )
        if job.steps is not None:
            hours = [job.steps * seconds / 3600 for seconds in (step.least, step.most)]
            yield f"  {job.steps} steps: {hours[0]:.1f} to {hours[1]:.1f} h"
        yield "  Seconds are computed from assumed rates of a GPU cluster, not measured."


def _line(text: str, nbytes: int) -> str:
    return f"  {text:<54}{size(nbytes):>12}"
