"""``lowrank-dist generate`` and ``evaluate`` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.command import lowrank_dist
from helpers.ranks import run_ranks
from helpers.sft import byte_level_tokenizer, write_jsonl
from helpers.training import fit

#: What the commands must say before they read weights, on every rank.
REFUSED: dict[str, tuple[list[str], str]] = {
    "two kinds of prompts": (["generate", "RUN", "--prompt", "a", "--prompts", "b"], "exclude each other"),
    "nothing there": (["generate", "nowhere/model", "--prompt", "a"], "nowhere/model"),
    "options without effect": (["generate", "RUN", "--prompt", "a", "--top_p", "0.5"], "no effect at temperature 0"),
    "a long prompt": (["generate", "RUN", "--prompt", "a " * 200], "128 tokens that the model was made for"),
    "a larger tokenizer": (
        ["generate", "RUN", "--tokenizer", "LARGE", "--prompt", "wonderful", "--text"],
        "the embedding of the model has",
    ),
    "no template": (["generate", "RUN", "--tokenizer", "PLAIN"], "a chat needs a chat template"),
    "records without it": (["generate", "RUN", "--tokenizer", "PLAIN", "--prompts", "CHATS"], "need a chat template"),
    "a bad record": (["generate", "RUN", "--prompts", "BAD"], "bad.jsonl:2: columns found: `x`"),
    "an output that is there": (["generate", "RUN", "--prompts", "CHATS", "--output", "BAD"], "exists; choose another"),
    "a run's directory": (["generate", "RUNS", "--prompt", "a"], "pass one of them, such as the newest"),
    "an unknown task": (["evaluate", "RUN", "--tasks", "gsm8k_pisa"], "similar ones: gsm8k_pissa"),
    "data of nothing": (["evaluate", "RUN", "--tasks", "responses"], "--data responses=FILE"),
    "data that is missing": (
        ["evaluate", "RUN", "--tasks", "responses", "--data", "responses=none.jsonl"],
        "none.jsonl is not a file",
    ),
    "records without response": (
        ["evaluate", "RUN", "--tasks", "responses", "--data", "responses=BAD"],
        "bad.jsonl:1: has no response",
    ),
    "a wrong column": (
        ["evaluate", "RUN", "--tasks", "responses", "--columns", '{"promt": "a"}'],
        "columns: 'promt' is not known; valid choices: ",
    ),
    "stages of an adapter": (
        ["evaluate", "RUN/lora", "--tasks", "responses", "--stages", "step0"],
        "only a checkpoint of a run has a step0 model",
    ),
}


def train(pretrained: Path, directory: Path) -> None:
    _, trainer = fit(pretrained)
    trainer.save_checkpoint(directory)


@pytest.fixture(scope="module")
def places(material: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("ask")
    run_ranks(2, train, material / "model", root / "runs" / "step=5")
    large, plain = byte_level_tokenizer(), byte_level_tokenizer(template=None)
    large.add_tokens([f"word{i}" for i in range(100)] + ["wonderful"])
    large.save_pretrained(root / "large")
    plain.save_pretrained(root / "plain")
    chat: list[Any] = [{"messages": [{"role": "user", "content": word}]} for word in ("hello", "2 and 2?", "it")]
    answered = [{"prompt": f"{i} and {i} is ", "completion": "four"} for i in range(5)]
    return {
        "RUNS": str(root / "runs"),
        "RUN": str(root / "runs" / "step=5"),
        "LARGE": str(root / "large"),
        "PLAIN": str(root / "plain"),
        "CHATS": write_jsonl(root / "chats.jsonl", chat),
        "ANSWERED": write_jsonl(root / "answered.jsonl", answered),
        "BAD": write_jsonl(root / "bad.jsonl", [chat[0], {"x": 1}]),
    }


def placed(arguments: list[str], places: dict[str, str]) -> list[str]:
    def path(word: str) -> str:
        option, equals, value = word.rpartition("=")
        name, slash, rest = value.partition("/")
        return f"{option}{equals}{places.get(name, name)}{slash}{rest}"

    return [path(word) for word in arguments]


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what: str, places: dict[str, str]) -> None:
    arguments, says = REFUSED[what]
    done = lowrank_dist(*placed(arguments, places), "--accelerator", "cpu")
    assert done.returncode == 1, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert "matrices" not in done.stderr  # the walk has not begun


def test_generate_on_one_rank_and_on_two(places: dict[str, str], tmp_path: Path) -> None:
    found = []
    for ranks in (None, 2):
        output = tmp_path / f"{ranks}.jsonl"
        done = lowrank_dist(
            *("generate", places["RUN"], "--prompts", places["CHATS"], "--max_new_tokens", "6"),
            *("--batch_size", "2", "--output", output, "--accelerator", "cpu"),
            ranks=ranks,
        )
        assert done.returncode == 0, done.stderr
        assert "the most likely token is taken" in done.stderr
        assert f"on {ranks or 1} CPU rank" in done.stderr
        assert "an answer ends with <|im_end|> (eos)" in done.stderr
        assert done.stdout.strip() == str(output)
        found.append([json.loads(line) for line in output.read_text().splitlines()])
    assert found[0] == found[1]
    assert [line["where"].rpartition(":")[2] for line in found[0]] == ["1", "2", "3"]
    done = lowrank_dist(
        *("generate", places["RUN"], "--prompt", "hello", "--max_new_tokens", "6", "--accelerator", "cpu"), ranks=2
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout  # streamed


def test_evaluate_shows_all_stages(places: dict[str, str], tmp_path: Path) -> None:
    scores, samples = tmp_path / "scores.json", tmp_path / "samples.jsonl"
    done = lowrank_dist(
        *("evaluate", places["RUN"], "--tasks", "responses", "--data", f"responses={places['ANSWERED']}"),
        *("--stages", "base", "step0", "trained", "converted", "--gen_kwargs", '{"max_gen_toks": 4}'),
        *("--output", scores, "--samples", samples, "--accelerator", "cpu"),
        ranks=2,
    )
    assert done.returncode == 0, done.stderr
    head, _, row, *_ = done.stdout.splitlines()
    assert head.split() == ["task", "metric", "base", "step0", "trained", "converted"]
    assert row.split()[:2] == ["responses", "exact_match"]
    report = json.loads(scores.read_text())
    assert list(report["stages"]) == ["base", "step0", "trained", "converted"]
    for stage in report["stages"].values():
        assert stage["results"]["responses"]["exact_match,none"] == 0.0  # a model of random weights
        assert stage["n-samples"]["responses"]["effective"] == 5
    assert len(samples.read_text().splitlines()) == 4 * 5
