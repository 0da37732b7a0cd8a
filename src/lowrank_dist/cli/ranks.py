"""The ranks of a command that runs without a Trainer: torchrun's, SLURM's, or processes of its own on this host."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from lowrank_dist.comm import ShardGroup
from lowrank_dist.errors import InputError


def launched() -> bool:
    """Whether torchrun or SLURM has started this process as one of its ranks."""
    return TorchElasticEnvironment.detect() or SLURMEnvironment.detect()


def first_on_host() -> bool:
    """Whether this process is the first rank of its host."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0) == 0


def local_ranks() -> int:
    """Ranks on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1)


def launch(argv: Sequence[str], devices: int) -> int:
    """Run ``lowrank-dist argv`` with `devices` processes on this host; returns the exit status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // devices))}
    return subprocess.run([*command, "-m", "lowrank_dist.cli", *argv], env=threads | os.environ).returncode


@contextmanager
def shard_group(accelerator: str) -> Iterator[tuple[ShardGroup, torch.device]]:
    """The group of all ranks, and the device of this one.

    Parameters
    ----------
    accelerator
        ``cpu``, ``gpu``, or ``auto``: a GPU where there is one.

    Raises
    ------
    InputError
        Where a GPU is asked for and none is visible.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise InputError("--accelerator gpu: no CUDA device is visible; use cpu, or check the driver")
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    if not launched():
        device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        yield ShardGroup(device=device), device
        return
    if TorchElasticEnvironment.detect():
        environment: TorchElasticEnvironment | SLURMEnvironment = TorchElasticEnvironment()
    else:
        environment = SLURMEnvironment(auto_requeue=False)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    device = torch.device("cuda", environment.local_rank()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        rank=environment.global_rank(),
        world_size=environment.world_size(),
        timeout=timedelta(minutes=30),
    )
    try:
        yield ShardGroup(device=device), device
    finally:
        dist.destroy_process_group()
