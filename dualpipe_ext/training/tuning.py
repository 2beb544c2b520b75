"""The SMs that communicate in a run: what is asked for, what is tried, what comes out.

What belongs here: which numbers of SMs go with which transport, the tuner of a trainer, and how all
that is said to the user.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from dualpipe_ext import env, hardware_queue
from dualpipe_ext.agreement import largest_of_ranks
from dualpipe_ext.ep import Buffer
from dualpipe_ext.ep.registry import ENVIRONMENT_VARIABLE
from dualpipe_ext.sms import AUTO, Candidate, SMPartition, SMTuner, Tuning, check_comm_sms
from dualpipe_ext.sms import tuner as sm_tuner
from dualpipe_ext.sms.means import depends_on_number


def check_sms(comm_sms: int | str, means: str, transport: str) -> None:
    """Refuse with ``ValueError`` a number of SMs that the transport of that name cannot take."""
    check_comm_sms(comm_sms, means)
    if comm_sms == AUTO or transport == "auto":
        return
    if transport == "collective":
        raise ValueError(
            "expected comm_sms='auto' with transport 'collective', which takes no SMs of its own, "
            f"got {comm_sms}"
        )
    if (transport == "copy_engine") != (comm_sms == 0):
        wanted = "0" if transport == "copy_engine" else "above 0"
        raise ValueError(
            f"expected comm_sms of {wanted} with transport {transport!r}, got {comm_sms}"
        )


def join(partition: SMPartition, buffer: Buffer) -> None:
    """Put the buffer's number into force, and let the buffer follow from then on.

    Raises:
        ValueError: a number was asked for, and the buffer's transport takes another one.
    """
    asked, found = partition.asked, buffer.num_sms
    if asked not in (AUTO, found):
        takes = "takes no SMs of its own" if found is None else f"takes {found}"
        raise ValueError(
            f"expected comm_sms that can be used here, got {asked}: transport "
            f"{buffer.transport!r} {takes}"
        )
    if found is None:
        return
    partition.set(found)
    partition.follow(buffer.use_sms)


def numbers_to_try(transport: str) -> tuple[int, ...]:
    """The candidates with a transport's name as it was asked for, here or by the environment."""
    if transport == "auto":
        transport = env.read(ENVIRONMENT_VARIABLE)
    return {
        "auto": sm_tuner.NUMBERS,
        "nvlink": tuple(number for number in sm_tuner.NUMBERS if number),
    }.get(transport, ())


def make_tuner(
    partition: SMPartition, buffer: Buffer, transport: str, *, steps: int, device: torch.device
) -> SMTuner | None:
    """The tuner of a run that has ``steps`` steps before it; None if there is nothing to tune.

    Called on all ranks, which get the same answer. The longest part of a run should be one with the
    number that was found: runs of less than twice the steps that tuning takes are left alone.
    """
    numbers = numbers_to_try(transport)
    few = steps < 2 * sm_tuner.num_steps(len(numbers))
    if partition.asked != AUTO or buffer.num_sms is None or len(numbers) < 2 or few:
        return None
    return SMTuner(
        partition,
        numbers,
        prepare=buffer.cannot_use_sms,
        agree=partial(largest_of_ranks, device, None),
        forget=buffer.forget_unused,
    )


def described(partition: SMPartition, tuner: SMTuner | None) -> str:
    """What a run's table says of the SMs."""
    number = partition.comm_sms
    if number is None:
        return "none of its own"
    text = "copy engines" if number == 0 else f"{number} of {partition.num_sms} SMs"
    if partition.means != "none" and (number or not depends_on_number(partition.means)):
        text += f", compute told by {partition.means}"
    if tuner is not None:
        text += ", tuned" if tuner.done else ", being tuned"
    elif partition.asked == AUTO:
        text += ", the transport's own"
    if hardware_queue.is_shared():
        text += f"; one hardware queue ({hardware_queue.VARIABLE}=1), which hides less"
    return text


def tuning_lines(tuning: Tuning) -> list[str]:
    """The candidates with their times, the choice and its reason, for the terminal."""
    lines = []
    for candidate in tuning.candidates:
        name = "copy engines" if candidate.comm_sms == 0 else f"{candidate.comm_sms} SMs"
        what = candidate.reason
        if math.isfinite(candidate.seconds):
            what = f"{candidate.seconds * 1e3:,.2f} ms a step"
        mark = " <- from now on" if candidate.comm_sms == tuning.best else ""
        lines.append(f"{name:>12}  {what}{mark}")
    if len(_timed(tuning)) > 1:
        lines.append(
            f"the fewest SMs within noise of the fastest, {tuning.noise * 1e3:,.2f} ms by the "
            f"spread of {sm_tuner.ROUNDS} rounds"
        )
    return lines


def times_tried(tuning: Tuning) -> str:
    """The same in one line, for the summary: only what was timed."""
    timed = _timed(tuning)
    if not timed:
        return "none"
    times = ", ".join(f"{c.comm_sms}: {c.seconds * 1e3:,.2f} ms" for c in timed)
    return f"{times} (noise {tuning.noise * 1e3:,.2f} ms)"


def _timed(tuning: Tuning) -> list[Candidate]:
    return [c for c in tuning.candidates if math.isfinite(c.seconds)]
