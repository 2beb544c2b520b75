"""How fast are the products of a layer of experts, in BF16 and in FP8, on some or all SMs?

Protocol: rows fall on experts at random, as many in all as ``rows`` per expert. Results are checked
before they are timed: BF16 against a float32 product of each expert, FP8 against BF16 within what
three bits of mantissa cost. Then rounds, in each of which every variant is timed once, many calls
in a row between two events (see ``timing.py``).

- torch: ``torch._grouped_mm`` in BF16, on all SMs.
- persistent: our BF16 kernel, on ``sms`` SMs.
- short: the same kernel in CTAs that make room for kernels of higher priority, on all SMs;
  fp8-short likewise.
- fp8: our FP8 kernel on ``sms`` SMs, from operands that are quantised already; for the weight
  gradient with the second quantising along the rows, which only serves it.
- The weight gradient is timed once more where it is added to what is there, as by every micro-batch
  of a step but the first (``weight_grad_add``): torch in two operations, ours by the same kernel.
- quantize: of the rows of a product (for forward and input gradient), and of the weights (once per
  step, for both directions); on all SMs.

TFLOP/s count 2 x rows x K x N of the rows there are, not of padded tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dualpipe_ext.bench import timing
from dualpipe_ext.bench.ranks import Ranks
from dualpipe_ext.bench.record import percentiles
from dualpipe_ext.bench.timing import Call
from dualpipe_ext.ep.fp8 import quantize
from dualpipe_ext.kernels.fp8_format import BLOCK
from dualpipe_ext.kernels.fp8_gemm import (
    grouped_mm_fp8,
    grouped_mm_fp8_weight_grad,
    quantize_weights,
)
from dualpipe_ext.kernels.grouped_gemm import (
    SHORT_CTAS,
    group_bounds,
    grouped_mm,
    grouped_mm_weight_grad,
)

Row = dict[str, object]
# Relative errors in the norm. BF16 rounds to 2^-9 at most. E4M3 is off by 2^-5 in the root mean
# square at most, for either operand.
_BF16_ERROR, _FP8_ERROR = 2.0**-9, 2.0**-4.5


@dataclass(frozen=True, slots=True)
class GemmOptions:
    """What ``dualpipe bench gemm`` measures; DeepSeek-V3's experts unless said otherwise.

    Attributes:
        experts: groups G.
        rows: rows per expert, on average.
        hidden: H; products are [rows, H] x [H, 2 I] and [rows, I] x [I, H].
        inner: I.
        sms: limits on the SMs to measure with; 0 for none.
        rounds: numbers per variant.
        calls: calls in a row behind a number.
        seed: of the data.
    """

    experts: int = 128
    rows: int = 256
    hidden: int = 7168
    inner: int = 2048
    sms: tuple[int, ...] = (0, 112)
    rounds: int = 5
    calls: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("experts", "rows", "hidden", "inner", "rounds", "calls"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected --{name} of at least 1, got {getattr(self, name)}")
        for name in ("hidden", "inner"):
            if getattr(self, name) % BLOCK:
                raise ValueError(
                    f"expected --{name} to be a multiple of {BLOCK}, got {getattr(self, name)}"
                )
        if not self.sms or min(self.sms) < 0:
            raise ValueError(f"expected --sms of at least 0, got {self.sms}")

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """K and N of the two layers of an expert."""
        return (self.hidden, 2 * self.inner), (self.inner, self.hidden)


def run(ranks: Ranks, options: GemmOptions) -> list[Row]:
    """Check and time the products of both layers; a row for each variant.

    Raises:
        AssertionError: a result is wrong.
    """
    return [row for k, n in options.shapes for row in _measure(ranks, options, k, n)]


def _measure(ranks: Ranks, options: GemmOptions, size_k: int, size_n: int) -> list[Row]:
    x, w, grad, offsets = _layer(options, size_k, size_n, ranks.device)
    total = torch.zeros_like(w)
    products = _products(options, x, w, grad, offsets, total)
    _check(products, x, w, offsets, total)
    calls = {(p, v): call for p, variants in products.items() for v, call in variants.items()}
    how = {"rounds": options.rounds, "num_calls": options.calls}
    times = timing.interleaved({"|".join(key): call for key, call in calls.items()}, ranks, **how)
    flop = 2 * len(x) * size_k * size_n
    rows: list[Row] = []
    for name, values in times.items():
        product, variant = name.split("|")
        kind, _, sms = variant.partition("@")
        found = {f"us_{p}": round(us, 2) for p, us in percentiles(values).items()}
        tflops = "" if product == "quantize" else round(flop / found["us_p50"] / 1e6, 1)
        rows.append(
            {
                "experts": options.experts,
                "rows": len(x),
                "k": size_k,
                "n": size_n,
                "product": product,
                "variant": kind,
                "sms": sms,
                **found,
                "tflops": tflops,
                "rounds": options.rounds,
                "calls": options.calls,
            }
        )
    return rows


def _layer(
    options: GemmOptions, size_k: int, size_n: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(options.seed)
    draw = {"generator": generator, "device": device}
    num_rows = options.experts * options.rows
    owner = torch.randint(options.experts, (num_rows,), **draw)
    ends = torch.bincount(owner, minlength=options.experts).cumsum(0).to(torch.int32)
    x = torch.randn(num_rows, size_k, **draw, dtype=torch.bfloat16)
    w = torch.randn(options.experts, size_k, size_n, **draw, dtype=torch.bfloat16)
    grad = torch.randn(num_rows, size_n, **draw, dtype=torch.bfloat16)
    return x, w, grad, ends


def _products(
    options: GemmOptions, x: Tensor, w: Tensor, grad: Tensor, offsets: Tensor, total: Tensor
) -> dict[str, dict[str, Call]]:
    """The calls by product and variant; "@" and a number after it limit the SMs.

    "short" is for short CTAs, which make room for kernels of higher priority.
    """
    rows, grads = quantize(x, pow2_scales=True), quantize(grad, pow2_scales=True)
    forward, backward = quantize_weights(w)
    turned, add_to = w.transpose(1, 2), {"total": total}
    products: dict[str, dict[str, Call]] = {
        "forward": {"torch": lambda: grouped_mm(x, w, offsets)},
        "input_grad": {"torch": lambda: grouped_mm(grad, turned, offsets)},
        "weight_grad": {"torch": lambda: grouped_mm_weight_grad(x, grad, offsets)},
        "weight_grad_add": {"torch": lambda: grouped_mm_weight_grad(x, grad, offsets, **add_to)},
        "quantize": {
            "rows": lambda: quantize(x, pow2_scales=True),
            "weights": lambda: quantize_weights(w),
        },
    }

    def add(bf16: str, fp8: str, max_sms: int) -> None:
        limit = {"max_sms": max_sms}
        ours: dict[str, tuple[Call, Call]] = {
            "forward": (
                lambda: grouped_mm(x, w, offsets, **limit),
                lambda: grouped_mm_fp8(rows, forward, offsets, **limit),
            ),
            "input_grad": (
                lambda: grouped_mm(grad, turned, offsets, **limit),
                lambda: grouped_mm_fp8(grads, backward, offsets, **limit),
            ),
            "weight_grad": (
                lambda: grouped_mm_weight_grad(x, grad, offsets, **limit),
                lambda: grouped_mm_fp8_weight_grad(rows, grads, offsets, **limit),
            ),
            "weight_grad_add": (
                lambda: grouped_mm_weight_grad(x, grad, offsets, **add_to, **limit),
                lambda: grouped_mm_fp8_weight_grad(rows, grads, offsets, **add_to, **limit),
            ),
        }
        for name, calls in ours.items():
            products[name] |= dict(zip((bf16, fp8), calls, strict=True))

    num_sms = _num_sms(x.device)
    for sms in dict.fromkeys(min(sms or num_sms, num_sms) for sms in options.sms):
        add(f"persistent@{sms}", f"fp8@{sms}", sms)
    add("short", "fp8-short", SHORT_CTAS)
    return products


def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check(
    products: Mapping[str, Mapping[str, Call]],
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    total: Tensor,
) -> None:
    """Raise AssertionError unless all variants of a product agree."""
    exact = torch.zeros(len(x), w.shape[2], device=x.device)
    for group, (start, end) in enumerate(group_bounds(offsets)):
        exact[start:end] = x[start:end].float() @ w[group].float()
    _expect_near("forward torch", products["forward"]["torch"](), exact, _BF16_ERROR)
    del exact
    for name, variants in products.items():
        if name == "quantize":
            continue
        adds = name == "weight_grad_add"
        want = products["weight_grad" if adds else name]["torch"]()
        for variant, call in variants.items():
            error = _FP8_ERROR if variant.startswith("fp8") else 2 * _BF16_ERROR
            if adds:
                total.zero_()
            _expect_near(f"{name} {variant}", call(), want, error)
            if adds:  # the second time to something
                _expect_near(f"{name} {variant}", call(), 2 * want, error)


def _expect_near(name: str, got: Tensor, want: Tensor, error: float) -> None:
    difference = size = 0.0
    # Piece by piece: in float32 the weight gradients of all experts would fill a GPU.
    for mine, theirs in zip(got.split(4096), want.split(4096), strict=True):
        for a, b in zip(mine, theirs, strict=True) if mine.dim() == 3 else ((mine, theirs),):
            difference += float((a.float() - b.float()).square().sum())
            size += float(b.float().square().sum())
    if not difference <= error**2 * size:
        raise AssertionError(
            f"expected {name} within {error:.2%} of the exact product, "
            f"got {(difference / size) ** 0.5:.2%}"
        )


def print_rows(rows: list[Row]) -> None:
    """Medians for the terminal, in 80 columns."""
    first = rows[0]
    title = f"{first['experts']} experts, {first['rows']} rows; medians of {first['rounds']} rounds"
    table = Table("product", "K x N", "variant", title=title, box=None)
    table.title_justify = "left"
    for column in ("SMs", "us", "TFLOP/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        size = f"{row['k']} x {row['n']}"
        names = (str(row["product"]), size, str(row["variant"]), str(row["sms"] or "all"))
        table.add_row(*names, f"{row['us_p50']:.1f}", str(row["tflops"] or "-"))
    Console().print(table)
