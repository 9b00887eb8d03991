from dataclasses import dataclass, field

import numpy as np
import pytest

from worldvla_libero.evaluation.policy import WRIST, Observation
from worldvla_libero.evaluation.rollout import PolicyError, rollout
from worldvla_libero.simulator.protocols import OPENVLA
from worldvla_libero.simulator.simulator import InvalidActionError, Simulator, StepResult
from worldvla_libero.simulator.suites import load_suite


@dataclass
class Scripted:
    """Chunks of given lengths with reproducible actions, and everything it was shown."""

    history_length: int
    lengths: list[int]
    seen: list[Observation] = field(default_factory=list)

    def act(self, observation: Observation) -> np.ndarray:
        self.seen.append(observation)
        length = self.lengths[(len(self.seen) - 1) % len(self.lengths)]
        return np.random.default_rng(observation.step).uniform(-1, 1, (length, 7))


class Numbered:
    """In place of a `Simulator`: frame and state are the number of the step, and nothing ever succeeds."""

    task = load_suite("libero_goal").task(0)
    protocol = OPENVLA

    def reset(self, initial_state=0, *, seed=None, observe=True):
        self.actions = []
        return StepResult(success=False, step=0, frames=self._frames() if observe else {})

    def step(self, action, *, observe):
        self.actions.append(action)
        return StepResult(success=False, step=len(self.actions), frames=self._frames() if observe else {})

    def _frames(self):
        return {"agentview": np.full((2, 2, 3), len(self.actions))}


@pytest.mark.parametrize(("history_length", "lengths"), [(2, [3]), (1, [2]), (3, [1, 2]), (4, [2, 1, 1, 5])])
def test_a_policy_is_shown_the_frames_of_the_last_simulator_steps(history_length, lengths):
    policy, rendered = Scripted(history_length, lengths), []
    run = rollout(policy, Numbered(), max_steps=17, on_step=lambda step, frame: rendered.append(frame is not None))
    assert run.query_steps == tuple(observation.step for observation in policy.seen)
    for observation in policy.seen:
        first = max(0, observation.step - history_length + 1)
        assert [image.max() for image in observation.images] == list(range(first, observation.step + 1))
        assert observation.instruction == "open the middle drawer of the cabinet"
    assert len(policy.seen[0].images) == 1
    assert len(rendered) == 18
    assert all(rendered) == (max(lengths) <= history_length)  # frames that nobody looks at are spared


def test_chunks_are_executed_open_loop_up_to_the_limit():
    policy, simulator = Scripted(2, [5]), Numbered()
    run = rollout(policy, simulator, max_steps=7, instruction="other words")
    assert run.query_steps == (0, 5)
    expected = np.concatenate([np.random.default_rng(step).uniform(-1, 1, (5, 7)) for step in (0, 5)])[:7]
    np.testing.assert_array_equal(run.actions, expected)
    np.testing.assert_array_equal(simulator.actions, expected)
    assert not run.success
    assert policy.seen[0].instruction == "other words"


def test_the_limit_is_the_protocol_s_unless_told():
    assert len(rollout(Scripted(2, [7]), Numbered()).actions) == 300


def test_frame_stride_adds_frames():
    seen = []
    policy = Scripted(1, [6])
    rollout(
        policy, Numbered(), max_steps=6, frame_stride=2, on_step=lambda _, frame: seen.append(frame is not None)
    )
    assert seen == [True, False, True, False, True, False, True]


def test_rendering_less_changes_no_frame_and_no_motion(simulator):
    runs = []
    for stride in (0, 1):
        frames = {}
        policy = Scripted(2, [4])
        rollout(policy, simulator, max_steps=6, frame_stride=stride, on_step=frames.__setitem__)
        runs.append((policy.seen, frames, simulator.state))
    (seen, some, state), (seen_all, every, state_all) = runs
    np.testing.assert_array_equal(state, state_all)
    assert [step for step, frame in some.items() if frame is None] == [1, 2, 5, 6]
    for observation, other in zip(seen, seen_all, strict=True):
        np.testing.assert_array_equal(observation.images, other.images)
        np.testing.assert_array_equal(observation.images[-1], every[observation.step])


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "index"), [("libero_object", 4), ("libero_10", 8)])
def test_query_frames_are_those_of_a_simulator_that_renders_everything(suite, index):
    """On the floor and in a kitchen; LIBERO-Goal's table, which is LIBERO-Spatial's, is in the everyday tests."""
    runs = []
    for cameras, stride in ((("agentview",), 0), (("agentview", WRIST), 1)):
        with Simulator(load_suite(suite).task(index), image_size=64, cameras=cameras) as simulator:
            policy = Scripted(2, [5, 10])
            rollout(policy, simulator, initial_state=index, seed=7, max_steps=21, frame_stride=stride)
            runs.append((policy.seen, simulator.state))
    (seen, state), (seen_all, state_all) = runs
    assert [observation.step for observation in seen] == [0, 5, 15, 20]
    np.testing.assert_array_equal(state, state_all)
    for observation, other in zip(seen, seen_all, strict=True):
        np.testing.assert_array_equal(observation.images, other.images)


def test_success_ends_an_episode(simulator):
    model = simulator.environment.sim.model
    joint = next(name for name in model.joint_names if name and "middle" in name)
    opened = simulator.initial_states[0].copy()
    opened[1 + model.get_joint_qpos_addr(joint)] = -0.16  # after the time
    run = rollout(Scripted(1, [5]), simulator, initial_state=opened, max_steps=20)
    assert run.success
    assert len(run.actions) == 0
    assert run.query_steps == ()


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (np.zeros(7), InvalidActionError),
        (np.zeros((0, 7)), InvalidActionError),
        (np.full((2, 7), np.nan), InvalidActionError),
        (KeyError("token 4711"), KeyError),
    ],
)
def test_what_a_policy_raises_is_an_error_with_its_cause(answer, cause):
    class Failing(Scripted):
        def act(self, observation):
            if observation.step < 4:
                return super().act(observation)
            if isinstance(answer, Exception):
                raise answer
            return answer

    with pytest.raises(PolicyError, match="step 4 of libero_goal/0") as caught:
        rollout(Failing(1, [2]), Numbered(), max_steps=10)
    assert isinstance(caught.value.__cause__, cause)
    assert len(caught.value.so_far.actions) == 4
    assert caught.value.so_far.query_steps == (0, 2)
