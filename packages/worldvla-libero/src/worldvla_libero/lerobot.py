"""Demonstrations in a LeRobotDataset v3.x: the source that reads them; `write_lerobot` writes them.

Tables and images are Parquet, videos MP4; a file holds many episodes, and `meta/episodes` says where each begins.
Both directions need pyarrow and PyAV, never `lerobot` itself.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from PIL import Image

from worldvla_libero.episodes import Dropped, Episode, EpisodeError, EpisodeKey, Frames, Reason
from worldvla_libero.lerobot_writer import (
    ACTION_KEY,
    INFO_FILE,
    STATE_KEY,
    TASKS_FILE,
    DataSetExistsError,
    write_lerobot,
)

__all__ = ["LIBERO_CAMERAS", "DataSetExistsError", "LeRobotSource", "is_lerobot", "write_lerobot"]

# LeRobot's names, then openpi's.
ACTION_KEYS = (ACTION_KEY, "actions")
STATE_KEYS = (STATE_KEY, "state")
# Agentview and wrist in the published LIBERO data sets.
LIBERO_CAMERAS = (
    ("observation.images.image", "observation.images.image2"),
    ("observation.images.image", "observation.images.wrist_image"),
    ("image", "wrist_image"),
)
LIBERO_HZ = 20.0

# What a row of meta/episodes must say; more of it for the cameras that are videos.
_ROW = ("episode_index", "tasks", "length", "data/chunk_index", "data/file_index")


def is_lerobot(path: str | os.PathLike[str]) -> bool:
    """Whether a folder claims to be a LeRobotDataset, of whatever version: it has `meta/info.json`."""
    return (Path(path) / INFO_FILE).is_file()


@dataclass(frozen=True)
class LeRobotSource:
    """Demonstrations in a LeRobotDataset v3.x.

    A camera goes by the key of its feature. Frames are given as they are stored: published LIBERO data sets are
    upright already, unlike LIBERO's own files.

    Args:
        root: the data set's folder.
        action_key: feature with the actions; None for `action`, else openpi's `actions`.
        state_key: feature with the proprioception; None for `observation.state`, else openpi's `state`, else none.
        control_hz: actions per second; None for what the data set says. LIBERO's published data sets say 10
            although they were recorded at 20 Hz, so that 20 is taken where the robot is `panda`, the cameras are
            one of the pairs `LIBERO_CAMERAS` and fps is 10.
    """

    root: Path
    action_key: str | None = None
    state_key: str | None = None
    control_hz: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.root.absolute().name

    @property
    def cameras(self) -> tuple[str, ...]:
        """Keys of all features that are images or videos, LIBERO's agentview first.

        Raises:
            EpisodeError: the folder is no LeRobotDataset v3.x.
        """
        keys = [key for key, feature in self._info["features"].items() if feature["dtype"] in ("image", "video")]
        first = {agentview for agentview, _ in LIBERO_CAMERAS}
        return tuple(sorted(keys, key=lambda key: key not in first))

    @property
    def needs_replay(self) -> bool:
        """False: the frames are there."""
        return False

    @property
    def notes(self) -> tuple[str, ...]:
        """Nothing is guessed."""
        return ()

    def list(self) -> tuple[list[EpisodeKey], list[Dropped]]:
        """Episodes by number, read from `meta/episodes` alone, and those (or whole files of them) of no use.

        Raises:
            EpisodeError: the folder is no LeRobotDataset v3.x, or has no file in `meta/episodes`.
        """
        keys: list[EpisodeKey] = []
        dropped: list[Dropped] = []
        promised = self._info["total_episodes"]
        lost_file = False
        for file in self._index_files:
            try:
                rows = _table(file, self._named(file), ["episode_index", "tasks", "length"]).to_pylist()
            except EpisodeError as error:
                dropped.append(Dropped.because(self._named(file), error))
                lost_file = True
                continue
            for row in rows:
                id = _id(row["episode_index"])
                try:
                    keys.append(EpisodeKey(id, _only_task(id, row["tasks"] or ()), row["length"]))
                except EpisodeError as error:
                    dropped.append(Dropped.because(id, error))
        found = len(keys) + len(dropped)
        if found < promised and not lost_file:
            message = f"{found} episodes are listed; {INFO_FILE} promises {promised}"
            dropped.append(Dropped("meta/episodes", str(Reason.UNREADABLE), message))
        return sorted(keys), dropped

    def read(self, id: str, cameras: Sequence[str] = ()) -> Episode:
        """Read one episode; see `Source.read`. Of a video only its span is decoded, of a table only its rows.

        Raises:
            EpisodeError: a file is missing or damaged, a feature or task is missing, the rows are not as many as
                `meta/episodes` says or change their task, or a video has fewer frames than there are rows.
        """
        features = self._info["features"]
        for camera in cameras:
            if camera not in self.cameras:
                known = ", ".join(self.cameras) or "none"
                raise EpisodeError(
                    Reason.MISSING_KEY, f"{id}: no camera {camera!r} in {INFO_FILE}; existing: {known}"
                )
        action_key = self._key("action_key", ACTION_KEYS)
        given = self.state_key is not None or any(key in features for key in STATE_KEYS)
        state_key = self._key("state_key", STATE_KEYS) if given else None
        embedded = [camera for camera in cameras if features[camera]["dtype"] == "image"]
        place = self._place(id)
        rows = self._rows(id, place, [action_key, *([state_key] if state_key else []), *embedded])
        frames = {
            camera: _images(id, camera, rows[camera]) if camera in embedded else self._video(id, camera, place)
            for camera in cameras
        }
        instruction = _only_task(id, [self._task(id, number) for number in dict.fromkeys(rows["task_index"])])
        return Episode(
            id=id,
            task=instruction,
            instruction=instruction,
            actions=_vectors(id, action_key, rows[action_key]),
            frames=frames,
            robot_states=_vectors(id, state_key, rows[state_key]) if state_key else None,
            control_hz=self._control_hz,
        )

    @functools.cached_property
    def _info(self) -> dict[str, Any]:
        file = self.root / INFO_FILE
        try:
            info = json.loads(file.read_text("utf-8"))
            version = str(info["codebase_version"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise EpisodeError(Reason.UNREADABLE, f"{file} describes no LeRobotDataset ({error!r})") from error
        if version.startswith(("v1.", "v2.")):
            raise EpisodeError(
                Reason.UNREADABLE,
                f"{file}: codebase_version is {version}; v3.x needed. lerobot converts it: "
                "python -m lerobot.datasets.v30.convert_dataset_v21_to_v30 --repo-id=…",
            )
        if not version.startswith("v3."):
            raise EpisodeError(Reason.UNREADABLE, f"{file}: codebase_version is {version}; v3.x needed")
        _require(info, ["data_path", "features", "fps", "total_episodes"], str(file))
        if not (isinstance(info["fps"], int | float) and info["fps"] > 0):
            raise EpisodeError(Reason.UNREADABLE, f"{file}: fps is {info['fps']!r}; a number above 0 needed")
        for key, feature in info["features"].items():
            _require(feature, ["dtype"], f"{file}: feature {key!r}")
        return info

    @functools.cached_property
    def _tasks(self) -> dict[int, str]:
        table = _table(self.root / TASKS_FILE, TASKS_FILE)
        # The words are an index of pandas; lerobot 0.4 gives it no name, and pandas stores such an index as this.
        words = "__index_level_0__" if "__index_level_0__" in table.column_names else "task"
        _require(table.column_names, ["task_index", words], TASKS_FILE)
        return dict(zip(table["task_index"].to_pylist(), table[words].to_pylist(), strict=True))

    @property
    def _index_files(self) -> Sequence[Path]:
        files = sorted(self.root.glob("meta/episodes/*/*.parquet"))
        if not files:
            raise EpisodeError(Reason.UNREADABLE, f"no Parquet file in {self.root / 'meta/episodes'}")
        return files

    @property
    def _control_hz(self) -> float:
        if self.control_hz is not None:
            return self.control_hz
        fps = float(self._info["fps"])
        libero = self._info.get("robot_type") == "panda" and set(self.cameras) in map(set, LIBERO_CAMERAS)
        return LIBERO_HZ if libero and fps == 10 else fps

    def _key(self, option: str, usual: Sequence[str]) -> str:
        features = self._info["features"]
        wanted = getattr(self, option)
        allowed = usual if wanted is None else (wanted,)
        for key in allowed:
            if key in features:
                return key
        raise EpisodeError(
            Reason.MISSING_KEY,
            f"{self.root / INFO_FILE}: no feature {' or '.join(allowed)}; existing: {', '.join(features)}; "
            f"the option {option} names another",
        )

    def _named(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()

    def _place(self, id: str) -> dict[str, Any]:
        """The episode's row of meta/episodes, which says where its rows and frames are."""
        number = int(id.removeprefix("episode_")) if re.fullmatch(r"episode_\d{6,}", id) else -1
        for file in self._index_files:
            try:
                rows = _table(file, self._named(file), episode=number).to_pylist()
            except EpisodeError:
                continue  # `list` reports it
            if rows:
                _require(rows[0], _ROW, self._named(file))
                return rows[0]
        last = _id(self._info["total_episodes"] - 1)
        raise EpisodeError(
            Reason.UNREADABLE,
            f"{id!r} is not in what can be read of {self.root / 'meta/episodes'}; existing: {_id(0)} to {last}",
        )

    def _path(self, template: str, place: Mapping[str, Any], prefix: str, **names: str) -> Path:
        indices = {name: place[f"{prefix}/{name}"] for name in ("chunk_index", "file_index")}
        pattern = self._info.get(template)
        try:
            return self.root / str(pattern).format(**indices, **names)
        except (AttributeError, LookupError, ValueError) as error:
            raise EpisodeError(
                Reason.UNREADABLE, f"{self.root / INFO_FILE}: {template} is {pattern!r}, which makes no path"
            ) from error

    def _rows(self, id: str, place: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Sequence[Any]]:
        path = self._path("data_path", place, "data")
        columns = [*columns, "frame_index", "task_index"]
        rows = _table(path, self._named(path), columns, place["episode_index"]).to_pydict()
        held, needed = rows["frame_index"], place["length"]
        if held != [*range(needed)]:
            order = "" if len(held) != needed else ", not in order of frame_index"
            raise EpisodeError(
                Reason.UNREADABLE,
                f"{id}: {len(held)} rows in {self._named(path)}{order}; meta/episodes promises {needed}",
            )
        return rows

    def _task(self, id: str, number: int) -> str:
        if number not in self._tasks:
            known = ", ".join(map(str, self._tasks)) or "none"
            raise EpisodeError(
                Reason.MISSING_KEY, f"{id}: no task_index {number} in {TASKS_FILE}; existing: {known}"
            )
        return self._tasks[number]

    def _video(self, id: str, camera: str, place: Mapping[str, Any]) -> Frames:
        prefix = f"videos/{camera}"
        names = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
        _require(place, [f"{prefix}/{name}" for name in names], "meta/episodes")
        path = self._path("video_path", place, prefix, video_key=camera)
        span = place[f"{prefix}/from_timestamp"], place[f"{prefix}/to_timestamp"]
        named = f"{id}: {self._named(path)}"
        try:
            return _decode(path, named, span, self._info["fps"], place["length"])
        except (OSError, IndexError, av.FFmpegError) as error:
            raise EpisodeError(Reason.UNREADABLE, f"{named} cannot be decoded ({error})") from error


def _id(number: int) -> str:
    return f"episode_{number:06d}"


def _require(held: Iterable[str], names: Sequence[str], where: str) -> None:
    missing = [name for name in names if name not in held]
    if missing:
        raise EpisodeError(
            Reason.MISSING_KEY, f"{where}: no {', '.join(missing)}; existing: {', '.join(held) or 'nothing'}"
        )


def _only_task(id: str, tasks: Sequence[str]) -> str:
    if not tasks:
        raise EpisodeError(Reason.MISSING_KEY, f"{id}: no task; one needed")
    if len(tasks) > 1:  # to take the first would pair what comes after it with the wrong words
        raise EpisodeError(Reason.UNREADABLE, f"{id}: its task changes ({'; '.join(tasks)}); one needed")
    return tasks[0]


@contextmanager
def _parquet(path: Path, name: str) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        message = f"{name}: missing, truncated or no Parquet file ({' '.join(str(error).split())})"
        raise EpisodeError(Reason.UNREADABLE, message) from error


def _table(path: Path, name: str, columns: Sequence[str] | None = None, episode: int | None = None) -> pa.Table:
    """Read columns of a Parquet file.

    Args:
        path: of the file.
        name: what messages call it.
        columns: None for all but statistics.
        episode: only rows of this one, and only row groups that may hold it; None for all rows.
    """
    with _parquet(path, name) as file:
        held = file.schema_arrow.names
        if columns is None:
            columns = [column for column in held if not column.startswith("stats/")]
        if episode is not None:
            columns = [*dict.fromkeys([*columns, "episode_index"])]
        _require(held, columns, name)
        schema = pa.schema([file.schema_arrow.field(column) for column in columns])
        groups = [g for g in range(file.num_row_groups) if _may_hold(file.metadata.row_group(g), episode)]
        batches = []
        for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=columns):
            batch = batch.select(columns)  # asked for `a`, pyarrow reads `a.b` as well
            if episode is not None:
                batch = batch.filter(pc.equal(batch["episode_index"], episode))
            batches.append(batch)
        return pa.Table.from_batches(batches, schema=schema)


def _may_hold(group: pq.RowGroupMetaData, episode: int | None) -> bool:
    for column in map(group.column, range(group.num_columns)):
        if episode is not None and column.path_in_schema == "episode_index":
            statistics = column.statistics
            known = statistics is not None and statistics.has_min_max
            return not known or statistics.min <= episode <= statistics.max
    return True


def _vectors(id: str, key: str, rows: Sequence[Any]) -> NDArray[np.float64]:
    try:
        array = np.asarray(rows, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise EpisodeError(
            Reason.ACTION_WIDTH, f"{id}: rows of {key!r} are not vectors of one width ({error})"
        ) from error
    return array[:, None] if array.ndim == 1 else array  # vectors of one element are stored as plain numbers


def _images(id: str, camera: str, cells: Sequence[Any]) -> Frames:
    """Encoded images, each {"bytes": …, "path": …} → (T, H, W, 3)."""
    frames: Frames = np.empty(0, dtype=np.uint8)
    for t, cell in enumerate(cells):
        try:
            with Image.open(io.BytesIO(cell["bytes"])) as image:
                if image.mode not in ("RGB", "RGBA", "L", "P"):
                    raise ValueError(f"mode {image.mode}; 8-bit colours or greys needed")
                frame = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
            raise EpisodeError(
                Reason.BAD_FRAMES, f"{id}: frame {t} of {camera!r} is no image ({error})"
            ) from error
        if t == 0:
            frames = np.empty((len(cells), *frame.shape), dtype=np.uint8)
        if frame.shape != frames.shape[1:]:
            raise EpisodeError(
                Reason.BAD_FRAMES,
                f"{id}: frame {t} of {camera!r} has shape {frame.shape}, frame 0 has {frames.shape[1:]}",
            )
        frames[t] = frame
    return frames


def _decode(path: Path, named: str, span: tuple[float, float], fps: float, length: int) -> Frames:
    """The frames at span[0] + i / fps, i = 0 … length - 1, as (T, H, W, 3)."""
    begin, end = span
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
