"""The original model of an adapter: what it was called, where it was, and at which revision."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lowrank_dist.errors import CheckpointError
from lowrank_dist.storage.parse import Record
from lowrank_dist.storage.resolve import commit_of, is_hub_id, resolve_checkpoint


@dataclass(frozen=True, kw_only=True)
class Original:
    """The pretrained weights that an adapter, or a residual model, was made from.

    Attributes
    ----------
    name
        The name that the user of the run gave them: a directory, possibly relative, or a hub id.
    location
        The absolute path, or the hub id.
    commit
        Commit or other revision on the hub; None if it is unknown.
    """

    name: str
    location: str
    commit: str | None = None

    @classmethod
    def at(cls, name: str, directory: Path) -> Original:
        """The weights that a user calls `name`, found in `directory`."""
        location = str(Path(name).absolute()) if Path(name).exists() else name
        return cls(name=name, location=location, commit=commit_of(directory))

    @classmethod
    def recorded(cls, manifest: Record) -> Original | None:
        """The one that a manifest records; None if it names none.

        Older manifests say only where the run found its weights. These are the original ones if they have its name:
        else the run began from a residual model.
        """
        name, location = manifest.text("base", None), manifest.text("base_location", None)
        if name is None:
            return None
        if location is not None:
            return cls(name=name, location=location, commit=manifest.text("base_commit", None))
        location = manifest.text("pretrained", None)
        if location is None or Path(location).name != Path(name).name:
            return cls(name=name, location=name)
        return cls(name=name, location=location, commit=manifest.text("pretrained_commit", None))

    def facts(self) -> dict[str, str]:
        """Its entries of a manifest."""
        commit = {} if self.commit is None else {"base_commit": self.commit}
        return {"base": self.name, "base_location": self.location, **commit}

    @property
    def is_on_hub(self) -> bool:
        """Whether it was read from the hub."""
        return is_hub_id(self.location)

    @property
    def revision(self) -> str | None:
        """The revision that PEFT and transformers load beside the name; None for directories."""
        return self.commit if self.is_on_hub else None

    def chosen(self, revision: str | None = None) -> tuple[str, str | None]:
        """Its name on this machine, and the revision there: what `lowrank_dist.storage.resolve_checkpoint` takes.

        A recorded directory that is not there any more is looked for under the name that the user of the run gave it.

        Parameters
        ----------
        revision
            The revision that the user asks for. Default: the recorded one.
        """
        moved = not self.is_on_hub and not Path(self.location).exists() and Path(self.name).exists()
        return self.name if moved else self.location, revision or self.revision


def find_original(
    original: Original | None,
    instead: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    *,
    of: Path,
    option: str,
) -> Path:
    """Directory of the original model, fetched if necessary; see `Original.chosen`.

    Parameters
    ----------
    original
        The recorded one; None: none is.
    instead, revision
        What the user names.
    of, option
        The adapter, and the option that `instead` comes from, for messages.

    Raises
    ------
    CheckpointError
        If none is named, or if it is not there.
    InputError
        If a revision of a directory is asked for.
    """
    if instead is not None:
        return resolve_checkpoint(instead, revision=revision, option=option)
    if original is None:
        raise CheckpointError(f"{of}: names no base model; pass {option}")
    name, revision = original.chosen(revision)
    try:
        return resolve_checkpoint(name, revision=revision, option="base model")
    except CheckpointError as error:
        raise CheckpointError(f"{error} ({of} names this base model; pass {option} if it is elsewhere now)") from error
