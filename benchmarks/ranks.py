"""Runs a function in fresh processes: one for a peer, or the ranks of a gloo group."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lowrank_dist.distributed.group import LOW_LATENCY

# Imported once, in a server process that does nothing else; every measured process forks from it.
_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = [
    "bitsandbytes",
    "lowrank_dist.methods",
    "lowrank_dist.quantization.nf4",
    "lowrank_dist.decomposition.schedule",
    "lowrank_dist.model.skeleton",
    "peft",
    "torch.utils.flop_counter",
    "transformers.models.llama.modeling_llama",
]
_CONTEXT.set_forkserver_preload(_PRELOADED)


def preload(*modules: str) -> None:
    """Import `modules` in the server process too; before the first ranks are run."""
    _CONTEXT.set_forkserver_preload([*_PRELOADED, *modules])


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, threads: int = 1, group: bool | None = None
) -> list[Any]:
    """``function(*args)`` on `world_size` new processes of `threads` threads; what each returned, by rank.

    Each has as many cores for itself, where there are enough of them, as SLURM binds tasks: what a rank reads ahead in
    a thread of its own would else cost nothing on one rank, which has idle cores beside it, and time on several.
    They have a process group if they are several, or as `group` says: without one they only run side by side.
    """
    grouped = world_size > 1 if group is None else group
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(world_size, mp_context=_CONTEXT) as pool:
        store = f"file://{folder}/store"
        futures = [
            pool.submit(_rank, r, world_size, grouped, store, threads, function, args) for r in range(world_size)
        ]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        return [future.result() for future in futures]


def run_alone(function: Callable[..., Any], *args: Any, threads: int = 1) -> Any:
    """``function(*args)`` in one new process of `threads` threads."""
    return run_ranks(1, function, *args, threads=threads)[0]


def _rank(
    rank: int,
    world_size: int,
    grouped: bool,
    store: str,
    threads: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> Any:
    warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for an old name
    torch.set_num_threads(threads)
    cores = sorted(os.sched_getaffinity(0))
    if world_size * threads <= len(cores):
        os.sched_setaffinity(0, cores[rank * threads : (rank + 1) * threads])
    torch.manual_seed(0)
    if not grouped:
        rank, world_size = 0, 1
    os.environ.setdefault(LOW_LATENCY, "1")  # ranks have their cores for themselves
    # what torchrun sets: Lightning then takes the processes as they are
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in places.items()}, TORCHELASTIC_RUN_ID="benchmark")
    if not grouped:
        return function(*args)
    dist.init_process_group("gloo", store, rank=rank, world_size=world_size, timeout=timedelta(minutes=30))
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()
