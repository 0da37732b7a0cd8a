"""Whether a text holds what a record gave: templates drop, without a word, what they do not know.

Short names and numbers occur in a text for other reasons, too. A call therefore counts as found only if its parts are
there more often than in what the messages say.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from lowrank_dist.data.messages import Call, Message
from lowrank_dist.errors import InputError

SYSTEM = ("system", "developer")
REMEDY = "give a `chat_template` that renders it, or leave it out"


class NotRendered(InputError):
    """A text lacks something that the record gave, or shows it wrongly."""


def find_text(text: str, given: str, start: int = 0) -> tuple[int, int] | None:
    """Where `given` first begins and ends in `text`, without its outer white space, as it is or escaped as in JSON."""
    body = given.strip()
    places = ((text.find(form, start), form) for form in _forms(body))
    found = min(((at, at + len(form)) for at, form in places if at >= 0), default=None)
    return found


def check_response(response: str, message: Message, *, name: str) -> None:
    """`NotRendered` if a turn as it is trained lacks text, thinking or calls of its message, or shows them wrongly."""
    for what, given, other in (("thinking", message.thinking, ""), ("text", message.text, message.thinking)):
        body = given.strip()
        if body and not any(response.count(form) > other.count(form) for form in _forms(body)):
            raise NotRendered(f"the chat template does not render the {what} of {name} ({_cut(given)}); {REMEDY}")
    for call in message.calls:
        _check_call(response, call, name, said=(message.thinking, message.text))
    allowed = sum(text.count("None") for call in message.calls for text in (call.text, call.name, message.thinking))
    if message.calls and not message.text and response.count("None") > allowed:
        raise NotRendered(f"the chat template writes 'None' for the text that {name} does not have; {REMEDY}")


def check_prompt(
    prompt: str, messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, thinking: bool = False
) -> None:
    """`NotRendered` if a prompt lacks a message before it, a call, a function, or, with `thinking`, a thought.

    Turns of the assistant lose their thinking when they are followed by others, in many templates and in use.
    """
    at = 0
    said: list[str] = []
    for index, message in enumerate(messages):
        name = f"message {index} ({message.role})"
        if thinking and message.thinking and (place := find_text(prompt, message.thinking, at)) is None:
            raise NotRendered(
                f"the chat template does not render the thinking of {name}: {_cut(message.thinking)}; {REMEDY} "
                "(`thinking: drop`)"
            )
        if message.text.strip():
            # a system prompt is put elsewhere by some templates; all else stands in order
            anywhere = message.role in SYSTEM
            place = find_text(prompt, message.text, 0 if anywhere else at)
            if place is None:
                raise NotRendered(
                    f"the chat template does not render the text of {name}: {_cut(message.text)}; {REMEDY}"
                )
            at = at if anywhere else place[1]
        said.append(message.text)
    functions = [function for tool in tools if isinstance(function := tool.get("function", tool), dict)]
    for function in functions:
        _check_function(prompt, function, said)
    called = Counter(str(function.get("name", "")) for function in functions)
    for index, message in enumerate(messages):
        for call in message.calls:
            called[call.name] += 1
            if prompt.count(call.name) < called[call.name] + _count(said, call.name):
                raise NotRendered(
                    f"the chat template does not render the call of {call.name!r} in message {index}; {REMEDY}"
                )
            _check_call(prompt, call, f"message {index}", said)


def _check_function(prompt: str, function: dict[str, Any], said: Sequence[str]) -> None:
    name = str(function.get("name", ""))
    if prompt.count(name) <= _count(said, name):
        raise NotRendered(f"the chat template does not render the function {name!r} of `tools`; {REMEDY}")
    schema = function.get("parameters")
    properties = schema.get("properties") if isinstance(schema, dict) else None
    for parameter in properties if isinstance(properties, dict) else ():
        if prompt.count(parameter) <= _count(said, parameter):
            raise NotRendered(
                f"the chat template does not render the parameter {parameter!r} of {name!r} in `tools`; {REMEDY}"
            )


def _check_call(text: str, call: Call, name: str, said: Sequence[str]) -> None:
    if text.count(call.name) <= _count(said, call.name):
        raise NotRendered(f"the chat template does not render the call of {call.name!r} in {name}; {REMEDY}")
    if not call.arguments:
        return
    if text.count(call.text) <= _count(said, call.text):
        for forms in _leaves(call.arguments):
            if not any(text.count(form) > _count(said, form) for form in forms):
                raise NotRendered(
                    f"the chat template does not render {_cut(forms[0])}, an argument of the call of {call.name!r} in "
                    f"{name}; {REMEDY}"
                )
    python = f"'name': {call.name!r}" if f"'name': {call.name!r}" in text else str(call.arguments)
    for form, what in ((python, "as Python"), (json.dumps(call.text)[1:-1], "as escaped text")):
        if form in text and form not in (call.text, json.dumps(call.arguments, ensure_ascii=False)):
            raise NotRendered(
                f"the chat template renders the arguments of the call of {call.name!r} in {name} {what}: "
                f"{_cut(form)}; {REMEDY}"
            )


def _leaves(value: Any) -> Iterator[tuple[str, ...]]:
    """Every name and value of nested arguments, in the forms that templates write."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield _forms(name)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        if value.strip():
            yield _forms(value.strip())
    else:
        yield json.dumps(value), str(value)


def _forms(text: str) -> tuple[str, ...]:
    """`text` as it is and escaped once or twice, as JSON in JSON is."""
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    return text, escaped, json.dumps(text)[1:-1], json.dumps(escaped, ensure_ascii=False)[1:-1]


def _count(texts: Sequence[str], part: str) -> int:
    return sum(text.count(part) for text in texts)


def _cut(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
