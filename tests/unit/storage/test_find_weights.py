"""Weights under unusual names are read and said, or refused with what was found."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowrank_dist.errors import CheckpointError
from lowrank_dist.model.skeleton import read_config
from lowrank_dist.storage.find_weights import cached_snapshot
from lowrank_dist.storage.reader import CheckpointReader
from lowrank_dist.storage.resolve import resolve_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 1234\n"


def save(directory: Path, *names: str) -> Path:
    """Files with a tensor each, called like the file."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        save_file({f"of.{name}": torch.ones(2, 3)}, directory / name)
    return directory


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model.fp16.safetensors"], "the variant 'fp16' of the weights is read"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "all tensors of its 2 parts"),
        (["pytorch_model.safetensors"], "pytorch_model.safetensors is read, as there are no other weights"),
        (["weights.safetensors", "adapter_model.safetensors"], "weights.safetensors is read"),
    ],
)
def test_read_and_said(names: list[str], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "model", *names)
    with caplog.at_level(logging.WARNING):
        reader = CheckpointReader(tmp_path / "model")
    assert set(reader) == {f"of.{name}" for name in names if not name.startswith("adapter")}
    for name in reader:
        assert torch.equal(reader.rows(name, 0, 2), torch.ones(2, 3))
    assert said in caplog.text
    reader.close()


def test_an_index_of_a_variant(tmp_path: Path) -> None:
    save(tmp_path, "model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors")
    weight_map = {f"of.{name.name}": name.name for name in tmp_path.glob("*.safetensors")}
    (tmp_path / "model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": weight_map}))
    reader = CheckpointReader(tmp_path)
    assert len(list(reader)) == 2
    reader.close()


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["model.fp16.safetensors", "model.bf16.safetensors"], "holds the variants bf16, fp16"),
        (
            ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"],
            "2 of 3 parts and no index; missing: 2",
        ),
        (["a.safetensors", "b.safetensors"], "holds a.safetensors, b.safetensors and no index; pass one"),
        (["adapter_model.safetensors"], "holds neither"),
    ],
)
def test_refused(names: list[str], text: str, tmp_path: Path) -> None:
    save(tmp_path, *names)
    with pytest.raises(CheckpointError, match=text):
        CheckpointReader(tmp_path)


def test_pickled_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"holds pytorch_model.bin .*`lowrank-dist import .* --output DIRECTORY`"):
        CheckpointReader(tmp_path)


def test_a_file_given_itself(tmp_path: Path) -> None:
    save(tmp_path, "a.safetensors", "b.safetensors", "c-00001-of-00002.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 32}')
    found = resolve_checkpoint(tmp_path / "b.safetensors")
    reader = CheckpointReader(found)
    assert list(reader) == ["of.b.safetensors"]
    assert reader.directory == tmp_path
    assert read_config(found).hidden_size == 32
    reader.close()
    with pytest.raises(CheckpointError, match="is part 1 of 2; pass the directory"):
        CheckpointReader(tmp_path / "c-00001-of-00002.safetensors")


def test_a_directory_of_the_cache(tmp_path: Path) -> None:
    root = tmp_path / "models--someone--model"
    snapshot = save(root / "snapshots" / COMMIT, "model.safetensors")
    assert resolve_checkpoint(root) == snapshot  # the only one
    other = save(root / "snapshots" / COMMIT[::-1], "model.safetensors")
    with pytest.raises(CheckpointError, match="2 snapshots and no main; pass one of"):
        resolve_checkpoint(root)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT[::-1])
    assert resolve_checkpoint(root) == other
    assert resolve_checkpoint(root, revision=COMMIT) == snapshot
    (other / "config.json").write_text('{"model_type": "llama", "hidden_size": 32}')
    assert read_config(root).hidden_size == 32
    assert cached_snapshot(tmp_path) == tmp_path


def test_pointers_of_git_lfs(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors")
    (tmp_path / "config.json").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"config.json: is a Git LFS pointer, .* `git lfs pull`"):
        read_config(tmp_path)
    (tmp_path / "model.safetensors").write_text(POINTER)
    with pytest.raises(CheckpointError, match="model.safetensors: is a Git LFS pointer"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    ("names", "plain"),
    [
        (["_orig_mod.model.a", "_orig_mod.b"], ["model.a", "b"]),
        (["model.layers.0._orig_mod.a", "b"], ["model.layers.0.a", "b"]),
        (["module.model.a", "module.b"], ["model.a", "b"]),
        (["module._orig_mod.a", "module.b"], ["a", "b"]),
        (["module.a", "b"], ["module.a", "b"]),  # the name of a module
    ],
)
def test_names_of_wrappers(names: list[str], plain: list[str], tmp_path: Path) -> None:
    tensors = {name: torch.full((2, 3), float(index)) for index, name in enumerate(names)}
    save_file({**tensors, f"{names[0]}.scalar": torch.tensor(7.0)}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    assert set(reader) == {*plain, f"{plain[0]}.scalar"}
    for index, name in enumerate(plain):
        assert torch.equal(reader.rows(name, 0, 2), torch.full((2, 3), float(index)))
        assert reader.info(name).shape == (2, 3)
    assert reader.flat(f"{plain[0]}.scalar", 0, 1).tolist() == [7.0]
    reader.close()


def test_names_that_become_one(tmp_path: Path) -> None:
    save_file({"_orig_mod.a": torch.ones(1), "a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="are both a; keep one"):
        CheckpointReader(tmp_path)
