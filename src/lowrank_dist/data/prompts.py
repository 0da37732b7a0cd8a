"""Prompts for generation, with the tokens that they have in training; and the tokens at which a model learned to stop.

A record of training data is a prompt as well: its last response is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_dist.data.found import check_prompt
from lowrank_dist.data.messages import Message
from lowrank_dist.data.prompt_template import PromptTemplate
from lowrank_dist.data.records import kind_of, read_file
from lowrank_dist.data.rendering import Example, Renderer
from lowrank_dist.data.shapes import Conversation, Pair, Passage, shapes_by
from lowrank_dist.data.tokenizing import IGNORE_INDEX, Encoder
from lowrank_dist.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A prompt, ready for a model.

    Attributes
    ----------
    where
        Where it was read.
    text
        Its text, special tokens of the chat template among it.
    tokens
        Its tokens.
    """

    where: str
    text: str
    tokens: list[int]


class Prompter:
    """Makes prompts as `lowrank_dist.SFTDataModule` renders what comes before a response.

    Parameters
    ----------
    tokenizer
        The tokenizer.
    chat_template
        Jinja template that replaces the tokenizer's. None: the tokenizer's own.
    system
        Text of a system message that is put before conversations that have none.
    columns, as_chat, prompt_template
        As in `lowrank_dist.SFTDataModule`.

    Raises
    ------
    InputError
        If the tokenizer has no end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        *,
        system: str | None = None,
        columns: Mapping[str, str] | None = None,
        as_chat: bool = False,
        prompt_template: PromptTemplate | None = None,
    ) -> None:
        self.tokenizer, self.system = tokenizer, system
        self._renderer = Renderer(
            tokenizer, chat_template, columns=columns, as_chat=as_chat, prompt_template=prompt_template
        )
        self._encoder = Encoder(tokenizer)

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return bool(self._renderer.template.source)

    def text(self, text: str, where: str) -> Prompt:
        """A prompt that is `text` itself."""
        return self._prompt(text, where, templated=False)

    def conversation(self, messages: Sequence[Message], where: str, tools: Sequence[dict[str, Any]] = ()) -> Prompt:
        """A conversation, followed by the template's generation prompt.

        Raises
        ------
        InputError
            If the chat template cannot render it, or drops something.
        """
        if self.system is not None and messages[0].role != "system":
            messages = [Message(role="system", text=self.system), *messages]
        errors: list[InputError] = []
        for dialect in self._renderer.template.dialects(messages):
            try:
                text = self._renderer.template.render(messages, tools, dialect, prompt=True)
                check_prompt(text, messages, tools)
            except InputError as error:
                errors.append(error)
                continue
            return self._prompt(text, where, templated=True)
        raise InputError(f"{where}: {errors[0]}") from errors[0]

    def record(self, record: Mapping[str, Any], where: str) -> Prompt:
        """A record of training data, whose last response is left out or missing.

        Raises
        ------
        InputError
            If its columns are not understood, or it has no prompt.
        """
        try:
            read = self._renderer.read(self._completed(record))
            if isinstance(read, Conversation):
                messages = read.messages[:-1] if read.messages[-1].role == "assistant" else read.messages
                if not messages:
                    raise InputError("there is no message before the response")
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if isinstance(read, Conversation):
            return self.conversation(messages, where, read.tools)
        if isinstance(read, Passage):
            return self.text(read.text, where)
        assert isinstance(read, Pair)
        return self.text(read.prompt, where)

    def response(self, record: Mapping[str, Any], where: str) -> str:
        """The text of the last response of a record.

        Raises
        ------
        InputError
            If it has none, or one with calls, whose text a template makes.
        """
        try:
            read = self._renderer.read(record)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if isinstance(read, Pair):
            return read.response
        last = read.messages[-1] if isinstance(read, Conversation) else None
        if last is None or last.role != "assistant" or last.calls or not last.text.strip():
            raise InputError(f"{where}: has no response of text at its end")
        return last.text

    def _completed(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """`record` with an empty response, if it has a prompt alone."""
        columns = self._renderer.columns or {}
        for shape in shapes_by(columns):
            names = [columns.get(name, name) for name in shape]
            lacking = [name for name in names if record.get(name) is None]
            if not lacking:
                return record
            if lacking == names[1:]:
                return {**record, names[1]: ""}
        return record

    def file(self, path: Path) -> Iterator[Prompt]:
        """The prompts in a file: the records of any kind of data file, or the lines of a ``.txt`` file.

        Lines are messages of a user where there is a chat template, and text otherwise.

        Raises
        ------
        InputError
            If the file cannot be read, or holds none.
        """
        found = False
        for where, record in self._lines(path) if path.suffix == ".txt" else read_file(path):
            found = True
            yield self.line(record["text"], where) if path.suffix == ".txt" else self.record(record, where)
        if not found:
            raise InputError(f"{path}: holds no prompts" + ("" if kind_of(path.name) else " (JSON lines, or .txt)"))

    def line(self, text: str, where: str) -> Prompt:
        """What a user writes: a message where there is a chat template, and text otherwise."""
        if self.has_template:
            return self.conversation([Message(role="user", text=text)], where)
        return self.text(text if self.system is None else f"{self.system}\n\n{text}", where)

    @staticmethod
    def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from error
        yield from ((f"{path}:{number}", {"text": line}) for number, line in enumerate(lines, start=1) if line.strip())

    def _prompt(self, text: str, where: str, *, templated: bool) -> Prompt:
        if not text:
            raise InputError(f"{where}: the prompt is empty")
        # as in training: a prompt is tokenized as the first part of an example
        (encoded,) = self._encoder([Example([(text, False), ("x", True)], templated=templated)])
        length = next(i for i, label in enumerate([*encoded.labels, 0]) if label != IGNORE_INDEX)
        return Prompt(where, text, encoded.tokens[:length])

    def stops(self) -> dict[int, str]:
        """The tokens that end a response in training, by what they are: of the tokenizer, and of the chat template."""
        found = {self.tokenizer.eos_token_id: "eos"}
        if not self.has_template:
            return found
        said = "zebra"
        messages = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
        try:
            (example,) = self._renderer.examples({"messages": messages}, "the end of a turn")
        except InputError:  # it then cannot train on it either
            return found
        end = example.segments[-1][0].rpartition(said)[2]
        (encoded,) = self._encoder([example])
        last = next((token for token in reversed(encoded.tokens) if end.strip() and self._text_of(token) in end), None)
        if last is not None and last in self.tokenizer.added_tokens_decoder:
            found.setdefault(last, "end of turn")
        return found

    def _text_of(self, token: int) -> str:
        return str(self.tokenizer.decode([token], skip_special_tokens=False)).strip() or "\0"
