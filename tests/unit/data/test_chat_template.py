"""Turns of the assistant under the templates of common families, compared with transformers' own rendering."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from helpers.chat_templates import FAMILIES, LLAMA3_TILDE, Family
from helpers.sft import CONVERSATION, byte_level_tokenizer, encode_one, trained_text
from lowrank_dist.data.rendering import Example, Renderer
from lowrank_dist.errors import InputError

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
CALLS = [
    {"role": "user", "content": "Is it warm in Paris?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": '{"degrees": 18}'},
    {"role": "assistant", "content": "It is 18C."},
]
THOUGHTS = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nworld"},
    {"role": "user", "content": "2 and 2?"},
    {"role": "assistant", "reasoning_content": "a sum", "content": "four"},
]
EMPTY = "<think>\n\n</think>\n\n"
THOUGHT = "<think>\nhm\n</think>\n\n", "<think>\na sum\n</think>\n\n"
JSON = '{"name": "get_weather", "arguments": {"city": "Paris"}'


def string_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same, with arguments as JSON text: OpenAI's own form."""
    messages = copy.deepcopy(messages)
    for message in messages:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = '{"city": "Paris"}'
    return messages


def examples(family: str, record: dict[str, Any], **settings: Any) -> list[Example]:
    return Renderer(FAMILIES[family].tokenizer(), None, **settings).examples(record, "f.jsonl:1")


def trained(found: list[Example]) -> list[str]:
    return [text for example in found for text, on in example.segments if on]


def prompts(found: list[Example]) -> list[str]:
    """The text before each trained turn."""
    return [
        "".join(text for text, _ in example.segments[:place])
        for example in found
        for place, (_, on) in enumerate(example.segments)
        if on
    ]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen2.5", ["world<|im_end|>", "four<|im_end|>"]),
        ("qwen3", [f"{EMPTY}world<|im_end|>", f"{EMPTY}four<|im_end|>"]),
        ("qwq", ["\n</think>\n\nworld<|im_end|>", "\n</think>\n\nfour<|im_end|>"]),
        ("llama2", [" world </s>", " four </s>"]),
        ("llama3", ["world<|eot_id|>", "four<|eot_id|>"]),
        ("llama3.1", ["world<|eot_id|>", "four<|eot_id|>"]),
        ("mistral", [" world</s>", " four</s>"]),  # the system prompt is before the last message of each prompt
        ("gemma", ["world<end_of_turn>", "four<end_of_turn>"]),
        ("phi3", ["world<|end|>", "four<|end|>"]),
        ("zephyr", ["world</s>", "four</s>"]),
        ("r1", ["\n</think>\n\nworld<eos>", "\n</think>\n\nfour<eos>"]),
        ("r1 of January", ["world<eos>", "four<eos>"]),
        ("gpt-oss", ["<|channel|>final<|message|>world<|return|>", "<|channel|>final<|message|>four<|return|>"]),
        ("parts", ["world<|end|>", "four<|end|>"]),
    ],
)
def test_a_turn_is_trained_as_it_is_generated(family: str, expected: list[str]) -> None:
    messages = CONVERSATION[1:] if family == "gemma" else CONVERSATION
    found = examples(family, {"messages": messages})
    assert trained(found) == expected
    assert prompts(found) == [prompt_of(family, messages, index) for index in turns(messages)]


def test_the_mask_is_that_of_generation_markers() -> None:
    """Where a template has them, transformers tells which tokens the assistant generates."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = byte_level_tokenizer(template=template)
    whole = tokenizer.apply_chat_template(CONVERSATION, return_assistant_tokens_mask=True, return_dict=True)
    tokens, labels = encode_one(tokenizer, {"messages": CONVERSATION})
    assert tokens == whole["input_ids"][: len(tokens)]
    assert [int(label != -100) for label in labels] == whole["assistant_masks"][: len(tokens)]
    assert sum(whole["assistant_masks"][len(tokens) :]) == 0


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen2.5", f"<tool_call>\n{JSON}}}\n</tool_call><|im_end|>"),
        ("qwen3", f"{EMPTY}<tool_call>\n{JSON}}}\n</tool_call><|im_end|>"),
        ("llama3.1", '{"name": "get_weather", "parameters": {"city": "Paris"}}<|eot_id|>'),
        ("mistral", f'[TOOL_CALLS] [{JSON}, "id": "d0f631ca1"}}]</s>'),
        ("gpt-oss", ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>'),
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("functions", [False, True])
def test_calls_are_trained_in_the_templates_form(family: str, expected: str, as_text: bool, functions: bool) -> None:
    messages = string_arguments(CALLS) if as_text else CALLS
    tools = {"functions": [WEATHER["function"]]} if functions else {"tools": [WEATHER]}
    found = examples(family, {"messages": messages, **tools})
    assert trained(found)[0] == expected
    assert "It is 18C." in trained(found)[1]
    assert all("get_weather" in prompt for prompt in prompts(found))
    if family not in ("mistral",):  # which gets other identifiers
        assert prompts(found) == [prompt_of(family, CALLS, index, tools=[WEATHER]) for index in turns(CALLS)]


def test_a_system_prompt_that_other_turns_have_may_be_missing() -> None:
    """Mistral's stands before the last message if that is the user's: not after a result, in use neither."""
    renderer = Renderer(FAMILIES["mistral"].tokenizer(), None)
    messages = [{"role": "system", "content": "Be short. Ask get_weather."}, *CALLS]
    found = renderer.examples({"messages": messages, "tools": [WEATHER]}, "x")
    assert ["Be short." in prompt for prompt in prompts(found)] == [True, False]
    assert list(renderer.notes.items()) == [
        ("the template's prompt leaves out the system prompt, which other turns have", 1)
    ]
    with pytest.raises(InputError, match=r"does not render the text of message 0 \(system\)"):
        examples("mistral", {"messages": messages, "tools": [WEATHER]}, train_on="last_assistant")


@pytest.mark.parametrize("content", [None, ""])
def test_a_conversation_may_end_with_a_call(content: str | None) -> None:
    (example,) = examples("qwen2.5", {"messages": [CALLS[0], CALLS[1] | {"content": content}], "tools": [WEATHER]})
    assert trained([example]) == [f"<tool_call>\n{JSON}}}\n</tool_call><|im_end|>"]


@pytest.mark.parametrize("family", ["llama2", "llama3", "gemma", "phi3", "zephyr", "parts"])
def test_a_call_that_the_template_drops_is_named(family: str) -> None:
    """It would train the model to say nothing."""
    with pytest.raises(InputError, match=r"^f\.jsonl:1: the chat template does not render the call of 'get_weather'"):
        examples(family, {"messages": CALLS[:2]})
    with pytest.raises(InputError, match=r"message 1 is an assistant turn without text or call"):
        examples(family, {"messages": [CALLS[0], {"role": "assistant", "content": " "}]})


def test_a_call_is_not_found_in_what_the_user_said() -> None:
    call = {"function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
    messages = [
        {"role": "user", "content": "add a 2 and b 3"},
        {"role": "assistant", "content": "add a: 2, b: 3", "tool_calls": [call]},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "yes"},
    ]
    for train_on in ("all_assistant", "last_assistant", "everything"):
        with pytest.raises(InputError, match="does not render the call of 'add'"):
            examples("llama3", {"messages": messages}, train_on=train_on)


@pytest.mark.parametrize("family", ["llama2", "llama3", "gemma", "phi3", "zephyr", "r1", "parts"])
def test_functions_that_the_template_drops_are_named(family: str) -> None:
    messages = CONVERSATION[1:3]
    with pytest.raises(InputError, match="does not render the function 'get_weather' of `tools`"):
        examples(family, {"messages": messages, "tools": [WEATHER]})


def test_arguments_as_text_go_to_templates_that_want_text() -> None:
    """R1's and DeepSeek-V3's add them to other text."""
    template = FAMILIES["r1"].template.replace("m.content is not none", "m.content")
    for messages in (CALLS, string_arguments(CALLS)):
        found = Renderer(byte_level_tokenizer(template=template), None).examples({"messages": messages}, "x")
        assert '<call>function<sep>get_weather\n```json\n{"city": "Paris"}\n```</call>' in trained(found)[0]


def test_a_template_that_ends_a_turn_twice_is_named() -> None:
    """R1's writes an empty turn behind the calls of one whose text is empty."""
    with pytest.raises(InputError, match="ends message 1 in its middle: .*<eos><Assistant><eos>"):
        examples("r1", {"messages": CALLS})


@pytest.mark.parametrize(
    ("family", "before", "after"),
    [
        ("qwen2.5", "", "<|im_end|>"),
        ("qwen3", "", "<|im_end|>"),
        ("llama3", "", "<|eot_id|>"),
        ("r1 of January", "", "<eos>"),
        ("mistral", " ", "</s>"),
        ("gemma", "", "<end_of_turn>"),
    ],
)
def test_thinking_is_kept(family: str, before: str, after: str) -> None:
    found = examples(family, {"messages": THOUGHTS})
    assert trained(found) == [f"{before}{THOUGHT[0]}world{after}", f"{before}{THOUGHT[1]}four{after}"]
    shown = [{name: value for name, value in message.items()} for message in THOUGHTS]
    if family == "qwen3":
        assert prompts(found) == [prompt_of(family, shown, index) for index in turns(shown)]


@pytest.mark.parametrize("family", ["qwq", "r1"])
def test_a_thought_that_the_prompt_opens_goes_on(family: str) -> None:
    end = FAMILIES[family].eos
    found = examples(family, {"messages": THOUGHTS})
    assert trained(found) == [f"hm\n</think>\n\nworld{end}", f"a sum\n</think>\n\nfour{end}"]
    assert all(prompt.endswith("<think>\n") for prompt in prompts(found))
    assert all("hm" not in prompt for prompt in prompts(found))


def test_thinking_goes_into_the_channel_of_gpt_oss() -> None:
    assert trained(examples("gpt-oss", {"messages": THOUGHTS})) == [
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>world<|return|>",
        "<|channel|>analysis<|message|>a sum<|end|><|start|>assistant<|channel|>final<|message|>four<|return|>",
    ]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_thinking_is_dropped(family: str) -> None:
    found = examples(family, {"messages": THOUGHTS}, thinking="drop")
    assert all("hm" not in text and "a sum" not in text for example in found for text, _ in example.segments)
    assert trained(found) == trained(
        examples(family, {"messages": [THOUGHTS[0], {"role": "assistant", "content": "world"}, *CONVERSATION[3:]]})
    )


def test_a_thought_that_is_closed_at_once_is_counted() -> None:
    renderer = Renderer(FAMILIES["r1"].tokenizer(), None)
    renderer.examples({"messages": CONVERSATION}, "x")
    assert list(renderer.notes.values()) == [2]
    assert "opens a thought" in next(iter(renderer.notes))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_content_as_a_list_is_content_as_text(family: str) -> None:
    listed = [
        message | {"content": [{"type": "text", "text": message["content"][:2]}, {"text": message["content"][2:]}]}
        for message in CONVERSATION[1:]
    ]
    assert examples(family, {"messages": listed}) == examples(family, {"messages": CONVERSATION[1:]})


def test_no_repr_of_a_list_is_trained() -> None:
    listed = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in CONVERSATION]
    tokenizer = Family(LLAMA3_TILDE, "<|eot_id|>").tokenizer()
    _, labels = encode_one(tokenizer, {"messages": listed})
    assert trained_text(tokenizer, labels) == ["world<|eot_id|>", "four<|eot_id|>"]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_completion_ends_as_a_turn_does(family: str) -> None:
    messages = CONVERSATION[1:4]
    (example,) = examples(family, {"messages": messages, "completion": "four"})
    assert trained([example]) == trained(examples(family, {"messages": CONVERSATION[1:]}))[1:]
    assert prompts([example]) == [prompt_of(family, CONVERSATION[1:], 3)]


@pytest.mark.parametrize("family", ["zephyr"])
def test_a_message_that_the_template_drops_is_named(family: str) -> None:
    messages = [CONVERSATION[1], {"role": "narrator", "content": "It rains."}, CONVERSATION[2]]
    with pytest.raises(InputError, match=r"does not render the text of message 1 \(narrator\): 'It rains.'"):
        examples(family, {"messages": messages})


def test_what_differs_is_shown() -> None:
    template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}<x>{% endif %}"
    with pytest.raises(InputError) as caught:
        Renderer(byte_level_tokenizer(template=template), None).examples({"messages": CONVERSATION}, "f.jsonl:1")
    message = str(caught.value)
    assert "message 2 differently from the prompt before it: the prompt goes on with '<x>' where" in message
    assert "'world|'" in message
    assert "train_on: last_assistant" in message


def test_no_repr_of_arguments_is_trained() -> None:
    template = FAMILIES["qwen2.5"].template.replace("call.arguments | tojson", "call.arguments | string")
    found = Renderer(byte_level_tokenizer(template=template), None)
    assert JSON in trained(found.examples({"messages": CALLS}, "x"))[0]  # handed over as text


def turns(messages: list[dict[str, Any]]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def prompt_of(family: str, messages: list[dict[str, Any]], index: int, tools: Any = None) -> str:
    """What a model is given at generation: transformers' own rendering."""
    before = messages[:index]
    if family == "parts":
        before = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in before]
    tokenizer = FAMILIES[family].tokenizer()
    text: str = tokenizer.apply_chat_template(before, tools=tools, add_generation_prompt=True, tokenize=False)
    return text
