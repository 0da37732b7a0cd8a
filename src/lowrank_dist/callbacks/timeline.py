"""Where the time of a fit goes: disjoint parts on the timeline of the device, or of the host where that computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function


class Timeline:
    """Time between marks, added up by part.

    Parts may be nested; time counts for the innermost one that is open, so that all parts add up to the whole. On CUDA
    a mark is an event on the current stream: a part is the time in which that stream did its work or waited for it, and
    the host does not wait before `read`.

    Parameters
    ----------
    device
        Device that computes.

    Attributes
    ----------
    named
        Give every part a range of its name in a trace of ``torch.profiler``.
    """

    OTHER = "other"
    """The part where no other is open."""

    def __init__(self, device: torch.device) -> None:
        self.named = False
        self._device = device
        self._spare: list[Any] = []  # events
        self._open: list[tuple[str, record_function | None]] = []
        self._first = self._mark()
        self._spans: list[tuple[str, Any]] = []  # part, mark at its end

    @property
    def part(self) -> str:
        """The innermost open part."""
        return self._open[-1][0] if self._open else self.OTHER

    def enter(self, part: str) -> None:
        """Begin `part` inside the part that is open."""
        self._spans.append((self.part, self._mark()))
        named = None
        if self.named:
            named = record_function(part)
            named.__enter__()
        self._open.append((part, named))

    def leave(self, part: str) -> None:
        """End `part`, and what is still open inside it; nothing if it is not open."""
        while any(part == inside for inside, _ in self._open):
            self._spans.append((self.part, self._mark()))
            _, named = self._open.pop()
            if named is not None:
                named.__exit__(None, None, None)

    def read(self) -> dict[str, float]:
        """Seconds of every part since the last call. On CUDA the host waits for the device."""
        self._spans.append((self.part, self._mark()))
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self._device)
        seconds: dict[str, float] = {}
        begin = self._first
        for part, end in self._spans:
            elapsed = begin.elapsed_time(end) / 1e3 if cuda else end - begin
            seconds[part] = seconds.get(part, 0.0) + elapsed
            if cuda:
                self._spare.append(begin)
            begin = end
        self._first, self._spans = begin, []
        return seconds

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class ObservedProfiler:
    """A profiler of Lightning that also tells which actions of the Trainer begin and end.

    Parameters
    ----------
    profiler
        The Trainer's profiler, which goes on as before.
    begins, ends
        Called with the name of every action.
    """

    def __init__(self, profiler: Any, begins: Callable[[str], None], ends: Callable[[str], None]) -> None:
        self.profiler = profiler
        self._begins, self._ends = begins, ends

    def start(self, action_name: str) -> None:
        self._begins(action_name)
        self.profiler.start(action_name)

    def stop(self, action_name: str) -> None:
        self.profiler.stop(action_name)
        self._ends(action_name)

    @contextmanager
    def profile(self, action_name: str) -> Iterator[str]:
        self._begins(action_name)
        try:
            with self.profiler.profile(action_name):
                yield action_name
        finally:
            self._ends(action_name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.profiler, name)
