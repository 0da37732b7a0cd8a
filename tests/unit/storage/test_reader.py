"""The streaming reader and the writers, on real files, damaged ones too."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.ranks import run_ranks
from lowrank_dist.errors import CheckpointError
from lowrank_dist.storage.headers import INDEX_NAME
from lowrank_dist.storage.reader import CheckpointReader, Piece


@pytest.fixture
def sharded(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def whole(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def test_slices_equal_the_whole_tensors_and_are_counted(llama: Path) -> None:
    reader = CheckpointReader(llama)
    tensors = whole(llama)
    assert set(reader) == set(tensors)
    assert reader.nbytes == sum(t.nbytes for t in tensors.values())
    for name, tensor in tensors.items():
        third = tensor.shape[0] // 3
        parts = [reader.rows(name, 0, third), reader.rows(name, third, third), reader.rows(name, third, len(tensor))]
        assert torch.equal(torch.cat(parts), tensor)
        cut = tensor.numel() // 3 + 1
        flat = [reader.flat(name, 0, cut), reader.flat(name, cut, tensor.numel())]
        assert torch.equal(torch.cat(flat), tensor.flatten())
    assert reader.bytes_read == 2 * reader.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_file_of_any_float_type(tmp_path: Path, dtype: torch.dtype) -> None:
    w = torch.randn(6, 5).to(dtype)
    save_file({"w": w}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    assert (reader.info("w").shape, reader.info("w").nbytes) == ((6, 5), w.nbytes)
    assert torch.equal(reader.rows("w", 2, 4), w[2:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool])
def test_no_rows_have_the_dtype_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    """Also what begins beyond the end, as the shard of a rank of padding may."""
    save_file({"w": torch.zeros(6, 5).to(dtype)}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    for rows in (reader.rows("w", 3, 3), reader.rows("w", 8, 6)):
        assert (rows.shape, rows.dtype) == ((0, 5), dtype)
    assert reader.flat("w", 30, 30).dtype == dtype


def test_a_directory_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds neither model.safetensors.index.json nor model.safetensors"):
        CheckpointReader(tmp_path)


def test_a_missing_file_is_named(sharded: Path) -> None:
    victim = min(sharded.glob("model-*.safetensors"))
    victim.unlink()
    with pytest.raises(CheckpointError, match=f"{victim.name}: missing"):
        CheckpointReader(sharded)


def test_a_truncated_file_is_named(sharded: Path) -> None:
    victim = min(sharded.glob("model-*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{victim.name}: .* truncated or corrupt"):
        CheckpointReader(sharded)


def test_an_index_that_names_an_absent_tensor(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_NAME).read_text())
    index["weight_map"]["ghost.weight"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names tensor ghost\.weight"):
        CheckpointReader(sharded)


def test_a_damaged_index(sharded: Path) -> None:
    (sharded / INDEX_NAME).write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        CheckpointReader(sharded)


@pytest.mark.parametrize("stem", ["model", "adapter_model", "residual"])
def test_a_single_file_goes_before_an_index(
    llama: Path, tmp_path: Path, stem: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As transformers, with one line that names both; a damaged index does not matter then."""
    for file in llama.glob("model*"):
        shutil.copy(file, tmp_path / file.name.replace("model", stem, 1))
    index, single = tmp_path / f"{stem}.safetensors.index.json", tmp_path / f"{stem}.safetensors"
    index.write_text(index.read_text().replace("model-0", f"{stem}-0"))
    assert set(CheckpointReader(tmp_path, stem=stem)) == set(whole(llama))
    assert not caplog.records
    other = {name: tensor + 1 for name, tensor in whole(llama).items()}
    save_file(other, single, metadata={"format": "pt"})
    readers = [CheckpointReader(tmp_path, stem=stem) for _ in range(2)]
    assert readers[0].files == [single]
    for name, tensor in other.items():
        assert torch.equal(readers[0].flat(name, 0, tensor.numel()), tensor.flatten())
    (text,) = caplog.messages
    assert str(single) in text
    assert index.name in text
    index.write_text("{")
    assert set(CheckpointReader(tmp_path, stem=stem)) == set(other)
    if stem == "model":
        shutil.copy(llama / "config.json", tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).model.norm.weight
        assert torch.equal(loaded, other["model.norm.weight"])


def warnings_of(directory: Path) -> list[str]:
    messages: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logging.getLogger("lowrank_dist").addHandler(Kept())
    CheckpointReader(directory)
    return messages


def test_one_rank_warns(sharded: Path) -> None:
    save_file({"w": torch.zeros(1)}, sharded / "model.safetensors")
    assert [len(messages) for messages in run_ranks(2, warnings_of, sharded)] == [1, 0]


def test_what_a_joined_name_stands_for(sharded: Path) -> None:
    reader = CheckpointReader(sharded)
    up, gate = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("up", "gate"))
    reader.join_stack("stack", [Piece(key=up), Piece(key=gate)], 2)
    assert reader.pieces(up) == (Piece(key=up),)
    assert reader.pieces("stack") == (Piece(key=up), Piece(key=gate))
    assert reader.pieces(reader.entry("stack", 1)) == (Piece(key=gate),)
    assert reader.pieces(reader.entry("stack", 0)) == (Piece(key=up),)
