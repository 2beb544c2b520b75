"""The rows of ``dualpipe bench ep`` as a picture: bandwidth against SMs, and a GEMM's price."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from dualpipe_ext.bench.ep_cases import PUSH_BF16, PUSH_FP8
from dualpipe_ext.bench.ep_result import OK, PEER_COPY, EpRow
from dualpipe_ext.bench.ep_table import title, variant_label
from dualpipe_ext.files import check_picture, replacing

_SHOWN = (
    "dispatch-bf16-buffer",
    "dispatch-bf16-token",
    "dispatch-fp8-token",
    "combine-token",
    "combine-expert",
)
_DASHES = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))


def draw(rows: Sequence[EpRow], path: str | os.PathLike[str], gpu: str) -> None:
    """Draw into ``path`` (.svg, .png or .pdf).

    Left: useful GB/s on the wire (virtual ranks: logical) against the SMs of the call, a curve per
    case for the transports that take SMs, a horizontal line for all others. Right: how much slower
    a GEMM is beside them.

    Raises:
        ValueError: another suffix, or a folder that does not exist.
    """
    suffix = check_picture(path)
    import matplotlib  # slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 5.2), layout="constrained")
    figure.suptitle(title(rows[0], gpu), fontsize="medium")
    good = [row for row in rows if row.status == OK and row.us_p50 is not None]
    _draw_bandwidth(left, good)
    _draw_slow_down(right, [row for row in good if row.gemm_slow_down is not None])
    with replacing(path) as file:
        figure.savefig(file, dpi=130, format=suffix[1:])
    pyplot.close(figure)


def _draw_bandwidth(axis: Any, rows: list[EpRow]) -> None:
    virtual = any(row.virtual for row in rows)
    shown = [name for name in _SHOWN if any(row.case == name for row in rows)]
    limits = {PEER_COPY, PUSH_BF16.name, PUSH_FP8.name}
    shown = shown or sorted({row.case for row in rows} - limits)
    without_sms = sorted({row.transport for row in rows if row.num_sms is None} - {"copy_"})
    dashes = {name: _DASHES[i % len(_DASHES)] for i, name in enumerate(without_sms)}
    for number, case in enumerate(shown):
        color = f"C{number % 10}"
        mine = [row for row in rows if row.case == case]
        for name in sorted({row.transport for row in mine if row.num_sms is not None}):
            line = sorted((r.num_sms, _rate(r)) for r in mine if r.transport == name)
            axis.plot(*zip(*line, strict=True), "o-", color=color, label=f"{case}, {name}")
        for row in mine:
            if row.num_sms is None:
                axis.axhline(
                    _rate(row),
                    color=color,
                    linestyle=dashes[row.transport],
                    label=f"{case}, {row.transport}",
                )
    for case, marker in ((PUSH_BF16, "s"), (PUSH_FP8, "^")):
        line = sorted((r.num_sms, _rate(r)) for r in rows if r.case == case.name)
        if line:
            rate = {"color": "0.6", "marker": marker, "linestyle": ":"}
            axis.plot(*zip(*line, strict=True), **rate, zorder=0, label=f"plain {case.name}")
    for row in rows:
        if row.case == PEER_COPY:
            axis.axhline(_rate(row), color="0.6", linewidth=3, zorder=0, label="plain copy")
    axis.set(
        xlabel="SMs asked for (horizontal lines: none)",
        ylabel="logical GB/s per rank" if virtual else "GB/s per rank on the wire",
        title="Bandwidth of the whole call",
    )
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="x-small", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _rate(row: EpRow) -> float:
    rate = row.logical_gb_s if row.useful_gb_s is None else row.useful_gb_s
    assert rate is not None
    return rate


def _draw_slow_down(axis: Any, rows: list[EpRow]) -> None:
    axis.set_title("A GEMM beside it: time over alone")
    if not rows:
        axis.text(0.5, 0.5, "not measured", ha="center", va="center", color="0.5")
        axis.set_axis_off()
        return
    labels = list(dict.fromkeys(variant_label(row) for row in rows))
    cases = list(dict.fromkeys(row.case for row in rows))
    height = 0.8 / len(cases)
    for number, case in enumerate(cases):
        mine = [row for row in rows if row.case == case]
        places = [labels.index(variant_label(row)) + number * height for row in mine]
        bars = axis.barh(places, [row.gemm_slow_down for row in mine], height, label=case)
        axis.bar_label(bars, [f"{row.overlap_speed_up:.2f}x" for row in mine], padding=3)
    axis.set(
        yticks=[place + 0.4 - height / 2 for place in range(len(labels))],
        yticklabels=labels,
        xlabel="slow-down of the GEMM (numbers: speed-up over serial, 2x at most)",
    )
    axis.axvline(1.0, color="0.5", linewidth=1)
    axis.margins(x=0.15)
    axis.invert_yaxis()
    axis.legend(fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
