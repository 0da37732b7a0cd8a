"""Runs a function in fresh processes: one for a peer, or the ranks of a gloo group."""

from __future__ import annotations

import multiprocessing
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Imported once, in a server process that does nothing else; every measured process forks from it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "bitsandbytes",
        "lowrank_dist.methods",
        "lowrank_dist.nf4",
        "lowrank_dist.planner",
        "lowrank_dist.skeleton",
        "peft",
        "torch.utils.flop_counter",
        "transformers.models.llama.modeling_llama",
    ]
)


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, threads: int = 1) -> list[Any]:
    """``function(*args)`` on `world_size` new processes of `threads` threads; what each returned, by rank."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(world_size, mp_context=_CONTEXT) as pool:
        store = f"file://{folder}/store"
        futures = [pool.submit(_rank, r, world_size, store, threads, function, args) for r in range(world_size)]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        return [future.result() for future in futures]


def run_alone(function: Callable[..., Any], *args: Any, threads: int = 1) -> Any:
    """``function(*args)`` in one new process of `threads` threads."""
    return run_ranks(1, function, *args, threads=threads)[0]


def _rank(
    rank: int, world_size: int, store: str, threads: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for an old name
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if world_size == 1:
        return function(*args)
    dist.init_process_group("gloo", store, rank=rank, world_size=world_size, timeout=timedelta(minutes=30))
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()
