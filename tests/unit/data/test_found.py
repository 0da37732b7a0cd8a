"""What counts as found in a text."""

from __future__ import annotations

import pytest

from lowrank_dist.data.found import NotRendered, check_prompt, check_response, find_text
from lowrank_dist.data.messages import Message, parse_messages, parse_tools


def messages(*pairs: tuple[str, str]) -> list[Message]:
    return [Message(role=role, text=text) for role, text in pairs]


def calling(arguments: object, text: str = "", name: str = "add") -> Message:
    call = {"name": name, "arguments": arguments}
    return parse_messages([{"role": "assistant", "content": text, "tool_calls": [call]}])[0]


@pytest.mark.parametrize(
    ("text", "given", "found"),
    [
        ("<a> hello </a>", " hello ", "hello"),
        ('{"content": "a \\"b\\"\\n"}', 'a "b"\n', 'a \\"b\\"'),
        ('"\\u00e4"', "ä", "\\u00e4"),
        ("ok ok", "no", None),
    ],
)
def test_a_text_is_found_as_templates_write_it(text: str, given: str, found: str | None) -> None:
    place = find_text(text, given)
    assert (place and text[slice(*place)]) == found


def test_a_text_that_was_trimmed_is_not_taken_for_a_later_one() -> None:
    check_prompt("<u>ok<a>yes<u>ok then", messages(("user", "ok "), ("assistant", "yes"), ("user", "ok then")), [])


def test_texts_are_found_in_their_order() -> None:
    check_prompt("<u>a<a>b<u>a", messages(("user", "a"), ("assistant", "b"), ("user", "a")), [])
    with pytest.raises(NotRendered, match=r"the text of message 2 \(user\): 'a'"):
        check_prompt("<u>a<a>b", messages(("user", "a"), ("assistant", "b"), ("user", "a")), [])
    check_prompt("<u>b<s>be short", messages(("system", "be short"), ("user", "b")), [])


def test_functions_are_not_found_in_what_is_said() -> None:
    tools = parse_tools([{"name": "get", "parameters": {"properties": {"city": {}}}}], "tools")
    said = messages(("user", "get the city"))
    check_prompt('{"name": "get", "city"}<u>get the city', said, tools)
    with pytest.raises(NotRendered, match="function 'get' of `tools`"):
        check_prompt("<u>get the city", said, tools)
    with pytest.raises(NotRendered, match="parameter 'city' of 'get'"):
        check_prompt("get()<u>get the city", said, tools)


@pytest.mark.parametrize(
    ("response", "arguments", "text"),
    [
        ('{"name": "add", "arguments": {"a": 2, "b": [1.5, true, null]}}', {"a": 2, "b": [1.5, True, None]}, ""),
        ("<f=add><p=a>2</p><p=b>True</p>", {"a": 2, "b": True}, ""),
        ('add {"a": 0.00001}', '{"a": 0.00001}', ""),
        ('I add 2. {"name": "add", "arguments": {"a": 2}}', {"a": 2}, "I add 2."),
        ('{"name": "add", "arguments": {"a": "x \\"y\\"\\n"}}', {"a": 'x "y"\n'}, ""),
        ('add {"a": "\\u00e4"}', '{"a": "\\u00e4"}', ""),
        ("add()", {}, ""),
    ],
)
def test_calls_are_found(response: str, arguments: object, text: str) -> None:
    check_response(response, calling(arguments, text), name="message 1")


@pytest.mark.parametrize(
    ("response", "arguments", "text", "message"),
    [
        ("I add 2.", {"a": 2}, "I add 2.", "does not render the call of 'add' in message 1"),
        ('{"name": "add"}', {"x": 2}, "", "does not render 'x', an argument of the call of 'add'"),
        ('{"name": "add", "a": 3}', {"a": 2}, "", "does not render '2', an argument of the call of 'add'"),
        ("add {'a': 2}", {"a": 2}, "", "in message 1 as Python: \"{'a': 2}\""),
        ("[{'name': 'add', 'arguments': '{\"a\": 2}'}]", '{"a": 2}', "", "in message 1 as Python"),
        ('{"name": "add", "arguments": "{\\"a\\": 2}"}', '{"a": 2}', "", "in message 1 as escaped text"),
        ('None{"name": "add", "arguments": {"a": 2}}', {"a": 2}, "", "writes 'None' for the text"),
        ('{"name": "add", "arguments": {"a": 2}}', {"a": 2}, "I add.", "does not render the text of message 1"),
    ],
)
def test_calls_that_are_dropped_or_shown_wrongly_are_named(
    response: str, arguments: object, text: str, message: str
) -> None:
    with pytest.raises(NotRendered) as caught:
        check_response(response, calling(arguments, text), name="message 1")
    assert message in str(caught.value)


def test_a_text_that_equals_its_thinking_must_be_there_too() -> None:
    message = parse_messages([{"role": "assistant", "content": "four", "reasoning": "four"}])[0]
    check_response("<think>four</think>four", message, name="message 1")
    with pytest.raises(NotRendered, match="the text of message 1"):
        check_response("<think>four</think>", message, name="message 1")


def test_a_call_before_the_turn_must_be_in_its_prompt() -> None:
    before = [Message(role="user", text="add 2"), calling({"a": 2}), Message(role="tool", text="2")]
    check_prompt('<u>add 2<a>{"name": "add", "a": 2}<t>2', before, [])
    with pytest.raises(NotRendered, match="the call of 'add' in message 1"):
        check_prompt("<u>add 2<a><t>2", before, [])
