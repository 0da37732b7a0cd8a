"""Chunks of records prepared in several processes, in order, with the results of one.

The processes are started afresh (``spawn``) and never forked: a rank has threads of torch, of collectives and of
tokenizers, whose locks a fork would copy in whatever state they are. They import this package, and not the program that
was started, which would begin to train. Each has one chunk at a time, and few results wait for an earlier one, so that
memory does not grow with the data.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

import numpy as np
import torch

from lowrank_dist.data.chunks import Chunk
from lowrank_dist.data.loaded import Loaded
from lowrank_dist.errors import InputError

_AHEAD = 3  # chunks for each process that are under way or wait for an earlier one


def in_processes(
    make: Callable[[], Callable[[Chunk], Loaded]], chunks: Iterable[Chunk], *, count: int
) -> Iterator[Loaded]:
    """What `make` makes of every chunk, in their order, in `count` processes; a single chunk is prepared here.

    Parameters
    ----------
    make
        Called in every process; it must be possible to pickle it.
    chunks
        Read in this process.
    count
        Number of processes, at most one for each chunk.

    Raises
    ------
    InputError
        As for one process: the error of the first chunk that has one, also if a later one cannot be read; and if `make`
        cannot be pickled.
    RuntimeError
        If a process is ended from outside, or for any other error in it.
    """
    reader = _Reader(chunks)
    first, second = reader.next(), reader.next()
    if second is None:
        if first is not None:
            yield make()(first)
        reader.raise_error()
        return
    assert first is not None
    pool = _Pool(make, count)
    waiting: deque[Chunk] = deque([first, second])
    done: dict[int, Any] = {}
    given = taken = 0
    try:
        while True:
            while given - taken < _AHEAD * count and pool.has_room():
                chunk = waiting.popleft() if waiting else reader.next()
                if chunk is None:
                    break
                pool.give(given, chunk)
                given += 1
            if given == taken:
                break
            while taken not in done:
                done |= pool.results()
                if pool.has_room() and given - taken < _AHEAD * count:
                    break
            while taken in done:
                yield _received(done.pop(taken))
                taken += 1
        reader.raise_error()
    finally:
        pool.close()


class _Reader:
    """Chunks, and the error that ended them, which comes after those of the chunks before it."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self._chunks = iter(chunks)
        self._error: InputError | None = None

    def next(self) -> Chunk | None:
        try:
            return None if self._error is not None else next(self._chunks, None)
        except InputError as error:
            self._error = error
            return None

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error


class _Pool:
    """Processes that are started as they are needed. Each has a chunk, or is free."""

    def __init__(self, make: Callable[[], Callable[[Chunk], Loaded]], count: int) -> None:
        self._make, self._count = make, count
        self._processes: dict[Connection, BaseProcess] = {}
        self._free: list[Connection] = []
        self._busy: dict[Connection, int] = {}

    def has_room(self) -> bool:
        return bool(self._free) or len(self._processes) < self._count

    def give(self, number: int, chunk: Chunk) -> None:
        pipe = self._free.pop() if self._free else self._start()
        self._busy[pipe] = number
        with suppress(BrokenPipeError, ConnectionResetError):  # `results` says how it ended
            pipe.send_bytes(pickle.dumps(chunk, protocol=pickle.HIGHEST_PROTOCOL))

    def results(self) -> dict[int, Any]:
        """What processes have sent, at least one of them."""
        found = {}
        for pipe in wait(list(self._busy)):
            assert isinstance(pipe, Connection)
            try:
                data = pipe.recv_bytes()
            except (EOFError, ConnectionResetError):
                raise RuntimeError(self._ending(self._processes[pipe])) from None
            found[self._busy.pop(pipe)] = pickle.loads(data)
            self._free.append(pipe)
        return found

    def close(self) -> None:
        for pipe, process in self._processes.items():
            pipe.close()  # a process that waits for a chunk ends
            process.terminate()
        for process in self._processes.values():
            process.join()

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, self._make), daemon=True, name="lowrank_dist data")
        try:
            with _without_main():
                process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(
                f"num_proc={self._count}: the tokenizer or a setting cannot be sent to other processes ({error}); "
                "leave num_proc out"
            ) from error
        there.close()
        self._processes[here] = process
        return here

    def _ending(self, process: BaseProcess) -> str:
        process.join()
        code = process.exitcode or 0
        how = f"exit status {code}"
        if code < 0:
            how = f"signal {-code} ({signal.strsignal(-code)})"
        remedy = "; a process is killed when memory runs out, and fewer of them need less" if code == -9 else ""
        return f"num_proc={self._count}: process {process.pid}, which tokenized records, was ended by {how}{remedy}"


@contextmanager
def _without_main() -> Iterator[None]:
    """Inside, a process that is started does not import the program that was started here.

    ``multiprocessing`` would run it again, for functions that it defines. Programs that train often lack the guard
    ``if __name__ == "__main__"``, and a second run of them would join the ranks.
    """
    before = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = before


def _serve(pipe: Connection, make: Callable[[], Callable[[Chunk], Loaded]]) -> None:
    """Prepare chunks until there are no more; in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started it is interrupted, and ends it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the threads
    torch.set_num_threads(1)
    prepare = None
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            chunk = pickle.loads(pipe.recv_bytes())
            outcome: Any
            try:
                prepare = prepare or make()
                outcome = _sent(prepare(chunk))
            except InputError as error:
                outcome = InputError(*error.args)
            except Exception:  # whatever it is, the other side raises it
                outcome = RuntimeError(f"a process that tokenized records failed:\n{traceback.format_exc()}")
            pipe.send_bytes(pickle.dumps(outcome, protocol=pickle.HIGHEST_PROTOCOL))


def _sent(loaded: Loaded) -> tuple[Loaded, np.ndarray, list[int], list[dict[str, np.ndarray]]]:
    """`loaded` with its examples as one array, since tensors would travel one by one."""
    flat = torch.cat(loaded.examples, dim=1) if loaded.examples else torch.empty(2, 0, dtype=torch.int32)
    along = [{name: values.numpy() for name, values in one.items()} for one in loaded.along]
    sizes = [example.shape[1] for example in loaded.examples]
    return replace(loaded, examples=[], along=[]), flat.numpy(), sizes, along


def _received(outcome: Any) -> Loaded:
    if isinstance(outcome, Exception):
        raise outcome
    loaded, flat, sizes, along = outcome
    return replace(
        loaded,
        examples=list(torch.from_numpy(flat).split(sizes, dim=1)) if sizes else [],
        along=[{name: torch.from_numpy(values) for name, values in one.items()} for one in along],
    )
