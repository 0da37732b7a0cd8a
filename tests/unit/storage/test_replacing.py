"""The one rule for what a new directory may replace."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.staging import put, thesis_in
from lowrank_dist.errors import InputError
from lowrank_dist.storage.atomic import atomic_directory, remove_directory
from lowrank_dist.storage.layout import MANIFEST
from lowrank_dist.storage.replacing import check_file, check_parent, check_target


def test_only_what_this_package_wrote_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thesis = thesis_in(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "linked").symlink_to(thesis)
    put(tmp_path / "ours", 1)
    put(tmp_path / "run" / "elsewhere", 1)
    (tmp_path / "away").symlink_to(tmp_path / "run" / "elsewhere")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / MANIFEST).symlink_to(tmp_path / "ours" / MANIFEST)
    (tmp_path / "empty").mkdir()
    for name in ("absent", "empty"):
        check_target(tmp_path / name, overwrite=False)
    check_target(tmp_path / "ours", overwrite=True)
    refusals = {
        "ours": (False, "exists and is not empty; choose another directory or pass overwrite"),
        "thesis": (True, f"holds no {MANIFEST}, so that it was not written by lowrank_dist"),
        "odd": (True, f"holds no {MANIFEST}"),
        "linked": (True, f"holds no {MANIFEST}"),
        "away": (True, f"holds no {MANIFEST}"),
        "file": (True, "exists and is not a directory"),
        "run/elsewhere/..": (True, "is or contains the working directory"),
    }
    monkeypatch.chdir(tmp_path / "run")
    for name, (overwrite, text) in refusals.items():
        with pytest.raises(InputError, match=text), atomic_directory(tmp_path / name, overwrite=overwrite):
            raise AssertionError(name)
    for name in (".", "..", "../run", str(tmp_path), "elsewhere/../..", "/"):
        with pytest.raises(InputError, match="is or contains the working directory"):
            check_target(name, overwrite=True)
    with pytest.raises(InputError, match="is or contains what it would be made from"):
        check_target(tmp_path / "ours", overwrite=True, inputs=[tmp_path / "ours" / "adapter"])
    with pytest.raises(InputError, match="is not removed"):
        remove_directory(thesis)
    assert os.listdir(thesis) == ["chapter-1"]
    assert not list(tmp_path.rglob(".*"))


def test_a_place_where_nothing_can_be_made(tmp_path: Path) -> None:
    """Root may write everywhere, as far as permissions say."""
    check_parent(tmp_path / "a" / "b" / "c")
    assert not list(tmp_path.iterdir())
    for path, place in ((Path("/proc/x/y"), "/proc"), (tmp_path / "file" / "x", str(tmp_path / "file"))):
        (tmp_path / "file").touch()
        for check in (check_parent, lambda path: check_file(path, overwrite=True)):
            with pytest.raises(InputError, match=rf"nothing can be written in {place} \("):
                check(path)


def test_a_directory_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    """A LoRA in the place of a checkpoint would end a run; what says no kind, or is damaged, is nobody's loss."""
    manifests = {"step": '{"kind": "checkpoint"}', "old": "{}", "damaged": "{", "lora": '{"kind": "lora"}'}
    for name, manifest in manifests.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text(manifest)
    (tmp_path / "last").symlink_to("step")
    for name in ("step", "last"):
        with (
            pytest.raises(InputError, match=f"{name}: holds a checkpoint of a run, which a LoRA does not replace"),
            atomic_directory(tmp_path / name, overwrite=True, kind="lora"),
        ):
            raise AssertionError(name)
    for name in ("old", "damaged", "lora"):
        with atomic_directory(tmp_path / name, overwrite=True, kind="lora") as new:
            (new / MANIFEST).write_text('{"kind": "lora"}')
    assert (tmp_path / "step" / MANIFEST).read_text() == '{"kind": "checkpoint"}'
