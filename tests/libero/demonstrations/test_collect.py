import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest

from worldvla_libero.demonstrations.collect import RECORD_FILE, Attempt, Demonstrator, collect
from worldvla_libero.demonstrations.experts import NoExpertError
from worldvla_libero.demonstrations.replay import Replayer, ReplaySettings
from worldvla_libero.hdf5 import HDF5Source
from worldvla_libero.jobs.parts import JobError, StorageError
from worldvla_libero.simulator.suites import load_suite

OPTIONS: dict[str, Any] = {}  # of `collect`, beside those that a test gives
OBJECTS = load_suite("libero_object")
TASK, OTHER = OBJECTS.task(1), OBJECTS.task(2)


@pytest.fixture(scope="module")
def work() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])
        yield import_module("job_work")


@pytest.fixture
def synthetic(work, monkeypatch) -> ModuleType:
    """Even attempts succeed, later ones end first, and there is no simulator."""
    monkeypatch.setitem(OPTIONS, "demonstrator", work.SyntheticDemonstrator())
    return work


def run(*arguments: Any, **options: Any) -> dict[str, Any]:
    return collect(*arguments, **{**OPTIONS, **options})


# What is asked for


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ([TASK], {"episodes": 0}, "episodes is 0; allowed: 1 and above"),
        ([TASK], {"attempts": 0}, "attempts is 0; allowed: 1 and above"),
        ([], {}, "tasks is 0; allowed: 1 and above"),
    ],
)
def test_numbers_below_one_are_refused(tmp_path, tasks, options, message):
    with pytest.raises(ValueError, match=message):
        run(tasks, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("suite", "task"), [("libero_goal", "push the plate to the front of the stove"), ("libero_10", 0)]
)
def test_a_task_without_an_expert_is_refused_before_anything_is_done(tmp_path, suite, task):
    with pytest.raises(NoExpertError, match=rf"no scripted expert for {suite}/\d .*; choose other tasks"):
        run([TASK, load_suite(suite).task(task)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_collections_share_no_episode():
    seeds = [Attempt(TASK, number, seed).episode_seed for seed in range(5) for number in range(1000)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)  # NumPy and MuJoCo take these
    assert [Attempt(TASK, number, 0).episode_seed for number in range(2)] == [1484405855, 1982462498]


# Which attempts are kept


def successes(path: Path) -> list[int]:
    """The seeds of a file's demonstrations, in its order."""
    source = HDF5Source(path)
    return [source.read(key.id).seed for key in source.list()[0]]


def test_the_first_successes_are_kept_by_number_whoever_ends_first(tmp_path, synthetic):
    for workers in (1, 3):
        out = tmp_path / str(workers)
        record = run([TASK, OTHER], out, episodes=3, seed=7, workers=workers)
        for row, task in zip(record["tasks"], (TASK, OTHER), strict=True):
            assert row == {
                "suite": "libero_object",
                "task": task.name,
                "instruction": task.language,
                "attempts": 5,
                "successes": 3,
                "mean_steps": 5.0,  # 3, 5 and 7
                "file": f"{task.name}_demo.hdf5",
                "failures": [f"{task.name}/attempt_{n}: missed" for n in (1, 3)],
            }
            assert successes(out / row["file"]) == [Attempt(task, n, 7).episode_seed for n in (0, 2, 4)]
        assert sorted(path.name for path in out.iterdir()) == sorted(
            [RECORD_FILE, f"{TASK.name}_demo.hdf5", f"{OTHER.name}_demo.hdf5"]
        )
    assert synthetic.files(tmp_path / "1") == synthetic.files(tmp_path / "3")


def test_a_collection_begins_no_attempt_that_it_does_not_need(tmp_path, synthetic):
    seen = {}
    run([TASK], tmp_path, episodes=2, attempts=50, on_part=lambda name, part: seen.update({name: part}))
    assert list(seen) == ["000-000000", "000-000001", "000-000002"]
    assert [isinstance(part, Path) for part in seen.values()] == [True, False, True]


@pytest.mark.parametrize(("attempts", "made"), [(2, 1), (3, 2)])
def test_a_task_is_given_up_after_so_many_attempts(tmp_path, synthetic, attempts, made):
    (row,) = run([TASK], tmp_path, episodes=4, attempts=attempts, workers=2)["tasks"]
    assert (row["attempts"], row["successes"]) == (attempts, made)
    assert len(row["failures"]) == attempts - made
    assert len(successes(tmp_path / row["file"])) == made


def test_a_task_that_never_succeeds_has_no_file(tmp_path, synthetic):
    (row,) = run([TASK], tmp_path, episodes=1, demonstrator=synthetic.NeverSucceeds())["tasks"]
    assert (row["attempts"], row["successes"], row["file"], row["mean_steps"]) == (2, 0, None, None)
    assert [path.name for path in tmp_path.iterdir()] == [RECORD_FILE]


def test_a_full_disk_delays_a_collection_and_changes_nothing(tmp_path, synthetic, monkeypatch):
    run([TASK], tmp_path / "whole", episodes=3)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    for function, named in (
        ("write_demonstrations", "000-00000."),
        ("merge_demonstrations", f"{TASK.name}_demo.hdf5"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"worldvla_libero.demonstrations.collect.{function}", fail)
            with pytest.raises(StorageError, match=rf"^{named}: cannot be written to .*No space left on device"):
                run([TASK], out, episodes=3, workers=2)
    run([TASK], out, episodes=3)
    assert synthetic.files(out) == synthetic.files(tmp_path / "whole")


def test_another_collection_in_the_same_folder_is_refused(tmp_path, synthetic):
    first = run([TASK], tmp_path, episodes=1)
    assert run([TASK], tmp_path, episodes=1) == first
    assert first["settings"]["tasks"] == [f"libero_object/{TASK.name}"]
    with pytest.raises(JobError, match=r"episodes was 1, now 2; attempts was 2, now 4\); choose another folder"):
        run([TASK], tmp_path, episodes=2)


# In the simulator


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("collected") / "one"
    run([TASK], out, episodes=2)
    return out


@pytest.mark.slow
def test_two_workers_collect_the_bytes_that_one_does(tmp_path, work, collected):
    run([TASK], tmp_path, episodes=2, workers=2)
    assert work.files(tmp_path) == work.files(collected)


@pytest.mark.slow
def test_what_is_collected_is_libero_s_layout_and_replays(collected):
    path = collected / f"{TASK.name}_demo.hdf5"
    with h5py.File(path) as content:
        data = content["data"]
        assert data.attrs["bddl_file_name"] == f"bddl_files/libero_object/{TASK.name}.bddl"
        assert json.loads(data.attrs["problem_info"])["language_instruction"] == TASK.language
        assert {"mujoco", "robosuite"} <= set(data.attrs)
        assert list(data) == ["demo_0", "demo_1"]
        assert data.attrs["total"] == sum(demo.attrs["num_samples"] for demo in data.values())
        for demo in data.values():
            steps = demo.attrs["num_samples"]
            shapes = {name: array.shape for name, array in demo.items()}
            assert shapes.pop("states")[0] == steps
            assert shapes == {
                "actions": (steps, 7),
                "robot_states": (steps, 9),
                "rewards": (steps,),
                "dones": (steps,),
            }
            assert np.flatnonzero(demo["dones"]).tolist() == [steps - 1]
    source, replayer = HDF5Source(path), Replayer(ReplaySettings(64, render=False), suite="libero_object")
    assert source.needs_replay
    starts = []
    for key in source.list()[0]:
        made = source.read(key.id)
        again = replayer(made)
        np.testing.assert_array_equal(again.states, made.states)
        np.testing.assert_array_equal(again.proprioception, made.proprioception)
        assert made.robot_states.shape == (len(made), 9)
        starts.append(made.states[0])
        # Never a start state kept for evaluation: those differ by more than noise from all of ours.
        assert np.abs(TASK.initial_states() - made.states[0]).max(axis=1).min() > 1e-2
    replayer.close()
    assert np.abs(starts[0] - starts[1]).max() > 1e-2


@pytest.mark.slow
def test_a_demonstrator_goes_from_task_to_task_and_travels_without_its_simulator(collected):
    import pickle

    demonstrator = pickle.loads(pickle.dumps(Demonstrator()))
    seeds = successes(collected / f"{TASK.name}_demo.hdf5")
    for task in (OTHER, TASK):
        episode = demonstrator(Attempt(task, 0, 0))
        assert (episode.task, episode.id) == (task.name, f"{task.name}/attempt_0")
    assert episode.seed == seeds[0]
    travelled = pickle.loads(pickle.dumps(demonstrator))
    assert travelled._simulator is None
    demonstrator._simulator.close()


@pytest.mark.slow
def test_a_collection_killed_after_its_first_part_leaves_the_bytes_of_an_undisturbed_one(
    tmp_path, work, collected
):
    command = [str(Path(sys.executable).with_name("worldvla")), "collect", "libero_object"]
    command += ["--tasks", str(TASK.index), "--episodes", "2", "--out"]
    out = tmp_path / "out"
    work.kill_when(command, out, ".work/*.hdf5", log=tmp_path / "log")
    assert not (out / RECORD_FILE).exists()
    subprocess.run([*command, out], check=True, stdout=subprocess.DEVNULL)
    assert work.files(out) == work.files(collected)


@pytest.mark.campaign
def test_a_collection_killed_twenty_times_leaves_the_bytes_of_an_undisturbed_one(tmp_path, work):
    """Acceptance: SIGKILL of the whole process group, at random moments of the run."""
    command = [str(Path(sys.executable).with_name("worldvla")), "collect", "libero_object"]
    command += ["--tasks", "9", "--episodes", "3", "--out"]
    found = work.kill_at_random(command, tmp_path, RECORD_FILE, ".hdf5", kills=20, seed=0, log=tmp_path / "log")
    assert found.total() == 20
    assert found["parts"] >= 5
