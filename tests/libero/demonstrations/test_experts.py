import hashlib
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from worldvla_libero.demonstrations.experts import (
    CLOSED,
    ExpertStyle,
    NoExpertError,
    ScriptedExpert,
    _axis_angle,
    _rotation_about,
    demonstrate,
    has_expert,
)
from worldvla_libero.simulator.simulator import Simulator
from worldvla_libero.simulator.suites import SUITES, load_suite

CREAM_CHEESE = 1  # of LIBERO-Object: the hand has to keep clear of a can
NO_OP = 1e-4  # the field's filter drops motions below


@pytest.fixture(scope="module")
def table() -> Iterator[Simulator]:
    with Simulator(load_suite("libero_object").task(CREAM_CHEESE), image_size=64) as simulator:
        yield simulator


@pytest.fixture(scope="module")
def demonstration(table):
    return demonstrate(table, seed=0)


def beginning(demonstration):
    """Digest of the first 40 steps."""
    parts = demonstration.actions[:40], demonstration.states[:40]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def test_an_episode_ends_with_the_step_that_reached_the_goal(table, demonstration):
    length = len(demonstration.actions)
    assert demonstration.success
    assert 50 < length < table.protocol.step_limit(table.task)
    assert demonstration.actions.shape == (length, 7)
    assert demonstration.states.shape == (length, len(table.state))
    assert demonstration.robot_states.shape == (length, 9)
    assert (demonstration.actions.dtype, demonstration.states.dtype) == (np.float64, np.float64)
    assert np.isfinite(demonstration.actions).all()
    assert np.abs(demonstration.actions).max() <= 1


def test_a_replay_from_row_0_is_the_same_episode(table, demonstration):
    assert not table.reset(demonstration.states[0], seed=demonstration.seed, observe=False).success
    for t, action in enumerate(demonstration.actions):
        if t > 0:
            np.testing.assert_array_equal(table.state, demonstration.states[t])
        np.testing.assert_array_equal(table.robot_state, demonstration.robot_states[t])
        result = table.step(action, observe=False)
        assert result.success == (t == len(demonstration.actions) - 1)


def test_the_same_seed_is_the_same_episode_after_others(table, demonstration):
    other = demonstrate(table, seed=1, max_steps=30)
    assert len(other.actions) == 30
    assert not other.success
    assert not np.array_equal(other.actions, demonstration.actions[:30])
    assert beginning(demonstrate(table, seed=0, max_steps=40)) == beginning(demonstration)


@pytest.mark.slow
def test_the_same_seed_is_the_same_episode_in_another_process(demonstration):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_experts import *\n"
        "with Simulator(load_suite('libero_object').task(CREAM_CHEESE), image_size=64) as simulator:\n"
        "    print(beginning(demonstrate(simulator, seed=0, max_steps=40)))\n"
    )
    here = __file__.rsplit("/", 1)[0]
    answer = subprocess.run([sys.executable, "-c", program, here], capture_output=True, text=True, check=True)
    assert answer.stdout.split()[-1] == beginning(demonstration)


def test_no_action_is_a_no_op_even_without_noise(table, demonstration):
    """The filter would drop it, and a replay of the rest would be another episode."""
    assert np.linalg.norm(demonstration.actions[:, :6], axis=1).min() > NO_OP
    table.reset(None, seed=0, observe=False)
    expert = ScriptedExpert(table, ExpertStyle(noise=0.0), np.random.default_rng(0))
    expert._script = expert._hold(CLOSED, 20)
    for _ in range(20):
        action = expert.act()
        assert np.linalg.norm(action[:6]) > NO_OP
        table.step(action, observe=False)


def test_what_slips_is_picked_up_again(table):
    table.reset(None, seed=3, observe=False)
    expert = ScriptedExpert(table, ExpertStyle(), np.random.default_rng(3))
    sim, fumbled = table.environment.sim, False
    for _ in range(280):
        result = table.step(expert.act(), observe=False)
        if expert.phase == "lift" and not fumbled:
            pose = sim.data.get_joint_qpos("cream_cheese_1_joint0").copy()
            sim.data.set_joint_qpos("cream_cheese_1_joint0", [*(pose[:2] - (0.06, 0)), 0.012, *pose[3:]])
            fumbled = True
        if result.success:
            break
    assert fumbled
    assert result.success


def test_which_tasks_have_an_expert():
    counts = {suite: sum(map(has_expert, load_suite(suite).tasks)) for suite in SUITES}
    assert counts == {
        "libero_spatial": 10,
        "libero_object": 10,
        "libero_goal": 9,
        "libero_10": 0,
        "libero_90": 0,
    }


@pytest.mark.parametrize(
    ("suite", "task"), [("libero_goal", "push the plate to the front of the stove"), ("libero_10", 0)]
)
def test_a_task_without_a_script_is_refused_by_name(suite, task):
    simulator = SimpleNamespace(task=load_suite(suite).task(task))
    with pytest.raises(NoExpertError, match=rf"no script for {suite}/\d .*libero_object.*push the plate"):
        ScriptedExpert(simulator, ExpertStyle(), np.random.default_rng(0))


def test_styles_differ_within_their_ranges_and_follow_the_seed():
    styles = [ExpertStyle.draw(np.random.default_rng(seed)) for seed in range(50)]
    assert styles[3] == ExpertStyle.draw(np.random.default_rng(3))
    assert len(set(styles)) == 50
    for style in styles:
        assert 0.8 <= style.speed <= 1
        assert 0.01 <= style.noise <= 0.06
        assert 0 <= style.height <= 0.04
        assert max(map(abs, style.grasp_offset)) <= 0.004


@pytest.mark.parametrize("angle", [0.0, 1e-9, 0.4, 1.5])
def test_axis_angle_leads_from_one_rotation_to_the_other(angle):
    axis = np.array([2.0, -1.0, 2.0]) / 3
    start = _rotation_about(np.array([0.0, 0, 1]), 0.3)
    wanted = _rotation_about(axis, angle) @ start
    np.testing.assert_allclose(_axis_angle(start, wanted), angle * axis, atol=1e-8)
    # Fingers that changed places hold the same.
    swapped = wanted * (-1, -1, 1)
    np.testing.assert_allclose(_axis_angle(start, swapped), angle * axis, atol=1e-8)


QUICK = [("libero_goal", 0), ("libero_goal", 7)]  # drawer, knob
OTHERS = (
    [("libero_goal", i) for i in (1, 2, 3, 4, 6, 8, 9)]
    + [("libero_spatial", i) for i in (4, 5, 6, 9)]  # in the drawer, on the ramekin, far away, on the cabinet
    + [("libero_object", i) for i in (2, 5, 7)]  # a bottle, a can, a carton
)


@pytest.mark.parametrize(
    ("suite", "index"),
    [pytest.param(*task, marks=pytest.mark.slow) for task in QUICK]
    + [pytest.param(*task, marks=pytest.mark.campaign) for task in OTHERS],
)
def test_every_kind_of_task_is_solved(suite, index):
    with Simulator(load_suite(suite).task(index), image_size=64) as simulator:
        assert any(demonstrate(simulator, seed=seed).success for seed in (0, 1))
