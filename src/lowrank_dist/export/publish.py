"""A LoRA or a merged model with its model card, as it is published: in a directory, or on the Hugging Face hub."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import CheckpointError, InputError
from lowrank_dist.export.card import CARD, About, Card, Use
from lowrank_dist.export.serving import objections
from lowrank_dist.storage.atomic import atomic_directory
from lowrank_dist.storage.layout import CONFIG, MANIFEST, WEIGHTS, manifest_for, read_json, read_manifest, sealed
from lowrank_dist.storage.original import Original
from lowrank_dist.storage.parse import Record
from lowrank_dist.storage.reader import CheckpointReader
from lowrank_dist.storage.resolve import resolve_checkpoint
from lowrank_dist.storage.small_files import small_files
from lowrank_dist.storage.verify import verify_adapter

#: Entries of a manifest that name places on the machine that wrote it, and those of the base, which are written anew.
_LOCAL = ("pretrained", "pretrained_commit", "started_from", "adapter", "saved_by", "files", "seal")
_OF_THE_BASE = ("base", "base_location", "base_commit")


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Files by their name in the repository: a path to copy, or the text; and the kind of what they are."""

    files: Mapping[str, Path | str]
    kind: str

    def write(self, output: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the files to a directory, complete or not at all.

        Raises
        ------
        InputError
            If something is there that may not be replaced.
        """
        with atomic_directory(output, overwrite=overwrite, kind=self.kind) as staging:
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
    named = {**_without_places(config), "base_model_name_or_path": base.name, "revision": base.commit}
    card = Card(manifest, base, about, Use.of_adapter(config) or _use_of(Original.recorded(manifest)))
    card.add("rank", f"{config.get('r')}" + (" and others (`rank_pattern`)" if config.get("rank_pattern") else ""))
    card.notes += objections(source)
    return Publication(
        files={
            CARD: card.text(adapter=config),
            CONFIG: json.dumps(named, indent=2) + "\n",
            WEIGHTS: source / WEIGHTS,
            MANIFEST: _scrubbed(manifest, base),
        },
        kind="lora",
    )


def _merged(source: Path, manifest: Record, about: About) -> Publication:
    trained = manifest
    with suppress(CheckpointError, OSError):  # the checkpoint knows how it was trained, if it is still there
        trained = manifest_for(Path(manifest.text("adapter"))) or manifest
    base = _published_base(trained, source, about.base_model)
    with closing(CheckpointReader(source)) as reader:
        weights = {path.name: path for path in reader.files}
    others = {name: _published(name, path) for name, path in small_files(source, weights.values()).items()}
    index = source / "model.safetensors.index.json"
    if index.is_file():
        others[index.name] = index
    card = Card(trained, base, about, Use.of_model(read_json(source / "config.json")))
    files = {**others, **weights, CARD: card.text(adapter=None), MANIFEST: _scrubbed(manifest, base)}
    return Publication(files=files, kind="merged")


def _use_of(original: Original | None) -> Use | None:
    """How a base is used, if its configuration is on this machine."""
    if original is None:
        return None
    name, revision = original.chosen()
    with suppress(InputError, OSError):
        return Use.of_model(read_json(resolve_checkpoint(name, revision=revision, fetch=False) / "config.json"))
    return None


def _published(name: str, path: Path) -> Path | str:
    """A file as it is published: settings without the names of directories of this machine."""
    if not name.endswith("config.json"):
        return path
    settings, kept = read_json(path), _without_places(read_json(path))
    return path if kept == settings else json.dumps(kept, indent=2, ensure_ascii=False) + "\n"


def _without_places(settings: Any) -> Any:
    """Settings without entries that say where transformers, or PEFT, found the model and its files."""
    if isinstance(settings, list):
        return [_without_places(value) for value in settings]
    if not isinstance(settings, Mapping):
        return settings
    return {
        name: _without_places(value)
        for name, value in settings.items()
        if not name.endswith("name_or_path") and not _is_path(name, value)
    }


def _is_path(name: str, value: object) -> bool:
    """Whether an entry of settings is an absolute path; tokens, too, may begin with a slash."""
    return name.endswith(("_file", "_path", "_dir")) and isinstance(value, str) and Path(value).is_absolute()


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
