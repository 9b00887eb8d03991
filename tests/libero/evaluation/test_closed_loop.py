import errno
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import av
import fleet_work
import numpy as np
import pytest
from PIL import Image

from worldvla_libero.evaluation.closed_loop import EvaluationError, evaluate
from worldvla_libero.evaluation.policies import ExpertPolicy, ModelPolicy, RandomPolicy
from worldvla_libero.evaluation.records import (
    EPISODES_FILE,
    RESULTS_FILE,
    RETRIED_FILE,
    EpisodeLog,
    EpisodeRecord,
    SuccessRate,
    version_warnings,
)
from worldvla_libero.evaluation.run_files import RunError
from worldvla_libero.jobs.parts import JobError, StorageError
from worldvla_libero.simulator.libero_files import InitialStateError
from worldvla_libero.simulator.protocols import LEROBOT, OPENVLA
from worldvla_libero.simulator.settling import Motion
from worldvla_libero.simulator.simulator import NO_MOTION, StepResult
from worldvla_libero.simulator.suites import load_suite
from worldvla_libero.versions import installed_versions

FIXTURE = Path(__file__).parents[2] / "fixtures" / "published"

SHORT = replace(LEROBOT, max_steps={"libero_goal": 4, "libero_object": 4}, wait_steps=1, image_size=64)


class FailsInSecondEpisode:
    """Stands still; its fourth answer, the second of the second episode, is an exception."""

    history_length = 1

    def __init__(self) -> None:
        self.instructions: list[str] = []

    def act(self, observation):
        self.instructions.append(observation.instruction)
        if len(self.instructions) == 4:
            raise LookupError("no such token")
        return np.array([NO_MOTION] * 2)


class Standing:
    """In place of a `Simulator`, in tests of records, errors and files: noise, and nothing ever succeeds."""

    def __init__(self, task, protocol, *, cameras):
        self.task, self.protocol, self.cameras = task, protocol, cameras

    def reset(self, initial_state, *, seed, observe):
        self.taken = 0
        return self._result(observe)

    def step(self, action, *, observe):
        self.taken += 1
        return self._result(observe)

    def look(self):
        size = self.protocol.image_size
        return np.random.default_rng(self.taken).integers(0, 256, (size, size, 3), np.uint8)

    def close(self):
        pass

    def _result(self, observe):
        frames = {camera: self.look() for camera in self.cameras} if observe else {}
        return StepResult(success=False, step=self.taken, frames=frames)


@pytest.fixture
def standing(monkeypatch):
    monkeypatch.setattr("worldvla_libero.evaluation.episode_runner.Simulator", Standing)


def frames_of(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation") / "out"
    suites = [load_suite("libero_goal").task(8), load_suite("libero_object").task(0)]
    told: list[EpisodeRecord] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worldvla_libero.evaluation.episode_runner.Simulator", Standing)
        result = evaluate(
            FailsInSecondEpisode(),
            suites,
            out,
            protocol=SHORT,
            episodes=2,
            policy_name="still",
            video_stride=2,
            on_episode=told.append,
        )
    assert tuple(told) == result.records
    return out, result


def test_every_episode_is_a_line(evaluated):
    out, result = evaluated
    lines = [json.loads(line) for line in (out / EPISODES_FILE).read_text().splitlines()]
    assert lines == json.loads(json.dumps([asdict(record) for record in result.records]))
    assert [(r.suite, r.task, r.episode, r.initial_state, r.seed) for r in result.records] == [
        ("libero_goal", 8, 0, 0, 1000),
        ("libero_goal", 8, 1, 1, 1001),
        ("libero_object", 0, 0, 0, 1000),
        ("libero_object", 0, 1, 1, 1001),
    ]
    assert [(r.outcome, r.steps, r.queries) for r in result.records] == [
        ("failure", 4, 2),
        ("error", 2, 1),
        ("failure", 4, 2),
        ("failure", 4, 2),
    ]
    assert all(r.seconds > r.policy_seconds >= 0 for r in result.records)
    assert all(len(r.query_seconds) == r.queries for r in result.records)
    assert all((r.max_steps, r.attempts) == (4, 1) for r in result.records)
    assert all(r.versions == installed_versions() for r in result.records)


def test_an_error_keeps_type_message_and_traceback_and_is_no_failure(evaluated):
    _, result = evaluated
    error = result.records[1].error
    assert (error["origin"], error["type"], error["message"]) == ("policy", "LookupError", "no such token")
    assert "FailsInSecondEpisode" not in error["message"]
    assert "in act" in error["traceback"]
    assert result.overall == SuccessRate(successes=0, episodes=3, errors=1)
    assert result.by_task["libero_goal", 8] == SuccessRate(successes=0, episodes=1, errors=1)


def test_videos_hold_every_second_step(evaluated):
    out, result = evaluated
    assert [frames_of(out / record.video) for record in result.records] == [3, 2, 3, 3]
    files = [name for record in result.records for name in (record.video, record.last_frame)]
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()) == sorted(
        [EPISODES_FILE, RESULTS_FILE, *files]
    )
    with Image.open(out / result.records[0].last_frame) as picture:
        np.testing.assert_array_equal(picture, np.random.default_rng(4).integers(0, 256, (64, 64, 3), np.uint8))


def test_results_say_what_was_evaluated_and_how(evaluated):
    out, _ = evaluated
    results = json.loads((out / RESULTS_FILE).read_text())
    assert results["policy"] == "still"
    assert results["protocol"]["max_steps"] == {"libero_goal": 4, "libero_object": 4}
    assert results["protocol"]["seed"] == 1000
    assert results["overall"]["success_rate"] == 0
    assert [(task["task_group"], task["task_id"], task["instruction"]) for task in results["per_task"]] == [
        ("libero_goal", 8, "put the bowl on the plate"),
        ("libero_object", 0, "pick up the alphabet soup and place it in the basket"),
    ]
    assert [task["metrics"]["successes"] for task in results["per_task"]] == [[False], [False, False]]
    assert results["per_task"][0]["metrics"]["errors"] == results["per_group"]["libero_goal"]["errors"] == 1
    overall = results["overall"]
    assert (overall["pc_success"], overall["n_episodes"], overall["errors"]) == (0, 3, 1)
    assert overall["eval_ep_s"] == pytest.approx(overall["eval_s"] / 4)
    assert len(overall["video_paths"]) == 4
    assert any(warning.startswith("mujoco is ") for warning in results["warnings"])
    assert {"mujoco", "robosuite", "torch", "worldvla-libero"} <= results["versions"].keys()


def test_an_existing_record_is_never_mixed_with_another(evaluated):
    out, _ = evaluated
    before = (out / EPISODES_FILE).read_bytes()
    with pytest.raises(JobError, match=r"begun with other settings .* choose another folder or delete it"):
        evaluate(FailsInSecondEpisode(), [load_suite("libero_goal").task(0)], out, protocol=SHORT)
    other, tasks = FailsInSecondEpisode(), [load_suite("libero_goal").task(8), load_suite("libero_object").task(0)]
    other.identity = {"weights": "others"}
    with pytest.raises(JobError, match=r"policy_identity was \{\}, now \{'weights': 'others'\}"):
        evaluate(other, tasks, out, protocol=SHORT, episodes=2, policy_name="still", video_stride=2)
    assert (out / EPISODES_FILE).read_bytes() == before


class StopError(Exception):
    pass


@pytest.mark.usefixtures("standing")
def test_an_interrupted_evaluation_goes_on(evaluated, tmp_path):
    """Stopped after two records, and killed while it wrote the third."""
    _whole_out, whole = evaluated
    tasks = [load_suite("libero_goal").task(8), load_suite("libero_object").task(0)]
    options = {"protocol": SHORT, "episodes": 2, "policy_name": "still", "video_stride": 2}
    told = []

    def stop(record):
        told.append(record.key)
        if len(told) == 2:
            raise StopError

    policy = FailsInSecondEpisode()
    with pytest.raises(StopError):
        evaluate(policy, tasks, tmp_path, **options, on_episode=stop)
    assert not (tmp_path / RESULTS_FILE).exists()
    with (tmp_path / EPISODES_FILE).open("ab") as file:
        file.write(b'{"suite": "libero_goal", "ta')
    told.clear()
    result = evaluate(policy, tasks, tmp_path, **options, on_episode=lambda record: told.append(record.key))
    assert told == [record.key for record in whole.records]

    def told_by(record):
        return record.key, record.outcome, record.steps, record.attempts, record.video, record.last_frame

    assert [told_by(record) for record in result.records] == [told_by(record) for record in whole.records]
    assert len((tmp_path / EPISODES_FILE).read_text().splitlines()) == 4
    again = evaluate(policy, tasks, tmp_path, **options)  # ended: nothing is run
    assert again.records == result.records
    assert len(policy.instructions) == 8


@pytest.mark.usefixtures("standing")
def test_a_line_that_is_no_record_is_named(tmp_path):
    task, policy = load_suite("libero_goal").task(8), FailsInSecondEpisode()

    def stop(record):
        raise StopError

    with pytest.raises(StopError):
        evaluate(policy, [task], tmp_path, protocol=SHORT, episodes=2, on_episode=stop)
    with (tmp_path / EPISODES_FILE).open("a") as file:
        file.write('{"suite": "libero_goal"}\n')
    with pytest.raises(RunError, match=r"episodes\.jsonl, line 2: no task"):
        evaluate(policy, [task], tmp_path, protocol=SHORT, episodes=2)


@pytest.mark.usefixtures("standing")
def test_a_full_disk_is_told_and_leaves_no_half_line(tmp_path, monkeypatch):
    task, policy = load_suite("libero_goal").task(8), FailsInSecondEpisode()
    write, calls = os.write, []

    def half(descriptor, content):
        if content.startswith(b'{"suite"'):
            calls.append(1)
            if len(calls) == 2:
                return write(descriptor, content[:20])
        return write(descriptor, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(StorageError, match=r"no record can be written .* run the same command again"):
            evaluate(policy, [task], tmp_path, protocol=SHORT, episodes=2, video_stride=0)
    (line,) = (tmp_path / EPISODES_FILE).read_bytes().splitlines(keepends=True)
    assert line.endswith(b"\n")
    records = evaluate(policy, [task], tmp_path, protocol=SHORT, episodes=2, video_stride=0).records
    assert [record.episode for record in records] == [0, 1]


@pytest.mark.usefixtures("standing")
def test_a_last_frame_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch):
    task, folder = load_suite("libero_goal").task(8), tmp_path / "out"

    def full(path, image):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("worldvla_libero.evaluation.episode_runner.save_image", full)
    with pytest.raises(StorageError, match=r"frames/libero_goal_08_000\.png: cannot be written .*No space left"):
        evaluate(FailsInSecondEpisode(), [task], folder, protocol=SHORT, episodes=1, video_stride=0)
    assert not (folder / EPISODES_FILE).exists()


class UnportableError(Exception):
    """Neither can it be pickled nor made again."""

    def __init__(self, *, lock):
        super().__init__("the server hung up")
        self.lock = lock


def test_a_worker_tells_what_the_policy_raised(tmp_path, monkeypatch):
    # What travels is the error.
    monkeypatch.setattr("worldvla_libero.evaluation.closed_loop.EpisodeRunner", fleet_work.Runner)

    class Fails(FailsInSecondEpisode):
        def act(self, observation):
            raise UnportableError(lock=threading.Lock())

    task = load_suite("libero_goal").task(8)
    (record,) = evaluate(Fails(), [task], tmp_path, protocol=SHORT, episodes=1, video_stride=0, workers=1).records
    error = record.error
    assert (error["origin"], error["type"], error["message"]) == (
        "policy",
        "UnportableError",
        "the server hung up",
    )
    assert "in act\n" in error["traceback"]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """In the real simulator, in this process."""
    out = tmp_path_factory.mktemp("simulated") / "out"
    task, policy = load_suite("libero_goal").task(8), RandomPolicy(3, num_actions=2)
    return out, evaluate(policy, [task], out, protocol=SHORT, episodes=2, video_stride=2).records


def test_the_simulator_runs_and_shows_what_the_policy_does(simulated):
    out, records = simulated
    assert [(r.outcome, r.steps, r.queries, r.error) for r in records] == [("failure", 4, 2, None)] * 2
    assert all(r.seconds > r.policy_seconds >= 0 for r in records)
    assert [frames_of(out / r.video) for r in records] == [3, 3]
    pictures = []
    for record in records:
        with Image.open(out / record.last_frame) as picture:
            assert picture.size == (64, 64)
            assert np.asarray(picture).std() > 10
            pictures.append(picture.tobytes())
    assert pictures[0] != pictures[1]  # each episode has its own fixed initial state


@pytest.mark.slow
def test_a_policy_beside_the_simulator_does_the_same_in_a_worker(simulated, tmp_path):
    here, expected = simulated
    task, policy = load_suite("libero_goal").task(8), RandomPolicy(3, num_actions=2)
    records = evaluate(policy, [task], tmp_path, protocol=SHORT, episodes=2, video_stride=0, workers=1).records
    for record, other in zip(records, expected, strict=True):
        assert (record.key, record.outcome, record.queries) == (other.key, other.outcome, other.queries)
        assert record.versions == other.versions == installed_versions()
        with Image.open(tmp_path / record.last_frame) as picture, Image.open(here / other.last_frame) as pictured:
            assert picture.tobytes() == pictured.tobytes()

    class Local(RandomPolicy):
        pass

    with pytest.raises(ValueError, match=r"Local has a method reset.* cannot be copied: .*; remedy: define what"):
        evaluate(Local(), [task], tmp_path / "local", protocol=SHORT, episodes=1, workers=1)


@pytest.mark.usefixtures("standing")
def test_episodes_that_ended_in_an_error_are_run_again_if_asked(tmp_path):
    task, options = load_suite("libero_goal").task(8), {"protocol": SHORT, "episodes": 2, "video_stride": 0}
    first = evaluate(FailsInSecondEpisode(), [task], tmp_path, **options)
    assert [record.outcome for record in first.records] == ["failure", "error"]
    assert evaluate(FailsInSecondEpisode(), [task], tmp_path, **options).records == first.records
    again = evaluate(FailsInSecondEpisode(), [task], tmp_path, retry_errors=True, **options)
    assert [record.outcome for record in again.records] == ["failure", "failure"]
    assert again.records[0] == first.records[0]
    (retried,) = (tmp_path / RETRIED_FILE).read_bytes().splitlines()
    assert EpisodeRecord.parse(retried, "retried") == first.records[1]
    assert json.loads((tmp_path / RESULTS_FILE).read_text())["overall"]["errors"] == 0
    assert (
        evaluate(FailsInSecondEpisode(), [task], tmp_path, retry_errors=True, **options).records == again.records
    )


def test_an_evaluation_that_ended_and_lacks_episodes_is_refused(evaluated, tmp_path):
    out, _ = evaluated
    shutil.copytree(out, tmp_path / "out")
    lines = (out / EPISODES_FILE).read_bytes().splitlines(keepends=True)
    (tmp_path / "out" / EPISODES_FILE).write_bytes(b"".join(lines[:-1]))
    tasks = [load_suite("libero_goal").task(8), load_suite("libero_object").task(0)]
    with pytest.raises(RunError, match=r"lacks 1 of 4 episodes, though eval_info\.json says that all are there"):
        evaluate(
            FailsInSecondEpisode(), tasks, tmp_path / "out", protocol=SHORT, episodes=2, policy_name="still",
            video_stride=2,
        )  # fmt: skip


def test_where_all_is_an_error_there_is_no_rate(evaluated):
    _, result = evaluated
    errors = tuple(replace(record, outcome="error") for record in result.records)
    overall = replace(result, records=errors).to_dict()["overall"]
    assert overall["pc_success"] is overall["avg_sum_reward"] is overall["success_rate"] is None


def test_versions_that_differ_between_episodes_are_told():
    published = {"mujoco": "3.2.7", "robosuite": "1.4.0", "numpy": "2.0"}
    assert version_warnings([published] * 2) == []
    assert version_warnings([published, published | {"mujoco": "3.3", "numpy": "2.1"}]) == [
        "mujoco is 3.2.7 and 3.3; published rates were measured with 3.2.7",
        "not all episodes were run with the same numpy: 2.0 and 2.1",
    ]


class Falling(Standing):
    """The scene of one task is not at rest when an episode begins."""

    def reset(self, initial_state, *, seed, observe):
        fast, slow = Motion("bowl_1", 0.062, -0.139, 0.14), Motion("plate_1", 0.05, -0.07, 0.0001)
        result = super().reset(initial_state, seed=seed, observe=observe)
        return replace(result, settling=(slow, fast) if self.task.index == 5 else (slow,))


def test_a_start_that_has_not_settled_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("worldvla_libero.evaluation.episode_runner.Simulator", Falling)
    tasks = [load_suite("libero_spatial").task(i) for i in (4, 5)]
    protocol = replace(SHORT, max_steps={"libero_spatial": 2})
    result = evaluate(FailsInSecondEpisode(), tasks, tmp_path, protocol=protocol, episodes=2)
    falling = "bowl_1 moves at 140 mm/s, 62 mm beside and 139 mm below its initial state"
    assert [record.unsettled for record in result.records] == [None, None, falling, falling]
    assert [record.outcome for record in result.records] == ["failure"] * 3 + ["error"]  # also where it broke off
    (warning,) = (warning for warning in result.warnings if "libero_spatial" in warning)
    assert warning.startswith(
        "libero_spatial/5 pick_up_the_black_bowl_on_the_ramekin_and_place_it_on_the_plate: 2 of 2 episodes began "
        f"before all was at rest, with mujoco {installed_versions()['mujoco']}; in episode 0 {falling}"
    )
    assert warning in json.loads((tmp_path / RESULTS_FILE).read_text())["warnings"]
    assert EpisodeLog(tmp_path).read() == list(result.records)
    # Records of before this was measured are read as well: an evaluation goes on after an upgrade.
    old = {key: value for key, value in json.loads(result.records[2].line).items() if key != "unsettled"}
    assert EpisodeRecord.parse(json.dumps(old).encode(), "here") == replace(result.records[2], unsettled=None)
    with pytest.raises(RunError, match=r"here: unsettled is 1; allowed: str \| None"):
        EpisodeRecord.parse(json.dumps(old | {"unsettled": 1}).encode(), "here")


@pytest.mark.usefixtures("standing")
def test_what_is_no_chunk_is_the_policy_s_error(tmp_path):
    bad = [np.full((2, 7), np.nan), np.zeros((2, 6)), np.zeros(7), "nothing"]

    class Bad(FailsInSecondEpisode):
        def act(self, observation):
            self.instructions.append(observation.instruction)
            return bad[len(self.instructions) - 1]

    records = evaluate(
        Bad(), [load_suite("libero_goal").task(8)], tmp_path, protocol=SHORT, episodes=4, video_stride=0
    ).records
    assert [(r.outcome, r.error["origin"], r.attempts) for r in records] == [("error", "policy", 1)] * 4
    assert "(0, 0) is nan" in records[0].error["message"]
    assert "(2, 6); (K, 7) needed" in records[1].error["message"]


@pytest.mark.usefixtures("standing")
def test_strict_raises_after_recording_and_published_instructions_are_given(tmp_path):
    class Fails(FailsInSecondEpisode):
        def act(self, observation):
            self.instructions.append(observation.instruction)
            raise LookupError("no such token")

    policy = Fails()
    protocol = replace(SHORT, max_steps={"libero_10": 4})
    with pytest.raises(EvaluationError, match="episode 0, step 0: the policy failed: LookupError: no such token"):
        evaluate(
            policy,
            [load_suite("libero_10").task(2)],
            tmp_path,
            protocol=protocol,
            video_stride=0,
            published_instructions=True,
            strict=True,
        )
    assert policy.instructions == ["KITCHEN SCENE3 turn on the stove and put the moka pot on it"]
    (line,) = (tmp_path / EPISODES_FILE).read_text().splitlines()
    assert json.loads(line)["error"]["type"] == "LookupError"
    assert json.loads(line)["video"] is None
    assert not (tmp_path / "videos").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"episodes": 0}, ValueError, "episodes is 0; allowed: 1 and above"),
        ({"episodes": 51}, InitialStateError, "episodes is 51; .* has 50 fixed initial states"),
        ({"video_stride": -1}, ValueError, "video_stride is -1; allowed: 0 and above"),
        ({"batch_size": 0}, ValueError, "batch_size is 0; allowed: 1 and above"),
        ({"time_limit": 0}, ValueError, "time_limit is 0; allowed: above 0"),
        ({"workers": -1}, ValueError, "workers is -1; allowed: 0 and above"),
        ({"workers": 0, "executor": "ray"}, ValueError, "workers is 0; allowed: 1 and above"),
        ({"protocol": replace(SHORT, max_steps={"libero_10": 4})}, ValueError, "unknown suite 'libero_goal'"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_runs(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        evaluate(FailsInSecondEpisode(), [load_suite("libero_goal").task(0)], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [(0, 10, 0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1), (0, 0, 0, 1), (413, 500, 0.7903, 0.8567)],
)
def test_wilson_s_interval(successes, episodes, low, high):
    assert SuccessRate(successes, episodes, errors=3).interval() == pytest.approx((low, high), abs=5e-5)


def test_a_rate_without_episodes_is_none():
    assert SuccessRate(0, 0, errors=2).to_dict()["success_rate"] is None


def test_the_published_step_limits():
    limits = [
        OPENVLA.step_limit(load_suite(f"libero_{name}").task(0)) for name in ("spatial", "object", "goal", "10")
    ]
    assert limits == [220, 280, 300, 520]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suites", "limit"), [(["libero_spatial"], 220), (["libero_object", "libero_goal", "libero_10"], 10)]
)
def test_the_fixture_model_runs_to_the_step_limit(tmp_path, suites, limit):
    """A whole episode of one suite, the beginning of others; the tiny model is not expected to succeed."""
    from worldvla_model import WorldVLA

    agent = WorldVLA.from_pretrained(FIXTURE / "checkpoint", tokenizers=FIXTURE / "tokenizer", image_size=128)
    short = replace(OPENVLA, max_steps=OPENVLA.max_steps | dict.fromkeys(suites, limit))
    result = evaluate(
        ModelPolicy(agent, num_actions=10),
        [load_suite(suite).task(0) for suite in suites],
        tmp_path,
        protocol=OPENVLA if limit == OPENVLA.max_steps[suites[0]] else short,
        episodes=1,
        policy_name="fixture",
        video_stride=10,  # of the frames that the policy sees anyway: with K = 10 each chunk's last
    )
    assert [record.suite for record in result.records] == suites
    for record in result.records:
        assert record.error is None
        assert (record.outcome, record.steps, record.queries) == ("failure", limit, limit // 10)
        assert frames_of(tmp_path / record.video) == limit // 10 + 1
    assert json.loads((tmp_path / RESULTS_FILE).read_text())["overall"]["episodes"] == len(suites)


@pytest.fixture
def exact_agent():
    """In fp64, so that answers do not depend on how many were asked for at once."""
    from worldvla_model import WorldVLA

    agent = WorldVLA.from_pretrained(FIXTURE / "checkpoint", tokenizers=FIXTURE / "tokenizer", image_size=128)
    agent.model.double()
    return agent


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_three_workers_or_none_or_ray_or_interrupted_lead_to_the_same(exact_agent, tmp_path):
    tasks = [load_suite("libero_goal").task(0), load_suite("libero_object").task(1)]
    protocol = replace(SHORT, max_steps={"libero_goal": 6, "libero_object": 6}, image_size=128)

    def run(name, **options):
        policy = ModelPolicy(exact_agent, num_actions=3)
        options = {"protocol": protocol, "episodes": 2, "video_stride": 0, **options}
        result = evaluate(policy, tasks, tmp_path / name, **options)
        return [
            (r.key, r.outcome, r.steps, r.queries, pixels(tmp_path / name / r.last_frame)) for r in result.records
        ]

    def pixels(path):
        with Image.open(path) as picture:
            return picture.tobytes()

    expected = run("here")
    assert len(expected) == 4
    assert run("three", workers=3) == expected
    told = []

    def stop(record):
        told.append(record)
        if len(told) == 2:
            raise StopError

    with pytest.raises(StopError):
        run("stopped", workers=2, on_episode=stop)
    assert run("stopped", workers=2, executor="ray") == expected  # two episodes here, two on Ray


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_episodes_that_succeed_here_do_so_at_the_same_step_on_ray(tmp_path):
    task = load_suite("libero_object").task(1)

    def run(name, **options):
        result = evaluate(ExpertPolicy(), [task], tmp_path / name, episodes=2, video_stride=0, **options)
        return [(r.key, r.outcome, r.steps, r.queries) for r in result.records]

    expected = run("here")
    assert [outcome for _, outcome, _, _ in expected] == ["success"] * 2
    assert len({steps for _, _, steps, _ in expected}) == 2
    assert run("ray", workers=2, executor="ray") == expected


@pytest.mark.campaign
def test_thirty_kills_at_any_moment_cost_no_episode_and_change_none(tmp_path):
    """Workers are killed while they start, build a scene, simulate, wait for an answer or write a frame."""
    tasks = [load_suite("libero_goal").task(7), load_suite("libero_object").task(1)]
    protocol = replace(LEROBOT, max_steps={"libero_goal": 40, "libero_object": 40}, image_size=64)
    options = {"protocol": protocol, "episodes": 10, "video_stride": 4}

    class Slow(FailsInSecondEpisode):
        def act(self, observation):
            time.sleep(0.05)
            return np.random.default_rng(observation.step).uniform(-1, 1, (2, 7))

    undisturbed = evaluate(Slow(), tasks, tmp_path / "whole", **options).records
    rng, killed, over = np.random.default_rng(0), [], threading.Event()

    def kill():
        while len(killed) < 30 and not over.wait(rng.uniform(0.1, 6)):
            workers = multiprocessing.active_children()
            if workers:
                victim = workers[int(rng.integers(len(workers)))]
                os.kill(victim.pid, signal.SIGKILL)
                killed.append(victim.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    records, runs = {}, 0
    try:
        while len(killed) < 30 or runs == 0:
            runs += 1
            out = tmp_path / f"killed-{runs}"
            for record in evaluate(Slow(), tasks, out, workers=2, **options).records:
                records[runs, record.key] = record
    finally:
        over.set()
        killer.join()
    assert len(killed) == 30
    assert len(records) == runs * len(undisturbed)
    expected = {record.key: record for record in undisturbed}
    for (_, key), record in records.items():
        if record.outcome == "error":
            assert (record.error["origin"], record.attempts) == ("worker", 2)
        else:
            assert (record.outcome, record.steps) == (expected[key].outcome, expected[key].steps)
    assert sum(record.attempts == 2 for record in records.values()) > 5
