import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from fleet_work import Answers, Runner

from worldvla_libero.evaluation.episode_runner import EpisodePlan
from worldvla_libero.evaluation.fleet import PolicyTimeLimitError, run_episodes
from worldvla_libero.evaluation.policy import Needs
from worldvla_libero.jobs.parts import StorageError
from worldvla_libero.jobs.pools import HerePool, ProcessPool, open_pool
from worldvla_libero.jobs.processes import WorkerStartError
from worldvla_libero.simulator.protocols import OPENVLA
from worldvla_libero.simulator.suites import load_suite


def plans(folder, troubles=(), count=6, tasks=2):
    """Episodes whose instruction says what goes wrong."""
    troubles = dict(troubles)
    found = []
    for number in range(count):
        task = load_suite("libero_goal").task(number % tasks)
        found.append(EpisodePlan(task, number, OPENVLA, troubles.get(number, "go"), Needs(1), folder))
    return found


def outcomes(ended):
    return {plan.episode: (end, attempts) for plan, end, attempts in ended}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_episode_is_run_once(tmp_path, workers):
    policy = Answers()
    pool = open_pool(Runner, workers, "local")
    ended = list(run_episodes(plans(tmp_path), policy, pool, workers=workers))
    assert Counter(plan.episode for plan, _, _ in ended) == Counter(range(6))
    assert all(end.success and attempts == 1 for _, end, attempts in ended)
    assert sum(policy.batches) == 18


def test_who_asks_meanwhile_is_answered_together(tmp_path):
    policy = Answers(slow=0.2)
    list(run_episodes(plans(tmp_path, count=12), policy, ProcessPool(Runner), workers=4))
    assert max(policy.batches) >= 3
    small = Answers(slow=0.2)
    list(run_episodes(plans(tmp_path), small, ProcessPool(Runner), workers=3, batch_size=2))
    assert max(small.batches) == 2


def test_an_observation_that_the_policy_refuses_costs_no_other_episode(tmp_path):
    troubles = {1: "refuse", 4: "refuse"}
    found = outcomes(
        run_episodes(plans(tmp_path, troubles), Answers(slow=0.1), ProcessPool(Runner), workers=3, time_limit=60)
    )
    for episode, (end, attempts) in found.items():
        if episode in troubles:
            assert (end.error.origin, end.error.type, attempts) == ("policy", "LookupError", 1)
        else:
            assert end.success


@pytest.mark.parametrize(
    ("kind", "origin", "told"),
    [
        ("raises", "simulator", "RuntimeError: the contact solver diverged"),
        ("killed", "worker", "WorkerKilledError: the worker process ended (SIGKILL)"),
        pytest.param(
            *("hangs", "worker", "TimeLimitError: no answer for 8 s (time limit)"), marks=pytest.mark.slow
        ),
    ],
)
def test_a_simulator_that_fails_is_tried_once_more(tmp_path, kind, origin, told):
    troubles = {0: f"{kind}:1", 3: f"{kind}:9"}
    found = outcomes(
        run_episodes(plans(tmp_path, troubles, count=4), Answers(), ProcessPool(Runner), workers=2, time_limit=8)
    )
    assert sorted(found) == [0, 1, 2, 3]
    assert [found[number][1] for number in range(4)] == [2, 1, 1, 2]
    assert all(found[number][0].success for number in range(3))
    error = found[3][0].error
    assert (error.origin, f"{error.type}: {error.message}") == (origin, told)
    assert error.traceback


def test_without_processes_a_simulator_that_raises_is_tried_once_more(tmp_path):
    found = outcomes(run_episodes(plans(tmp_path, {2: "raises:1"}), Answers(), HerePool(Runner)))
    assert found[2][0].success
    assert found[2][1] == 2


class FirstDies(ProcessPool):
    """Its first process is killed while it starts."""

    def start(self):
        seat = super().start()
        if not getattr(self, "begun", False):
            self.begun = True
            seat.process.kill()
        return seat


def test_a_worker_that_is_killed_while_it_starts_is_replaced(tmp_path):
    found = outcomes(run_episodes(plans(tmp_path, count=2), Answers(), FirstDies(Runner)))
    assert all(end.success for end, _ in found.values())
    assert [found[number][1] for number in range(2)] == [2, 1]


def test_a_full_disk_ends_the_run(tmp_path):
    run = run_episodes(plans(tmp_path, {1: "full:9"}), Answers(), ProcessPool(Runner))
    with pytest.raises(StorageError, match="video"):
        list(run)


@pytest.mark.slow
def test_a_policy_beside_the_simulator_may_take_its_time_for_each_query(tmp_path):
    found = outcomes(
        run_episodes(plans(tmp_path, {0: "beats:12"}, count=1), Answers(), ProcessPool(Runner), time_limit=8)
    )
    assert found[0][0].success
    assert found[0][1] == 1


def test_nothing_is_left_behind(tmp_path):
    before = threading.active_count()
    list(run_episodes(plans(tmp_path, count=2), Answers(), HerePool(Runner)))
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
    assert not list(run_episodes([], Answers(), FirstDies(CannotStart), workers=3))


def test_a_policy_that_answers_one_by_one_is_asked_once(tmp_path):
    asked = []

    class Alone:
        history_length = 1

        def act(self, observation):
            time.sleep(0.1)
            asked.append((int(observation.images[0][0, 0, 0]), observation.step))
            if observation.instruction == "refuse" and observation.step == 1:
                raise LookupError("no such token")
            return np.full((1, 7), observation.images[0][0, 0, 0], float)

    found = outcomes(run_episodes(plans(tmp_path, {1: "refuse"}), Alone(), ProcessPool(Runner), workers=3))
    assert Counter(asked).most_common(1)[0][1] == 1
    assert found[1][0].error.type == "LookupError"
    assert "in act" in found[1][0].error.traceback


def test_what_no_policy_catches_ends_the_run_at_once(tmp_path):
    class Exits(Answers):
        def act_batch(self, observations):
            raise SystemExit(3)

    with pytest.raises(SystemExit):
        list(run_episodes(plans(tmp_path), Exits(), HerePool(Runner)))


def test_a_policy_that_hangs_ends_the_run(tmp_path):
    began = time.monotonic()
    run = run_episodes(plans(tmp_path, {5: "sleep"}), Answers(), HerePool(Runner), time_limit=1)
    assert len([next(run) for _ in range(5)]) == 5
    with pytest.raises(PolicyTimeLimitError, match=r"gave no answer for 1 s .* run the same command again"):
        next(run)
    assert time.monotonic() - began < 60


def test_a_batch_of_another_length_is_the_policy_s_error(tmp_path):
    class Drops(Answers):
        def act_batch(self, observations):
            return [] if len(observations) > 1 else super().act_batch(observations)

    found = outcomes(run_episodes(plans(tmp_path), Drops(slow=0.2), ProcessPool(Runner), workers=3))
    assert all(end.success for end, _ in found.values())  # one by one it answers


class CannotStart:
    def __reduce__(self):
        return (__import__, ("no_such_module",))

    def __call__(self, message):
        raise AssertionError


def test_workers_that_cannot_start_are_told(tmp_path):
    with pytest.raises(WorkerStartError, match=r"could not start \(exit status 1; see its own message above\)"):
        list(run_episodes(plans(tmp_path), Answers(), ProcessPool(CannotStart), workers=1))


def test_long_tasks_come_first_and_a_worker_stays_with_its_task(tmp_path):
    short = replace(OPENVLA, max_steps={"libero_goal": 10, "libero_10": 520})
    goal, long = load_suite("libero_goal").task(0), load_suite("libero_10").task(0)
    todo = [EpisodePlan(goal, i, short, "go", Needs(1), tmp_path) for i in range(3)]
    todo += [EpisodePlan(long, i, short, "go", Needs(1), tmp_path) for i in range(3)]
    order = [plan.task.suite for plan, _, _ in run_episodes(todo, Answers(), HerePool(Runner))]
    assert order == ["libero_10"] * 3 + ["libero_goal"] * 3


@pytest.mark.campaign
def test_thirty_kills_lose_nothing(tmp_path):
    troubles = dict.fromkeys(range(0, 60, 2), "killed:1")
    found = outcomes(run_episodes(plans(tmp_path, troubles, count=60), Answers(), ProcessPool(Runner), workers=2))
    assert sorted(found) == list(range(60))
    assert all(end.success for end, _ in found.values())
    assert sum(attempts == 2 for _, attempts in found.values()) == 30


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_on_ray_as_here(tmp_path):
    troubles = {1: "killed:1", 2: "raises:9", 3: "refuse"}
    pool = open_pool(Runner, 2, "ray")
    found = outcomes(run_episodes(plans(tmp_path, troubles), Answers(), pool, workers=2, time_limit=120))
    assert sorted(found) == list(range(6))
    assert [found[number][1] for number in range(6)] == [1, 2, 2, 1, 1, 1]
    assert (found[2][0].error.origin, found[3][0].error.origin) == ("simulator", "policy")
    assert all(found[number][0].success for number in (0, 1, 4, 5))
