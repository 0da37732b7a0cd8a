"""Regular expressions from files: refused if they could take for ever to match.

Python's ``re`` tries all ways in which repetitions can share a text between them. The number of ways is bounded by the
length of the text to the power of the repetitions that follow one another, and is exponential where a repetition
contains another one. Both are counted in the parsed expression.
"""

from __future__ import annotations

import re
from typing import Any

from lowrank_dist.errors import CheckpointError
from lowrank_dist.storage.parse import printable

MAX_LENGTH = 10_000
MAX_REPETITIONS = 4  #: that follow one another; names of layers have a hundred characters
_MANY = 8  # so many repetitions of a part that may match in several ways, or of nothing, are refused
_HANGS = 10**6


def check_pattern(pattern: str, where: str) -> None:
    """Raise CheckpointError if `pattern` is no regular expression, or could take for ever to match."""
    try:
        if len(pattern) > MAX_LENGTH:
            raise ValueError(f"longer than {MAX_LENGTH} characters")
        re.compile(pattern)
        if _ways(_parsed(pattern)) > MAX_REPETITIONS:
            raise ValueError(f"more than {MAX_REPETITIONS} repetitions in a row, or one inside another")
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: {printable(pattern, 60)!r} is not a regular expression that can be matched ({error}); name the "
            "layers plainly"
        ) from error


def _parsed(pattern: str) -> Any:
    try:
        from re import _parser  # type: ignore[attr-defined]
    except ImportError:  # Python 3.10
        import sre_parse as _parser
    return _parser.parse(pattern)


def _ways(parsed: Any) -> int:
    """How many repetitions share a text, at most, on any path through a parsed expression."""
    return sum(_ways_of(str(code), argument) for code, argument in parsed)


def _ways_of(code: str, argument: Any) -> int:
    if code == "BRANCH":
        return max(map(_ways, argument[1]))
    if code == "SUBPATTERN":
        return _ways(argument[-1])
    if code in ("ASSERT", "ASSERT_NOT"):
        return _ways(argument[1])
    if code == "ATOMIC_GROUP":
        return _ways(argument)
    if code == "GROUPREF_EXISTS":
        return max(_ways(part) for part in argument[1:] if part is not None)
    if code in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        low, high, body = argument
        shortest, longest = body.getwidth()
        if int(high) <= 1:
            return _ways(body)
        if low > MAX_LENGTH or (shortest == 0 and high > _MANY):
            return _HANGS
        if shortest != longest or _branches(body):
            return _HANGS if high > _MANY else int(high) * (1 + _ways(body))
        return 1
    return 0


def _branches(parsed: Any) -> bool:
    """Whether an expression has alternatives, which may match the same text."""
    return any(
        str(code) == "BRANCH"
        or (str(code) == "SUBPATTERN" and _branches(argument[-1]))
        or (str(code) in ("ASSERT", "ASSERT_NOT") and _branches(argument[1]))
        for code, argument in parsed
    )
