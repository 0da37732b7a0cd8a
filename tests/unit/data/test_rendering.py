"""Records as text: which of it is trained on, and how what is not understood is named."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from helpers.chat_templates import FAMILIES
from helpers.sft import (
    CHATML,
    CONVERSATION,
    byte_level_tokenizer,
    encode,
    encode_one,
    trained_text,
)
from lowrank_dist.data.rendering import Renderer


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
    tokenizer = byte_level_tokenizer(template="{% if tools %}{{ tools[0]['function']['name'] }}\n{% endif %}" + CHATML)
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


def test_query_and_response_use_the_instruction_prompt():
    tokenizer = byte_level_tokenizer(template=None, eos="<|endoftext|>")
    tokens, labels = encode_one(tokenizer, {"query": "add 2 and 2", "response": "It is four."})
    assert tokenizer.decode(tokens) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nadd 2 and 2\n\n### Response: It is four.<|endoftext|>"
    )
    assert trained_text(tokenizer, labels) == [" It is four.<|endoftext|>"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"txt": "a", "meta": 1}, "columns found: `meta`, `txt`; valid choices: `messages`"),
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
            "{% for m in messages %}{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}<x>{% endif %}",
            "renders message 2 differently from the prompt",
        ),
    ],
)
def test_a_template_that_does_not_work_is_named(template, message):
    with pytest.raises(ValueError, match=message) as caught:
        encode(byte_level_tokenizer(template=template), {"messages": CONVERSATION})
    assert str(caught.value).startswith("f.jsonl:1: ")


# --------------------------------------------------------------------------------- which turns are trained on
REWRITING = (  # the last turn alone has "hm, "
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}hm, {% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def weighted(*weights: int | None) -> list[dict]:
    rest = iter(weights)
    return [m | ({"weight": next(rest)} if m["role"] == "assistant" else {}) for m in CONVERSATION]


def segments(record: dict, template: str | None = None, **settings) -> list[list[tuple[str, bool]]]:
    renderer = Renderer(byte_level_tokenizer(), template, **settings)
    return [example.segments for example in renderer.examples(record, "f.jsonl:1")]


def trained(record: dict, template: str | None = None, **settings) -> list[str]:
    return [text for example in segments(record, template, **settings) for text, on in example if on]


@pytest.mark.parametrize(
    ("weights", "texts"),
    [
        ((0, 1), ["four<|im_end|>"]),
        ((1, 0), ["world<|im_end|>"]),
        ((None, None), ["world<|im_end|>", "four<|im_end|>"]),
    ],
)
def test_turns_of_weight_0_are_not_trained_on(weights, texts):
    assert trained({"messages": weighted(*weights)}) == texts


def test_the_last_turn_alone_can_be_trained_on():
    assert trained({"messages": CONVERSATION}, train_on="last_assistant") == ["four<|im_end|>"]
    assert trained({"messages": weighted(0, 1)}, train_on="last_assistant") == ["four<|im_end|>"]
    # a template that rewrites earlier turns gives one example then
    assert len(segments({"messages": CONVERSATION}, REWRITING)) == 2
    (((_, _), response),) = segments({"messages": CONVERSATION}, REWRITING, train_on="last_assistant")
    assert response == ("hm, four<|im_end|>", True)


def test_everything_can_be_trained_on():
    whole = byte_level_tokenizer().apply_chat_template(CONVERSATION, tokenize=False).removesuffix("\n")
    assert segments({"messages": CONVERSATION}, train_on="everything") == [[(whole, True)]]
    (found,) = segments({"messages": weighted(0, 1)}, train_on="everything")
    assert "".join(text for text, _ in found) == whole
    assert [text for text, on in found if not on] == ["world<|im_end|>"]
    (found,) = segments({"messages": weighted(1, 0)}, train_on="everything")
    assert [on for _, on in found] == [True]
    assert found[0][0].endswith("<|im_start|>assistant\n")
    assert segments({"messages": CONVERSATION[:2]}, train_on="everything")[0][0][1]


@pytest.mark.parametrize(
    ("record", "template", "settings", "message"),
    [
        (weighted(0, 0), None, {}, "every assistant turn of `messages` has the weight 0"),
        (
            weighted(1, 0),
            None,
            {"train_on": "last_assistant"},
            "the last assistant turn of `messages` has the weight 0",
        ),
        (weighted(0, 1), REWRITING, {"train_on": "everything"}, "message 2 has the weight 0, and .* rewrites it"),
        (
            [*CONVERSATION[1:3], {"role": "user", "content": "a", "weight": 0}, CONVERSATION[4]],
            None,
            {"train_on": "everything"},
            r"message 2 \(user\) has the weight 0",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_named(record, template, settings, message):
    with pytest.raises(ValueError, match=rf"^f\.jsonl:1: .*{message}"):
        segments({"messages": record}, template, **settings)


def test_a_dropped_tool_result_is_named_even_if_the_answer_repeats_it():
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")
    messages = [*CONVERSATION[1:3], {"role": "tool", "content": "four"}, {"role": "assistant", "content": "four"}]
    with pytest.raises(ValueError, match=r"does not render the text of message 2 \(tool\): 'four'"):
        trained({"messages": messages}, template)


def test_texts_may_repeat_each_other():
    messages = [{"role": role, "content": "hello"} for role in ("system", "user", "assistant", "user", "assistant")]
    assert trained({"messages": messages}) == ["hello<|im_end|>"] * 2


# ------------------------------------------------------------- texts that are names, numbers and pieces of each other
WORDS = [
    "a",
    "get",
    "city",
    "2",
    "add",
    "5 ",
    "\n",
    "user",
    "None",
    "x y",
    "ä",
    '"q"',
    '{"a": 2}',
    "<b>",
    "it's",
    "name",
]
DROPS_CALLS = {"llama2", "llama3", "gemma", "phi3", "zephyr", "parts", "r1", "r1 of January"}
FUNCTIONS = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": {"properties": properties}}}
    for name, properties in (
        ("get", {"city": {"type": "string"}, "a": {"type": "string"}}),
        ("add", {"a": {"type": "string"}, "b": {"type": "string"}}),
    )
]


def random_conversation(rng: random.Random, calls: bool) -> list[dict[str, Any]]:
    def text() -> str:
        return f"{' '.join(rng.choices(WORDS, k=rng.randint(0, 3)))} {rng.choice(['a', 'get', '2', 'x y'])}"

    messages = [{"role": "system", "content": text()}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": text()})
        if calls:
            values = [2, 2.5, True, None, text(), [1, "a"], {"a": "x"}, ""]
            arguments = {name: rng.choice(values) for name in rng.sample(["a", "b", "city"], rng.randint(0, 2))}
            call = {"id": "c1", "function": {"name": rng.choice(["get", "add"]), "arguments": arguments}}
            messages.append({"role": "assistant", "content": rng.choice([None, ""]), "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": "c1", "content": text()})
        messages.append({"role": "assistant", "content": text()})
    return messages


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_nothing_is_refused_wrongly_and_nothing_dropped_is_passed(family):
    renderer, rng = Renderer(FAMILIES[family].tokenizer(), None), random.Random(7)
    for number in range(30):
        messages = random_conversation(rng, calls=number % 2 == 1)
        if family == "gemma" and messages[0]["role"] == "system":
            continue
        record = {"messages": messages}
        if number % 2 == 1 and family in DROPS_CALLS:
            with pytest.raises(ValueError, match="does not render the call|ends message|cannot render"):
                renderer.examples(record, "x")
            continue
        if number % 2 == 1:
            record["tools"] = FUNCTIONS
        assert renderer.examples(record, "x")
