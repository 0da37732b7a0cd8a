"""The prompt around a question, given by the user."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowrank_dist.errors import InputError


@dataclass(frozen=True)
class PromptTemplate:
    """Text with the names of columns in braces, such as ``"Question: {query} Answer: "``; ``{{`` is a brace.

    Parameters
    ----------
    text
        The template. Spaces at its end lie between prompt and response, and become part of the response, because
        vocabularies include the space in the token of a word.

    Raises
    ------
    InputError
        If braces hold something other than a name, or there are none.
    """

    text: str
    names: tuple[str, ...] = field(init=False)
    """Columns in the order of the template."""

    def __post_init__(self) -> None:
        try:
            pieces = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise InputError(f"prompt_template {self.text!r}: {error}; write a brace of the text twice") from error
        names = []
        for _, name, form, conversion in pieces:
            if name is None:
                continue
            if not name.isidentifier() or form or conversion:
                raise InputError(
                    f"prompt_template {self.text!r}: braces hold the name of a column and nothing else, as in "
                    "`{query}`; write a brace of the text twice"
                )
            names.append(name)
        if not names:
            raise InputError(
                f"prompt_template {self.text!r}: name the column of the prompt in braces, as in `{{query}}`"
            )
        object.__setattr__(self, "names", tuple(names))

    @property
    def gap(self) -> str:
        """Spaces between prompt and response."""
        return self.text[len(self.text.rstrip(" ")) :]

    def filled(self, record: Mapping[str, Any], needed: str) -> str:
        """The prompt of a record, without the spaces at the end of the template.

        Parameters
        ----------
        record
            Values by column.
        needed
            The column of the prompt, which the template must name; the `input` of an `instruction`, too.

        Raises
        ------
        InputError
            If a column is missing, or has no text, or is left out by the template.
        """
        for name in (needed, *(("input",) if needed == "instruction" and record.get("input") else ())):
            if name not in self.names:
                raise InputError(f"prompt_template leaves `{name}` of the record out; add `{{{name}}}` to it")
        values = {name: record.get(name) for name in self.names}
        for name, value in values.items():
            if name == "input" and value is None:
                values[name] = ""
            elif not isinstance(value, str):
                kind = "missing" if value is None else f"a {type(value).__name__}, not text"
                raise InputError(f"`{name}`, which prompt_template names, is {kind}")
        return self.text.rstrip(" ").format(**values)
