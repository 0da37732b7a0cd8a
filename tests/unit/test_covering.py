"""The combinations that `make test` leaves out are none that it needs."""

from __future__ import annotations

from itertools import combinations, product

from hypothesis import given
from hypothesis import strategies as st

from helpers.covering import covering


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 2))
def test_a_cover_has_every_tuple_of_values(sizes: list[int], strength: int) -> None:
    axes = {f"axis{index}": range(size) for index, size in enumerate(sizes)}
    _, cases = covering(strength, axes).args
    assert [case.values for case in cases] == list(product(*axes.values()))
    chosen = [case.values for case in cases if not case.marks]
    for some in combinations(range(len(sizes)), min(strength, len(sizes))):
        for wanted in product(*(range(sizes[index]) for index in some)):
            assert any(tuple(case[index] for index in some) == wanted for case in chosen)


def test_arguments_that_belong_together_stay_so() -> None:
    names, cases = covering(1, {("rows", "columns"): [(1, 2), (3, 4)], "ranks": [1, 2]}).args
    assert names == ["rows", "columns", "ranks"]
    assert [case.values for case in cases] == [(1, 2, 1), (1, 2, 2), (3, 4, 1), (3, 4, 2)]
    assert [bool(case.marks) for case in cases] == [False, True, True, False]
