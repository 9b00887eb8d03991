"""Figures of frames, actions and training curves, as pictures."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from worldvla_libero.scratch import prepare_matplotlib
from worldvla_tokenizers.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by colour-blind readers.
_BLUE, _ORANGE, _GREEN, _PINK, _GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#666666"

_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # instructions and names of models may hold dollars
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

_HELD_OUT = "eval_"
_NOT_DRAWN = {"step", "epoch", "seconds", "runtime", "steps_per_second"}
_MARKED_POINTS = 30  # below that many, a line alone may not be seen
_LONG_LEGEND = 6
_ACTION_PANELS = (
    ("translation of the hand", slice(0, 3)),
    ("rotation of the hand", slice(3, 6)),
    ("gripper", slice(6, 7)),
)


@dataclass(frozen=True)
class ImaginedFrame:
    """A next frame as it came, and as the world model saw it coming.

    Attributes:
        step: control step the frames belong to; the model was shown the true frame of `step - 1` and its action.
        true: (H, W, 3) uint8 from the simulator.
        tokenized: (h, w, 3) uint8, the true frame encoded and decoded by the image tokenizer: the best that the
            model could have drawn.
        imagined: (h, w, 3) uint8 from the model.
        psnr: of imagined and true at the model's size, in dB.
    """

    step: int
    true: NDArray[np.uint8]
    tokenized: NDArray[np.uint8]
    imagined: NDArray[np.uint8]
    psnr: float


def save_demo_figure(
    path: str | os.PathLike[str],
    *,
    title: str,
    subtitle: str,
    frames: Sequence[ImaginedFrame],
    actions: NDArray[np.float64],
    query_steps: Sequence[int],
    control_hz: int,
) -> None:
    """Draw true frames above imagined ones, and below them the actions over time.

    Args:
        path: of the PNG, written whole or not at all.
        title: e.g. the instruction.
        subtitle: the model, and what to think of it.
        frames: one column each.
        actions: (T, 7) executed actions.
        query_steps: steps at which a new chunk begins.
        control_hz: control steps per second.

    Raises:
        ValueError: no frame or no action.
    """
    prepare_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if not frames or not len(actions):
        raise ValueError(f"{len(frames)} frames and {len(actions)} actions; at least one of each needed")
    columns = len(frames)
    with rc_context({**_STYLE, "font.size": 10}):
        figure = Figure(figsize=(1.95 * columns + 1.0, 9.6), dpi=110)
        figure.text(0.05, 0.972, title, fontsize=16, fontweight="bold", va="center")
        wrapped = "\n".join(textwrap.wrap(subtitle, width=24 * columns))
        figure.text(0.05, 0.952, wrapped, color=_GREY, va="top", linespacing=1.35)
        rows = figure.add_gridspec(
            3, columns, left=0.06, right=0.985, bottom=0.335, top=0.88, wspace=0.05, hspace=0.05
        )
        for column, frame in enumerate(frames):
            seconds = f"after {frame.step / control_hz:.2f} s"
            for row, (name, image) in enumerate(
                (("true", frame.true), ("true, tokenized", frame.tokenized), ("imagined", frame.imagined))
            ):
                axes = figure.add_subplot(rows[row, column])
                _show(axes, image, label=name if column == 0 else "", title=seconds if row == 0 else "")
            axes.set_xlabel(f"PSNR {frame.psnr:.1f} dB", color=_GREY, fontsize=9)
        plots = figure.add_gridspec(1, 3, left=0.075, right=0.985, bottom=0.115, top=0.26, wspace=0.2)
        for column, (name, dimensions) in enumerate(_ACTION_PANELS):
            panel = figure.add_subplot(plots[0, column])
            _plot_actions(panel, actions[:, dimensions], control_hz)
            for query in query_steps:
                panel.axvline(query / control_hz, color="0.85", linewidth=0.8, zorder=0)
            panel.plot(
                [f.step / control_hz for f in frames], [-1.16] * columns, "^", color=_PINK, clip_on=False, ms=6
            )
            panel.set_title(name, loc="left", fontweight="bold", fontsize=10)
        panel.set_yticks((-1, 1), ("open", "closed"))
        footnote = (
            "imagined: from the true frame one step before and the action taken there · tokenized: what the image "
            "tokenizer keeps of the true frame\nactions as sent to the controller, whose range is -1 … 1 · "
            "grey lines: a new action chunk · triangles: the frames above"
        )
        figure.text(0.985, 0.012, footnote, ha="right", va="bottom", color=_GREY, fontsize=8.5, linespacing=1.4)
        save_figure(figure, Path(path))


def save_curves(path: str | os.PathLike[str], rows: Sequence[Mapping[str, float]]) -> None:
    """Draw what a training run logged: one panel for each family of names, such as all that begin with `loss`.

    Args:
        path: of the PNG, written whole or not at all.
        rows: values by name, and the `step` they belong to. Names that begin with `eval_` are held-out samples:
            they are drawn dashed, in the panel and colour of their namesakes.

    Raises:
        ValueError: no rows, or nothing in them but steps and times.
    """
    prepare_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("no rows to draw; at least one needed")
    names = dict.fromkeys(name.removeprefix(_HELD_OUT) for row in rows for name in row)
    families: dict[str, list[str]] = {}
    for name in names:
        if name not in _NOT_DRAWN:
            families.setdefault(name.split("_")[0], []).append(name)
    if not families:
        raise ValueError(f"rows hold {', '.join(names) or 'nothing'} alone; at least one value to draw needed")
    columns = min(3, len(families))
    height = -(-len(families) // columns)
    with rc_context(_STYLE):
        figure = Figure(figsize=(4.6 * columns, 3.1 * height + 0.4), dpi=110, layout="constrained")
        figure.suptitle("solid: training · dashed: held out", color=_GREY, x=0.99, ha="right", fontsize=9)
        panels = figure.subplots(height, columns, squeeze=False).flat
        for panel, (family, members) in zip(panels, families.items(), strict=False):
            for index, member in enumerate(members):
                for name, style in ((member, "-"), (_HELD_OUT + member, "--")):
                    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
                    if points:
                        marker = "." if len(points) < _MARKED_POINTS else ""
                        panel.plot(*zip(*points, strict=True), style, color=f"C{index}", marker=marker)
                panel.plot([], [], "-", color=f"C{index}", label=member)
            panel.set_title(family, loc="left", fontweight="bold")
            panel.set_xlabel("step")
            if len(members) > 1:
                panel.legend(frameon=False, fontsize=7, ncols=1 + (len(members) > _LONG_LEGEND))
        for panel in list(panels):
            panel.set_axis_off()
        save_figure(figure, Path(path))


def save_strips(
    path: str | os.PathLike[str], strips: Sequence[Mapping[str, Sequence[NDArray[np.uint8]]]], *, title: str = ""
) -> None:
    """Draw rows of frames under each other, such as true ones above reconstructed or imagined ones.

    Args:
        path: of the PNG, written whole or not at all.
        strips: groups of rows by name; each row (H, W, 3) uint8 frames of one size.
        title: above them.

    Raises:
        ValueError: no frames.
    """
    prepare_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    lines = [(name, frames) for strip in strips for name, frames in strip.items()]
    columns = max((len(frames) for _, frames in lines), default=0)
    if not columns:
        raise ValueError("no frames to draw; at least one needed")
    with rc_context(_STYLE):
        figure = Figure(figsize=(1.5 * columns + 0.5, 1.55 * len(lines) + 0.4), dpi=110, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        grid = figure.subplots(len(lines), columns, squeeze=False)
        for panels, (name, frames) in zip(grid, lines, strict=True):
            for column, panel in enumerate(panels):
                panel.set_axis_off()
                if column < len(frames):
                    panel.set_axis_on()
                    _show(panel, frames[column], label=name if column == 0 else "", title="")
        save_figure(figure, Path(path))


def side_by_side(images: Mapping[str, NDArray[np.uint8]], *, gap: int = 4, strip: int = 22) -> NDArray[np.uint8]:
    """Images in a row, each under its name and enlarged to the height of the largest.

    Args:
        images: (H, W, 3) uint8 by name.
        gap: white pixels between them.
        strip: height in pixels of the white strip for the names.

    Returns:
        (H + strip, W, 3) uint8.
    """
    from PIL import Image, ImageDraw, ImageFont

    height = max(image.shape[0] for image in images.values())
    widths = [round(image.shape[1] * height / image.shape[0]) for image in images.values()]
    canvas = Image.new("RGB", (sum(widths) + gap * (len(widths) - 1), height + strip), "white")
    draw, left = ImageDraw.Draw(canvas), 0
    for (name, image), width in zip(images.items(), widths, strict=True):
        canvas.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (left, strip))
        font = ImageFont.load_default(size=0.6 * strip)
        draw.text((left + width / 2, strip / 2), name, fill="black", anchor="mm", font=font)
        left += width + gap
    return np.asarray(canvas)


def _show(axes: Axes, image: NDArray[np.uint8], *, label: str, title: str) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set(xticks=(), yticks=())
    axes.set_ylabel(label, fontweight="bold")
    axes.set_title(title, color=_GREY, fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _plot_actions(panel: Axes, values: NDArray[np.float64], control_hz: int) -> None:
    """Steps, because an action holds until the next one; x, y, z where there are three."""
    times = np.arange(len(values) + 1) / control_hz
    for label, colour, line in zip("xyz", (_BLUE, _ORANGE, _GREEN), values.T, strict=False):
        panel.step(times, [*line, line[-1]], where="post", color=colour, linewidth=1.5, label=label)
    panel.set(xlim=(0, times[-1]), ylim=(-1.12, 1.12), xlabel="time [s]", yticks=(-1, 0, 1))
    if values.shape[1] > 1:
        panel.legend(
            loc="lower right", ncols=3, frameon=False, fontsize=9, handlelength=1.2, bbox_to_anchor=(1.02, 0.97)
        )


def save_image(path: str | os.PathLike[str], image: NDArray[np.uint8]) -> None:
    """Write an (H, W, 3) uint8 image as a PNG, whole or not at all; folders that lead to it are made."""
    with atomic_path(path) as draft:
        Image.fromarray(image).save(draft, format="PNG")


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as a PNG, whole or not at all; folders that lead to it are made."""
    with atomic_path(path) as draft:
        figure.savefig(draft, format="png")
