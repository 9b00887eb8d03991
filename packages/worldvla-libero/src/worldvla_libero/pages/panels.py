"""Small figures with a title and notes: as SVG inside a page, and several together as a PNG beside it."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from worldvla_libero.figures import save_figure
from worldvla_libero.scratch import prepare_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers; without black and yellow, which need a paper colour.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
GREY = "#666666"  # read on white and, brighter, on black

# Inches. About as wide as a column of the page, so that letters keep their size.
_WIDTH = 3.7
_BELOW, _ABOVE = 0.224, 0.084
_TITLE, _GAP, _KEY = 0.3, 0.25, 0.34  # of the PNG

_STYLE = {
    "svg.hashsalt": "worldvla",  # else ids in the file are random
    "svg.fonttype": "none",  # letters stay letters, in the reader's font
    "text.parse_math": False,  # names may hold dollars
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": GREY,
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GREY),
}


@dataclass(frozen=True)
class Note:
    """A line of which a part is emphasised."""

    before: str
    emphasised: str
    after: str


@dataclass(frozen=True)
class Panel:
    """A figure with its title and what is to be said about it.

    Attributes:
        title: above it.
        draw: onto axes; None where there is nothing to draw.
        alt: what it shows, in words.
        notes: below it, a line each.
        height: of the figure in inches, tick labels included; 3.7 is its width.
        left: of the axes, in inches.
        right: of the axes, in inches.
    """

    title: str
    draw: Callable[[Axes], None] | None
    alt: str = ""
    notes: Sequence[str | Note] = ()
    height: float = 1.4
    left: float = 0.518
    right: float = 0.296

    def svg(self) -> str:
        """The figure as an image's address: without background, in colours for white and, brighter, for black."""
        prepare_matplotlib()
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        file = BytesIO()
        with rc_context(_STYLE):  # type: ignore[arg-type]
            figure = Figure(figsize=(_WIDTH, self.height))
            self._draw_on(figure, 0.0, 0.0)
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        svg = file.getvalue().replace(b"'DejaVu Sans'", b"system-ui, 'DejaVu Sans'")  # the font of the page
        return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"

    def _draw_on(self, figure: Figure, x: float, y: float) -> None:
        """Draw with the lower left corner at x, y inches."""
        width, height = figure.get_size_inches()
        inner = _WIDTH - self.left - self.right, self.height - _BELOW - _ABOVE
        rectangle = (x + self.left) / width, (y + _BELOW) / height, inner[0] / width, inner[1] / height
        assert self.draw is not None
        self.draw(figure.add_axes(rectangle))


def save_panels(
    path: str | os.PathLike[str],
    panels: Sequence[Panel],
    colours: Mapping[str, str],
    *,
    columns: int = 3,
    note: str = "",
) -> None:
    """Draw panels into one picture, under a key of what the colours mean.

    Args:
        path: of the PNG, written whole or not at all.
        panels: those without a figure are left out.
        colours: by name.
        columns: panels beside each other at most.
        note: words on all of them, at the bottom.

    Raises:
        ValueError: no panel with a figure.
    """
    prepare_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    drawn = [panel for panel in panels if panel.draw is not None]
    if not drawn:
        raise ValueError(f"{len(panels)} panels, none with a figure; at least one needed")
    columns = min(columns, len(drawn))
    rows = [drawn[i : i + columns] for i in range(0, len(drawn), columns)]
    heights = [max(panel.height for panel in row) + _TITLE + _GAP for row in rows]
    width = columns * (_WIDTH + _GAP) + _GAP
    with rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, sum(heights) + _KEY), dpi=160, facecolor="white")
        total = figure.get_figheight()
        figure.legend(
            handles=[Patch(color=colour, label=name) for name, colour in colours.items()],
            loc="upper left", bbox_to_anchor=(_GAP / width, 1 - 0.08 / total), ncols=columns, borderpad=0,
            borderaxespad=0, frameon=False, labelcolor=GREY, handlelength=1, handleheight=1,
        )  # fmt: skip
        top = total - _KEY
        for row, height in zip(rows, heights, strict=True):
            for column, panel in enumerate(row):
                x = _GAP + column * (_WIDTH + _GAP)
                figure.text(
                    x / width, (top - 0.2) / total, panel.title, fontweight="bold", color="#1d2329", va="center"
                )
                panel._draw_on(figure, x, top - _TITLE - panel.height)
            top -= height
        figure.text(1 - _GAP / width, 0.06 / total, note, ha="right", fontsize=8)
        save_figure(figure, Path(path))


def number(value: float) -> str:
    """Four digits, as in words."""
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def percent(share: float) -> str:
    """Two digits, without zeros that say nothing."""
    return np.format_float_positional(100 * share, precision=2, fractional=False, trim="-") + "%"
