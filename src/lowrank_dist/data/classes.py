"""Labelled texts by their columns, and their tokens: for the classification of sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowrank_dist.data.shapes import listed, renamed, text_of
from lowrank_dist.data.tokenizing import IGNORE_INDEX, Encoded
from lowrank_dist.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLASS_NAMES = ("text", "text_pair", "label")


@dataclass(frozen=True)
class Labelled:
    """A text, or a pair of texts, with its class."""

    text: str
    beside: str | None
    label: int


class LabelledRenderer:
    """Reads labelled texts from records, in place of `lowrank_dist.data.rendering.Renderer`.

    Parameters
    ----------
    columns
        Names of the records' columns, by the names used here.
    classes
        Names of the classes, in order, if labels are names. None: labels are numbers from 0 on. With names that are
        numbers of other classes (``["1", "2", "3"]``) labels must be names, as text.
    """

    def __init__(self, *, columns: Mapping[str, str] | None = None, classes: Sequence[str] | None = None) -> None:
        self.columns = columns
        self.classes = None if classes is None else list(classes)
        numbers = [(index, name) for index, name in enumerate(self.classes or ()) if _is_number(name)]
        #: Number and name of the first class whose name is another number; None if there is none.
        self.misnumbered = next(((index, name) for index, name in numbers if int(name) != index), None)

    def items(self, record: Mapping[str, Any], where: str) -> list[tuple[Labelled]]:
        """The text of a record and its class.

        Raises
        ------
        InputError
            If there is none. The message begins with `where`.
        """
        try:
            record = renamed(record, self.columns)
            for name in ("text", "label"):
                if record.get(name) is None:
                    raise InputError(
                        f"classification needs `text` and `label`, and there is no `{name}` (columns found: "
                        f"{listed(record)}); name them in `columns`"
                    )
            beside = text_of(record, "text_pair") if record.get("text_pair") is not None else None
            return [(Labelled(text_of(record, "text"), beside, self._label(record["label"])),)]
        except InputError as error:
            raise InputError(f"{where}: {error}") from error

    def _label(self, label: Any) -> int:
        if self.classes is not None and label in self.classes:
            return self.classes.index(label)
        if self.misnumbered is not None and isinstance(label, int):
            raise InputError(
                f"the label {label} may be the number of a class or its name, because class {self.misnumbered[0]} is "
                f"called {self.misnumbered[1]!r}; write labels as text, or leave `classes` out"
            )
        if self.misnumbered is None and isinstance(label, str) and _is_number(label):  # all of a CSV file is text
            label = int(label)
        if self.classes is not None and isinstance(label, str):
            raise InputError(f"the label {label!r} is none of the classes {', '.join(self.classes)}")
        if not isinstance(label, int):
            remedy = "; list the names in `classes`" if isinstance(label, str) else ""
            raise InputError(f"the label {label!r} is not the number of a class, 0 or more{remedy}")
        if label < 0 or (self.classes is not None and label >= len(self.classes)):
            end = "" if self.classes is None else f" to {len(self.classes) - 1}"
            raise InputError(f"the label {label} is not the number of a class, 0{end or ' or more'}")
        return int(label)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


class LabelledEncoder:
    """Turns labelled texts into token ids, as the tokenizer writes one text or two.

    Parameters
    ----------
    tokenizer
        Any Hugging Face tokenizer.
    max_length
        Largest number of tokens; of two texts the longer one is cut.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, batch: Sequence[Labelled]) -> list[Encoded]:
        """Token ids of each text, its special tokens kept when it is cut, and its class; no token has a label.

        Raises
        ------
        InputError
            If a text has no tokens.
        """
        encoded = []
        for one in batch:
            texts = (one.text,) if one.beside is None else (one.text, one.beside)
            found = self.tokenizer(*texts, truncation=False, verbose=False)
            length = len(found["input_ids"])
            if not length:
                raise InputError(f"{one.text!r} has no tokens; leave it out with `transform`, or skip bad records")
            if length > self.max_length:
                found = self.tokenizer(
                    *texts, truncation="longest_first" if one.beside else True, max_length=self.max_length
                )
            tokens = list(found["input_ids"])
            kinds = found.get("token_type_ids")
            encoded.append(
                Encoded(
                    tokens,
                    [IGNORE_INDEX] * len(tokens),
                    {"token_type_ids": list(kinds)} if kinds is not None and any(kinds) else {},
                    target=one.label,
                    length=length,
                )
            )
        return encoded
