import os
import pickle
import signal
import subprocess
import sys
import warnings
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from worldvla_libero.data.episodes import EpisodeError
from worldvla_libero.hdf5 import HDF5Source, probe
from worldvla_libero.hdf5.probe import fault_of

DYING = Path(__file__).with_name("dying_probe.py")


def write(path: Path) -> Path:
    with h5py.File(path, "w") as content:
        content.create_group("data").attrs["language_instruction"] = "pick up the milk"
        content["data/demo_0/actions"] = np.zeros((3, 7))
    return path


@pytest.fixture
def fresh():
    """No process has been started yet, and none is left."""
    probe._stop()
    yield
    probe._stop()


@pytest.fixture
def dying(fresh, monkeypatch):
    """The library dies of files called so."""
    monkeypatch.setattr(probe, "__file__", str(DYING))


def process_id() -> int | None:
    return probe._process and probe._process._popen.pid


@pytest.mark.parametrize(
    ("name", "fault"),
    [("crash", "crashes (SIGSEGV)"), ("endless", "does not end"), ("exit", "ends the process (exit status 3)")],
)
def test_a_file_the_library_does_not_survive(dying, tmp_path, name, fault):
    write(tmp_path / f"{name}_demo.hdf5")
    write(tmp_path / "milk_demo.hdf5")
    source = HDF5Source(tmp_path)
    keys, (dropped,) = source.list()
    assert [key.id for key in keys] == ["milk_demo/demo_0"]
    assert dropped.id == f"{name}_demo.hdf5"
    assert f"the HDF5 library {fault} when it reads it" in dropped.message
    with pytest.raises(EpisodeError, match=f"{name}_demo.hdf5: damaged"):
        source.read(f"{name}_demo/demo_0")
    assert len(source.read("milk_demo/demo_0")) == 3


def test_one_process_for_all_files(fresh, tmp_path):
    files = [write(tmp_path / f"{i}.hdf5") for i in range(3)]
    assert process_id() is None
    assert [fault_of(file) for file in files[:1]] == [None]
    first = process_id()
    assert [fault_of(file) for file in files] == [None] * 3
    assert process_id() == first
    os.kill(first, signal.SIGKILL)  # while it waits
    assert fault_of(files[0]) is None
    assert process_id() not in (None, first)


def test_what_an_earlier_file_broke_is_not_the_next_ones_fault(dying, tmp_path):
    poison, good = write(tmp_path / "poison.hdf5"), write(tmp_path / "milk.hdf5")
    assert fault_of(poison) is None
    first = process_id()
    assert fault_of(good) is None
    assert process_id() != first


@pytest.mark.parametrize("name", ["with spaces.hdf5", "näme\n'\".hdf5", os.fsdecode(b"\xff.hdf5"), "-c.hdf5"])
def test_any_name(dying, tmp_path, monkeypatch, name):
    folder = tmp_path / f"crash of {name}"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert fault_of(write(Path(name))) == "crashes (SIGSEGV)"  # the folder is part of what it is asked
    monkeypatch.chdir(tmp_path)
    assert fault_of(write(Path(name))) is None


def test_what_is_no_file_is_the_readers_affair(fresh, tmp_path):
    (tmp_path / "text.hdf5").write_text("no HDF5")
    assert fault_of(tmp_path / "text.hdf5") is None
    assert fault_of(tmp_path / "absent.hdf5") is None
    assert fault_of(tmp_path) is None


def test_links_and_damage_do_not_end_the_walk(fresh, tmp_path):
    with h5py.File(write(tmp_path / "a.hdf5"), "a") as content:
        content["data/again"] = content["data"]
        content["data/soft"] = h5py.SoftLink("/data")
        content["data/gone"] = h5py.SoftLink("/nothing")
        content["data/other"] = h5py.ExternalLink("absent.hdf5", "/")
        content["data/words"] = ["pick", "up"]
        content.create_dataset("data/sparse", (2**40,), "f4", chunks=(2**20,))
    assert fault_of(tmp_path / "a.hdf5") is None


def test_a_file_is_tried_once_unless_it_changes(dying, tmp_path, monkeypatch):
    path = write(tmp_path / "milk_demo.hdf5")
    monkeypatch.setattr(probe, "_AT_REST", -1)  # as if nobody had written it just now
    source = HDF5Source(tmp_path)
    source.list()
    probe._stop()
    again = pickle.loads(pickle.dumps(source))  # as in a worker
    assert len(again.read("milk_demo/demo_0")) == 3
    assert process_id() is None
    write(path)
    assert len(again.read("milk_demo/demo_0")) == 3
    assert process_id() is not None


def ask_elsewhere(path, pid, answers):
    answers.put((probe._process is None, fault_of(path), process_id() != pid))


def test_a_forked_process_starts_its_own(dying, tmp_path):
    good, bad = write(tmp_path / "milk.hdf5"), write(tmp_path / "crash.hdf5")
    assert fault_of(good) is None
    first = process_id()
    context = get_context("fork")
    answers = context.SimpleQueue()
    for path, fault in ((good, None), (bad, "crashes (SIGSEGV)")):
        process = context.Process(target=ask_elsewhere, args=(path, first, answers))
        process.start()
        assert answers.get() == (True, fault, True)
        process.join()
        assert process.exitcode == 0
    assert fault_of(good) is None
    assert process_id() == first


def test_none_is_left_at_the_end(tmp_path):
    program = (
        "import sys; from pathlib import Path; from worldvla_libero.hdf5 import probe\n"
        "assert probe.fault_of(Path(sys.argv[1])) is None; print(probe._process._popen.pid)"
    )
    command = [sys.executable, "-c", program, write(tmp_path / "milk.hdf5")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(found.stdout), 0)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("sys.executable", "/absent/python", "absent/python"),
        ("sys.executable", "", "not run by an interpreter"),
        ("sys.frozen", True, "not run by an interpreter"),
        ("worldvla_libero.hdf5.probe.__file__", "/absent.py", "exit status 2"),
    ],
)
def test_without_another_process_files_are_read_untried(fresh, tmp_path, monkeypatch, name, value, why):
    monkeypatch.setattr(name, value, raising=False)
    probe._warn_untried.cache_clear()
    write(tmp_path / "milk_demo.hdf5")
    with pytest.warns(RuntimeWarning, match=f"without a trial in another process .*{why}"):
        assert len(HDF5Source(tmp_path).list()[0]) == 1
    with warnings.catch_warnings(action="error"):  # once is enough
        assert len(HDF5Source(tmp_path).list()[0]) == 1


def test_an_interrupted_question_leaves_no_answer_behind(dying, tmp_path, monkeypatch):
    good, crash = write(tmp_path / "milk.hdf5"), write(tmp_path / "crash.hdf5")
    assert fault_of(good) is None
    first = process_id()

    def interrupted(size=-1):
        raise KeyboardInterrupt

    answers = SimpleNamespace(readline=interrupted, close=probe._process._answers.close)
    monkeypatch.setattr(probe._process, "_answers", answers)
    with pytest.raises(KeyboardInterrupt):
        fault_of(good)
    assert process_id() is None
    assert fault_of(crash) == "crashes (SIGSEGV)"
    assert fault_of(good) is None
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
