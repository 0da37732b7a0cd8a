"""Whether a text holds what a record gave: templates drop, without a word, what they do not know."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from lowrank_dist.data.messages import Call, Message
from lowrank_dist.errors import InputError

REMEDY = "give a `chat_template` that renders it, or leave it out"


class NotRendered(InputError):
    """A text lacks something that the record gave, or shows it wrongly."""


def find_text(text: str, given: str, start: int = 0) -> tuple[int, int] | None:
    """Where `given` begins and ends in `text`: as it is, without its outer white space, or escaped as in JSON."""
    for form in (given, given.strip(), *(json.dumps(given, ensure_ascii=ascii)[1:-1] for ascii in (False, True))):
        if (at := text.find(form, start)) >= 0:
            return at, at + len(form)
    return None


def check_response(response: str, message: Message, *, name: str) -> None:
    """`NotRendered` if a turn as it is trained lacks text, thinking or calls of its message, or shows them wrongly."""
    rest = response
    for what, given in (("its thinking", message.thinking.strip()), ("its text", message.text.strip())):
        if given:
            if (place := find_text(rest, given)) is None:
                raise NotRendered(f"the chat template does not render {what} of {name} ({_cut(given)}); {REMEDY}")
            rest = rest[: place[0]] + rest[place[1] :]
    for call in message.calls:
        _check_call(rest, call, name)
    allowed = sum(call.text.count("None") + call.name.count("None") for call in message.calls)
    if message.calls and not message.text and rest.count("None") > allowed:
        raise NotRendered(f"the chat template writes 'None' for the text that {name} does not have; {REMEDY}")


def check_prompt(
    prompt: str, messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, thinking: bool = False
) -> None:
    """`NotRendered` if a prompt lacks a message before it, a call, a function, or, with `thinking`, a thought.

    Turns of the assistant lose their thinking when they are followed by others, in many templates and in use.
    """
    rest, at = prompt, 0
    for index, message in enumerate(messages):
        name = f"message {index} ({message.role})"
        for what, given in (("thinking", message.thinking if thinking else ""), ("text", message.text)):
            if not given.strip():
                continue
            # a system prompt is put elsewhere by some templates; all else stands in order
            anywhere = message.role in ("system", "developer")
            place = find_text(rest, given, 0 if anywhere else at)
            if place is None:
                raise NotRendered(f"the chat template does not render the {what} of {name}: {_cut(given)}; {REMEDY}")
            rest = rest[: place[0]] + rest[place[1] :]
            if not anywhere:
                at = place[0]
            elif place[0] < at:
                at -= place[1] - place[0]
    functions = [tool.get("function", tool) for tool in tools]
    wanted = Counter(str(function.get("name", "")) for function in functions if isinstance(function, dict))
    for function_name in wanted:
        if function_name not in rest:
            raise NotRendered(f"the chat template does not render the function {function_name!r} of `tools`; {REMEDY}")
    for function in functions:
        for parameter in _parameters(function):
            if parameter not in rest:
                raise NotRendered(
                    f"the chat template does not render the parameter {parameter!r} of {function['name']!r} in "
                    f"`tools`; {REMEDY}"
                )
    for index, message in enumerate(messages):
        for call in message.calls:
            wanted[call.name] += 1
            if rest.count(call.name) < wanted[call.name]:
                raise NotRendered(
                    f"the chat template does not render the call of {call.name!r} in message {index}; {REMEDY}"
                )
            _check_call(rest, call, f"message {index}")


def _check_call(text: str, call: Call, name: str) -> None:
    if call.name not in text:
        raise NotRendered(f"the chat template does not render the call of {call.name!r} in {name}; {REMEDY}")
    for value in _leaves(call.arguments):
        if not any(form in text for form in value):
            raise NotRendered(
                f"the chat template does not render {_cut(value[0])}, an argument of the call of {call.name!r} in "
                f"{name}; {REMEDY}"
            )
    if call.arguments:
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
            yield _forms(value)
    else:
        yield json.dumps(value), str(value)


def _forms(text: str) -> tuple[str, ...]:
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    return text.strip(), text, escaped, json.dumps(text)[1:-1], json.dumps(escaped, ensure_ascii=False)[1:-1]


def _parameters(function: Any) -> list[str]:
    schema = function.get("parameters") if isinstance(function, dict) else None
    properties = schema.get("properties") if isinstance(schema, dict) else None
    return [name for name in properties if isinstance(name, str)] if isinstance(properties, dict) else []


def _cut(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
