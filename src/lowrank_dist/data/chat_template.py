"""Chat templates, and the turns of the assistant as a model generates them under each.

A template says how a conversation is written, not where a turn begins, and every family has its own form of calls and
of thinking. So turns are found by rendering: the prompt of a turn is the conversation before it with the generation
prompt, and the turn is what the template adds to that when the turn is appended.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_dist.data.found import find_text
from lowrank_dist.data.messages import THINKING_KEYS, Message
from lowrank_dist.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPENING = re.compile(r"<think>\s*\Z")


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How messages are handed to a template."""

    arguments_as_text: bool = False
    """Arguments of calls as JSON text, not as an object."""
    empty: str | None = None
    """The content of a turn that only calls."""
    thinking: str = "content"
    """The entry for thinking; "content": in the text, between tags; "": put into the turn after rendering."""
    short_ids: bool = False
    """Identifiers of calls as nine letters and digits, which Mistral's templates demand."""


@dataclass(frozen=True)
class Turn:
    """A turn of the assistant as it is generated."""

    prompt: str
    response: str
    closes_thinking: bool = False
    """Whether the prompt opens a thought that the turn lacks, so that the turn begins with the end of an empty one."""


class ChatTemplate:
    """The chat template of a tokenizer, or one in its place.

    Parameters
    ----------
    tokenizer
        Tokenizer whose template and special tokens are used.
    template
        Jinja template in place of the tokenizer's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = template
        own = template or tokenizer.chat_template or ""
        self.source = "\n".join(own.values()) if isinstance(own, dict) else str(own)
        self._as_parts: bool | None = None

    def dialects(self, messages: Sequence[Message]) -> list[Dialect]:
        """The ways to hand over these messages, most likely first."""
        calls = any(message.calls for message in messages)
        thoughts = [message for message in messages if message.thinking]
        native = [name for name in THINKING_KEYS if re.search(rf"\b{name}\b", self.source)]
        reads_tags = "</think>" in self.source or not native
        ways = ["content", *native] if reads_tags and thoughts and thoughts[0].inline else [*native, "content"]
        short = re.search(r"length\s*!=\s*9", self.source) is not None
        thinking = [*ways, ""] if thoughts else ["content"]
        empty = [None, ""] if calls else [None]
        as_text = [False, True] if calls else [False]
        return [
            Dialect(short_ids=short, thinking=way, empty=nothing, arguments_as_text=text)
            for way, nothing, text in product(thinking, empty, as_text)
        ]

    def render(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], dialect: Dialect, *, prompt: bool = False
    ) -> str:
        """Text of `messages`, followed by the generation prompt if `prompt`.

        Raises
        ------
        InputError
            If there is no template, or it cannot render them.
        """
        return self._apply([self._entry(message, dialect) for message in messages], tools, prompt=prompt)

    def turn(self, messages: Sequence[Message], index: int, tools: Sequence[dict[str, Any]], dialect: Dialect) -> Turn:
        """The turn at `index` of the conversation.

        Raises
        ------
        InputError
            If the template renders what comes before the turn in another way once the turn is there, so that the turn
            cannot be told apart; the message shows where.
        """
        before, message = messages[:index], messages[index]
        prompt = self.render(before, tools, dialect, prompt=True)
        by_hand = dialect.thinking == "" and bool(message.thinking)
        shown = message.without_thinking() if by_hand else message
        rendered = self.render([*before, shown], tools, dialect)
        added = self._added(prompt, rendered, before)
        if added is not None:
            return Turn(prompt, (message.block if by_hand else "") + added)
        if opening := _OPENING.search(prompt):
            bare = prompt[: opening.start()]
            if message.thinking and not by_hand:
                rendered = self.render([*before, message.without_thinking()], tools, dialect)
            added = self._added(bare, rendered, before)
            if added is not None and not added.lstrip().startswith("<think>"):
                thought = message.block.strip().removeprefix("<think>").removesuffix("</think>").strip("\n")
                closed = f"{thought}\n</think>\n\n{added.lstrip()}"
                return Turn(prompt, closed, closes_thinking=not message.thinking)
        at = next((i for i, (a, b) in enumerate(zip(prompt, rendered, strict=False)) if a != b), len(rendered))
        raise InputError(
            f"the chat template renders message {index} differently from the prompt before it: the prompt goes on "
            f"with {prompt[at : at + 40]!r} where the conversation has {rendered[at : at + 40]!r}; give a "
            "`chat_template` whose generation prompt is the beginning of the assistant turn, or, if the last turn is "
            "not affected, train on it alone (`train_on: last_assistant`)"
        )

    def _added(self, prompt: str, rendered: str, before: Sequence[Message]) -> str | None:
        """What `rendered` adds to `prompt`; None if it does not begin with it, up to what precedes the last message."""
        if rendered.startswith(prompt):
            return rendered[len(prompt) :]
        # Mistral puts the system prompt before the last message if that is the user's: only what follows is the same
        last = before[-1].text if before else ""
        at = max((prompt.rfind(form) for form in (last, last.strip()) if form), default=-1)
        if at < 0 or (place := find_text(prompt, last, at)) is None or not prompt[place[1] :].strip():
            return None
        tail = prompt[place[0] :]
        start = rendered.rfind(tail)
        return rendered[start + len(tail) :] if start >= 0 else None

    def _apply(self, entries: list[dict[str, Any]], tools: Sequence[dict[str, Any]], *, prompt: bool = False) -> str:
        if self.template is None and self.tokenizer.chat_template is None:
            raise InputError(
                f"`messages` need a chat template and the tokenizer {self.tokenizer.name_or_path!r} has none; "
                "give `chat_template` (a .jinja file), or use the columns `prompt` and `completion`"
            )
        if self._as_parts is None:
            self._as_parts = False
            self._as_parts = self._wants_parts()
        if self._as_parts:
            entries = [
                entry | {"content": [{"type": "text", "text": entry["content"]}]} if entry.get("content") else entry
                for entry in entries
            ]
        try:
            text: str = self.tokenizer.apply_chat_template(
                entries,
                tools=list(tools) or None,
                chat_template=self.template,
                add_generation_prompt=prompt,
                tokenize=False,
            )
        except Exception as error:  # whatever a template runs into
            raise InputError(f"the chat template cannot render `messages`: {error}") from error
        return text

    def _wants_parts(self) -> bool:
        """Whether the template renders lists of parts only, as those of models that see do."""
        word = "zebra"
        try:
            if word in self._apply([{"role": "user", "content": word}], []):
                return False
            return word in self._apply([{"role": "user", "content": [{"type": "text", "text": word}]}], [])
        except InputError:
            return False

    def _entry(self, message: Message, dialect: Dialect) -> dict[str, Any]:
        content: str | None = message.text
        entry: dict[str, Any] = {"role": message.role, "content": content, **message.others}
        if message.thinking and dialect.thinking == "content":
            content = message.block + message.text
        elif message.thinking and dialect.thinking:
            entry[dialect.thinking] = message.thinking
        if message.calls:
            entry["tool_calls"] = [
                {
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": call.text if dialect.arguments_as_text else call.arguments,
                    },
                }
                | ({} if call.id is None and not dialect.short_ids else {"id": _short(call.id, dialect, place)})
                for place, call in enumerate(message.calls)
            ]
            content = content or dialect.empty
        if "tool_call_id" in entry:
            entry["tool_call_id"] = _short(str(entry["tool_call_id"]), dialect, 0)
        return entry | {"content": content}


def _short(identity: str | None, dialect: Dialect, place: int) -> str | None:
    if not dialect.short_ids:
        return identity
    name = identity if identity is not None else f"call {place}"
    return name if re.fullmatch("[a-zA-Z0-9]{9}", name) else hashlib.sha256(name.encode()).hexdigest()[:9]


def read_template(given: str | None) -> str | None:
    """A chat template from the path of a file, or from its own text.

    Raises
    ------
    InputError
        If it is neither.
    """
    if given is None or "{{" in given or "{%" in given:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise InputError(
            f"chat_template={given!r} is not a file; give the path of a Jinja file, or the text of a template"
        )
    return path.read_text(encoding="utf-8")
