"""Errors that users can correct; the message is sufficient, and commands print it without a traceback.

`RemoteError` is the exception: what another rank of the group raised, whatever it was.
"""

from __future__ import annotations

import errno
import os
import pickle
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["CheckpointError", "InputError", "ModelError", "RemoteError"]


class InputError(ValueError):
    """Input that cannot be used; the message names the rule, the offender with its numbers, and the remedy.

    See Also
    --------
    ModelError, CheckpointError : The subclasses for models and for files.

    Examples
    --------
    >>> from lowrank_dist import InputError, PiSSA
    >>> try:
    ...     PiSSA(oversampling=-1)
    ... except InputError as error:
    ...     print("refused")
    refused
    """


class RemoteError(Exception):
    """An error of another rank; an instance of that error's own class too.

    Handlers therefore see on every rank what they would see on the rank that failed: an ``except OSError`` catches a
    disk's error that another rank had, and only what was an `InputError` there is one here. The other rank's traceback
    is the ``__cause__``.

    Attributes
    ----------
    rank : int
        The rank that failed.

    See Also
    --------
    lowrank_dist.distributed.group.ShardGroup.shared_errors : Raises it on the ranks that have no error of their own.

    Examples
    --------
    >>> from lowrank_dist.errors import InputError, RemoteError, Report
    >>> error = Report.of(OSError(5, "Input/output error"), rank=3).error()
    >>> isinstance(error, RemoteError), isinstance(error, OSError), isinstance(error, InputError)
    (True, True, False)
    >>> print(error, error.errno)
    rank 3: OSError: [Errno 5] Input/output error 5
    """

    rank: int
    message: str

    def __str__(self) -> str:
        return self.message


class RemoteTraceback(Exception):
    """The traceback of another rank's error, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What travels of an error from the rank that raised it to the others.

    Attributes
    ----------
    rank
        The rank that raised it.
    kind, arguments
        Its class, and its arguments, pickled; of a class that cannot be pickled, the nearest base that can.
    message, traceback
        Its text, and its traceback as text.
    is_remote
        Whether that rank only heard of another's error, in a smaller group.
    """

    rank: int
    kind: bytes
    arguments: bytes
    message: str
    traceback: str
    is_remote: bool

    @classmethod
    def of(cls, error: Exception, *, rank: int) -> Report:
        """The report of an error that rank `rank` has raised."""
        is_remote = isinstance(error, RemoteError)
        kind = own_class(error)
        name = kind.__name__
        while (pickled := _pickled(kind)) is None:
            kind = kind.__mro__[1]
        return cls(
            rank=rank,
            kind=pickled,
            arguments=_pickled(error.args) or pickle.dumps((str(error),)),
            message=str(error) if is_remote else f"{name}: {error}",
            traceback="".join(traceback.format_exception(type(error), error, error.__traceback__)),
            is_remote=is_remote,
        )

    @property
    def is_input(self) -> bool:
        """Whether it was an `InputError`."""
        return issubclass(pickle.loads(self.kind), InputError)

    def error(self) -> RemoteError:
        """The error to raise on another rank. Its class is that of the original, but its ``__init__`` is not called."""
        kind: type[Any] = pickle.loads(self.kind)
        both = type(RemoteError.__name__, (kind, RemoteError), {"__str__": RemoteError.__str__, "own_class": kind})
        both.__module__ = RemoteError.__module__
        arguments = pickle.loads(self.arguments)
        made: Any = both.__new__(both, *arguments)
        if isinstance(made, OSError):
            OSError.__init__(made, *arguments)  # sets errno where the class has an __init__ of its own
        made.rank, made.message = self.rank, f"rank {self.rank}: {self.message}"
        made.__cause__ = RemoteTraceback(self.traceback)
        return made


def own_class(error: BaseException) -> type[BaseException]:
    """The class of `error`; of a `RemoteError` that of the error on its own rank."""
    return getattr(error, "own_class", type(error)) if isinstance(error, RemoteError) else type(error)


def _pickled(value: object) -> bytes | None:
    try:
        pickle.loads(pickled := pickle.dumps(value))
    except Exception:  # whatever foreign classes raise
        return None
    return pickled


#: What file systems over a network, and disks, raise for a while; the next attempt may succeed.
_PASSING = {
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EINTR", "EBUSY", "ENOLCK", "ENOMEM", "EMFILE", "ENFILE"),
        *("ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN"),
        *("ENETUNREACH", "EREMOTEIO", "ESHUTDOWN", "EPIPE"),
    )
    if hasattr(errno, name)
}


def is_passing(error: BaseException | None) -> bool:
    """Whether `error`, or what it was raised from, is an OSError that starting again may cure.

    A handler that turns foreign errors into an `InputError`, which stops a job for good, lets these pass.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _PASSING:
            return True
        error = error.__cause__ or error.__context__
    return False


#: Not those of sockets, say, that a body may raise beside.
_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE}


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an error of the disk inside that names no file, such as that of a write to a full one, name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in _OF_DISKS and error.filename is None and not isinstance(error, RemoteError):
            error.filename = os.fspath(path)
        raise


class ModelError(InputError):
    """A model or adapter configuration that cannot be trained; the message names the layer and the remedy.

    See Also
    --------
    CheckpointError : For files that cannot be read.

    Examples
    --------
    >>> from torch import nn
    >>> from lowrank_dist import ModelError
    >>> from lowrank_dist.model.skeleton import find_backbone
    >>> try:
    ...     find_backbone(nn.Linear(2, 2))
    ... except ModelError:
    ...     print("no transformers model inside")
    no transformers model inside
    """


class CheckpointError(InputError):
    """Weights, an adapter or a checkpoint that cannot be read; the message names file, tensor and remedy.

    See Also
    --------
    lowrank_dist.inspect : Describes a directory and names what is missing.

    Examples
    --------
    >>> from lowrank_dist import CheckpointError, convert_checkpoint
    >>> try:
    ...     convert_checkpoint("/nowhere", "lora")
    ... except CheckpointError:
    ...     print("refused")
    refused
    """
