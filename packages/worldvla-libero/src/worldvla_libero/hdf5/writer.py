"""Writes demonstrations in LIBERO's HDF5 layout, a file per task, whole or not at all; always the same bytes."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from worldvla_libero.data.episodes import Episode, EpisodeError, Reason
from worldvla_libero.hdf5.layouts import LIBERO_CAMERAS, natural, opened
from worldvla_tokenizers.files import atomic_path


def write_demonstrations(path: str | os.PathLike[str], episodes: Iterable[Episode]) -> int:
    """Write episodes of one task in LIBERO's layout, whole or not at all, one episode in memory at a time.

    Frames are stored as OpenGL draws them, as in LIBERO's own files, so that the readers of the field turn them.
    The same episodes give the same bytes.

    Args:
        path: of the file, `<task>_demo.hdf5`.
        episodes: of one task, each ending in success; `demo_0`, `demo_1` … in this order. LIBERO's 8 values of
            proprioception become `obs/ee_states` and `obs/gripper_states`, any others `obs/proprioception`.

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
            with opened(file) as content:
                for name in sorted(content["data"], key=natural):
                    content.copy(f"data/{name}", data, name=f"demo_{count}")
                    steps += int(content["data"][name].attrs["num_samples"])
                    count += 1
                if "problem_info" not in data.attrs:
                    data.attrs.update(dict(content["data"].attrs))
        data.attrs.update({**(attributes or {}), "num_demos": count, "total": steps})
    return steps


@contextmanager
def _created(path: str | os.PathLike[str]) -> Iterator[h5py.Group]:
    """The group `data` of a new file, which takes its name only if the block ends well and left something."""
    with atomic_path(path) as draft, _Draft(draft, "w+b") as file:
        try:
            with h5py.File(file, "w") as content:
                data = content.create_group("data")
                yield data
                if not len(data):
                    raise EpisodeError(Reason.TOO_SHORT, f"{path}: no episode to write")
        finally:
            if file.failure is not None:  # whatever else went wrong came of it
                raise file.failure


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
        "robot_states": episode.robot_states,
        "rewards": last,
        "dones": last,
    }
    felt = episode.proprioception
    if felt is not None and felt.shape[1] == 8:
        arrays |= {"obs/ee_states": felt[:, :6], "obs/gripper_states": felt[:, 6:]}
    else:
        arrays["obs/proprioception"] = felt
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
