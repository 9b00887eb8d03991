"""Raw demonstrations replayed in the simulator: frames rendered, pauses skipped, failures dropped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worldvla_libero.episodes import Episode, EpisodeError, Frames, Reason, check_episode, moving
from worldvla_libero.hdf5 import proprioception
from worldvla_libero.simulator import ACTION_DIM, Simulator
from worldvla_libero.suites import OPENVLA, InitialStateError, UnknownNameError, find_task
from worldvla_libero.versions import SIMULATOR, installed_versions


@dataclass(frozen=True)
class ReplaySettings:
    """How demonstrations are replayed; all that the frames depend on, apart from the demonstrations.

    Attributes:
        image_size: width and height of the frames in pixels.
        cameras: names of cameras in LIBERO's scenes.
        wait_steps: steps of no motion in which the scene settles before the first action.
        skip_noops: leave out actions that do nothing (see `episodes.moving`).
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
        if episode.states is None:
            raise EpisodeError(
                Reason.MISSING_KEY, f"{episode.id}: no 'states'; a replay begins with the first of them"
            )
        actions = episode.actions[moving(episode.actions)] if self.settings.skip_noops else episode.actions
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
            robot_states=proprioception(np.stack(robot_states)),
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
