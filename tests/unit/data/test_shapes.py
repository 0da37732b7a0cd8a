"""Records by their columns."""

from __future__ import annotations

import json

import pytest

from helpers.sft import CONVERSATION, byte_level_tokenizer, encode, encode_one, trained_text
from lowrank_dist.data.messages import Message
from lowrank_dist.data.prompt_template import PromptTemplate
from lowrank_dist.data.rendering import Renderer
from lowrank_dist.data.shapes import Conversation, Pair, Passage, check_columns, read_columns
from lowrank_dist.errors import InputError

ASKED = [Message(role="user", text="2+2?"), Message(role="assistant", text="4")]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("record", "read"),
    [
        (
            {"instruction": "Add 2 and 2.", "input": "", "output": "4"},
            Pair(
                "Below is an instruction that describes a task. Write a response that appropriately completes the "
                "request.\n\n### Instruction:\nAdd 2 and 2.\n\n### Response:",
                " 4",
            ),
        ),
        (
            {"instruction": "Translate {to} French.", "input": "cat", "output": "chat", "text": "all of it"},
            Pair(
                "Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.\n\n### Instruction:\nTranslate {to} French."
                "\n\n### Input:\ncat\n\n### Response:",
                " chat",
            ),
        ),
        ({"prompt": "a", "completion": "b", "text": "c"}, Pair("a", "b")),
        ({"text": "a", "meta": 1}, Passage("a")),
        (
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
            Conversation(ASKED, []),
        ),
        ({"messages": [{"role": "user", "content": "2+2?"}], "completion": "4"}, Conversation(ASKED, [], 1)),
        (
            {"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "4"}]},
            Conversation(ASKED, [], 1),
        ),
        ({"prompt": [{"role": "user", "content": "2+2?"}], "completion": "4"}, Conversation(ASKED, [], 1)),
        (
            {
                "system": "Be short.",
                "conversations": [{"role": "user", "content": "2+2?"}, {"from": "gpt", "value": "4"}],
            },
            Conversation([Message(role="system", text="Be short."), *ASKED], [], 1),
        ),
        (
            {"messages": json.dumps([{"role": "user", "content": "2+2?"}]), "completion": "4", "tools": None},
            Conversation(ASKED, [], 1),
        ),
    ],
)
def test_columns_say_what_a_record_is(record, read):
    assert read_columns(record) == read


def test_questions_are_put_into_the_instruction_prompt():
    assert read_columns({"question": "a", "answer": "b"}) == read_columns({"query": "a", "response": "b"})


@pytest.mark.parametrize("tools", [[TOOL], [TOOL["function"]], json.dumps([TOOL]), [json.dumps(TOOL)]])
@pytest.mark.parametrize("column", ["tools", "functions"])
def test_functions_come_in_several_forms(column, tools):
    record = {"messages": [{"role": "user", "content": "2+2?"}], "completion": "4", column: tools}
    assert read_columns(record) == Conversation(ASKED, [TOOL], 1)


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"q": "a", "gold": "b", "prompt": 1}, {"prompt": "q", "completion": "gold"}),
        ({"prompt": "b", "completion": "a"}, {"prompt": "completion", "completion": "prompt"}),
    ],
)
def test_columns_can_be_named(record, columns):
    assert read_columns(record, columns) == Pair("a", "b")


@pytest.mark.parametrize("columns", [{"instruction": "task", "output": "output"}, {"instruction": "task"}])
def test_columns_beside_named_ones_are_kept(columns):
    record = {"task": "Translate.", "input": "cat", "output": "chat"}
    named = {"instruction": "Translate.", "input": "cat", "output": "chat"}
    assert read_columns(record, columns) == read_columns(named)
    record = {"conv": [{"role": "user", "content": "2+2?"}], "completion": "4", "system": "Be short.", "tools": [TOOL]}
    expected = Conversation([Message(role="system", text="Be short."), *ASKED], [TOOL], 2)
    assert read_columns(record, {"messages": "conv"}) == expected


@pytest.mark.parametrize(
    ("columns", "read"),
    [
        ({"query": "q", "response": "gold"}, read_columns({"query": "a", "response": "b"})),
        ({"query": "q"}, read_columns({"query": "a", "response": "c"})),
        ({"text": "gold"}, Passage("b")),
        ({"completion": "gold"}, Conversation([*ASKED, Message(role="assistant", text="b")], [], 2)),
        ({"messages": "messages"}, Conversation(ASKED, [])),
    ],
)
def test_named_columns_decide_what_a_record_is(columns, read):
    record = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    record |= {"q": "a", "gold": "b", "response": "c", "prompt": "d", "text": "e"}
    assert read_columns(record, columns) == read


def test_null_columns_are_not_there():
    """Arrow gives every row the columns of all."""
    record = {"messages": None, "prompt": "a", "completion": "b", "tools": None, "text": None}
    assert read_columns(record) == Pair("a", "b")
    with pytest.raises(InputError, match="`completion` is a NoneType, not text"):
        read_columns(record | {"completion": None})
    with pytest.raises(InputError, match="columns found: none; valid choices"):
        read_columns({"messages": None})


def test_named_columns_must_be_there():
    with pytest.raises(InputError, match=r"the column 'q' of `columns` is missing \(columns found: `prompt`\)"):
        read_columns({"prompt": "a"}, {"prompt": "q", "completion": "prompt"})
    with pytest.raises(InputError, match=r"columns: 'promt' is not known; valid choices: messages, completion"):
        check_columns({"promt": "q"})


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "2+2?", "completion": "4"},
        {"query": "2+2?", "response": "4"},
        {"question": "2+2?", "answer": "4"},
        {"instruction": "2+2?", "output": "4"},
    ],
)
def test_a_pair_can_be_a_conversation(record):
    assert read_columns(record, as_chat=True) == Conversation(ASKED, [], 1)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "are a preference pair; train on it with PreferenceModule"),
        ({"instruction": "a"}, "columns found: `instruction`; valid choices"),
        ({"question": "a", "answer": {"text": "b"}}, "`answer` is a dict, not text"),
        ({"text": 3}, "`text` is a int, not text"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "`from` is 'robot'; known are human, "),
        ({"messages": "[1"}, "`messages` is text that is not valid JSON"),
        ({"messages": CONVERSATION, "tools": "[{"}, "`tools` is text that is not valid JSON"),
        ({"messages": CONVERSATION, "tools": "f"}, "`tools` must be a list of objects"),
        ({"messages": CONVERSATION, "system": "Be long."}, "`system` differs from the first message"),
    ],
)
def test_what_is_not_understood_is_named(record, message):
    with pytest.raises(InputError, match=message):
        read_columns(record)


@pytest.mark.parametrize("beside", [{"system": "Be short."}, {"tools": [TOOL]}, {"functions": [TOOL]}])
@pytest.mark.parametrize("names", [("prompt", "completion"), ("instruction", "output"), ("question", "answer")])
def test_text_has_no_place_for_what_belongs_to_a_conversation(names, beside):
    record = dict(zip(names, ("2+2?", "4"), strict=True))
    with pytest.raises(InputError, match=f"`{next(iter(beside))}` belongs to a conversation, and this record is text"):
        read_columns(record | beside)
    assert read_columns(record | dict.fromkeys(beside)) == read_columns(record)
    read = read_columns(record | beside, as_chat=True)
    assert (read.messages[0].text, read.tools) in (("Be short.", []), ("2+2?", [TOOL]))


def test_a_prompt_template_may_have_a_place_for_the_system_prompt():
    record = {"system": "Be short.", "question": "2+2?", "answer": "4"}
    assert read_columns(record, template=PromptTemplate("{system} {question}")) == Pair("Be short. 2+2?", "4")


def test_plain_text_is_trained_as_a_whole():
    tokenizer = byte_level_tokenizer(template=None, eos="<|endoftext|>", bos=True)
    tokens, labels = encode_one(tokenizer, {"text": "hello world"})
    assert tokenizer.decode(tokens) == "<s>hello world<|endoftext|>"
    assert trained_text(tokenizer, labels) == ["hello world<|endoftext|>"]


def test_everything_of_a_pair_can_be_trained():
    tokenizer = byte_level_tokenizer(bos=True)
    (example,) = Renderer(tokenizer, None, train_on="everything").examples(
        {"prompt": "hello", "completion": " world"}, ""
    )
    assert example.segments == [("hello", True), (" world", True)]
    assert encode(tokenizer, {"prompt": "hello", "completion": " world"})[0][1][:3].count(-100) > 1
