"""WorldVLA on LIBERO: the real simulator, closed-loop evaluation and the `worldvla` command.

Importing this package needs neither torch nor the simulator; both are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from worldvla_libero.data.episodes import (
    Episode,
    EpisodeError,
    EpisodeKey,
    Reason,
    Source,
)
from worldvla_libero.embedded import default_model_path, sample_data_path
from worldvla_libero.evaluation.closed_loop import EvaluationError, evaluate
from worldvla_libero.evaluation.policies import (
    ExpertPolicy,
    ModelPolicy,
    RandomPolicy,
    open_policy,
)
from worldvla_libero.evaluation.policy import EpisodicPolicy, Needs, Observation, Policy
from worldvla_libero.evaluation.records import EpisodeRecord, EvaluationResult, SuccessRate
from worldvla_libero.evaluation.rollout import PolicyError, Rollout, rollout
from worldvla_libero.jobs.parts import Dropped
from worldvla_libero.simulator.libero_files import InitialStateError, LiberoNotInstalledError, MissingFilesError
from worldvla_libero.simulator.libero_pro import PERTURBED_SUITES
from worldvla_libero.simulator.protocols import LEROBOT, OPENVLA, PROTOCOLS, EvaluationProtocol, find_protocol
from worldvla_libero.simulator.rendering import RenderingError
from worldvla_libero.simulator.simulator import InvalidActionError, Simulator, SimulatorError, StepResult
from worldvla_libero.simulator.suites import SUITES, Suite, Task, UnknownNameError, load_suite
from worldvla_libero.video import VideoWriter

if TYPE_CHECKING:
    from worldvla_libero.data.samples import ActionSamples, TokenSamples, VideoSamples, WorldSamples
    from worldvla_libero.data.shards import ShardError, TokenDataset, TokenEpisode
    from worldvla_libero.evaluation.websocket_policy import PolicyServerError, WebsocketPolicy
    from worldvla_libero.hdf5 import HDF5Source, write_demonstrations
    from worldvla_libero.lerobot import LeRobotSource, write_lerobot

# Those whose modules take long to import are imported when they are first asked for.
_LAZY = {
    "HDF5Source": "hdf5",
    "write_demonstrations": "hdf5",
    "LeRobotSource": "lerobot",
    "write_lerobot": "lerobot",
    "ActionSamples": "data.samples",
    "TokenSamples": "data.samples",
    "VideoSamples": "data.samples",
    "WorldSamples": "data.samples",
    "ShardError": "data.shards",
    "TokenDataset": "data.shards",
    "TokenEpisode": "data.shards",
    "PolicyServerError": "evaluation.websocket_policy",
    "WebsocketPolicy": "evaluation.websocket_policy",
}

__all__ = [
    "LEROBOT",
    "OPENVLA",
    "PERTURBED_SUITES",
    "PROTOCOLS",
    "SUITES",
    "ActionSamples",
    "Dropped",
    "Episode",
    "EpisodeError",
    "EpisodeKey",
    "EpisodeRecord",
    "EpisodicPolicy",
    "EvaluationError",
    "EvaluationProtocol",
    "EvaluationResult",
    "ExpertPolicy",
    "HDF5Source",
    "InitialStateError",
    "InvalidActionError",
    "LeRobotSource",
    "LiberoNotInstalledError",
    "MissingFilesError",
    "ModelPolicy",
    "Needs",
    "Observation",
    "Policy",
    "PolicyError",
    "PolicyServerError",
    "RandomPolicy",
    "Reason",
    "RenderingError",
    "Rollout",
    "ShardError",
    "Simulator",
    "SimulatorError",
    "Source",
    "StepResult",
    "SuccessRate",
    "Suite",
    "Task",
    "TokenDataset",
    "TokenEpisode",
    "TokenSamples",
    "UnknownNameError",
    "VideoSamples",
    "VideoWriter",
    "WebsocketPolicy",
    "WorldSamples",
    "default_model_path",
    "evaluate",
    "find_protocol",
    "load_suite",
    "open_policy",
    "rollout",
    "sample_data_path",
    "write_demonstrations",
    "write_lerobot",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
