"""Trainer state as JSON and plain tensors, so that loading it runs no code.

Values that JSON supports are stored unchanged. Other types that Lightning, its callbacks and schedulers put into a
checkpoint become an object with one key, such as ``{"$tuple": [...]}``. Tensors go to a safetensors file and are
replaced by their name there, ``{"$tensor": "12"}``.
A type that is not listed here cannot be stored; the error names its place in the state.
"""

from __future__ import annotations

import base64
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_dist.errors import InputError
from lowrank_dist.storage.parse import printable

_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class StateError(InputError):
    """State that cannot be stored without pickle, or stored state that cannot be read."""


def encode_state(state: Any, *, where: str = "", lossy: bool = False, first: int = 0) -> tuple[Any, dict[str, Tensor]]:
    """JSON value and tensors of a state.

    Parameters
    ----------
    state
        Any nesting of dictionaries, lists, tuples, sets, numbers, strings, bytes, tensors, NumPy arrays and scalars,
        paths, dtypes, devices and time deltas.
    where
        Name of the state, for errors.
    lossy
        Replace objects of other types by their ``repr`` (for hyper-parameters, from which nothing is restored).
    first
        Number that names the first tensor.

    Returns
    -------
    value
        JSON value for `json.dumps`.
    tensors
        Contiguous CPU tensors by the names that `value` refers to.

    Raises
    ------
    StateError
        If `state` contains an object of another type and `lossy` is False. The message names its place.
    """
    encoder = _Encoder(lossy, first)
    return encoder.encode(state, where), encoder.tensors


def decode_state(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Invert `encode_state`.

    Raises
    ------
    StateError
        If `value` was not written by `encode_state`.
    """
    if isinstance(value, list):
        return [decode_state(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    marks = [key for key in value if key.startswith("$")]
    if not marks:
        return {key: decode_state(item, tensors) for key, item in value.items()}
    if len(value) != 1 or marks[0] not in _DECODERS:
        names = printable(", ".join(value))
        raise StateError(f"{names}: not the mark of a stored type; a newer version may have written it")
    ((mark, content),) = value.items()
    inner = decode_state(content, tensors)
    try:
        return tensors[inner] if mark == "$tensor" else _DECODERS[mark](inner)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, RuntimeError, AttributeError) as error:
        raise StateError(f"{mark}: cannot be read ({printable(repr(error))}); the state is damaged") from error


class _Encoder:
    def __init__(self, lossy: bool, first: int) -> None:
        self.lossy, self.first = lossy, first
        self.tensors: dict[str, Tensor] = {}

    def encode(self, value: Any, where: str) -> Any:
        if value is None or type(value) in (bool, str):
            return value
        if type(value) in (int, float):
            return value if value == value and abs(value) != float("inf") else {"$float": str(value)}
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, Mapping):
            return self._mapping(value, where)
        if type(value) is list:
            return [self.encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
        for kind, mark, content in _ENCODERS:
            if isinstance(value, kind):
                return {mark: self.encode(content(value), where)}
        if self.lossy:
            return {"$repr": repr(value)}
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        raise StateError(
            f"{where}: a {name} cannot be stored without pickle; let state_dict() return numbers, strings, tensors and "
            "containers of them"
        )

    def _mapping(self, value: Mapping[Any, Any], where: str) -> Any:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.encode(item, f"{where}[{key!r}]") for key, item in value.items()}
        pairs = [[self.encode(key, where), self.encode(item, f"{where}[{key!r}]")] for key, item in value.items()]
        return {"$items": pairs}

    def _tensor(self, value: Tensor) -> dict[str, str]:
        name = str(self.first + len(self.tensors))
        self.tensors[name] = value.detach().cpu().clone().contiguous()
        return {"$tensor": name}


def _numpy_scalar(dtype: str, value: Any) -> Any:
    found = np.dtype(dtype)
    if found.kind not in "biufcSU" or not isinstance(value, bool | int | float | complex | str | bytes):
        raise TypeError(f"{dtype} of a {type(value).__name__}")
    return found.type(value)


# (type, mark, function that gives the content to encode); the first matching type counts
_ENCODERS: list[tuple[Any, str, Callable[[Any], Any]]] = [
    (torch.Size, "$tuple", list),
    (tuple, "$tuple", list),
    (set | frozenset, "$set", lambda s: sorted(s, key=repr)),
    (deque, "$deque", lambda d: [list(d), d.maxlen]),
    (bytes | bytearray, "$bytes", lambda b: base64.b64encode(b).decode()),
    (np.ndarray, "$ndarray", lambda a: torch.from_numpy(np.ascontiguousarray(a))),
    (np.generic, "$numpy", lambda s: [s.dtype.str, s.item()]),
    (torch.dtype, "$dtype", str),
    (torch.device, "$device", str),
    (PurePath, "$path", str),
    (timedelta, "$seconds", lambda t: t.total_seconds()),
    (Namespace, "$namespace", vars),
    (int, "$plain", int),  # enumerations of integers and the like
    (float, "$plain", float),
    (str, "$plain", str),
    (list, "$plain", list),
]
_DECODERS: dict[str, Callable[[Any], Any]] = {
    "$tensor": str,
    "$float": float,
    "$items": lambda items: {key: item for key, item in items},
    "$tuple": tuple,
    "$set": set,
    "$deque": lambda d: deque(d[0], maxlen=d[1]),
    "$bytes": base64.b64decode,
    "$ndarray": lambda t: t.numpy(),
    "$numpy": lambda s: _numpy_scalar(*s),
    "$dtype": _DTYPES.__getitem__,
    "$device": torch.device,
    "$path": Path,
    "$seconds": lambda seconds: timedelta(seconds=seconds),
    "$namespace": lambda values: Namespace(**values),
    "$plain": lambda value: value,
    "$repr": str,
}
