"""Answers do not depend on the number of ranks, and are those of stock transformers and PEFT."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.ranks import run_ranks, run_ranks_catching
from helpers.training import fit
from lowrank_dist import NF4
from lowrank_dist.data.messages import Message, assistant
from lowrank_dist.data.prompts import Prompter
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.inference.chat import chat
from lowrank_dist.inference.generation import Answer, Sampling, answer, stop_tokens
from lowrank_dist.inference.on_disk import ModelOnDisk

QUESTIONS = ["hello world", "2 and 2?", "what is the answer", "It", "add one and two, then three", "hello", "four?"]


def train(pretrained: Path, directory: Path, quantized: bool) -> None:
    _, trainer = fit(pretrained, quantization=NF4() if quantized else None)
    trainer.save_checkpoint(directory)


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "nf4"])
def saved(material: Path, tmp_path_factory: pytest.TempPathFactory, request: Any) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    run_ranks(2, train, material / "model", directory / "run", request.param)
    return directory / "run"


def answers(
    saved: Path, model: Path, sampling: Sampling, batch_size: int = 2, questions: list[str] | None = None
) -> list[Answer]:
    found = ModelOnDisk(saved)
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompter = Prompter(tokenizer)
    prompts = [prompter.line(text, f"question {i}") for i, text in enumerate(questions or QUESTIONS)]
    with found.loaded(ShardGroup()) as sharded:
        given = answer(
            sharded,
            prompts,
            tokenizer,
            sampling,
            stops=stop_tokens(found.generation(), prompter.stops()),
            batch_size=batch_size,
        )
    found.close()
    return given


def stock(saved: Path, model: Path, new: int) -> list[str]:
    """Greedy answers of the converted adapter, one prompt at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), saved / "lora"
    ).eval()
    texts = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = tuned.generate(
            **given,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts.append(tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def test_greedy_answers_on_any_number_of_ranks_and_of_stock_peft(saved: Path, material: Path) -> None:
    sampling = Sampling(max_new_tokens=12)
    one, *_ = run_ranks(1, answers, saved, material / "model", sampling)
    for ranks in (2, 3):
        for found in run_ranks(ranks, answers, saved, material / "model", sampling):
            assert found == one
    # fewer batches than ranks
    assert run_ranks(3, answers, saved, material / "model", sampling, 8)[2] == one
    assert run_ranks(2, answers, saved, material / "model", sampling, 1, QUESTIONS[:1])[1] == one[:1]
    assert len({found.text for found in one}) > 3
    if "NF4" not in ModelOnDisk(saved).kind:  # of a quantized base the LoRA leaves something out
        assert [found.text for found in one] == stock(saved, material / "model", 12)


def test_sampled_answers_are_those_of_the_seed(saved: Path, material: Path) -> None:
    first = Sampling(max_new_tokens=8, temperature=1.0, top_k=50, seed=1)
    one = run_ranks(1, answers, saved, material / "model", first)[0]
    assert run_ranks(2, answers, saved, material / "model", first)[1] == one
    other = Sampling(max_new_tokens=8, temperature=1.0, top_k=50, seed=2)
    assert run_ranks(2, answers, saved, material / "model", other)[0] != one


def chatted(saved: Path, model: Path, said: str) -> tuple[str, str, list[str]]:
    """Output and errors of a chat, and the answers to the same conversation."""
    found, group = ModelOnDisk(saved), ShardGroup()
    tokenizer, sampling = AutoTokenizer.from_pretrained(model), Sampling(max_new_tokens=8)
    prompter = Prompter(tokenizer)
    stops = stop_tokens(found.generation(), prompter.stops())
    output, errors, expected = io.StringIO(), io.StringIO(), []
    with found.loaded(group) as sharded:
        with redirect_stdout(output), redirect_stderr(errors), patch.object(sys, "stdin", io.StringIO(said)):
            chat(sharded, prompter, tokenizer, sampling, stops=stops)
        messages: list[Message] = []
        for line in ("hello", "and 2?", "hello"):
            messages = [*(messages if line.startswith("and") else []), Message(role="user", text=line)]
            prompt = prompter.conversation(messages, "here")
            (given,) = answer(sharded, [prompt], tokenizer, sampling, stops=stops)
            messages.append(assistant(given.text))
            expected.append(given.text)
    found.close()
    return output.getvalue(), errors.getvalue(), expected


def test_a_chat_streams_what_is_answered(saved: Path, material: Path) -> None:
    said = "hello\n\nand 2?\n" + "long " * 200 + "\n/reset\nhello\n"  # too long for the context, and refused
    first, second = run_ranks(2, chatted, saved, material / "model", said)
    printed, errors, expected = first
    assert "are more than the 128 tokens that the model was made for" in errors
    assert errors.count("cut after 8 tokens") == 3
    assert printed == "".join(shown(text) + "\n" for text in expected)
    assert (second[0], second[1]) == ("", "")


def shown(text: str) -> str:
    """As a terminal gets it."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def failing(saved: Path, how: str) -> None:
    found, group = ModelOnDisk(saved), ShardGroup()
    ids = torch.arange(5, 9)[None]
    with found.loaded(group) as model, model.in_step():
        model(ids)
        if group.rank == 1:
            raise FileNotFoundError("nothing there")
        if how == "works on":
            for _ in range(50):
                model(ids)


@pytest.mark.parametrize("how", ["works on", "has finished"])
def test_an_error_of_one_rank_is_raised_on_all(saved: Path, how: str) -> None:
    for _, error in run_ranks_catching(2, failing, saved, how, timeout=60):
        assert error is not None
        assert "FileNotFoundError" in error
