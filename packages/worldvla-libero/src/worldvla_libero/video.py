"""Videos of frames, written as they come."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray


class FrameError(ValueError):
    """An image that does not fit into the video."""


class VideoWriter:
    """An MP4 (H.264, yuv420p, which every browser plays), there whole or not at all.

    Args:
        path: of the file; folders that lead to it are made. It appears when the block ends without an error and
            with at least one frame.
        fps: frames per second.

    Raises:
        OSError: a frame or the end of the video cannot be written, for instance because the disk is full; the
            file does not appear.

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
            OSError: it cannot be written.
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
