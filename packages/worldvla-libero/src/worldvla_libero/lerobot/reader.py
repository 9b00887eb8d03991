"""Demonstrations in a LeRobotDataset v3.x: the source that reads them; `write_lerobot` writes them.

Tables and images are Parquet, videos MP4; a file holds many episodes. Data sets come from several versions of
lerobot, its converters and others' programs, so that what can be told without it need not stand in `meta`.
Both directions need pyarrow and PyAV, never `lerobot` itself.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from worldvla_libero.data.episodes import (
    Episode,
    EpisodeError,
    EpisodeKey,
    Frames,
    Reason,
)
from worldvla_libero.data.hub import data_name
from worldvla_libero.jobs.parts import Dropped
from worldvla_libero.lerobot.files import require, whole
from worldvla_libero.lerobot.index import EpisodeIndex, episode_id, read_rows
from worldvla_libero.lerobot.layout import ACTION_KEY, INFO_FILE, STATE_KEY
from worldvla_libero.lerobot.videos import Videos

# LeRobot's names, then openpi's.
ACTION_KEYS = (ACTION_KEY, "actions")
STATE_KEYS = (STATE_KEY, "state")
# Agentview and wrist in the published LIBERO data sets.
CAMERA_PAIRS = (
    ("observation.images.image", "observation.images.image2"),
    ("observation.images.image", "observation.images.wrist_image"),
    ("image", "wrist_image"),
)
LIBERO_HZ = 20.0


def is_lerobot(path: str | os.PathLike[str]) -> bool:
    """Whether a folder claims to be a LeRobotDataset, of whatever version: it has `meta/info.json`."""
    return (Path(path) / INFO_FILE).is_file()


@dataclass(frozen=True)
class LeRobotSource:
    """Demonstrations in a LeRobotDataset v3.x.

    A camera goes by the key of its feature. Frames are given as they are stored: published LIBERO data sets are
    upright already, unlike LIBERO's own files. Its files are looked through once, when it is first listed or read.

    Args:
        root: the data set's folder.
        action_key: feature with the actions; None for `action`, else openpi's `actions`.
        state_key: feature with the proprioception; None for `observation.state`, else openpi's `state`, else none.
        control_hz: actions per second; None for what the data set says. LIBERO's published data sets say 10
            although they were recorded at 20 Hz, so that 20 is taken where the robot is `panda`, the cameras are
            one of the pairs `CAMERA_PAIRS` and fps is 10.
    """

    root: Path
    action_key: str | None = None
    state_key: str | None = None
    control_hz: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))

    @property
    def name(self) -> str:
        """The folder's own name, or that of the repository in the Hub's cache."""
        return data_name(self.root)

    @property
    def cameras(self) -> tuple[str, ...]:
        """Keys of all features that are images or videos, LIBERO's agentview first.

        Raises:
            EpisodeError: the folder is no LeRobotDataset v3.x.
        """
        keys = [key for key, feature in self._info["features"].items() if feature["dtype"] in ("image", "video")]
        first = {agentview for agentview, _ in CAMERA_PAIRS}
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
        """Episodes by number, as the rows have them, and those (or whole files of them) of no use.

        Raises:
            EpisodeError: the folder is no LeRobotDataset v3.x, or has no file of rows.
        """
        keys: list[EpisodeKey] = []
        dropped = [*self._index.unreadable, *self._index.dropped.values()]
        for number, rows in self._index.rows.items():
            id = episode_id(number)
            try:
                keys.append(EpisodeKey(id, self._index.task(number), rows.steps))
            except EpisodeError as error:
                dropped.append(Dropped.because(id, error))
        return sorted(keys), dropped

    def read(self, id: str, cameras: Sequence[str] = ()) -> Episode:
        """Read one episode; see `Source.read`. Of a video only its span is decoded, of a table only its rows.

        Raises:
            EpisodeError: a file is missing or damaged, a feature or task is missing, rows are missing or change
                their task, or a video has fewer frames than there are rows.
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
        number = self._number(id)
        rows = self._index.find(number)
        instruction = self._index.task(number)
        # A state that nobody asked for by name may be missing.
        optional = [state_key] if state_key is not None and self.state_key is None else []
        wanted = [action_key, *([state_key] if state_key else []), *embedded]
        cells = read_rows(self.root, number, rows, wanted, optional=optional)
        frames = {
            camera: _images(id, camera, cells[camera]) if camera in embedded else self._videos(camera).read(number)
            for camera in cameras
        }
        return Episode(
            id=id,
            task=instruction,
            instruction=instruction,
            actions=_vectors(id, action_key, cells[action_key]),
            frames=frames,
            proprioception=_vectors(id, state_key, cells[state_key]) if state_key in cells else None,
            control_hz=self._control_hz,
        )

    @functools.cached_property
    def _info(self) -> dict[str, Any]:
        file = self.root / INFO_FILE
        try:
            info = json.loads(file.read_text("utf-8"))
            version = str(info["codebase_version"]).removeprefix("v")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise EpisodeError(Reason.UNREADABLE, f"{file} describes no LeRobotDataset ({error!r})") from error
        if version.startswith(("1.", "2.")):
            raise EpisodeError(
                Reason.UNREADABLE,
                f"{file}: codebase_version is v{version}; v3.x needed. lerobot converts it: "
                "python -m lerobot.datasets.v30.convert_dataset_v21_to_v30 --repo-id=…",
            )
        if not re.fullmatch(r"3(\..*)?", version):
            raise EpisodeError(Reason.UNREADABLE, f"{file}: codebase_version is v{version}; v3.x needed")
        require(info, ["features", "fps"], str(file))
        fps, features = info["fps"], info["features"]
        if not (isinstance(fps, int | float) and 0 < fps < 1e6):
            raise EpisodeError(Reason.UNREADABLE, f"{file}: fps is {fps!r}; a number above 0 needed")
        if not isinstance(features, dict) or not all(isinstance(feature, dict) for feature in features.values()):
            raise EpisodeError(Reason.UNREADABLE, f"{file}: features are no object of objects")
        for key, feature in features.items():
            require(feature, ["dtype"], f"{file}: feature {key!r}")
        return info

    @functools.cached_property
    def _index(self) -> EpisodeIndex:
        return EpisodeIndex.read(self.root, self._info)

    @functools.cached_property
    def _cameras_read(self) -> dict[str, Videos]:
        return {}

    def _videos(self, camera: str) -> Videos:
        index = self._index
        if camera not in self._cameras_read:
            promised = {number: whole(hint.get("length")) for number, hint in index.hints.items()}
            steps = promised | {number: rows.steps for number, rows in index.rows.items()}
            self._cameras_read[camera] = Videos(self.root, self._info, camera, steps, index.hints)
        return self._cameras_read[camera]

    @property
    def _control_hz(self) -> float:
        if self.control_hz is not None:
            return self.control_hz
        fps = float(self._info["fps"])
        libero = self._info.get("robot_type") == "panda" and set(self.cameras) in map(set, CAMERA_PAIRS)
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

    def _number(self, id: str) -> int:
        number = int(id.removeprefix("episode_")) if re.fullmatch(r"episode_\d{6,}", id) else -1
        known = {*self._index.rows, *self._index.dropped}
        if number not in known:
            existing = f"{episode_id(min(known))} to {episode_id(max(known))}" if known else "none"
            raise EpisodeError(
                Reason.UNREADABLE, f"{id!r} is not in what can be read of {self.root}; existing: {existing}"
            )
        return number


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
