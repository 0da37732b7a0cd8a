"""Damages files of every kind, and hands them to the readers: whatever comes, an error of one line is the worst."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lowrank_dist.errors import InputError
from lowrank_dist.storage.layout import MANIFEST, PARTS, sealed
from lowrank_dist.storage.parse import is_plain
from lowrank_dist.storage.verify import file_digest, tensor_digest

#: Values in the place of others.
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, -(10**12), 1e308, -0.5, float("nan"), float("inf"),
    "", "x", "x" * 5000, "../../etc/passwd", "/dev/zero", "a\x00b", "\x1b[31mred\x1b[0m", "line\nline", "\ud800",
    "(a+)+$", "(.*)*x", ".*" * 30 + "x", "(", "[", "NaN", [], {}, [[]], [None], [1, 2], {"a": 1}, {"$tensor": "0"},
    {"$numpy": ["V999999999", 0]}, {"$deque": [[], -1]}, {"$device": "moon"}, ["q_proj", 3], {"(a+)+$": 4},
    [{"name": "x"}], {"format": "nf4", "block_size": -3, "double_quant": 1},
]  # fmt: skip
#: Seconds of the processor, and of the clock, after which a reader hangs; a busy machine is not its fault.
HANG, HANG_IDLE = 20, 240
MOST_MEMORY = 200_000_000  # bytes beyond those of the input


class Hang(BaseException):
    """A reader has not come back."""


def damage(path: Path, chance: random.Random) -> str:
    """Damage one file in place, and say how."""
    kinds: list[Callable[[Path, random.Random], str]] = [_truncate, _flip, _special, _splice]
    if path.suffix in (".json", ".jsonl"):
        kinds += [_values] * 12 + [_text] * 2
    if path.suffix == ".safetensors":
        kinds += [_header] * 12
    return f"{path.name}: {chance.choice(kinds)(path, chance)}"


def _truncate(path: Path, chance: random.Random) -> str:
    size = chance.choice([0, 1, 7, 8, 9, chance.randrange(path.stat().st_size + 1)])
    os.truncate(path, size)
    return f"has {size} bytes"


def _flip(path: Path, chance: random.Random) -> str:
    data = bytearray(path.read_bytes())
    places = [chance.randrange(len(data)) for _ in range(chance.choice([1, 1, 5]))] if data else []
    for place in places:
        data[place] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return f"differs at {places}"


def _splice(path: Path, chance: random.Random) -> str:
    data, at = path.read_bytes(), chance.randrange(path.stat().st_size + 1)
    path.write_bytes(data[:at] + chance.randbytes(chance.choice([1, 8, 100])) + data[at:])
    return f"has more at {at}"


def _special(path: Path, chance: random.Random) -> str:
    path.unlink()
    kind = chance.choice(["nothing", "pipe", "directory", "device", "link to itself", "sparse"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "sparse":
        with open(path, "wb") as file:
            file.write((12 * 10**9).to_bytes(8, "little"))
            file.truncate(13 * 10**9)
    return f"is {kind}"


def _text(path: Path, chance: random.Random) -> str:
    text = path.read_text()
    kind = chance.choice(["deep", "deep in it", "twice", "many", "digits"])
    if kind == "deep":
        text = "[" * 100_000
    elif kind == "deep in it":
        text = text.replace("{", '{"deep": ' + "[" * 90 + "]" * 90 + ", ", 1)
    elif kind == "twice":
        text = text.replace("{", '{"format": 1, "format": 2, "messages": [], "messages": [], ', 1)
    elif kind == "many":
        text = text.replace("{", '{"many": [' + "[]," * 300_000 + "[]], ", 1)
    else:
        text = text.replace("{", '{"step": ' + "9" * 5000 + ", ", 1)
    path.write_text(text)
    return kind


def _values(path: Path, chance: random.Random) -> str:
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = chance.randrange(len(lines))
    try:
        value = json.loads(lines[number])
    except ValueError:
        return "is damaged already"
    said = [_change(value, chance) for _ in range(chance.choice([1, 1, 2, 4]))]
    lines[number] = json.dumps(value)
    path.write_text("\n".join(lines) + "\n")
    return "; ".join(said)


def _change(value: Any, chance: random.Random) -> str:
    """Change one entry at a random place of a JSON value."""
    places = list(_places(value))
    if not places:
        return "nothing"
    holder, key = chance.choice(places)
    kind, odd = chance.choice(["value", "value", "value", "gone", "renamed", "more"]), deepcopy(chance.choice(ODD))
    shown = f"{key!r} {kind}"
    if kind == "gone" or (kind == "renamed" and isinstance(holder, list)):
        del holder[key]
    elif kind == "renamed":
        holder[chance.choice(["x", "\x1b[2J", "(a+)+$", "a\x00", "../x", str(key) * 3])] = holder.pop(key)
    elif kind == "more":
        if isinstance(holder, list):
            holder.insert(key, odd)
        else:
            holder[f"{key}x"] = odd
    else:
        holder[key] = odd
        shown += f" {ascii(odd)[:60]}"
    return shown


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _header(path: Path, chance: random.Random) -> str:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    said = [_change(header, chance) for _ in range(chance.choice([1, 1, 2]))]
    for name, entry in header.items():
        if name != "__metadata__" and isinstance(entry, dict) and chance.random() < 0.05:
            entry["dtype"] = chance.choice(["F8_E4M3", "I64", "U8", "BOOL", "F64", "F32", "BF16", "F4", "C64"])
        if name != "__metadata__" and isinstance(entry, dict) and chance.random() < 0.05:
            shape = entry.get("shape")
            shape = shape if isinstance(shape, list) else []
            entry["shape"] = chance.choice([shape[::-1], [1, *shape], [], [0], [2**62, 4], [*shape, 1]])
    text = json.dumps(header).encode()
    length = chance.choice([len(text)] * 8 + [2**40, 0, len(text) + 3])
    path.write_bytes(length.to_bytes(8, "little") + text + data[8 + size :])
    return f"header: {'; '.join(said)}"


def seal_again(directory: Path) -> None:
    """Make a damaged checkpoint agree with its manifest again, as a forger would, as far as it can be read."""
    every = [path for path in directory.rglob("*") if not path.is_dir()]
    if not all(path.is_file() and path.stat().st_size < 2**28 for path in every):  # pipes, devices, holes
        return
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        for name in manifest["files"]:
            manifest["files"][name] = file_digest(directory / name)
        for part in manifest["hashes"]:
            inside, stem = PARTS[part]
            with safe_open(directory / inside / f"{stem}.safetensors", framework="pt") as file:
                manifest["hashes"][part] = {name: tensor_digest(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        (directory / MANIFEST).write_text(json.dumps(sealed(manifest)))
    except Exception:  # it stays as it is
        pass


@contextmanager
def bounded(nbytes: int) -> Iterator[None]:
    """Raise `Hang` if the body takes long, and AssertionError if it takes much memory for an input of `nbytes`."""

    def hang(*_: object) -> None:
        raise Hang

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    timers = {signal.SIGPROF: (signal.ITIMER_PROF, HANG), signal.SIGALRM: (signal.ITIMER_REAL, HANG_IDLE)}
    former = {number: signal.signal(number, hang) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, former[number])
    more = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert more < MOST_MEMORY + nbytes, f"{more} bytes more"


def fault(read: Callable[[Path], object], directory: Path, allowed: tuple[type[Exception], ...]) -> str | None:
    """What is wrong with how a reader takes a damaged directory; None if it reads it or names the damage in a line."""
    try:
        with bounded(sum(512 * path.lstat().st_blocks for path in directory.rglob("*"))):  # holes are no input
            read(directory)
    except (InputError, *allowed) as error:
        # what does not fit is listed below the line, by names that are plain
        lines = str(error).split("\n  ")
        return None if all(map(is_plain, lines)) else f"not plain: {error!r}"
    except Hang:
        return "hangs"
    except BaseException as error:
        import traceback

        frames = traceback.extract_tb(error.__traceback__)
        where = " <- ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-5:]))
        return f"{type(error).__name__}: {ascii(str(error))[:200]} at {where}"
    return None


def copied(source: Path, target: Path) -> Path:
    """A fresh copy of a small directory."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))
