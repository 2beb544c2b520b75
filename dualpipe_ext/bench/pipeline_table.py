"""The rows of ``dualpipe bench pipeline`` as tables on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dualpipe_ext.bench.pipeline_cases import OK

Row = dict[str, Any]
_Cell = Callable[[Row], object]


_LEGEND = (
    "compute, comm: alone; gain: serial over pair; limit: pair over the longer of those alone; "
    "hidden: of the communication; slower: compute while something communicates; x17: every "
    "dispatch and combine made 17 times, host: 16 of them into the memory of the host."
)


def print_rows(rows: Sequence[Row]) -> None:
    """Pairs, then steps, then what went wrong; in 80 columns."""
    console = Console(highlight=False)
    good = [row for row in rows if row["status"] == OK]
    pairs = [row for row in good if row["part"] == "pair"]
    for graphs, means in dict.fromkeys((row["graphs"], row["sm_means"]) for row in pairs):
        told = "" if means == "none" else f", SMs told by {means}"
        how = ", as CUDA graphs" if graphs else ""
        rows_of = [row for row in pairs if (row["graphs"], row["sm_means"]) == (graphs, means)]
        _print(console, f"A forward and a backward, ms{told}{how}", _PAIR, rows_of)
    if any(row["part"] == "pair" for row in good):
        console.print(_LEGEND, style="dim")
    steps = [row for row in good if row["part"] == "step"]
    for transport in dict.fromkeys(row["stage_transport"] for row in steps):
        sent = "" if transport is None else f", from stage to stage by {transport}"
        rows_of = [row for row in steps if row["stage_transport"] == transport]
        _print(console, f"Steps{sent}", _STEP, rows_of)
    for row in rows:
        if row["reason"]:
            status = "note" if row["status"] == OK else row["status"]
            told = "" if row["sm_means"] == "none" else f", {row['sm_means']}"
            what = row["schedule"] or _label(row) + told
            console.print(f"{status}: {what}: {row['reason']}", markup=False)


def _print(console: Console, title: str, columns: dict[str, _Cell], rows: Sequence[Row]) -> None:
    if not rows:
        return
    table = Table(box=None, title=title, title_justify="left", padding=(0, 1, 0, 0))
    for number, heading in enumerate(columns):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(str(cell(row)) for cell in columns.values()))
    console.print(table)


def _label(row: Row) -> str:
    sms = "" if row["num_sms"] is None else f" {row['num_sms']} SMs"
    return f"{row['transport']}{sms}"


def _repeated(row: Row) -> str:
    if row["slow_link"] is None:
        return _label(row)
    where = " host" if row["slow_link"] == "host" else ""
    return f"{_label(row)} x{row['repeats']:.3g}{where}"


def _ms(name: str) -> _Cell:
    return lambda row: f"{row[name]:.4g}"


def _share(name: str) -> _Cell:
    return lambda row: "-" if row[name] is None else f"{row[name]:.1%}"


_PAIR: dict[str, _Cell] = {
    "transport": _repeated,
    "compute": _ms("compute_ms"),
    "comm": _ms("comm_ms"),
    "serial": _ms("serial_ms_p50"),
    "pair": _ms("pair_ms_p50"),
    "gain": lambda row: f"{row['speed_up']:.2f}x",
    "limit": lambda row: f"{row['pair_over_longer']:.3f}x",
    "hidden": _share("hidden_share"),
    "slower": lambda row: (
        "-" if row["compute_slow_down"] is None else f"{row['compute_slow_down'] - 1:.1%}"
    ),
}
_STEP: dict[str, _Cell] = {
    "schedule": lambda row: row["schedule"],
    "step ms": _ms("step_ms_p50"),
    "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
    "MFU": _share("mfu"),
    "bubble": _share("bubble"),
    "predicted": _share("predicted_bubble"),
    "span ms": _ms("span_ms"),
    "predicted ms": _ms("predicted_span_ms"),
}
