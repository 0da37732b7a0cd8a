"""Records by their columns: a conversation, a prompt with its response, or plain text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_dist.data.messages import Message, assistant, parse_messages, parse_tools
from lowrank_dist.data.prompt_template import PromptTemplate
from lowrank_dist.errors import InputError

INSTRUCTION_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{query}\n\n### Response:"
)
"""Prompt of a `query`: the Alpaca prompt, as used by MetaMath and the authors of PiSSA. The space before the response
belongs to the response, because vocabularies include it in the token of the first word."""

INPUT_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{query}\n\n### Input:\n{input}\n\n### Response:"
)
"""Prompt of an `instruction` with an `input`: the other Alpaca prompt."""

#: Columns that make a record, the first that are all there; and those that may stand beside them.
SHAPES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("messages",): ("completion", "tools", "functions", "system"),
    ("conversations",): ("tools", "functions", "system"),
    ("prompt", "completion"): ("tools", "functions", "system"),
    ("instruction", "output"): ("input",),
    ("query", "response"): (),
    ("question", "answer"): (),
    ("text",): (),
}
NAMES = tuple(dict.fromkeys(name for needed, beside in SHAPES.items() for name in (*needed, *beside)))
COLUMNS = ", ".join(" and ".join(f"`{name}`" for name in needed) for needed in SHAPES)


@dataclass(frozen=True)
class Conversation:
    """Messages, for the chat template."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    start: int = 0
    """The first message that may be trained on; those before it were given as the prompt."""


@dataclass(frozen=True)
class Pair:
    """A prompt and its response, used as they are."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Passage:
    """Text that is trained as a whole."""

    text: str


def read_columns(
    record: Mapping[str, Any],
    columns: Mapping[str, str] | None = None,
    *,
    as_chat: bool = False,
    template: PromptTemplate | None = None,
) -> Conversation | Pair | Passage:
    """What a record holds.

    Parameters
    ----------
    record
        Values by column.
    columns
        Names of its columns by the names used here, where they differ.
    as_chat
        Take a prompt and its response for a conversation of two messages.
    template
        Prompt of a question, in place of the instruction prompt; of a `prompt`, in place of the bare text.

    Raises
    ------
    InputError
        If the columns are not understood or hold something else.
    """
    record = renamed(record, columns)
    shape = _shape(record, columns or ())
    if template is not None and len(shape) != 2:
        raise InputError(f"prompt_template is for a prompt and a response, and this record is `{shape[0]}`")
    if shape[0] in ("messages", "conversations"):
        messages = parse_messages(record[shape[0]], shape[0])
        if shape[0] == "messages" and record.get("completion") is not None:
            return conversation(messages, [assistant(text_of(record, "completion"))], record)
        return conversation([], messages, record)
    if shape == ("text",):
        return Passage(text_of(record, "text"))
    if shape == ("prompt", "completion"):
        prompt, completion = (_chat(record.get(name), name) for name in shape)
        if prompt is not None or completion is not None:
            if template is not None:
                raise InputError("prompt_template is for text, and `prompt` or `completion` holds messages")
            prompt = prompt or [Message(role="user", text=text_of(record, "prompt"))]
            completion = completion or [assistant(text_of(record, "completion"))]
            return conversation(prompt, completion, record)
    answer = text_of(record, shape[1])
    if as_chat:
        message = Message(role="user", text=asked_in_chat(record, shape[0], template))
        return conversation([message], [assistant(answer)], record)
    check_text(record, template)
    text, gap = asked(record, shape[0], template)
    return Pair(text, gap + answer)


def check_text(record: Mapping[str, Any], template: PromptTemplate | None) -> None:
    """InputError if a record that is trained as text has what only a conversation has a place for."""
    for name in ("system", "tools", "functions"):
        if record.get(name) and name not in (template.names if template is not None else ()):
            raise InputError(
                f"`{name}` belongs to a conversation, and this record is text; set `as_chat`, name it in "
                "`prompt_template`, or leave it out with `transform`"
            )


def asked(record: Mapping[str, Any], column: str, template: PromptTemplate | None = None) -> tuple[str, str]:
    """The prompt in a column as training on text has it, and what lies between it and the response.

    Raises
    ------
    InputError
        If it is missing or no text, or the template does not fit the record.
    """
    text = text_of(record, column)
    if template is not None:
        return template.filled(record, column), template.gap
    if column == "prompt":
        return text, ""
    given = _input(record, column)
    return INPUT_PROMPT.format(query=text, input=given) if given else INSTRUCTION_PROMPT.format(query=text), " "


def asked_in_chat(record: Mapping[str, Any], column: str, template: PromptTemplate | None = None) -> str:
    """The message of a user that a prompt in a column is, with its input if there is one."""
    text, given = text_of(record, column), _input(record, column)
    if template is not None:
        return template.filled(record, column)
    return f"{text}\n\n{given}" if given else text


def _input(record: Mapping[str, Any], column: str) -> str:
    return text_of(record, "input") if column == "instruction" and record.get("input") else ""


def renamed(record: Mapping[str, Any], columns: Mapping[str, str] | None) -> Mapping[str, Any]:
    """The record by the names used here: the columns of `columns` under these, and all others as they are.

    A column whose name another one is given is left out.

    Raises
    ------
    InputError
        If a column of `columns` is missing.
    """
    if columns is None:
        return record
    for name in columns.values():
        if name not in record:
            raise InputError(f"the column {name!r} of `columns` is missing (columns found: {listed(record)})")
    others = {name: value for name, value in record.items() if name not in columns and name not in columns.values()}
    return others | {name: record[column] for name, column in columns.items()}


def check_columns(columns: Mapping[str, str] | None, names: Sequence[str] = NAMES) -> None:
    """InputError if `columns` has a name that is not among `names`, by default those that are known here."""
    for name in columns or ():
        if name not in names:
            raise InputError(f"columns: {name!r} is not known; valid choices: {', '.join(names)}")


def shapes_by(named: Iterable[str]) -> list[tuple[str, ...]]:
    """The shapes in the order in which they are looked for: those with most of the columns that a user named first."""
    names = set(named)
    return sorted(SHAPES, key=lambda needed: -len(names & {*needed, *SHAPES[needed]}))


def _shape(record: Mapping[str, Any], named: Collection[str]) -> tuple[str, ...]:
    record = {name: value for name, value in record.items() if value is not None}  # Arrow has all columns in all rows
    whole = next((needed for needed in shapes_by(named) if all(name in record for name in needed)), None)
    if whole is not None and (whole != ("text",) or "text" in named):
        return whole
    if "chosen" in record and "rejected" in record:
        raise InputError(
            "`chosen` and `rejected` are a preference pair; train on it with PreferenceModule (`task: preference`)"
        )
    for part in (("prompt", "completion"), ("query", "response")):  # names that mean nothing else: the other is missing
        if any(name in record for name in part):
            return part
    if whole is None:
        raise InputError(f"columns found: {listed(record)}; valid choices: {COLUMNS}")
    return whole


def conversation(prompt: list[Message], trained: list[Message], record: Mapping[str, Any]) -> Conversation:
    """Messages of a prompt and those that may be trained on, with the record's functions and system prompt."""
    tools = [tool for column in ("tools", "functions") for tool in parse_tools(record.get(column), column)]
    messages = [*prompt, *trained]
    if record.get("system"):
        system = Message(role="system", text=text_of(record, "system"))
        if messages[0].role != "system":
            messages = [system, *messages]
        elif messages[0].text.strip() != system.text.strip():
            raise InputError("the column `system` differs from the first message, which is a system message too")
    return Conversation(messages, tools, len(messages) - len(trained))


def _chat(value: Any, column: str) -> list[Message] | None:
    """The messages in a column, if it holds a list."""
    return parse_messages(value, column) if isinstance(value, list) and value and isinstance(value[0], dict) else None


def text_of(record: Mapping[str, Any], column: str) -> str:
    """The text in a column; InputError if there is none."""
    if not isinstance(value := record.get(column), str):
        kind = f"a {type(value).__name__}, not text" if column in record else "missing"
        raise InputError(f"`{column}` is {kind} (columns found: {listed(record)}); valid choices: {COLUMNS}")
    return value


def listed(record: Mapping[str, Any]) -> str:
    """The names of the columns, for a message."""
    return ", ".join(f"`{name}`" for name in sorted(record)) or "none"
