"""Sets of points in time as sorted, disjoint intervals: union, intersection, gaps.

An interval set is a float64 array [n, 2] of (start, end), ascending, not touching each other.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Intervals = npt.NDArray[np.float64]


def union(spans: npt.ArrayLike) -> Intervals:
    """The points covered by any of ``spans`` [n, 2], in any order, overlapping or not.

    >>> union([(4, 6), (0, 2), (1, 3), (3, 3.5)]).tolist()
    [[0.0, 3.5], [4.0, 6.0]]
    """
    array = np.asarray(spans, dtype=np.float64).reshape(-1, 2)
    array = array[array[:, 0].argsort(kind="stable")]
    if not len(array):
        return array
    # A span opens a new interval if it starts after all before it have ended.
    ends = np.maximum.accumulate(array[:, 1])
    opens = np.concatenate(([True], array[1:, 0] > ends[:-1]))
    closes = np.concatenate((np.flatnonzero(opens)[1:] - 1, [len(array) - 1]))
    return np.stack((array[opens, 0], ends[closes]), axis=1)


def intersection(a: Intervals, b: Intervals) -> Intervals:
    """The points in both sets.

    >>> intersection(union([(0, 4), (6, 9)]), union([(2, 7)])).tolist()
    [[2.0, 4.0], [6.0, 7.0]]
    """
    found = []
    i = j = 0
    while i < len(a) and j < len(b):
        start, end = max(a[i, 0], b[j, 0]), min(a[i, 1], b[j, 1])
        if start < end:
            found.append((start, end))
        if a[i, 1] < b[j, 1]:
            i += 1
        else:
            j += 1
    return np.array(found, dtype=np.float64).reshape(-1, 2)


def gaps(a: Intervals, start: float, end: float) -> Intervals:
    """The points between ``start`` and ``end`` that are not in ``a``.

    >>> gaps(union([(1, 2), (4, 5)]), 0, 5).tolist()
    [[0.0, 1.0], [2.0, 4.0]]
    """
    edges = np.concatenate(([start], intersection(a, union([(start, end)])).ravel(), [end]))
    found = edges.reshape(-1, 2)
    return found[found[:, 0] < found[:, 1]]


def length(a: Intervals) -> float:
    """Total length of a set."""
    return float((a[:, 1] - a[:, 0]).sum())
