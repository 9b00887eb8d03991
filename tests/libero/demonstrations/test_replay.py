import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from worldvla_libero.data.episodes import Episode, EpisodeError, NoEpisodeLeftError, Reason
from worldvla_libero.demonstrations.replay import RECORD_FILE, Replayer, ReplaySettings, replay
from worldvla_libero.hdf5 import HDF5Source
from worldvla_libero.jobs.parts import WORK_FOLDER, JobError, StorageError
from worldvla_libero.lerobot import LeRobotSource
from worldvla_libero.simulator.protocols import OPENVLA
from worldvla_libero.simulator.simulator import NO_MOTION, Simulator
from worldvla_libero.simulator.suites import load_suite

FIXTURE = Path(__file__).parents[2] / "fixtures" / "demos" / "libero_object"
SOUP = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
SAUCE = "pick_up_the_bbq_sauce_and_place_it_in_the_basket"
CAMERAS = ("agentview", "robot0_eye_in_hand")
SIZE = 64


@pytest.fixture(scope="module")
def work() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])
        yield import_module("job_work")


@pytest.fixture(scope="module")
def recorded() -> Episode:
    return HDF5Source(FIXTURE).read(f"{SAUCE}_demo/demo_0")


@pytest.fixture(scope="module")
def blind() -> Iterator[Replayer]:
    replayer = Replayer(ReplaySettings(SIZE, render=False))
    yield replayer
    replayer.close()


@pytest.fixture(scope="module")
def whole(blind, recorded) -> Episode:
    return blind(recorded)


@pytest.fixture(scope="module")
def short(recorded, whole) -> Episode:
    """From where the bottle falls into the basket, so that any motion succeeds."""
    return replace(recorded, states=whole.states[-1:], actions=recorded.actions[20:30])


def with_pauses(actions: np.ndarray) -> np.ndarray:
    """The same motion with no-ops: at rest in the beginning, the middle and the end, gripper as before."""
    middle, end = (np.array([*[3e-5] * 6, actions[t, 6]]) for t in (6, -1))
    begin = np.array([[0.0] * 6 + [1.0], [0.0] * 6 + [-1.0]])
    return np.concatenate([begin, actions[:7], [middle] * 3, actions[7:], [end]])


def without_noops(actions: np.ndarray) -> np.ndarray:
    """SPEC §9: skip where the norm of a[:6] is below 1e-4 and the gripper equals the previous kept action's."""
    kept: list[np.ndarray] = []
    for action in actions:
        at_rest = math.sqrt(sum(x * x for x in action[:6])) < 1e-4
        if not (at_rest and (not kept or action[6] == kept[-1][6])):
            kept.append(action)
    return np.array(kept)


@pytest.fixture(scope="module")
def replayed(short) -> Iterator[Episode]:
    replayer = Replayer(ReplaySettings(SIZE, CAMERAS))
    yield replayer(replace(short, actions=with_pauses(short.actions)))
    replayer.close()


# The replay of one episode


def test_a_replay_is_the_simulator_driven_by_hand(short, replayed):
    actions = without_noops(with_pauses(short.actions))
    np.testing.assert_array_equal(replayed.actions, actions)
    assert len(actions) == len(short.actions)  # the pauses are left out, and they alone
    protocol = replace(OPENVLA, image_size=SIZE)
    with Simulator(load_suite("libero_object").task(SAUCE), protocol, cameras=CAMERAS) as simulator:
        now = simulator.reset(short.states[0], seed=short.seed)  # ten wait steps included
        for t, action in enumerate(actions):
            np.testing.assert_array_equal(replayed.states[t], simulator.state if t else short.states[0])
            fingers, position, quaternion = np.split(simulator.robot_state, [2, 5])
            np.testing.assert_array_equal(replayed.proprioception[t, :3], position)
            np.testing.assert_array_equal(replayed.proprioception[t, 6:], fingers)
            turned = Rotation.from_rotvec(replayed.proprioception[t, 3:6]) * Rotation.from_quat(quaternion).inv()
            assert turned.magnitude() < 1e-6
            for camera in CAMERAS:  # before the action
                np.testing.assert_array_equal(replayed.frames[camera][t], now.frames[camera])
            now = simulator.step(action)
        assert now.success
    assert list(replayed.frames) == list(CAMERAS)
    for frames in replayed.frames.values():
        assert frames.shape == (len(actions), SIZE, SIZE, 3)
        assert frames.dtype == np.uint8
        assert len({frame.tobytes() for frame in frames}) == len(frames)


def test_what_is_known_of_an_episode_is_kept_and_its_versions_are_those_of_the_replay(recorded, replayed):
    for name in ("id", "task", "instruction", "seed"):
        assert getattr(replayed, name) == getattr(recorded, name)
    assert replayed.versions["mujoco"] == version("mujoco")
    assert replayed.versions["robosuite"] == version("robosuite")
    assert replayed.control_hz == 20


def test_without_rendering_there_are_no_frames_and_the_same_states(blind, short, replayed):
    seen = blind(short)
    assert seen.frames == {}
    for name in ("actions", "states", "proprioception"):
        np.testing.assert_array_equal(getattr(seen, name), getattr(replayed, name))


def test_a_whole_demonstration_is_reproduced(recorded, whole):
    np.testing.assert_array_equal(whole.actions, recorded.actions)
    np.testing.assert_array_equal(whole.states[0], recorded.states[0])
    assert len(whole.states) == len(whole.proprioception) == len(recorded)


def test_pauses_can_be_kept(blind, short, monkeypatch):
    monkeypatch.setattr(blind, "settings", replace(blind.settings, skip_noops=False))
    paused = with_pauses(short.actions)
    seen = blind(replace(short, actions=paused))
    np.testing.assert_array_equal(seen.actions, paused)
    assert len(seen.states) == len(seen.proprioception) == len(paused)


def test_an_episode_without_a_seed_is_placed_by_the_protocol(blind, short):
    unseeded, seeded = (blind(replace(short, seed=seed)) for seed in (None, OPENVLA.seed))
    assert unseeded.seed is None
    np.testing.assert_array_equal(unseeded.states, seeded.states)


@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        ({"states": None}, Reason.MISSING_KEY, "no 'states', one row of numbers a step; a replay begins with"),
        (
            {"states": np.zeros((0, 110))},
            Reason.MISSING_KEY,
            "no 'states', one row of numbers a step; a replay begins with",
        ),
        ({"states": np.zeros((1, 79))}, Reason.NO_SIMULATION, r"has shape \(79,\); \(110,\) finite values needed"),
        ({"states": np.full((1, 110), np.nan)}, Reason.NO_SIMULATION, "finite values needed"),
        ({"actions": np.ones((9, 6))}, Reason.ACTION_WIDTH, r"actions have shape \(9, 6\); \(T, 7\) needed"),
        ({"actions": np.full((9, 7), np.nan)}, Reason.NOT_FINITE, "action 0, dimension 0 is nan"),
        ({"actions": np.zeros((0, 7))}, Reason.TOO_SHORT, "0 actions; at least 1 needed"),
        ({"actions": np.array([NO_MOTION] * 9)}, Reason.TOO_SHORT, "all of its 9 actions are no-ops"),
        ({"task": "juggle"}, Reason.NO_SIMULATION, "juggle"),
    ],
)
def test_what_cannot_be_replayed_is_refused_by_name(recorded, blind, changes, reason, message):
    with pytest.raises(EpisodeError, match=rf"{SAUCE}_demo/demo_0: .*{message}") as caught:
        blind(replace(recorded, **changes))
    assert caught.value.reason is reason


def test_a_failure_names_the_versions_of_both(recorded, blind, short, replayed):
    begun = replace(recorded, actions=recorded.actions[:3])
    with pytest.raises(EpisodeError) as caught:
        blind(replace(begun, versions={"mujoco": "2.3.7", "robosuite": "1.4.1"}))
    assert caught.value.reason is Reason.NO_SUCCESS
    assert (
        f"not reached after {len(begun)} steps; recorded with: mujoco 2.3.7, robosuite 1.4.1; replayed with: "
        in (caught.value.message)
    )
    assert caught.value.message.count(f"mujoco {version('mujoco')}, robosuite {version('robosuite')}") == 1
    with pytest.raises(EpisodeError, match="recorded with: unknown; replayed"):
        blind(replace(begun, versions={}))
    np.testing.assert_array_equal(blind(short).states, replayed.states)  # the next one does not notice


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 31}, "image_size is 31 px; allowed: 32 and above"),
        ({"wait_steps": -1}, "wait_steps is -1; allowed: 0 and above"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ReplaySettings(**changes)


# Whole sources, with a replayer that needs no simulator

OPTIONS: dict[str, Any] = {}  # of `replay`, beside those that a test gives


@pytest.fixture
def synthetic(work, monkeypatch) -> str:
    """The id of the episode that fails."""
    monkeypatch.setitem(OPTIONS, "replayer", work.SyntheticReplayer(ReplaySettings(32, CAMERAS), suite=""))
    return work.SyntheticReplayer.FAILS


def run(out: Path | None, **options) -> dict:
    source = HDF5Source(FIXTURE)
    settings = options.pop("settings", ReplaySettings(32, CAMERAS))
    return replay(source, options.pop("keys", source.list()[0]), out, settings, **{**OPTIONS, **options})


def test_hdf5_is_read_back_as_it_was_replayed(tmp_path, work, synthetic):
    seen = []
    record = run(tmp_path / "out", format="hdf5", on_part=lambda name, part: seen.append(name))
    assert sorted(seen) == ["000000", "000001", "000002", "000003"]
    assert record["tasks"] == {SOUP: {"replayed": 2, "kept": 1}, SAUCE: {"replayed": 2, "kept": 2}}
    dropped = {"id": synthetic, "reason": "no success on replay", "message": f"{synthetic}: made to fail"}
    assert record["dropped"] == [dropped]
    assert record["settings"]["replay"] == json.loads(json.dumps(asdict(ReplaySettings(32, CAMERAS))))
    assert record["settings"]["format"] == "hdf5"
    assert json.loads((tmp_path / "out" / RECORD_FILE).read_text()) == record
    assert sorted(work.files(tmp_path / "out")) == sorted([f"{SAUCE}_demo.hdf5", f"{SOUP}_demo.hdf5", RECORD_FILE])
    source, raw = HDF5Source(tmp_path / "out"), HDF5Source(FIXTURE)
    assert source.cameras == CAMERAS
    assert not source.needs_replay
    numbers = {f"{SOUP}_demo/demo_0": 0, f"{SAUCE}_demo/demo_0": 0, f"{SAUCE}_demo/demo_1": 1}
    assert sorted(key.id for key in source.list()[0]) == sorted(numbers)
    for id in numbers:
        made = work.SyntheticReplayer(ReplaySettings(32, CAMERAS), suite="")(raw.read(id))
        found = source.read(id, CAMERAS)
        assert (found.task, found.instruction, found.seed) == (made.task, made.instruction, made.seed)
        for name in ("actions", "states", "proprioception"):
            np.testing.assert_array_equal(getattr(found, name), getattr(made, name))
        for camera in CAMERAS:
            np.testing.assert_array_equal(found.frames[camera], made.frames[camera])


def test_a_lerobot_data_set_is_read_back_as_it_was_replayed(tmp_path, work, synthetic):
    run(tmp_path / "out", format="lerobot")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data", "meta", RECORD_FILE]
    source, raw = LeRobotSource(tmp_path / "out"), HDF5Source(FIXTURE)
    assert source.cameras == ("observation.images.image", "observation.images.image2")
    keys = source.list()[0]
    order = [key.id for key in raw.list()[0] if key.id != synthetic]
    assert len(keys) == len(order)
    for key, id in zip(keys, order, strict=True):
        made = work.SyntheticReplayer(ReplaySettings(32, CAMERAS), suite="")(raw.read(id))
        found = source.read(key.id, source.cameras)
        assert found.instruction == made.instruction
        assert found.control_hz == 20
        np.testing.assert_array_equal(found.actions, made.actions.astype(np.float32))
        np.testing.assert_array_equal(found.proprioception, made.proprioception.astype(np.float32))
        for stored, camera in zip(source.cameras, CAMERAS, strict=True):
            np.testing.assert_array_equal(found.frames[stored], made.frames[camera])


@pytest.mark.parametrize("format", ["hdf5", pytest.param("lerobot", marks=pytest.mark.slow)])
def test_the_bytes_do_not_depend_on_workers_nor_on_a_disk_that_was_full(
    tmp_path, work, synthetic, monkeypatch, format
):
    run(tmp_path / "whole", format=format)
    expected = work.files(tmp_path / "whole")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_: object, **__: object) -> None:
        raise full

    out, last = tmp_path / "out", "merge_demonstrations" if format == "hdf5" else "write_lerobot"
    for function in ("write_demonstrations", last):
        with monkeypatch.context() as patch:
            patch.setattr(f"worldvla_libero.demonstrations.replay.{function}", fail)
            with pytest.raises(
                StorageError, match=r"cannot be written to .*\(No space left on device\); what was"
            ):
                run(out, format=format, workers=2)
        assert not (out / RECORD_FILE).exists()
    assert len(list((out / WORK_FOLDER).glob("00000*"))) == 4
    run(out, format=format, workers=2)
    assert work.files(out) == expected
    assert run(out, format=format) == json.loads(expected[RECORD_FILE])  # nothing is left to do
    with pytest.raises(JobError, match=rf"format was '{format}', now 'lerobot-video'"):
        run(out, format="lerobot-video")


def test_strict_stops_at_the_first_failure(tmp_path, synthetic):
    with pytest.raises(EpisodeError, match="demo_1: made to fail"):
        run(tmp_path / "out", strict=True)
    assert not (tmp_path / "out" / RECORD_FILE).exists()


def test_a_replay_of_which_nothing_is_left_is_an_error_with_the_reasons(tmp_path, synthetic):
    keys = [key for key in HDF5Source(FIXTURE).list()[0] if key.id == synthetic]
    with pytest.raises(NoEpisodeLeftError, match=r"no episode of libero_object is left: 1 dropped \(no success"):
        run(tmp_path / "out", keys=keys)
    assert run(None, keys=keys)["tasks"] == {SOUP: {"replayed": 1, "kept": 0}}  # for the report that is an answer


# Whole sources in the simulator


def rewritten(folder: Path, **demos: Episode) -> HDF5Source:
    """The demonstrations of the sauce with other states and actions."""
    path = shutil.copytree(FIXTURE, folder / "libero_object") / f"{SAUCE}_demo.hdf5"
    with h5py.File(path, "a") as content:
        for name, episode in demos.items():
            for key in ("states", "actions"):
                del content[f"data/{name}/{key}"]
                content[f"data/{name}/{key}"] = getattr(episode, key)
    return HDF5Source(path)


@pytest.mark.slow
def test_a_report_tells_what_still_succeeds(tmp_path, short, recorded):
    demos = rewritten(tmp_path, demo_0=short, demo_1=replace(recorded, actions=recorded.actions[:10]))
    record = replay(demos, demos.list()[0], None, ReplaySettings(SIZE))
    assert record["tasks"] == {SAUCE: {"replayed": 2, "kept": 1}}
    (dropped,) = record["dropped"]
    assert (dropped["id"], dropped["reason"]) == (f"{SAUCE}_demo/demo_1", "no success on replay")
    assert not record["settings"]["replay"]["render"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["libero_object"]


@pytest.mark.slow
def test_two_workers_render_the_bytes_that_one_does(tmp_path, work, short, replayed):
    """One renders the second episode with a simulator that has run the first."""
    demos = rewritten(tmp_path, demo_0=short, demo_1=replace(short, actions=short.actions[2:]))
    settings, keys = ReplaySettings(SIZE, CAMERAS), demos.list()[0]
    for workers in (1, 2):
        record = replay(demos, keys, tmp_path / str(workers), settings, format="hdf5", workers=workers)
        assert record["tasks"] == {SAUCE: {"replayed": 2, "kept": 2}}
    assert work.files(tmp_path / "2") == work.files(tmp_path / "1")
    found = HDF5Source(tmp_path / "1").read(short.id, CAMERAS)
    for name in ("actions", "states", "proprioception"):
        np.testing.assert_array_equal(getattr(found, name), getattr(replayed, name))
    for camera in CAMERAS:
        np.testing.assert_array_equal(found.frames[camera], replayed.frames[camera])
