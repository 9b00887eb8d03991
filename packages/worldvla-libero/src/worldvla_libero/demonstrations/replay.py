"""Raw demonstrations replayed in the simulator: frames rendered, pauses skipped, failures dropped."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from worldvla_libero.conventions import ACTION_DIM, proprioception
from worldvla_libero.data.episodes import (
    Episode,
    EpisodeError,
    EpisodeKey,
    Frames,
    NoEpisodeLeftError,
    Reason,
    Source,
    check_episode,
    digest,
    motion_mask,
)
from worldvla_libero.hdf5 import HDF5Source, merge_demonstrations, write_demonstrations
from worldvla_libero.jobs.job import Executor, Job
from worldvla_libero.jobs.local import StartWorker
from worldvla_libero.jobs.parts import WORK_FOLDER, Dropped
from worldvla_libero.lerobot import write_lerobot
from worldvla_libero.simulator.libero_files import InitialStateError
from worldvla_libero.simulator.protocols import OPENVLA
from worldvla_libero.simulator.simulator import Simulator
from worldvla_libero.simulator.suites import UnknownNameError, find_task
from worldvla_libero.versions import SIMULATOR, installed_versions

RECORD_FILE = "replay.json"

Format = Literal["lerobot", "lerobot-video", "hdf5"]


@dataclass(frozen=True)
class ReplaySettings:
    """How demonstrations are replayed; all that the frames depend on, apart from the demonstrations.

    Attributes:
        image_size: width and height of the frames in pixels.
        cameras: names of cameras in LIBERO's scenes.
        wait_steps: steps of no motion in which the scene settles before the first action.
        skip_noops: leave out actions that do nothing (see `episodes.motion_mask`).
        render: False to judge success alone, many times faster where the CPU renders.
    """

    image_size: int = 256
    cameras: tuple[str, ...] = ("agentview",)
    wait_steps: int = OPENVLA.wait_steps
    skip_noops: bool = True
    render: bool = True

    def __post_init__(self) -> None:
        if self.image_size < 32:
            raise ValueError(f"image_size is {self.image_size} px; allowed: 32 and above")
        if self.wait_steps < 0:
            raise ValueError(f"wait_steps is {self.wait_steps}; allowed: 0 and above")


class Replayer:
    """Replays episodes, keeping the simulator of the last task open: building a scene takes seconds.

    A simulator that has run other episodes gives the same frames, bit for bit, as a new one.

    Args:
        settings: how.
        suite: suite to look tasks up in first, for names that several suites have.
    """

    def __init__(self, settings: ReplaySettings = ReplaySettings(), *, suite: str | None = None) -> None:
        self.settings = settings
        self.suite = suite
        self._simulator: Simulator | None = None

    def __call__(self, episode: Episode) -> Episode:
        """Replay an episode from its first state.

        Args:
            episode: with `states`; its `task` is LIBERO's own name of the task. Where it has no `seed`, the
                evaluation protocol's places the fixtures, which a state does not hold.

        Returns:
            The kept actions with frames and proprioception; frame t is what the camera saw before action t.

        Raises:
            EpisodeError: it holds no first state or one of another scene, actions that the robot cannot be sent,
                its task is none of LIBERO's, or it does not end in success.
            RenderingError: there is no OpenGL to render with.
        """
        check_episode(replace(episode, frames={}), dimensions=ACTION_DIM)
        if episode.states is None or not len(episode.states):
            raise EpisodeError(
                Reason.MISSING_KEY,
                f"{episode.id}: no 'states', one row of numbers a step; a replay begins with the first of them",
            )
        actions = episode.actions[motion_mask(episode.actions)] if self.settings.skip_noops else episode.actions
        if not len(actions):
            raise EpisodeError(Reason.TOO_SHORT, f"{episode.id}: all of its {len(episode)} actions are no-ops")
        simulator, render = self._open(episode), self.settings.render
        try:
            result = simulator.reset(episode.states[0], seed=episode.seed, observe=render)
        except InitialStateError as error:
            raise EpisodeError(Reason.NO_SIMULATION, f"{episode.id}: {error}") from error
        frames: list[dict[str, Frames]] = []
        robot_states: list[NDArray[np.float64]] = []
        states = [simulator.start_state]
        for t, action in enumerate(actions):
            if render:
                frames.append(dict(result.frames))
            robot_states.append(simulator.robot_state)
            if t:
                states.append(simulator.state)
            result = simulator.step(action, observe=render and t + 1 < len(actions))
        if not result.success:
            recorded = ", ".join(f"{name} {version}" for name, version in episode.versions.items()) or "unknown"
            here = ", ".join(f"{name} {version}" for name, version in installed_versions(SIMULATOR).items())
            raise EpisodeError(
                Reason.NO_SUCCESS,
                f"{episode.id}: the goal is not reached after {len(actions)} steps; recorded with: {recorded}; "
                f"replayed with: {here}",
            )
        return replace(
            episode,
            actions=actions,
            frames={camera: np.stack([f[camera] for f in frames]) for camera in self.settings.cameras if render},
            proprioception=proprioception(np.stack(robot_states)),
            robot_states=None,
            states=np.stack(states),
            versions=installed_versions(SIMULATOR),
            control_hz=float(simulator.protocol.control_hz),
        )

    def close(self) -> None:
        """Free the scene that is open, if any."""
        if self._simulator is not None:
            self._simulator.close()
            self._simulator = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_simulator": None}  # each process opens its own

    def _open(self, episode: Episode) -> Simulator:
        try:
            task = find_task(episode.task, self.suite)
        except UnknownNameError as error:
            raise EpisodeError(Reason.NO_SIMULATION, f"{episode.id}: {error}") from error
        if self._simulator is None or self._simulator.task != task:
            self.close()
            protocol = replace(OPENVLA, wait_steps=self.settings.wait_steps, image_size=self.settings.image_size)
            self._simulator = Simulator(task, protocol, cameras=self.settings.cameras)
        return self._simulator


def replay(
    source: Source,
    keys: Sequence[EpisodeKey],
    out: str | os.PathLike[str] | None,
    settings: ReplaySettings = ReplaySettings(),
    *,
    format: Format = "lerobot",
    workers: int = 1,
    strict: bool = False,
    executor: Executor | StartWorker = "local",
    replayer: Callable[[Episode], Episode] | None = None,
    on_part: Callable[[str, Path | Dropped], None] | None = None,
) -> dict[str, Any]:
    """Replay demonstrations into frames that the rest of the field can use, or only see which still succeed.

    Killed at any moment, the same call goes on where it was; the result is the same to the byte.

    Args:
        source: raw demonstrations.
        keys: those of its episodes to replay.
        out: folder to fill, made if need be; None to replay without rendering, for the report alone.
        settings: how.
        format: `lerobot` is a LeRobotDataset v3 with lossless images, `lerobot-video` one with H.264 videos, and
            `hdf5` a file per task as OpenVLA's users have them.
        workers: processes.
        strict: stop at the first episode that has to be dropped.
        executor: see `Job.run`.
        replayer: what replays an episode, in a worker process; None for a `Replayer` with these settings.
        on_part: called for every episode that is done, with its part or why it was dropped.

    Returns:
        Per task how many episodes were replayed and kept, and all that were dropped; as in `replay.json`.

    Raises:
        EpisodeError: with `strict`, the first episode dropped.
        NoEpisodeLeftError: all episodes were dropped, and there is a folder to fill.
        JobError: `out` holds something else, or a replay with other settings.
        StorageError: the disk is full, or a file cannot be written; what is done stays.
    """
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            blind = replace(settings, render=False)
            return _replay(source, keys, Path(folder), blind, None, workers, strict, executor, replayer, on_part)
    return _replay(source, keys, Path(out), settings, format, workers, strict, executor, replayer, on_part)


class _LoadAndReplay:
    def __init__(self, source: Source, replayer: Callable[[Episode], Episode]) -> None:
        self.source, self.replayer = source, replayer

    def __call__(self, key: EpisodeKey) -> Episode:
        return self.replayer(self.source.read(key.id))


def _replay(
    source: Source,
    keys: Sequence[EpisodeKey],
    out: Path,
    settings: ReplaySettings,
    format: Format | None,
    workers: int,
    strict: bool,
    executor: Executor | StartWorker,
    replayer: Callable[[Episode], Episode] | None,
    on_part: Callable[[str, Path | Dropped], None] | None,
) -> dict[str, Any]:
    resolved = {
        "episodes": digest(keys),
        "format": format,
        "replay": asdict(settings),
        "simulator": installed_versions(SIMULATOR),
    }
    items = {f"{number:06d}": key for number, key in enumerate(keys)}
    with Job[EpisodeKey, Episode](out, RECORD_FILE, resolved, error=EpisodeError) as job:
        if job.ended:
            return job.content()
        parts = job.run(
            items,
            _LoadAndReplay(source, replayer or Replayer(settings, suite=source.name)),
            _store_length if format is None else _store_episode,
            suffix=".json" if format is None else ".hdf5",
            workers=workers,
            strict=strict,
            on_part=on_part,
            executor=executor,
        )
        kept = {items[name]: part for name, part in parts.items() if isinstance(part, Path)}
        dropped = [part for part in parts.values() if isinstance(part, Dropped)]
        if format is not None and not kept:
            raise NoEpisodeLeftError.of(source.name, dropped)
        if format == "hdf5":
            for task in sorted({key.task for key in kept}):
                file = f"{task}_demo.hdf5"
                with job.storing(file):
                    merge_demonstrations(out / file, [p for key, p in kept.items() if key.task == task])
        elif format is not None:
            with job.storing("the data set"):
                _write_lerobot(out, kept, settings, video=format == "lerobot-video")
        record = {
            "tasks": {
                task: {
                    "replayed": sum(key.task == task for key in keys),
                    "kept": sum(key.task == task for key in kept),
                }
                for task in sorted({key.task for key in keys})
            },
            "dropped": [part._asdict() for part in dropped],
        }
        job.end(record)
        return job.content()


def _store_length(episode: Episode, path: Path) -> None:
    path.write_text(json.dumps({"steps": len(episode)}), encoding="utf-8")


def _store_episode(episode: Episode, path: Path) -> None:
    write_demonstrations(path, [episode])


def _write_lerobot(out: Path, parts: Mapping[EpisodeKey, Path], settings: ReplaySettings, *, video: bool) -> None:
    """Write the data set beside the parts, then move it to its place; a run killed here does it once more."""

    def episodes() -> Iterator[Episode]:
        for key, part in parts.items():
            source = HDF5Source(part)
            (only,), _ = source.list()
            yield replace(source.read(only.id, settings.cameras), id=key.id, task=key.task)

    staged = out / WORK_FOLDER / "lerobot"
    shutil.rmtree(staged, ignore_errors=True)
    write_lerobot(episodes(), staged, video=video)
    for folder in sorted(staged.iterdir()):
        shutil.rmtree(out / folder.name, ignore_errors=True)
        os.replace(folder, out / folder.name)
