"""The initialisations by name, the user's own among them."""

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
"""Every registered initialisation; read only, `register` adds to it."""

MethodClass = TypeVar("MethodClass", bound=type[Method])


def register(name: str) -> Callable[[MethodClass], MethodClass]:
    """Class decorator that gives an initialisation its name.

    Parameters
    ----------
    name
        The name to be chosen by, for example in a YAML file.

    Raises
    ------
    InputError
        If the name is taken, or if what is decorated is no concrete subclass of `Method`.
    """

    def add(cls: MethodClass) -> MethodClass:
        if not (isinstance(cls, type) and issubclass(cls, Method)) or inspect.isabstract(cls):
            raise InputError(
                f"register({name!r}): {getattr(cls, '__name__', cls)} is no initialisation; "
                "derive it from lowrank_dist.methods.Method and implement decompose"
            )
        if name in _registered:
            raise InputError(f"register({name!r}): the name is taken by {_registered[name].__name__}; choose another")
        _registered[name] = cls
        return cls

    return add


def method_named(name: str) -> type[Method]:
    """The initialisation registered as `name`, or the class at the import path ``module.Class``.

    Raises
    ------
    InputError
        If there is none; the message lists the names there are.
    """
    module, _, attribute = name.rpartition(".")
    if module:
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise InputError(f"there is no initialisation {name!r}: {error}") from error
        if not (isinstance(found, type) and issubclass(found, Method)):
            raise InputError(f"{name} is no initialisation; derive it from lowrank_dist.methods.Method")
        return found
    if name not in METHODS:
        raise InputError(f"there is no initialisation {name!r}; registered are {', '.join(sorted(METHODS))}")
    return METHODS[name]
