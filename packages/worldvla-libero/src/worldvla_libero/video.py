"""H.264 videos of frames, written as they come."""

from __future__ import annotations

import os
from collections.abc import Mapping
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
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "rollout.mp4")
        >>> with VideoWriter(path, fps=20) as video:
        ...     video.write(np.zeros((64, 64, 3), np.uint8))
        >>> path.is_file()
        True
    """

    def __init__(self, path: str | os.PathLike[str], fps: float) -> None:
        self.path = Path(path)
        self.fps = Fraction(fps).limit_denominator(1000)
        self._draft = self.path.with_name(f".{uuid4().hex}.{self.path.name}")
        self._shape: tuple[int, ...] | None = None
        self._encoder: H264Encoder | None = None

    def write(self, frame: NDArray[np.uint8]) -> None:
        """Append a frame.

        Args:
            frame: (H, W, 3) uint8, each of the same size.

        Raises:
            FrameError: another type or shape.
            OSError: it cannot be written.
        """
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
            raise FrameError(f"frame has shape {frame.shape} and type {frame.dtype}; (H, W, 3) uint8 needed")
        if self._encoder is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._shape = frame.shape
            height, width = (n + n % 2 for n in frame.shape[:2])
            self._encoder = H264Encoder(self._draft, self.fps, height, width, {"crf": "18"})
        if frame.shape != self._shape:
            raise FrameError(f"frame has shape {frame.shape}; the video has {self._shape}")
        # yuv420p halves the colour planes, so that odd sizes need one more row or column.
        even = np.pad(frame, [(0, n % 2) for n in frame.shape[:2]] + [(0, 0)], mode="edge")
        self._encoder.write(even)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._encoder is None:
            return
        try:
            self._encoder.close(finish=kind is None)
            if kind is None:
                os.replace(self._draft, self.path)
        finally:
            self._draft.unlink(missing_ok=True)


class H264Encoder:
    """An open MP4 that frames are appended to: yuv420p, playable while the rest is still on its way.

    Args:
        path: of the file, in a folder that exists.
        fps: frames per second.
        height: of the frames [px], even.
        width: of the frames [px], even.
        options: of x264.
        threads: that encode; None for the encoder's own choice.

    Attributes:
        frames: that were written.
        bytes: of all packets so far.
    """

    def __init__(
        self,
        path: Path,
        fps: Fraction | int,
        height: int,
        width: int,
        options: Mapping[str, str],
        *,
        threads: int | None = None,
    ) -> None:
        import av

        self.frames = self.bytes = 0
        self._container = av.open(str(path), "w", options={"movflags": "faststart"})
        stream: Any = self._container.add_stream("libx264", rate=fps, options=dict(options))
        stream.pix_fmt = "yuv420p"
        stream.height, stream.width = height, width
        if threads is not None:
            stream.codec_context.thread_count = threads
        self._stream = stream

    def write(self, frame: NDArray[np.uint8]) -> None:
        """Append an (H, W, 3) uint8 frame."""
        import av

        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts = self.frames
        self._mux(picture)
        self.frames += 1

    def close(self, *, finish: bool = True) -> None:
        """Close the file; without `finish` what the encoder still holds is given up."""
        try:
            if finish:
                self._mux(None)
        finally:
            self._container.close()

    def _mux(self, picture: Any) -> None:
        packets = self._stream.encode(picture)
        self.bytes += sum(packet.size for packet in packets)
        self._container.mux(packets)
