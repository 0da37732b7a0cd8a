"""The points of a sweep apart from each other: a directory for each, and the same nodes for all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_dist.slurm.checks import JobShape, written_paths
from lowrank_dist.slurm.options import FILES, SubmitError

Point = Mapping[str, str]


def directory_names(points: Sequence[Point]) -> list[str]:
    """Names of the points' directories, such as ``config=qpissa,lr=1e-4``."""
    names = file_names(list(dict.fromkeys(point[FILES] for point in points if FILES in point)))
    return [_joined({key: names[value] if key == FILES else value for key, value in point.items()}) for point in points]


def file_names(files: Sequence[str]) -> dict[str, str]:
    """Names by which files differ: their stems or, where these are the same, directories above and endings too."""
    paths = {file: Path(os.path.abspath(file)) for file in files}
    deepest = max((len(path.parts) for path in paths.values()), default=1)
    names: dict[str, str] = {}
    for depth in range(1, deepest):
        for end in ("stem", "name"):
            names = {file: "-".join((*path.parts[1:][-depth:-1], getattr(path, end))) for file, path in paths.items()}
            if len(set(names.values())) == len(names):
                return names
    return names  # of one file that is named twice


def _joined(point: Point) -> str:
    return ",".join(f"{key.split('.')[-1]}={value}" for key, value in point.items())


def own_directory(directory: Path, settings: Any) -> list[str]:
    """Arguments that let a point, of these settings otherwise, write to `directory`."""
    own = str(directory)
    added = [f"--trainer.default_root_dir={own}"]
    logger = settings.trainer.logger
    if isinstance(logger, list):
        if any(_has_save_dir(part) for part in logger):
            added.append(f"--trainer.logger={json.dumps([_moved(part, own) for part in logger], default=str)}")
    elif _has_save_dir(logger):
        added.append(f"--trainer.logger.init_args.save_dir={own}")
    return added


def _has_save_dir(logger: Any) -> bool:
    return getattr(getattr(logger, "init_args", None), "save_dir", None) is not None


def _moved(logger: Any, own: str) -> dict[str, Any]:
    """A logger of a list, which is given as a whole."""
    found: dict[str, Any] = logger.as_dict()
    return found | ({"init_args": found["init_args"] | {"save_dir": own}} if _has_save_dir(logger) else {})


def check_points(points: Sequence[Point], shapes: Sequence[JobShape], settings: Sequence[Any]) -> None:
    """Raise SubmitError if two points would write to the same place, or need other nodes than the first.

    Parameters
    ----------
    points, shapes, settings
        The points, and for each what it requests and its parsed configuration.
    """
    by_root: dict[Path, Point] = {}
    for point, shape in zip(points, shapes, strict=True):
        other = by_root.setdefault(shape.root.resolve(), point)
        if other is not point:
            raise SubmitError(
                f"--sweep: the points {_joined(other)} and {_joined(point)} would share the directory {shape.root}, "
                "and the second would resume from the first; give every value once"
            )
        if shape.resources != shapes[0].resources:
            raise SubmitError(
                f"--sweep: {_joined(point)} needs {_told(shape)}, and {_joined(points[0])} {_told(shapes[0])}; the "
                "jobs of an array are given the same: submit them one by one"
            )
    written: set[Path] = set()
    for of_point in settings:
        found = written_paths(of_point)
        if (shared := next((path for path in found if path in written), None)) is not None:
            name = found[shared]
            raise SubmitError(
                f"--sweep: every point would write to {name}={shared}; remove {name.rpartition('.')[2]} there, or make "
                "it relative where it is a file, and each point writes below its own default_root_dir"
            )
        written |= found.keys()


def _told(shape: JobShape) -> str:
    least, most = shape.counts[0], shape.counts[-1]
    nodes = f"{most}" if least == most else f"{least} to {most}"
    return f"{nodes} node{'s'[: most > 1]} of {shape.devices} {'GPU' if shape.on_gpu else 'CPU'} ranks"
