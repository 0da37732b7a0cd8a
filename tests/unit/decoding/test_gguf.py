"""GGUF files by rows, as transformers loads them whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.models import save_checkpoint
from helpers.quantized import write_gguf
from lowrank_dist.decoding.open import open_reader
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.errors import CheckpointError, InputError
from lowrank_dist.model.plan import open_plan

TYPES = ["Q4_K", "Q6_K", "Q5_K", "Q8_0", "F16", "Q4_0", "BF16", "Q5_1", "F32"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense") / "model"
    return save_checkpoint(directory, hidden_size=256, intermediate_size=512, num_hidden_layers=1, max_shard_size="1GB")


@pytest.fixture(scope="module")
def file(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(dense, path, TYPES)
    return path


def test_rows_are_those_that_transformers_loads(file: Path) -> None:
    """Every type, names and the order of rows of queries and keys too."""
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    expected = model.state_dict()
    reader = open_reader(file)
    assert reader.encoding == f"GGUF {', '.join(sorted(TYPES))}"
    assert set(reader) == set(expected)
    for name, whole in expected.items():
        info = reader.info(name)
        assert info.shape == tuple(whole.shape)
        before = reader.bytes_read
        assert torch.equal(reader.flat(name, 0, whole.numel()).view(whole.shape), whole), name
        assert reader.bytes_read - before == info.nbytes
        for size in (2, 3) if whole.ndim == 2 else ():
            partition = RowPartition(rows=info.shape[0], columns=info.shape[1], world_size=size, block=64)
            before = reader.bytes_read
            parts = [reader.rows(name, *partition.bounds(rank)) for rank in range(size)]
            assert torch.equal(torch.cat(parts), whole), (name, size)
            assert reader.bytes_read - before == info.nbytes  # rows share no bytes
    plan = open_plan(reader, None).plan
    assert not plan.matrices
    assert {tensor.key for tensor in plan.parameters} == set(expected)
    reader.close()


def test_the_only_file_of_a_directory(file: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").symlink_to(file)
    reader = open_reader(tmp_path)
    assert reader.directory == tmp_path / "tiny.gguf"
    reader.close()
    (tmp_path / "other.gguf").symlink_to(file)
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files \(other.gguf, tiny.gguf\); pass one of them"):
        open_reader(tmp_path)


def test_what_is_refused(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    cases = {
        "part-00001-of-00002.gguf": (data, "is one of several parts"),
        "other.gguf": (b"PK\x03\x04" + data[4:], "not with GGUF"),
        "short.gguf": (data[: len(data) // 2], "truncated or corrupt"),
        "gpt2.gguf": (data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0bloom"), "'bloom'"),
    }
    for name, (content, text) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            open_reader(tmp_path / name)
        assert text in str(caught.value)
