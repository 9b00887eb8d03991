from dataclasses import dataclass, field

import numpy as np
import pytest

from worldvla_libero.rollout import Observation, PolicyError, rollout
from worldvla_libero.simulator import InvalidActionError


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


@pytest.mark.parametrize(("history_length", "lengths"), [(2, [3]), (1, [2]), (3, [1, 2]), (4, [2, 1, 1, 5])])
def test_a_policy_is_shown_the_frames_of_the_last_simulator_steps(simulator, history_length, lengths):
    policy = Scripted(history_length, lengths)
    rendered = {}
    run = rollout(policy, simulator, max_steps=7, on_step=lambda step, frame: rendered.update({step: frame}))

    everything = {}
    always = Scripted(history_length, lengths)
    rollout(
        always,
        simulator,
        max_steps=7,
        frame_stride=1,
        on_step=lambda step, frame: everything.update({step: frame}),
    )

    assert list(rendered) == list(everything) == list(range(8))
    assert run.query_steps == tuple(observation.step for observation in policy.seen)
    for observation in policy.seen:
        first = max(0, observation.step - history_length + 1)
        expected = [everything[step] for step in range(first, observation.step + 1)]
        assert len(observation.images) == len(expected)
        for image, frame in zip(observation.images, expected, strict=True):
            np.testing.assert_array_equal(image, frame)
        assert observation.instruction == "open the middle drawer of the cabinet"
    assert len(policy.seen[0].images) == 1
    for step, frame in rendered.items():  # nothing rendered differs, and some frames were spared
        if frame is not None:
            np.testing.assert_array_equal(frame, everything[step])
    assert any(frame is None for frame in rendered.values()) == (max(lengths) > history_length)


def test_chunks_are_executed_open_loop_up_to_the_limit(simulator):
    policy = Scripted(2, [5])
    run = rollout(policy, simulator, max_steps=7, instruction="other words")
    assert run.query_steps == (0, 5)
    expected = np.concatenate([np.random.default_rng(step).uniform(-1, 1, (5, 7)) for step in (0, 5)])[:7]
    np.testing.assert_array_equal(run.actions, expected)
    assert not run.success
    assert policy.seen[0].instruction == "other words"


def test_frame_stride_adds_frames(simulator):
    seen = []
    rollout(
        Scripted(1, [6]),
        simulator,
        max_steps=6,
        frame_stride=2,
        on_step=lambda step, frame: seen.append(frame is not None),
    )
    assert seen == [True, False, True, False, True, False, True]


def test_success_ends_an_episode(simulator):
    simulator.reset(observe=False)
    sim = simulator._environment.sim
    joint = next(name for name in sim.model.joint_names if name and "middle" in name)
    sim.data.set_joint_qpos(joint, -0.16)
    run = rollout(Scripted(1, [5]), simulator, initial_state=simulator.state, max_steps=20)
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
def test_what_a_policy_raises_is_an_error_with_its_cause(simulator, answer, cause):
    class Failing(Scripted):
        def act(self, observation):
            if observation.step < 4:
                return super().act(observation)
            if isinstance(answer, Exception):
                raise answer
            return answer

    with pytest.raises(PolicyError, match="step 4 of libero_goal/0") as caught:
        rollout(Failing(1, [2]), simulator, max_steps=10)
    assert isinstance(caught.value.__cause__, cause)
    assert len(caught.value.so_far.actions) == 4
    assert caught.value.so_far.query_steps == (0, 2)
