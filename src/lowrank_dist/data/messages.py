"""Messages as people write them, in one form: OpenAI's, its older and its list form, and ShareGPT's."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lowrank_dist.errors import InputError

THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Entries of a message that hold its thinking, by the names that templates use."""

_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
    "function_call": "assistant",
}
_USED = {"role", "content", "from", "value", "tool_calls", "function_call", "weight", *THINKING_KEYS}
_THOUGHT = re.compile(r"\s*(?:<think>)?(?P<thinking>.*?)</think>\s*", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a function by the assistant."""

    name: str
    arguments: dict[str, Any]
    text: str
    """The arguments as JSON: what the record gave, if it gave text."""
    id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message of a conversation."""

    role: str
    text: str
    """Its text, without the thinking."""
    thinking: str = ""
    block: str = ""
    """The thinking with its tags and what separates it from the text: ``block + text`` is the whole."""
    inline: bool = False
    """Whether the record gave the thinking inside the text."""
    calls: tuple[Call, ...] = ()
    weight: float = 1.0
    """What the loss of each of its tokens counts, relative to others; 0: it is not trained."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """Other entries, for the template."""

    def without_thinking(self) -> Message:
        """The message without its thinking."""
        return replace(self, thinking="", block="")

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing and calls nothing."""
        return not (self.text.strip() or self.thinking.strip() or self.calls)


def assistant(text: str) -> Message:
    """A turn of the assistant, whose text may begin with its thinking between ``<think>`` and ``</think>``."""
    thought = _THOUGHT.match(text)
    if thought is None:
        return Message(role="assistant", text=text)
    return Message(
        role="assistant",
        text=text[thought.end() :],
        thinking=thought["thinking"].strip("\n"),
        block=thought[0],
        inline=True,
    )


def parse_messages(value: Any, column: str = "messages") -> list[Message]:
    """The messages in a column, which may also be a list as JSON text.

    Raises
    ------
    InputError
        If it is no conversation; the message names the message by its position.
    """
    value = from_json(value, column)
    if not isinstance(value, list) or not value or not all(_is_message(entry) for entry in value):
        raise InputError(
            f"`{column}` must be a non-empty list of objects with `role` and `content` (or `from` and `value`)"
        )
    messages = []
    for index, entry in enumerate(value):
        try:
            messages.append(_message({name: inner for name, inner in entry.items() if inner is not None}))
        except InputError as error:
            raise InputError(f"message {index} of `{column}`: {error}") from error
    return messages


def parse_tools(value: Any, column: str) -> list[dict[str, Any]]:
    """The functions in a column, each in OpenAI's form ``{"type": "function", "function": {...}}``.

    The column may be JSON text, and its functions may stand there without the outer object, or be JSON text themselves.
    """
    value = from_json(value, column)
    if value is None:
        return []
    tools: list[Any] = [from_json(tool, column) for tool in value] if isinstance(value, list) else [None]
    if not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"`{column}` must be a list of objects, or such a list as JSON text")
    return [{"type": "function", "function": tool} if _is_bare(tool) else tool for tool in tools]


def from_json(value: Any, what: str) -> Any:
    """`value`; if it is the text of a JSON list or object, what it says. Empty text is None."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    if value.lstrip()[0] not in "[{":
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InputError(f"`{what}` is text that is not valid JSON: {error}") from error


def _is_message(entry: Any) -> bool:
    return isinstance(entry, dict) and (isinstance(entry.get("role"), str) or isinstance(entry.get("from"), str))


def _is_bare(tool: dict[str, Any]) -> bool:
    return "function" not in tool and isinstance(tool.get("name"), str)


def _message(entry: dict[str, Any]) -> Message:
    role, content = entry.get("role"), entry.get("content", "")
    calls = from_json(entry.get("tool_calls", []), "tool_calls") or []
    if role is None:
        role, content = _SHAREGPT_ROLES.get(entry["from"]), entry.get("value", "")
        if role is None:
            raise InputError(f"`from` is {entry['from']!r}; known are {', '.join(_SHAREGPT_ROLES)}")
        if entry["from"] == "function_call":
            calls, content = from_json(content, "value"), ""
            calls = calls if isinstance(calls, list) else [calls]
    role = "tool" if role == "function" else role
    if "function_call" in entry:
        calls = [*calls, entry["function_call"]]
    if not isinstance(calls, list):
        raise InputError(f"`tool_calls` is a {type(calls).__name__}, not a list")
    text, thought = _content(content, role)
    thinking = next((entry[name] for name in THINKING_KEYS if entry.get(name)), "") or thought
    if not isinstance(thinking, str):
        raise InputError(f"its thinking is a {type(thinking).__name__}, not text")
    message = assistant(text) if role == "assistant" else Message(role=role, text=text)
    if thinking and message.thinking:
        raise InputError("the thinking stands in its text and in an entry of its own; give it once")
    if thinking:
        message = replace(message, thinking=thinking, block=f"<think>\n{thinking.strip()}\n</think>\n\n")
    others = {name: value for name, value in entry.items() if name not in _USED}
    for name in ("images", "image", "audio", "videos", "video"):
        if others.get(name):
            raise InputError(f"`{name}`: only text is trained here")
    return replace(message, calls=tuple(map(_call, calls)), weight=_weight(entry.get("weight", 1)), others=others)


def _content(content: Any, role: str) -> tuple[str, str]:
    """The text of a `content`, and the thinking that stands in parts of their own."""
    if isinstance(content, dict) and role == "tool":  # the result of a function
        return json.dumps(content, ensure_ascii=False), ""
    if not isinstance(content, list):
        if not isinstance(content, str):
            raise InputError(f"`content` is a {type(content).__name__}, not text")
        return content, ""
    text = thinking = ""
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        value = part.get("thinking" if kind == "thinking" else "text") if isinstance(part, dict) else part
        if kind not in ("text", "input_text", "output_text", "thinking") or not isinstance(value, str):
            raise InputError(f"a part of `content` is of type {kind!r}; only text is trained here")
        if kind == "thinking":
            thinking += value
        else:
            text += value
    return text, thinking


def _call(value: Any) -> Call:
    value = from_json(value, "tool_calls")
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError("a call must be an object with `name` and `arguments`, or with these in `function`")
    name, given = function["name"], function.get("arguments")
    arguments = {} if given is None or given == "" else given
    if isinstance(given, str) and given:
        try:
            arguments = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the arguments of the call of {name!r} are not valid JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise InputError(f"the arguments of the call of {name!r} are a {type(arguments).__name__}, not an object")
    text = given if isinstance(given, str) and given else json.dumps(arguments, ensure_ascii=False)
    identity = value.get("id")
    return Call(name=name, arguments=arguments, text=text, id=None if identity is None else str(identity))


def _weight(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise InputError(f"`weight` is {value!r}; it must be a number of 0 (not trained) or more, 1 by default")
    return float(value)
