"""The registry of initialisations, which users extend with their own."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

from lowrank_dist.errors import InputError
from lowrank_dist.methods.base import Method

_registered: dict[str, type[Method]] = {}
METHODS: Mapping[str, type[Method]] = MappingProxyType(_registered)
"""Every registered initialisation by its name; read-only, `register` adds to it."""

MethodClass = TypeVar("MethodClass", bound=type[Method])


def register(name: str) -> Callable[[MethodClass], MethodClass]:
    """Return a class decorator that registers an initialisation under a name.

    Parameters
    ----------
    name
        The name by which options and YAML files choose the initialisation.

    Returns
    -------
    callable
        The decorator; it returns the class unchanged.

    Raises
    ------
    InputError
        If the name is taken, or if the decorated object is not a concrete subclass of `Method`.

    See Also
    --------
    method_named : Finds what was registered.
    Method : The class to derive from.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> from lowrank_dist.methods import METHODS, PiSSA, register
    >>> @register("pissa_of_seed_1")
    ... @dataclass(frozen=True, kw_only=True)
    ... class OfSeed1(PiSSA):
    ...     seed: int = 1
    >>> METHODS["pissa_of_seed_1"]().seed
    1
    """

    def add(cls: MethodClass) -> MethodClass:
        if not (isinstance(cls, type) and issubclass(cls, Method)) or inspect.isabstract(cls):
            raise InputError(
                f"register({name!r}): {getattr(cls, '__name__', cls)} is not an initialisation; "
                "derive it from lowrank_dist.methods.Method and implement decompose"
            )
        if name in _registered:
            raise InputError(f"register({name!r}): the name is taken by {_registered[name].__name__}; choose another")
        _registered[name] = cls
        return cls

    return add


def method_named(name: str) -> type[Method]:
    """Return the initialisation registered as `name`, or the class at the import path ``module.Class``.

    Parameters
    ----------
    name
        A registered name, or an import path.

    Returns
    -------
    type
        A subclass of `Method`.

    Raises
    ------
    InputError
        If there is none; the message lists the registered names.

    See Also
    --------
    register : Adds a name.

    Examples
    --------
    >>> from lowrank_dist.methods import method_named
    >>> method_named("pissa").__name__
    'PiSSA'
    """
    module, _, attribute = name.rpartition(".")
    if module:
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise InputError(f"there is no initialisation {name!r}: {error}") from error
        if not (isinstance(found, type) and issubclass(found, Method)):
            raise InputError(f"{name} is not an initialisation; derive it from lowrank_dist.methods.Method")
        return found
    if name not in METHODS:
        raise InputError(f"there is no initialisation {name!r}; registered are {', '.join(sorted(METHODS))}")
    return METHODS[name]
