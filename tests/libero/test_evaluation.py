import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from worldvla_libero.evaluation import (
    EPISODES_FILE,
    RESULTS_FILE,
    EpisodeRecord,
    RecordExistsError,
    SuccessRate,
    evaluate,
    installed_versions,
)
from worldvla_libero.rollout import ModelPolicy, PolicyError
from worldvla_libero.simulator import NO_MOTION
from worldvla_libero.suites import LEROBOT, OPENVLA, InitialStateError, load_suite

FIXTURE = Path(__file__).parents[1] / "fixtures" / "published"

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


def frames_of(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation") / "out"
    suites = [load_suite("libero_goal").task(8), load_suite("libero_object").task(0)]
    told: list[EpisodeRecord] = []
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
    assert [EpisodeRecord(**line) for line in lines] == list(result.records)
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
    assert all(r.versions == installed_versions() for r in result.records)


def test_an_error_keeps_type_message_and_traceback_and_is_no_failure(evaluated):
    _, result = evaluated
    error = result.records[1].error
    assert (error["type"], error["message"]) == ("LookupError", "no such token")
    assert "FailsInSecondEpisode" not in error["message"]
    assert "in act" in error["traceback"]
    assert result.overall == SuccessRate(successes=0, episodes=3, errors=1)
    assert result.by_task["libero_goal", 8] == SuccessRate(successes=0, episodes=1, errors=1)


def test_videos_hold_every_second_step(evaluated):
    out, result = evaluated
    assert [frames_of(out / record.video) for record in result.records] == [3, 2, 3, 3]
    assert sorted(file.name for file in out.rglob("*") if file.is_file()) == sorted(
        [EPISODES_FILE, RESULTS_FILE, *(Path(record.video).name for record in result.records)]
    )


def test_results_say_what_was_evaluated_and_how(evaluated):
    out, _ = evaluated
    results = json.loads((out / RESULTS_FILE).read_text())
    assert results["policy"] == "still"
    assert results["protocol"]["max_steps"] == {"libero_goal": 4, "libero_object": 4}
    assert results["protocol"]["seed"] == 1000
    assert results["overall"]["success_rate"] == 0
    assert [(task["suite"], task["instruction"]) for task in results["tasks"]] == [
        ("libero_goal", "put the bowl on the plate"),
        ("libero_object", "pick up the alphabet soup and place it in the basket"),
    ]
    assert results["tasks"][0]["errors"] == 1
    assert {"mujoco", "robosuite", "torch", "worldvla-libero"} <= results["versions"].keys()


def test_an_existing_record_is_never_mixed_with_another(evaluated):
    out, _ = evaluated
    before = (out / EPISODES_FILE).read_bytes()
    with pytest.raises(RecordExistsError, match="choose another output folder"):
        evaluate(FailsInSecondEpisode(), [load_suite("libero_goal").task(0)], out, protocol=SHORT)
    assert (out / EPISODES_FILE).read_bytes() == before


def test_strict_raises_after_recording_and_published_instructions_are_given(tmp_path):
    class Fails(FailsInSecondEpisode):
        def act(self, observation):
            self.instructions.append(observation.instruction)
            raise LookupError("no such token")

    policy = Fails()
    protocol = replace(SHORT, max_steps={"libero_10": 4})
    with pytest.raises(PolicyError, match="LookupError: no such token"):
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
        ({"video_stride": -1}, ValueError, "video_stride is -1"),
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "limit"), [("libero_spatial", 220), ("libero_object", 280), ("libero_goal", 300), ("libero_10", 520)]
)
def test_the_fixture_model_runs_to_the_step_limit(tmp_path, suite, limit):
    """A whole episode of each suite under the published protocol; the tiny model is not expected to succeed."""
    from worldvla_model import WorldVLA

    agent = WorldVLA.from_pretrained(FIXTURE / "checkpoint", tokenizers=FIXTURE / "tokenizer", image_size=128)
    result = evaluate(
        ModelPolicy(agent, num_actions=5),
        [load_suite(suite).task(0)],
        tmp_path,
        protocol=OPENVLA,
        episodes=1,
        policy_name="fixture",
        video_stride=5,  # of the frames that the policy sees anyway: with K = 5 each chunk's last
    )
    (record,) = result.records
    assert record.error is None
    assert (record.outcome, record.steps, record.queries) == ("failure", limit, limit // 5)
    assert frames_of(tmp_path / record.video) == limit // 5 + 1
    assert json.loads((tmp_path / RESULTS_FILE).read_text())["overall"]["episodes"] == 1
