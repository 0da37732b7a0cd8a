"""Numbers in answers, read as the authors of PiSSA read them."""

from __future__ import annotations

import pytest
from datasets import Dataset

from lowrank_dist.data.shapes import INSTRUCTION_PROMPT
from lowrank_dist.errors import InputError
from lowrank_dist.inference.tasks.gsm8k import documents, number_in, score


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So 2 + 3 = 5.\nThe answer is: 5", 5),
        ("The answer is: 1\nno, The answer is: $1,234.", 1234),
        ("The answer is: 1,234,567", 1234),  # theirs takes one comma
        ("The answer is: -3", -3),
        ("The answer is: 7/2", 4),
        ("The answer is: 5/2", 2),
        ("The answer is: 7/0", 7),
        ("The answer is: 2.6 apples", 3),
        ("The answer is: .5", 0),
        ("The answer is: none", None),
        ("#### 5", None),
        ("The answer is 5", None),
    ],
)
def test_the_number_after_the_last_mark(text: str, number: float | None) -> None:
    assert number_in(text) == number


def test_documents_of_gsm8k_and_of_the_authors() -> None:
    own = Dataset.from_list([{"question": "2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 1,005"}])
    (doc,) = documents(own)
    assert doc == {"prompt": INSTRUCTION_PROMPT.format(query="2 + 3?"), "number": "1005"}
    assert score(doc, ["The answer is: 1,005"]) == {"exact_match": 1.0}
    assert score(doc, ["The answer is: 1006"]) == {"exact_match": 0.0}
    assert score(doc, ["1005"]) == {"exact_match": 0.0}
    theirs = Dataset.from_list(
        [
            {"instruction": "Solve", "output": "5", "type": "gsm8k"},
            {"instruction": "Solve", "output": "x", "type": "math"},
        ]
    )
    assert list(documents(theirs)) == [{"prompt": "Solve", "number": "5"}]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "a"}, "columns text"),
        ({"question": "a", "answer": "#### five"}, "not with a number"),
        ({"instruction": "a", "output": "1", "type": "math"}, "no record of the data has the type"),
    ],
)
def test_other_data_are_refused(row: dict[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        documents(Dataset.from_list([row]))
