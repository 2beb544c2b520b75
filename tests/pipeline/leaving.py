"""Pairs that leave weight gradients to each other, whatever they take: on a CPU none is timed."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

from dualpipe_ext.pipeline.launch_order import LEFT, Launch, interleave
from dualpipe_ext.pipeline.overlap import Phase
from dualpipe_ext.pipeline.pair_orders import PairOrders


def leaving(_: PairOrders, forward: Sequence[Phase], backward: Sequence[Phase], **how: object):
    """An order that leaves the weight gradients of the first phase, in the place of
    ``PairOrders.begin``."""
    order = interleave(forward, backward)
    order.remove(Launch("W", 0))
    order.insert(2, LEFT)
    return order, None


def all_pairs_leave():
    """In its body."""
    return patch.object(PairOrders, "begin", leaving)
