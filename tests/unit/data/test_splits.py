"""Splits by the names of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank_dist.data.splits import names_of, split_of


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("data/train-00000-of-00001.parquet", "train"),
        ("data/test_sft-00000-of-00001.parquet", "test_sft"),
        ("test_sft.jsonl", "test"),
        ("math.valid.jsonl.gz", "validation"),
        ("dev-2.csv", "validation"),
        ("eval/train.jsonl", "test"),
        ("en/training/a.jsonl", "train"),
        ("part-00000-of-00012.parquet", None),
        ("trained.jsonl", None),
        ("latest.jsonl", None),
        ("train-test.jsonl", None),
    ],
)
def test_the_split_of_a_file(name: str, split: str | None) -> None:
    assert split_of(Path(name)) == split


def test_the_names_in_a_split() -> None:
    assert names_of("train[:10%](closest)+test_sft+a.b[3:]") == ["train", "test_sft", "a.b"]
