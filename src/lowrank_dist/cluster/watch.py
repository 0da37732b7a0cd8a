"""Ranks that notice when another one has ended, so that none waits for it until a collective times out.

A rank's end closes its connections, whatever ended it: the kernel sees to that, at once and without heartbeats. So
every rank keeps a connection to rank 0, which tells the others. Collectives do not see to it alone: NCCL's wait for
their timeout, and so do gloo's in a group that has not connected the rank that is gone.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from lowrank_dist.distributed.group import ShardGroup

#: Exit status of a rank that ends because another one has ended (EX_TEMPFAIL of sysexits.h): the job may start again.
ENDED_WITH_OTHERS = 75

_LINE = 16384  # bytes; no message is longer
_CONNECTING = 10.0  # seconds
#: Idle seconds, seconds between probes, probes: a host that is lost closes no connection.
_KEEPALIVE = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 3))

#: What a process that is forked from this one (a loader's worker) must not keep open.
_OPEN: set[socket.socket] = set()


class PeerWatch:
    """Ends this process if another rank has ended, or failed, and this one does not end by itself.

    As a context manager it reports an exception inside it to the other ranks.

    Parameters
    ----------
    group
        The ranks. One broadcast of rank 0's port.
    within
        Seconds that this rank is left for ending by itself, usually by the error of a collective that fails.

    Notes
    -----
    One thread a rank, which sleeps. A rank that cannot connect is not watched, and says so. Forked processes do not
    inherit the connections.
    """

    def __init__(self, group: ShardGroup, *, within: float) -> None:
        self.rank, self.size, self.within = group.rank, group.size, within
        self._lock = threading.Lock()
        self._peers: dict[socket.socket, tuple[int, str]] = {}  # rank, host
        self._gone: set[int] = set()  # ranks that left, or that are known to have ended
        self._deadline: float | None = None
        self._reason = ""
        self._leaving = self._closed = False
        self._thread: threading.Thread | None = None
        if self.size > 1:
            self._begin(group)

    # -- what the run says ----------------------------------------------------------------------------------------

    def failed(self, error: BaseException) -> None:
        """This rank is about to end with `error`: it is no longer hurried, and the others are told. May be repeated."""
        with self._lock:
            first, self._leaving, self._deadline = not self._leaving, True, None
        if first:
            self._tell({"event": "failed", "rank": self.rank, "text": f"{type(error).__name__}: {error}"[:2000]})

    def close(self) -> None:
        """This rank needs the others no longer, nor they it."""
        if self._thread is None:
            return
        with self._lock:
            self._deadline, self._closed = None, True
        self._tell({"event": "left", "rank": self.rank})
        with suppress(OSError):  # the thread has ended
            self._bell.send(b"x")
        self._thread.join()
        self._thread = None

    def __enter__(self) -> PeerWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.failed(error)
        self.close()

    # -- connections ----------------------------------------------------------------------------------------------

    def _begin(self, group: ShardGroup) -> None:
        self._bell, self._rung = map(_kept, socket.socketpair())
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._rung, selectors.EVENT_READ)
        listener = None
        offer = (0, "")
        if group.rank == 0:
            listener = _kept(_listener(self.size))
            self._token = secrets.token_hex(16)
            self._selector.register(listener, selectors.EVENT_READ)
            offer = listener.getsockname()[1], self._token
        found: Any = group.broadcast_object(offer)
        port, token = found
        if group.rank > 0:
            try:
                center = _kept(socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=_CONNECTING))
            except OSError as error:
                _say(f"rank {self.rank} is not told when others end: no connection to rank 0's port {port}: {error}")
            else:
                center.settimeout(None)
                _send(center, {"event": "hello", "rank": self.rank, "host": os.uname().nodename, "token": token})
                self._admit(center, 0, os.environ["MASTER_ADDR"])
        self._thread = threading.Thread(target=self._run, args=(listener,), name="lowrank-watch", daemon=True)
        self._thread.start()

    def _admit(self, connection: socket.socket, rank: int, host: str) -> None:
        _keep_alive(connection)
        with self._lock:
            self._peers[connection] = rank, host
        self._selector.register(connection, selectors.EVENT_READ)

    def _tell(self, message: dict[str, Any], *, but: socket.socket | None = None) -> None:
        with self._lock:
            for connection in self._peers:
                if connection is not but:
                    with suppress(OSError):  # at its end, which the thread sees
                        _send(connection, message)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self, listener: socket.socket | None) -> None:
        received: dict[socket.socket, bytes] = {}
        try:
            while True:
                with self._lock:
                    left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    self._end()
                for key, _ in self._selector.select(left):
                    ready: Any = key.fileobj
                    if ready is self._rung:
                        return
                    (self._accept if ready is listener else self._read)(ready, received)
        finally:
            self._selector.close()
            for one in [self._bell, self._rung, listener, *self._peers, *received]:
                if one is not None:
                    _close(one)

    def _accept(self, listener: socket.socket, received: dict[socket.socket, bytes]) -> None:
        with suppress(OSError):
            connection = _kept(listener.accept()[0])
            received[connection] = b""
            self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket, received: dict[socket.socket, bytes]) -> None:
        try:
            data = connection.recv(_LINE)
        except OSError:  # reset, or the probes were not answered
            data = b""
        *lines, rest = (received.get(connection, b"") + data).split(b"\n")
        received[connection] = rest
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):
                self._hear(json.loads(line), connection)
        if not data or len(rest) > _LINE:
            self._selector.unregister(connection)
            with self._lock:
                rank, host = self._peers.pop(connection, (None, ""))
            received.pop(connection)
            _close(connection)
            if rank is not None:
                self._note({"event": "ended", "rank": rank, "text": f"its process on {host} has ended"})

    def _hear(self, message: dict[str, Any], connection: socket.socket) -> None:
        if connection not in self._peers:
            if self.rank == 0 and secrets.compare_digest(str(message["token"]), self._token):
                _keep_alive(connection)
                with self._lock:
                    self._peers[connection] = int(message["rank"]), str(message["host"])
            return
        if message["event"] == "left":
            self._gone.add(int(message["rank"]))
        else:
            self._note(message, connection)

    def _note(self, message: dict[str, Any], source: socket.socket | None = None) -> None:
        """A rank has failed or ended: the first such message sets the deadline, and rank 0 tells the others."""
        rank, ended = int(message["rank"]), message["event"] == "ended"
        if rank in self._gone:
            return
        if ended:
            self._gone.add(rank)
        if self.rank == 0:
            self._tell(message, but=source)
        with self._lock:
            # a rank that handles an error of its own does so with others that handle theirs, but not with a dead one
            if self._deadline is None and not self._closed and (ended or not self._leaving):
                self._deadline = time.monotonic() + self.within
                self._reason = f"rank {rank}: {message['text']}"

    def _end(self) -> None:
        _say(f"rank {self.rank} ends, since {self._reason}; this rank still waited for it after {self.within:g} s")
        sys.stdout.flush()
        os._exit(ENDED_WITH_OTHERS)  # whatever the main thread waits for cannot be interrupted


def _listener(backlog: int) -> socket.socket:
    address = "127.0.0.1" if os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost") else ""
    if address == "" and socket.has_dualstack_ipv6():
        return socket.create_server((address, 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server((address, 0), backlog=backlog)


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _say(text: str) -> None:
    print(f"lowrank-dist: {text}", file=sys.stderr, flush=True)


def _kept(one: socket.socket) -> socket.socket:
    _OPEN.add(one)
    return one


def _close(one: socket.socket) -> None:
    _OPEN.discard(one)
    one.close()


def _after_fork() -> None:
    for one in list(_OPEN):
        _close(one)


os.register_at_fork(after_in_child=_after_fork)


# -- before there is a group ------------------------------------------------------------------------------------------

_LAUNCHER = "LOWRANK_DIST_LAUNCHER"
_PR_SET_PDEATHSIG = 1


def mark_launcher() -> None:
    """Let the processes that this one starts know it as their launcher; Lightning's is the first rank itself."""
    os.environ[_LAUNCHER] = str(os.getpid())


def end_with_launcher(*, armed: bool) -> None:
    """End when the rank that started this process ends, while `armed`. On Linux, under Lightning's own launcher.

    Until the ranks have met nothing else tells this one that it waits for a rank that is gone.
    """
    launcher = os.environ.get(_LAUNCHER, "")
    if not sys.platform.startswith("linux") or launcher in ("", str(os.getpid())):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if armed else 0)
    if armed and os.getppid() != int(launcher):
        _say("this rank ends, since the process that started it has ended")
        os._exit(ENDED_WITH_OTHERS)
