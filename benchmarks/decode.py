"""What does a decoding step spend on moving tokens of a layer, in a CUDA graph?

A step is what a server replays: routing found anew from expert ids, a dispatch that quantises to
FP8 with the routing weights beside it, and a combine of BF16 rows (which stand for the experts'),
by token or, weighted, from expert rows. The host waits for nothing: outputs have as many rows as
any rank gets. "groups" is what DeepEP's low-latency calls do: expert rows in groups of fixed size,
for masked GEMMs, and weights that go to the experts in the combine. Compared: the kernels for any
number of tokens ("nvlink") and those for few ("low_latency"), each with the same SMs. Before
anything is timed, their results are compared bit for bit. A graph holds some steps, one after the
other; routing is random, the same in every step.
Protocol: ``dualpipe_ext/bench/timing.py``.

    python benchmarks/decode.py [--tokens 32,128,512] [--hidden 7168] [--experts 256]

Needs two Hopper GPUs of one host or more. Appends rows to benchmarks/results/decode.csv.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dualpipe_ext.bench import ranks as bench_ranks
from dualpipe_ext.bench.record import percentiles
from dualpipe_ext.bench.script import Row, add_numbers, run
from dualpipe_ext.bench.timing import Series, captured, interleaved
from dualpipe_ext.ep import Buffer, ExpertMajor, Handle, TokenMajor

TRANSPORTS = ("nvlink", "low_latency")
LAYOUTS = ("token", "expert", "groups")
PARTS = ("dispatch", "combine", "step")


@dataclass(frozen=True, slots=True)
class Options:
    tokens: tuple[int, ...]
    hidden: int
    experts: int
    top_k: int
    sms: tuple[int, ...]
    rounds: int
    calls: int


@dataclass(frozen=True, slots=True)
class Inputs:
    """Of one rank, of some number of tokens."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor


def draw(num_tokens: int, options: Options, ranks: bench_ranks.Ranks) -> Inputs:
    gen = torch.Generator(ranks.device).manual_seed(ranks.rank)
    how = {"generator": gen, "device": ranks.device}
    best = torch.rand(num_tokens, options.experts, **how).topk(options.top_k)
    x = torch.randn(num_tokens, options.hidden, **how).bfloat16()
    return Inputs(x, best.indices, best.values)


class Step:
    """One way to move the tokens of a step."""

    def __init__(
        self, transport: str, num_sms: int, layout: str, inputs: Inputs, options: Options
    ) -> None:
        self._inputs, self._layout = inputs, layout
        self._buffer = Buffer(
            hidden=options.hidden,
            num_experts=options.experts,
            top_k=options.top_k,
            max_tokens=len(inputs.x),
            transport=transport,
            num_sms=num_sms,
            num_slabs=0,
        )

    def room(self, ranks: bench_ranks.Ranks) -> int:
        """The most rows that any rank gets."""
        recv, _ = self._buffer.dispatch(self._inputs.x, self._inputs.topk_idx, layout=self._layout)
        return int(ranks.maxima([float(len(recv.tokens))])[0])

    def prepare(self, room: int) -> None:
        """Fix the number of rows, and make what the experts would have made."""
        self._room = room
        recv, self._handle = self.dispatch()
        self._weights = recv.weights if self._layout == "expert" else None
        self._rows = recv.dequantize().bfloat16()

    def dispatch(self) -> tuple[TokenMajor | ExpertMajor, Handle]:
        given = self._inputs
        how = {"layout": self._layout, "max_recv_tokens": self._room, "fp8": True}
        return self._buffer.dispatch(given.x, given.topk_idx, given.topk_weights, **how)

    def received(self) -> tuple[Tensor, Tensor]:
        """Rows and scales, without those that nobody wrote."""
        recv, _ = self.dispatch()
        return recv.tokens, recv.scales

    def combine(self) -> Tensor:
        return self._combine(self._handle)

    def _combine(self, handle: Handle) -> Tensor:
        return self._buffer.combine(self._rows, handle, weights=self._weights)[0]

    def step(self) -> Tensor:
        _, handle = self.dispatch()
        return self._combine(handle)

    def check(self) -> None:
        torch.cuda.synchronize()
        self._buffer.check()


class GroupStep(Step):
    """With groups of fixed size, and weights that come late."""

    def room(self, ranks: bench_ranks.Ranks) -> int:
        """Rows of a group, in which all tokens of all ranks have room."""
        return ranks.num_ranks * len(self._inputs.x)

    def dispatch(self) -> tuple[ExpertMajor, Handle]:
        how = {"layout": "expert", "rows_per_expert": self._room, "fp8": True}
        return self._buffer.dispatch(self._inputs.x, self._inputs.topk_idx, **how)

    def received(self) -> tuple[Tensor, Tensor]:
        recv, _ = self.dispatch()
        place = torch.arange(self._room, device=recv.counts.device)
        filled = (place < recv.counts.unsqueeze(1)).flatten()
        return recv.tokens.view(torch.uint8)[filled], recv.scales[filled]

    def _combine(self, handle: Handle) -> Tensor:
        weights, _ = self._buffer.dispatch_weights(self._inputs.topk_weights, handle)
        return self._buffer.combine(self._rows, handle, weights=weights)[0]


def expect_same(steps: dict[tuple[str, int], Step]) -> None:
    """Bits of all are those of the first."""
    first, *others = steps.values()
    wanted = (*first.received(), first.step())
    for other in others:
        for got, want in zip((*other.received(), other.step()), wanted, strict=True):
            if not torch.equal(got.view(torch.uint8), want.view(torch.uint8)):
                raise ValueError("expected the same bits from all transports, got others")


def _in_a_graph(call: Callable[[], object], times: int) -> Series:
    def several() -> None:
        for _ in range(times):
            call()

    call()
    replay = captured(several)
    return Series(replay, replay, times)


@torch.no_grad()
def measure(ranks: bench_ranks.Ranks, options: Options) -> list[Row]:
    """Rows of all variants; called on every rank."""
    found = []
    for num_tokens in options.tokens:
        inputs = draw(num_tokens, options, ranks)
        for layout in LAYOUTS:
            kind = GroupStep if layout == "groups" else Step
            steps = {
                (name, sms): kind(name, sms, layout, inputs, options)
                for name in TRANSPORTS
                for sms in options.sms
            }
            room = next(iter(steps.values())).room(ranks)
            for step in steps.values():
                step.prepare(room)
            ranks.together(functools.partial(expect_same, steps))
            calls = {
                (key, part): _in_a_graph(getattr(step, part), options.calls)
                for key, step in steps.items()
                for part in PARTS
            }
            times = interleaved(calls, ranks, rounds=options.rounds, num_calls=options.calls)
            for (name, sms), step in steps.items():
                step.check()
                found.append(
                    {
                        "transport": name,
                        "num_sms": sms,
                        "layout": layout,
                        "ranks": ranks.num_ranks,
                        "tokens": num_tokens,
                        "hidden": options.hidden,
                        "experts": options.experts,
                        "top_k": options.top_k,
                        "rounds": options.rounds,
                        "calls": options.calls,
                        **{
                            f"{part}_us_{p}": round(value, 2)
                            for part in PARTS
                            for p, value in percentiles(times[(name, sms), part]).items()
                        },
                    }
                )
    return found


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def line(row: Row) -> str:
    numbers = ", ".join(f"{part} {row[f'{part}_us_p50']:6.1f} us" for part in PARTS)
    return (
        f"{row['tokens']:4} tokens, by {row['layout']:6} {row['transport']:11} "
        f"{row['num_sms']:3} SMs: {numbers}"
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=_numbers, default=(32, 128, 512))
    parser.add_argument("--sms", type=_numbers, default=(32, 128))
    add_numbers(parser, {"hidden": 7168, "experts": 256, "top-k": 8, "rounds": 7, "calls": 20})
    options = Options(**vars(parser.parse_args(arguments)))
    run("decode", ["python benchmarks/decode.py", *arguments], measure, options, line)


if __name__ == "__main__":
    main(sys.argv[1:])
