import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dualpipe_ext.profiling.intervals import gaps, intersection, length, union

SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8)), max_size=12).map(
    lambda spans: [(start, start + size) for start, size in spans]
)


def cells(intervals) -> set[int]:
    """The unit cells that intervals with whole ends cover."""
    return {c for a, b in np.asarray(intervals).reshape(-1, 2) for c in range(int(a), int(b))}


@given(SPANS, SPANS)
def test_sets_of_cells(a, b):
    one, other = union(a), union(b)
    assert cells(one) == cells(a)
    assert length(one) == len(cells(a))
    assert cells(intersection(one, other)) == cells(a) & cells(b)
    assert cells(gaps(one, 5, 30)) == set(range(5, 30)) - cells(a)


@given(SPANS)
def test_a_union_is_sorted_and_disjoint(spans):
    found = union(spans)
    assert (found[1:, 0] > found[:-1, 1]).all()
    assert (found[:, 0] <= found[:, 1]).all()
