"""Where clips come from: held-out trajectories, with frames of a camera or of a token data set."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from worldvla_libero.data.episodes import (
    Episode,
    EpisodeError,
    EpisodeKey,
    Source,
    SplitRule,
    check_episode,
    digest,
    split,
)
from worldvla_libero.data.hub import data_path
from worldvla_libero.data.record import RECORD_FILE
from worldvla_libero.data.shards import TokenDataset
from worldvla_libero.evaluation.world.clips import Clip, ClipError, ClipKey
from worldvla_libero.hdf5 import SUFFIXES
from worldvla_libero.jobs.parts import WORK_FOLDER, Dropped
from worldvla_libero.lerobot import is_lerobot

if TYPE_CHECKING:
    from worldvla_model import WorldVLAProcessor

VALIDATION = "validation"


class Trajectories:
    """Held-out trajectories on disk. Small, and can be pickled: a worker process reads the clips.

    Attributes:
        name: what reports call them.
        split: which part of the data they are.
        truth: whether true frames are the camera's, or drawn from codes.
        keys: all of the split, in an order that depends on names alone.
        control_hz: actions per second.
        dimensions: D, the width of the actions.
        identity: what tells these data from others, as JSON.
        unreadable: files that cannot be read, whatever trajectories they hold.
    """

    name: str
    split: str
    truth: Literal["camera", "codes"]
    keys: Sequence[EpisodeKey]
    control_hz: float
    dimensions: int
    identity: Mapping[str, Any]
    unreadable: Sequence[Dropped] = ()

    def check(self, processor: WorldVLAProcessor) -> None:
        """Make sure that the model of this processor can be shown them.

        Raises:
            ClipError: their actions have another width, or they are codes of images of another size.
            ShardError: they are codes of another image tokenizer.
        """
        if self.dimensions != processor.actions.dimensions:
            raise ClipError(
                f"actions of {self.name} have {self.dimensions} dimensions; the model's have "
                f"{processor.actions.dimensions}"
            )

    def read(self, key: ClipKey, context: int) -> Clip:
        """Read a clip.

        Raises:
            EpisodeError: its trajectory cannot be used.
        """
        raise NotImplementedError


class TokenTrajectories(Trajectories):
    """A split of a token data set. It holds codes only: its true frames are the codes, drawn.

    Args:
        root: folder that `worldvla prepare` made.
        split: name of the split.

    Raises:
        ShardError: the data set is unfinished or damaged, or has no such split.
        ClipError: the split is empty.
    """

    truth = "codes"

    def __init__(self, root: str | os.PathLike[str], split: str = VALIDATION) -> None:
        self._data = TokenDataset(root, split)
        record = self._data.record
        self.name, self.split = record.name, split
        self.control_hz = float(record.control_hz or 20)  # LIBERO's, where a data set does not say
        self.keys = [EpisodeKey(episode.id, episode.task, len(episode)) for episode in self._data]
        if not self.keys:
            raise ClipError(f"split {split!r} of {root} holds no trajectory")
        self._indices = {key.id: index for index, key in enumerate(self.keys)}
        self.dimensions = self._data[0].actions.shape[1]
        files = [self._data.root / file for file in record.splits[split].files]
        self.identity = {"fingerprint": self._data.fingerprint, "files": _mark(self._data.root, files)}

    def check(self, processor: WorldVLAProcessor) -> None:
        """Make sure that the codes are those that the model would see; see `Trajectories.check`."""
        super().check(processor)
        self._data.check_tokenizer(processor.images)
        size = self._data.record.image_size
        if size != processor.image_size:
            raise ClipError(
                f"{self._data.root} was tokenized at {size} px; the model sees {processor.image_size} px: "
                f"load it for {size}, or prepare the data again"
            )

    def read(self, key: ClipKey, context: int) -> Clip:
        """A clip of codes."""
        episode = self._data[self._indices[key.id]]
        first, last = key.start - context + 1, key.start + key.frames
        codes = np.asarray(episode.codes[first : last + 1], dtype=np.int64)
        return Clip(key, np.array(episode.actions[first:last]), codes=codes)


class Demonstrations(Trajectories):
    """The held-out part of demonstrations with frames, which suit every model: they are brought to its size.

    Args:
        source: the demonstrations.
        camera: whose frames; None for the only or usual one.
        part: name of the split.
        rule: of the split, as in `worldvla prepare`.
        fraction: share of the training split.
        seed: of the paper's split.
        prepared: a token data set that was made of these demonstrations, whose split to take instead: where
            episodes had to be dropped, it divided what was left.

    Raises:
        ClipError: nothing is in the split or can be read, or an episode of the data set is not among the
            demonstrations.
        PrepareError: the camera is not clear.
        ShardError: `prepared` is no token data set.
    """

    truth = "camera"

    def __init__(
        self,
        source: Source,
        camera: str | None = None,
        *,
        part: str = VALIDATION,
        rule: SplitRule = "paper",
        fraction: float = 0.9,
        seed: int = 0,
        prepared: str | os.PathLike[str] | None = None,
    ) -> None:
        from worldvla_libero.prepare import choose_camera

        keys, self.unreadable = source.list()
        if not keys:
            reasons = "; ".join(file.message for file in self.unreadable) or "it is empty"
            raise ClipError(f"no trajectory of {source.name} can be read: {reasons}")
        self.source, self.name, self.split = source, source.name, part
        self.camera = choose_camera(source, camera)
        if prepared is None:
            splits = split(keys, rule, fraction=fraction, seed=seed)
            held_out = {id for id, name in splits.items() if name == part}
        else:
            held_out = {episode.id for episode in TokenDataset(prepared, part)}
            absent = sorted(held_out - {key.id for key in keys})
            if absent:
                raise ClipError(
                    f"{len(absent)} of {len(held_out)} episodes of {prepared}, {part}, are not in {source.name}, "
                    f"such as {absent[0]}; give the demonstrations it was made of"
                )
        self.keys = [key for key in keys if key.id in held_out]
        if not self.keys:
            raise ClipError(f"no trajectory of {source.name} is in split {part!r}: {len(keys)} in all")
        self.identity = {"episodes": digest(self.keys), "camera": self.camera, "source": _described(source)}
        first = self._first()
        self.control_hz, self.dimensions = first.control_hz, first.actions.shape[1]

    def read(self, key: ClipKey, context: int) -> Clip:
        """A clip of frames."""
        episode = self.source.read(key.id, (self.camera,))
        check_episode(episode, dimensions=self.dimensions, min_steps=key.start + key.frames + 1)
        first, last = key.start - context + 1, key.start + key.frames
        return Clip(key, episode.actions[first:last], frames=episode.frames[self.camera][first : last + 1])

    def _first(self) -> Episode:
        """The first episode that can be used; those before it are dropped by name when their turn comes."""
        why = ""
        for key in self.keys:
            try:
                episode = self.source.read(key.id)
                check_episode(episode)
                return episode
            except EpisodeError as error:
                why = why or error.message
        raise ClipError(f"none of {len(self.keys)} trajectories of {self.name} can be used: {why}")


def open_trajectories(
    path: str | os.PathLike[str],
    *,
    split: str = VALIDATION,
    camera: str | None = None,
    rule: SplitRule = "paper",
    fraction: float = 0.9,
    seed: int = 0,
    prepared: str | os.PathLike[str] | None = None,
    **source: Any,
) -> Trajectories:
    """Held-out trajectories of whatever kind a folder (or file), or else a Hub repository, holds.

    Args:
        path: a token data set; or demonstrations with frames, HDF5 or LeRobotDataset.
        split: name of the split.
        camera: of demonstrations; None for the only or usual one.
        rule: of demonstrations, see `Demonstrations`.
        fraction: of demonstrations.
        seed: of demonstrations.
        prepared: of demonstrations.
        source: further options of `prepare.open_source`.

    Raises:
        FileNotFoundError: there is neither, or the Hub's cannot be fetched.
        ClipError: the demonstrations cannot be read, hold no frames, or none is held out.
        PrepareError: the camera is not clear.
        ShardError: the data set is unfinished or damaged, or has no such split.
    """
    from worldvla_libero.prepare import open_source

    path = data_path(path)
    if (path / RECORD_FILE).is_file() or (path / WORK_FOLDER).is_dir():
        return TokenTrajectories(path, split)
    found = open_source(path, **source)
    if found.needs_replay:
        raise ClipError(
            f"{path} holds raw demonstrations, whose frames have to be rendered first: worldvla replay {path} OUT"
        )
    return Demonstrations(found, camera, part=split, rule=rule, fraction=fraction, seed=seed, prepared=prepared)


def _described(source: Source) -> dict[str, str]:
    """Options of a source, and a mark of the files at its paths: our sources are but their fields."""
    names = [field.name for field in fields(source)] if is_dataclass(source) else list[str]()
    values = {name: getattr(source, name) for name in names}
    return {
        name: _mark(value, _data_files(value)) if isinstance(value, Path) else str(value)
        for name, value in values.items()
    }


def _data_files(root: Path) -> list[Path]:
    """What a source reads there; not what else may lie beside it, such as what is being imagined."""
    if root.is_file():
        return [root]
    parts = [root / part for part in ("meta", "data", "videos")] if is_lerobot(root) else [root]
    suffixes = ("",) if is_lerobot(root) else SUFFIXES
    found = [file for part in parts for file in part.rglob("*") if file.name.endswith(suffixes) and file.is_file()]
    return [file for file in found if not any(name.startswith(".") for name in file.relative_to(root).parts)]


def _mark(root: Path, files: Iterable[Path]) -> str:
    """SHA-256, in hexadecimal, of where files lie, how large they are and when they were changed.

    Frames and actions may change under the same ids and lengths; to read all their bytes would take minutes.
    """
    stated = sorted((file.relative_to(root).as_posix(), file.stat()) for file in files)
    words = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stated])
    return hashlib.sha256(words.encode()).hexdigest()
