"""Frames of a LeRobotDataset's videos: which belong to an episode, and how they are decoded."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from worldvla_libero.data.episodes import EpisodeError, Frames, Reason
from worldvla_libero.lerobot.files import Template, misnamed_note
from worldvla_libero.lerobot.index import INDEX_FOLDER, episode_id, file_indices, numbering
from worldvla_libero.lerobot.layout import VIDEO_PATH


class Span(NamedTuple):
    """Where the frames of an episode are.

    Attributes:
        file: path of the video below the data set's folder.
        begin: time of the first frame [s].
        end: time at which the last frame ends [s].
    """

    file: str
    begin: float
    end: float


@dataclass(frozen=True)
class Videos:
    """The videos of one camera.

    A frame does not say whose it is, so that here `meta/episodes` has to; but where it says nothing, names a file
    that is not there or too short, or gives the same frames to two episodes, they are told by their lengths: if
    those of all episodes, in turn, fill file after file to the last frame, that is how they were written.

    Attributes:
        root: the data set's folder.
        info: `info.json`.
        camera: key of its feature.
        steps: of every episode, by number; None where it is not known.
        hints: what `meta/episodes` says, by number.
    """

    root: Path
    info: Mapping[str, Any]
    camera: str
    steps: Mapping[int, int | None]
    hints: Mapping[int, Mapping[str, Any]]

    def read(self, number: int) -> Frames:
        """The frames of an episode, as many as it has rows; only they are decoded.

        Raises:
            EpisodeError: they cannot be found or decoded, or are not as many.
        """
        span, steps = self._span(number), self.steps[number] or 0
        named = f"{episode_id(number)}: {span.file}"
        try:
            return _decode(self.root / span.file, named, span, self.info["fps"], steps)
        except (OSError, IndexError, av.FFmpegError) as error:
            note = misnamed_note(self.root / span.file, "MP4 file")
            raise EpisodeError(Reason.UNREADABLE, f"{named} cannot be decoded ({error}){note}") from error

    def _span(self, number: int) -> Span:
        hinted = self._hinted.get(number)
        if hinted is not None and number not in self._contested and self._holds(hinted, number):
            return hinted
        if number in self._in_turn:
            return self._in_turn[number]
        if hinted is not None and number not in self._contested:
            return hinted  # what is wrong with it shows when it is decoded
        fault = f"gives its frames in {hinted.file} to others too" if hinted else "does not say where they are"
        raise EpisodeError(
            Reason.MISSING_KEY,
            f"{episode_id(number)}: its frames: videos/{self.camera}/… of {INDEX_FOLDER} {fault}, and the lengths "
            f"of all episodes in turn do not fill the files {self._template.text}; chunk_index, file_index and "
            "from_timestamp needed",
        )

    @functools.cached_property
    def _template(self) -> Template:
        return Template("video_path", self.info.get("video_path") or VIDEO_PATH)

    @functools.cached_property
    def _hinted(self) -> dict[int, Span]:
        """What `meta/episodes` says, completed where only one thing can be meant."""
        spans = {}
        fitting: dict[tuple[Any, ...], list[str]] = {}  # for all episodes of which the same is known
        own_file = "{episode_index" in self._template.text  # as in version 2
        for number, steps in self.steps.items():
            hint, prefix = self.hints.get(number, {}), f"videos/{self.camera}"
            indices = file_indices(hint, prefix)
            values = {"video_key": self.camera, **numbering(number, self.info), **indices}
            file = self._template.path(values)
            if file is None:
                known = (number if own_file else None, *indices.items())
                if known not in fitting:
                    fitting[known] = self._template.names(self.root, values)
                file = fitting[known][0] if len(fitting[known]) == 1 else None
            begin, end = (_seconds(hint.get(f"{prefix}/{side}_timestamp")) for side in ("from", "to"))
            duration = (steps or 0) / self.info["fps"]
            if begin is None and end is not None:
                begin = max(0.0, end - duration)
            if begin is None and own_file:
                begin = 0.0
            if file is not None and begin is not None and steps:
                spans[number] = Span(file, begin, begin + duration if end is None else end)
        return spans

    @functools.cached_property
    def _contested(self) -> frozenset[int]:
        """Episodes that `meta/episodes` gives frames of others."""
        fps = self.info["fps"]
        files: dict[str, list[tuple[float, float, int]]] = {}
        for number, span in self._hinted.items():
            last = span.begin + (self.steps[number] or 0) / fps - 0.5 / fps  # times are rounded
            files.setdefault(span.file, []).append((span.begin, last, number))
        contested: set[int] = set()
        for spans in files.values():
            latest, holder = -math.inf, -1
            for begin, last, number in sorted(spans):
                if begin < latest:
                    contested |= {number, holder}
                if last > latest:
                    latest, holder = last, number
        return frozenset(contested)

    @functools.cached_property
    def _in_turn(self) -> dict[int, Span]:
        """All episodes, one after the other; none if they do not fill the files to the last frame."""
        files = self._template.names(self.root, {"video_key": self.camera})
        ends = [*itertools.accumulate(self._count(file) or 0 for file in files)]
        spans: dict[int, Span] = {}
        done, video, fps = 0, 0, self.info["fps"]
        for number, steps in sorted(self.steps.items()):
            while video < len(ends) and ends[video] <= done:
                video += 1
            if not steps or video == len(ends) or done + steps > ends[video]:
                return {}
            first = done - (ends[video - 1] if video else 0)
            spans[number] = Span(files[video], first / fps, (first + steps) / fps)
            done += steps
        return spans if ends and done == ends[-1] else {}

    def _holds(self, span: Span, number: int) -> bool:
        """Whether a file is there and long enough for an episode."""
        count = self._count(span.file)
        first = round(span.begin * self.info["fps"])
        return count is not None and first + (self.steps[number] or 0) <= count

    def _count(self, file: str) -> int | None:
        if file not in self._counted:
            self._counted[file] = _count_frames(self.root / file)
        return self._counted[file]

    @functools.cached_property
    def _counted(self) -> dict[str, int | None]:
        return {}


def _seconds(value: Any) -> float | None:
    usable = isinstance(value, int | float) and 0 <= value < 1e9
    return float(value) if usable else None


def _count_frames(path: Path) -> int | None:
    """Frames in a video by its header, else by its packets; None where it cannot be read."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            return stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    except (OSError, IndexError, av.FFmpegError):
        return None


def _decode(path: Path, named: str, span: Span, fps: float, length: int) -> Frames:
    """The frames at span.begin + i / fps, i = 0 … length - 1, as (T, H, W, 3)."""
    _, begin, end = span
    # Times in files are rounded, but never so far that a neighbour comes near.
    tolerance = 0.25 / fps
    frames: Frames = np.empty(0, dtype=np.uint8)
    found = 0
    converter = VideoReformatter()  # one for all: to set one up takes longer than to convert a frame
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for picture in _pictures(container, stream, begin + tolerance):
            due = begin + found / fps
            if picture.time is None or picture.time < due - tolerance:
                continue
            if picture.time > min(due, end - 1 / fps) + tolerance:
                break  # a gap, or the next episode
            if picture.is_corrupt:
                raise EpisodeError(Reason.BAD_FRAMES, f"{named}: frame {found} is damaged")
            if not found:
                frames = np.empty((length, picture.height, picture.width, 3), dtype=np.uint8)
            frames[found] = converter.reformat(picture, format="rgb24").to_ndarray()
            found += 1
            if found == length:
                return frames
    raise EpisodeError(Reason.MISSING_FRAMES, f"{named} has {found} frames for {length} rows")


def _pictures(container: Any, stream: Any, time: float) -> Iterator[av.VideoFrame]:
    """Decoded pictures in order, the first of them at or before a time [s]."""
    container.seek(max(0, int(time / stream.time_base)), stream=stream)
    pictures = container.decode(stream)
    first = next(pictures, None)
    if first is not None and first.time is not None and first.time <= time:
        return itertools.chain([first], pictures)
    # Files are ordered by when a picture is decoded; with B-frames a keyframe may come before earlier pictures.
    container.seek(0, stream=stream)
    return container.decode(stream)
