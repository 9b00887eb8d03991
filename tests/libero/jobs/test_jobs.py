import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from worldvla_libero.data.episodes import Reason
from worldvla_libero.jobs.job import Job
from worldvla_libero.jobs.parts import WORK_FOLDER, Dropped, ItemError, JobError, StorageError

HERE = Path(__file__).parents[1]
DONE = "done.json"


@pytest.fixture(scope="module")
def jobs() -> Iterator[ModuleType]:
    """Workers find it by name: their `sys.path` is this process's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        yield import_module("job_work")


@pytest.fixture(scope="module")
def whole(jobs, tmp_path_factory) -> dict[str, bytes]:
    """What a job of twelve items leaves."""
    out = tmp_path_factory.mktemp("jobs") / "whole"
    jobs.complete(out, jobs.numbered(12))
    return jobs.files(out)


def parts_of(out: Path) -> list[str]:
    """Names of the parts, and all that does not belong there."""
    known = {"job.json", "lock"}
    return sorted(path.name for path in (out / WORK_FOLDER).iterdir() if path.name not in known)


# Results


@pytest.mark.parametrize("workers", [1, 3])
def test_parts_come_in_the_order_of_items_whoever_is_done_first(tmp_path, jobs, whole, workers):
    items, seen = jobs.numbered(12), []
    with Job(tmp_path, DONE, {}) as job:
        assert not job.ended
        parts = job.run(
            items,
            jobs.describe,
            jobs.store,
            suffix=".txt",
            workers=workers,
            on_part=lambda *part: seen.append(part),
        )
        assert list(parts) == list(items)
        assert dict(seen) == parts
        assert len(seen) == len(items)
        assert parts["003"] == Dropped("3", "too short", "item 3: “too short”")
        assert parts["004"] == tmp_path / WORK_FOLDER / "004.txt"
        assert parts["004"].read_text() == "item 4\n"
        dropped = {"003", "010"}
        assert parts_of(tmp_path) == [n + (".dropped.json" if n in dropped else ".txt") for n in items]
    jobs.complete(tmp_path / "ended", items, workers=workers)
    assert jobs.files(tmp_path / "ended") == whole


def test_parts_of_earlier_runs_are_reported_first_and_not_made_again(tmp_path, jobs):
    def first(name: str, so_far: object) -> bool:
        return name in ("003", "004", "006")

    with Job(tmp_path, DONE, {}) as job:
        before = job.run(jobs.numbered(7), jobs.describe, jobs.store, suffix=".txt", wanted=first)
        assert list(before) == ["003", "004", "006"]
    (tmp_path / WORK_FOLDER / "004.txt").write_text("as it was")
    seen = []
    with Job(tmp_path, DONE, {}) as job:
        again = job.run(
            jobs.numbered(7), jobs.describe, jobs.store, suffix=".txt", on_part=lambda name, _: seen.append(name)
        )
    assert seen == ["003", "004", "006", "000", "001", "002", "005"]
    assert again["004"].read_text() == "as it was"
    assert again["003"] == before["003"]


def test_whether_an_item_is_wanted_is_asked_with_the_parts_so_far(tmp_path, jobs):
    with Job(tmp_path, DONE, {}) as job:
        parts = job.run(
            jobs.numbered(9),
            jobs.describe,
            jobs.store,
            suffix=".txt",
            wanted=lambda name, parts: sum(isinstance(part, Path) for part in parts.values()) < 4,
        )
    assert list(parts) == ["000", "001", "002", "003", "004"]  # of which 003 is dropped


def test_a_job_without_items_or_workers(tmp_path, jobs):
    with Job(tmp_path, DONE, {}) as job:
        assert job.run({}, jobs.describe, jobs.store, suffix=".txt") == {}
        with pytest.raises(ValueError, match="workers is 0; allowed: 1 and above"):
            job.run(jobs.numbered(1), jobs.describe, jobs.store, suffix=".txt", workers=0)


def test_a_job_that_has_ended_says_what_it_said(tmp_path, jobs, whole):
    out = tmp_path / "out"
    first = jobs.complete(out, jobs.numbered(12))
    (out / WORK_FOLDER).mkdir()  # killed after its last word
    assert jobs.complete(out, jobs.numbered(12)) == first
    assert first["settings"] == {"of": "letters"}
    assert jobs.files(out) == whole
    assert not (out / WORK_FOLDER).exists()


# Failures of the work


def test_strict_stops_at_the_first_dropped_item_and_at_the_same_in_another_run(tmp_path, jobs, whole):
    for _ in range(2):
        with pytest.raises(ItemError, match="item 3: “too short”") as caught:
            jobs.complete(tmp_path, jobs.numbered(12), strict=True)
        assert caught.value.reason == Reason.TOO_SHORT
        assert parts_of(tmp_path) == ["000.txt", "001.txt", "002.txt", "003.dropped.json"]
    jobs.complete(tmp_path, jobs.numbered(12))
    assert jobs.files(tmp_path) == whole


def test_an_exception_is_raised_here_with_the_traceback_of_there(tmp_path, jobs, whole):
    with pytest.raises(ZeroDivisionError, match="two is too much") as caught:
        jobs.complete(tmp_path, jobs.numbered(12), jobs.fail_at_two)
    assert "in fail_at_two\n    raise ZeroDivisionError" in "".join(caught.value.__notes__)
    assert parts_of(tmp_path) == ["000.txt", "001.txt"]
    jobs.complete(tmp_path, jobs.numbered(12), workers=3)
    assert jobs.files(tmp_path) == whole


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ("fail_unportably_at_two", "UnportableError: here: not portable"),
        ("answer_unportably_at_two", "lambda"),
    ],
)
def test_what_cannot_be_pickled_is_told_all_the_same(tmp_path, jobs, work, message):
    with pytest.raises(Exception, match=message) as caught:
        jobs.complete(tmp_path, jobs.numbered(4), getattr(jobs, work))
    assert "Traceback" in "".join(caught.value.__notes__)
    assert parts_of(tmp_path) == ["000.txt", "001.txt"]


def test_answers_that_came_with_a_failure_are_stored(tmp_path, jobs):
    work = jobs.FailsWhileStoring(tmp_path)
    with pytest.raises(ZeroDivisionError):
        jobs.complete(tmp_path / "out", jobs.numbered(3), work, work.store, workers=2)
    assert parts_of(tmp_path / "out") == ["001.txt", "002.txt"]


@pytest.mark.parametrize("fault", ["work", "store", "on_part"])
def test_no_worker_outlives_a_run_that_fails(tmp_path, jobs, fault):
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    options = {"store": fail} if fault == "store" else {"on_part": fail} if fault == "on_part" else {}
    with pytest.raises((ZeroDivisionError, KeyboardInterrupt)):
        jobs.complete(
            tmp_path,
            jobs.numbered(9),
            jobs.fail_at_two if fault == "work" else jobs.describe,
            workers=2,
            **options,
        )
    assert multiprocessing.active_children() == []
    assert not [name for name in parts_of(tmp_path) if name.startswith(".")]


# Killed workers


def test_an_item_whose_worker_was_killed_is_tried_again(tmp_path, jobs, whole):
    kills = tmp_path / "kills"
    kills.mkdir()
    jobs.complete(tmp_path / "out", jobs.numbered(12), jobs.Fragile(kills, 1), workers=2)
    assert len(list(kills.iterdir())) == 1
    assert jobs.files(tmp_path / "out") == whole


def test_an_item_that_kills_every_worker_is_dropped_by_name_until_another_run(tmp_path, jobs, whole):
    kills, out, items = tmp_path / "kills", tmp_path / "out", jobs.numbered(12)
    kills.mkdir()
    with Job(out, DONE, {"of": "letters"}) as job:
        parts = job.run(items, jobs.Fragile(kills, 99), jobs.store, suffix=".txt", workers=2)
    assert parts["002"] == Dropped("2", "worker killed", "2: the worker process ended (SIGKILL), 2 times")
    assert sum(isinstance(part, Path) for part in parts.values()) == 9
    assert not [name for name in parts_of(out) if name.startswith("002")]
    jobs.complete(out, items)
    assert jobs.files(out) == whole
    with (
        Job(tmp_path / "strict", DONE, {}) as job,
        pytest.raises(ItemError, match="worker killed: 2: the worker process ended"),
    ):
        job.run(items, jobs.Fragile(kills, 99), jobs.store, suffix=".txt", strict=True)


def test_work_that_a_worker_cannot_import_is_an_error_that_says_so(tmp_path, jobs, capfd):
    with pytest.raises(
        JobError, match=r"could not start \(exit status 1; see its own message above\): what it works"
    ):
        jobs.complete(tmp_path, jobs.numbered(3), jobs.Unstartable(), workers=2)
    assert "ModuleNotFoundError: No module named 'no_such_module'" in capfd.readouterr().err
    assert multiprocessing.active_children() == []
    assert parts_of(tmp_path) == []


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
from pathlib import Path
from worldvla_libero.jobs.job import Job
with Job({str(tmp_path / "out")!r}, "done.json", {{}}) as job:
    job.run({{"0": "0"}}, str, Path.touch, suffix=".txt")
""")
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    assert "a script that begins a job needs `if __name__ == '__main__':`" in ran.stderr.splitlines()[-1]


# Storage


def test_a_full_disk_names_item_and_folder_and_the_next_run_goes_on(tmp_path, jobs, whole):
    stored = []

    def store(text: str, path: Path) -> None:
        jobs.store(text[: len(text) // 2], path)
        if len(stored) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        jobs.store(text, path)
        stored.append(path)

    with pytest.raises(
        StorageError, match=r"005: cannot be written to .*out/\.work \(No space left on device\); what"
    ):
        jobs.complete(tmp_path / "out", jobs.numbered(12), store=store)
    assert parts_of(tmp_path / "out") == ["000.txt", "001.txt", "002.txt", "003.dropped.json", "004.txt"]
    jobs.complete(tmp_path / "out", jobs.numbered(12))
    assert jobs.files(tmp_path / "out") == whole


def test_a_disk_that_is_full_in_the_end_loses_no_part(tmp_path, jobs, whole, monkeypatch):
    out, replace = tmp_path / "out", os.replace

    def full(source: object, target: Path) -> None:
        if Path(target).name in blocked:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    for blocked in (["all.txt"], [DONE]):
        with pytest.raises(StorageError, match=rf"{blocked[0]}: cannot be written to .*out \(No space left"):
            jobs.complete(out, jobs.numbered(12))
        assert len(parts_of(out)) == 12
        assert not (out / DONE).exists()
    blocked = []
    jobs.complete(out, jobs.numbered(12))
    assert jobs.files(out) == whole


# Folders


def test_two_runs_do_not_work_in_one_folder(tmp_path, jobs):
    code = f"from worldvla_libero.jobs.job import Job; Job({str(tmp_path)!r}, 'done.json', {{}}).__enter__()"
    with Job(tmp_path, DONE, {}):
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert f"JobError: another process is at work in {tmp_path}; wait for it" in ran.stderr
        with pytest.raises(JobError, match="another process is at work"), Job(tmp_path, DONE, {}):
            pass
    with Job(tmp_path, DONE, {}):
        pass
    with pytest.raises(KeyboardInterrupt), Job(tmp_path, DONE, {}):
        raise KeyboardInterrupt
    with Job(tmp_path, DONE, {}):
        pass


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(JobError, match=r"is not empty and holds no done\.json; choose another folder"):
        Job(tmp_path, DONE, {}).__enter__()
    with pytest.raises(JobError, match=r"thesis\.tex is a file; choose a folder"):
        Job(tmp_path / "thesis.tex", DONE, {}).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("ended", [False, True])
def test_other_settings_are_named_with_what_they_were_and_are(tmp_path, ended):
    settings = {"size": (64, 64), "camera": "agentview", "seed": 0}
    with Job(tmp_path, DONE, settings) as job:
        if ended:
            job.end({})
    with Job(tmp_path, DONE, settings) as job:
        assert job.ended == ended
    message = r"begun with other settings \(size was \[64, 64\], now \[32, 32\]; seed was 0, now None\); choose"
    with pytest.raises(JobError, match=message):
        Job(tmp_path, DONE, {"size": (32, 32), "camera": "agentview"}).__enter__()
    with Job(tmp_path, DONE, settings):
        pass


def test_drafts_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    drafts = [f".all.txt.{'0f' * 16}", f"{WORK_FOLDER}/.draft-1.txt", f"{WORK_FOLDER}/..draft-1.hdf5.{'a' * 32}"]
    others = [".gitignore", f"{WORK_FOLDER}/000.txt", ".all.txt.backup"]
    with Job(tmp_path, DONE, {}):
        pass
    for name in (*drafts, *others):
        (tmp_path / name).touch()
    (tmp_path / WORK_FOLDER / ".draft-folder" / "inside").mkdir(parents=True)
    with Job(tmp_path, DONE, {}):
        left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*others, f"{WORK_FOLDER}/job.json", f"{WORK_FOLDER}/lock"}
    assert parts_of(tmp_path) == ["000.txt"]


# Killed jobs


def test_workers_leave_when_their_parent_is_killed(tmp_path, jobs):
    log = tmp_path / "log"
    with log.open("w") as printed:
        run = subprocess.Popen(
            [sys.executable, HERE / "job_work.py", tmp_path / "out"], start_new_session=True, stderr=printed
        )
    while not list(tmp_path.glob("out/.work/*.txt")):
        assert run.poll() is None
        time.sleep(0.01)
    assert len(jobs.processes_of(run.pid)) > 2
    run.kill()
    run.wait()
    assert jobs.gone(run.pid)
    assert "Traceback" not in log.read_text()


@pytest.mark.campaign
def test_a_job_killed_twenty_times_leaves_what_an_undisturbed_one_does(tmp_path, jobs):
    command = [sys.executable, str(HERE / "job_work.py")]
    found = jobs.kill_at_random(command, tmp_path, DONE, ".txt", kills=20, seed=0, log=tmp_path / "log", after=0.4)
    assert found.total() == 20
    assert found["parts"] >= 3
    assert "Error" not in (tmp_path / "log").read_text()


def test_a_job_killed_before_each_of_its_files_takes_its_name_goes_on(tmp_path, jobs):
    out, items = tmp_path / "out", jobs.numbered(4)
    jobs.complete(tmp_path / "whole", items)
    code = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(HERE)!r})
import job_work
replace, left = os.replace, [int(sys.argv[1])]
def replace_or_die(source, target):
    left[0] -= 1
    if not left[0]:
        print(Path(target).name)
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace_or_die
job_work.complete(Path({str(out)!r}), {items})
"""
    killed_at = []
    for allowed in (1, *[2] * 6):  # each run makes the file that the last one did not, and dies with the next
        ran = subprocess.run(
            [sys.executable, "-c", code, str(allowed)], capture_output=True, text=True, timeout=60
        )
        assert ran.returncode == -signal.SIGKILL, ran.stderr
        killed_at += ran.stdout.split()
        assert list(out.rglob(".*[0-9a-f]*"))  # a draft
    parts = ["000.txt", "001.txt", "002.txt", "003.dropped.json"]
    assert killed_at == ["job.json", *parts, "all.txt", DONE]
    jobs.complete(out, items)
    assert jobs.files(out) == jobs.files(tmp_path / "whole")


# Ray


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_ray_gives_the_same_bytes(tmp_path, jobs, whole):
    jobs.complete(tmp_path / "out", jobs.numbered(12), workers=2, executor="ray")
    assert jobs.files(tmp_path / "out") == whole


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_ray_does_what_is_left(tmp_path, jobs, whole):
    with Job(tmp_path, DONE, {"of": "letters"}) as job:
        some = dict(list(jobs.numbered(12).items())[:5])
        job.run(some, jobs.describe, jobs.store, suffix=".txt")
        seen = []
        job.run(
            jobs.numbered(12),
            jobs.describe,
            jobs.store,
            suffix=".txt",
            executor="ray",
            on_part=lambda name, _: seen.append(name),
        )
        assert seen[:5] == list(some)
        assert sorted(seen) == list(jobs.numbered(12))
    jobs.complete(tmp_path, jobs.numbered(12), executor="ray")  # nothing
    assert jobs.files(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_failures_on_ray_are_those_of_here(tmp_path, jobs, whole):
    def fails(error: type[Exception], message: str, *args: object, **options: object) -> None:
        with pytest.raises(error, match=message) as caught:
            jobs.complete(tmp_path / "out", jobs.numbered(12), *args, executor="ray", **options)
        assert caught.type is error

    fails(ZeroDivisionError, "two is too much", jobs.fail_at_two)
    fails(RuntimeError, "UnportableError: here: not portable", jobs.fail_unportably_at_two)
    fails(StorageError, r"002: cannot be written to .*\.work \(No space left", store=jobs.store_on_a_full_disk)
    fails(JobError, "a worker process could not start on Ray", jobs.Unstartable())
    fails(ItemError, "item 3: “too short”", strict=True)
    with (
        Job(tmp_path / "out", DONE, {"of": "letters"}) as job,
        pytest.raises(ValueError, match="'wanted' needs the"),
    ):
        job.run(jobs.numbered(3), jobs.describe, jobs.store, suffix=".txt", wanted=bool, executor="ray")
    jobs.complete(tmp_path / "out", jobs.numbered(12), executor="ray")
    assert jobs.files(tmp_path / "out") == whole


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize("times", [1, 99])
def test_an_item_that_kills_its_worker_is_tried_twice_on_ray(tmp_path, jobs, whole, times):
    kills, out, items = tmp_path / "kills", tmp_path / "out", jobs.numbered(12)
    kills.mkdir()
    with Job(out, DONE, {"of": "letters"}) as job:
        parts = job.run(items, jobs.Fragile(kills, times), jobs.store, suffix=".txt", workers=2, executor="ray")
    assert len(list(kills.iterdir())) == min(times, 2)
    assert sum(isinstance(part, Path) for part in parts.values()) == 10 - (times > 1)
    if times > 1:
        assert parts["002"] == Dropped("2", "worker killed", "2: the worker process ended, 2 times")
    assert len(parts_of(out)) == 12 - (times > 1)
    jobs.complete(out, items)
    assert jobs.files(out) == whole
