"""Text to tokens and labels, segment by segment, so that a prompt has exactly the tokens that it has at generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from lowrank_dist.data.rendering import Example
from lowrank_dist.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
"""Label of a token that is not trained on."""

WEIGHTS = "weights"
"""What else there is of a token: what its loss counts, if that is not 1 everywhere."""


@dataclass(frozen=True)
class Encoded:
    """An example as tokens.

    Attributes
    ----------
    tokens, labels
        Token ids, and labels: the token where it is trained, else -100.
    along
        Further values of every token, by name: `weights`, numbers; `token_type_ids`, integers. None are zeros, but
        weights, which are ones.
    target
        The class of the whole; -1 if it has none.
    length
        Number of tokens before it was cut; 0 if it is not cut yet.
    """

    tokens: list[int]
    labels: list[int]
    along: dict[str, list[float]] = field(default_factory=dict)
    target: int = -1
    length: int = 0


class Encoder:
    """Turns examples into token ids and labels.

    Parameters
    ----------
    tokenizer
        Any Hugging Face tokenizer with an end-of-sequence token.

    Raises
    ------
    InputError
        If the tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, and a model trained with it "
                "would never stop; set `eos_token` in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        bare, special = self._ids(["a"])[0], list(tokenizer("a")["input_ids"])
        starts = (i for i in range(len(special)) if special[i : i + len(bare)] == bare)
        self.prefix: list[int] = special[: next(starts, 0)]  # mostly [], or [bos]
        # SentencePiece puts a space before the first word of a text. A segment that continues another one is therefore
        # tokenized after a newline, whose tokens are then removed.
        self.anchor: list[int] = self._ids(["\n"])[0]
        self.anchored = self._ids(["\na"])[0] != [*self.anchor, *bare]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def __call__(self, batch: Sequence[Example]) -> list[Encoded]:
        """Return token ids, labels and, if there are such, weights of each example of a batch, without truncation.

        The label of a trained token is the token; every other label is -100. The label of an example's first token is
        also -100, since no token precedes it. The end-of-sequence token follows the last response unless the response
        ends with it. Tokens that the tokenizer puts before a text (usually bos) are put before an example that no
        template rendered.
        """
        ids = iter(self._segment_ids(batch))
        encoded = []
        for example in batch:
            tokens: list[int] = []
            labels: list[int] = []
            weights: list[float] = []
            for (_, weight), piece in zip(example.segments, islice(ids, len(example.segments)), strict=True):
                if not tokens and not example.templated and piece[: len(self.prefix)] != self.prefix:
                    piece = self.prefix + piece
                tokens += piece
                labels += piece if weight else [IGNORE_INDEX] * len(piece)
                weights += [weight] * len(piece)
            if not example.segments[-1][0].endswith(self.tokenizer.eos_token):
                tokens.append(self.tokenizer.eos_token_id)
                labels.append(self.tokenizer.eos_token_id if weight else IGNORE_INDEX)
                weights.append(weight)
            labels[0] = IGNORE_INDEX
            weighted = any(weight not in (0.0, 1.0) for weight in weights)
            encoded.append(Encoded(tokens, labels, {WEIGHTS: weights} if weighted else {}))
        return encoded

    def _segment_ids(self, batch: Sequence[Example]) -> list[list[int]]:
        texts = [text for example in batch for text, _ in example.segments]
        ids = self._ids(texts)
        if self.anchored:
            follows = [index > 0 for example in batch for index in range(len(example.segments))]
            places = [place for place, follow in enumerate(follows) if follow]
            for place, piece in zip(places, self._ids(["\n" + texts[place] for place in places]), strict=True):
                # a text that begins with a newline may merge with the anchor; SentencePiece adds no space to it anyway
                if piece[: len(self.anchor)] == self.anchor:
                    ids[place] = piece[len(self.anchor) :]
        return ids
