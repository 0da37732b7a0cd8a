"""The settings of runs, and the names that tell them apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lowrank_dist.errors import InputError
from lowrank_dist.storage.parse import printable, read_bytes

Settings = dict[str, str]

_LARGEST = 1 << 20  # bytes of a configuration
_MOST = 20_000  # entries: aliases make a small file large
_DEEPEST = 50
#: Where a run writes and what watches it: no setting of what is compared.
_NOT_COMPARED = (
    *("seed_everything", "ckpt_path", "config", "trainer.default_root_dir", "trainer.logger", "trainer.callbacks"),
    *("trainer.plugins", "trainer.profiler"),
)


def read_settings(file: Path) -> dict[str, Any]:
    """The configuration that ``lowrank-dist fit`` has written beside a run.

    Raises
    ------
    InputError
        If it is none.
    """
    try:
        found = yaml.safe_load(read_bytes(file, _LARGEST).decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InputError(f"{file}: not a configuration of `lowrank-dist fit` ({printable(error)})") from error
    if not isinstance(found, dict) or not isinstance(found.get("trainer"), dict):
        raise InputError(f"{file}: not a configuration of `lowrank-dist fit`: it has no `trainer`")
    return found


def flat(settings: Mapping[str, Any]) -> Settings:
    """Entries by dotted key, those of no interest for a comparison left out.

    A class with its arguments is an entry of its name, with the arguments below it.
    """
    found: Settings = {}
    for key, value in _entries(settings, ""):
        if len(found) >= _MOST:
            raise InputError(f"the configuration has more than {_MOST} entries")
        if not any(key == name or key.startswith(f"{name}.") for name in _NOT_COMPARED):
            found[key] = value
    return found


def _entries(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if key.count(".") > _DEEPEST:
        raise InputError(f"the configuration has entries deeper than {_DEEPEST}, or within themselves")
    if isinstance(value, Mapping) and "class_path" in value:
        yield key, str(value["class_path"]).rpartition(".")[2]
        value = value.get("init_args") or {}
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _entries(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for index, inner in enumerate(value):
            yield from _entries(inner, f"{key}.{index}")
    else:
        yield key, "none" if value is None else str(value)


def names(runs: Sequence[Settings], *, without: str) -> list[str]:
    """What tells each run from the others, such as ``PiSSA, r=16``; equal names are runs of equal settings.

    Parameters
    ----------
    runs
        Settings from `flat`.
    without
        Key that is left out: runs that differ in nothing else get one name.
    """
    telling = [key for key in dict.fromkeys(k for run in runs for k in run) if key != without and _tells(key, runs)]
    short = {key: _shortest(key, telling) for key in telling}
    return [", ".join(_shown(short[key], run[key]) for key in telling if key in run) or "all" for run in runs]


def _tells(key: str, runs: Sequence[Settings]) -> bool:
    """Whether runs that agree in what `key` is an argument of differ in it."""
    above = [key.rsplit(".", depth)[0] for depth in range(1, key.count(".") + 1)]
    found: dict[tuple[str | None, ...], set[str | None]] = {}
    for run in runs:
        found.setdefault(tuple(run.get(part) for part in above), set()).add(run.get(key))
    return any(len(values) > 1 for values in found.values())


def _shortest(key: str, others: Sequence[str]) -> str:
    parts = key.split(".")
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        if sum(other == end or other.endswith(f".{end}") for other in others) == 1:
            return end
    return key


def _shown(key: str, value: str) -> str:
    """A class speaks for itself; other values need their key."""
    is_class = value[:1].isupper() and value.isidentifier() and value not in ("True", "False")
    return value if is_class else f"{key}={value}"
