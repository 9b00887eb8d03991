"""Writing a LeRobotDataset v3.0, which `lerobot` itself reads."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from worldvla_libero.data.episodes import Episode, EpisodeError, Frames, Reason, check_episode
from worldvla_libero.lerobot.layout import (
    ACTION_KEY,
    CAMERA_KEYS,
    DATA_PATH,
    EPISODES_PATH,
    FILES_PER_CHUNK,
    INFO_FILE,
    STATE_KEY,
    STATS_FILE,
    TASKS_FILE,
    VIDEO_PATH,
)
from worldvla_libero.video import H264Encoder
from worldvla_tokenizers.files import staged_folder, write_text_atomic

_ROW_TYPES = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
_ROWS_AT_ONCE = 64  # of meta/episodes: a row group for each would swell the footers

_Stats = dict[str, NDArray[Any]]
_Features = dict[str, dict[str, Any]]  # as info.json has them


class DataSetExistsError(FileExistsError):
    """There is something already where the data set is to be written."""


def write_lerobot(
    episodes: Iterable[Episode],
    root: str | os.PathLike[str],
    *,
    fps: int = 20,
    camera_keys: Mapping[str, str] | None = None,
    robot_type: str = "panda",
    video: bool = False,
    crf: int = 18,
    max_file_mb: float = 100,
) -> int:
    """Write a LeRobotDataset v3.0, whole or not at all, one episode in memory at a time.

    The same episodes give the same bytes with the same pyarrow, datasets, Pillow and PyAV (and, for videos, on
    the same kind of processor). The format has no place for an episode's id, LIBERO's name of its task, simulator
    states, seed and versions; actions and proprioception are rounded to float32, as LeRobot's policies expect.

    Args:
        episodes: with frames of the same cameras and sizes; `episode_000000`, `episode_000001` … in this order.
        root: the new folder.
        fps: control steps per second; every episode must have been recorded at this rate. LIBERO's published data
            sets say 10 although LIBERO runs at 20 Hz; this says what is true.
        camera_keys: key of the feature by camera. Without: `observation.images.image` for `agentview` and
            `observation.images.image2` for `robot0_eye_in_hand`, as policies for LIBERO expect; names that begin
            with `observation.` stay; all others become `observation.images.<name>`.
        robot_type: of the robot, as a label.
        video: H.264 (yuv420p), a fraction of the size but lossy; otherwise PNG inside the tables, lossless.
        crf: quality of the videos, 0 (best) to 51.
        max_file_mb: a file that has grown past it is followed by a new one.

    Returns:
        How many episodes were written.

    Raises:
        DataSetExistsError: `root` exists.
        EpisodeError: there is no episode; or one cannot be used, or has other features than the first.
        ValueError: an option is out of range, two cameras have one key, or an episode has another rate than `fps`.
    """
    root = Path(root)
    if os.path.lexists(root):
        raise DataSetExistsError(f"{root} exists; choose another folder, or remove it first")
    if fps < 1 or fps != int(fps):
        raise ValueError(f"fps is {fps}; allowed: whole numbers from 1")
    if not 0 <= crf <= 51:
        raise ValueError(f"crf is {crf}; allowed: 0 to 51")
    if not max_file_mb > 0:
        raise ValueError(f"max_file_mb is {max_file_mb}; allowed: above 0")
    keys = {**CAMERA_KEYS, **(camera_keys or {})}
    with staged_folder(root) as stage:
        with _DataSet(stage, int(fps), keys, crf if video else None, max_file_mb) as data_set:
            for episode in episodes:
                data_set.add(episode)
        if not data_set.length:
            raise EpisodeError(Reason.TOO_SHORT, "no episode to write")
        data_set.describe(robot_type)
    return data_set.length


class _DataSet:
    """A LeRobotDataset that grows by episodes; `describe` completes it once all other files are closed."""

    def __init__(
        self, folder: Path, fps: int, keys: Mapping[str, str], crf: int | None, max_file_mb: float
    ) -> None:
        self.folder, self.fps, self.keys, self.crf, self.max_file_mb = folder, fps, keys, crf, max_file_mb
        self.length = 0  # episodes
        self.steps = 0
        self._features: _Features = {}  # of the first episode
        self._tasks: dict[str, int] = {}
        self._stats: dict[str, _Stats] = {}
        self._index_rows: list[dict[str, Any]] = []  # of meta/episodes, not written yet
        self._open = ExitStack()
        self._data = self._open.enter_context(_Tables(folder, DATA_PATH, max_file_mb))
        self._index = self._open.enter_context(_Tables(folder, EPISODES_PATH, max_file_mb))
        self._videos: dict[str, _Videos] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open:
            if kind is None:
                self._write_index()

    def add(self, episode: Episode) -> None:
        """Append an episode.

        Raises:
            EpisodeError: it cannot be used, or has other features than the first.
            ValueError: its rate or the keys of its cameras do not fit.
        """
        check_episode(episode)
        if episode.control_hz != self.fps:
            raise ValueError(f"fps is {self.fps}, but {episode.id} was recorded at {episode.control_hz:g} Hz")
        frames = self._frames_by_key(episode)
        vectors = {ACTION_KEY: episode.actions.astype(np.float32)}
        if episode.proprioception is not None:
            vectors[STATE_KEY] = _checked_states(episode.id, episode.proprioception, len(episode))
        self._check_features(episode.id, _features(vectors, frames, None if self.crf is None else self.fps))

        numbers = {**vectors, **self._row_numbers(len(episode), episode.instruction)}  # (T, D) each
        # A feature of one element is a plain column to LeRobot, not a list.
        columns: dict[str, Any] = {
            key: [*array] if array.shape[1] > 1 else array[:, 0] for key, array in numbers.items()
        }
        row: dict[str, Any] = {
            "episode_index": self.length,
            "tasks": [episode.instruction],
            "length": len(episode),
            "dataset_from_index": self.steps,
            "dataset_to_index": self.steps + len(episode),
        }
        for key, images in frames.items():
            if self.crf is None:
                columns[key] = [
                    {"bytes": _png(image), "path": f"frame-{i:06d}.png"} for i, image in enumerate(images)
                ]
            else:
                row |= _prefixed(f"videos/{key}", self._video(key, self.crf).add(images))
        table = pa.Table.from_pydict(columns, schema=_arrow_schema(self._features))
        row |= _prefixed("data", self._data.add(table))

        stats = {key: _vector_stats(array) for key, array in numbers.items()}
        stats |= {key: _image_stats(images) for key, images in frames.items()}
        for key, values in stats.items():
            row |= _prefixed(f"stats/{key}", {name: value.tolist() for name, value in values.items()})
        self._stats = {key: _merged(self._stats.get(key), values) for key, values in stats.items()}

        self._index_rows.append(row)
        self.length += 1
        self.steps += len(episode)
        if len(self._index_rows) == _ROWS_AT_ONCE:
            self._write_index()

    def describe(self, robot_type: str) -> None:
        """Write the tasks, the statistics and what is in the data set."""
        info = {
            "codebase_version": "v3.0",
            "robot_type": robot_type,
            "total_episodes": self.length,
            "total_frames": self.steps,
            "total_tasks": len(self._tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": self.max_file_mb,
            "video_files_size_in_mb": self.max_file_mb,
            "fps": self.fps,
            "splits": {"train": f"0:{self.length}"},
            "data_path": DATA_PATH,
            "video_path": None if self.crf is None else VIDEO_PATH,
            "features": self._features,
        }
        stats = {key: {name: value.tolist() for name, value in s.items()} for key, s in self._stats.items()}
        write_text_atomic(self.folder / INFO_FILE, json.dumps(info, indent=4, ensure_ascii=False) + "\n")
        write_text_atomic(self.folder / STATS_FILE, json.dumps(stats, indent=4) + "\n")
        pq.write_table(_task_table(self._tasks), self.folder / TASKS_FILE)

    def _frames_by_key(self, episode: Episode) -> dict[str, Frames]:
        frames: dict[str, Frames] = {}
        for camera, images in episode.frames.items():
            usual = camera if camera.startswith("observation.") else f"observation.images.{camera}"
            key = self.keys.get(camera, usual)
            if "/" in key or key in frames:
                raise ValueError(f"camera {camera!r} has key {key!r}; allowed: one of its own, without '/'")
            frames[key] = images
        return frames

    def _check_features(self, id: str, features: _Features) -> None:
        self._features = self._features or features
        if set(features) != set(self._features):
            raise EpisodeError(
                Reason.MISSING_KEY,
                f"{id} has features {', '.join(features)}; the first episode has {', '.join(self._features)}",
            )
        for key, first in self._features.items():
            shape, needed = features[key]["shape"], first["shape"]
            if shape != needed:
                reason = Reason.BAD_FRAMES if len(needed) == 3 else Reason.ACTION_WIDTH
                raise EpisodeError(reason, f"{id}: {key!r} has shape {shape}; the first episode's has {needed}")
            if first["dtype"] == "video" and (shape[0] % 2 or shape[1] % 2):
                raise EpisodeError(
                    Reason.BAD_FRAMES, f"{id}: {key!r} has shape {shape}; yuv420p needs even sides, PNG does not"
                )

    def _row_numbers(self, steps: int, instruction: str) -> dict[str, NDArray[Any]]:
        task = self._tasks.setdefault(instruction, len(self._tasks))
        i = np.arange(steps)
        values = (i / self.fps, i, np.full(steps, self.length), self.steps + i, np.full(steps, task))
        return {
            key: value.astype(type)[:, None] for (key, type), value in zip(_ROW_TYPES.items(), values, strict=True)
        }

    def _video(self, key: str, crf: int) -> _Videos:
        if key not in self._videos:
            videos = _Videos(self.folder, key, self.fps, crf, self.max_file_mb)
            self._videos[key] = self._open.enter_context(videos)
        return self._videos[key]

    def _write_index(self) -> None:
        if self._index_rows:
            location = _prefixed("meta/episodes", self._index.location())
            self._index.add(pa.Table.from_pylist([row | location for row in self._index_rows]))
            self._index_rows.clear()


class _Tables:
    """Tables of one schema, each a row group of its own, in Parquet files of limited size."""

    def __init__(self, folder: Path, template: str, max_mb: float) -> None:
        self.folder, self.template, self.max_bytes = folder, template, max_mb * 2**20
        self._number = 0  # of the file
        self._writer: pq.ParquetWriter | None = None

    def location(self) -> dict[str, int]:
        """Where the next table goes."""
        if self._writer is not None and self._path.stat().st_size >= self.max_bytes:
            self._close()
            self._number += 1
        return _place(self._number)

    def add(self, table: pa.Table) -> dict[str, int]:
        """Append a table; returns where it is."""
        location = self.location()
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table, row_group_size=table.num_rows)
        return location

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @property
    def _path(self) -> Path:
        return self.folder / self.template.format(**_place(self._number))

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


class _Videos:
    """Frames of one camera, episode after episode, in MP4 files of limited size."""

    def __init__(self, folder: Path, key: str, fps: int, crf: int, max_mb: float) -> None:
        self.folder, self.key, self.fps, self.crf, self.max_bytes = folder, key, fps, crf, max_mb * 2**20
        self._number = 0  # of the file
        self._encoder: H264Encoder | None = None

    def add(self, frames: Frames) -> dict[str, float]:
        """Append (T, H, W, 3) frames; returns where they are."""
        if self._encoder is not None and self._encoder.bytes >= self.max_bytes:
            self._close()
            self._number += 1
        if self._encoder is None:
            self._encoder = self._start(*frames.shape[1:3])
        first = self._encoder.frames
        for frame in frames:
            self._encoder.write(frame)
        times = {"from_timestamp": first / self.fps, "to_timestamp": self._encoder.frames / self.fps}
        return {**_place(self._number), **times}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _start(self, height: int, width: int) -> H264Encoder:
        path = self.folder / VIDEO_PATH.format(video_key=self.key, **_place(self._number))
        path.parent.mkdir(parents=True, exist_ok=True)
        # Every second frame a keyframe, as LeRobot has it: training asks for single frames in random order.
        options = {"crf": str(self.crf), "g": "2", "bf": "0"}
        # The bytes must depend neither on the number of processors nor on their instructions, by which x264 else
        # chooses among functions that round differently.
        options["x264-params"] = "lookahead-threads=1:cpu-independent=1"
        return H264Encoder(path, self.fps, height, width, options, threads=1)

    def _close(self) -> None:
        encoder, self._encoder = self._encoder, None
        if encoder is not None:
            encoder.close()


def _place(number: int) -> dict[str, int]:
    return {"chunk_index": number // FILES_PER_CHUNK, "file_index": number % FILES_PER_CHUNK}


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in values.items()}


def _checked_states(id: str, states: NDArray[np.float64], steps: int) -> NDArray[np.float32]:
    if states.ndim != 2 or len(states) != steps:
        raise EpisodeError(
            Reason.ACTION_WIDTH, f"{id}: its proprioception has shape {states.shape}; ({steps}, S) needed"
        )
    if not np.isfinite(states).all():
        raise EpisodeError(Reason.NOT_FINITE, f"{id}: its proprioception holds {states[~np.isfinite(states)][0]}")
    return states.astype(np.float32)


def _features(
    vectors: Mapping[str, NDArray[Any]], frames: Mapping[str, Frames], video_fps: int | None
) -> _Features:
    """What info.json says of each feature; `video_fps` is None for images."""
    features: _Features = {}
    for key, images in frames.items():
        _, height, width, _ = images.shape
        feature: dict[str, Any] = {
            "dtype": "image",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
        }
        if video_fps is not None:
            feature["dtype"] = "video"
            feature["info"] = {
                "video.height": height,
                "video.width": width,
                "video.codec": "h264",
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": video_fps,
                "video.channels": 3,
                "has_audio": False,
            }
        features[key] = feature
    for key, array in vectors.items():
        names = [f"{key.rpartition('.')[2]}_{i}" for i in range(array.shape[1])]
        features[key] = {"dtype": "float32", "shape": [len(names)], "names": names}
    return features | {key: {"dtype": type, "shape": [1], "names": None} for key, type in _ROW_TYPES.items()}


def _arrow_schema(features: _Features) -> pa.Schema:
    """Columns of the data tables, with the note by which `datasets` knows its images from other bytes."""
    import datasets

    columns: dict[str, Any] = {}
    for key, feature in features.items():
        if feature["dtype"] == "image":
            columns[key] = datasets.Image()
        elif feature["dtype"] != "video":
            value, (width,) = datasets.Value(feature["dtype"]), feature["shape"]
            columns[key] = value if width == 1 else datasets.List(value, length=width)
    return datasets.Features(columns).arrow_schema


def _task_table(tasks: Mapping[str, int]) -> pa.Table:
    """The number of each task, with the note by which pandas makes the words its index."""
    columns = [
        {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"},
        {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object"},
    ]
    index = [{"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object"}]
    note = {"index_columns": ["task"], "column_indexes": index, "columns": columns}
    table = pa.table(
        {"task_index": pa.array([*tasks.values()], pa.int64()), "task": pa.array([*tasks], pa.string())}
    )
    return table.replace_schema_metadata({"pandas": json.dumps(note)})


def _png(image: NDArray[np.uint8]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


def _vector_stats(array: NDArray[Any]) -> _Stats:
    """(T, D) → (D,) each, but (1,) steps."""
    values = array.astype(np.float64)
    quantiles = np.quantile(values, [*_QUANTILES.values()], axis=0)
    return {
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "mean": values.mean(axis=0),
        "std": values.std(axis=0),
        "count": np.array([len(values)]),
        **dict(zip(_QUANTILES, quantiles, strict=True)),
    }


def _image_stats(frames: Frames) -> _Stats:
    """(T, H, W, 3) → (3, 1, 1) each of values scaled to [0, 1], but (1,) frames; exact, by counting all values."""
    counts = np.zeros((3, 256), dtype=np.int64)
    for frame in frames:
        counts += [np.bincount(frame[..., channel].ravel(), minlength=256) for channel in range(3)]
    total = frames.size // 3
    values = np.arange(256) / 255
    mean = (counts * np.arange(256)).sum(axis=1) / (255 * total)  # whole numbers: no order of summing shows
    below = counts.cumsum(axis=1)
    stats = {
        "min": values[(counts > 0).argmax(axis=1)],
        "max": values[(below == total).argmax(axis=1)],
        "mean": mean,
        "std": np.sqrt((counts * (values - mean[:, None]) ** 2).sum(axis=1) / total),
        **{name: values[(below >= quantile * total).argmax(axis=1)] for name, quantile in _QUANTILES.items()},
    }
    return {name: value.reshape(3, 1, 1) for name, value in stats.items()} | {"count": np.array([len(frames)])}


def _merged(old: _Stats | None, new: _Stats) -> _Stats:
    """Statistics of both. Quantiles have no exact merger; their mean by count is LeRobot's own rule."""
    if old is None:
        return new
    count = old["count"] + new["count"]
    share = float(new["count"][0] / count[0])
    step = new["mean"] - old["mean"]
    variance = (1 - share) * old["std"] ** 2 + share * new["std"] ** 2 + share * (1 - share) * step**2
    return {
        "min": np.minimum(old["min"], new["min"]),
        "max": np.maximum(old["max"], new["max"]),
        "mean": old["mean"] + share * step,
        "std": np.sqrt(variance),
        "count": count,
        **{name: (1 - share) * old[name] + share * new[name] for name in _QUANTILES},
    }
