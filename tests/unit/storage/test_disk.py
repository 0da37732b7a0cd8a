"""Room on a disk, and directories that only their owner can write to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from helpers.staging import thesis_in
from lowrank_dist.errors import InputError
from lowrank_dist.storage.disk import check_free, private_directory


def test_the_disk_is_the_one_that_the_target_will_be_on(tmp_path: Path) -> None:
    target = tmp_path / "not" / "yet"
    check_free(target, shutil.disk_usage(tmp_path).free // 2)
    with pytest.raises(InputError, match=f"{target}: .* GB are needed, .* GB are free there"):
        check_free(target, 2**60)


def test_private_directories(tmp_path: Path) -> None:
    """New ones, those of earlier runs, and what others may have put there."""
    private, thesis = tmp_path / "private", thesis_in(tmp_path)
    for _ in range(2):
        private_directory(private, uses_contents=True)
        assert private.stat().st_mode & 0o777 == 0o700
        private.chmod(0o777)  # empty: nothing was put there
    (private / "operator.so").touch()
    with pytest.raises(InputError, match="other users can write to it, and it is not empty"):
        private_directory(private, uses_contents=True)
    private_directory(private, uses_contents=False)
    assert private.stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(thesis)
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        mode = (tmp_path / name).stat().st_mode
        with pytest.raises(InputError, match="is a link, no directory, or of another user"):
            private_directory(tmp_path / name, uses_contents=False)
        assert (tmp_path / name).stat().st_mode == mode
    if os.geteuid() == 0:
        os.chown(private, 12345, 12345)
        with pytest.raises(InputError, match="of another user"):
            private_directory(private, uses_contents=False)
