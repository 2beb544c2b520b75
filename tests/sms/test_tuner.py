"""The tuner with clocks that the test sets, and ranks that are threads of one process."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Sequence
from statistics import median

import pytest
import torch

from dualpipe_ext.sms import SMPartition, SMTuner
from dualpipe_ext.sms.tuner import SETTLE, WARM_UP, num_steps, rounds_of

CPU = torch.device("cpu")


def alone(values: Sequence[float]) -> Sequence[float]:
    return values


class Ranks:
    """Ranks that agree: each is a thread, and all meet in every call."""

    def __init__(self, num_ranks: int) -> None:
        self._barrier = threading.Barrier(num_ranks, timeout=10)
        self._brought: dict[int, list[float]] = {}

    def agree(self, rank: int) -> Callable[[Sequence[float]], list[float]]:
        def largest(values: Sequence[float]) -> list[float]:
            self._brought[rank] = list(values)
            self._barrier.wait()
            found = [max(column) for column in zip(*self._brought.values(), strict=True)]
            self._barrier.wait()
            return found

        return largest

    def run(self, body: Callable[[int], object]) -> list:
        results: list = [None] * self._barrier.parties

        def work(rank: int) -> None:
            results[rank] = body(rank)

        threads = [threading.Thread(target=work, args=(r,)) for r in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def tune(
    numbers: Sequence[int],
    seconds: Callable[[int | None, int], float],
    *,
    prepare: Callable[[int], str | None] = lambda number: None,
    agree: Callable[[Sequence[float]], Sequence[float]] = alone,
) -> tuple[SMTuner, list[int | None]]:
    """A run of steps that take ``seconds(number, step)``; which number each step had."""
    partition = SMPartition(device=CPU)
    partition.set(24)
    tuner, used = SMTuner(partition, numbers, prepare=prepare, agree=agree), []
    while not tuner.done:
        used.append(partition.comm_sms)
        tuner.observe(seconds(partition.comm_sms, len(used)))
    used.append(partition.comm_sms)
    tuner.observe(0.0)  # nobody looks any more
    return tuner, used


TIMES = {0: 5.0, 8: 3.0, 16: 2.0, 24: 4.0}


def test_the_fastest_is_fixed_after_as_many_steps_as_said():
    tuner, used = tune([0, 8, 16, 24], lambda number, step: TIMES[number])
    assert tuner.result.best == used[-1] == 16
    there, back = (0, 8, 16, 24), (24, 16, 8, 0)
    assert rounds_of(there) == [there, back, back, there, there, back]
    once = [n for n in there for _ in range(SETTLE)]
    rounds = [n for order in rounds_of(there) for n in order for _ in range(SETTLE + 1)]
    assert used == [24] * WARM_UP + once + rounds + [16]
    assert len(used) - 1 == num_steps(4)
    assert tuner.result.noise == 0.0
    assert [c.seconds for c in tuner.result.candidates] == [5.0, 3.0, 2.0, 4.0]
    assert all(c.reason == "" for c in tuner.result.candidates)


def test_the_first_step_with_a_number_does_not_count():
    before: list[int | None] = [24]

    def slow_to_start(number: int, step: int) -> float:
        first, before[0] = number != before[0], number
        return 100.0 if first and number == 8 else TIMES[number]

    assert tune([8, 24], slow_to_start)[0].result.best == 8


@pytest.mark.parametrize("numbers", [[8, 16, 24], [8, 16]])
def test_one_slow_step_does_not_decide(numbers):
    first = WARM_UP + SETTLE * len(numbers)

    for slow in range(first + 1, num_steps(len(numbers)) + 1):

        def with_a_hiccup(number: int, step: int, slow: int = slow) -> float:
            return 50.0 if step == slow else TIMES[number]

        result = tune(numbers, with_a_hiccup)[0].result
        assert result.best == 16, slow
        assert result.noise < 1.0, slow


def test_steps_that_become_faster_by_themselves_favour_nobody():
    def drifting(number: int, step: int) -> float:
        return TIMES[number] * 0.1 + 0.05 * (num_steps(2) - step)

    # Without ways back 24 would win, being last.
    result = tune([24, 8], drifting)[0].result
    assert result.best == 8
    fast, slow = (next(c.seconds for c in result.candidates if c.comm_sms == n) for n in (8, 24))
    assert slow - fast == pytest.approx(0.1)
    assert result.noise == pytest.approx(0.0, abs=1e-9)


ALL = (0, 8, 16, 24, 32, 64)


def warming_up(
    takes: Callable[[int], float], *, steps: float, jitter: float = 0.0, seed: int = 0
) -> Callable[[int, int], float]:
    """Steps of a small model: a quarter longer at first, which fades over about so many steps."""
    draw = random.Random(seed)

    def seconds(number: int, step: int) -> float:
        return takes(number) + 0.064 * math.exp(-step / steps) + draw.gauss(0.0, jitter)

    return seconds


def there_and_back_once(numbers: Sequence[int], seconds: Callable[[int, int], float]) -> int:
    """The number with the best median of two steps there and two back, as it was once done."""
    times: dict[int, list[float]] = {number: [] for number in numbers}
    step = WARM_UP
    for number in (*numbers, *reversed(numbers)):
        times[number] += [seconds(number, step + 2), seconds(number, step + 3)]
        step += 3
    return min(times, key=lambda number: median(times[number]))


@pytest.mark.parametrize("steps", [5, 15, 40])
def test_a_warm_up_makes_no_number_better(steps):
    def equal(_: int) -> float:
        return 0.236

    # The last one met steps that had warmed up both times, while the first once met cold ones.
    assert there_and_back_once(ALL, warming_up(equal, steps=steps)) == 64
    result = tune(ALL, warming_up(equal, steps=steps))[0].result
    assert result.best == 0
    times = [candidate.seconds for candidate in result.candidates]
    assert max(times) - min(times) < 0.001


@pytest.mark.parametrize("steps", [5, 15, 40])
@pytest.mark.parametrize("jitter", [0.0, 0.002])
def test_a_better_number_is_found_while_the_model_warms_up(steps, jitter):
    def faster_with_32(number: int) -> float:
        return 0.220 if number == 32 else 0.236

    for seed in range(20):
        clock = warming_up(faster_with_32, steps=steps, jitter=jitter, seed=seed)
        assert tune(ALL, clock)[0].result.best == 32, seed


def test_what_is_within_noise_goes_to_the_fewest_sms():
    def equal(_: int) -> float:
        return 0.236

    results = [
        tune(ALL, warming_up(equal, steps=15, jitter=0.008, seed=seed))[0].result
        for seed in range(100)
    ]
    chosen = [result.best for result in results]
    assert chosen.count(0) > 70
    assert sum(number >= 24 for number in chosen) < 10
    # About twice the jitter of a number's value, which has the mean of two steps behind it.
    assert 0.006 < median(result.noise for result in results) < 0.016


def test_a_tie_goes_to_the_fewest_sms():
    assert tune([0, 8, 16], lambda number, step: 1.0)[0].result.best == 0
    assert tune([16, 8], lambda number, step: 1.0)[0].result.best == 8


def test_ranks_that_measure_different_things_choose_the_same():
    # Rank 0 alone would take 8, rank 1 alone 24; 16 is the one whose slowest rank is fastest.
    by_rank = [{8: 1.0, 16: 2.0, 24: 3.0}, {8: 9.0, 16: 2.5, 24: 1.0}]
    ranks = Ranks(2)

    def body(rank: int) -> object:
        clock = by_rank[rank]
        return tune([8, 16, 24], lambda n, step: clock[n], agree=ranks.agree(rank))

    (first, used), (second, others_used) = ranks.run(body)
    assert first.result == second.result
    assert first.result.best == 16
    assert [c.seconds for c in first.result.candidates] == [9.0, 2.5, 3.0]
    assert used == others_used


def test_ranks_agree_on_noise():
    """Each has its own; the slowest rank of every step counts."""
    ranks = Ranks(2)

    def body(rank: int) -> object:
        clock = warming_up(lambda n: 0.236, steps=15, jitter=0.01, seed=rank)
        return tune(ALL, clock, agree=ranks.agree(rank))

    for _ in range(3):
        (first, used), (second, others_used) = ranks.run(body)
        assert first.result == second.result
        assert first.result.noise > 0
        assert used == others_used


def test_what_one_rank_cannot_try_no_rank_tries():
    ranks = Ranks(2)

    def body(rank: int) -> object:
        def prepare(number: int) -> str | None:
            return "no room" if (rank, number) == (1, 0) else None

        return tune(
            [0, 8, 16], lambda n, step: float(n or 0.1), prepare=prepare, agree=ranks.agree(rank)
        )

    (first, used), (second, others_used) = ranks.run(body)
    assert used == others_used
    assert 0 not in used
    assert first.result.best == second.result.best == 8
    assert [t.result.candidates[0].reason for t in (first, second)] == [
        "not on every rank",
        "no room",
    ]
    assert first.result.candidates[0].seconds == math.inf


def test_one_that_is_left_is_taken_without_trying():
    tuner, used = tune(
        [0, 8, 16],
        lambda number, step: 1.0,
        prepare=lambda number: None if number == 8 else "none here",
    )
    assert used == [24] * WARM_UP + [8]
    assert tuner.result.best == 8


def test_nothing_left_leaves_the_number_as_it_was():
    tuner, used = tune([0, 8], lambda number, step: 1.0, prepare=lambda number: "none here")
    assert used == [24] * WARM_UP + [24]
    assert tuner.result.best is None
    assert [c.reason for c in tuner.result.candidates] == ["none here", "none here"]


def test_numbers_beyond_the_gpu_are_not_prepared(monkeypatch):
    from types import SimpleNamespace

    small = SimpleNamespace(multi_processor_count=32)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: small)
    partition, asked = SMPartition(device=torch.device("cuda", 0), means="none"), []
    tuner = SMTuner(partition, [8, 16, 32], prepare=asked.append, agree=alone)
    while not tuner.done:
        tuner.observe(1.0)
    assert asked == [8, 16]
    assert "leaves compute some of the 32 SMs" in tuner.result.candidates[2].reason


def test_what_does_not_fit_one_gpu_is_prepared_nowhere():
    """Preparing may be collective: a rank that left it out would let the others wait for ever."""
    asked = []
    agreed = iter([[0.0, 1.0], [0.0, 0.0]])  # another rank's GPU has fewer than 64 SMs
    partition = SMPartition(device=CPU)
    tuner = SMTuner(partition, [8, 64], prepare=asked.append, agree=lambda _: next(agreed))
    for _ in range(WARM_UP):
        tuner.observe(1.0)
    assert asked == [8]
    assert tuner.result.best == 8
    assert tuner.result.candidates[1].reason == "not on every rank"


def test_what_was_made_for_the_others_is_given_up_once_the_number_is_fixed():
    partition, seen = SMPartition(device=CPU), []
    tuner = SMTuner(
        partition,
        [8, 16],
        prepare=lambda number: None,
        agree=alone,
        forget=lambda: seen.append(partition.comm_sms),
    )
    while not tuner.done:
        tuner.observe(float(partition.comm_sms or 0))
    assert seen == [8]


def test_numbers_are_checked():
    for numbers in ([], [8, 8]):
        with pytest.raises(ValueError, match="numbers to try, each once"):
            SMTuner(SMPartition(device=CPU), numbers, prepare=str, agree=alone)
