import pytest

from dualpipe_ext.timeouts import check_timeout, is_timeout


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), 1e30, "30", None])
def test_what_no_group_can_count_is_refused(timeout_s):
    with pytest.raises(ValueError, match=r"expected timeout_s above 0 and at most 1e\+09 seconds"):
        check_timeout(timeout_s)


@pytest.mark.parametrize("timeout_s", [1e-3, 30, 1e9])
def test_seconds_are_accepted(timeout_s):
    check_timeout(timeout_s)


def test_a_lost_connection_is_no_time_out():
    assert is_timeout(RuntimeError("[...] Timed out waiting 500ms for recv operation to complete"))
    assert is_timeout(RuntimeError("Watchdog caught collective operation timeout"))
    assert not is_timeout(RuntimeError("Connection closed by peer [127.0.0.1]:31136"))
