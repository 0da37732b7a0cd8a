"""Preference pairs by their columns: a prompt, the response that was chosen, and the one that was rejected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowrank_dist.data.messages import Message, assistant, parse_messages
from lowrank_dist.data.prompt_template import PromptTemplate
from lowrank_dist.data.shapes import (
    Conversation,
    Pair,
    asked,
    asked_in_chat,
    check_text,
    conversation,
    listed,
    renamed,
    text_of,
)
from lowrank_dist.errors import InputError

PROMPTS = ("prompt", "question", "query", "instruction")
SIDES = ("chosen", "rejected")
_OPENAI = ("input", "preferred_output", "non_preferred_output")
PREFERENCE_NAMES = (*PROMPTS, *SIDES, "system", "tools", "functions", *_OPENAI)


@dataclass(frozen=True)
class Preference:
    """Two continuations of one prompt."""

    chosen: Conversation | Pair
    rejected: Conversation | Pair


def read_preference(
    record: Mapping[str, Any],
    columns: Mapping[str, str] | None = None,
    *,
    as_chat: bool = False,
    template: PromptTemplate | None = None,
) -> Preference:
    """The pair of a record.

    `chosen` and `rejected` are text, a message or lists of messages. The prompt is in a column of its own (`prompt`,
    `question`, `query` or `instruction`, text or messages), or it is what both lists of messages begin with. OpenAI's
    form (`input`, `preferred_output`, `non_preferred_output`) is known, too.

    Parameters
    ----------
    record, columns, as_chat, template
        As of `lowrank_dist.data.shapes.read_columns`.

    Raises
    ------
    InputError
        If it is no pair, if both responses are the same, or if they do not answer the same prompt.
    """
    record = renamed(record, columns)
    if "preferred_output" in record:
        record = _from_openai(record)
    for side in SIDES:
        if record.get(side) is None:
            raise InputError(f"a preference pair needs `chosen` and `rejected` (columns found: {listed(record)})")
    if record["chosen"] == record["rejected"]:
        raise InputError("`chosen` and `rejected` are the same: nothing is preferred")
    column = next((name for name in PROMPTS if record.get(name) is not None), None)
    given = [_messages(record[side], side) for side in SIDES]
    prompt = None if column is None else _messages(record[column], column)
    if given[0] is None and given[1] is None and prompt is None:
        return _of_texts(record, column, as_chat=as_chat, template=template)
    if template is not None:
        raise InputError("prompt_template is for text, and this pair holds messages")
    chosen, rejected = (
        [assistant(text_of(record, side))] if messages is None else messages
        for side, messages in zip(SIDES, given, strict=True)
    )
    if column is not None:
        prompt = prompt or [Message(role="user", text=asked_in_chat(record, column))]
        chosen, rejected = (_after(prompt, side) for side in (chosen, rejected))
    return _of_messages(chosen, rejected, record)


def _of_texts(
    record: Mapping[str, Any], column: str | None, *, as_chat: bool, template: PromptTemplate | None
) -> Preference:
    if column is None:
        raise InputError(
            "`chosen` and `rejected` are text without a `prompt`, so that nothing tells where the responses begin; "
            "give the prompt in a column of its own, or divide the texts with `transform`"
        )
    sides = [text_of(record, side) for side in SIDES]
    if as_chat:
        prompt = [Message(role="user", text=asked_in_chat(record, column, template))]
        return Preference(*(conversation(prompt, [assistant(side)], record) for side in sides))
    check_text(record, template)
    text, gap = asked(record, column, template)
    return Preference(*(Pair(text, gap + side) for side in sides))


def _of_messages(chosen: list[Message], rejected: list[Message], record: Mapping[str, Any]) -> Preference:
    shared = next(
        (place for place, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    rests = chosen[shared:], rejected[shared:]
    for side, rest in zip(SIDES, rests, strict=True):
        if not rest:
            raise InputError(f"`{side}` is only the beginning of the other one: it has no response of its own")
        if rest[0].role != "assistant":
            raise InputError(
                f"`chosen` and `rejected` differ before a response: message {shared} of `{side}` is of the role "
                f"{rest[0].role!r}; both must answer the same prompt"
            )
    if not any(message.role == "user" for message in chosen[:shared]):
        raise InputError("`chosen` and `rejected` share no prompt; give it in a column `prompt`")
    return Preference(*(conversation(chosen[:shared], rest, record) for rest in rests))


def _after(prompt: list[Message], side: list[Message]) -> list[Message]:
    """The conversation of `prompt` and a side, which may begin with it."""
    if side[: len(prompt)] == prompt:
        return side
    if side[0].role == "assistant":
        return [*prompt, *side]
    # beside whole conversations some sets have the question, or the last of several, as text
    if len(prompt) == 1 and any(m.role == "user" and m.text.strip() == prompt[0].text.strip() for m in side):
        return side
    raise InputError(
        f"the prompt and the conversation beside it differ: {prompt[0].text[:40]!r} is not what it begins with "
        f"({side[0].role}: {side[0].text[:40]!r})"
    )


def _messages(value: Any, column: str) -> list[Message] | None:
    """The messages in a column; None if it is text."""
    if isinstance(value, dict):
        value = [value]
    return parse_messages(value, column) if isinstance(value, list) and value else None


def _from_openai(record: Mapping[str, Any]) -> dict[str, Any]:
    given = record.get("input")
    if not isinstance(given, dict):
        raise InputError("`input` must be an object with `messages`, beside `preferred_output`")
    return {
        "prompt": given.get("messages"),
        "tools": given.get("tools"),
        "chosen": record["preferred_output"],
        "rejected": record.get("non_preferred_output"),
    }
