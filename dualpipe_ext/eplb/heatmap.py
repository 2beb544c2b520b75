"""Heat maps: the load of every GPU in every layer, one panel per placement, on one colour scale.

Here belongs the picture; where its numbers come from is ``placement.gpu_loads``.

Shapes: L layers (rows), G GPUs (columns).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from dualpipe_ext.files import check_picture, replacing

# Too little is cool, the mean is paper, too much is hot.
_COLOURS = LinearSegmentedColormap.from_list(
    "load",
    list(
        zip(
            (0.0, 0.25, 0.5, 0.66, 0.83, 1.0),
            ("#17577e", "#6aaed0", "#f7f5f0", "#f2a65a", "#c8372d", "#6d0f1f"),
            strict=True,
        )
    ),
)
_INK, _PALE_INK, _LINE = "#20242b", "#5b6470", "#c9ced6"
_STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _PALE_INK,
    "ytick.color": _PALE_INK,
    "svg.hashsalt": "dualpipe",  # the same picture, byte for byte
    "svg.fonttype": "path",
}
_LEAST_TOP = 1.5  # of the scale, in means: a balanced placement must not look uneven
_MOST_TOP = 4.0


def draw_heatmap(
    panels: Sequence[tuple[str, Tensor]],
    path: str | os.PathLike[str],
    *,
    title: str = "Load per GPU",
    num_nodes: int = 1,
) -> None:
    """Draw placements side by side.

    Args:
        panels: a name and the loads [L, G] of each, the same L and G.
        path: the picture; its suffix, .svg, .png or .pdf, is its format.
        title: above all panels.
        num_nodes: hosts; a line parts their GPUs.

    Raises:
        ValueError: another suffix, no panels, or panels of different sizes.
    """
    suffix = check_picture(path)
    shapes = {tuple(loads.shape) for _, loads in panels}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(f"expected panels of one size [layers, GPUs], got {sorted(shapes)}")
    relative = [(name, _relative_to_mean(loads)) for name, loads in panels]
    top = max(float(values.max()) for _, values in relative)
    top = min(max(top, _LEAST_TOP), _MOST_TOP)
    num_layers, num_gpus = relative[0][1].shape
    with rc_context(_STYLE):
        width = min(max(0.12 * num_gpus, 4.2), 8.0)
        height = min(max(0.09 * num_layers, 2.2), 7.0)
        figure = Figure(figsize=(width * len(panels) + 1.6, height + 1.9), dpi=160)
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=top)
        for i, (axis, (name, values)) in enumerate(zip(axes, relative, strict=True)):
            image = axis.imshow(
                values, cmap=_COLOURS, norm=norm, aspect="auto", interpolation="nearest"
            )
            _label(axis, name, values, num_nodes, first=i == 0)
        left, right = 0.62 / figure.get_figwidth(), 1 - 1.15 / figure.get_figwidth()
        bottom, above = 0.55 / figure.get_figheight(), 1 - 0.98 / figure.get_figheight()
        figure.subplots_adjust(left=left, right=right, bottom=bottom, top=above, wspace=0.07)
        figure.text(left, 1 - 0.34 / figure.get_figheight(), title, size=13, weight="bold")
        bar = figure.add_axes(
            (
                right + 0.22 / figure.get_figwidth(),
                bottom,
                0.16 / figure.get_figwidth(),
                above - bottom,
            )
        )
        scale = figure.colorbar(image, cax=bar, extend="max" if top == _MOST_TOP else "neither")
        scale.set_ticks([0.0, 0.5, 1.0, *np.linspace(1, top, 4)[1:]])
        scale.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}x"))
        scale.outline.set_edgecolor(_LINE)
        scale.set_label("load, 1x = mean of the layer", color=_PALE_INK)
        with replacing(path) as file:
            metadata = {"Date": None} if suffix == ".svg" else None
            figure.savefig(file, format=suffix[1:], metadata=metadata)


def _relative_to_mean(loads: Tensor) -> np.ndarray:
    loads = loads.double().cpu()
    mean = loads.mean(1, keepdim=True)
    return (loads / mean.where(mean > 0, 1.0)).where(mean > 0, 1.0).numpy()


def _label(axis: Axes, name: str, values: np.ndarray, num_nodes: int, *, first: bool) -> None:
    num_layers, num_gpus = values.shape
    balance = float((1 / values.max(axis=1)).mean())
    worst = float(values.max())
    axis.set_title(name, loc="left", size=11, weight="bold", pad=19)
    axis.text(
        0,
        1.012,
        f"balancedness {balance:.3f}   fullest GPU {worst:.2f}x",
        transform=axis.transAxes,
        size=9,
        color=_PALE_INK,
        va="bottom",
    )
    axis.set_xlabel("GPU")
    if first:
        axis.set_ylabel("layer")
    axis.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(9, integer=True))
    axis.set_xlim(-0.5, num_gpus - 0.5)
    axis.set_ylim(num_layers - 0.5, -0.5)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_edgecolor(_LINE)
    for node in range(1, num_nodes):
        axis.axvline(node * num_gpus / num_nodes - 0.5, color=_INK, linewidth=0.8, alpha=0.55)
