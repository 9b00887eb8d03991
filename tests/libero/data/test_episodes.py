import math
import pickle
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from worldvla_libero.data.episodes import (
    Episode,
    EpisodeError,
    EpisodeKey,
    Reason,
    SplitError,
    check_episode,
    digest,
    fit_bounds,
    motion_mask,
    split,
    spread,
)
from worldvla_libero.jobs.parts import Dropped
from worldvla_tokenizers import BoundsWarning

OPEN, CLOSED = -1.0, 1.0
REST = (0.0,) * 6
MOVE = (0.1, 0, 0, 0, 0, 0)


def action(motion: tuple[float, ...], gripper: float) -> list[float]:
    return [*motion, gripper]


def episode(**changes) -> Episode:
    frames = {"agentview": np.zeros((4, 8, 8, 3), np.uint8)}
    return replace(Episode("milk/demo_3", "milk", "pick up the milk", np.zeros((4, 7)), frames), **changes)


def keys_of(**sizes: int) -> list[EpisodeKey]:
    return [EpisodeKey(f"{task}/demo_{i}", task, 10) for task, n in sizes.items() for i in range(n)]


listings = st.lists(st.integers(1, 25), min_size=1, max_size=8).map(
    lambda sizes: keys_of(**{f"task_{i}": size for i, size in enumerate(sizes)})
)
shares = st.integers(1, 100).map(lambda percent: percent / 100)
seeds = st.integers(0, 2**32 - 1)


# The no-op filter


def filtered_step_by_step(actions: list[list[float]]) -> list[bool]:
    """SPEC §9: skip where the norm of a[:6] is below 1e-4 and the gripper equals the previous kept action's."""
    kept: list[list[float]] = []
    flags = []
    for a in actions:
        still = math.sqrt(sum(x * x for x in a[:-1])) < 1e-4
        same_gripper = not kept or a[-1] == kept[-1][-1]
        flags.append(not (still and same_gripper))
        if flags[-1]:
            kept.append(a)
    return flags


components = st.sampled_from([0.0, 1e-6, -9e-5, 9.99e-5, 1.01e-4, -0.5])
rows = st.tuples(*[components] * 6, st.sampled_from([OPEN, CLOSED, 0.25])).map(list)


@given(st.lists(rows, min_size=1, max_size=40))
def test_the_filter_is_the_specified_one(actions):
    assert motion_mask(actions).tolist() == filtered_step_by_step(actions)


@given(st.lists(rows, min_size=1, max_size=40))
def test_filtering_twice_changes_nothing(actions):
    once = np.array(actions)[motion_mask(actions)]
    assert motion_mask(once.reshape(-1, 7)).all()


@pytest.mark.parametrize("gripper", [OPEN, CLOSED])
def test_a_first_action_at_rest_is_a_noop_whatever_its_gripper(gripper):
    assert motion_mask([action(REST, gripper), action(MOVE, OPEN)]).tolist() == [False, True]


def test_the_gripper_is_compared_with_the_last_kept_action_not_with_the_last():
    actions = [action(MOVE, OPEN), action(REST, CLOSED), action(REST, CLOSED), action(REST, OPEN)]
    assert motion_mask(actions).tolist() == [True, True, False, True]
    # The first is dropped: the gripper was not commanded by it, so the second, alike, is dropped as well.
    assert motion_mask([action(REST, CLOSED)] * 2 + [action(MOVE, OPEN), action(REST, CLOSED)]).tolist() == [
        False,
        False,
        True,
        True,
    ]


def test_the_threshold_is_of_the_norm_of_six_dimensions():
    below, above = (9e-5, 0, 0, 0, 0, 4e-5), (9e-5, 0, 0, 0, 0, 5e-5)
    assert motion_mask([action(MOVE, OPEN), action(below, OPEN), action(above, OPEN)]).tolist() == [
        True,
        False,
        True,
    ]


def test_robots_of_other_widths_are_filtered_alike():
    assert motion_mask([[0.1, 0, 1], [0, 0, 1], [0, 0, 0]]).tolist() == [True, False, True]
    assert motion_mask(np.zeros((0, 7))).shape == (0,)
    with pytest.raises(ValueError, match=r"shape \(7,\); \(T, D\) needed"):
        motion_mask(np.zeros(7))


# Checks


def test_a_usable_episode_passes_with_and_without_frames():
    check_episode(episode(), dimensions=7, min_steps=4)
    check_episode(episode(frames={}), dimensions=7)
    check_episode(episode(actions=np.zeros((4, 3))))  # any width, if none is asked for


@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        (
            {"actions": np.zeros((4, 6))},
            Reason.ACTION_WIDTH,
            "milk/demo_3: actions have shape (4, 6); (T, 7) needed",
        ),
        (
            {"actions": np.zeros(4)},
            Reason.ACTION_WIDTH,
            "milk/demo_3: actions have shape (4,); (T, 7) needed",
        ),
        (
            {"actions": np.array([[0.0] * 7, [0, 0, 0, 0, np.nan, 0, 1]])},
            Reason.NOT_FINITE,
            "milk/demo_3: action 1, dimension 4 is nan",
        ),
        (
            {"actions": np.full((4, 7), -np.inf)},
            Reason.NOT_FINITE,
            "milk/demo_3: action 0, dimension 0 is -inf",
        ),
        (
            {"actions": np.zeros((3, 7))},
            Reason.TOO_SHORT,
            "milk/demo_3: 3 actions; at least 4 needed",
        ),
        (
            {"actions": np.zeros((0, 7))},
            Reason.TOO_SHORT,
            "milk/demo_3: 0 actions; at least 4 needed",
        ),
        (
            {"instruction": " \n"},
            Reason.MISSING_KEY,
            "milk/demo_3: the instruction is empty; words are needed",
        ),
        (
            {"frames": {"wrist": np.zeros((3, 8, 8, 3), np.uint8)}},
            Reason.MISSING_FRAMES,
            "milk/demo_3: 3 frames of 'wrist' for 4 actions",
        ),
        (
            {"frames": {"wrist": np.zeros((4, 8, 8, 3), np.float32)}},
            Reason.BAD_FRAMES,
            "milk/demo_3: frames of 'wrist' have shape (4, 8, 8, 3) and type float32; (T, H, W, 3) uint8 needed",
        ),
        (
            {"frames": {"wrist": np.zeros((4, 3, 8, 8), np.uint8)}},
            Reason.BAD_FRAMES,
            "milk/demo_3: frames of 'wrist' have shape (4, 3, 8, 8) and type uint8; (T, H, W, 3) uint8 needed",
        ),
        (
            {"frames": {"wrist": np.zeros((4, 0, 8, 3), np.uint8)}},
            Reason.BAD_FRAMES,
            "milk/demo_3: frames of 'wrist' have shape (4, 0, 8, 3) and type uint8; (T, H, W, 3) uint8 needed",
        ),
    ],
)
def test_what_is_wrong_with_an_episode_is_named(changes, reason, message):
    with pytest.raises(EpisodeError) as caught:
        check_episode(episode(**changes), dimensions=7, min_steps=4)
    assert caught.value.reason is reason
    assert caught.value.message == message
    assert str(caught.value) == f"{reason}: {message}"


def test_errors_survive_the_way_from_a_worker():
    sent = EpisodeError(Reason.TOO_SHORT, "milk/demo_3: 3 actions")
    error = pickle.loads(pickle.dumps(sent))
    assert type(error) is EpisodeError
    assert (error.reason, error.message) == (Reason.TOO_SHORT, "milk/demo_3: 3 actions")
    assert Dropped.because("milk/demo_3", error) == ("milk/demo_3", "too short", "milk/demo_3: 3 actions")


# Splits


@given(listings, st.sampled_from(["paper", "published"]), shares, seeds, st.randoms())
def test_a_split_is_a_partition_that_depends_on_the_episodes_and_the_seed_alone(keys, rule, share, seed, random):
    splits = split(keys, rule, fraction=share, seed=seed)
    assert sorted(splits) == sorted(key.id for key in keys)
    assert set(splits.values()) <= {"train", "validation", "validation_unseen"}
    shuffled = random.sample(keys, len(keys))
    assert split(shuffled, rule, fraction=share, seed=seed) == splits
    assert split(iter(keys), rule, fraction=share, seed=seed) == splits


@given(listings, shares, seeds)
def test_the_papers_share_is_exact_and_every_task_gives_its_own(keys, share, seed):
    splits = split(keys, "paper", fraction=share, seed=seed)
    training = Counter(key.task for key in keys if splits[key.id] == "train")
    assert training.total() == math.ceil(Fraction(str(share)) * len(keys))
    assert set(splits.values()) <= {"train", "validation"}
    sizes = Counter(key.task for key in keys)
    for task, size in sizes.items():
        # The common cut is off by at most one episode a task, which a large task feels by its share of all.
        allowed = 1 + size * (len(sizes) + 1) / len(keys)
        assert abs(training[task] - share * size) <= allowed


@given(seeds)
def test_ten_tasks_of_fifty_give_forty_five_each_or_nearly(seed):
    keys = keys_of(**{f"task_{i}": 50 for i in range(10)})
    splits = split(keys, "paper", seed=seed)
    training = Counter(key.task for key in keys if splits[key.id] == "train")
    assert training.total() == 450
    assert all(44 <= n <= 46 for n in training.values())


def test_the_papers_split_is_drawn_by_its_seed():
    keys = keys_of(milk=20, soup=20)
    validation = [{i for i, s in split(keys, seed=seed).items() if s == "validation"} for seed in (0, 0, 1)]
    assert validation[0] == validation[1]
    assert validation[0] != validation[2]
    assert all(len(ids) == 4 for ids in validation)


@given(listings, shares)
def test_the_published_split_takes_tasks_by_alphabet_and_trajectories_by_string_order(keys, share):
    splits = split(keys, "published", fraction=share)

    def first(names: list[str]) -> list[str]:
        return sorted(names)[: math.ceil(Fraction(str(share)) * len(names))]

    seen = first(list({key.task for key in keys}))
    for task in {key.task for key in keys}:
        ids = [key.id for key in keys if key.task == task]
        training = first(ids) if task in seen else []
        rest = "validation" if task in seen else "validation_unseen"
        assert {id: splits[id] for id in ids} == {id: "train" if id in training else rest for id in ids}


def test_the_published_split_puts_demo_10_before_demo_2():
    splits = split(keys_of(milk=12), "published", fraction=0.25)  # 3 of 12: demo_0, demo_1, demo_10
    assert {id for id, name in splits.items() if name == "train"} == {"milk/demo_0", "milk/demo_1", "milk/demo_10"}


def test_nine_tenths_of_ten_are_nine_and_of_eleven_ten():
    for tasks, seen in ((10, 9), (11, 10), (1, 1)):
        keys = keys_of(**{f"task_{i:02d}": 10 for i in range(tasks)})
        splits = split(keys, "published")
        unseen = {key.task for key in keys if splits[key.id] == "validation_unseen"}
        assert unseen == {f"task_{i:02d}" for i in range(seen, tasks)}
        assert Counter(splits.values())["train"] == 9 * seen


def test_everything_trains_where_the_fraction_is_one():
    for rule in ("paper", "published"):
        assert set(split(keys_of(milk=3, soup=1), rule, fraction=1).values()) == {"train"}


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        ([], {}, "no episode to split"),
        (keys_of(milk=2) * 2, {}, "episode 'milk/demo_0' is there twice"),
        (keys_of(milk=2), {"fraction": 0.0}, "fraction is 0.0; allowed: above 0, up to 1"),
        (keys_of(milk=2), {"fraction": math.nan}, "fraction is nan; allowed: above 0, up to 1"),
        (keys_of(milk=2), {"rule": "random"}, "split rule is 'random'; allowed: 'paper', 'published'"),
    ],
)
def test_splits_that_cannot_be_made_are_refused(keys, options, message):
    with pytest.raises(SplitError) as caught:
        split(keys, **options)
    assert str(caught.value) == message


# Listings


@given(listings, st.integers(1, 60))
def test_a_limit_is_taken_turn_by_turn_from_every_task(keys, limit):
    chosen = spread(keys, limit)
    assert len(chosen) == min(limit, len(keys))
    assert chosen == [key for key in keys if key in chosen]  # in the order given
    sizes, taken = Counter(key.task for key in keys), Counter(key.task for key in chosen)
    most = max(taken.values())
    assert all(taken[task] >= min(size, most - 1) for task, size in sizes.items())
    for task in taken:  # the first of each
        assert [k for k in chosen if k.task == task] == [k for k in keys if k.task == task][: taken[task]]


def test_no_limit_takes_all_and_none_is_refused():
    keys = keys_of(milk=2, soup=3)
    assert spread(keys, None) == keys
    with pytest.raises(ValueError, match="limit is 0 episodes; allowed: 1 and above"):
        spread(keys, 0)


@given(listings, listings)
def test_a_digest_tells_listings_apart(one, other):
    assume(one != other)
    assert digest(one) != digest(other)
    assert digest(one) == digest(iter(one))
    assert digest(one[::-1]) != digest(one) or len(one) == 1


# Bounds


def test_bounds_are_minimum_and_maximum_of_what_is_given_and_nothing_else():
    rng = np.random.default_rng(0)
    training = [rng.normal(size=(n, 7)) for n in (5, 1, 9)]
    fitted = fit_bounds(iter(training))
    stacked = np.concatenate(training)
    np.testing.assert_array_equal(fitted.low, stacked.min(axis=0))
    np.testing.assert_array_equal(fitted.high, stacked.max(axis=0))


def test_an_outlier_in_validation_does_not_move_the_bounds():
    keys = keys_of(milk=10)
    actions = {key.id: np.stack([np.zeros(7), np.ones(7)]) for key in keys}
    splits = split(keys)
    actions[next(id for id, name in splits.items() if name == "validation")][:] = 1e6
    fitted = fit_bounds(actions[id] for id, name in splits.items() if name == "train")
    np.testing.assert_array_equal(fitted.high, np.ones(7))


def test_quantiles_are_those_of_all_training_steps_together():
    rng = np.random.default_rng(1)
    training = [rng.normal(size=(n, 7)) for n in (50, 150)]  # unequal: quantiles of quantiles would show
    fitted = fit_bounds(training, quantile=0.01)
    stacked = np.concatenate(training)
    np.testing.assert_allclose(fitted.low, np.quantile(stacked, 0.01, axis=0), rtol=1e-12)
    np.testing.assert_allclose(fitted.high, np.quantile(stacked, 0.99, axis=0), rtol=1e-12)


def test_bounds_need_a_training_episode_and_a_quantile_in_range():
    with pytest.raises(SplitError, match="no episode is in the training split"):
        fit_bounds([])
    with pytest.raises(ValueError, match="quantile"):
        fit_bounds([np.zeros((4, 7))], quantile=1.5)


def test_bounds_that_lose_a_command_are_told():
    training = [np.tile([0.1 * n, -1.0], (20, 1)) for n in range(10)]
    training[3][:2, 1] = 1.0
    with pytest.warns(
        BoundsWarning, match=r"dimension 1: -1 … 1 \(quantiles -1 … -1, with 2 of 200 values beyond\)"
    ):
        fitted = fit_bounds(training, quantile=0.02)
    assert (fitted.low[1], fitted.high[1]) == (-1, 1)
    training = [np.random.default_rng(n).normal(size=(20, 2)) for n in range(20)]
    training[7][5, 0] = 1e5  # of minimum and maximum only those of each episode are in memory
    with pytest.warns(BoundsWarning, match=r"minimum and maximum lie so far out.*dimension 0: 90 %"):
        fit_bounds(training)
