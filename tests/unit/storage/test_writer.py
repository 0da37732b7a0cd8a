"""Files that several processes fill: readable by safetensors, laid out as it wants them, complete or refused."""

from __future__ import annotations

import errno
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lowrank_dist.distributed.partition import FlatPartition
from lowrank_dist.storage.atomic import atomic_directory
from lowrank_dist.storage.reader import CheckpointReader, FileTensor
from lowrank_dist.storage.writer import TensorFiles, write_json, write_tensors

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


# -- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def write_parts(directory: Path) -> None:
    files = TensorFiles(directory, {"a": FileTensor(shape=(2**20,), dtype=torch.float32)})
    files.create()
    try:
        files.write("a", 0, torch.ones(2**20))
    finally:
        files.close()


WRITERS: dict[str, Callable[[Path], object]] = {
    "model.safetensors": write_parts,
    "adapter_model.safetensors": lambda path: write_tensors(
        path / "adapter_model.safetensors", {"a": torch.ones(2**20)}
    ),
    "report.json": lambda path: write_json(path / "report.json", {"a": "x" * 2**20}),
    "config.json": lambda path: (path / "config.json").write_text("x" * 2**20),  # as other libraries write
}


@pytest.mark.parametrize("file", WRITERS)
def test_a_full_disk_is_an_error_that_names_the_file(file: str, small_disk: Path) -> None:
    """Of what other libraries write, the directory."""
    with pytest.raises(OSError, match="No space left on device") as caught, atomic_directory(small_disk / "out") as new:
        WRITERS[file](new)
    assert caught.value.errno == errno.ENOSPC
    assert str(small_disk / ".out.") in str(caught.value)
    assert file == "config.json" or str(caught.value.filename).endswith(file)
    assert list(small_disk.iterdir()) == []
