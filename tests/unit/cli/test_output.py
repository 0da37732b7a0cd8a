"""Files that commands write, which are checked before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank_dist.cli.output import check_outputs
from lowrank_dist.errors import InputError


def test_new_files_may_be_written_and_nothing_is_left(tmp_path: Path) -> None:
    before = tmp_path / "before"
    before.touch()
    files = {"--json": str(tmp_path / "new" / "a.json"), "--html": None, "--picture": str(before)}
    check_outputs(files, overwrite=True)
    assert list(tmp_path.iterdir()) == [before]
    with pytest.raises(InputError, match="before: exists; choose another path or pass overwrite"):
        check_outputs(files, overwrite=False)


def test_two_outputs_are_two_files(tmp_path: Path) -> None:
    same = {"--output": str(tmp_path / "z"), "--samples": str(tmp_path / "." / "z")}
    with pytest.raises(InputError, match=r"--samples .*z is --output too; choose another path"):
        check_outputs(same, overwrite=False)


def test_no_input_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.touch()
    with pytest.raises(InputError, match=r"--json .*report.json is what the command reads too"):
        check_outputs({"--json": str(file)}, overwrite=True, inputs=[file])


@pytest.mark.parametrize("parent", ["/proc/x", "file", "file/below"])
def test_what_cannot_be_written_is_named(parent: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"a.json: nothing can be written in /"):
        check_outputs({"--json": str(tmp_path / parent / "a.json")}, overwrite=False)


def test_overwrite_needs_something_to_overwrite() -> None:
    with pytest.raises(InputError, match="--overwrite has no effect without --json or --picture; leave it out"):
        check_outputs({"--json": None, "--picture": None}, overwrite=True)
