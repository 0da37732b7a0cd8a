"""Runs a function on N ranks, each a process of its own (gloo; NCCL on CUDA), and brings back what each returned."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from queue import Empty
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed import TCPStore

CONTEXT = multiprocessing.get_context("forkserver")
# Imported once, in a server process that does nothing else: ranks fork from it in milliseconds.
CONTEXT.set_forkserver_preload(["lowrank_dist.training.strategy", "lowrank_dist.callbacks", "torch.testing"])


class RankFailedError(AssertionError):
    """A rank raised, died or hung; the text holds its traceback."""


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 240,
    fresh: bool = False,
    cuda: bool = True,
) -> list[Any]:
    """``function(*args)`` on `world_size` ranks of a gloo group; their results by rank (picklable).

    Ranks have the environment of the first call, in which everything was imported; `fresh` ones that of this call, and
    take seconds to import it. Where a CUDA device is visible all are: to import bitsandbytes starts CUDA, which does
    not survive a fork. Without `cuda` they see no such device.

    Raises
    ------
    RankFailedError
        With the traceback of the first rank that failed; the others are ended.
    """
    outcomes = run_ranks_catching(world_size, function, *args, timeout=timeout, fresh=fresh, cuda=cuda)
    errors = {rank: error for rank, (_, error) in enumerate(outcomes) if error is not None}
    if errors:
        # those that only heard of another's error come last
        first = min(errors, key=lambda rank: ("RemoteError" in errors[rank].splitlines()[-1], rank))
        others = "".join(f"\nrank {rank}: {error.splitlines()[-1]}" for rank, error in errors.items() if rank != first)
        raise RankFailedError(f"rank {first} of {world_size}:\n{errors[first]}{others}")
    return [result for result, _ in outcomes]


def run_ranks_catching(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 240,
    fresh: bool = False,
    cuda: bool = True,
) -> list[tuple[Any, str | None]]:
    """Like `run_ranks`, with ``(result, traceback or None)`` for every rank; only a hang raises."""
    fresh = fresh or torch.cuda.device_count() > 0
    context: Any = multiprocessing.get_context("spawn") if fresh else CONTEXT
    queue = context.Queue()
    store = meeting_place()
    ranks = [
        context.Process(target=_rank_main, args=(queue, rank, world_size, store.port, function, args), daemon=False)
        for rank in range(world_size)
    ]
    with patch.dict(os.environ, {} if cuda else {"CUDA_VISIBLE_DEVICES": ""}):
        for process in ranks:
            process.start()
    outcomes: dict[int, tuple[Any, str | None]] = {}
    dead: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(outcomes) < world_size:
            try:
                rank, result, error = queue.get(timeout=0.2)
                outcomes[rank] = (None if result is None else pickle.loads(result), error)
            except Empty:
                # of those that were dead a moment ago, nothing is on its way any more
                outcomes |= {
                    rank: (None, f"rank {rank} died with exit code {code}")
                    for rank, code in dead.items()
                    if rank not in outcomes
                }
                dead = {rank: process.exitcode for rank, process in enumerate(ranks) if process.exitcode}
                if time.monotonic() > deadline:
                    raise RankFailedError(
                        f"ranks {sorted(set(range(world_size)) - set(outcomes))} hang after {timeout} s; "
                        f"the others: {outcomes}"
                    ) from None
    finally:
        for process in ranks:
            process.join(timeout=5 if len(outcomes) == world_size else 0)
            if process.is_alive():
                process.kill()
                process.join()
    return [outcomes[rank] for rank in range(world_size)]


def meeting_place() -> TCPStore:
    """Where ranks find each other; served from here, so that nobody can take the port before they come."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def environment_of(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun sets, for ranks that meet at `port`: Lightning then takes the processes as they are."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",  # whatever the name of the machine resolves to
        # Creating a gloo group does not wait for the others to have connected: a rank whose function communicates
        # nothing would be gone before they did.
        "TORCH_DIST_INIT_BARRIER": "1",
    }


def _rank_main(queue: Any, rank: int, world_size: int, port: int, function: Any, args: tuple[Any, ...]) -> None:
    os.environ.update(environment_of(rank, world_size, port))
    import torch.distributed as dist

    gc.freeze()  # what the server has imported: DeepSpeed collects garbage, and would copy every page of it
    torch.set_num_threads(1)
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=120))
        # As bytes: tensors would otherwise travel as handles that die with this process.
        queue.put((rank, pickle.dumps(function(*args)), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
