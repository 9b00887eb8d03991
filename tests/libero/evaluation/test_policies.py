"""The policies beside our model, in the real simulator."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from worldvla_libero.demonstrations.experts import ExpertStyle, NoExpertError
from worldvla_libero.evaluation.closed_loop import evaluate
from worldvla_libero.evaluation.policies import (
    ExpertPolicy,
    ModelPolicy,
    RandomPolicy,
    open_policy,
)
from worldvla_libero.evaluation.policy import AGENTVIEW, WRIST, EpisodicPolicy, Needs, Observation
from worldvla_libero.evaluation.rollout import PolicyError, rollout
from worldvla_libero.simulator.protocols import OPENVLA
from worldvla_libero.simulator.simulator import SimulatorError
from worldvla_libero.simulator.suites import UnknownNameError, load_suite
from worldvla_tokenizers import ActionTokenizer

NOTHING = Observation((), "", 0)


def rendered(frames):
    """At which steps; nothing is rendered for those who look at no image."""
    return [step for step, frame in frames.items() if frame is not None]


def test_a_random_episode_depends_on_seed_and_start_alone(simulator):
    policy = RandomPolicy(3, num_actions=4)
    some, none = {}, {}
    first = rollout(policy, simulator, initial_state=0, max_steps=5, on_step=none.__setitem__).actions
    other = rollout(policy, simulator, initial_state=1, max_steps=5).actions
    recorded = {"frame_stride": 2, "on_step": some.__setitem__}
    again = rollout(RandomPolicy(3), simulator, initial_state=0, max_steps=5, **recorded).actions
    np.testing.assert_array_equal(again, first)  # whatever came before, and however long the chunks
    assert (rendered(none), rendered(some)) == ([], [0, 2, 4])
    assert not np.array_equal(other, first)
    policy.seed = 4
    policy.reset(simulator)
    assert not np.array_equal(policy.act(NOTHING), first[:4])


def test_random_actions_fill_the_bounds_of_the_data():
    bounds = ActionTokenizer.published()
    drawn = RandomPolicy(num_actions=4000).act(NOTHING)
    np.testing.assert_allclose(drawn.min(0), bounds.low, atol=0.01)
    np.testing.assert_allclose(drawn.max(0), bounds.high, atol=0.01)
    np.testing.assert_allclose(drawn.mean(0), (bounds.low + bounds.high) / 2, atol=0.05)


def test_the_expert_acts_on_what_it_sees_in_the_simulator(simulator):
    frames = {}
    first = rollout(ExpertPolicy(), simulator, max_steps=5, on_step=frames.__setitem__)
    assert first.query_steps == (0, 1, 2, 3, 4)
    assert len(frames) == 6
    assert rendered(frames) == []
    assert np.abs(first.actions).max() <= 1
    noisy = rollout(ExpertPolicy(ExpertStyle(noise=0.05)), simulator, max_steps=5)
    assert not np.array_equal(noisy.actions, first.actions)
    np.testing.assert_allclose(noisy.actions, first.actions, atol=0.5)


@pytest.mark.slow
def test_the_expert_reaches_the_goal_from_a_fixed_initial_state(tmp_path):
    task = load_suite("libero_object").task(0)
    result = evaluate(ExpertPolicy(), [task], tmp_path, episodes=1, video_stride=0)
    assert result.overall.successes == 1
    assert result.records[0].queries == result.records[0].steps


def test_a_task_without_a_script_is_an_error_of_the_policy():
    class Elsewhere:
        task = load_suite("libero_10").task(0)

    policy = ExpertPolicy()
    with pytest.raises(NoExpertError, match="no script for libero_10/0"):
        policy.reset(Elsewhere())
    with pytest.raises(RuntimeError, match="before reset"):
        policy.act(NOTHING)


def test_what_reset_raises_is_an_error_of_the_policy(simulator):
    class Broken(RandomPolicy):
        def reset(self, simulator):
            raise KeyError("weights")

    with pytest.raises(PolicyError, match=r"step 0 of libero_goal/0 .*KeyError") as caught:
        rollout(Broken(), simulator, max_steps=3)
    assert isinstance(caught.value.__cause__, KeyError)
    assert len(caught.value.so_far.actions) == 0


def test_policies_travel_to_other_processes(simulator):
    expert = ExpertPolicy(ExpertStyle(speed=0.9))
    expert.reset(simulator)
    copied = pickle.loads(pickle.dumps(expert))
    assert copied.style == expert.style
    random = pickle.loads(pickle.dumps(RandomPolicy(5)))
    assert random.seed == 5
    assert all(isinstance(policy, EpisodicPolicy) for policy in (copied, random))


class Seeing:
    """Stands still and keeps what it was shown."""

    history_length = 2

    def __init__(self, **attributes):
        self.seen = []
        for name, value in attributes.items():
            setattr(self, name, value)

    def act(self, observation):
        self.seen.append(observation)
        return np.tile([0.2, 0, 0, 0, 0, 0.1, -1], (3, 1))


def test_wrist_and_state_are_shown_to_those_who_ask_and_change_nothing_else(simulator, two_cameras):
    plain, asking = Seeing(), Seeing(cameras=(AGENTVIEW, WRIST), uses_state=True)
    rollout(plain, simulator, max_steps=4)
    rollout(asking, two_cameras, max_steps=4)
    assert [observation.step for observation in asking.seen] == [0, 3]
    for observation, other in zip(asking.seen, plain.seen, strict=True):
        np.testing.assert_array_equal(observation.images, other.images)
        assert (other.wrist, other.state) == (None, None)
        assert observation.wrist.shape == (128, 128, 3)
        assert not np.array_equal(observation.wrist, observation.images[-1])
        assert observation.state.shape == (8,)
    assert asking.seen[1].state[0] > asking.seen[0].state[0] + 0.002  # it moved along x


def test_a_camera_that_the_simulator_lacks_is_named(simulator):
    with pytest.raises(SimulatorError, match=r"asks for camera 'robot0_eye_in_hand'; .* renders agentview: make"):
        rollout(Seeing(cameras=(AGENTVIEW, WRIST)), simulator, max_steps=3)


def test_what_policies_need_is_asked_once():
    assert Needs.of(Seeing()) == Needs(2, ("agentview",), False)
    assert Needs.of(Seeing(cameras=[AGENTVIEW, WRIST], uses_state=True)) == Needs(2, (AGENTVIEW, WRIST), True)
    assert Needs.of(RandomPolicy()) == Needs(0)
    for cameras in ((), (WRIST,)):
        with pytest.raises(
            ValueError, match=r"cameras of Seeing are .*; the first has to be the third-person one"
        ):
            Needs.of(Seeing(cameras=cameras))
    with pytest.raises(ValueError, match="history_length of Seeing is -1; allowed: 0 and above"):
        Needs.of(Seeing(history_length=-1))


def test_evaluation_runs_any_policy_with_the_cameras_it_asks_for(tmp_path):
    task = load_suite("libero_goal_swap").task(0)
    protocol = replace(OPENVLA, image_size=64, wait_steps=1, max_steps={"libero_goal_swap": 3})
    asking = Seeing(cameras=(AGENTVIEW, WRIST))
    result = evaluate(asking, [task], tmp_path / "a", protocol=protocol, episodes=1, video_stride=0)
    assert [record.outcome for record in result.records] == ["failure"]
    assert asking.seen[0].wrist.shape == (64, 64, 3)


def test_policies_have_names():
    assert isinstance(open_policy("random", seed=7, num_actions=3), RandomPolicy)
    assert open_policy("random", seed=7, num_actions=3).act(NOTHING).shape == (3, 7)
    assert isinstance(open_policy("expert"), ExpertPolicy)
    server = open_policy("ws://gpu-1:8000", num_actions=8)
    assert (server.url, server.num_actions) == ("ws://gpu-1:8000", 8)
    assert open_policy("ws://gpu-1:8000").num_actions == 5
    assert open_policy("wss://gpu-1").url == "wss://gpu-1"


def test_the_model_is_loaded_as_the_caller_likes(published):
    from worldvla_model import WorldVLA

    loaded = []

    def load():
        place = {"tokenizers": published.tokenizer, "image_size": 128}
        loaded.append(WorldVLA.from_pretrained(published.checkpoint, **place))
        return loaded[0]

    policy = open_policy("model", load_model=load, num_actions=2)
    assert isinstance(policy, ModelPolicy)
    assert policy.agent is loaded[0]
    assert policy.num_actions == 2
    assert not isinstance(policy, EpisodicPolicy)


@pytest.mark.parametrize(
    ("ask", "kind", "message"),
    [
        (
            lambda: open_policy("oracle"),
            UnknownNameError,
            "unknown policy 'oracle'; existing: model, random, expert, ws",
        ),
        (lambda: open_policy("random", num_actions=0), ValueError, "num_actions is 0; allowed: 1 and above"),
        (lambda: open_policy("expert", num_actions=5), ValueError, "num_actions is 5; allowed: 1, the expert"),
        (lambda: RandomPolicy(-1), ValueError, "seed is -1; allowed: 0 and above"),
        (lambda: RandomPolicy(num_actions=0), ValueError, "num_actions is 0"),
    ],
)
def test_bad_input_is_named(ask, kind, message):
    with pytest.raises(kind, match=message):
        ask()
