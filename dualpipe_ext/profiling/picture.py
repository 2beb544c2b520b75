"""A trace as a picture: compute above, communication below, and where communication is exposed."""

from __future__ import annotations

import os

from dualpipe_ext.files import check_picture, replacing
from dualpipe_ext.profiling.report import OverlapReport
from dualpipe_ext.profiling.trace import Trace

_WAITING = "#b9b9c0"
_NO_PHASE = "#8a94a6"
_EXPOSED = "#111111"
_LANES = (("compute", 1.0), ("communication", 0.0))
_HEIGHT = 0.72


def draw_overlap(trace: Trace, report: OverlapReport, path: str | os.PathLike[str]) -> None:
    """Draw the two kinds of work on one time axis into ``path`` (.svg, .png or .pdf).

    Kernels have the colour of the phase they were launched in; waiting is grey; below, in black,
    the stretches in which something communicates and nothing computes.

    Raises:
        ValueError: another suffix, or a folder that does not exist.
    """
    suffix = check_picture(path)
    import matplotlib  # slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    names = [phase.name for phase in report.phases]
    palette = pyplot.get_cmap("tab20").colors
    colors = {name: palette[i % len(palette)] for i, name in enumerate(names)}
    figure, axis = pyplot.subplots(figsize=(14, 3.4), layout="constrained")
    for lane, y in _LANES:
        events = [e for e in trace.events if (e.kind == "compute") == (lane == "compute")]
        axis.broken_barh(
            [(e.start / 1e3, (e.end - e.start) / 1e3) for e in events],
            (y - _HEIGHT / 2, _HEIGHT),
            facecolors=[
                _WAITING if e.kind == "waiting" else colors.get(e.phase, _NO_PHASE) for e in events
            ],
            rasterized=True,  # thousands of kernels would make a vector file of megabytes
        )
    exposed = [g for g in report.gaps if g.communicating_us > 0]
    axis.broken_barh(
        [(g.start_us / 1e3, g.duration_us / 1e3) for g in exposed],
        (-0.62, 0.14),
        facecolors=_EXPOSED,
    )
    axis.set(
        yticks=[y for _, y in _LANES],
        yticklabels=[lane for lane, _ in _LANES],
        ylim=(-0.7, 1.5),
        xlim=(0, report.span_us / 1e3),
        xlabel="time (ms)",
        title=(
            f"{report.hidden:.1%} of the communication hidden, "
            f"{report.speed_up:.2f}x against serial"
        ),
    )
    handles = [Patch(color=colors[name], label=name) for name in names]
    handles += [
        Patch(color=_WAITING, label="waiting for ranks"),
        Patch(color=_EXPOSED, label="exposed"),
    ]
    figure.legend(handles=handles, loc="outside right upper", fontsize="small", frameon=False)
    with replacing(path) as file:
        figure.savefig(file, dpi=130, format=suffix[1:])
    pyplot.close(figure)
