"""Names that a package exports without importing the modules that define them (PEP 562)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_exports(package: str, exports: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package whose names stand in other modules.

    Parameters
    ----------
    package
        ``__name__`` of the package.
    exports
        Module of every exported name; it is imported when the name is first asked for.
    """

    def get(name: str) -> Any:
        if name in exports:
            return getattr(importlib.import_module(exports[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
