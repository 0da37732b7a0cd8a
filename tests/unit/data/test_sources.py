"""What a user names, as files and data sets."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import zstandard

from lowrank_dist.data.sources import Source
from lowrank_dist.errors import InputError

PAIR = {"prompt": "a", "completion": "b"}


def line(value: int) -> bytes:
    return json.dumps(PAIR | {"id": value}).encode() + b"\n"


def read(names: Any, split: str = "train") -> list[tuple[str, dict[str, Any]]]:
    return list(Source(role="train", names=names, split=split).records())


def ids(names: Any, split: str = "train") -> list[Any]:
    return [record["id"] for _, record in read(names, split)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for name, value in (("b.jsonl", 2), ("a.jsonl", 1)):
        (tmp_path / "data" / name).write_bytes(line(value))
    (tmp_path / "data" / "notes.md").write_text("nothing")
    (tmp_path / "data" / "more").mkdir()
    (tmp_path / "data" / "more" / "c.jsonl.gz").write_bytes(gzip.compress(line(3)))
    return tmp_path / "data"


def test_files_are_read_in_the_order_of_the_list(folder: Path) -> None:
    assert ids([str(folder / "b.jsonl"), str(folder / "a.jsonl")]) == [2, 1]
    assert ids(str(folder / "b.jsonl")) == [2]


def test_patterns_and_directories_are_read_in_the_order_of_the_names(folder: Path) -> None:
    assert ids(str(folder / "*.jsonl")) == [1, 2]
    assert ids(str(folder / "**" / "*.jsonl*")) == [1, 2, 3]
    assert ids(str(folder)) == [1, 2, 3]
    (folder / "x[1].jsonl").write_bytes(line(4))
    assert ids(str(folder / "x[1].jsonl")) == [4]  # a file of this name is there


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("no.jsonl", "^train='.*no.jsonl' does not exist"),
        ("*.csv", r"^train='.*\*.csv': no file matches the pattern"),
        ("empty", "^train='.*empty': the directory holds no data"),
        ([], r"^train=\[\]: an empty list"),
    ],
)
def test_what_is_not_there_is_named_before_anything_is_read(folder: Path, names: Any, message: str) -> None:
    (folder / "empty").mkdir()
    source = Source(role="train", names=[str(folder / "a.jsonl"), str(folder / names)] if names else [])
    with pytest.raises(InputError, match=message):
        source.records()


def test_a_home_directory_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert ids("~/a.jsonl") == [1]


def test_hub_ids_are_what_is_no_file(folder: Path) -> None:
    names = ["org/set", str(folder), "org/*.jsonl", "no.parquet", str(folder / "a.jsonl")]
    assert Source(role="train", names=names).hub_ids == ["org/set"]


def test_compressed_files_are_read(folder: Path) -> None:
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(line(5) + b"\n"))
    assert ids(str(folder / "a.jsonl.zst")) == [5]
    (folder / "a.json.gz").write_bytes(gzip.compress(b" [" + line(6) + b"," + line(7) + b"]"))
    assert read(str(folder / "a.json.gz")) == [(f"{folder}/a.json.gz[{i}]", PAIR | {"id": 6 + i}) for i in range(2)]
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(line(5))[:-9])
    with pytest.raises(InputError, match=r"cut.jsonl.gz: cannot be decompressed"):
        ids(str(folder / "cut.jsonl.gz"))
    (folder / "no.jsonl.gz").write_bytes(line(5))
    with pytest.raises(InputError, match=r"no.jsonl.gz: cannot be decompressed"):
        ids(str(folder / "no.jsonl.gz"))
    (folder / "no.jsonl.zst").write_bytes(line(5))
    with pytest.raises(InputError, match=r"no.jsonl.zst: cannot be decompressed"):
        ids(str(folder / "no.jsonl.zst"))


def test_tables_hold_text(folder: Path) -> None:
    (folder / "a.csv").write_bytes('\ufeffprompt,completion\n"Q: 2+2?\nA:", 4\n\n"ä ""b""",007\n'.encode())
    assert read(str(folder / "a.csv")) == [
        (f"{folder}/a.csv:2", {"prompt": "Q: 2+2?\nA:", "completion": " 4"}),
        (f"{folder}/a.csv:5", {"prompt": 'ä "b"', "completion": "007"}),
    ]
    (folder / "a.tsv").write_text("prompt\tcompletion\na,b\tc\n")
    assert read(str(folder / "a.tsv")) == [(f"{folder}/a.tsv:2", {"prompt": "a,b", "completion": "c"})]
    (folder / "long.csv").write_text("text\n" + "a" * 200_000 + "\n")
    assert len(read(str(folder / "long.csv"))[0][1]["text"]) == 200_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a,b\n1,2\n1\n", "bad.csv:3: 1 fields, and the first row has 2"),
        (b"a,a\n1,2\n", "bad.csv:1: a column is there twice"),
        (b'a,b\n1,"2\n', "bad.csv:2: cannot be read as a table: unexpected end of data"),
        (b"a,b\n1,\xff\n", "bad.csv:2: cannot be read as a table: .*invalid start byte"),
    ],
)
def test_bad_tables_are_named(folder: Path, text: bytes, message: str) -> None:
    (folder / "bad.csv").write_bytes(text)
    with pytest.raises(InputError, match=message):
        read(str(folder / "bad.csv"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same two conversations in the formats of Arrow, where both calls have all arguments of either."""
    directory = tmp_path_factory.mktemp("stored")
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {"b": 2}}]
    rows = datasets.Dataset.from_list(
        [{"id": i, "messages": [{"role": "assistant", "tool_calls": [call]}]} for i, call in enumerate(calls)]
    )
    rows.to_parquet(str(directory / "rows.parquet"))
    rows.save_to_disk(str(directory / "saved"))
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(str(directory / "dict"))
    return directory


@pytest.mark.parametrize("name", ["rows.parquet", "saved", "dict", "saved/data-00000-of-00001.arrow"])
def test_rows_of_arrow_have_only_what_they_were_given(stored: Path, name: str) -> None:
    rows = read(str(stored / name))
    assert [record["messages"][0]["tool_calls"][0]["arguments"] for _, record in rows] == [{"a": 1}, {"b": 2}]
    assert rows[1][0].startswith(str(stored / name))
    assert rows[1][0].endswith(" row 1")


def test_names_may_have_brackets(stored: Path, tmp_path: Path) -> None:
    (tmp_path / "we[1]rd").mkdir()
    for name in ("rows.parquet", "saved/data-00000-of-00001.arrow"):
        path = tmp_path / "we[1]rd" / f"x[2]{Path(name).suffix}"
        path.write_bytes((stored / name).read_bytes())
        assert ids(str(path)) == [0, 1]


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train[:1]", [0]), ("train[50%:]", [1]), ("test", [1]), ("test+train", [1, 0, 1]), ("train[:0]", [])],
)
def test_splits_have_slices(stored: Path, split: str, expected: list[int]) -> None:
    assert ids(str(stored / "dict"), split) == expected


def numbered(path: Path, values: range) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(map(line, values)))
    return str(path)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(20)),
        ("train[:10%]", range(2)),
        ("train[90%:]", range(18, 20)),
        ("train[-3:]", range(17, 20)),
        ("train[18:]+train[:2]", [18, 19, 0, 1]),
    ],
)
def test_slices_of_files_and_of_a_single_saved_set(tmp_path: Path, split: str, expected: Any) -> None:
    """Files are one set, whatever their number, and every name is sliced for itself."""
    numbered(tmp_path / "data" / "a.jsonl", range(15))
    numbered(tmp_path / "data" / "b.jsonl", range(15, 20))
    one = numbered(tmp_path / "c.jsonl", range(20))
    datasets.Dataset.from_list([{"id": i} for i in range(20)]).save_to_disk(str(tmp_path / "saved"))
    for name in (one, str(tmp_path / "data"), str(tmp_path / "data" / "*.jsonl"), str(tmp_path / "saved")):
        assert ids(name, split) == list(expected)
    assert ids([one, str(tmp_path / "data")], split) == [*expected, *expected]


@pytest.mark.parametrize("role", ["validation", "validation[2]"])
def test_files_are_the_split_train_which_may_be_called_by_the_role(stored: Path, tmp_path: Path, role: str) -> None:
    for name in (numbered(tmp_path / "c.jsonl", range(2)), str(stored / "saved")):
        for split in ("train", "validation", "validation[:100%]"):
            assert len(list(Source(role=role, names=name, split=split).records())) == 2
        for split in ("test", "test[:1]"):
            with pytest.raises(InputError, match=r"has no split 'test'.*; valid choices: train, validation"):
                list(Source(role=role, names=name, split=split).records())
    for split in ("train[:1", "train[:1]x", "train[:200%]"):
        with pytest.raises(InputError, match=r"the split 'train\[.*' is not understood"):
            ids(str(tmp_path / "c.jsonl"), split)


def test_a_record_that_cannot_be_read_counts_in_the_slice_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(line(0) + b"{\n" + line(2) + b"{\n")
    errors: list[InputError] = []
    source = Source(role="train", names=str(path), split="train[:75%]")
    assert [record["id"] for _, record in source.records(errors.append)] == [0, 2]
    assert [str(error).split(": ")[0] for error in errors] == [f"{path}:2"]
    assert ids(str(path), "train[2:3]") == [2]
    with pytest.raises(InputError, match=rf"^{path}:2: not valid JSON"):
        ids(str(path), "train[1:]")


def test_files_of_a_directory_have_the_splits_in_their_names(tmp_path: Path) -> None:
    """As a data set of the hub that was cloned."""
    datasets.Dataset.from_list([{"id": 1}]).to_parquet(str(tmp_path / "data" / "train-00000-of-00001.parquet"))
    numbered(tmp_path / "data" / "math_test.jsonl", range(2, 4))
    numbered(tmp_path / "dev" / "a.jsonl", range(4, 5))
    (tmp_path / "dataset_infos.json").write_text("{}")
    found = {split: ids(str(tmp_path), split) for split in ("train", "test", "test[1:]+train", "validation")}
    assert found == {"train": [1], "test": [2, 3], "test[1:]+train": [3, 1], "validation": [4]}
    assert ids(str(tmp_path / "data" / "*.jsonl")) == [2, 3]  # a pattern says what is wanted
    with pytest.raises(InputError, match=r"has no split 'no'; valid choices: test, train, validation"):
        Source(role="train", names=str(tmp_path), split="no").records()
    digests = [list(Source(role="train", names=str(tmp_path), split=split).digests()) for split in ("train", "test")]
    assert digests[0] != digests[1]
    numbered(tmp_path / "odd.jsonl", range(1))
    with pytest.raises(InputError, match=r"odd.jsonl carries no split in its name, or several, and other files carry"):
        ids(str(tmp_path))


def test_a_subset_of_a_directory_is_a_directory_in_it(tmp_path: Path) -> None:
    for number, name in enumerate(("main", "socratic")):
        numbered(tmp_path / name / "train.jsonl", range(number, number + 1))
    assert [r["id"] for _, r in Source(role="train", names=str(tmp_path), subset="socratic").records()] == [1]
    with pytest.raises(InputError, match=r"the directory has no subset 'no', which would be a directory in it"):
        Source(role="train", names=str(tmp_path), subset="no").records()


def test_damaged_and_missing_parts_are_named(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dict has no split 'no'; valid choices: train, test"):
        ids(str(stored / "dict"), "no")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"bad.parquet: cannot be read"):
        ids(str(tmp_path / "bad.parquet"))


def test_digests_follow_what_is_read(
    folder: Path, stored: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def digests(names: Any, split: str = "train") -> list[str]:
        return list(Source(role="train", names=names, split=split).digests())

    assert digests(str(folder)) == digests([str(folder / name) for name in ("a.jsonl", "b.jsonl", "more/c.jsonl.gz")])
    assert digests(str(folder / "a.jsonl")) != digests(str(folder / "b.jsonl"))
    (folder / "a.csv").write_bytes((folder / "a.jsonl").read_bytes())
    assert digests(str(folder / "a.csv")) != digests(str(folder / "a.jsonl"))
    assert digests(str(folder / "a.jsonl")) != digests(str(folder / "a.jsonl"), "train[:1]")
    assert digests(str(stored / "dict")) != digests(str(stored / "dict"), "test")

    rows = datasets.load_from_disk(str(stored / "saved"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    before = digests("org/set")
    assert before == digests("org/set") != digests("org/set", "test")
    rows.save_to_disk(str(tmp_path / "newer"))
    newer = datasets.load_from_disk(str(tmp_path / "newer"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: newer)
    assert digests("org/set") != before
