"""Blocks of rows, read in slabs and ahead: values, order, and where a NaN is said to be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowrank_dist.errors import CheckpointError
from lowrank_dist.storage.buffers import Buffers
from lowrank_dist.storage.prefetch import RowRange, read_ahead, read_blocks
from lowrank_dist.storage.reader import CheckpointReader

ROWS, COLUMNS = 700, 1024  # of several slabs
CPU = torch.device("cpu")


def saved(directory: Path, weight: torch.Tensor) -> CheckpointReader:
    save_file({"weight": weight}, directory / "model.safetensors")
    return CheckpointReader(directory)


def ranges(*bounds: tuple[int, int]) -> list[RowRange]:
    return [RowRange(key="weight", start=start, stop=stop) for start, stop in bounds]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_row_is_there(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(ROWS, COLUMNS).to(dtype)
    reader, bounds = saved(tmp_path, weight), [(0, 650), (600, ROWS), (ROWS, ROWS), (3, 4)]
    for lent in (Buffers(), Buffers(ROWS * COLUMNS, least=1)):
        for block, (start, stop) in zip(read_blocks(reader, ranges(*bounds), lent, CPU), bounds, strict=True):
            assert torch.equal(block.values, weight[start:stop].float())
            assert block.spare == (dtype != torch.float32)  # else it is the mapped file
            if block.spare:
                block.values.fill_(torch.nan)  # what is read later does not see it


@pytest.mark.parametrize("row", [100, 299, 300, 400, 550, ROWS - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_nan_is_named_by_its_place_in_the_matrix(tmp_path: Path, dtype: torch.dtype, row: int) -> None:
    """Wherever in the block it is."""
    weight = torch.randn(ROWS, COLUMNS).to(dtype)
    weight[row, 17] = torch.nan
    blocks = read_blocks(saved(tmp_path, weight), ranges((0, 100), (100, ROWS)), Buffers(), CPU)
    assert torch.equal(next(blocks).values, weight[:100].float())
    with pytest.raises(CheckpointError, match=rf"weight: NaN or infinity at \[{row}, 17\]"):
        next(blocks)


def test_reading_ahead_keeps_the_order_and_the_bound() -> None:
    begun: list[int] = []

    def read(number: int) -> int:
        begun.append(number)
        return number

    for taken, number in enumerate(read_ahead(read, range(20), depth=2)):
        assert number == taken
        assert len(begun) <= taken + 3  # this one, and two ahead
    assert begun == list(range(20))


def test_reading_ahead_raises_in_turn() -> None:
    def read(number: int) -> int:
        if number == 3:
            raise CheckpointError("three")
        return number

    blocks = read_ahead(read, range(10), depth=2)
    assert [next(blocks) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(CheckpointError, match="three"):
        next(blocks)
