"""How should the SMs of dispatch and combine be divided? Variants of ``dualpipe_ext/ep/tuning.py``.

    python benchmarks/ep_tuning.py [--sms 8,24,64] [--cases own,fp8_buffer] \
        [--change send_ctas=12 --change fp8_buffer:send_warps=8,send_stages=3]
    python benchmarks/ep_tuning.py --copies in_turn:8,in_turn:4-8,at_once:2-5-8 [--sms 16,32]

Every case is measured as ``tuning.py`` has it, then with each ``--change`` of fields of ``Tuning``
that is for it (or for all).
With ``--copies`` the copy engines are measured, with SMs to pack and unpack: as ``tuning.py`` has
them, then with rows to one peer after the other (``in_turn``; ``in_turn_early``: ranks do not wait
for each other's first part) or to all at once, in parts that end at those eighths of a segment.
Alone it stands for all three in 1, 2, 3 and 8 parts.

Needs two GPUs or more (and does nothing elsewhere); 4096 tokens per rank x 7168, 256 experts,
top-8, cached handles. Prints microseconds a call, of the slowest rank, the median of three rounds:
15 calls in a CUDA graph, and 15 from Python. For comparing variants; ``dualpipe bench ep`` checks
results and keeps records.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext.ep import Buffer, quantize, tuning
from dualpipe_ext.launch import run_ranks

TOKENS, HIDDEN, EXPERTS, TOP_K = 4096, 7168, 256, 8
CALLS, ROUNDS = 15, 3
CASES = (
    "buffer",
    "own",
    "expert",
    "fp8_buffer",
    "fp8_own",
    "fp8_given",
    "fp8_expert",
    "combine",
    "combine_expert",
)
# Of copies: attributes of the transport.
WAYS = {
    "in_turn": {"in_turn": True, "begin_together": True},
    "in_turn_early": {"in_turn": True, "begin_together": False},
    "at_once": {"in_turn": False, "begin_together": False},
}
COPIES = ",".join(
    f"{way}:{ends}" for way in WAYS for ends in ("8", "3-8", "4-8", "2-5-8", "1-2-3-4-5-6-7-8")
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sms", default="8,24,64")
    parser.add_argument("--cases")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--change", action="append", default=[])
    how.add_argument("--copies", nargs="?", const=COPIES)
    options = parser.parse_args(arguments)
    if torch.cuda.device_count() < 2:
        print(f"nothing to compare: {torch.cuda.device_count()} GPUs, needs two", file=sys.stderr)
        return 0
    # Copy engines leave nothing in the buffer.
    known = [case for case in CASES if options.copies is None or not case.endswith("buffer")]
    cases = options.cases.split(",") if options.cases else known
    if unknown := set(cases) - set(known):
        parser.error(f"expected --cases of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    sms = [int(word) for word in options.sms.split(",")]
    if options.copies is None:
        transport, changes = "nvlink", list(map(parse_change, options.change))
    else:
        transport, changes = "copy_engine", list(map(parse_copies, options.copies.split(",")))
    ranks = torch.cuda.device_count()
    run_ranks(measure_all, ranks, transport, sms, cases, [{}, *changes], backend="nccl")
    return 0


def parse_change(text: str) -> dict[str, Any]:
    """``own:send_ctas=12,send_warps=8`` as keyword arguments of ``Tuning``, and ``case``."""
    known = {field.name for field in dataclasses.fields(tuning.Tuning)}
    change: dict[str, Any] = {}
    case, _, fields = text.rpartition(":")
    if case:
        change["case"] = case
    for part in fields.split(","):
        name, _, value = part.partition("=")
        if name not in known or not value.isdigit():
            raise SystemExit(f"expected --change FIELD=NUMBER of {sorted(known)}, got {part!r}")
        change[name] = int(value)
    return change


def parse_copies(text: str) -> dict[str, Any]:
    """``in_turn:4-8`` as attributes of the transport."""
    way, _, ends = text.partition(":")
    parts = tuple(int(end) for end in ends.split("-") if end.isdigit())
    ascending = list(parts) == sorted(set(parts))
    if way not in WAYS or not ascending or parts[-1:] != (tuning.SEGMENT_UNITS,):
        raise SystemExit(f"expected --copies WAY:4-8 with a WAY of {[*WAYS]}, got {text!r}")
    return {**WAYS[way], "part_ends": parts}


def for_case(case: str, changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that are for the case or for all, without saying so."""
    fitting = [change for change in changes if change.get("case", case) == case]
    return [{k: v for k, v in change.items() if k != "case"} for change in fitting]


@contextmanager
def with_change(transport: Any, change: dict[str, Any]) -> Iterator[None]:
    """Calls are planned with the change, and after it without."""
    names = ("for_dispatch", "for_combine") if transport.name == "nvlink" else change
    target = tuning if transport.name == "nvlink" else transport
    before = {name: getattr(target, name) for name in names}
    for name, value in before.items():
        changed_to = changed(value, change) if transport.name == "nvlink" else change[name]
        setattr(target, name, changed_to)
    # Plans are kept: without this the change would not be seen.
    transport.forget_plans()
    yield
    for name, value in before.items():
        setattr(target, name, value)
    transport.forget_plans()


@torch.no_grad()
def measure_all(
    transport: str, sms: list[int], cases: list[str], changes: list[dict[str, Any]]
) -> None:
    """On every rank: each case with each change, on each number of SMs."""
    for num_sms in sms:
        buffer = Buffer(
            hidden=HIDDEN,
            num_experts=EXPERTS,
            top_k=TOP_K,
            max_tokens=TOKENS,
            transport=transport,
            num_sms=num_sms,
            # Every graph keeps a slab.
            num_slabs=1 + len(cases) * len(changes),
        )
        for case in cases:
            call = make_call(buffer, case)
            for change in for_case(case, changes):
                with with_change(buffer._transport, change):
                    line = measured(call)
                if dist.get_rank() == 0:
                    print(f"{num_sms:4} {case:15} {line}  {change or ''}", flush=True)
        buffer.check()
        del call, buffer


def measured(call: Callable[[], object]) -> str:
    """Microseconds of a call in a graph and from Python; or why it cannot be launched so."""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        # All ranks have the same tuning, so all of them come here.
        return f"{error}"
    return "{:8.1f} {:8.1f}".format(*microseconds(call))


def changed(
    plan: Callable[..., tuning.Tuning], change: dict[str, int]
) -> Callable[..., tuning.Tuning]:
    return lambda *arguments: dataclasses.replace(plan(*arguments), **change)


def make_call(buffer: Buffer, case: str) -> Callable[[], object]:
    """The call to be measured, with a handle of its own."""
    gen = torch.Generator("cuda").manual_seed(dist.get_rank())
    x = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16, generator=gen)
    scores = torch.rand(TOKENS, EXPERTS, device="cuda", generator=gen)
    idx = scores.argsort(dim=1)[:, :TOP_K].contiguous()
    weights = torch.rand(TOKENS, TOP_K, device="cuda", generator=gen)
    layout = "expert" if case.endswith("expert") else "token"
    recv, handle = buffer.dispatch(
        x, idx, weights, layout=layout, zero_copy=case.endswith("buffer")
    )
    if case.startswith("combine"):
        rows: Tensor = recv.tokens.clone()
        factors = recv.weights.clone() if layout == "expert" else None
        return lambda: buffer.combine(rows, handle, weights=factors)
    if case == "fp8_given":
        quantized = tuple(quantize(x))
        return lambda: buffer.dispatch(quantized, None, weights, handle=handle, fp8=True)
    fp8 = case.startswith("fp8")
    return lambda: buffer.dispatch(x, None, weights, handle=handle, fp8=fp8)


def microseconds(call: Callable[[], object]) -> tuple[float, float]:
    """Of one call: in a CUDA graph, and from Python."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()

    def eager() -> None:
        for _ in range(CALLS):
            call()

    return median_us(graph.replay), median_us(eager)


def median_us(calls: Callable[[], object]) -> float:
    calls()
    rounds = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        calls()
        end.record()
        torch.cuda.synchronize()
        slowest = torch.tensor([start.elapsed_time(end) / CALLS * 1e3], device="cuda")
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        rounds.append(slowest.item())
    return statistics.median(rounds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
