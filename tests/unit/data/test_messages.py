"""Messages in the forms in which people write them."""

from __future__ import annotations

import json

import pytest

from lowrank_dist.data.messages import Call, Message, parse_messages
from lowrank_dist.errors import InputError

CALL = Call(name="add", arguments={"a": 2}, text='{"a": 2}')


def one(message):
    (parsed,) = parse_messages([message])
    return parsed


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2}'}}]},
        {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 2}}]},
        {"role": "assistant", "function_call": {"name": "add", "arguments": '{"a": 2}'}, "tool_calls": None},
        {"role": "assistant", "content": "", "tool_calls": '[{"name": "add", "arguments": {"a": 2}}]'},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "function_call", "value": '[{"name": "add", "arguments": "{\\"a\\": 2}"}]'},
    ],
)
def test_calls_have_one_form(message):
    assert one(message) == Message(role="assistant", text="", calls=(CALL,))


def test_calls_without_arguments_have_none():
    for given in ({}, {"arguments": None}, {"arguments": ""}, {"arguments": "{}"}):
        assert one({"role": "assistant", "tool_calls": [{"name": "now", **given}]}).calls[0].arguments == {}


@pytest.mark.parametrize(
    ("message", "role", "text"),
    [
        ({"from": "observation", "value": "18C"}, "tool", "18C"),
        ({"role": "function", "name": "f", "content": "18C"}, "tool", "18C"),
        ({"role": "tool", "content": {"degrees": 18}}, "tool", '{"degrees": 18}'),
        ({"role": "user", "content": ["a", {"type": "input_text", "text": "b"}]}, "user", "ab"),
    ],
)
def test_texts_and_roles_have_one_form(message, role, text):
    parsed = one(message)
    assert (parsed.role, parsed.text) == (role, text)


@pytest.mark.parametrize(
    ("message", "thinking", "text", "whole"),
    [
        ({"content": "<think>\nhm\n</think>\n\n4"}, "hm", "4", "<think>\nhm\n</think>\n\n4"),
        ({"content": "hm</think>4"}, "hm", "4", "hm</think>4"),  # R1's own text begins after the tag
        ({"content": "4", "reasoning_content": "hm"}, "hm", "4", "<think>\nhm\n</think>\n\n4"),
        ({"content": "4", "thinking": "hm"}, "hm", "4", "<think>\nhm\n</think>\n\n4"),
        ({"content": "4", "reasoning": "hm"}, "hm", "4", "<think>\nhm\n</think>\n\n4"),
        (
            {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "4"}]},
            "hm",
            "4",
            "<think>\nhm\n</think>\n\n4",
        ),
    ],
)
def test_thinking_has_one_form(message, thinking, text, whole):
    parsed = one({"role": "assistant", **message})
    assert (parsed.thinking, parsed.text, parsed.block + parsed.text) == (thinking, text, whole)


@pytest.mark.parametrize(("given", "weight"), [(0, 0), (1, 1), (0.25, 0.25), (3, 3), (None, 1), (False, 0)])
def test_weights(given, weight):
    assert one({"role": "assistant", "content": "4", "weight": given}).weight == weight


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            {"role": "assistant", "content": "4", "weight": -0.5},
            r"`weight` is -0.5; it must be a number of 0",
        ),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "of type 'image_url'; only text"),
        ({"role": "user", "content": "a", "images": ["x.png"]}, "`images`: only text is trained here"),
        ({"role": "user", "content": 3}, "`content` is a int, not text"),
        ({"role": "user", "content": {"a": 1}}, "`content` is a dict, not text"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, "call of 'f' are not valid JSON"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}, "'f' are a list, not an object"),
        ({"role": "assistant", "tool_calls": [{"arguments": {}}]}, "a call must be an object with `name`"),
        ({"role": "assistant", "tool_calls": {"name": "f"}}, "`tool_calls` is a dict, not a list"),
        ({"role": "assistant", "content": "<think>a</think>b", "reasoning": "a"}, "give it once"),
        ({"role": "assistant", "content": "b", "reasoning": 3}, "its thinking is a int"),
    ],
)
def test_what_is_not_understood_is_named(message, reason):
    with pytest.raises(InputError, match=f"^message 1 of `messages`: .*{reason}"):
        parse_messages(json.loads(json.dumps([{"role": "user", "content": "a"}, message])))
