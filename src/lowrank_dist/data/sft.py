"""Supervised fine-tuning examples: records to text, text to tokens, tokens to padded or packed batches.

A record becomes segments of text, each trained on or not. The segments are tokenized one by one, so that a prompt has
exactly the tokens it will have when the model is asked to answer it. No trainer and no process group: what Lightning
sees of it is in `data`.
"""

from __future__ import annotations

import json
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
"""Label of a token that is not trained on."""

PAD_TO_MULTIPLE_OF = 8

INSTRUCTION_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{query}\n\n### Response:"
)
"""What a `query` is rendered with: the Alpaca prompt, as MetaMath and the PiSSA authors use it. The response follows
after a space, which belongs to the response: vocabularies hold it in the token of the first word."""

COLUMNS = "`messages` (with or without `completion`), `prompt` and `completion`, or `query` and `response`"

Segments = list[tuple[str, bool]]
"""Consecutive pieces of a text, and whether the model is trained to write each."""


@dataclass(frozen=True)
class Example:
    """Text of one example."""

    segments: Segments
    """Its pieces, in order; the last one is trained on."""
    templated: bool
    """Whether a chat template rendered it, special tokens included."""


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``("file:line", record)`` for every line of a JSONL file.

    Raises
    ------
    ValueError
        If a line is empty, is not UTF-8 JSON, or is not an object.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                raise ValueError(f"{where}: empty line; every line must hold one JSON object")
            try:
                record = json.loads(line)
            except ValueError as error:  # JSONDecodeError or UnicodeDecodeError
                raise ValueError(f"{where}: not valid JSON ({error}); every line must hold one JSON object") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where}: a JSON {type(record).__name__}; every line must hold one JSON object")
            yield where, record


def read_hub(name: str, subset: str | None, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``("id[split] row i", record)`` for every row of a Hugging Face data set.

    Raises
    ------
    ImportError
        If the `datasets` library is missing.
    ValueError
        If the data set, its subset or its split cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name!r} is not a file, and data sets of the Hugging Face hub need the `datasets` library: "
            "`pip install lowrank-dist[datasets]`, or give the path of a .jsonl file"
        ) from error
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except (ValueError, OSError) as error:  # unknown id, subset or split; no network
        raise ValueError(
            f"{name!r} is not a file, and as a Hugging Face data set (subset={subset!r}, split={split!r}) it cannot be "
            f"loaded: {error}"
        ) from error
    for index, record in enumerate(rows):
        yield f"{name}[{split}] row {index}", record


class Renderer:
    """Turns records into segments.

    Parameters
    ----------
    tokenizer
        The tokenizer, for its chat template and end-of-sequence token.
    chat_template
        A Jinja template that replaces the tokenizer's, or None.
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
        ValueError
            If no known columns are there, one holds something else than text, or the chat template cannot render it.
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
            raise ValueError(f"{where}: columns found: {found}; valid choices: {COLUMNS}")
        return [Example([(prompt, False), (response, True)], templated="messages" in columns)]

    def conversation(self, messages: list[dict[str, Any]], tools: Any, where: str) -> list[Segments]:
        """Segments of a conversation in which every assistant turn is trained on.

        A turn's text is what the template adds when the turn is appended to the prompt that asks for it, up to and
        including the last special token (what follows, as ChatML's newline, is never generated). Templates that
        rewrite earlier turns (Qwen3 removes their reasoning) have no rendering that holds every turn as it was
        generated; a conversation then becomes one example for each assistant turn.
        """
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise ValueError(f"{where}: `messages` has no assistant turn to train on, nor is there a `completion`")
        if turns[0] == 0:
            raise ValueError(f"{where}: `messages` begins with an assistant turn: there is no prompt before it")
        whole = self.chat(messages, tools, where)
        spans: list[tuple[str, str]] = []
        for turn in turns:
            prompt = self.chat(messages[:turn], tools, where, prompt=True)
            rendered = self.chat(messages[: turn + 1], tools, where)
            if not rendered.startswith(prompt):
                raise ValueError(
                    f"{where}: the chat template renders message {turn} differently from the prompt that asks for it "
                    f"(prompt ends in {prompt[-40:]!r}); give a `chat_template` whose generation prompt is the "
                    "beginning of the assistant turn, or use `messages` with a `completion`"
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
        """Text of `messages`, followed by the generation prompt if `prompt`."""
        if self.template is None and self.tokenizer.chat_template is None:
            raise ValueError(
                f"{where}: `messages` need a chat template and the tokenizer {self.tokenizer.name_or_path!r} has none; "
                "give `chat_template` (a .jinja file), or use the columns `prompt` and `completion`"
            )
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self.template, add_generation_prompt=prompt, tokenize=False
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{where}: the chat template cannot render `messages`: {error}") from error
        return text

    def _until_last_marker(self, text: str, start: int) -> str:
        body = text.rstrip()
        return body if len(body) > start and body.endswith(self.markers) else text


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) and "role" in m for m in value):
        raise ValueError(f"{where}: `messages` must be a non-empty list of objects with `role` and `content`")
    return value


def _text(record: dict[str, Any], column: str, where: str) -> str:
    if not isinstance(value := record.get(column), str):
        found = ", ".join(f"`{name}`" for name in sorted(record))
        kind = f"a {type(value).__name__}, not text" if column in record else "missing"
        raise ValueError(f"{where}: `{column}` is {kind} (columns found: {found}); valid choices: {COLUMNS}")
    return value


class Encoder:
    """Turns examples into token ids and labels.

    Parameters
    ----------
    tokenizer
        Any Hugging Face tokenizer with an end-of-sequence token.

    Raises
    ------
    ValueError
        If the tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token: a model trained with it would "
                "never stop; set `eos_token` in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        bare, special = self._ids(["a"])[0], list(tokenizer("a")["input_ids"])
        starts = (i for i in range(len(special)) if special[i : i + len(bare)] == bare)
        self.prefix: list[int] = special[: next(starts, 0)]  # mostly [], or [bos]
        # SentencePiece puts a space before the first word of whatever it is given. A segment that continues another
        # one is therefore tokenized behind a newline, whose tokens are then removed.
        self.anchor: list[int] = self._ids(["\n"])[0]
        self.anchored = self._ids(["\na"])[0] != [*self.anchor, *bare]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def __call__(self, batch: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
        """Token ids and labels of each example of a batch, whole (see `max_length` of `SFTDataModule` for what is cut).

        The label of a trained token is the token; every other label is -100, and so is an example's first, which
        nothing before it predicts. The end-of-sequence token follows the last response unless that ends with it. What
        the tokenizer puts in front of a text (bos, mostly) is put in front of an example that no template rendered.
        """
        ids = iter(self._segment_ids(batch))
        encoded = []
        for example in batch:
            tokens: list[int] = []
            labels: list[int] = []
            for (_, trained), piece in zip(example.segments, islice(ids, len(example.segments)), strict=True):
                if not tokens and not example.templated and piece[: len(self.prefix)] != self.prefix:
                    piece = self.prefix + piece
                tokens += piece
                labels += piece if trained else [IGNORE_INDEX] * len(piece)
            if not example.segments[-1][0].endswith(self.tokenizer.eos_token):
                tokens.append(self.tokenizer.eos_token_id)
                labels.append(self.tokenizer.eos_token_id)
            labels[0] = IGNORE_INDEX
            encoded.append((tokens, labels))
        return encoded

    def _segment_ids(self, batch: Sequence[Example]) -> list[list[int]]:
        texts = [text for example in batch for text, _ in example.segments]
        ids = self._ids(texts)
        if self.anchored:
            follows = [index > 0 for example in batch for index in range(len(example.segments))]
            places = [place for place, follow in enumerate(follows) if follow]
            for place, piece in zip(places, self._ids(["\n" + texts[place] for place in places]), strict=True):
                # a text that begins with a newline may merge with the anchor, but has no first word to space
                if piece[: len(self.anchor)] == self.anchor:
                    ids[place] = piece[len(self.anchor) :]
        return ids


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack examples into rows of at most `capacity` tokens: best fit, longest first.

    Parameters
    ----------
    lengths
        Tokens of each example, none above `capacity`.
    capacity
        Tokens of a row.

    Returns
    -------
    list of list of int
        The examples of each row. Every example is in one row.

    Notes
    -----
    O(n log n) in the number of examples; at most 11/9 of the optimal number of rows, and one.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free tokens -> rows with exactly so many
    free: list[int] = []  # the keys, sorted
    for example in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[example]
        if (slot := bisect_left(free, length)) < len(free):
            left = free[slot]
            row = open_rows[left].pop()
            if not open_rows[left]:
                del open_rows[left], free[slot]
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(example)
        if left > length:
            if left - length not in open_rows:
                insort(free, left - length)
            open_rows.setdefault(left - length, []).append(row)
    return rows


class TokenDataset(Dataset[dict[str, Tensor]]):
    """Tokenized examples in two flat tensors, one example or one packed row an item.

    Parameters
    ----------
    examples
        Token ids and labels of each example: int32, [2, length].
    capacity
        Pack examples into rows of at most so many tokens; None keeps one example an item.

    Notes
    -----
    Item ``~i`` (negative) is item ``i`` with every label -100: a filler, which takes part in a step without counting.
    """

    def __init__(self, examples: Sequence[Tensor], capacity: int | None = None) -> None:
        sizes = [example.shape[1] for example in examples]
        self.rows = [[index] for index in range(len(sizes))] if capacity is None else pack(sizes, capacity)
        self.packed = capacity is not None
        order = list(chain.from_iterable(self.rows))
        self.tokens, self.labels = torch.cat([examples[index] for index in order], dim=1)  # [total] each
        self.sizes = [[sizes[index] for index in row] for row in self.rows]
        self.lengths = [sum(row) for row in self.sizes]
        self.offsets = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Item `index`: `input_ids`, `labels` and, where packed, `position_ids`; each int64 of shape [length]."""
        row = index if index >= 0 else ~index
        part = slice(self.offsets[row], self.offsets[row + 1])
        item = {"input_ids": self.tokens[part].long(), "labels": self.labels[part].long()}
        if index < 0:
            item["labels"].fill_(IGNORE_INDEX)
        if self.packed:
            item["position_ids"] = torch.cat([torch.arange(size) for size in self.sizes[row]])
        return item


@dataclass(frozen=True)
class Collator:
    """Right-pads the items of a batch to one length, a multiple of 8.

    Parameters
    ----------
    pad_token_id
        Token of the padding, which no label asks for.

    Notes
    -----
    A batch of single examples has an `attention_mask`. A packed batch has `position_ids` instead, starting again from 0
    at every example and at the padding: transformers finds the borders there and keeps attention within them, but only
    if it is given no `attention_mask` and no key-value cache. All values are int64 of shape [batch, length].
    """

    pad_token_id: int

    def __call__(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        longest = max(len(item["input_ids"]) for item in items)
        shape = len(items), -(-longest // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
        packed = "position_ids" in items[0]
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORE_INDEX),
            ("position_ids" if packed else "attention_mask"): torch.zeros(shape, dtype=torch.int64),
        }
        for row, item in enumerate(items):
            length = len(item["input_ids"])
            batch["input_ids"][row, :length] = item["input_ids"]
            batch["labels"][row, :length] = item["labels"]
            if packed:
                batch["position_ids"][row, :length] = item["position_ids"]
                batch["position_ids"][row, length:] = torch.arange(shape[1] - length)
            else:
                batch["attention_mask"][row, :length] = 1
        return batch
