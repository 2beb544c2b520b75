"""One row of ``ep.csv``: a case measured with a variant, or the reason why it was not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

OK, FAILED, ERROR, UNAVAILABLE = "ok", "FAILED", "error", "unavailable"
PEER_COPY = "peer-copy"


@dataclass(slots=True, kw_only=True)
class EpRow:
    """All columns, in order. Times are microseconds per call of the slowest rank, percentiles are
    over rounds; None is an empty cell: not measured."""

    device: str
    ranks: int
    virtual: bool
    """All ranks on one GPU: times are those of all ranks' work, and no byte crosses a link."""
    tokens: int
    hidden: int
    experts: int
    top_k: int
    rounds: int
    calls: int
    case: str
    """"" if the whole variant could not be used."""
    transport: str
    num_sms: int | None
    """Asked for."""
    status: str
    reason: str = ""
    us_p20: float | None = None
    us_p50: float | None = None
    us_p80: float | None = None
    uncached_us_p20: float | None = None
    """Routing included, ``max_recv_tokens`` given: nothing waits on the host."""
    uncached_us_p50: float | None = None
    uncached_us_p80: float | None = None
    routing_us: float | None = None
    """Median uncached minus median cached."""
    graph_us_p20: float | None = None
    """The cached call replayed from a CUDA graph."""
    graph_us_p50: float | None = None
    graph_us_p80: float | None = None
    graph_reason: str = ""
    """Why there is no graph_us."""
    wire_bytes: int | None = None
    """Bytes that a rank receives from other ranks (a combine returns what its dispatch brought)."""
    logical_bytes: int | None = None
    """Bytes of all rows that a rank receives, its own included: a row per (token, rank)."""
    wire_gb_s: float | None = None
    useful_gb_s: float | None = None
    """As wire_gb_s, but counting a token once per (token, rank) whatever really crosses."""
    logical_gb_s: float | None = None
    nominal_sm_us: float | None = None
    """num_sms x us."""
    sm_us: float | None = None
    """SM microseconds of all kernels of a call, see ``dualpipe_ext.bench.sm_time``."""
    most_sms: int | None = None
    """SMs of the kernel that takes most of them."""
    copy_gb_s: float | None = None
    """Copy engines: GB/s on the wire while they move rows."""
    pack_us: float | None = None
    """Copy engines: the kernel before the copies."""
    gemm_us: float | None = None
    """A GEMM alone, see ``dualpipe_ext.bench.beside_gemm``."""
    gemm_slow_down: float | None = None
    overlap_speed_up: float | None = None
    overlap_us: float | None = None
    """One call beside GEMMs."""
    of_push: float | None = None
    """wire_gb_s over that of a plain push of such rows with as many SMs, in the same run."""
    of_peer_copy: float | None = None
    """Copy engines: copy_gb_s over the wire_gb_s of a plain copy in the same run."""

    def set_times(self, name: str, values: dict[str, float]) -> None:
        """Store p20, p50 and p80 of ``us``, ``uncached_us`` or ``graph_us``."""
        for percentile, value in values.items():
            setattr(self, f"{name}_{percentile}", round(value, 2))

    def set_traffic(self, wire: int, useful: int, logical: int) -> None:
        """Store bytes, see the columns, and what they are per second at the median time."""
        assert self.us_p50 is not None
        self.logical_bytes, self.logical_gb_s = logical, self._gb_s(logical)
        if not self.virtual:
            self.wire_bytes, self.wire_gb_s = wire, self._gb_s(wire)
            self.useful_gb_s = self._gb_s(useful)

    def _gb_s(self, num_bytes: int) -> float:
        return float(f"{num_bytes / self.us_p50 / 1e3:.4g}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data by column."""
        return asdict(self)


def set_fractions(rows: Sequence[EpRow], push_of: Mapping[str, str]) -> None:
    """Fill in what ``rows`` of one run reach of its plain pushes and of its plain copy.

    Args:
        rows: all rows of the run.
        push_of: for the name of a case, the name of the plain push of such rows.
    """
    good = [row for row in rows if row.status == OK and row.wire_gb_s]
    rates = {(row.case, row.num_sms): row.wire_gb_s for row in good}
    for row in good:
        # Only plain pushes have such names; those that take no SMs find none.
        push = rates.get((push_of.get(row.case, ""), row.num_sms))
        if push:
            row.of_push = round(row.wire_gb_s / push, 4)
        copy = rates.get((PEER_COPY, None))
        if copy and row.copy_gb_s:
            row.of_peer_copy = round(row.copy_gb_s / copy, 4)


def columns() -> list[str]:
    """The columns of a row, in order."""
    return [field.name for field in fields(EpRow)]
