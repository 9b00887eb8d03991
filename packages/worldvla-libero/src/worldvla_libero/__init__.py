"""WorldVLA on LIBERO: the real simulator, closed-loop evaluation and the `worldvla` command.

Importing this package needs neither torch nor the simulator; both are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldvla_libero.episodes import Dropped, Episode, EpisodeError, EpisodeKey, Reason, Source
from worldvla_libero.evaluation import EpisodeRecord, EvaluationResult, RecordExistsError, SuccessRate, evaluate
from worldvla_libero.rendering import RenderingError
from worldvla_libero.report import VideoWriter
from worldvla_libero.rollout import ModelPolicy, Observation, Policy, PolicyError, Rollout, rollout
from worldvla_libero.simulator import InvalidActionError, Simulator, SimulatorError, StepResult
from worldvla_libero.suites import (
    LEROBOT,
    OPENVLA,
    PROTOCOLS,
    SUITES,
    EvaluationProtocol,
    InitialStateError,
    LiberoNotInstalledError,
    Suite,
    Task,
    UnknownNameError,
    find_protocol,
    load_suite,
)

if TYPE_CHECKING:
    from worldvla_libero.hdf5 import HDF5Source, write_demonstrations
    from worldvla_libero.lerobot import LeRobotSource, write_lerobot
    from worldvla_libero.samples import ActionSamples, TokenSamples, VideoSamples, WorldSamples
    from worldvla_libero.shards import ShardError, TokenDataset, TokenEpisode

# Those whose modules take long to import are imported when they are first asked for.
_LAZY = {
    "HDF5Source": "hdf5",
    "write_demonstrations": "hdf5",
    "LeRobotSource": "lerobot",
    "write_lerobot": "lerobot",
    "ActionSamples": "samples",
    "TokenSamples": "samples",
    "VideoSamples": "samples",
    "WorldSamples": "samples",
    "ShardError": "shards",
    "TokenDataset": "shards",
    "TokenEpisode": "shards",
}

__all__ = [
    "LEROBOT",
    "OPENVLA",
    "PROTOCOLS",
    "SUITES",
    "ActionSamples",
    "Dropped",
    "Episode",
    "EpisodeError",
    "EpisodeKey",
    "EpisodeRecord",
    "EvaluationProtocol",
    "EvaluationResult",
    "HDF5Source",
    "InitialStateError",
    "InvalidActionError",
    "LeRobotSource",
    "LiberoNotInstalledError",
    "ModelPolicy",
    "Observation",
    "Policy",
    "PolicyError",
    "Reason",
    "RecordExistsError",
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
    "WorldSamples",
    "default_model_path",
    "evaluate",
    "find_protocol",
    "load_suite",
    "rollout",
    "write_demonstrations",
    "write_lerobot",
]


def default_model_path() -> Path:
    """The folder of the model that comes with this package: weights, tokenizers and model card."""
    return Path(__file__).parent / "default_model"


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
