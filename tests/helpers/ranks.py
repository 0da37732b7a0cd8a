"""Runs a function on N ranks, each a process of its own (gloo; NCCL on CUDA), and brings back what each returned."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import pickle
import random
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import TCPStore

CONTEXT = multiprocessing.get_context("forkserver")
# Imported once, in a server process that does nothing else: ranks fork from it in milliseconds. What DeepSpeed, PEFT
# and transformers import only when a fit begins is among it.
CONTEXT.set_forkserver_preload(
    [
        "lowrank_dist.training.strategy",
        "lowrank_dist.callbacks",
        "deepspeed.module_inject.auto_ep_config",
        "deepspeed.ops.op_builder.all_ops",
        "deepspeed.runtime.superoffload.superoffload_stage3",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "helpers.training",
        "helpers.warm",
        "peft.tuners.lora.bnb",
        "pytest",
        "torch.testing",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.llama.modeling_llama",
    ]
)
#: Calls after which the ranks of a pool are replaced, whatever functions have left in them.
CALLS = 24
#: Modules, with all of their own, that a pooled function must leave as they were.
WATCHED = ("lowrank_dist", "os", "shutil", "time", "torch.distributed", "huggingface_hub.constants")

Function = TypeVar("Function", bound=Callable[..., Any])


class RankFailedError(AssertionError):
    """A rank raised, died or hung; the text holds its traceback."""


def alone(function: Function) -> Function:
    """Mark a function that leaves its process changed, or looks at the whole of it: it gets ranks of its own."""
    function.__dict__["alone"] = True
    return function


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 240,
    fresh: bool = False,
    cuda: bool = True,
) -> list[Any]:
    """``function(*args)`` on `world_size` ranks of a gloo group; their results by rank (picklable).

    The ranks are those of a pool, which have run other functions before, unless `function` is marked as `alone`. Their
    environment is that of the first call, in which everything was imported; `fresh` ranks have that of this call, and
    take seconds to import it. Where a CUDA device is visible all are: to import bitsandbytes starts CUDA, which does
    not survive a fork. Without `cuda` they see no such device.

    Raises
    ------
    RankFailedError
        With the traceback of the first rank that failed; the others are ended.
    """
    fresh = fresh or torch.cuda.device_count() > 0
    if fresh or not cuda or getattr(function, "alone", False):
        outcomes = run_ranks_catching(world_size, function, *args, timeout=timeout, fresh=fresh, cuda=cuda)
    else:
        outcomes = RankPool.of(world_size).call(function, *args, timeout=timeout)
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
    """Like `run_ranks`, with ``(result, traceback or None)`` for every rank; only a hang raises.

    Always on ranks of their own: after an error nobody knows what the others wait for.
    """
    ranks = Ranks(world_size, fresh=fresh or torch.cuda.device_count() > 0, cuda=cuda)
    try:
        outcomes = ranks.call(function, *args, timeout=timeout)
    except BaseException:
        ranks.close(timeout=0)
        raise
    ranks.close()
    return outcomes


class Ranks:
    """Processes of one process group, which run functions until they are closed."""

    def __init__(self, world_size: int, *, fresh: bool = False, cuda: bool = True, pooled: bool = False) -> None:
        context: Any = multiprocessing.get_context("spawn") if fresh else CONTEXT
        self.store = meeting_place()
        self.processes, self.connections = [], []
        with patch.dict(os.environ, {} if cuda else {"CUDA_VISIBLE_DEVICES": ""}):
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_rank_main, args=(theirs, rank, world_size, self.store.port, pooled), daemon=False
                )
                process.start()
                theirs.close()
                self.processes.append(process)
                self.connections.append(ours)

    def call(self, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[tuple[Any, str | None]]:
        """``(result, traceback or None)`` of every rank; a rank that dies meanwhile has the latter."""
        request = pickle.dumps((function, args))
        outcomes: dict[int, tuple[Any, str | None]] = {}
        waiting: dict[Connection, int] = {}
        for rank, connection in enumerate(self.connections):
            waiting[connection] = rank
            with suppress(OSError):  # dead: its connection is at its end, below
                connection.send_bytes(request)
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), timeout=deadline - time.monotonic())
            if not ready:
                raise RankFailedError(
                    f"ranks {sorted(waiting.values())} hang after {timeout} s; the others: {outcomes}"
                )
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[arg-type]
                try:
                    result, error = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                    outcomes[rank] = (None if result is None else pickle.loads(result), error)
                except (EOFError, ConnectionError):
                    self.processes[rank].join()
                    outcomes[rank] = (None, f"rank {rank} died with exit code {self.processes[rank].exitcode}")
        return [outcomes[rank] for rank in range(len(self.processes))]

    def close(self, timeout: float = 5) -> None:
        """End the processes, by force those that have not ended after `timeout` seconds."""
        for connection in self.connections:
            connection.close()
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(timeout=max(0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


class RankPool:
    """Ranks that stay for the next function; replaced after an error, and after some calls."""

    pools: dict[int, RankPool] = {}  # noqa: RUF012

    def __init__(self, world_size: int) -> None:
        self.world_size, self.calls = world_size, 0
        self.ranks: Ranks | None = None

    @classmethod
    def of(cls, world_size: int) -> RankPool:
        """The pool of this process for so many ranks."""
        return cls.pools.setdefault(world_size, cls(world_size))

    def call(self, function: Callable[..., Any], *args: Any, timeout: float) -> list[tuple[Any, str | None]]:
        if self.ranks is None:
            self.ranks, self.calls = Ranks(self.world_size, pooled=True), 0
        try:
            outcomes = self.ranks.call(function, *args, timeout=timeout)
        except BaseException:
            self.close(timeout=0)
            raise
        self.calls += 1
        failed = any(error is not None for _, error in outcomes)
        if failed or self.calls == CALLS:
            self.close(timeout=0 if failed else 5)
        return outcomes

    def close(self, timeout: float = 5) -> None:
        if self.ranks is not None:
            self.ranks.close(timeout)
        self.ranks = None


@atexit.register
def _close_pools() -> None:
    for pool in RankPool.pools.values():
        pool.close()


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


def _rank_main(connection: Connection, rank: int, world_size: int, port: int, pooled: bool) -> None:
    os.environ.update(environment_of(rank, world_size, port))
    gc.freeze()  # what the server has imported: DeepSpeed collects garbage, and would copy every page of it
    torch.set_num_threads(1)
    joined: str | None = None
    try:
        _give_way()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=120))
    except BaseException:
        joined = traceback.format_exc()
    process = _Process()
    before: dict[str, dict[str, Any]] = {}
    try:
        while True:
            try:
                request = connection.recv_bytes()
            except EOFError:
                break
            process.reset()
            if pooled and not before:
                before = _contents()
            result: bytes | None = None
            error = joined
            if error is None:
                try:
                    function, args = pickle.loads(request)
                    # As bytes: tensors would otherwise travel as handles that die with this process.
                    result = pickle.dumps(function(*args))
                    function = args = None
                    now = _contents() if pooled else {}
                    changed, before = _changed(before, now), now
                    if changed:
                        raise RuntimeError(
                            f"{', '.join(changed)} changed, which the next function would see: mark it `alone`"
                        )
                except BaseException:
                    result, error = None, traceback.format_exc()
            connection.send_bytes(pickle.dumps((result, error)))
            if error is not None or not pooled:
                break  # others that wait for this rank see it gone
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _give_way() -> None:
    """Let the threads of gloo run only where nobody else wants to.

    What comes for a collective that its rank has not reached yet stays in the socket, and gloo's thread asks for it
    again and again. With more ranks than cores it takes the core from the rank that is late.
    """
    helper = dist.distributed_c10d._new_process_group_helper

    def and_give_way(*args: Any, **kwargs: Any) -> Any:
        made = helper(*args, **kwargs)
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):  # ended meanwhile
                if (task / "comm").read_text() == "gloo_tcp_loop\n":
                    os.setpriority(os.PRIO_PROCESS, int(task.name), 10)
        return made

    dist.distributed_c10d._new_process_group_helper = and_give_way


class _Process:
    """What a function finds as the first one found it."""

    def __init__(self) -> None:
        self.environment, self.directory = dict(os.environ), os.getcwd()
        self.generators = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def reset(self) -> None:
        _let_go()
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.directory)
        random.setstate(self.generators[0])
        np.random.set_state(self.generators[1])
        torch.set_rng_state(self.generators[2])
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)


def _let_go() -> None:
    """Free the runs and process groups of earlier functions, from which all ranks have returned.

    The autograd functions that DeepSpeed makes for every module stay in torch, and hold the module's whole run. Each
    process group has a thread that wakes up a hundred times a second. DeepSpeed keeps some groups for its next engine.
    A group that its members alone made stays too: torch names the next one of these ranks by the same hash, under which
    the store still has the addresses of the first.
    """
    from deepspeed.utils import groups
    from lightning import Trainer

    gc.collect()
    trainers = [one for one in gc.get_objects() if type(one) is Trainer]
    for trainer in trainers:
        vars(trainer).clear()
    kept = [dist.group.WORLD, *vars(groups).values()]
    for group in list(dist.distributed_c10d._world.pg_map):
        if group.group_name.isdecimal() and not any(group is one for one in kept):
            dist.destroy_process_group(group)
    if trainers:
        gc.collect()
    gc.freeze()  # what still stays is not looked at again


def _contents() -> dict[str, dict[str, Any]]:
    """Everything that is defined in the watched modules, and in the classes of this project."""
    found = {}
    for name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or not (name in WATCHED or name.startswith("lowrank_dist.")):
            continue
        found[name] = dict(vars(module))
        if name.startswith("lowrank_dist"):
            own = [value for value in vars(module).values() if getattr(value, "__module__", None) == name]
            found |= {f"{name}.{one.__qualname__}": dict(vars(one)) for one in own if isinstance(one, type)}
    return found


def _changed(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"{owner}.{name}"
        for owner, names in before.items()
        for name, value in names.items()
        if owner not in now or now[owner].get(name, value) is not value
    ]
