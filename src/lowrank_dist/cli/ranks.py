"""Ranks of a command that runs without a Trainer: started by torchrun, by SLURM, or by the command on this host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lowrank_dist.cluster.watch import PeerWatch
from lowrank_dist.distributed.group import ShardGroup, ignore_renamed
from lowrank_dist.errors import InputError

#: Seconds that a rank is left for ending by itself when another one has ended.
_WITHIN = 10.0

if TYPE_CHECKING:  # it takes seconds, and the process that starts ranks does without
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment


def launched() -> bool:
    """Whether torchrun or SLURM has started this process as one of its ranks."""
    if not any(name.startswith(("SLURM_", "TORCHELASTIC_")) for name in os.environ):
        return False
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    return TorchElasticEnvironment.detect() or SLURMEnvironment.detect()


def first_on_host() -> bool:
    """Whether this process is the first rank of its host."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0) == 0


def local_ranks() -> int:
    """Ranks on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1)


def launch(argv: Sequence[str], devices: int) -> int:
    """Run ``lowrank-dist argv`` with `devices` processes on this host; returns the exit status.

    SIGTERM and SIGINT end these processes too.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // devices))}
    process = subprocess.Popen([*command, "-m", "lowrank_dist.cli", *argv], env=threads | os.environ)
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, lambda number, _: process.send_signal(number))
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def shard_group(accelerator: str, *, sharded_model: bool = False) -> Iterator[tuple[ShardGroup, torch.device]]:
    """The group of all ranks, and the device of this one.

    Parameters
    ----------
    accelerator
        ``cpu``, ``gpu``, or ``auto``: a GPU if one is visible.
    sharded_model
        Whether a model will be partitioned. DeepSpeed then needs a process group even for a single process, and
        ``LOCAL_RANK``; both exist inside the context.

    Raises
    ------
    InputError
        If `accelerator` is ``gpu`` and no GPU is visible.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise InputError("--accelerator gpu: no CUDA device is visible; use cpu, or check the driver")
    ignore_renamed()
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    environment = _environment()
    local_rank = 0 if environment is None else environment.local_rank()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if environment is None and not sharded_model:
        yield ShardGroup(device=device), device
        return
    if on_gpu:
        torch.cuda.set_device(device)
    ranks: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if environment is not None:
        ranks = {"rank": environment.global_rank(), "world_size": environment.world_size()}
    before = os.environ.get("LOCAL_RANK")
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(minutes=30), **ranks)
    try:
        if sharded_model:
            os.environ["LOCAL_RANK"] = str(local_rank)
        group = ShardGroup(device=device)
        with PeerWatch(group, within=_WITHIN):
            yield group, device
    finally:
        dist.destroy_process_group()
        if before is None:
            os.environ.pop("LOCAL_RANK", None)


def _environment() -> TorchElasticEnvironment | SLURMEnvironment | None:
    """The launcher's environment, with ``MASTER_ADDR`` and ``MASTER_PORT`` set; None without a launcher."""
    if not launched():
        return None
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    environment = SLURMEnvironment(auto_requeue=False)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    return environment
