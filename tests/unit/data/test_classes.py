"""Labelled texts: their classes by number or by name, their tokens as the tokenizer writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.sft import byte_level_tokenizer, write_jsonl
from lowrank_dist.data.classes import LabelledEncoder, LabelledRenderer
from lowrank_dist.data.loading import Loaded, load
from lowrank_dist.data.packing import Collator, TokenDataset, Tokens
from lowrank_dist.data.sources import Source
from lowrank_dist.errors import InputError


def loaded(path: Path, *, max_length: int = 64, tokenizer: Any = None, **options: Any) -> Loaded:
    encoder = LabelledEncoder(tokenizer or byte_level_tokenizer(bos=True), max_length)
    return load(Source(role="train", names=str(path)), LabelledRenderer(**options), encoder, max_length=max_length)


def test_tokens_and_classes(tmp_path: Path) -> None:
    records = [
        {"text": "hello world", "label": 1},
        {"text": "hello", "label": "0"},  # CSV files hold text alone
        {"text": "hello " * 80, "label": "good"},
    ]
    write_jsonl(tmp_path / "d.jsonl", records)
    found = loaded(tmp_path / "d.jsonl", max_length=16, classes=["bad", "good"])
    tokenizer = byte_level_tokenizer(bos=True)
    assert found.targets == [1, 0, 1]
    assert found.examples[0][0].tolist() == tokenizer("hello world")["input_ids"]
    assert found.examples[2].shape == (2, 16)
    assert (found.cut, len(found.lengths), found.lengths[2] > 80) == (1, 3, True)
    dataset = TokenDataset(Tokens.of(found.examples, found.along, found.targets))
    batch = Collator(0)([dataset[0], dataset[1], dataset[~2]])
    assert batch["labels"].tolist() == [1, 0, -100]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    again = Tokens.mapped(dataset.examples.stored(), largest=dataset.examples.largest)
    assert torch.equal(again.targets, dataset.examples.targets)


def test_two_texts_have_their_kinds(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level_tokenizer()
    eos = ("<|im_end|>", tokenizer.convert_tokens_to_ids("<|im_end|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", pair="$A <|im_end|> $B:1 <|im_end|>:1", special_tokens=[eos]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    write_jsonl(
        tmp_path / "d.jsonl",
        [{"s1": "hello", "s2": "world", "y": 0}, {"s1": "hello " * 20, "s2": "four", "y": 1}],
    )
    columns = {"text": "s1", "text_pair": "s2", "label": "y"}
    found = loaded(tmp_path / "d.jsonl", tokenizer=tokenizer, max_length=12, columns=columns)
    dataset = TokenDataset(Tokens.of(found.examples, found.along, found.targets))
    batch = Collator(0)([dataset[0], dataset[1]])
    expected = tokenizer("hello", "world")["token_type_ids"]
    assert batch["token_type_ids"][0].tolist() == [*expected, *[0] * (batch["input_ids"].shape[1] - len(expected))]
    assert batch["token_type_ids"].dtype == torch.int64
    assert tokenizer.decode(found.examples[1][0]).endswith("four<|im_end|>")  # the longer one was cut


@pytest.mark.parametrize(
    ("record", "classes", "message"),
    [
        ({"text": "a"}, None, "there is no `label`"),
        ({"label": 1, "sentence": "a"}, None, r"there is no `text` \(columns found: `label`, `sentence`\)"),
        ({"text": "a", "label": "good"}, None, "'good' is not the number of a class, 0 or more; list the names"),
        ({"text": "a", "label": "ugly"}, ["bad", "good"], "'ugly' is none of the classes bad, good"),
        ({"text": "a", "label": 2}, ["bad", "good"], "the label 2 is not the number of a class, 0 to 1"),
        ({"text": "a", "label": -1}, None, "the label -1 is not the number"),
        ({"text": "a", "label": 0.5}, None, "the label 0.5 is not the number"),
        (
            {"text": "a", "label": 1},
            ["1", "0"],
            "the label 1 may be the number of a class or its name, because class 0 is called '1'",
        ),
        ({"text": "a", "label": 0}, ["1", "2", "3"], "the label 0 may be the number of a class or its name"),
        ({"text": "a", "label": "0"}, ["1", "2", "3"], "the label '0' is none of the classes 1, 2, 3"),
        ({"text": 3, "label": 0}, None, "`text` is a int, not text"),
    ],
)
def test_what_is_not_understood_is_named(record: dict[str, Any], classes: list[str] | None, message: str) -> None:
    with pytest.raises(InputError, match=rf"f:1: .*{message}"):
        LabelledRenderer(classes=classes).items(record, "f:1")


@pytest.mark.parametrize(
    ("label", "classes", "number"),
    [("1", ["1", "0"], 0), ("3", ["1", "2", "3"], 2), (1, ["0", "1"], 1), ("1", ["0", "1"], 1), (1, ["bad", "1"], 1)],
)
def test_names_that_are_numbers(label: Any, classes: list[str], number: int) -> None:
    ((one,),) = LabelledRenderer(classes=classes).items({"text": "a", "label": label}, "f:1")
    assert one.label == number


def test_a_text_without_tokens_is_a_bad_record(tmp_path: Path) -> None:
    """As an empty one under a tokenizer that adds none: it would be a row of padding."""
    path = tmp_path / "d.jsonl"
    write_jsonl(path, [{"text": "hello", "label": 1}, {"text": "", "label": 0}])
    tokenizer = byte_level_tokenizer()
    with pytest.raises(InputError, match=rf"^{path}:2: the text cannot be tokenized: '' has no tokens"):
        loaded(path, tokenizer=tokenizer)
    source = Source(role="train", names=str(path))
    found = load(source, LabelledRenderer(), LabelledEncoder(tokenizer, 64), max_length=64, on_bad_record="skip")
    assert (found.targets, found.wheres, len(found.skipped)) == ([1], [f"{path}:1"], 1)
    assert loaded(path).targets == [1, 0]  # its special tokens are there
