"""Files that several processes fill: readable by safetensors, laid out as it wants them, complete or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lowrank_dist.distributed.partition import FlatPartition
from lowrank_dist.storage.reader import CheckpointReader, FileTensor
from lowrank_dist.storage.writer import TensorFiles

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool]


@settings(max_examples=30)
@given(
    shapes=st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    ranks=st.integers(1, 4),
    max_bytes=st.sampled_from([1, 100, 10**9]),
)
def test_what_all_ranks_write_is_what_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[list[int]],
    dtypes: list[torch.dtype],
    ranks: int,
    max_bytes: int,
) -> None:
    directory = tmp_path_factory.mktemp("files")
    tensors = {
        f"t{i}": torch.randint(0, 2, shape).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    described = {name: FileTensor(shape=tuple(t.shape), dtype=t.dtype) for name, t in tensors.items()}
    writers = [TensorFiles(directory, described, max_bytes=max_bytes) for _ in range(ranks)]
    assert not writers[0].exist()
    writers[0].create()
    assert all(writer.exist() for writer in writers)
    for rank, writer in enumerate(writers):
        for name, tensor in tensors.items():
            start, stop = FlatPartition(numel=tensor.numel(), world_size=ranks).bounds(rank)
            writer.write(name, start, tensor.flatten()[start:stop])
        writer.flush()
        writer.close()
    files = sorted(directory.glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    if len(files) > 1:
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert CheckpointReader(directory).nbytes == sum(t.nbytes for t in tensors.values())


def test_numbers_are_aligned(tmp_path: Path) -> None:
    """Readers map a file and view its bytes as numbers: a wide type must not begin in the middle of one."""
    described = {
        "a": FileTensor(shape=(3,), dtype=torch.uint8),
        "b": FileTensor(shape=(3,), dtype=torch.float32),
        "c": FileTensor(shape=(5,), dtype=torch.bfloat16),
    }
    TensorFiles(tmp_path, described).create()
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, tensor in described.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.dtype.itemsize == 0


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    files = TensorFiles(tmp_path, {"a": FileTensor(shape=(4,), dtype=torch.float32)})
    files.create()
    with pytest.raises(ValueError, match=r"a \[4\] torch.float32: 3 elements of torch.float32 from element 2 on"):
        files.write("a", 2, torch.zeros(3))
    with pytest.raises(ValueError, match="4 elements of torch.bfloat16"):
        files.write("a", 0, torch.zeros(4).bfloat16())
    with pytest.raises(ValueError, match="a: torch.complex64 cannot be written"):
        TensorFiles(tmp_path, {"a": FileTensor(shape=(4,), dtype=torch.complex64)})


def test_other_files_are_not_taken_for_these(tmp_path: Path) -> None:
    TensorFiles(tmp_path, {"a": FileTensor(shape=(4,), dtype=torch.float32)}).create()
    assert not TensorFiles(tmp_path, {"b": FileTensor(shape=(4,), dtype=torch.float32)}).exist()
    with open(tmp_path / "model.safetensors", "r+b") as handle:
        handle.truncate(20)
    assert not TensorFiles(tmp_path, {"a": FileTensor(shape=(4,), dtype=torch.float32)}).exist()
