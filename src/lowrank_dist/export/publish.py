"""A LoRA or a merged model with its model card, as it is published: in a directory, or on the Hugging Face hub."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import CheckpointError, InputError
from lowrank_dist.export.serving import objections
from lowrank_dist.storage.atomic import atomic_directory
from lowrank_dist.storage.layout import CONFIG, MANIFEST, WEIGHTS, read_json, read_manifest, sealed
from lowrank_dist.storage.original import Original
from lowrank_dist.storage.parse import Record
from lowrank_dist.storage.reader import CheckpointReader
from lowrank_dist.storage.small_files import small_files
from lowrank_dist.storage.verify import verify_adapter

CARD = "README.md"
#: Entries of a manifest that name places on the machine that wrote it, and those of the base, which are written anew.
_LOCAL = ("pretrained", "pretrained_commit", "started_from", "adapter", "saved_by", "files", "seal")
_OF_THE_BASE = ("base", "base_location", "base_commit")
_TASKS = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}

Scores = Mapping[str, Mapping[tuple[str, str], tuple[float, float | None]]]
"""By model (``base``, ``converted``, ...): value and standard error by task and metric."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a model card says that the files do not.

    Attributes
    ----------
    base_model
        Hub id of the original model. None: the name under which the run loaded it, which must then be one.
    title
        Heading of the card.
    datasets
        Names of the training data.
    license
        Identifier of the licence, as the hub knows it. None: none is stated.
    scores
        Scores of the models of the checkpoint.
    """

    base_model: str | None = None
    title: str
    datasets: Sequence[str] = ()
    license: str | None = None
    scores: Scores | None = None


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Files by their name in the repository: a path to copy, or the text."""

    files: Mapping[str, Path | str]

    def write(self, output: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the files to a directory, complete or not at all.

        Raises
        ------
        InputError
            If something is there that may not be replaced.
        """
        with atomic_directory(output, overwrite=overwrite) as staging:
            for name, content in self.files.items():
                (staging / name).parent.mkdir(exist_ok=True)
                if isinstance(content, Path):
                    shutil.copyfile(content, staging / name)
                else:
                    (staging / name).write_text(content, encoding="utf-8")

    def upload(self, repo_id: str, *, private: bool, revision: str | None, message: str) -> str:
        """Make the repository if it is not there, and upload the files in one commit.

        Returns
        -------
        str
            The address of the commit.

        Raises
        ------
        InputError
            If the hub refuses, or cannot be reached.
        """
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.errors import HFValidationError, HTTPError

        api, operations = HfApi(), []
        for name, content in self.files.items():
            data = content if isinstance(content, Path) else content.encode()
            operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=data))
        try:
            # not False: it is public, whatever is the organisation's default
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            done = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
        except (HTTPError, HFValidationError, OSError) as error:
            raise InputError(f"{repo_id}: not uploaded: {' '.join(str(error).split())}") from error
        return str(done.commit_url)


def publication(source: str | os.PathLike[str], about: About) -> Publication:
    """What of a directory is published, after its tensors were compared with their hashes.

    Names of directories of this machine are left out of the configuration and of the manifest.

    Parameters
    ----------
    source
        Directory that ``lowrank-dist convert`` or ``lowrank-dist merge`` wrote.
    about
        What the card says beside.

    Raises
    ------
    InputError
        If it is something else, or the base has no hub id.
    CheckpointError
        If it is damaged.
    """
    source = Path(source)
    manifest = read_manifest(source)
    kind = manifest.get("kind")
    if kind == "checkpoint":
        raise InputError(
            f"{source}: is a checkpoint; convert it first (lowrank-dist convert {source} --output DIR), or merge it"
        )
    if kind not in ("lora", "merged"):
        raise InputError(f"{source}: is of the kind {kind!r}; pass a directory that convert or merge wrote")
    return _lora(source, manifest, about) if kind == "lora" else _merged(source, manifest, about)


def _lora(source: Path, manifest: Record, about: About) -> Publication:
    base = _published_base(manifest, source, about.base_model)
    verify_adapter(source, ShardGroup.single())
    config = read_json(source / CONFIG)
    named = {**config, "base_model_name_or_path": base.name, "revision": base.commit}
    card = _Card(manifest, base, about)
    card.add("rank", f"{config.get('r')}" + (" and others (`rank_pattern`)" if config.get("rank_pattern") else ""))
    card.notes += objections(source)
    return Publication(
        files={
            CARD: card.text(adapter=config),
            CONFIG: json.dumps(named, indent=2) + "\n",
            WEIGHTS: source / WEIGHTS,
            MANIFEST: _scrubbed(manifest, base),
        }
    )


def _merged(source: Path, manifest: Record, about: About) -> Publication:
    trained = manifest
    with suppress(CheckpointError, OSError):  # the checkpoint knows how it was trained, if it is still there
        trained = read_manifest(Path(manifest.text("adapter")))
    base = _published_base(trained, source, about.base_model)
    with closing(CheckpointReader(source)) as reader:
        weights = {path.name: path for path in reader.files}
    others = small_files(source, weights.values())
    index = source / "model.safetensors.index.json"
    if index.is_file():
        others[index.name] = index
    card = _Card(trained, base, about)
    return Publication(files={**others, **weights, CARD: card.text(adapter=None), MANIFEST: _scrubbed(manifest, base)})


def _published_base(manifest: Record, source: Path, named: str | None) -> Original:
    """The base under its hub id: the one that the user has `named`, or the recorded one.

    Its commit is the recorded one, unless that is of another model of the hub than the named one.
    """
    recorded = Original.recorded(manifest)
    if named is not None:
        known = recorded is not None and (not recorded.is_on_hub or recorded.location == named)
        return Original(name=named, location=named, commit=recorded.commit if recorded and known else None)
    if recorded is None or not recorded.is_on_hub:
        raise InputError(
            f"{source}: its base is {recorded and recorded.name!r}, a directory of this machine, which nobody else "
            "has; pass --base_model ORG/NAME"
        )
    return recorded


def _scrubbed(manifest: Record, base: Original) -> str:
    kept = {key: value for key, value in manifest.items() if key not in (*_LOCAL, *_OF_THE_BASE)}
    return json.dumps(sealed({**kept, **base.facts()}), indent=1, sort_keys=True) + "\n"


class _Card:
    """A model card in the making."""

    def __init__(self, manifest: Record, base: Original, about: About) -> None:
        self.manifest, self.base, self.about = manifest, base, about
        self.rows: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.add("base", f"`{base.name}`" + (f", commit `{base.commit}`" if base.commit else ""))
        self.add("fingerprint of its weights", _code(manifest.get("pretrained_fingerprint")))
        self.add("initialisation", manifest.get("method"))
        self.add("base in training", _code(manifest.get("quantization")))
        self.add("precision of training", manifest.get("precision"))
        self.add("optimizer steps", manifest.get("step"))
        self.add("training data", ", ".join(f"`{name}`" for name in about.datasets))
        self._add_errors()

    def add(self, name: str, value: Any) -> None:
        """A row of the table, if there is a value."""
        if value not in (None, ""):
            self.rows.append((name, str(value)))

    def _add_errors(self) -> None:
        matrices = self.manifest.records("matrices")
        known = [m for m in matrices if isinstance(m.get("error"), float) and isinstance(m.get("norm"), float)]
        norm = math.hypot(*(m["norm"] for m in known))
        if self.manifest.get("residual") and norm:
            left = math.hypot(*(m["error"] for m in known)) / norm
            self.add("lost to quantization in training, and not made up for here", f"{left:.2%} of the adapted weights")
        kept = self.manifest.get("energy_kept")
        if isinstance(kept, Mapping) and isinstance(kept.get("overall"), float):
            self.add("energy of the update kept at this rank", f"{kept['overall']:.2%}")

    def text(self, *, adapter: Record | None) -> str:
        """The card of an adapter with this configuration, or of a merged model."""
        from huggingface_hub import ModelCardData

        name = "MODEL" if adapter is None else "ADAPTER"
        method = str(self.manifest.get("method") or "")
        data = ModelCardData(
            base_model=self.base.name,
            library_name="transformers" if adapter is None else "peft",
            pipeline_tag="text-generation" if adapter is None else _TASKS.get(str(adapter.get("task_type"))),
            license=self.about.license,
            datasets=list(self.about.datasets) or None,
            tags=["lowrank-dist", *(["lora"] if adapter is not None else []), *([method.lower()] if method else [])],
        )
        what = "A LoRA for" if adapter is not None else "The merged weights of a LoRA and"
        blocks = [
            f"---\n{data.to_yaml()}\n---",
            f"# {self.about.title}",
            f"{what} `{self.base.name}`, trained with lowrank_dist {self.manifest.get('lowrank_dist')}.",
            _table(["", ""], self.rows),
        ]
        if self.about.scores:
            blocks += ["## Scores", _scores(self.about.scores)]
        if self.notes:
            blocks += ["## Serving", "\n".join(f"- {note}" for note in self.notes)]
        use = [
            "from transformers import AutoModelForCausalLM",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        ]
        if adapter is not None:
            revision = f', revision="{self.base.commit}"' if self.base.commit else ""
            use = [
                "from peft import PeftModel",
                "from transformers import AutoModelForCausalLM",
                "",
                f'base = AutoModelForCausalLM.from_pretrained("{self.base.name}"{revision})',
                f'model = PeftModel.from_pretrained(base, "{name}")',
            ]
        if self._is_causal(adapter):
            blocks += ["## Use", "\n".join(["```python", *use, "```"])]
        return "\n\n".join(blocks) + "\n"

    @staticmethod
    def _is_causal(adapter: Record | None) -> bool:
        return adapter is None or adapter.get("task_type") in (None, "CAUSAL_LM")


def _code(value: object) -> str | None:
    return None if value in (None, "") else f"`{value}`"


def _scores(scores: Scores) -> str:
    keys = list(dict.fromkeys(key for found in scores.values() for key in found))
    rows = []
    for task, metric in keys:
        cells = []
        for found in scores.values():
            value, error = found.get((task, metric), (None, None))
            cells.append("" if value is None else f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}"))
        rows.append((task, metric, *cells))
    return _table(["task", "metric", *scores], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '¦') for cell in line)} |" for line in lines)
