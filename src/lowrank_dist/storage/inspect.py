"""Description of a directory, from its JSON files and weight headers; no model is built and no weight is read.

`inspect` returns a `Description`: the kind of directory, facts in reading order, and missing or damaged parts. A
directory of a known kind is described even if parts of it are missing.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lowrank_dist.errors import CheckpointError
from lowrank_dist.storage.beside import unfinished
from lowrank_dist.storage.headers import INDEX_NAME, open_file, read_index
from lowrank_dist.storage.layout import (
    ADAPTER_DIR,
    CONFIG,
    ENCODED_DIR,
    INITIAL_DIR,
    LORA_DIR,
    MANIFEST,
    OPTIMIZER,
    PARTS,
    QUANT_STATES,
    STATE,
    WEIGHTS,
    encoded_weight,
    read_json,
    read_manifest,
    residual_stem,
)
from lowrank_dist.storage.parse import Record, is_list_of, is_text

OTHER_WEIGHTS = ("*.bin", "*.gguf", "*.h5", "*.msgpack", "*.pt", "*.pth")


@dataclass(kw_only=True)
class Description:
    """Description of a path.

    Attributes
    ----------
    path, kind
        The path, and the kind of directory at it.
    modified
        When it was written, ISO 8601 in UTC.
    nbytes
        Bytes of all files in it.
    facts
        Names and values (numbers, strings, lists and dictionaries of them).
    problems
        Missing or damaged parts; empty if it is complete.
    contents
        Descriptions of the known directories in it, newest first.
    """

    path: str
    kind: str
    modified: str
    nbytes: int
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    contents: list[Description] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether nothing is missing or damaged."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**asdict(self), "complete": self.complete, "contents": [item.as_dict() for item in self.contents]}


def inspect(path: str | os.PathLike[str], *, verify: bool = False) -> Description:
    """Describe a directory, or the snapshot of a hub id in the cache.

    Parameters
    ----------
    path
        The directory or the hub id.
    verify
        Read all tensors too, and compare them with the hashes in the manifest.

    Raises
    ------
    CheckpointError
        If the kind of directory is unknown; the message says what was looked for.

    See Also
    --------
    lowrank_dist.storage.CheckpointReader : Reads the weights.

    Examples
    --------
    >>> import tempfile, torch
    >>> from safetensors.torch import save_file
    >>> from lowrank_dist import inspect
    >>> directory = tempfile.mkdtemp()
    >>> save_file({"layer.weight": torch.ones(4, 3)}, f"{directory}/model.safetensors")
    >>> found = inspect(directory)
    >>> found.kind, found.facts["parameters"], found.problems
    ('model', 12, ['config.json is missing'])
    """
    directory = Path(path)
    if not directory.is_dir():
        from lowrank_dist.storage.resolve import resolve_checkpoint  # imports torch

        directory = resolve_checkpoint(path, option="path", fetch=False)
        if not directory.is_dir():
            raise CheckpointError(f"{path}: is a file; pass the directory that holds it, {directory.absolute().parent}")
    found = _describe(directory, verify=verify)
    if found is None:
        children = [child for child in directory.iterdir() if child.is_dir()]
        contents = [item for child in children if (item := _describe(child, verify=verify))]
        if not contents:
            raise CheckpointError(
                f"{path}: holds no {MANIFEST}, no *_init/{CONFIG}, no {CONFIG}, no config.json with weights, and no "
                "directory with one of these"
            )
        found = Description(path="", kind="directory", modified="", nbytes=0)
        found.contents = sorted(contents, key=lambda item: item.modified, reverse=True)
        found.modified, found.nbytes = found.contents[0].modified, sum(item.nbytes for item in contents)
        found.problems = [f"{Path(item.path).name} is incomplete" for item in found.contents if not item.complete]
    found.path = os.fspath(path)
    if directory != Path(path):
        found.facts["snapshot"] = str(directory)
    return found


def _describe(directory: Path, *, verify: bool) -> Description | None:
    """Describe `directory`; None if its kind is unknown."""
    for kind, test, describe in _KINDS:
        if test(directory):
            files = [file for file in directory.rglob("*") if file.is_file()]
            newest = max((file.stat().st_mtime for file in files), default=directory.stat().st_mtime)
            found = Description(
                path=str(directory),
                kind=kind,
                modified=datetime.fromtimestamp(newest, timezone.utc).isoformat(timespec="milliseconds"),
                nbytes=sum(file.stat().st_size for file in files),
            )
            try:
                describe(directory, found)
                if verify:
                    _verify(directory, found)
            except CheckpointError as error:
                found.problems.append(_within(directory, error))
            return found
    return None


def _verify(directory: Path, found: Description) -> None:
    """Add what differs from the hashes, and what was compared to the facts."""
    # imported here because they import torch, which headers do not need
    from lowrank_dist.distributed.group import ShardGroup
    from lowrank_dist.storage.verify import damage, verify_checkpoint

    alone = ShardGroup.single()
    problem = None
    if found.kind == "residual model":
        problem = damage(directory, alone)
    elif (directory / MANIFEST).exists():
        verify_checkpoint(directory, alone, tuple(PARTS))
    hashes = read_manifest(directory) if (directory / MANIFEST).exists() else {}
    found.facts["hashes compared"] = "tensors" in hashes or "hashes" in hashes
    if problem is not None:
        found.problems.append(problem)


# -- the kinds --------------------------------------------------------------------------------------------------------


def _unfinished(directory: Path, found: Description) -> None:
    """A directory that a dead writer left, or that is being written."""
    item = unfinished(directory)
    assert item is not None
    if item.kind == "old":
        found.problems.append(f"was to be replaced by a new {item.target.name}")
    elif item.kind == "removed":
        found.problems.append(f"{item.target.name} was being removed, or replaced")
    else:
        found.problems.append(f"{item.target.name} is being written, or its writer died")


def _adapter_checkpoint(directory: Path, found: Description) -> None:
    """A checkpoint that `AdapterCheckpoint` wrote."""
    manifest, facts = read_manifest(directory), found.facts
    facts |= _manifest_facts(manifest)
    _add_adapter(directory / ADAPTER_DIR, found)
    copied = manifest.record("recipe").get("expand_blocks")
    if copied is not None:  # the configuration is that of a LoRA of nothing
        for name in ("rank", "alpha", "scaling"):
            facts.pop(name, None)
        facts["type"] = f"copies of layers (expand_blocks={copied})"
    if manifest.get("method") == "LoRAXS":  # the adapter file holds B times the core
        facts["trained parameters"] = sum(entry["rank"] ** 2 for entry in manifest["matrices"])
    elif manifest.get("method") == "SVFT":  # how many entries of the core are trained, only the core itself says
        facts["trained parameters"] = _numel_of_cores(directory) or "those of the core, which the checkpoint lacks"
    parts = [part for part in (ADAPTER_DIR, INITIAL_DIR, ENCODED_DIR, LORA_DIR) if (directory / part).is_dir()]
    facts["bytes"] = {part: _size(directory / part) for part in parts}
    for part in (OPTIMIZER, STATE):
        files = [path for path in directory.glob(f"{part}*") if path.is_file()]
        if files:
            facts["bytes"][part] = sum(path.stat().st_size for path in files)
    lacking = [f"{name} is missing" for name in manifest.get("files", {}) if not (directory / name).is_file()]
    is_lora = facts.get("type", "LORA") == "LORA"  # other types have no lora/
    for part in [LORA_DIR] * is_lora + ([] if manifest.get("starts_at_zero") else [INITIAL_DIR]):
        absent = [file for file in (CONFIG, WEIGHTS) if not (directory / part / file).is_file()]
        lacking += [f"{part}/{file} is missing" for file in absent]
    found.problems += [problem for problem in dict.fromkeys(lacking) if problem not in found.problems]
    _add_lacking(directory, found, _hashed(manifest))
    facts["training can resume"] = OPTIMIZER in manifest.get("hashes", facts["bytes"]) and found.complete


def _numel_of_cores(directory: Path) -> int:
    """Number of elements of the cores, which lie beside the state of the optimizer; 0 if it was not saved."""
    headers = map(_header, sorted(directory.glob("optimizer*.safetensors")))
    return sum(numel for header in headers for name, (_, numel) in header.items() if name.endswith(".core"))


def _decomposed(directory: Path, found: Description) -> None:
    """Residual and initial adapter."""
    initial = [path.parent for path in sorted(directory.glob(f"*_init/{CONFIG}"))]
    manifest, facts = read_manifest(directory) if (directory / MANIFEST).is_file() else {}, found.facts
    facts |= _manifest_facts(manifest) or {"method": initial[0].name.removesuffix("_init")}
    if len(initial) > 1:
        found.problems.append(f"{len(initial)} initial adapters: {', '.join(path.name for path in initial)}")
    _add_adapter(initial[0], found)
    weights = Weights(directory, residual_stem(directory))
    facts["residual"] = facts.pop("quantization", None) or next(
        (name for name in weights.parameters if name.lower() in QUANT_STATES), "dense"
    )
    _add_weights(weights, found)
    places = {residual_stem(directory): ""}
    digests = manifest.get("tensors", {}).items()
    _add_lacking(directory, found, [(places.get(stem, initial[0].name), stem, names) for stem, names in digests])
    facts["bytes"] = {"residual": weights.nbytes, **{path.name: _size(path) for path in initial}}


def _peft_adapter(directory: Path, found: Description) -> None:
    """An adapter that PEFT wrote; a converted LoRA also has a manifest."""
    manifest = read_manifest(directory) if (directory / MANIFEST).is_file() else {}
    found.facts |= _manifest_facts(manifest)
    _add_adapter(directory, found)
    _add_lacking(directory, found, _hashed(manifest))


def _model(directory: Path, found: Description) -> None:
    """An ordinary Hugging Face model."""
    file, facts = directory / "config.json", found.facts
    config = read_json(file) if file.is_file() else Record({}, str(file))
    names = config.expect("architectures", is_list_of(is_text), "names of classes", None)
    facts["architecture"] = ", ".join(names or ["unknown"])
    for key in ("model_type", "dtype", "torch_dtype", "tie_word_embeddings", "vocab_size"):
        if key in config:
            facts[key.removeprefix("torch_").replace("_", " ")] = config[key]
    if "quantization_config" in config:
        facts["quantization"] = config.record("quantization_config").get("quant_method", "yes")
    if not config:
        found.problems.append("config.json is missing")
    others = sorted(path.name for pattern in OTHER_WEIGHTS for path in directory.glob(pattern))
    if others and not any(directory.glob("*.safetensors*")):
        facts["weights"] = others
        if not any(name.endswith(".gguf") for name in others):
            found.problems.append("no safetensors and no GGUF; `lowrank-dist import` writes them of *.bin and *.pt")
    else:
        _add_weights(Weights(directory), found)


def _has_weights(directory: Path) -> bool:
    if (directory / INDEX_NAME).is_file() or (directory / "model.safetensors").is_file():
        return True
    patterns = ("*.safetensors", *OTHER_WEIGHTS)
    return (directory / "config.json").is_file() and any(any(directory.glob(pattern)) for pattern in patterns)


# the first kind whose test passes is taken
_KINDS: list[tuple[str, Callable[[Path], bool], Callable[[Path, Description], None]]] = [
    ("unfinished directory", lambda path: unfinished(path) is not None, _unfinished),
    (
        "checkpoint of an adapter",
        lambda path: (path / MANIFEST).is_file() and (path / ADAPTER_DIR).is_dir(),
        _adapter_checkpoint,
    ),
    ("residual model", lambda path: any(path.glob(f"*_init/{CONFIG}")), _decomposed),
    ("PEFT adapter", lambda path: (path / CONFIG).is_file(), _peft_adapter),
    ("model", _has_weights, _model),
]


# -- facts ------------------------------------------------------------------------------------------------------------


def _manifest_facts(manifest: dict[str, Any]) -> dict[str, Any]:
    keys = ("base", "method", "options", "quantization", "adapter_is_for", "step", "world_size")
    facts = {key.replace("_", " "): manifest[key] for key in keys if manifest.get(key) is not None}
    if manifest.get("matrices"):
        facts["matrices"] = len(manifest["matrices"])
    if "lowrank_dist" in manifest:
        facts["written by"] = f"lowrank_dist {manifest['lowrank_dist']}"
    return facts


def _hashed(manifest: dict[str, Any]) -> Iterator[tuple[str, str, Iterable[str]]]:
    """Place and stem of the files that a manifest has hashes of, and the names of their tensors."""
    for part, hashes in manifest.get("hashes", {}).items():
        yield *PARTS.get(part, ("", part)), hashes


def _add_lacking(directory: Path, found: Description, hashed: Iterable[tuple[str, str, Iterable[str]]]) -> None:
    """Add the files and tensors that are missing of those of which a manifest has digests."""
    for place, stem, names in hashed:
        file = f"{place}/{stem}.safetensors".lstrip("/")
        if not _holds(directory / place, stem):
            problems = [f"{file} is missing"]
        else:
            weights = Weights(directory / place, stem)
            problems = [f"{place}: {problem}".removeprefix(": ") for problem in weights.problems]
            lacking = sorted(set(names) - weights.tensors)
            if lacking and not problems:
                problems = [f"{file} lacks {_first_of(lacking)}"]
        found.problems += [problem for problem in problems if problem not in found.problems]


#: Entries of an adapter's configuration that are listed if they are set.
_LISTED = (
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "target_parameters",
    "modules_to_save",
    "use_dora",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "token_indices",
    "num_virtual_tokens",
)


def _add_adapter(directory: Path, found: Description) -> None:
    """Add the facts of an adapter that PEFT or this package wrote."""
    config, facts = _adapter_config(directory), found.facts
    if config.get("base_model_name_or_path"):
        facts.setdefault("base", config["base_model_name_or_path"])  # a manifest takes precedence
    facts["type"] = config.get("peft_type", "unknown")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, int) and rank > 0:
        facts["rank"] = rank
        if isinstance(alpha, int | float):
            rslora = bool(config.get("use_rslora"))
            facts |= {"alpha": alpha, "scaling": alpha / (math.sqrt(rank) if rslora else rank)}
            if rslora:
                facts["rsLoRA"] = True
    if config.get("bias", "none") != "none":
        facts["bias"] = config["bias"]
    for key in _LISTED:
        if config.get(key):
            facts[key.replace("_", " ")] = (
                sorted(config[key], key=str) if isinstance(config[key], list) else config[key]
            )
    if not _holds(directory, Path(WEIGHTS).stem):
        found.problems.append(f"{directory.name}/{WEIGHTS} is missing")
        return
    try:
        weights = Weights(directory, Path(WEIGHTS).stem)
    except CheckpointError as error:
        found.problems.append(f"{directory.name}: {error}")
        return
    found.problems += [f"{directory.name}: {problem}" for problem in weights.problems]
    facts["trained parameters"] = sum(weights.parameters.values())
    facts["adapter dtype"] = ", ".join(weights.parameters)
    if weights.not_read:
        facts["not read"] = weights.not_read


def _adapter_config(directory: Path) -> dict[str, Any]:
    """PEFT's configuration; of AdaLoRA with the ranks that it means."""
    config: dict[str, Any] = read_json(directory / CONFIG)
    if config.get("peft_type") == "ADALORA":  # it has no use for `r`, and the pattern lists every triplet
        kept = config.get("rank_pattern") or {}
        lists = kept.values() if isinstance(kept, dict) else [kept]
        if not all(isinstance(keeps, list) and all(isinstance(keep, bool) for keep in keeps) for keeps in lists):
            raise CheckpointError(f"{directory / CONFIG}: rank_pattern must list true or false for every triplet")
        config["r"] = config.get("init_r")
        config["rank_pattern"] = {name.removesuffix(".lora_E"): sum(keeps) for name, keeps in kept.items()}
    return config


def _add_weights(weights: Weights, found: Description) -> None:
    found.problems += weights.problems
    found.facts |= {
        "parameters": sum(weights.parameters.values()),
        "by dtype": dict(weights.parameters),
        "files": len(weights.files),
    }
    if weights.not_read:
        found.facts["not read"] = weights.not_read


class Weights:
    """Contents of safetensors files according to their headers.

    Parameters
    ----------
    directory, stem
        ``<stem>.safetensors``, or else the files that ``<stem>.safetensors.index.json`` names.

    Attributes
    ----------
    files : list of str
        Names of the files that there should be.
    parameters : Counter
        Numbers by dtype, as far as files are there; those of encoded weights by their format (``NF4``, ...), without
        what belongs to their quantization.
    nbytes : int
        Of the files that are there.
    not_read : str or None
        Name of an index beside a single file, which is read in its place.
    tensors : set of str
        Names of the tensors in the files that are there.
    problems : list of str
        Files that are missing, truncated or damaged, and tensors that they lack.

    Raises
    ------
    CheckpointError
        If there are no such files, or the index is damaged.
    """

    def __init__(self, directory: Path, stem: str = "model") -> None:
        index, single = directory / INDEX_NAME.replace("model", stem, 1), directory / f"{stem}.safetensors"
        names: dict[str, set[str]] = {}
        self.not_read = index.name if single.is_file() and index.is_file() else None
        if single.is_file():  # as `CheckpointReader`
            names[single.name] = set()
        elif index.is_file():
            for tensor, file in read_index(index).items():
                names.setdefault(file, set()).add(tensor)
        else:
            raise CheckpointError(f"holds neither {index.name} nor {single.name}")
        self.files, self.nbytes, self.problems = sorted(names), 0, list[str]()
        tensors: dict[str, tuple[str, int]] = {}  # dtype, elements
        for file in self.files:
            path = directory / file
            if not path.is_file():
                self.problems.append(f"{file} is missing")
                continue
            self.nbytes += path.stat().st_size
            try:
                held = _header(path)
            except CheckpointError as error:
                self.problems.append(_within(directory, error))
                continue
            tensors |= held
            lacking = sorted(names[file] - held.keys())
            if lacking:
                self.problems.append(f"{file} lacks {_first_of(lacking)}")
        self.tensors = set(tensors)
        states = {name: found for name in tensors if (found := encoded_weight(name)) is not None}
        packed = dict(states.values())
        self.parameters = Counter[str]()
        for name, (dtype, numel) in tensors.items():
            if name in packed:
                self.parameters[packed[name].upper()] += 2 * numel if packed[name].endswith("4") else numel
            elif name not in states and name.rpartition(".")[0] not in packed:
                self.parameters[dtype] += numel


def _holds(directory: Path, stem: str) -> bool:
    """Whether there is a file of weights of this stem, or an index of several."""
    return any((directory / f"{stem}.safetensors{end}").is_file() for end in ("", ".index.json"))


def _first_of(names: Sequence[str]) -> str:
    return f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}"


def _header(path: Path) -> dict[str, tuple[str, int]]:
    """Dtype and number of elements of every tensor of a safetensors file."""
    with open_file(path, framework="numpy") as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
        return {name: (view.get_dtype(), math.prod(view.get_shape())) for name, view in views.items()}


def _within(directory: Path, error: Exception) -> str:
    """Message of `error`, with file names relative to `directory`."""
    return str(error).replace(f"{directory}{os.sep}", "")


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
