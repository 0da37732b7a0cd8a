"""Health check of all nodes before a job runs for hours: devices, memory, network, software, disk."""

from __future__ import annotations

import os
import platform
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from lowrank_dist.distributed.group import ShardGroup

PACKAGES = ("torch", "deepspeed", "lightning", "transformers", "peft", "bitsandbytes", "safetensors", "lowrank-dist")

_MATRIX = 1024  # side of the matrices that every device multiplies
_ROUNDS = 3  # timed all-reduces, of which the fastest counts
_SLOW = 0.5  # share of the median bandwidth below which a node is slow
_FREE = 0.8  # share of the median free memory below which another process occupies the device
#: Seconds within which a file of another node must appear (NFS caches directories).
VISIBLE = 10.0


class HealthError(RuntimeError):
    """Unusable nodes, by name. A job is then requeued, because another allocation may work."""


@dataclass(frozen=True, kw_only=True)
class RankHealth:
    """The health of a rank as found by the rank itself."""

    host: str
    rank: int
    device: str
    free_bytes: int
    versions: dict[str, str]
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class NodeHealth:
    """The health of a node.

    Attributes
    ----------
    within
        Algorithm bandwidth of an all-reduce between the ranks of the node, in bytes per second; None for one rank.
    between
        Algorithm bandwidth of an all-reduce with the next node, one rank each, in bytes per second; None for one node.
    """

    host: str
    ranks: int
    free_bytes: int
    within: float | None
    between: float | None


@dataclass(frozen=True, kw_only=True)
class HealthReport:
    """The result of the check.

    Attributes
    ----------
    nodes
        Health of every node.
    problems
        A line for every reason why the job cannot run, with its node.
    warnings
        A line for every node that is much slower than the others.
    """

    nodes: tuple[NodeHealth, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    def as_table(self) -> str:
        """Format a table with a line for each node."""
        lines = [f"{'node':<20} {'ranks':>5} {'least free':>11} {'all-reduce within':>18} {'with next node':>15}"]
        for node in self.nodes:
            lines.append(
                f"{node.host:<20} {node.ranks:>5} {node.free_bytes / 2**30:>7.1f} GiB {_speed(node.within):>18} "
                f"{_speed(node.between):>15}"
            )
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """Convert to a dict for JSON."""
        return asdict(self)


def _speed(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e9:.2f} GB/s"


def check_health(group: ShardGroup, device: torch.device, directory: Path, *, host: str) -> HealthReport:
    """Check every node of the job. Collective over all ranks.

    Issues object all-gathers, and all-reduces of 64 MiB (4 MiB on CPUs) between the ranks of each node, then between
    two nodes at a time.

    Parameters
    ----------
    group
        All ranks.
    device
        Device of this rank.
    directory
        Directory for checkpoints. It is created if missing, and all ranks must see the files of each other in it.
    host
        Name of this rank's node.

    Returns
    -------
    HealthReport
        The same report on every rank.
    """
    ranks: list[RankHealth] = group.gather_objects(_own_health(group.rank, device, host))
    by_host: dict[str, list[RankHealth]] = {}
    for rank in ranks:
        by_host.setdefault(rank.host, []).append(rank)
    problems = [f"{rank.host} (rank {rank.rank}): {rank.problem}" for rank in ranks if rank.problem]
    problems += _differing_versions(by_host) + _occupied_devices(ranks)
    if not problems:  # the following collectives would hang on a broken device
        problems += _hosts_without(group, directory, ranks)
    within: dict[str, float] = {}
    between: dict[str, float] = {}
    if not problems and group.size > 1:
        nbytes = 64 * 2**20 if device.type == "cuda" else 4 * 2**20
        within, between = _bandwidths(group, device, {h: [r.rank for r in on] for h, on in by_host.items()}, nbytes)
    nodes = tuple(
        NodeHealth(
            host=name,
            ranks=len(on_node),
            free_bytes=min(rank.free_bytes for rank in on_node),
            within=within.get(name),
            between=between.get(name),
        )
        for name, on_node in by_host.items()
    )
    return HealthReport(nodes=nodes, problems=tuple(problems), warnings=tuple(slow_nodes(nodes)))


def _own_health(rank: int, device: torch.device, host: str) -> RankHealth:
    problem, free = None, 0
    try:
        ones = torch.ones(_MATRIX, _MATRIX, device=device)
        if float((ones @ ones).sum()) != float(_MATRIX**3):
            problem = f"{device} computes wrong results: the product of two matrices of ones is incorrect"
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
        else:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except RuntimeError as error:
        problem = f"{device} does not work: {str(error).splitlines()[0]}"
    return RankHealth(
        host=host, rank=rank, device=str(device), free_bytes=free, versions=dict(_versions()), problem=problem
    )


def _versions() -> Iterable[tuple[str, str]]:
    yield "python", platform.python_version()
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "none"


def _differing_versions(by_host: dict[str, list[RankHealth]]) -> list[str]:
    """Problems of hosts whose package versions differ from those of most ranks."""
    problems = []
    everyone = [rank for on_node in by_host.values() for rank in on_node]
    for package in everyone[0].versions:
        common, _ = Counter(rank.versions[package] for rank in everyone).most_common(1)[0]
        for host, on_node in by_host.items():
            others = sorted({rank.versions[package] for rank in on_node} - {common})
            if others:
                problems.append(f"{host}: {package} {', '.join(others)}, elsewhere {common}")
    return problems


def _occupied_devices(ranks: Sequence[RankHealth]) -> list[str]:
    """Problems of GPUs with much less free memory than the others, which another process occupies."""
    usual = median(rank.free_bytes for rank in ranks)
    return [
        f"{rank.host} (rank {rank.rank}): {rank.free_bytes / 2**30:.1f} GiB free on {rank.device}, elsewhere "
        f"{usual / 2**30:.1f} GiB"
        for rank in ranks
        if rank.device.startswith("cuda") and rank.free_bytes < _FREE * usual
    ]


def _hosts_without(group: ShardGroup, directory: Path, ranks: Sequence[RankHealth]) -> list[str]:
    """Problems of hosts that do not see a file that rank 0 writes to `directory`."""
    token = group.broadcast_object(secrets.token_hex(8))
    path = directory / f".shared-{token}"
    failed: object = None
    if group.rank == 0:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            failed = str(error)
    failed = group.broadcast_object(failed)
    if failed:
        return [f"{ranks[0].host} cannot write to the checkpoint directory {directory}: {failed}"]
    deadline = time.monotonic() + VISIBLE
    while not (seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    seeing = group.gather_objects(seen)
    if group.rank == 0:
        path.unlink(missing_ok=True)
    blind = sorted({rank.host for rank, sees in zip(ranks, seeing, strict=True) if not sees})
    return [f"{host} does not see the checkpoint directory {directory} of {ranks[0].host}" for host in blind]


def _bandwidths(
    group: ShardGroup, device: torch.device, ranks: dict[str, list[int]], nbytes: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Bandwidth within every host and with the next one, by host; pairs of nodes are measured one at a time."""
    hosts = list(ranks)
    # Every rank must create every group, in the same order.
    inside = {host: dist.new_group(members) for host, members in ranks.items() if len(members) > 1}
    pairs = [(host, hosts[(i + 1) % len(hosts)]) for i, host in enumerate(hosts)][: len(hosts) if len(hosts) > 2 else 1]
    across = {} if len(hosts) == 1 else {a: dist.new_group([ranks[a][0], ranks[b][0]]) for a, b in pairs}
    measured: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for host in inside:
        if group.rank in ranks[host]:
            measured[0][host] = _all_reduce_speed(inside[host], device, nbytes)
    for a, b in pairs if across else []:
        if group.rank in (ranks[a][0], ranks[b][0]):
            measured[1][a] = _all_reduce_speed(across[a], device, nbytes)
        group.gather_objects(None)  # a barrier: the next pair starts when this one is done
    within: dict[str, float] = {}
    between: dict[str, float] = {}
    for own_within, own_between in group.gather_objects(measured):
        within |= own_within
        between |= own_between
    for part in (*inside.values(), *across.values()):
        if part is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(part)
    if len(hosts) == 2:
        between[hosts[1]] = between[hosts[0]]
    return within, between


def _all_reduce_speed(part: dist.ProcessGroup, device: torch.device, nbytes: int) -> float:
    data = torch.zeros(nbytes // 4, device=device)
    best = float("inf")
    for _ in range(_ROUNDS + 1):  # the first also connects the ranks
        _wait(device)
        began = time.perf_counter()
        dist.all_reduce(data, group=part)
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return nbytes / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def slow_nodes(nodes: Sequence[NodeHealth]) -> list[str]:
    """Describe the nodes with less than half the median bandwidth, if at least three can be compared.

    Between nodes, a node is slow if both its connections are.
    """
    found = []
    within = [node.within for node in nodes if node.within is not None]
    if len(within) > 2:
        usual = median(within)
        found += [
            f"{node.host}: all-reduce within the node at {_speed(node.within)}, elsewhere {_speed(usual)}"
            for node in nodes
            if node.within is not None and node.within < _SLOW * usual
        ]
    between = [node.between for node in nodes if node.between is not None]
    if len(nodes) > 2 and len(between) == len(nodes):
        usual = median(between)
        for i, node in enumerate(nodes):
            best = max(between[i], between[i - 1])
            if best < _SLOW * usual:
                found.append(f"{node.host}: all-reduce with other nodes at {_speed(best)}, elsewhere {_speed(usual)}")
    return found
