"""Tasks and their data, found or refused, and the table of scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.sft import byte_level_tokenizer, write_jsonl
from lowrank_dist.data.datamodule import SFTDataModule
from lowrank_dist.data.shapes import INSTRUCTION_PROMPT
from lowrank_dist.errors import InputError
from lowrank_dist.inference.scoring import Scores, Tasks, as_table
from lowrank_dist.inference.tokenizer import load_tokenizer

OWN: dict[str, Any] = {
    "task": "own",
    "dataset_path": "nobody/has_this",
    "output_type": "generate_until",
    "test_split": "test",
    "fewshot_split": "train",
    "doc_to_text": "{{q}}",
    "doc_to_target": "{{a}}",
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(json.dumps(OWN))  # JSON is YAML
    for split, count in (("test", 3), ("train", 2)):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"q": f"{split} {i}", "a": str(i)} for i in range(count)])
    return tmp_path


def test_local_files_take_the_place_of_a_tasks_data(own: Path) -> None:
    data = {"own": str(own / "test.jsonl"), "own:train": str(own / "train.jsonl")}
    (task,) = Tasks(names=("own",), include_path=str(own / "tasks"), data=data).load()
    assert [doc["q"] for doc in task.test_docs()] == ["test 0", "test 1", "test 2"]
    assert [doc["q"] for doc in task.fewshot_docs()] == ["train 0", "train 1"]
    path = str(own / "tasks" / "own.yaml")
    (task,) = Tasks(names=(path,), data={path: str(own / "test.jsonl")}).load()
    assert task.config.task == "own"
    assert len(task.test_docs()) == 3


def gsm8k(directory: Path) -> str:
    return write_jsonl(directory / "gsm8k.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])


def test_gsm8k_and_responses_take_a_file(own: Path) -> None:
    names = ("gsm8k_pissa", "responses")
    data = {names[0]: gsm8k(own), names[1]: write_jsonl(own / "r.jsonl", [{"query": "1 + 1?", "response": "2"}])}
    tokenizer = byte_level_tokenizer(template=None)
    tokenizer.save_pretrained(own / "tokenizer")
    numbers, responses = Tasks(names=names, data=data).load(load_tokenizer(str(own / "tokenizer")))
    (asked,), (record,) = numbers.test_docs(), responses.test_docs()
    assert asked["number"] == "2"
    assert asked["prompt"] == record["prompt"] == INSTRUCTION_PROMPT.format(query="1 + 1?")
    assert record["response"] == " 2"


def test_responses_take_the_prompts_of_the_data_module(own: Path) -> None:
    file = write_jsonl(own / "r.jsonl", [{"q": "1 + 1?", "gold": "2"}])
    byte_level_tokenizer(template=None).save_pretrained(own / "tokenizer")
    columns = {"query": "q", "response": "gold"}
    module = SFTDataModule(str(own / "tokenizer"), file, columns=columns, prompt_template="Sum: {query} = ")
    tasks = Tasks(names=("responses",), data={"responses": file}, prompts=module.prompt_settings)
    (task,) = tasks.load(load_tokenizer(str(own / "tokenizer")))
    (doc,) = task.test_docs()
    assert (doc["prompt"], doc["response"]) == ("Sum: 1 + 1? =", " 2")
    assert SFTDataModule(str(own / "tokenizer"), file).prompt_settings == {}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"names": ()}, "name at least one"),
        ({"limit": 0}, "limit=0 must be positive"),
        ({"num_fewshot": -1}, "must not be negative"),
        ({"seed": -1}, "seed=-1"),
        ({"data": {"other": "x"}}, "not among the tasks own"),
        ({"include_path": "none"}, "is not a directory"),
        ({"data": {"own": "none.jsonl"}}, "none.jsonl is not a file"),
        ({"data": {"own": "TASK"}}, "is none of .json"),
        ({}, "its data cannot be loaded"),
        ({"names": ("gsm8k_pissa",), "data": {"gsm8k_pissa": "GSM"}, "num_fewshot": 5}, "is asked without examples"),
    ],
)
def test_what_cannot_be_run_is_refused(own: Path, options: dict[str, Any], says: str) -> None:
    options = {"names": ("own",), "include_path": str(own / "tasks"), **options}
    if "data" in options:
        options["data"] = {
            name: file.replace("TASK", str(own / "tasks" / "own.yaml")).replace("GSM", gsm8k(own))
            for name, file in options["data"].items()
        }
    with pytest.raises(InputError, match=says):
        Tasks(**options).load()


def test_how_tasks_are_asked_is_said() -> None:
    assert Tasks(names=("a", "b")).says() == (
        "a, b: all documents, the tasks' own few-shot examples, as plain text, seed 1234"
    )
    assert "the first 25% of the documents of each, 5-shot, in the chat template" in (
        Tasks(names=("a",), limit=0.25, num_fewshot=5, chat=True).says()
    )


def test_a_table_has_a_column_for_every_model() -> None:
    scores = {
        "base": Scores({("one", "acc"): (0.25, 0.125), ("one", "acc_norm"): (0.5, None)}, {}, {}),
        "trained": Scores({("one", "acc"): (0.75, 0.125), ("two", "exact_match,strict-match"): (1.0, None)}, {}, {}),
    }
    assert as_table(scores).splitlines() == [
        "task  metric                    base             trained",
        "----  ------------------------  ---------------  ---------------",
        "one   acc                       0.2500 ± 0.1250  0.7500 ± 0.1250",
        "one   acc_norm                  0.5000           -",
        "two   exact_match,strict-match  -                1.0000",
    ]
