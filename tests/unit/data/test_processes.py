"""Chunks in several processes: what one process makes, its errors, and nothing of the program that was started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.chunks import killing, make
from helpers.sft import CONVERSATION, byte_level_tokenizer, write_jsonl
from lowrank_dist.data.chunks import Chunk
from lowrank_dist.data.datamodule import SFTDataModule
from lowrank_dist.data.processes import in_processes
from lowrank_dist.errors import InputError

SCRIPT = """
import json, sys
from pathlib import Path
from lowrank_dist.data import chunks
from lowrank_dist.data.datamodule import SFTDataModule

print("started")  # without a guard: a process that imports this program begins to train
chunks.CHUNK = 16
made = []
for count in (None, 2):
    data = SFTDataModule(**json.loads(sys.argv[1]), num_proc=count, cache_dir=f"{sys.argv[2]}/{count}")
    data.setup("fit")
    (entry,) = (path for path in Path(f"{sys.argv[2]}/{count}").iterdir() if not path.name.startswith("."))
    made.append([(file.name, file.read_bytes()) for file in sorted(entry.iterdir())])
assert [name for name, _ in made[0]] == ["lowrank_dist.json", "tokens.safetensors"], made[0]
print(made[0] == made[1], data.trainer)
"""


def test_a_program_without_a_guard_gets_the_same_bytes(tmp_path: Path) -> None:
    byte_level_tokenizer().save_pretrained(tmp_path / "tokenizer")
    records: list[Any] = [{"prompt": f"hello {index}", "completion": " world" * (index % 50)} for index in range(90)]
    weighted = [CONVERSATION[1], CONVERSATION[2] | {"weight": 0.5}]
    records[40:42] = [{"messages": weighted}, {"nothing": 1}]
    arguments = {
        "tokenizer": str(tmp_path / "tokenizer"),
        "train": write_jsonl(tmp_path / "train.jsonl", records),
        "on_bad_record": "skip",
        "max_length": 40,
    }
    with open(arguments["train"], "a") as file:
        file.write("{\n")
    (tmp_path / "program.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), json.dumps(arguments), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "started\nTrue None\n"), done.stderr


def chunks(values: list[list[int]], error: str = "") -> Iterator[Chunk]:
    for place, some in enumerate(values):
        yield Chunk(records=[(f"f:{place}", {"value": value}) for value in some])
    if error:
        raise InputError(error)


def test_results_keep_their_order_and_so_do_errors() -> None:
    given = [[place, place] if place % 5 else [] for place in range(40)]
    found = list(in_processes(make, chunks(given), count=2))
    assert [[int(example[0, 0]) for example in part.examples] for part in found] == given
    processes = {part.lengths[0] for part in found}
    assert len(processes) <= 2
    assert os.getpid() not in processes
    assert not any(map(is_alive, processes))
    # a record is bad before the reader fails, and the reader is ahead
    results = in_processes(make, chunks([[1], [2], [-1], [3]], "f:4: unreadable"), count=1)
    with pytest.raises(InputError, match="^f:2: bad$"):
        list(results)


def test_the_readers_error_comes_after_what_was_read() -> None:
    results = in_processes(make, chunks([[1]], "f:1: unreadable"), count=2)
    assert next(results).lengths == [os.getpid()]  # one chunk is worth no process
    with pytest.raises(InputError, match="^f:1: unreadable$"):
        next(results)


def test_a_killed_process_is_reported() -> None:
    with pytest.raises(RuntimeError, match=r"num_proc=1: process \d+, .* signal 9 \(Killed\); .* memory runs out"):
        list(in_processes(killing, chunks([[1], [7], [3]]), count=1))
    with pytest.raises(InputError, match="num_proc=1: the tokenizer or a setting cannot be sent to other processes"):
        list(in_processes(lambda: make(), chunks([[1], [2]]), count=1))


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_processes_need_a_cache() -> None:
    with pytest.raises(InputError, match="num_proc=2 without cache_dir: every rank tokenizes by itself"):
        SFTDataModule("t", "x.jsonl", num_proc=2)
    with pytest.raises(InputError, match="num_proc=0 must be at least 1"):
        SFTDataModule("t", "x.jsonl", num_proc=0, cache_dir="c")
