import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from worldvla_libero.simulator.libero_files import InitialStateError
from worldvla_libero.simulator.protocols import OPENVLA
from worldvla_libero.simulator.simulator import (
    NO_MOTION,
    InvalidActionError,
    Simulator,
    SimulatorError,
    check_actions,
)
from worldvla_libero.simulator.suites import load_suite

ACTIONS = np.random.default_rng(0).uniform(-1, 1, (8, 7))


@pytest.fixture(scope="module")
def always_on() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Frames and states of LIBERO's own environment, rendering both its cameras at every step."""
    from libero.libero.envs import OffScreenRenderEnv

    task = load_suite("libero_goal").task(0)
    environment = OffScreenRenderEnv(bddl_file_name=str(task.bddl_file), camera_heights=128, camera_widths=128)
    try:
        environment.seed(0)
        environment.reset()
        environment.set_init_state(task.initial_states()[3])
        for _ in range(10):
            observation, *_ = environment.step(list(NO_MOTION))
        frames, states = [observation["agentview_image"][::-1, ::-1]], [environment.get_sim_state()]
        for action in ACTIONS:
            observation, *_ = environment.step(action)
            frames.append(observation["agentview_image"][::-1, ::-1])
            states.append(environment.get_sim_state())
    finally:
        environment.close()
    return frames, states


@pytest.mark.parametrize(
    "observed", [(1, 1, 1, 1, 1, 1, 1, 1), (0, 0, 0, 1, 1, 0, 0, 1), (0, 0, 0, 0, 0, 0, 0, 1)]
)
def test_frames_equal_those_of_an_always_on_camera(simulator, always_on, observed):
    frames, states = always_on
    start = simulator.reset(3, seed=0)
    assert start.step == 0
    np.testing.assert_array_equal(start.frame, frames[0])
    for i, (action, observe) in enumerate(zip(ACTIONS, observed, strict=True), start=1):
        result = simulator.step(action, observe=bool(observe))
        assert result.step == i
        assert (result.frame is not None) == observe
        if observe:
            np.testing.assert_array_equal(result.frame, frames[i])
            assert result.frame.dtype == np.uint8
            assert result.frame.flags.c_contiguous
        np.testing.assert_array_equal(simulator.state, states[i])
    assert np.ptp(frames[-1].astype(int) - frames[0]) > 0  # the arm has moved, so equality means something


@pytest.mark.slow
def test_two_simulators_in_a_process_do_not_draw_into_each_other(simulator, always_on):
    frames, _ = always_on
    with Simulator(load_suite("libero_object").task(2), image_size=64) as other:
        np.testing.assert_array_equal(simulator.reset(3, seed=0).frame, frames[0])
        soup = other.reset().frame
        np.testing.assert_array_equal(simulator.step(ACTIONS[0]).frame, frames[1])
        assert soup.shape == (64, 64, 3)
    np.testing.assert_array_equal(simulator.step(ACTIONS[1]).frame, frames[2])


def test_a_seed_places_the_scene_and_leaves_numpy_alone_and_a_state_may_be_an_array(simulator):
    np.random.seed(7)  # noqa: NPY002
    expected = np.random.RandomState(7).rand()
    poses, frames = [], []
    for state, seed in ((1, 0), (simulator.initial_states[1], 0), (1, 1)):
        frames.append(simulator.reset(state, seed=seed).frame)
        poses.append(simulator.environment.sim.model.body_pos.copy())
    assert np.random.rand() == expected  # noqa: NPY002
    np.testing.assert_array_equal(poses[0], poses[1])
    np.testing.assert_array_equal(frames[0], frames[1])
    assert not np.array_equal(poses[0], poses[2])


@pytest.mark.parametrize("state", [50, -1, np.zeros(5), "nan"])
def test_initial_states_that_do_not_fit_are_refused(simulator, state):
    if isinstance(state, str):
        state = np.full_like(simulator.initial_states[0], np.nan)
    with pytest.raises(InitialStateError, match="open the middle drawer"):
        simulator.reset(state)


def test_actions_that_cannot_be_sent_are_refused_before_the_physics(simulator):
    simulator.reset(observe=False)
    before = simulator.state
    for action in ([0.0] * 6, [0.0] * 8, [[0.0] * 7], 0.5, [np.nan] * 7, [0, 0, np.inf, 0, 0, 0, 1]):
        with pytest.raises(InvalidActionError, match=r"\(7,\) needed|finite values needed"):
            simulator.step(action)
        np.testing.assert_array_equal(simulator.state, before)
    assert simulator.step(NO_MOTION, observe=False).step == 1  # what was refused is no step


def test_chunks_are_checked_too():
    assert check_actions(np.zeros((5, 7), np.float32), shape=(None, 7)).dtype == np.float64
    with pytest.raises(InvalidActionError, match=r"shape \(0, 7\); \(K, 7\) needed"):
        check_actions(np.zeros((0, 7)), shape=(None, 7))


def test_success_is_libero_s_own(simulator):
    """The drawer joint moved by hand to where LIBERO calls it open."""
    assert simulator.reset(observe=False).frame is None
    assert not simulator.step(NO_MOTION, observe=False).success
    sim = simulator.environment.sim
    joints = [n for n in sim.model.joint_names if n and "middle" in n]
    assert len(joints) == 1
    sim.data.set_joint_qpos(joints[0], -0.16)
    assert simulator.step(NO_MOTION, observe=False).success


def test_misuse_is_named():
    task = load_suite("libero_goal").task(0)
    with pytest.raises(SimulatorError, match=r"existing: .*agentview"):
        Simulator(task, cameras=["ceiling"])
    simulator = Simulator(task, replace(OPENVLA, wait_steps=0), image_size=64)
    with pytest.raises(SimulatorError, match="before reset"):
        simulator.step(NO_MOTION)
    assert simulator.reset().frame.shape == (64, 64, 3)  # without wait steps the frame is the state's own
    simulator.close()
    simulator.close()
    with pytest.raises(SimulatorError, match="closed"):
        simulator.reset()


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MPLCONFIGDIR", "MESA_SHADER_CACHE_DIR")
    kept = {k: v for k, v in os.environ.items() if k not in ours}
    return subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, timeout=300
    )


CHECK = "from worldvla_libero.simulator.rendering import check_rendering; check_rendering()"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MUJOCO_GL": "invalid"}, "MUJOCO_GL is 'invalid'; allowed: egl, osmesa"),
        ({"__EGL_VENDOR_LIBRARY_DIRS": "/nonexistent"}, "remedy: apt-get install libegl1 libgl1-mesa-dri"),
        ({"PYOPENGL_PLATFORM": "osmesa"}, "beside MUJOCO_GL=egl; allowed: 'egl'; remedy: unset PYOPENGL_PLATFORM"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="EGL is Linux's")
def test_missing_gl_is_a_clear_error(environment, message):
    ran = _python(CHECK, **environment)
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    assert "RenderingError" in last
    assert message in last


@pytest.mark.skipif(find_spec("triton") is None, reason="torch comes without triton on this platform")
def test_torch_can_load_triton_after_the_renderer():
    code = "from worldvla_libero.simulator.rendering import check_rendering; check_rendering(); import triton"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_a_rollout_is_silent_and_leaves_the_home_untouched(tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir()
    work = tmp_path / "work"
    work.mkdir()
    code = f"""
import os; os.chdir({str(work)!r})
from worldvla_libero.simulator.simulator import Simulator
from worldvla_libero.simulator.suites import load_suite
simulator = Simulator(load_suite("libero_goal").task(0), image_size=64)
simulator.reset()
simulator.step([0.0] * 7)
"""  # not closed: the exit has to be silent as well
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    ran = _python(code, HOME=str(home), TMPDIR=str(temporary))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ""
    assert ran.stderr == ""
    for folder in (home, work, temporary):
        assert list(folder.iterdir()) == []
