"""What does a Megatron-Core MoE layer spend on moving tokens, with its dispatcher and with ours?

One call is what a layer does around its experts, which here hand back the rows they get: the
dispatcher's preparation, dispatch, postprocess, ``tokens_per_expert.tolist()``, and combine; "both"
adds the backward, in which gradients of tokens and of routing weights flow. Compared: Megatron's
alltoall dispatcher (NCCL), and its flex dispatcher with ``dualpipe_ext.integrations.megatron``.
Without Transformer Engine, which this does not use, alltoall permutes with torch. Before anything
is timed, outputs and gradients are checked against alltoall's. Routing is random, the same in every
call, and found anew in each. Protocol: ``dualpipe_ext/bench/timing.py``. The peak is that of
torch's memory in a forward and backward, beyond what was there before, communication memory apart.

    python benchmarks/megatron_dispatcher.py [--tokens 4096] [--hidden 7168] [--experts 256]

Needs megatron-core and two Hopper GPUs of one host or more. Appends rows to
benchmarks/results/megatron.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from dualpipe_ext.bench import ranks as bench_ranks
from dualpipe_ext.bench.record import percentiles
from dualpipe_ext.bench.script import Row, add_numbers, run
from dualpipe_ext.bench.timing import interleaved

# Two roundings of a sum of BF16 rows, in another order each.
_TOLERANCE = 2**-6


@dataclass(frozen=True, slots=True)
class Options:
    tokens: int
    hidden: int
    experts: int
    top_k: int
    rounds: int
    calls: int
    num_sms: int


@dataclass(frozen=True, slots=True)
class Layer:
    """A dispatcher and the inputs of its calls."""

    dispatcher: Any
    x: Tensor
    routed: Tensor
    probs: Tensor
    grad_y: Tensor

    def forward(self) -> tuple[Tensor, Tensor]:
        """The output, and the weights of the rows that experts got."""
        d = self.dispatcher
        rows, probs = d.dispatch_preprocess(self.x, self.routed, self.probs)
        rows, probs = d.token_dispatch(rows, probs)
        rows, sizes, probs = d.dispatch_postprocess(rows, probs)
        sizes.tolist()
        y = d.combine_postprocess(d.token_combine(d.combine_preprocess(rows)))
        return y, probs

    def both(self) -> tuple[Tensor, ...]:
        """The output, and the gradients of tokens and of routing weights."""
        y, probs = self.forward()
        gradients = (self.grad_y, torch.ones_like(probs))
        return y, *torch.autograd.grad((y, probs), (self.x, self.probs), gradients)


def make_layer(kind: str, options: Options, ranks: bench_ranks.Ranks) -> Layer:
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=options.hidden,
        num_attention_heads=8,
        num_moe_experts=options.experts,
        moe_router_topk=options.top_k,
        expert_model_parallel_size=ranks.num_ranks,
        moe_token_dispatcher_type=kind,
        add_bias_linear=False,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    per_rank = options.experts // ranks.num_ranks
    first = ranks.rank * per_rank
    name = {"alltoall": "MoEAlltoAllTokenDispatcher", "flex": "MoEFlexTokenDispatcher"}[kind]
    dispatcher = getattr(token_dispatcher, name)(
        per_rank,
        list(range(first, first + per_rank)),
        config=config,
        pg_collection=get_default_pg_collection(),
    )
    gen = torch.Generator(ranks.device).manual_seed(ranks.rank)
    how = {"generator": gen, "device": ranks.device}
    x, grad_y = (torch.randn(options.tokens, options.hidden, **how).bfloat16() for _ in range(2))
    scores = torch.rand(options.tokens, options.experts, **how)
    best, chosen = scores.topk(options.top_k, dim=1)
    routed = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
    probs = torch.zeros_like(scores).scatter_(1, chosen, best)
    return Layer(dispatcher, x.requires_grad_(), routed, probs.requires_grad_(), grad_y)


def check(layers: dict[str, Layer], ranks: bench_ranks.Ranks) -> None:
    """Outputs and gradients of all are those of the first, on every rank."""
    first, *others = layers.values()
    wanted = first.both()
    what = ("outputs", "gradients of tokens", "gradients of routing weights")
    for layer in others:
        found = layer.both()
        for name, got, want in zip(what, found, wanted, strict=True):
            got, want = got.detach(), want.detach()
            if name == what[-1]:  # a choice that was not made has none
                got, want = got * layer.routed, want * layer.routed
            error = float((got.float() - want.float()).abs().max() / want.float().abs().max())
            if not error <= _TOLERANCE:
                raise ValueError(
                    f"expected {name} within {_TOLERANCE:.3g} of alltoall's, got {error:.3g}"
                )


def peak_mib(call: Callable[[], object]) -> float:
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(ranks: bench_ranks.Ranks, options: Options) -> list[Row]:
    """Rows of all variants; called on every rank."""
    from megatron.core import parallel_state

    from dualpipe_ext.integrations import megatron as integration

    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks.num_ranks)
    variants = {
        "alltoall": ("alltoall", "", ""),
        "nvlink": ("flex", "nvlink", options.num_sms),
        "copy_engine": ("flex", "copy_engine", 0),
    }
    layers = {}
    for name, (dispatcher, transport, num_sms) in variants.items():
        if transport:
            integration.install(transport=transport, num_sms=num_sms or None)
        layers[name] = make_layer(dispatcher, options, ranks)
    ranks.together(lambda: check(layers, ranks))
    peaks = {name: ranks.maxima([peak_mib(layer.both)])[0] for name, layer in layers.items()}
    calls = {(n, p): getattr(la, p) for n, la in layers.items() for p in ("forward", "both")}
    times = interleaved(calls, ranks, rounds=options.rounds, num_calls=options.calls)
    return [
        {
            "megatron_core": metadata.version("megatron-core"),
            "dispatcher": dispatcher,
            "transport": transport,
            "num_sms": num_sms,
            "ranks": ranks.num_ranks,
            "tokens": options.tokens,
            "hidden": options.hidden,
            "experts": options.experts,
            "top_k": options.top_k,
            "rounds": options.rounds,
            "peak_mib": round(peaks[name], 1),
            **{
                f"{part}_us_{p}": round(value, 1)
                for part in ("forward", "both")
                for p, value in percentiles(times[name, part]).items()
            },
        }
        for name, (dispatcher, transport, num_sms) in variants.items()
    ]


def line(row: Row) -> str:
    return (
        f"{row['dispatcher']:9} {row['transport']:12} forward {row['forward_us_p50']:8.1f} us, "
        f"with backward {row['both_us_p50']:8.1f} us, peak {row['peak_mib']:7.1f} MiB"
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = {"tokens": 4096, "hidden": 7168, "experts": 256, "top-k": 8}
    add_numbers(parser, {**defaults, "rounds": 5, "calls": 10, "num-sms": 24})
    options = Options(**vars(parser.parse_args(arguments)))
    command = ["python benchmarks/megatron_dispatcher.py", *arguments]
    run("megatron", command, measure, options, line)


if __name__ == "__main__":
    main(sys.argv[1:])
