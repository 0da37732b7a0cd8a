"""The environment of a task: rendezvous, network interface, caches, and a node and rank prefix on log lines."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import psutil

from lowrank_dist.cluster.allocation import Allocation
from lowrank_dist.errors import InputError
from lowrank_dist.storage.disk import private_directory

_STALE = 3600  # seconds after which the lock of a build counts as abandoned


def set_up(allocation: Allocation) -> None:
    """Set environment variables of torch, NCCL, gloo and DeepSpeed, unless the user has set them.

    Must be called before any of these is imported.
    """
    env = os.environ
    if allocation.on_slurm:
        env.setdefault("MASTER_ADDR", allocation.hosts[0])
    else:  # the variables that torchrun sets
        for name in [name for name in env if name.startswith("SLURM_")]:
            del env[name]
        rank, ranks = str(allocation.rank), str(allocation.ranks)
        env.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, GROUP_RANK="0")
        env["TORCHELASTIC_RUN_ID"] = allocation.job_id
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", str(20000 + int(allocation.job_id) % 10000))
    interface = interface_to(_peer(allocation))
    if interface is not None:
        env.setdefault("GLOO_SOCKET_IFNAME", interface)
        env.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    # a collective that fails or times out ends the process instead of leaving it waiting
    env.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    env.setdefault("TORCH_EXTENSIONS_DIR", str(extension_cache(owner=allocation.local_rank == 0)))


def _peer(allocation: Allocation) -> str:
    """A node that this one must reach."""
    if allocation.nodes == 1:
        return "127.0.0.1"
    return allocation.hosts[0 if allocation.node else 1]


def interface_to(host: str) -> str | None:
    """Name of the network interface that leads to `host`; None if it cannot be determined."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing: the kernel chooses a route
        except OSError:
            return None
        address = probe.getsockname()[0]
    names = (name for name, found in psutil.net_if_addrs().items() if address in (one.address for one in found))
    return next(names, None)


def extension_cache(*, owner: bool) -> Path:
    """Directory on this node for operators that DeepSpeed compiles, shared by all ranks and jobs of the user.

    Parameters
    ----------
    owner
        Whether this rank removes the locks of killed builds, for which later builds would wait forever.
    """
    versions = f"torch{version('torch')}-deepspeed{version('deepspeed')}-py{sys.version_info[0]}.{sys.version_info[1]}"
    cache = Path(tempfile.gettempdir(), f"lowrank_dist-{os.getuid()}", versions)
    try:
        for directory in (cache.parent, cache):
            private_directory(directory, uses_contents=True)
    except InputError:
        return Path(tempfile.mkdtemp(prefix="lowrank_dist-"))  # what others can write to cannot be executed
    if owner:
        for lock in cache.glob("*/lock"):
            if time.time() - lock.stat().st_mtime > _STALE:
                lock.unlink(missing_ok=True)
    return cache


class PrefixedStream:
    """A text stream that puts a prefix before every line."""

    def __init__(self, stream: TextIO, prefix: str) -> None:
        self._stream, self._prefix, self._at_start = stream, prefix, True

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            self._stream.write(f"{self._prefix}{line}" if self._at_start else line)
            self._at_start = line.endswith(("\n", "\r"))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prefix_output(allocation: Allocation) -> None:
    """Prefix every later line of Python's stdout and stderr with node and rank."""
    prefix = f"[{allocation.host} {allocation.rank}] "
    sys.stdout, sys.stderr = PrefixedStream(sys.stdout, prefix), PrefixedStream(sys.stderr, prefix)
