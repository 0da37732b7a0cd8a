"""Which files of a directory hold the weights of a model: the usual ones, or what comes closest to them.

Usual are ``model.safetensors``, or ``model.safetensors.index.json`` and the files that it names, which transformers
loads too. Where neither exists, files under other names are taken if there is one choice only, and a line says so.
Otherwise an error lists what was found.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from lowrank_dist.errors import CheckpointError
from lowrank_dist.storage.headers import INDEX_NAME

log = logging.getLogger(__name__)

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.[^.]+)?\.safetensors")
#: Weights that are no model.
_OTHERS = ("adapter_model.safetensors", "residual.safetensors")
#: Weights that only pickle reads.
PICKLED = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The files with the weights of a model.

    Attributes
    ----------
    directory
        Where they are.
    index
        The index that says which tensor is in which file; None: all tensors of `files` are meant.
    files
        Names of the files, if there is no index.
    """

    directory: Path
    index: Path | None = None
    files: tuple[str, ...] = ()


def find_weights(path: Path, stem: str = "model") -> WeightFiles:
    """Find the safetensors files of a model.

    Parameters
    ----------
    path
        A directory, or one file.
    stem
        Replaces ``model`` in the usual names. Files under other names are looked for only if it is ``model``.

    Raises
    ------
    CheckpointError
        If there are none, or several and it is open which are meant.
    """
    if path.is_file():
        part = _PART.fullmatch(path.name)
        if part is not None and int(part[3]) > 1:
            raise CheckpointError(
                f"{path}: is part {int(part[2])} of {int(part[3])}; pass the directory of all of them"
            )
        return WeightFiles(directory=path.parent, files=(path.name,))
    single, index = path / f"{stem}.safetensors", path / INDEX_NAME.replace("model", stem, 1)
    if single.is_file():
        if index.is_file():
            _say(f"{single} is read, as transformers does, and {index.name} beside it is not; remove one of them")
        return WeightFiles(directory=path, files=(single.name,))
    if index.is_file():
        return WeightFiles(directory=path, index=index)
    if stem == "model":
        found = _variant(path) or _parts(path) or _only_file(path)
        if found is not None:
            return found
        pickled = sorted(file.name for pattern in PICKLED for file in path.glob(pattern))
        if pickled:
            raise CheckpointError(
                f"{path}: holds {', '.join(pickled[:3])} and neither {index.name} nor {single.name}; write the weights "
                f"as safetensors first: `lowrank-dist import {path} --output DIRECTORY`"
            )
    raise CheckpointError(
        f"{path}: holds neither {index.name} nor {single.name}; pass a directory or a hub id with "
        "safetensors weights (convert others with `model.save_pretrained(directory)` of transformers)"
    )


def holds_weights(path: Path) -> bool:
    """Whether a path is a file of weights, or a directory with some."""
    if path.is_file():
        return path.suffix in (".safetensors", ".gguf")
    return any(any(path.glob(pattern)) for pattern in ("*.safetensors", "*.gguf"))


def _variant(path: Path) -> WeightFiles | None:
    """``model.fp16.safetensors`` and the like, or an index of such a variant."""
    files = (file for file in path.glob("model.*.safetensors") if _PART.fullmatch(file.name) is None)
    singles = {file.name.split(".")[1]: file for file in files}
    indices = {file.name.split(".")[-2]: file for file in path.glob("model.safetensors.index.*.json")}
    variants = sorted({*singles, *indices})
    if len(variants) > 1:
        raise CheckpointError(
            f"{path}: holds the variants {', '.join(variants)} of the weights; pass one of the files, or move one set "
            "into a directory with config.json"
        )
    for variant in variants:
        _say(f"{path}: the variant {variant!r} of the weights is read, as there is no other")
        if variant in singles:
            return WeightFiles(directory=path, files=(singles[variant].name,))
        return WeightFiles(directory=path, index=indices[variant])
    return None


def _parts(path: Path) -> WeightFiles | None:
    """All files of one set of numbered parts whose index is missing."""
    matches = [match for file in sorted(path.glob("*.safetensors")) if (match := _PART.fullmatch(file.name))]
    sets = {(match[1], match[3], match[4]) for match in matches}
    if len(sets) > 1:
        raise CheckpointError(f"{path}: holds {len(sets)} sets of parts and no index; keep one of them")
    if not matches:
        return None
    count, numbers = int(matches[0][3]), {int(match[2]) for match in matches}
    missing = sorted(set(range(1, count + 1)) - numbers)
    if missing:
        raise CheckpointError(
            f"{path}: holds {len(numbers)} of {count} parts and no index; missing: {', '.join(map(str, missing[:9]))}"
        )
    _say(f"{path}: holds no index; all tensors of its {count} parts are read")
    return WeightFiles(directory=path, files=tuple(match[0] for match in matches))


def _only_file(path: Path) -> WeightFiles | None:
    """The only safetensors file, whatever its name."""
    names = sorted(file.name for file in path.glob("*.safetensors") if file.name not in _OTHERS)
    if len(names) > 1:
        raise CheckpointError(
            f"{path}: holds {', '.join(names[:5])} and no index; pass one of them, or fetch {INDEX_NAME}"
        )
    if names:
        _say(f"{path / names[0]} is read, as there are no other weights")
        return WeightFiles(directory=path, files=(names[0],))
    return None


def is_cache_of_model(path: Path) -> bool:
    """Whether a path is a directory of the hub's cache, ``models--owner--name``."""
    return path.name.startswith("models--") and (path / "snapshots").is_dir()


def cached_snapshot(path: Path, revision: str | None = None) -> Path:
    """The snapshot in a directory of the hub's cache, ``models--owner--name``; other directories are returned.

    Raises
    ------
    CheckpointError
        If it holds several snapshots and no reference to the revision.
    """
    snapshots = path / "snapshots"
    if not is_cache_of_model(path):
        return path
    reference = path / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision or ""
    if re.fullmatch("[0-9a-f]{40}", commit) and (snapshots / commit).is_dir():
        return snapshots / commit
    found = sorted(child for child in snapshots.iterdir() if child.is_dir())
    if len(found) == 1 and revision is None:
        return found[0]
    raise CheckpointError(
        f"{path}: is of the hub's cache, with {len(found)} snapshots and no {revision or 'main'}; pass one of "
        f"{', '.join(str(child) for child in found) or 'them: there are none, fetch the model again'}"
    )


def plain_names(names: Iterable[str], where: Path) -> Mapping[str, str]:
    """Stored names by the names without what wrappers of modules add; empty if there is nothing to remove.

    ``torch.compile`` adds ``_orig_mod.`` anywhere, ``DataParallel`` and its kin ``module.`` before every name.

    Raises
    ------
    CheckpointError
        If two tensors would have one name.
    """
    names = list(names)
    prefix = "module." if names and all(name.startswith("module.") for name in names) else ""
    plain = {name: name.removeprefix(prefix).replace("_orig_mod.", "") for name in names}
    if all(name == other for name, other in plain.items()):
        return {}
    stored: dict[str, str] = {}
    for name, short in plain.items():
        if short in stored:
            raise CheckpointError(f"{where}: {stored[short]} and {name} are both {short}; keep one of them")
        stored[short] = name
    _say(f"{where}: {prefix or '_orig_mod.'} in the names of its tensors, which a wrapper of modules left, is ignored")
    return stored


@functools.cache
def _say(line: str) -> None:
    """Warn once, on rank 0."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        log.warning("%s", line)
