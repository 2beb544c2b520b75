"""The rows of ``dualpipe bench ep`` as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from dualpipe_ext.bench.ep_result import OK, UNAVAILABLE, EpRow

_MOST_COLUMNS = 1000
_HEADINGS = (
    "us",
    "p20-p80",
    "uncached",
    "routing",
    "graph",
    "wire\nGB/s",
    "of\npush",
    "of plain\ncopy",
    "logical\nGB/s",
    "SM ms\n(nominal)",
    "GEMM",
    "overlap",
)
_LEGEND = (
    "us: a call, routing known; uncached: routing included; graph: replayed from a CUDA graph. "
    "of push: wire rate over that of a kernel that only pushes such rows, with as many SMs; "
    "of plain copy: of the copies while they move. "
    "SM ms: kernels x SMs they take; nominal: SMs asked for x us. "
    "GEMM: slow-down of a GEMM beside it; overlap: serial over overlapped."
)


def print_table(rows: Sequence[EpRow], gpu: str) -> None:
    """Print the rows, grouped by case, and below them what went wrong."""
    console = Console(highlight=False, soft_wrap=True)
    table = _table(rows, gpu)
    # Rather a line that the terminal breaks than figures cut off.
    options = console.options.update(max_width=_MOST_COLUMNS)
    console.width = max(console.width, Measurement.get(console, options, table).maximum)
    console.print(table)
    console.print(_LEGEND, style="dim")
    for (status, case, reason), labels in _reasons(rows).items():
        what = f"{case}, " if case else ""
        console.print(f"{status}: {what}{', '.join(labels)}: {reason}", markup=False)


def _reasons(rows: Sequence[EpRow]) -> dict[tuple[str, str, str], list[str]]:
    """What went wrong, and with which variants."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.reason:
            status = "note" if row.status == OK else row.status
            found.setdefault((status, row.case, row.reason), []).append(variant_label(row))
    return found


def title(row: EpRow, gpu: str) -> str:
    """Where and at what size the rows were measured.

    Args:
        row: any of them.
        gpu: name of the GPU.
    """
    where = gpu if row.device == "cuda" else "CPU"
    if row.virtual:
        ranks = f"{row.ranks} virtual ranks on one {where}, times of all ranks' work"
    else:
        ranks = f"{row.ranks} x {where}" if row.device == "cuda" else f"{row.ranks} ranks on a CPU"
    return (
        f"{ranks}; {row.tokens} tokens per rank x {row.hidden}, {row.experts} experts, "
        f"top-{row.top_k}; median of {row.rounds} rounds of {row.calls} calls, slowest rank"
    )


def variant_label(row: EpRow) -> str:
    """The transport, with its SMs where some were asked for."""
    return row.transport if row.num_sms is None else f"{row.transport} {row.num_sms} SMs"


def _table(rows: Sequence[EpRow], gpu: str) -> Table:
    cells = {id(row): _cells(row) for row in rows}
    filled = [any(column) for column in zip(*cells.values(), strict=True)]
    table = Table(title=title(rows[0], gpu), title_justify="left")
    for heading in ("case", "by"):
        table.add_column(heading, no_wrap=True)
    for heading in compress(_HEADINGS, filled):
        table.add_column(heading, justify="right", no_wrap=True)
    by_case: dict[str, list[EpRow]] = {}
    for row in rows:
        by_case.setdefault(row.case, []).append(row)
    # What could not be used at all comes last.
    whole = by_case.pop("", [])
    for case, group in [*by_case.items(), ("all", whole)]:
        for row in group:
            table.add_row(
                case if row is group[0] else "",
                variant_label(row),
                *compress(cells[id(row)], filled),
                style={OK: None, UNAVAILABLE: "dim"}.get(row.status, "red"),
                end_section=row is group[-1],
            )
    return table


def _cells(row: EpRow) -> list[str]:
    if row.us_p50 is None:
        return [row.status, *[""] * (len(_HEADINGS) - 1)]
    sm = _number(None if row.sm_us is None else row.sm_us / 1e3, ".2f")
    nominal = _number(None if row.nominal_sm_us is None else row.nominal_sm_us / 1e3, ".2f")
    return [
        _number(row.us_p50, ".1f") if row.status == OK else row.status,
        f"{row.us_p20:.1f}-{row.us_p80:.1f}",
        _number(row.uncached_us_p50, ".1f"),
        _number(row.routing_us, "+.1f"),
        _number(row.graph_us_p50, ".1f"),
        _number(row.wire_gb_s, ".3g"),
        _number(row.of_push, ".1%"),
        _number(row.of_peer_copy, ".1%"),
        _number(row.logical_gb_s, ".3g"),
        sm + (f" ({nominal})" if nominal else ""),
        _number(row.gemm_slow_down, ".2f", "x"),
        _number(row.overlap_speed_up, ".2f", "x"),
    ]


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"
