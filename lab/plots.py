"""Plots as PNG files, through matplotlib's objects: no global figure, no display, no backend chosen for the caller."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lab.files import replacing


def heat_map(
    path: str | Path,
    values: Tensor,
    *,
    title: str,
    rows: str,
    columns: str,
    bar: str,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    limits: tuple[float, float] | None = None,
    colors: str = "Purples",
    side: tuple[str, Tensor] | None = None,
) -> Path:
    """Draws ``values [row, column]`` as a map of colours and writes it as PNG, whole or not at all.

    Args:
        path: The file; missing folders are made.
        values: The numbers.
        title: Above the map.
        rows: Name of the vertical axis.
        columns: Name of the horizontal axis.
        bar: Name of the colour scale.
        row_labels: One for each row, else numbers.
        column_labels: One for each column, else numbers.
        limits: Ends of the colour scale, else those of the values.
        colors: A matplotlib colour map.
        side: Name and values (one for each row) of a bar chart on the right.

    Returns:
        The path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = values.shape
    size = (min(3.5 + 0.32 * width + (2.0 if side else 0.0), 24.0), min(2.0 + 0.28 * height, 24.0))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        1, 2 if side else 1, squeeze=False, sharey=True, width_ratios=[3, 1] if side else [1]
    )[0]
    low, high = limits if limits is not None else (None, None)
    image = axes[0].imshow(
        values.double().numpy(), aspect="auto", cmap=colors, vmin=low, vmax=high, interpolation="nearest"
    )
    axes[0].set(title=title, xlabel=columns, ylabel=rows)
    for axis, labels, count in ((axes[0].yaxis, row_labels, height), (axes[0].xaxis, column_labels, width)):
        step = 1 if labels is not None else max(1, -(-count // 24))
        ticks = list(range(0, count, step))
        axis.set_ticks(ticks, labels=None if labels is None else [_printable(label) for label in labels])
    figure.colorbar(image, ax=axes[0], label=bar)
    if side is not None:
        name, numbers = side
        axes[1].barh(range(height), numbers.double().tolist(), color="0.4")
        axes[1].set(xlabel=name)
        axes[1].axvline(0.0, color="black", linewidth=0.6)
    target = Path(path)
    with replacing(target) as temporary, warnings.catch_warnings():
        # Token texts may be in scripts that the built-in font lacks; boxes are drawn in their place.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(temporary, dpi=120, format="png")
    return target


def _printable(label: str) -> str:
    # A dollar sign would open a formula.
    return label.replace("$", r"\$").replace("\n", "⏎")
