"""The check accepts the overlapped pair and nothing else, and the throttle finds its repeats."""

from __future__ import annotations

import pytest

from dualpipe_ext.bench.ranks import start
from tests.bench.pipeline_runs import (
    COMPUTE_US,
    LINKS,
    check_pairs,
    check_while_some_are_left,
    throttled,
    weights_measured,
)


@pytest.mark.parametrize("ranks", [1, 2])
def test_serial_and_overlapped_are_equal_bit_for_bit(ranks):
    good, lost, doubled = start(check_pairs, ranks, virtual=False, device_type="cpu")
    assert good == ""
    assert lost.startswith("the gradient of layers.1.")
    assert doubled == "the input gradient of the pair is not that of the serial run"


def test_the_check_counts_what_pairs_leave_to_each_other():
    run = {"virtual": False, "device_type": "cpu"}
    assert start(check_while_some_are_left, 2, **run) == [1, 0, 1, 0]


def test_every_form_is_measured_with_its_own_weight_gradients():
    found = start(weights_measured, 1, virtual=False, device_type="cpu")
    # Those of four phases of compute by two calls, in one launch each; all others are no launch.
    assert found == {"compute": [0, 0], "comm": [0, 0], "serial": [0, 0], "pair": [8, 8]}


def test_communication_is_repeated_until_it_takes_as_long_as_compute():
    (*slowed, as_long), forms = start(throttled, 2, virtual=False, device_type="cpu")
    assert slowed == [(True, pytest.approx(COMPUTE_US, rel=0.02))] * (len(LINKS) - 1)
    assert as_long == (False, COMPUTE_US)
    assert forms == ["compute", "comm", "serial", "pair"]
