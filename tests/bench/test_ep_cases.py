"""Which cases there are, and options that cannot be."""

from __future__ import annotations

import pytest

from dualpipe_ext.bench.ep_cases import CASES, push_case, push_cases, select_cases
from tests.bench.runs import small


def test_selected_by_name_or_beginning() -> None:
    assert select_cases(None) == CASES
    assert len({case.name for case in CASES}) == len(CASES)
    assert [c.name for c in select_cases(["combine-expert"])] == ["combine-expert"]
    fp8 = select_cases(["dispatch-fp8", "dispatch-quantised-token"])
    assert all(case.fp8 for case in fp8)
    assert len(fp8) == sum(case.fp8 for case in CASES)
    # In the order of the table, whatever the order of the words; none twice.
    assert select_cases(["combine", "dispatch", "combine-token"]) == CASES


def test_pushes_of_the_rows_that_are_measured() -> None:
    by_case = {case.name: push_case(case).name for case in CASES}
    assert by_case["dispatch-bf16-expert"] == by_case["combine-token"] == "push-bf16"
    assert by_case["dispatch-fp8-buffer"] == by_case["dispatch-quantised-token"] == "push-fp8"
    assert [c.name for c in push_cases(select_cases(["combine"]))] == ["push-bf16"]
    assert not set(by_case) & set(by_case.values())


@pytest.mark.parametrize("word", ["dispatch-fp", "gather", "push-bf16", ""])
def test_unknown_cases(word: str) -> None:
    with pytest.raises(ValueError, match="expected --what of dispatch, combine, dispatch-bf16-"):
        select_cases([word])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "--tokens of at least 1, got 0"),
        ({"top_k": 0}, "--top-k of at least 1, got 0"),
        ({"rounds": 0}, "--rounds of at least 1, got 0"),
        ({"experts": 6}, "--experts to be a multiple of 4 ranks, got 6"),
        ({"top_k": 5}, "--top-k of at most 4, got 5"),
        ({"hidden": 64}, "--hidden to be a multiple of 128 for FP8, got 64; --what dispatch-bf16"),
        ({"what": "combine", "hidden": 4}, "--hidden to be a multiple of 8, got 4"),
        ({"sms": (8, 0)}, "--sms of at least 1, got 0"),
    ],
)
def test_options_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes).checked(4)


def test_hidden_of_fp8_matters_only_for_fp8() -> None:
    options = small("dispatch-bf16,combine", hidden=72)
    assert options.checked(4) is options
