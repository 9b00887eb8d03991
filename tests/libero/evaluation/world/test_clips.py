"""Which clips are imagined."""

import pytest

from worldvla_libero.data.episodes import EpisodeKey
from worldvla_libero.evaluation.world.clips import ClipError, ImagineSettings, choose_clips

KEYS = [EpisodeKey(f"a/demo_{n}", "a", steps) for n, steps in enumerate((40, 12, 3, 60))]
KEYS += [EpisodeKey("b/demo_0", "b", 51)]


def chosen(keys, frames, **settings):
    """Clips, and who is too short."""
    plan = choose_clips(keys, ImagineSettings(frames, **settings))
    assert plan.frames == sum(clip.frames for clip in plan.clips)
    return plan.clips, plan.short


def test_a_clip_is_as_long_as_fits_and_short_trajectories_are_named():
    clips, short = chosen(KEYS, (10, 50))
    assert [(clip.number, clip.id, clip.frames) for clip in clips] == [
        (0, "a/demo_0", 10),
        (1, "a/demo_1", 10),
        (2, "a/demo_3", 50),
        (3, "b/demo_0", 50),
    ]
    assert short == {10: ["a/demo_2"], 50: ["a/demo_0", "a/demo_1", "a/demo_2"]}
    steps = {key.id: key.steps for key in KEYS}
    assert all(clip.start >= 0 and clip.start + clip.frames < steps[clip.id] for clip in clips)
    assert clips[3].start == 0  # there is but one place for it
    assert len({clip.name for clip in clips}) == 4


def test_where_a_clip_starts_depends_on_seed_and_trajectory_alone():
    def starts(keys, **options):
        return {clip.id: clip.start for clip in chosen(keys, (10,), **options)[0]}

    everything = starts(KEYS, seed=1)
    assert starts(KEYS[::-1], seed=1) == everything
    assert starts(KEYS[3:], seed=1).items() <= everything.items()
    assert starts(KEYS, seed=2) != everything
    assert set(starts(KEYS, episodes=2)) == {"a/demo_0", "b/demo_0"}  # turn by turn from every task
    drawn = {starts(KEYS, seed=seed)["a/demo_1"] for seed in range(40)}
    assert drawn == {0, 1}  # both ends are drawn
    assert {starts(KEYS, seed=seed, context=2)["a/demo_1"] for seed in range(9)} == {1}


def test_a_start_that_is_given_holds_for_all():
    clips, short = chosen(KEYS, (10,), start=30)
    assert [(clip.id, clip.start) for clip in clips] == [("a/demo_3", 30), ("b/demo_0", 30)]
    assert short == {10: ["a/demo_0", "a/demo_1", "a/demo_2"]}


def test_if_none_is_long_enough_it_says_what_would_be():
    with pytest.raises(ClipError, match=r"no trajectory of 5 .*: 70 frames after step 1 need 72 steps; .* has 60"):
        chosen(KEYS, (70, 80), context=2)
