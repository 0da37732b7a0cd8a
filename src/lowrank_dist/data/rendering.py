"""Records to segments of text, rendered from columns or by chat templates. Each segment is trained on or not.

Segments are tokenized one by one, so that a prompt has exactly the tokens that it has at generation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowrank_dist.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{query}\n\n### Response:"
)
"""Prompt of a `query`: the Alpaca prompt, as used by MetaMath and the authors of PiSSA. The space before the response
belongs to the response, because vocabularies include it in the token of the first word."""

COLUMNS = "`messages` (with or without `completion`), `prompt` and `completion`, or `query` and `response`"

Segments = list[tuple[str, bool]]
"""Consecutive pieces of a text, each with whether it is trained on."""


@dataclass(frozen=True)
class Example:
    """Text of one example."""

    segments: Segments
    """Pieces of the text, in order; the last one is trained on."""
    templated: bool
    """Whether a chat template rendered the text, with its special tokens."""


class Renderer:
    """Turns records into segments.

    Parameters
    ----------
    tokenizer
        Tokenizer whose chat template and special tokens are used.
    chat_template
        Jinja template that replaces the tokenizer's. None: the tokenizer's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
        self.tokenizer = tokenizer
        self.template = chat_template
        added = (token.content for token in tokenizer.added_tokens_decoder.values())
        self.markers = tuple(t for t in {*tokenizer.all_special_tokens, *added} if t and t == t.strip())

    def examples(self, record: dict[str, Any], where: str) -> list[Example]:
        """Return the examples a record holds: one, or one for each assistant turn (see `conversation`).

        Raises
        ------
        InputError
            If the record has no known columns, a column is not text, or the chat template cannot render the record.
        """
        columns = set(record)
        if "messages" in columns:
            tools = record.get("tools") or None
            messages = _messages(record["messages"], where)
            if "completion" not in columns:
                return [Example(segments, templated=True) for segments in self.conversation(messages, tools, where)]
            prompt, response = self.chat(messages, tools, where, prompt=True), _text(record, "completion", where)
        elif columns & {"prompt", "completion"}:
            prompt, response = _text(record, "prompt", where), _text(record, "completion", where)
        elif columns & {"query", "response"}:
            prompt = INSTRUCTION_PROMPT.format(query=_text(record, "query", where))
            response = " " + _text(record, "response", where)
        else:
            found = ", ".join(f"`{column}`" for column in sorted(columns)) or "none"
            raise InputError(f"{where}: columns found: {found}; valid choices: {COLUMNS}")
        return [Example([(prompt, False), (response, True)], templated="messages" in columns)]

    def conversation(self, messages: list[dict[str, Any]], tools: Any, where: str) -> list[Segments]:
        """Segments of a conversation in which every assistant turn is trained on.

        The text of a turn is what the template adds when the turn is appended to its prompt, up to and including the
        last special token. Text after that token, such as ChatML's newline, is never generated. Some templates rewrite
        earlier turns (Qwen3 removes their reasoning), so that no rendering contains every turn as it is generated. A
        conversation then becomes one example per assistant turn.
        """
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise InputError(
                f"{where}: `messages` has no assistant turn to train on; add one, or a column `completion`"
            )
        if turns[0] == 0:
            raise InputError(f"{where}: `messages` begins with an assistant turn; put a prompt before it")
        whole = self.chat(messages, tools, where)
        spans: list[tuple[str, str]] = []
        for turn in turns:
            prompt = self.chat(messages[:turn], tools, where, prompt=True)
            rendered = self.chat(messages[: turn + 1], tools, where)
            if not rendered.startswith(prompt):
                raise InputError(
                    f"{where}: the chat template renders message {turn} differently from the prompt before it (prompt "
                    f"ends in {prompt[-40:]!r}); give a `chat_template` whose generation prompt is the beginning of "
                    "the assistant turn, or use `messages` with a `completion`"
                )
            spans.append((prompt, self._until_last_marker(rendered, len(prompt))))
        if not all(whole.startswith(rendered) for _, rendered in spans):
            return [[(prompt, False), (rendered[len(prompt) :], True)] for prompt, rendered in spans]
        segments: Segments = []
        end = 0
        for prompt, rendered in spans:
            segments += [(whole[end : len(prompt)], False), (rendered[len(prompt) :], True)]
            end = len(rendered)
        return [segments]

    def chat(self, messages: list[dict[str, Any]], tools: Any, where: str, *, prompt: bool = False) -> str:
        """Render `messages` to text, followed by the generation prompt if `prompt`."""
        if self.template is None and self.tokenizer.chat_template is None:
            raise InputError(
                f"{where}: `messages` need a chat template and the tokenizer {self.tokenizer.name_or_path!r} has none; "
                "give `chat_template` (a .jinja file), or use the columns `prompt` and `completion`"
            )
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self.template, add_generation_prompt=prompt, tokenize=False
            )
        except Exception as error:  # whatever a template runs into
            raise InputError(f"{where}: the chat template cannot render `messages`: {error}") from error
        return text

    def _until_last_marker(self, text: str, start: int) -> str:
        body = text.rstrip()
        return body if len(body) > start and body.endswith(self.markers) else text


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) and "role" in m for m in value):
        raise InputError(f"{where}: `messages` must be a non-empty list of objects with `role` and `content`")
    return value


def _text(record: dict[str, Any], column: str, where: str) -> str:
    if not isinstance(value := record.get(column), str):
        found = ", ".join(f"`{name}`" for name in sorted(record))
        kind = f"a {type(value).__name__}, not text" if column in record else "missing"
        raise InputError(f"{where}: `{column}` is {kind} (columns found: {found}); valid choices: {COLUMNS}")
    return value
