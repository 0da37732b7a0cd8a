"""One rank tokenizes, the others wait and map what it wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from helpers.ranks import run_ranks
from helpers.sft import save_material
from lowrank_dist.data import examples
from lowrank_dist.data.datamodule import SFTDataModule

RECORDS = [{"prompt": f"hello {index}", "completion": " world" * (1 + index % 5)} for index in range(300)]


def read(material: Path, cache: str | None, train: str) -> tuple[bool, int, Any]:
    """Whether this rank tokenized, its process, and its items; or the error."""
    made = []
    before = examples.prepared

    def prepared(*args: Any, **settings: Any) -> Any:
        made.append(True)
        return before(*args, **settings)

    examples.prepared = prepared
    try:
        data = SFTDataModule(str(material / "model"), train, packing=True, max_length=64, cache_dir=cache)
        data.setup("fit")
        dataset = data.train_dataloader().dataset
        items = [dataset[index]["input_ids"].tolist() for index in range(len(dataset))]
    except ValueError as error:
        return bool(made), os.getpid(), str(error)
    finally:
        examples.prepared = before
    return bool(made), os.getpid(), items


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_material(tmp_path_factory.mktemp("material"), RECORDS)


@pytest.mark.parametrize("ranks", [2, 3])
def test_one_rank_tokenizes(material: Path, tmp_path: Path, ranks: int) -> None:
    train = str(material / "data.jsonl")
    first = run_ranks(ranks, read, material, str(tmp_path / "cache"), train)
    again = run_ranks(ranks, read, material, str(tmp_path / "cache"), train)
    _, _, expected = read(material, None, train)
    assert sorted(made for made, _, _ in first) == [False] * (ranks - 1) + [True]
    assert not any(made for made, _, _ in again)
    assert len({process for _, process, _ in first}) == ranks
    assert all(items == expected for _, _, items in [*first, *again])


def test_a_bad_record_is_an_error_on_every_rank(material: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(RECORDS[0]) + "\n{}\n")
    outcomes = run_ranks(2, read, material, str(tmp_path / "cache"), str(bad))
    assert all(error.startswith(f"{bad}:2: columns found: none") for _, _, error in outcomes)
    assert not list((tmp_path / "cache").iterdir())
