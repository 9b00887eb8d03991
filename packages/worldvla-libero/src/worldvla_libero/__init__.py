"""WorldVLA on LIBERO: the real simulator, closed-loop evaluation and the `worldvla` command.

Importing this package needs neither torch nor the simulator; both are loaded when they are first used.
"""

from __future__ import annotations

from pathlib import Path

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

__all__ = [
    "LEROBOT",
    "OPENVLA",
    "PROTOCOLS",
    "SUITES",
    "EpisodeRecord",
    "EvaluationProtocol",
    "EvaluationResult",
    "InitialStateError",
    "InvalidActionError",
    "LiberoNotInstalledError",
    "ModelPolicy",
    "Observation",
    "Policy",
    "PolicyError",
    "RecordExistsError",
    "RenderingError",
    "Rollout",
    "Simulator",
    "SimulatorError",
    "StepResult",
    "SuccessRate",
    "Suite",
    "Task",
    "UnknownNameError",
    "VideoWriter",
    "default_model_path",
    "evaluate",
    "find_protocol",
    "load_suite",
    "rollout",
]


def default_model_path() -> Path:
    """The folder of the model that comes with this package: weights, tokenizers and model card."""
    return Path(__file__).parent / "default_model"
