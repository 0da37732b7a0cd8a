"""Examples of records, and an account of what was left out and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields, replace

from torch import Tensor


@dataclass
class Loaded:
    """Examples that were read, and what became of the others.

    Attributes
    ----------
    examples
        Token ids and labels of each example: int32, [2, length]. The two examples of a pair follow each other.
    along
        Further values of the tokens of each example (`lowrank_dist.data.tokenizing.Encoded`): fp32, [length] each.
    targets
        Class of each example; -1 if it has none.
    wheres
        Where the record of each example stands.
    lengths
        Number of tokens of each example before it was cut, those that were dropped included.
    kept
        Number of examples.
    records
        Number of records read, bad ones included.
    skipped
        Errors of the records that were skipped, in order.
    left_out
        Number of records that the user's function left out.
    cut, split, dropped
        Examples longer than `max_length` that were cut; those that were split into several; and what has no trained
        token after that: cut examples, of pairs both if one has none, and parts of examples.
    empty
        Examples that were dropped because they have no token to train, although none was cut; those of pairs with the
        other one.
    too_long
        Examples longer than `max_length` that were dropped, those of pairs with the other one.
    alike
        Pairs whose two responses are the same in what is left, which were dropped.
    full
        Examples, other than passages, of which every token is trained without `train_on` having asked for it.
    silent
        Examples of which the last token alone is trained: the response is empty.
    unused
        Columns that nothing here reads.
    notes
        What else was done to examples, and to how many.
    """

    examples: list[Tensor] = field(default_factory=list)
    along: list[dict[str, Tensor]] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    wheres: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    kept: int = 0
    records: int = 0
    skipped: list[str] = field(default_factory=list)
    left_out: int = 0
    cut: int = 0
    split: int = 0
    dropped: int = 0
    empty: int = 0
    too_long: int = 0
    alike: int = 0
    full: int = 0
    silent: int = 0
    unused: set[str] = field(default_factory=set)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, part: Loaded) -> None:
        """Append what became of the records that follow."""
        for name in (one.name for one in fields(self)):
            mine, further = getattr(self, name), getattr(part, name)
            if isinstance(mine, list):
                mine.extend(further)
            elif isinstance(mine, set | Counter):
                mine.update(further)
            else:
                setattr(self, name, mine + further)

    def without_examples(self) -> Loaded:
        """The account alone."""
        return replace(self, examples=[], along=[], targets=[], wheres=[])

    def lines(self, max_length: int) -> list[str]:
        """What was done to the data without being asked, one line each."""
        lines = []
        if self.skipped:
            lines.append(f"skipped {len(self.skipped)} of {self.records} records; the first: {self.skipped[0]}")
        if self.left_out:
            lines.append(f"transform left out {self.left_out} of {self.records} records")
        longer = f"of {len(self.lengths)} examples are longer than max_length={max_length}"
        if self.cut:
            lines.append(
                f"{self.cut} {longer} and were cut; {self.dropped} of them had no response left and were dropped"
            )
        if self.empty:
            lines.append(f"{self.empty} examples have no token to train and were dropped")
        if self.too_long:
            lines.append(f"{self.too_long} {longer} and were dropped")
        if self.alike:
            lines.append(f"{self.alike} pairs were dropped: what is left of their two responses is the same")
        if self.split:
            lines.append(
                f"{self.split} {longer} and were split; {self.dropped} parts had no response and were dropped"
                if self.dropped and not self.cut
                else f"{self.split} {longer} and were split"
            )
        if self.full:
            lines.append(f"{self.full} examples have no prompt: every token of them is trained")
        if self.silent:
            lines.append(f"{self.silent} examples have an empty response: only their last token is trained")
        lines += [f"{what}, in {count} turns" for what, count in self.notes.items()]
        return lines
