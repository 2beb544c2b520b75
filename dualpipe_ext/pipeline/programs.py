"""The schedules themselves: which operations each rank performs, in which order.

What belongs here: one function per schedule that writes a rank's *program*, a string with one
letter per step. Chunk numbers are not part of a program: on every stage each kind of operation
takes its chunks in ascending order, so the order of the letters says everything (``plan.py`` fills
in the numbers). Pure Python, no torch, no NumPy.

A rank runs one or two stages. Upper-case letters act on its first stage, lower-case letters on its
second one:

====== =================================================================================
letter step
====== =================================================================================
F  f   forward
B  b   full backward
I  i   backward for the input's gradient only
W  w   backward for the weights' gradient, of the oldest ``I``/``i`` of that stage without one
X  x   overlapped pair: forward of this stage with a full backward of the *other* one
====== =================================================================================

P ranks, r this rank, m chunks (micro-batches).
"""

from __future__ import annotations


def one_f_one_b(num_ranks: int, rank: int, num_chunks: int) -> str:
    """1F1B (PipeDream-flush): after P-1-r forwards, one forward and one backward in turn."""
    warmup = min(num_ranks - 1 - rank, num_chunks)
    return "F" * warmup + "FB" * (num_chunks - warmup) + "B" * warmup


def zb_h1(num_ranks: int, rank: int, num_chunks: int) -> str:
    """ZB-H1 (Qi et al., 2023, "Zero Bubble Pipeline Parallelism"), called ZB1P by DeepSeek.

    1F1B with the backward split. Rank r lets its weight gradients lag r chunks behind, which is
    as many as it may without holding more activations than the first rank does (P chunks), and
    fills the bubble at the end with them.
    """
    warmup = min(num_ranks - 1 - rank, num_chunks)
    # With fewer chunks than ranks the lag is not reached before the forwards run out.
    lagging = min(rank, num_chunks - warmup)
    lagging_late = min(rank - lagging, warmup)
    return (
        "F" * warmup
        + "FI" * lagging
        + "FIW" * (num_chunks - warmup - lagging)
        + "I" * lagging_late
        + "IW" * (warmup - lagging_late)
        + "W" * (lagging + lagging_late)
    )


def zb_v(num_ranks: int, rank: int, num_chunks: int) -> str:
    """ZB-V (Qi et al., 2024, "Pipeline Parallelism with Controllable Memory"): two stages, a V.

    No bubble but the P-1 forwards of filling when F, I and W take equally long, with the
    activations of 1F1B. With fewer than 2P-1 chunks it is the schedule for 2P-1 less the chunks
    that are not there, which leaves the order of the others intact.
    """
    full = max(num_chunks, 2 * num_ranks - 1)
    below = num_ranks - rank
    program = (
        "F" * (2 * below - 1)
        + "fF" * rank
        + "fiw" * below
        + "FIWfiw" * (full - 2 * num_ranks + rank + 1)
        + "IWfiw" * (below - 1)
        + "Ii" * rank
        + "IW" * below
        + "w" * rank
        + "W" * rank
    )
    return program if full == num_chunks else _first_of_each(program, num_chunks)


def dualpipe_v(num_ranks: int, rank: int, num_chunks: int) -> str:
    """DualPipeV: DualPipe cut in half; a chunk goes down the ranks and up again. Needs m >= 2P.

    Eight steps, after the schedule published in https://github.com/deepseek-ai/DualPipe.
    """
    depth = rank + 1  # ranks from here up to where chunks enter
    below = num_ranks - depth  # ranks from here down to where the V turns
    # At the turn the published order leaves the first pair apart: so early, the result of the
    # forward is waited for, and in a pair it would come at the end of the backward.
    first_pair = "Fb" if below == 0 else "X"
    main_rounds = num_chunks - 2 * num_ranks + depth
    main = first_pair + "x" + "Xx" * (main_rounds - 1)
    # Of the last 2*depth backwards the second half leaves its weight gradients for later.
    last = "bB" * depth
    last = last[:depth] + last[depth:].replace("b", "i").replace("B", "I")
    weights = last[depth:].replace("i", "w").replace("I", "W") + "W" * below
    return (
        "F" * (2 * below)
        + "Ff" * depth
        + "iwf" * below
        + main
        + "bx" * below
        + last
        + "".join(weight + "I" for weight in weights[:below])
        + weights[below:]
    )


def dualpipe(num_ranks: int, rank: int, num_chunks: int) -> str:
    """DualPipe: chunks enter at both ends. Needs P and m even, and m >= 2P (m counts both pipes).

    The upper half of the ranks does what DualPipeV does on P/2 ranks with m/2 chunks; the lower
    half is its mirror image, with the two directions exchanged.
    """
    half = num_ranks // 2
    if rank < half:
        return dualpipe_v(half, rank, num_chunks // 2)
    return dualpipe_v(half, num_ranks - 1 - rank, num_chunks // 2).swapcase()


def _first_of_each(program: str, count: int) -> str:
    """The program without those steps of each letter that come after its first ``count``."""
    seen = dict.fromkeys(program, 0)
    kept = []
    for letter in program:
        seen[letter] += 1
        if seen[letter] <= count:
            kept.append(letter)
    return "".join(kept)
