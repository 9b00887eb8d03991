"""What people look at: videos and figures."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from worldvla_libero.rendering import prepare_process

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by colour-blind readers.
_BLUE, _ORANGE, _GREEN, _PINK, _GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#666666"

_ACTION_PANELS = (
    ("translation of the hand", slice(0, 3)),
    ("rotation of the hand", slice(3, 6)),
    ("gripper", slice(6, 7)),
)


class FrameError(ValueError):
    """An image that does not fit into the video or figure."""


class VideoWriter:
    """An MP4 (H.264, yuv420p, which every browser plays), there whole or not at all.

    Args:
        path: of the file; folders that lead to it are made. It appears when the block ends without an error and
            with at least one frame.
        fps: frames per second.

    Example:
        ```python
        with VideoWriter("rollout.mp4", fps=20) as video:
            video.write(frame)  # (H, W, 3) uint8
        ```
    """

    def __init__(self, path: str | os.PathLike[str], fps: float) -> None:
        self.path = Path(path)
        self.fps = Fraction(fps).limit_denominator(1000)
        self._draft = self.path.with_name(f".{uuid4().hex}.{self.path.name}")
        self._shape: tuple[int, ...] | None = None
        self._container: Any = None
        self._stream: Any = None

    def write(self, frame: NDArray[np.uint8]) -> None:
        """Append a frame.

        Args:
            frame: (H, W, 3) uint8, each of the same size.

        Raises:
            FrameError: another type or shape.
        """
        import av

        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
            raise FrameError(f"frame has shape {frame.shape} and type {frame.dtype}; (H, W, 3) uint8 needed")
        if self._shape is None:
            self._open(frame.shape)
        if frame.shape != self._shape:
            raise FrameError(f"frame has shape {frame.shape}; the video has {self._shape}")
        # yuv420p halves the colour planes, so that odd sizes need one more row or column.
        even = np.pad(frame, [(0, n % 2) for n in frame.shape[:2]] + [(0, 0)], mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
        self._container.mux(self._stream.encode(picture))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._container is None:
            return
        try:
            if kind is None:
                self._container.mux(self._stream.encode(None))
            self._container.close()
            if kind is None:
                os.replace(self._draft, self.path)
        finally:
            self._draft.unlink(missing_ok=True)

    def _open(self, shape: tuple[int, ...]) -> None:
        import av

        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self._draft), "w", options={"movflags": "faststart"})
        self._stream = self._container.add_stream("libx264", rate=self.fps, options={"crf": "18"})
        self._stream.pix_fmt = "yuv420p"
        self._stream.height, self._stream.width = (n + n % 2 for n in shape[:2])
        self._shape = shape


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
    prepare_process()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if not frames or not len(actions):
        raise ValueError(f"{len(frames)} frames and {len(actions)} actions; at least one of each needed")
    columns = len(frames)
    with rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
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
        _save(figure, Path(path))


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


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{uuid4().hex}.{path.name}")
    try:
        figure.savefig(draft, format="png")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
