from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.masking_utils import find_packed_sequence_indices

from helpers.sft import CHATML, byte_level_tokenizer, sentencepiece_tokenizer
from lowrank_dist.data.packing import Collator, TokenDataset, pack
from lowrank_dist.data.records import read_jsonl
from lowrank_dist.data.rendering import Renderer
from lowrank_dist.data.tokenizing import IGNORE_INDEX, Encoder

CONVERSATION = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "world"},
    {"role": "user", "content": "2 and 2?"},
    {"role": "assistant", "content": "four"},
]


def encode(tokenizer, record, template=None):
    examples = Renderer(tokenizer, template).examples(record, "f.jsonl:1")
    return Encoder(tokenizer)(examples)


def encode_one(tokenizer, record, template=None):
    ((tokens, labels),) = encode(tokenizer, record, template)
    assert len(tokens) == len(labels)
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(tokens, labels, strict=True))
    return tokens, labels


def trained_text(tokenizer, labels):
    """The trained stretches of an example, as text."""
    stretches: list[list[int]] = [[]]
    for label in labels:
        if label == IGNORE_INDEX:
            stretches.append([])
        else:
            stretches[-1].append(label)
    return [tokenizer.decode(ids) for ids in stretches if ids]


# ------------------------------------------------------------------------------------- what is trained
def test_query_and_response_use_the_instruction_prompt():
    tokenizer = byte_level_tokenizer(template=None, eos="<|endoftext|>")
    tokens, labels = encode_one(tokenizer, {"query": "add 2 and 2", "response": "It is four."})
    assert tokenizer.decode(tokens) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nadd 2 and 2\n\n### Response: It is four.<|endoftext|>"
    )
    assert trained_text(tokenizer, labels) == [" It is four.<|endoftext|>"]


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


def test_every_assistant_turn_is_trained_on_up_to_its_end_marker():
    tokenizer = byte_level_tokenizer()
    tokens, labels = encode_one(tokenizer, {"messages": CONVERSATION})
    whole = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert tokenizer.decode(tokens) == whole.removesuffix("\n")
    assert trained_text(tokenizer, labels) == ["world<|im_end|>", "four<|im_end|>"]
    assert tokens == tokenizer.apply_chat_template(CONVERSATION)["input_ids"][: len(tokens)]


def test_eos_follows_a_template_that_does_not_write_it():
    tokenizer = byte_level_tokenizer(eos="<|endoftext|>")
    _, labels = encode_one(tokenizer, {"messages": CONVERSATION})
    assert trained_text(tokenizer, labels) == ["world<|im_end|>", "four<|im_end|><|endoftext|>"]


def test_messages_with_completion_are_the_prompt():
    tokenizer = byte_level_tokenizer()
    tokens, labels = encode_one(tokenizer, {"messages": CONVERSATION[:-1], "completion": "five"})
    prompt = tokenizer.apply_chat_template(CONVERSATION[:-1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(tokens) == prompt + "five<|im_end|>"
    assert trained_text(tokenizer, labels) == ["five<|im_end|>"]


def test_tools_reach_the_template():
    tokenizer = byte_level_tokenizer(template="{% if tools %}{{ tools[0]['name'] }}\n{% endif %}" + CHATML)
    record = {"messages": CONVERSATION[:2], "completion": "x", "tools": [{"name": "adder"}]}
    tokens, _ = encode_one(tokenizer, record)
    assert tokenizer.decode(tokens).startswith("adder\n<|im_start|>system")


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each_turn():
    # as Qwen3's, which keeps the reasoning of the last turn only
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
        "hm, {% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = byte_level_tokenizer()
    first, second = encode(tokenizer, {"messages": CONVERSATION}, template)
    assert trained_text(tokenizer, first[1]) == ["hm, world<|im_end|>"]
    assert trained_text(tokenizer, second[1]) == ["hm, four<|im_end|>"]
    assert "assistant\nworld<|im_end|>" in tokenizer.decode(second[0])


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


# -------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a", "meta": 1}, "columns found: `meta`, `text`; valid choices: `messages`"),
        ({}, "columns found: none"),
        ({"prompt": "a"}, r"`completion` is missing \(columns found: `prompt`\)"),
        ({"completion": "a"}, "`prompt` is missing"),
        ({"query": "a", "response": None}, "`response` is a NoneType, not text"),
        ({"prompt": ["a"], "completion": "b"}, "`prompt` is a list, not text"),
        ({"messages": []}, "`messages` must be a non-empty list"),
        ({"messages": "hello"}, "`messages` must be a non-empty list"),
        ({"messages": [{"content": "hello"}]}, "`messages` must be a non-empty list"),
        ({"messages": CONVERSATION[:2]}, "no assistant turn to train on"),
        ({"messages": CONVERSATION[2:]}, "begins with an assistant turn"),
        ({"messages": CONVERSATION, "completion": 3}, "`completion` is a int, not text"),
    ],
)
def test_a_record_that_is_not_understood_is_named(record, message):
    with pytest.raises(ValueError, match=r"^f\.jsonl:1: ") as caught:
        encode(byte_level_tokenizer(), record)
    assert re.search(message, str(caught.value))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer .* has none; give `chat_template`"),
        ("{{ raise_exception('roles must alternate') }}", "cannot render `messages`: roles must alternate"),
        ("{% for m in messages %}", "cannot render `messages`"),
        (
            "{% for m in messages %}{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}<think>{% endif %}",
            "renders message 2 differently from the prompt",
        ),
    ],
)
def test_a_template_that_does_not_work_is_named(template, message):
    with pytest.raises(ValueError, match=message) as caught:
        encode(byte_level_tokenizer(template=template), {"messages": CONVERSATION})
    assert str(caught.value).startswith("f.jsonl:1: ")


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        Encoder(tokenizer)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\n", "empty line"),
        (b"   \n", "empty line"),
        (b'{"prompt": \n', "not valid JSON"),
        (b'{"prompt": "\xff"}\n', "not valid JSON"),
        (b"[1, 2]\n", "a JSON list"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n' + line + b'{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ValueError, match=message) as caught:
        list(read_jsonl(path))
    assert str(caught.value).startswith(f"{path}:2: ")


def test_jsonl_is_utf8(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps({"prompt": "größer"}, ensure_ascii=False).encode())
    assert list(read_jsonl(path)) == [(f"{path}:1", {"prompt": "größer"})]


# --------------------------------------------------------------------------------- packing and padding
CAPACITY = 32
lengths = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=40)


def examples_of(sizes):
    """Examples whose tokens are all different, so that none can be lost or doubled unseen; half of each is trained."""
    examples, token = [], 1
    for size in sizes:
        tokens = torch.arange(token, token + size)
        labels = torch.where(torch.arange(size) >= (size + 1) // 2, tokens, IGNORE_INDEX)
        examples.append(torch.stack([tokens, labels]).int())
        token += size
    return examples


@given(lengths)
def test_packing_puts_every_example_into_one_row(sizes):
    rows = pack(sizes, CAPACITY)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    assert all(0 < sum(sizes[index] for index in row) <= CAPACITY for row in rows)
    # any two rows would not fit into one: so at most twice the rows that the tokens alone ask for, and one
    assert len(rows) <= 2 * -(-sum(sizes) // CAPACITY) + 1


@given(lengths, st.integers(1, 4), st.booleans())
def test_no_token_is_lost_doubled_or_seen_from_another_example(sizes, batch_size, packed):
    examples = examples_of(sizes)
    owner = {int(token): index for index, example in enumerate(examples) for token in example[0]}
    dataset = TokenDataset(examples, CAPACITY if packed else None)
    seen: list[int] = []
    trained: list[int] = []
    for start in range(0, len(dataset), batch_size):
        rows = range(start, min(start + batch_size, len(dataset)))
        batch = Collator(pad_token_id=0)([dataset[row] for row in rows])
        assert batch["input_ids"].shape[1] % 8 == 0
        assert all(value.dtype == torch.int64 and value.shape == batch["labels"].shape for value in batch.values())
        real = batch["input_ids"] != 0
        assert (batch["labels"][~real] == IGNORE_INDEX).all()
        seen += batch["input_ids"][real].tolist()
        trained += batch["labels"][batch["labels"] != IGNORE_INDEX].tolist()
        if not packed:
            assert (batch["attention_mask"].bool() == real).all()
            continue
        assert "attention_mask" not in batch
        groups = find_packed_sequence_indices(batch["position_ids"])  # what transformers makes its mask of
        for row in range(len(real)):
            length = int(real[row].sum())
            owners = [owner[token] for token in batch["input_ids"][row, :length].tolist()] + [-1] * int(
                (~real[row]).sum()
            )
            found = [0] * len(owners) if groups is None else groups[row].tolist()
            for left in range(len(owners) - 1):
                assert (owners[left] == owners[left + 1]) == (found[left] == found[left + 1])
            first = [at for at in range(len(owners)) if at == 0 or owners[at] != owners[at - 1]]
            assert (batch["labels"][row, first] == IGNORE_INDEX).all()
            assert (batch["position_ids"][row, first] == 0).all()
    assert sorted(seen) == sorted(owner)
    assert sorted(trained) == sorted(int(t) for e in examples for t in e[1] if t != IGNORE_INDEX)


def test_a_filler_is_its_item_without_labels():
    dataset = TokenDataset(examples_of([5, 7]))
    item, filler = dataset[1], dataset[~1]
    assert torch.equal(item["input_ids"], filler["input_ids"])
    assert (item["labels"] != IGNORE_INDEX).any()
    assert (filler["labels"] == IGNORE_INDEX).all()
    assert torch.equal(item["labels"], dataset[1]["labels"])
