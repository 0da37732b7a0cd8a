"""Where a model is, by what the user calls it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lowrank_dist.errors import CheckpointError
from lowrank_dist.storage.resolve import commit_of, resolve_checkpoint


def test_a_path_that_is_not_there() -> None:
    with pytest.raises(CheckpointError, match="'/no/such/directory': no such directory"):
        resolve_checkpoint("/no/such/directory")


def test_a_hub_id_in_the_cache_is_found_without_a_network(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    snapshot = tmp_path / "models--someone--model" / "snapshots" / commit
    shutil.copytree(llama, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve_checkpoint("someone/model") == snapshot


def test_a_hub_id_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="'someone/missing': neither a directory nor a model the hub"):
        resolve_checkpoint("someone/missing")


def test_the_commit_of_a_snapshot(tmp_path: Path) -> None:
    commit = "0123456789" * 4
    assert commit_of(tmp_path / "models--a--b" / "snapshots" / commit) == commit
    for path in (tmp_path, tmp_path / commit, tmp_path / "snapshots" / "main"):
        assert commit_of(path) is None
