"""Configuration and tokenizer go with the weights, also through links; what is private does not."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from helpers.hub import commit, save_in_cache
from lowrank_dist.errors import CheckpointError
from lowrank_dist.storage.small_files import copy_small_files, small_files

BESIDE = ("config.json", "tokenizer.json", "spm.model", "source.spm", "bpe.codes", "dict.txt", "vocab-src.json")
TEMPLATE = "additional_chat_templates/rag.jinja"
WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    (directory / "additional_chat_templates").mkdir(parents=True)
    for name in (*BESIDE, TEMPLATE, WEIGHTS, ".env", "modeling_x.py", "notes.txt"):
        (directory / name).write_text(name)
    return directory


def linked(model: Path, directory: Path) -> Path:
    """A directory of links to all files of `model`."""
    for path in filter(Path.is_file, model.rglob("*")):
        link = directory / path.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    return directory


def test_a_directory_of_links_is_as_good_as_the_files(model: Path, tmp_path: Path) -> None:
    """Also one of links to those links, and the snapshots of the hub's cache, whose files are links."""
    first = linked(model, tmp_path / "first")
    root = save_in_cache(tmp_path / "cache", "me/model", {"main": (commit("a"), model)})
    snapshot = root / "snapshots" / commit("a")
    for number, place in enumerate((model, first, linked(first, tmp_path / "second"), snapshot)):
        target = tmp_path / f"target-{number}"
        target.mkdir()
        copy_small_files(small_files(place, [place / WEIGHTS]), target)
        copied = {str(path.relative_to(target)): path for path in target.rglob("*") if path.is_file()}
        assert copied.keys() == {*BESIDE, TEMPLATE}
        assert all(not path.is_symlink() and path.read_text() == name for name, path in copied.items())


def test_a_link_to_elsewhere_is_not_followed_and_named(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = tmp_path / ".docker" / "config.json"
    secret.parent.mkdir()
    secret.write_text("password")
    (model / "README.md").symlink_to(secret)
    (model / "LICENSE").symlink_to(tmp_path / "gone")
    with caplog.at_level(logging.WARNING):
        found = small_files(model, [model / WEIGHTS])
    assert found.keys() == {*BESIDE, TEMPLATE}
    assert "not followed: LICENSE, README.md; put copies in their place" in caplog.text
    (model / "config.json").unlink()
    (model / "config.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match=rf"config.json is a link to {secret}, where no weights of the model are"):
        small_files(model, [model / WEIGHTS])


def test_a_place_of_weights_has_no_further_files_below(model: Path, tmp_path: Path) -> None:
    """Of weights that lie in a home directory."""
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id").write_text("private")
    (tmp_path / "weights").write_text("")
    (model / WEIGHTS).unlink()
    (model / WEIGHTS).symlink_to(tmp_path / "weights")
    (model / "README.md").symlink_to(tmp_path / ".ssh" / "id")
    assert "README.md" not in small_files(model, [model / WEIGHTS])
