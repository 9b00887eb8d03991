"""Policies: our model, and a few beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from worldvla_libero.demonstrations.experts import ExpertStyle, ScriptedExpert
from worldvla_libero.evaluation.policy import Observation, Policy
from worldvla_libero.evaluation.websocket_policy import WebsocketPolicy
from worldvla_libero.simulator.simulator import Simulator
from worldvla_libero.simulator.suites import UnknownNameError
from worldvla_tokenizers import ActionTokenizer

if TYPE_CHECKING:
    from worldvla_model import WorldVLA

POLICIES = ("model", "random", "expert", "ws://host:port")


class ModelPolicy:
    """A WorldVLA model as a policy. Instructions are read once; make another one when the weights have changed.

    Args:
        agent: the model.
        num_actions: K; default as saved with the model.
    """

    def __init__(self, agent: WorldVLA, *, num_actions: int | None = None) -> None:
        from worldvla_model.decoding import Workspace

        self.agent = agent
        self.num_actions = num_actions
        self.workspace = agent.workspace or Workspace(agent.model)

    @property
    def history_length(self) -> int:
        """M of the checkpoint."""
        return self.agent.processor.history_length

    @property
    def identity(self) -> dict[str, Any]:
        """Weights, settings and K."""
        return {
            "weights": self.agent.fingerprint,
            "num_actions": self.num_actions or self.agent.processor.settings.num_actions,
        }

    def act(self, observation: Observation) -> NDArray[np.float64]:
        """One action chunk, with the gripper as decoded: neither binarised nor flipped."""
        return self.agent.predict_actions(
            list(observation.images),
            observation.instruction,
            num_actions=self.num_actions,
            workspace=self.workspace,
        )

    def act_batch(self, observations: Sequence[Observation]) -> list[NDArray[np.float64]]:
        """A chunk for each of several observations, whose episodes need have nothing in common."""
        return self.agent.predict_actions_batch(
            [observation.images for observation in observations],
            [observation.instruction for observation in observations],
            num_actions=self.num_actions,
            workspace=self.workspace,
        )


class RandomPolicy:
    """Actions drawn uniformly between the bounds of LIBERO's data: what success without any skill is.

    Its actions in an episode depend on its seed, the task and the state the episode starts from, and on nothing
    else: not on K, on other episodes, nor on the process that runs it.

    Args:
        seed: of the draws.
        num_actions: K.

    Raises:
        ValueError: the seed is negative, or `num_actions` below 1.
    """

    history_length = 0

    def __init__(self, seed: int = 0, *, num_actions: int = 1) -> None:
        if seed < 0:
            raise ValueError(f"seed is {seed}; allowed: 0 and above")
        _check_length(num_actions)
        self.seed = seed
        self.num_actions = num_actions
        self.identity = {"seed": seed, "num_actions": num_actions}
        bounds = ActionTokenizer.published()
        self._low, self._high = bounds.low, bounds.high
        self._rng = np.random.default_rng(seed)

    def reset(self, simulator: Simulator) -> None:
        """Start the episode's own stream of random numbers."""
        # The protocols give many episodes one simulator seed; the start state tells them apart.
        task = f"{simulator.task.suite}/{simulator.task.name}".encode()
        self._rng = np.random.default_rng([self.seed, crc32(task), crc32(simulator.start_state.tobytes())])

    def act(self, observation: Observation) -> NDArray[np.float64]:
        """(K, 7) draws."""
        return self._rng.uniform(self._low, self._high, (self.num_actions, len(self._low)))


class ExpertPolicy:
    """The scripted expert that makes demonstrations: it reads poses and goal from the simulator.

    Its success from the initial states of an evaluation is a ceiling for those who learn from it. It looks at the
    scene before each action, so K = 1, and never at an image.

    Args:
        style: speed, noise and the like; by default full speed without noise.
        seed: of the noise; the same in every episode.
    """

    history_length = 0

    def __init__(self, style: ExpertStyle = ExpertStyle(), *, seed: int = 0) -> None:
        self.style = style
        self.seed = seed
        self.identity = {"style": asdict(style), "seed": seed}
        self._expert: ScriptedExpert | None = None

    def reset(self, simulator: Simulator) -> None:
        """Read the task.

        Raises:
            NoExpertError: there is no script for it.
        """
        self._expert = ScriptedExpert(simulator, self.style, np.random.default_rng(self.seed))

    def act(self, observation: Observation) -> NDArray[np.float64]:
        """(1, 7) the next action.

        Raises:
            RuntimeError: `reset` was not called.
        """
        if self._expert is None:
            raise RuntimeError("ExpertPolicy.act before reset: it has no simulator to look into")
        return self._expert.act()[None]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_expert": None}  # it belongs to a simulator of this process


def open_policy(
    name: str,
    *,
    load_model: Callable[[], WorldVLA] | None = None,
    num_actions: int | None = None,
    seed: int = 0,
) -> Policy:
    """Make a policy of what the command line calls it.

    Args:
        name: `model`, `random`, `expert`, or the address of a policy server, such as `ws://localhost:8000`.
        load_model: gives the model of `model`; default: the one that comes with this package.
        num_actions: K, or how many actions of a server's answer are executed; default: the policy's own.
        seed: of the draws of `random`.

    Raises:
        UnknownNameError: there is no such policy.
        ValueError: a number out of range, or a K for the expert, who chooses one action at a time.
        ImportError: a policy server needs the extra `server`.
    """
    if num_actions is not None:
        _check_length(num_actions)
    if name == "model":
        return ModelPolicy(load_model() if load_model else _default_model(), num_actions=num_actions)
    if name == "random":
        return RandomPolicy(seed, num_actions=num_actions or 1)
    if name == "expert":
        if num_actions not in (None, 1):
            raise ValueError(f"num_actions is {num_actions}; allowed: 1, the expert chooses one action at a time")
        return ExpertPolicy(seed=seed)
    if name.startswith(("ws://", "wss://")):
        return WebsocketPolicy(name) if num_actions is None else WebsocketPolicy(name, num_actions=num_actions)
    raise UnknownNameError(f"unknown policy {name!r}; existing: {', '.join(POLICIES)}")


def _default_model() -> WorldVLA:
    from worldvla_libero.embedded import default_model_path
    from worldvla_model import WorldVLA

    return WorldVLA.from_pretrained(default_model_path())


def _check_length(num_actions: int) -> None:
    if num_actions < 1:
        raise ValueError(f"num_actions is {num_actions}; allowed: 1 and above")
