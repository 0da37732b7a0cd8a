"""Records to segments of text, rendered from columns or by chat templates. Each segment is trained on or not.

Segments are tokenized one by one, so that a prompt has exactly the tokens that it has at generation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lowrank_dist.data.chat_template import ChatTemplate, Dialect, Turn
from lowrank_dist.data.found import SYSTEM, NotRendered, check_prompt, check_response
from lowrank_dist.data.messages import Message
from lowrank_dist.data.preference import SIDES, read_preference
from lowrank_dist.data.prompt_template import PromptTemplate
from lowrank_dist.data.shapes import Conversation, Pair, Passage, read_columns
from lowrank_dist.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["all_assistant", "last_assistant", "everything"]
"""Which turns of a conversation are trained on."""

Thinking = Literal["keep", "drop"]
"""What becomes of the thinking in turns of the assistant."""

Segments = list[tuple[str, float]]
"""Consecutive pieces of a text, each with the weight of its tokens in the loss; 0: it is not trained on."""


@dataclass(frozen=True)
class Example:
    """Text of one example."""

    segments: Segments
    """Pieces of the text, in order; the last one is trained on."""
    templated: bool
    """Whether a chat template rendered the text, with its special tokens."""
    splittable: bool = False
    """Whether it is plain text, of which every part is an example too."""


class Renderer:
    """Turns records into segments.

    Parameters
    ----------
    tokenizer
        Tokenizer whose chat template and special tokens are used.
    chat_template
        Jinja template that replaces the tokenizer's. None: the tokenizer's own.
    train_on
        Turns of a conversation to train on; with ``"everything"`` prompts are trained on, too.
    thinking
        Whether the thinking in turns of the assistant is kept.
    columns
        Names of the records' columns, by the names used here.
    as_chat
        Render a prompt and its response as a conversation.
    prompt_template
        What is put around the prompt of a prompt and its response.

    Attributes
    ----------
    notes : Counter of str
        What was done to examples without being asked, and to how many.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None,
        *,
        train_on: TrainOn = "all_assistant",
        thinking: Thinking = "keep",
        columns: Mapping[str, str] | None = None,
        as_chat: bool = False,
        prompt_template: PromptTemplate | None = None,
    ) -> None:
        self.template = ChatTemplate(tokenizer, chat_template)
        self.train_on = train_on
        self.thinking = thinking
        self.columns = columns
        self.as_chat = as_chat
        self.prompt_template = prompt_template
        self.notes: Counter[str] = Counter()
        self.eos = tokenizer.eos_token
        added = (token.content for token in tokenizer.added_tokens_decoder.values())
        self.markers = tuple(t for t in {*tokenizer.all_special_tokens, *added} if t and t == t.strip())

    def examples(self, record: Mapping[str, Any], where: str) -> list[Example]:
        """Return the examples a record holds: one, or one for each assistant turn (see `conversation`).

        Raises
        ------
        InputError
            If the record has no known columns, a column holds something else, the chat template cannot render the
            record, or something that the record gives is not in the text. The message begins with `where`.
        """
        try:
            return self._examples(self.read(record))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error

    def read(self, record: Mapping[str, Any]) -> Conversation | Pair | Passage:
        """What a record holds, with the prompts of these settings.

        Raises
        ------
        InputError
            As `lowrank_dist.data.shapes.read_columns`.
        """
        return read_columns(record, self.columns, as_chat=self.as_chat, template=self.prompt_template)

    def items(self, record: Mapping[str, Any], where: str) -> list[tuple[Example, ...]]:
        """Return the examples of every item that a record holds; those of `examples`, each for itself.

        Raises
        ------
        InputError
            As `examples`.
        """
        return [(example,) for example in self.examples(record, where)]

    def _examples(self, read: Conversation | Pair | Passage) -> list[Example]:
        if isinstance(read, Conversation):
            return [Example(segments, templated=True) for segments in self.conversation(read)]
        if isinstance(read, Passage):
            return [Example([(read.text, 1.0)], templated=False, splittable=True)]
        asked = 1.0 if self.train_on == "everything" else 0.0
        return [Example([(read.prompt, asked), (read.response, 1.0)], templated=False)]

    def conversation(self, read: Conversation) -> list[Segments]:
        """Segments of a conversation, with the turns of the assistant that are to be trained on.

        The text of a turn is what the template adds when the turn is appended to its prompt, up to and including the
        last special token. Text after that token, such as ChatML's newline, is never generated. Some templates rewrite
        earlier turns (Qwen3 removes their reasoning), so that no rendering contains every turn as it is generated. A
        conversation then becomes one example per trained turn.

        Messages are handed to the template in each of its possible `Dialect`, until everything they give is found
        in the text.
        """
        messages = [m.without_thinking() if self.thinking == "drop" else m for m in read.messages]
        turns = self._trained(messages, read.start)
        errors: list[InputError] = []
        for dialect in self.template.dialects(messages):
            try:
                if self.train_on == "everything":
                    segments = [self._everything(messages, read.tools, dialect)]
                else:
                    segments = self._turns(messages, turns, read.tools, dialect)
            except InputError as error:
                errors.append(error)
                continue
            return segments
        raise next((error for error in errors if isinstance(error, NotRendered)), errors[0])

    def _trained(self, messages: Sequence[Message], start: int) -> list[int]:
        """Positions of the turns to train on."""
        if self.train_on == "everything":
            return []
        spoken = [index for index, message in enumerate(messages) if index >= start and message.role == "assistant"]
        if not spoken:
            raise InputError("`messages` has no assistant turn to train on; add one, or a column `completion`")
        last = self.train_on == "last_assistant"
        turns = [index for index in spoken[-1 if last else 0 :] if messages[index].weight]
        if not turns:
            which = "the last" if last else "every"
            raise InputError(f"{which} assistant turn of `messages` has the weight 0: there is nothing to train on")
        if turns[0] == 0:
            raise InputError(
                "`messages` begins with an assistant turn; put a prompt before it, or give the turn `weight: 0`"
            )
        for turn in turns:
            if messages[turn].is_empty:
                raise InputError(
                    f"message {turn} is an assistant turn without text or call: a model would learn silence"
                )
        return turns

    def _turns(
        self, messages: list[Message], turns: Sequence[int], tools: list[dict[str, Any]], dialect: Dialect
    ) -> list[Segments]:
        spans: list[tuple[str, str]] = []
        closed = 0
        for index in turns:
            turn = self._turn(messages, index, tools, dialect)
            closed += turn.closes_thinking
            spans.append((turn.prompt, turn.response))
        prompt, response = spans[-1]
        whole = prompt + response
        apart = not all(whole.startswith(before + spoken) for before, spoken in spans)
        lacking = 0
        for index, (before, _) in zip(turns, spans, strict=True):
            if not (apart or index == turns[-1]):
                continue
            try:
                check_prompt(before, messages[:index], tools)
            except NotRendered:
                # Mistral's system prompt stands before the last message if that is the user's, in use as well
                shown = [self._shows_system(messages[:turn], tools, dialect) for turn in turns]
                if shown[turns.index(index)] or not any(shown):
                    raise
                rest = [replace(m, text="") if m.role in SYSTEM else m for m in messages[:index]]
                check_prompt(before, rest, tools)
                lacking += 1
        if lacking:
            self.notes["the template's prompt leaves out the system prompt, which other turns have"] += lacking
        if closed:
            self.notes["the template's prompt opens a thought that the turn lacks, which is closed at once"] += closed
        weights = [messages[index].weight for index in turns]
        if apart:
            return [[(before, 0.0), (spoken, weight)] for (before, spoken), weight in zip(spans, weights, strict=True)]
        segments: Segments = []
        end = 0
        for (before, spoken), weight in zip(spans, weights, strict=True):
            segments += [(whole[end : len(before)], 0.0), (spoken, weight)]
            end = len(before) + len(spoken)
        return [segments]

    def _shows_system(self, messages: Sequence[Message], tools: list[dict[str, Any]], dialect: Dialect) -> bool:
        """Whether the system prompt is in the prompt that follows `messages`."""
        word = "zebra6172"
        marked = [replace(m, text=word) if m.role in SYSTEM else m for m in messages]
        return word in self.template.render(marked, tools, dialect, prompt=True)

    def _turn(self, messages: list[Message], index: int, tools: list[dict[str, Any]], dialect: Dialect) -> Turn:
        """A turn up to its last special token, with all that its message gives."""
        message = messages[index]
        if self.eos and message.text.endswith(self.eos):  # the template writes the end
            message = replace(message, text=message.text.removesuffix(self.eos))
            messages = [*messages[:index], message, *messages[index + 1 :]]
        turn = self.template.turn(messages, index, tools, dialect)
        check_response(turn.response, message, name=f"message {index}")
        response = self._until_last_marker(turn.response)
        if self.eos and response.removesuffix(self.eos).count(self.eos) > message.text.count(self.eos):
            raise NotRendered(f"the chat template ends message {index} in its middle: {response[-80:]!r}")
        return replace(turn, response=response)

    def _everything(self, messages: list[Message], tools: list[dict[str, Any]], dialect: Dialect) -> Segments:
        """The whole conversation, trained but for the turns that have a weight of their own."""
        whole = self._until_last_marker(self.template.render(messages, tools, dialect))
        check_prompt(whole, messages, tools, thinking=True)
        segments: Segments = []
        end = 0
        for index, message in enumerate(messages):
            if message.weight == 1:
                continue
            if message.role != "assistant":
                raise InputError(
                    f"message {index} ({message.role}) has the weight {message.weight:g}; only turns of the assistant "
                    "may have one"
                )
            turn = self._turn(messages, index, tools, dialect)
            if not whole.startswith(turn.prompt + turn.response):
                raise InputError(
                    f"message {index} has the weight {message.weight:g}, and the chat template rewrites it once other "
                    "messages follow; use `train_on: all_assistant`"
                )
            segments += [(whole[end : len(turn.prompt)], 1.0), (turn.response, message.weight)]
            end = len(turn.prompt) + len(turn.response)
        if whole[end:]:
            return [*segments, (whole[end:], 1.0)]
        return segments if segments[-1][1] else segments[:-1]

    def _until_last_marker(self, text: str) -> str:
        body = text.rstrip()
        return body if body and body.endswith(self.markers) else text


class PairRenderer(Renderer):
    """Turns records with a chosen and a rejected response into the segments of both; options as of `Renderer`."""

    def items(self, record: Mapping[str, Any], where: str) -> list[tuple[Example, ...]]:
        """Return the example of the chosen response and that of the rejected one.

        Raises
        ------
        InputError
            As `Renderer.examples`, and if the trained turns of a response do not fit into one example.
        """
        try:
            read = read_preference(record, self.columns, as_chat=self.as_chat, template=self.prompt_template)
            sides = [self._examples(side) for side in (read.chosen, read.rejected)]
            for name, examples in zip(SIDES, sides, strict=True):
                if len(examples) > 1:
                    raise InputError(
                        f"the chat template rewrites earlier turns, so that the {len(examples)} trained turns of "
                        f"`{name}` are separate examples, and a pair needs one; train on the last turn alone "
                        "(`train_on: last_assistant`)"
                    )
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        return [(sides[0][0], sides[1][0])]
