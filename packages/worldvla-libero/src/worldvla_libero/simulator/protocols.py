"""The numbers of each evaluation protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from worldvla_libero.simulator.libero_pro import PERTURBED_SUITES
from worldvla_libero.simulator.suites import Task, UnknownNameError, unknown_name


@dataclass(frozen=True)
class EvaluationProtocol:
    """How episodes are run and counted; a preset with any number changed by `dataclasses.replace`.

    Attributes:
        name: of the preset.
        max_steps: per suite, the control steps after which an episode has failed; wait steps do not count.
        episodes_per_task: episode i starts from the suite's i-th fixed initial state.
        wait_steps: steps of no motion, gripper opening, in which the scene settles before the policy sees it.
        seed: of episode 0. It places the fixtures, which the initial state does not hold.
        seed_stride: what each further episode adds to `seed`.
        image_size: width and height of the rendered camera image in pixels.
        control_hz: control steps per second. At 10 Hz instead of 20, success rates collapse.
    """

    name: str
    max_steps: Mapping[str, int]
    episodes_per_task: int
    wait_steps: int
    seed: int
    seed_stride: int
    image_size: int
    control_hz: int = 20

    def __post_init__(self) -> None:
        for field, lowest in (
            ("episodes_per_task", 1),
            ("wait_steps", 0),
            ("seed", 0),
            ("seed_stride", 0),
            ("image_size", 32),
            ("control_hz", 1),
        ):
            value = getattr(self, field)
            if value < lowest:
                raise ValueError(f"{field} is {value}; allowed: {lowest} or more")
        for suite, steps in self.max_steps.items():
            if steps < 1:
                raise ValueError(f"max_steps of {suite} is {steps}; allowed: 1 or more")
        object.__setattr__(self, "max_steps", dict(self.max_steps))  # ours, whatever becomes of the argument

    def episode_seed(self, episode: int) -> int:
        """The simulator seed of an episode."""
        return self.seed + self.seed_stride * episode

    def step_limit(self, task: Task) -> int:
        """The control steps an episode of this task may take.

        Raises:
            UnknownNameError: the protocol has no limit for the task's suite.
        """
        if task.suite not in self.max_steps:
            raise UnknownNameError(unknown_name("suite", task.suite, self.max_steps, f" in protocol {self.name}"))
        return self.max_steps[task.suite]


def _with_perturbed(max_steps: Mapping[str, int]) -> dict[str, int]:
    """Write out the step limits of the perturbed suites: those of the suites they come from."""
    return {**max_steps, **{name: max_steps[base] for name, base in PERTURBED_SUITES.items()}}


# Numbers of OpenVLA's evaluation, which the WorldVLA authors took over. They seed once per task, so that the
# fixtures of episode i depend on all episodes before it; we seed every reset, so that an episode is the same
# alone, in another order or in another process.
OPENVLA = EvaluationProtocol(
    name="openvla",
    max_steps=_with_perturbed(
        {
            "libero_spatial": 220,
            "libero_object": 280,
            "libero_goal": 300,
            "libero_10": 520,
            "libero_90": 400,
        }
    ),
    episodes_per_task=50,
    wait_steps=10,
    seed=0,
    seed_stride=0,
    image_size=256,
)

# Numbers of `lerobot-eval` on LIBERO.
LEROBOT = EvaluationProtocol(
    name="lerobot",
    max_steps=_with_perturbed(
        {
            "libero_spatial": 280,
            "libero_object": 280,
            "libero_goal": 300,
            "libero_10": 520,
            "libero_90": 400,
        }
    ),
    episodes_per_task=10,
    wait_steps=10,
    seed=1000,
    seed_stride=1,
    image_size=360,
)

PROTOCOLS = MappingProxyType({preset.name: preset for preset in (OPENVLA, LEROBOT)})


def find_protocol(name: str) -> EvaluationProtocol:
    """Look a protocol preset up.

    Raises:
        UnknownNameError: there is no such preset.
    """
    if name not in PROTOCOLS:
        raise UnknownNameError(unknown_name("protocol", name, PROTOCOLS))
    return PROTOCOLS[name]
