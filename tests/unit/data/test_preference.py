"""Preference pairs by their columns, and their examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.sft import CONVERSATION, byte_level_tokenizer, trained_text, write_jsonl
from lowrank_dist.data.loading import Loaded, load
from lowrank_dist.data.messages import Message
from lowrank_dist.data.packing import Collator, TokenDataset, Tokens
from lowrank_dist.data.preference import Preference, read_preference
from lowrank_dist.data.rendering import PairRenderer
from lowrank_dist.data.shapes import INPUT_PROMPT, INSTRUCTION_PROMPT, Conversation, Pair
from lowrank_dist.data.sources import Source
from lowrank_dist.data.tokenizing import IGNORE_INDEX, Encoder
from lowrank_dist.errors import InputError

USER, FOUR, FIVE = (
    Message(role=role, text=text) for role, text in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5"))
)
ASK = {"role": "user", "content": "2+2?"}
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
TALK = Preference(Conversation([USER, FOUR], [], 1), Conversation([USER, FIVE], [], 1))
#: The last turn alone has "hm, ".
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}hm, {% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("record", "read"),
    [
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, Preference(Pair("2+2?", "4"), Pair("2+2?", "5"))),
        (
            {"question": "2+2?", "chosen": "4", "rejected": "5"},
            Preference(*(Pair(INSTRUCTION_PROMPT.format(query="2+2?"), f" {side}") for side in "45")),
        ),
        (
            {"instruction": "add", "input": "2 2", "chosen": "4", "rejected": "5"},
            Preference(*(Pair(INPUT_PROMPT.format(query="add", input="2 2"), f" {side}") for side in "45")),
        ),
        ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, TALK),
        ({"prompt": [ASK], "chosen": "4", "rejected": "5"}, TALK),
        ({"prompt": "2+2?", "chosen": [GOOD], "rejected": [BAD]}, TALK),
        ({"prompt": "2+2?", "chosen": GOOD, "rejected": BAD}, TALK),
        ({"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, TALK),
        ({"prompt": "2+2?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, TALK),  # as UltraFeedback
        (
            {"input": {"messages": [ASK], "tools": []}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
            TALK,
        ),
        (
            {"system": "Be short.", "question": "2+2?", "chosen": [GOOD], "rejected": [BAD]},
            Preference(
                *(
                    Conversation([Message(role="system", text="Be short."), USER, answer], [], 2)
                    for answer in (FOUR, FIVE)
                )
            ),
        ),
    ],
)
def test_shapes(record: dict[str, Any], read: Preference) -> None:
    assert read_preference(record) == read


def test_text_as_a_conversation_and_columns() -> None:
    record = {"q": "2+2?", "good": "4", "bad": "5"}
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert read_preference(record, columns, as_chat=True) == TALK


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"needs `chosen` and `rejected` \(columns found: `chosen`, `prompt`\)"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same: nothing is preferred"),
        ({"chosen": "a b", "rejected": "a c"}, "text without a `prompt`, so that nothing tells where"),
        ({"chosen": [ASK, GOOD], "rejected": [{"role": "user", "content": "?"}, BAD]}, "differ before a response"),
        ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD, ASK, BAD]}, "`chosen` is only the beginning"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "share no prompt"),
        (
            {"prompt": "else", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
            "the prompt and the conv.* differ",
        ),
        ({"system": "s", "prompt": "a", "chosen": "b", "rejected": "c"}, "`system` belongs to a conversation"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "`chosen` is a int, not text"),
        ({"input": "x", "preferred_output": [GOOD]}, "`input` must be an object with `messages`"),
    ],
)
def test_what_is_no_pair_is_named(record: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_preference(record)


def loaded(path: Path, *, max_length: int = 64, template: str | None = None, **options: Any) -> Loaded:
    tokenizer = byte_level_tokenizer()
    renderer = PairRenderer(tokenizer, template, **options)
    return load(Source(role="train", names=str(path)), renderer, Encoder(tokenizer), max_length=max_length)


def test_only_what_differs_is_trained(tmp_path: Path) -> None:
    """Also a turn of the assistant that both share belongs to the prompt."""
    talks = [[*CONVERSATION[:-1], {"role": "assistant", "content": text}] for text in ("four", "five six")]
    write_jsonl(tmp_path / "d.jsonl", [{"chosen": talks[0], "rejected": talks[1]}])
    found = loaded(tmp_path / "d.jsonl", max_length=256)
    tokenizer = byte_level_tokenizer()
    texts = [trained_text(tokenizer, example[1].tolist()) for example in found.examples]
    assert texts == [["four<|im_end|>"], ["five six<|im_end|>"]]
    assert found.wheres == [f"{tmp_path / 'd.jsonl'}:1 ({side})" for side in ("chosen", "rejected")]


def test_both_of_a_pair_are_kept_or_none(tmp_path: Path) -> None:
    records = [
        {"prompt": "hello ", "chosen": "world", "rejected": "four"},
        {"prompt": "hello " * 4, "chosen": "world", "rejected": "four " * 40},  # cut, but both have a response
        {"prompt": "hello " * 80, "chosen": "world", "rejected": "four"},  # no response left
        {"prompt": "hello ", "chosen": "one " * 80 + "two", "rejected": "one " * 80 + "four"},  # left is the same
    ]
    write_jsonl(tmp_path / "d.jsonl", records)
    found = loaded(tmp_path / "d.jsonl", max_length=32)
    assert len(found.examples) == 4
    assert (found.cut, found.dropped, found.alike) == (5, 2, 1)
    assert found.lines(32)[-1] == "1 pairs were dropped: what is left of their two responses is the same"
    write_jsonl(tmp_path / "d.jsonl", [records[0], {"prompt": "", "chosen": "", "rejected": "four"}])
    found = loaded(tmp_path / "d.jsonl", max_length=32)
    assert (len(found.examples), found.dropped) == (2, 0)
    assert found.lines(32)[-1] == "2 examples have no token to train and were dropped"


def test_turns_that_are_separate_examples_are_refused(tmp_path: Path) -> None:
    talks = [[ASK, {"role": "assistant", "content": f"{word} a"}, ASK, GOOD] for word in ("one", "two")]
    write_jsonl(tmp_path / "d.jsonl", [{"chosen": talks[0], "rejected": talks[1]}])
    with pytest.raises(InputError, match=r"d.jsonl:1: .* 2 trained turns of `chosen` are separate .*last_assistant"):
        loaded(tmp_path / "d.jsonl", template=REWRITING, max_length=256)


def test_a_batch_has_the_chosen_ones_first() -> None:
    examples = [torch.full((2, size), index, dtype=torch.int32) for index, size in enumerate((3, 9, 4, 2))]
    dataset = TokenDataset(Tokens.of(examples), per_item=2)
    assert (len(dataset), dataset.lengths) == (2, [9, 4])
    batch = Collator(7)([dataset[0], dataset[~1]])
    assert batch["input_ids"].shape == (4, 16)
    assert batch["input_ids"][:, 1].tolist() == [0, 2, 1, 3]
    assert batch["input_ids"][:, -1].tolist() == [7] * 4
    assert (batch["labels"][:, 1] != IGNORE_INDEX).tolist() == [True, False, True, False]  # the second is a filler
    assert batch["attention_mask"].sum(1).tolist() == [3, 4, 9, 2]


def test_json_text_of_a_data_set_is_no_conversation(tmp_path: Path) -> None:
    record = {"prompt": "a", "chosen": json.dumps([GOOD]), "rejected": "b"}
    assert read_preference(record).chosen == Pair("a", json.dumps([GOOD]))
