"""Text as tokens and labels."""

from __future__ import annotations

import pytest

from helpers.sft import (
    CHATML,
    CONVERSATION,
    byte_level_tokenizer,
    encode_one,
    sentencepiece_tokenizer,
    trained_text,
)
from lowrank_dist.data.rendering import Renderer
from lowrank_dist.data.tokenizing import IGNORE_INDEX, Encoded, Encoder


def test_prompt_and_completion_are_taken_as_they_are():
    tokenizer = byte_level_tokenizer()
    tokens, labels = encode_one(tokenizer, {"prompt": "hello ", "completion": "world", "id": 7})
    assert tokenizer.decode(tokens) == "hello world<|im_end|>"
    assert trained_text(tokenizer, labels) == ["world<|im_end|>"]


def test_the_prompt_has_the_tokens_it_has_alone():
    tokenizer = byte_level_tokenizer()
    tokens, _ = encode_one(tokenizer, {"prompt": "hello ", "completion": "world"})
    prompt = tokenizer("hello ")["input_ids"]
    assert tokens[: len(prompt)] == prompt


def test_eos_is_not_doubled():
    tokenizer = byte_level_tokenizer()
    tokens, _ = encode_one(tokenizer, {"prompt": "hello", "completion": " world<|im_end|>"})
    assert tokens.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    ("template", "record"),
    [
        (None, {"prompt": "hello", "completion": " world"}),
        (None, {"prompt": "<s>hello", "completion": " world"}),
        ("{{ bos_token }}" + CHATML, {"messages": CONVERSATION}),
        ("{{ bos_token }}" + CHATML, {"messages": CONVERSATION[:2], "completion": "world"}),
    ],
    ids=["raw", "raw with bos in the text", "chat", "chat prompt"],
)
def test_there_is_one_bos(template, record):
    tokenizer = byte_level_tokenizer(template=template, bos=True)
    tokens, labels = encode_one(tokenizer, record)
    assert tokens[0] == tokenizer.bos_token_id
    assert tokens.count(tokenizer.bos_token_id) == 1
    assert labels[0] == IGNORE_INDEX


def test_sentencepiece_puts_no_space_into_the_middle():
    tokenizer = sentencepiece_tokenizer()
    assert tokenizer.decode(tokenizer("four", add_special_tokens=False)["input_ids"]) == " four"
    tokens, labels = encode_one(tokenizer, {"prompt": "what is 2 and 2?\n", "completion": "four"})
    assert tokenizer.decode(tokens, skip_special_tokens=True) == " what is 2 and 2?\nfour"
    assert trained_text(tokenizer, labels) == ["four<|endoftext|>"]
    tokens, _ = encode_one(tokenizer, {"query": "add", "response": "four"})
    assert tokenizer.decode(tokens).endswith("Response: four<|endoftext|>")


def test_the_first_label_is_never_trained():
    tokenizer = byte_level_tokenizer()
    tokens, labels = encode_one(tokenizer, {"prompt": "", "completion": "hello"})
    assert labels == [IGNORE_INDEX, *tokens[1:]]


def test_a_batch_is_encoded_as_its_examples_are():
    tokenizer = sentencepiece_tokenizer()
    records = [{"prompt": f"hello {i}\n", "completion": "four " * i + "."} for i in range(4)]
    renderer, encoder = Renderer(tokenizer, None), Encoder(tokenizer)
    examples = [renderer.examples(record, "x")[0] for record in records]
    assert encoder(examples) == [encoder([example])[0] for example in examples]


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        Encoder(tokenizer)


def test_weights_of_messages_are_those_of_their_tokens():
    """Also of the last token, and only where a weight is neither 0 nor 1."""
    tokenizer = byte_level_tokenizer()
    renderer, encoder = Renderer(tokenizer, None), Encoder(tokenizer)

    def encoded(first: float, second: float, **options) -> Encoded:
        messages = [dict(message) for message in CONVERSATION]
        messages[2]["weight"], messages[4]["weight"] = first, second
        made = Renderer(tokenizer, None, **options) if options else renderer
        (one,) = encoder(made.examples({"messages": messages}, "x"))
        return one

    for options in ({}, {"train_on": "everything"}):
        one = encoded(0.5, 2, **options)
        weights = one.along["weights"]
        for message, weight in (("world<|im_end|>", 0.5), ("four<|im_end|>", 2.0)):
            ids = tokenizer(message)["input_ids"]
            (at,) = (i for i in range(len(one.tokens)) if one.tokens[i : i + len(ids)] == ids)
            assert weights[at : at + len(ids)] == [weight] * len(ids)
            assert one.labels[at : at + len(ids)] == ids
    assert encoded(0, 1).along == {}
    assert encoded(0, 0.5).along["weights"][-1] == 0.5
