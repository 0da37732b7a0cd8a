"""The schedule: how many ranks decompose each matrix together, decided by a cost model that is measured at the start.

Sharing every matrix by rows over all P ranks takes the least memory, and no rank ever holds a whole matrix. It is slow
where unshared costs dominate: the latency of the collectives, and the small problems that all ranks solve or wait for.
That happens on many ranks, on a slow network and for small matrices. P/s matrices are then decomposed at the same time,
each by s consecutive ranks that hold at most `MAX_BLOCK_BYTES` of it each, and one all-to-all of encoded bytes reshards
the results for all ranks. One exchange takes several matrices, up to `MAX_WAITING_BYTES`, because all ranks wait for
the slowest one at each exchange.

The cost model for one matrix and s ranks, with F the flop rate of a rank and l_s, b_s the latency and bandwidth of an
all-reduce over s ranks (0 and infinite for s = 1), is ::

    t(s) = sharded / (s F) + replicated / F + collectives l_s + bytes / b_s

P/s matrices run at once, so that a matrix costs ``t(s) s / P``. For s < P its share of the all-to-all is added.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lowrank_dist.decomposition.walk import Batch, DecomposedMatrix, Walk
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import InputError
from lowrank_dist.methods.base import Method, Work
from lowrank_dist.methods.frozen import method_for
from lowrank_dist.model.plan import PlannedMatrix
from lowrank_dist.quantization.format import ResidualFormat

MAX_BLOCK_BYTES = 2**27  # limit of one rank's fp32 rows of a matrix that fewer than all ranks decompose
MAX_WAITING_BYTES = 2**23  # limit of one rank's encoded matrices in one exchange of more than one round of them


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Measured speed of a rank and of the network; the slowest rank counts.

    Attributes
    ----------
    flops
        Flop/s of one rank in fp32 matrix products.
    latency, bandwidth
        Seconds of a small all-reduce, and bytes/s of a large one, by the number of consecutive ranks.
    """

    flops: float
    latency: Mapping[int, float]
    bandwidth: Mapping[int, float]

    def seconds(self, work: Work, ranks: int) -> float:
        """Seconds of `work` shared by `ranks` ranks, ``t(s)`` of the module's docstring."""
        compute = (work.sharded_flops / ranks + work.replicated_flops) / self.flops
        if ranks == 1:
            return compute
        return compute + work.collectives * self.latency[ranks] + work.reduced_bytes / self.bandwidth[ranks]

    def __str__(self) -> str:
        network = "; ".join(
            f"all-reduce over {ranks} ranks {self.latency[ranks] * 1e6:.0f} us + {self.bandwidth[ranks] / 1e9:.2f} GB/s"
            for ranks in sorted(self.latency)
        )
        return f"{self.flops / 1e9:.0f} Gflop/s a rank{'; ' if network else ''}{network}"


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How matrices are shared while they are decomposed.

    Parameters
    ----------
    ranks_per_matrix
        Number of consecutive ranks that share every matrix; it must divide the number of ranks. None: the cost model
        decides.
    ranks_per_node
        Number of ranks of one node, a candidate beside all ranks and one.
    """

    ranks_per_matrix: int | None = None
    ranks_per_node: int = 1


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which ranks decompose which matrix.

    Attributes
    ----------
    batches
        The batches in the order of the walk.
    machine
        The speeds that it was decided from; None if there was nothing to decide.
    seconds
        Prediction of the cost model for the decompositions, without reading, quantizing and writing.
    """

    batches: tuple[Batch, ...]
    machine: Machine | None
    seconds: float

    def __str__(self) -> str:
        counts: dict[int, int] = {}
        for batch in self.batches:
            counts[batch.group_size] = counts.get(batch.group_size, 0) + len(batch.matrices)
        groups = ", ".join(f"{count} over {size} rank{'s'[: size > 1]} each" for size, count in sorted(counts.items()))
        if self.machine is None:
            return f"matrices: {groups}"
        return f"matrices: {groups}; predicted {self.seconds:.1f} s of linear algebra ({self.machine})"


def scheduled(
    walk: Walk,
    planned: Sequence[PlannedMatrix],
    sharding: Sharding | None = None,
    announce: Callable[[str], object] = lambda _: None,
) -> Iterator[DecomposedMatrix]:
    """Run `walk` over the matrices as `plan_schedule` decides; rank 0 passes the decision to `announce`. Collective."""
    schedule = plan_schedule(planned, walk.init, walk.residual, walk.group, sharding=sharding, device=walk.device)
    if walk.group.rank == 0 and planned:
        announce(str(schedule))
    yield from walk.run(schedule.batches)


def candidates(group: ShardGroup, ranks_per_node: int) -> list[int]:
    """Group sizes to choose from: all ranks, the ranks of one node, one rank."""
    sizes = {group.size, 1}
    if group.size % ranks_per_node == 0:
        sizes.add(ranks_per_node)
    return sorted(sizes)


def measure(group: ShardGroup, sizes: Sequence[int], device: torch.device) -> Machine:
    """Time a matrix product and a few all-reduces, which takes about 15 ms. Collective."""
    left, right = torch.ones(768, 768, device=device), torch.ones(768, 256, device=device)
    product = _best(lambda: left @ right, device)
    slowest = [product]
    small, large = torch.zeros(256, device=group.device), torch.zeros(2**20, device=group.device)
    for size in sizes:
        if size > 1:
            part = group.split(size)
            slowest += [_best(lambda t=t, p=part: p.sum(t), device) for t in (small, large)]  # type: ignore[misc]
    times = group.max(torch.tensor(slowest, dtype=torch.float64, device=group.device)).tolist()
    shared = [size for size in sizes if size > 1]
    return Machine(
        flops=2 * 768 * 768 * 256 / times[0],
        latency={size: times[1 + 2 * i] for i, size in enumerate(shared)},
        bandwidth={
            size: large.nbytes / max(times[2 + 2 * i] - times[1 + 2 * i], 1e-9) for i, size in enumerate(shared)
        },
    )


def _best(run: Callable[[], object], device: torch.device, repeats: int = 2) -> float:
    """Shortest of `repeats` runs, in seconds, after one run to warm up."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def plan_schedule(
    planned: Sequence[PlannedMatrix],
    method: Method,
    residual: ResidualFormat,
    group: ShardGroup,
    *,
    sharding: Sharding | None = None,
    device: torch.device | None = None,
    machine: Machine | None = None,
) -> Schedule:
    """Decide for every matrix how many ranks decompose it. Collective unless forced or given a `machine`.

    Parameters
    ----------
    planned
        The matrices.
    method, residual
        How matrices are decomposed, and how the residual is stored.
    group
        All ranks.
    sharding
        The user's settings.
    device
        Device that matrices are decomposed on.
    machine
        Speeds to use instead of measuring.

    Raises
    ------
    InputError
        If `ranks_per_matrix` does not divide the number of ranks.
    """
    sharding = sharding or Sharding()
    ranks_per_matrix = sharding.ranks_per_matrix
    if ranks_per_matrix is not None and (ranks_per_matrix < 1 or group.size % ranks_per_matrix):
        divisors = ", ".join(str(n) for n in range(1, group.size + 1) if group.size % n == 0)
        raise InputError(
            f"ranks_per_matrix={ranks_per_matrix} does not divide the {group.size} ranks; leave it out, or use one of "
            f"{divisors}"
        )
    whole = method.statistic is not None or group.size == 1
    if ranks_per_matrix is not None or whole:
        size = group.size if ranks_per_matrix is None or whole else ranks_per_matrix
        return Schedule(batches=tuple(_batches(planned, size, group.size, residual)), machine=None, seconds=0.0)
    per_node = sharding.ranks_per_node if machine else _agreed(sharding.ranks_per_node, group)
    sizes = candidates(group, per_node)
    machine = machine or measure(group, sizes, device or torch.device("cpu"))
    chosen: dict[int, list[PlannedMatrix]] = {}
    seconds = 0.0
    for matrix in planned:
        costs = {size: _cost(matrix, size, method, residual, group.size, machine) for size in sizes}
        best = min(costs, key=lambda size: (costs[size], -size))
        seconds += costs[best]
        chosen.setdefault(best, []).append(matrix)
    # all ranks share the matrices of an incomplete last round, in which some ranks would be idle
    left: list[PlannedMatrix] = []
    for size, matrices in chosen.items():
        if size < group.size:
            matrices.sort(key=lambda m: (m.rows * m.columns, m.rows, m.rank), reverse=True)
            odd = len(matrices) % (group.size // size)
            left += matrices[len(matrices) - odd :]
            del matrices[len(matrices) - odd :]
    chosen[group.size] = chosen.get(group.size, []) + left
    batches = [
        batch for size, matrices in sorted(chosen.items()) for batch in _batches(matrices, size, group.size, residual)
    ]
    return Schedule(batches=tuple(batches), machine=machine, seconds=seconds)


def _agreed(ranks_per_node: int, group: ShardGroup) -> int:
    """Return `ranks_per_node`, or 1 if nodes have different numbers of ranks; the same on all ranks. One all-reduce."""
    bounds = group.max(torch.tensor([ranks_per_node, -ranks_per_node], device=group.device))
    return ranks_per_node if int(bounds[0]) == -int(bounds[1]) else 1


def _batches(
    matrices: Sequence[PlannedMatrix], size: int, world_size: int, residual: ResidualFormat
) -> Iterator[Batch]:
    if size == world_size:  # nothing is exchanged
        yield from (Batch(group_size=size, matrices=(matrix,)) for matrix in matrices)
        return
    step, batch, waiting = world_size // size, list[PlannedMatrix](), 0
    for first in range(0, len(matrices), step):
        turn = matrices[first : first + step]
        nbytes = max(_encoded_bytes(matrix, size, residual) for matrix in turn) // size
        if batch and waiting + nbytes > MAX_WAITING_BYTES:
            yield Batch(group_size=size, matrices=tuple(batch))
            batch, waiting = [], 0
        batch += turn
        waiting += nbytes
    if batch:
        yield Batch(group_size=size, matrices=tuple(batch))


def _encoded_bytes(matrix: PlannedMatrix, size: int, residual: ResidualFormat) -> int:
    """Bytes of the residual as `size` ranks shard it, and of factors in fp32."""
    residual = residual.of_matrix(matrix.key)
    storages = residual.storages(matrix.row_partition(size, block=residual.block)).values()
    nbytes = sum(storage.numel * storage.dtype.itemsize for storage in storages)
    return nbytes + 4 * matrix.rank * (matrix.rows + matrix.columns)


def _cost(
    matrix: PlannedMatrix, size: int, method: Method, residual: ResidualFormat, world_size: int, machine: Machine
) -> float:
    """Seconds that a matrix takes, divided by the number of matrices that run at the same time."""
    if size < world_size and -(-matrix.rows // size) * matrix.columns * 4 > MAX_BLOCK_BYTES:
        return float("inf")
    seconds = (
        machine.seconds(method_for(matrix, method).work(matrix.rows, matrix.columns, matrix.rank), size)
        * size
        / world_size
    )
    if size == world_size:
        return seconds
    nbytes = _encoded_bytes(matrix, size, residual)
    return seconds + (machine.latency[world_size] + nbytes / machine.bandwidth[world_size]) * size / world_size
