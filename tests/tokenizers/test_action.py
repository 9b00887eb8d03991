import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from worldvla_tokenizers import ActionError, ActionTokenizer, BoundsWarning, VocabularyError
from worldvla_tokenizers.files import PretrainedFilesError

ours = ActionTokenizer.published()


def test_ids_and_values_of_the_published_code(published):
    reference = published.arrays("actions")
    ids = ours.encode(reference["actions"])
    np.testing.assert_array_equal(ids, reference["tokens"][:, 1:-1])
    np.testing.assert_allclose(ours.decode(ids), reference["decoded"], rtol=0, atol=1e-12)


def test_every_id_decodes_as_published_or_raises(published):
    reference = published.arrays("actions")
    for token, value in zip(reference["all_ids"], reference["all_decoded"], strict=True):
        ids = np.full(7, token)
        if 10_006 <= token <= 10_261:
            expected = (value + 1) / 2 * (ours.high - ours.low + 1e-8) + ours.low
            np.testing.assert_allclose(ours.decode(ids), expected, rtol=0, atol=1e-12)
        else:
            with pytest.raises(VocabularyError, match=r"10006 … 10261"):
                ours.decode(ids)


@given(
    hnp.arrays(np.float64, st.tuples(st.integers(0, 4), st.integers(1, 3), st.just(7)),
               elements=st.floats(-1, 1))
)  # fmt: skip
def test_decoding_is_within_half_a_bin_and_idempotent(unit):
    actions = (unit + 1) / 2 * (ours.high - ours.low) + ours.low
    ids = ours.encode(actions)
    back = ours.decode(ids)
    half_a_bin = (ours.high - ours.low) / 255 / 2
    assert back.shape == actions.shape
    assert (np.abs(back - actions) <= half_a_bin * (1 + 1e-6)).all()
    again = ours.encode(back)
    # The highest id, of the upper bound alone, shares its centre with the one below.
    np.testing.assert_array_equal(again, np.minimum(ids, 10_260))
    np.testing.assert_array_equal(ours.decode(again), back)


@given(
    st.integers(1, 9).flatmap(lambda d: hnp.arrays(np.float64, st.tuples(st.integers(1, 20), st.just(d)),
                                                   elements=st.floats(-1e3, 1e3))),
    st.integers(2, 1024),
)  # fmt: skip
def test_fitted_bounds_hold_any_width_and_number_of_bins(actions, bins):
    tokenizer = ActionTokenizer.fit(actions, bins=bins)
    back = tokenizer.decode(tokenizer.encode(actions))
    half_a_bin = (tokenizer.high - tokenizer.low + 1e-8) / (bins - 1) / 2
    assert (np.abs(back - actions) <= half_a_bin * (1 + 1e-6) + 1e-8).all()


def test_constant_dimension_comes_back():
    actions = np.stack([np.linspace(0, 1, 10), np.full(10, 0.3)], axis=1)
    tokenizer = ActionTokenizer.fit(actions)
    np.testing.assert_allclose(tokenizer.decode(tokenizer.encode(actions))[:, 1], 0.3, atol=1e-7)


def test_quantile_bounds_leave_outliers_out():
    actions = np.concatenate([np.random.default_rng(0).uniform(-1, 1, (1000, 3)), [[50, 50, 50]]])
    with pytest.warns(
        BoundsWarning, match=r"clips recorded values: dimension 0: \d+ of 1,001, in -0\.\d+ … 50, to"
    ):
        tokenizer = ActionTokenizer.fit(actions, quantile=0.01)
    assert (tokenizer.high < 1.0).all()
    assert (ActionTokenizer.fit(actions).high == 50).all()
    for quantile in (0.0, 0.5, -1, np.nan):
        with pytest.raises(ActionError, match=r"above 0 and below 0\.5"):
            ActionTokenizer.fit(actions, quantile=quantile)


def test_values_outside_the_bounds_are_clipped():
    np.testing.assert_array_equal(ours.encode([np.full(7, 9.0), np.full(7, -9.0)]), [[10_261] * 7, [10_006] * 7])


def test_names_of_other_projects():
    actions = np.random.default_rng(0).uniform(-0.3, 0.3, (2, 5, 7))
    flat = ours(actions)
    assert [len(sequence) for sequence in flat] == [35, 35]
    assert all(type(i) is int for i in flat[0])
    decoded = ours.decode(flat, time_horizon=5, action_dim=7)
    np.testing.assert_array_equal(decoded, ours.decode(ours.encode(actions)))
    np.testing.assert_array_equal(ours(actions[0])[0], flat[0])
    np.testing.assert_array_equal(ours.decode_token_ids_to_actions(ours.encode(actions)), decoded)
    with pytest.raises(ActionError, match=r"sequence 0 .*\(28,\), needed"):
        ours.decode(flat, time_horizon=4)
    with pytest.raises(ActionError, match="action_dim is 6"):
        ours.decode(flat, time_horizon=5, action_dim=6)


def test_round_trip_on_disk(tmp_path):
    tokenizer = ActionTokenizer.fit(np.random.default_rng(0).normal(size=(50, 4)), bins=100)
    tokenizer.save_pretrained(tmp_path / "new")
    assert ActionTokenizer.from_pretrained(tmp_path / "new") == tokenizer
    assert ActionTokenizer.published() != tokenizer
    with pytest.raises(PretrainedFilesError, match=r"action_tokenizer\.json"):
        ActionTokenizer.from_pretrained(tmp_path)
    (tmp_path / "action_tokenizer.json").write_text(json.dumps({"low": [0]}))
    with pytest.raises(ActionError, match="'low', 'high' and 'bins' needed"):
        ActionTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([0.0] * 6, r"\(6,\); the last axis must be 7"),
        (0.5, r"\(\); the last axis must be 7"),
        ([[0.0] * 7, [0, 0, np.nan, 0, 0, 0, 0]], r"index \(1, 2\) is nan"),
        ([np.inf] + [0.0] * 6, r"index \(0,\) is inf"),
        (["a"] * 7, "numbers are needed"),
    ],
)
def test_bad_actions(actions, message):
    with pytest.raises(ActionError, match=message):
        ours.encode(actions)


@pytest.mark.parametrize(
    ("low", "high", "bins", "message"),
    [
        ([0, 1], [1, 0], 256, "dimension 1: low 1.0 is above high 0.0"),
        ([0], [1, 2], 256, "1 dimensions and high has 2"),
        ([np.nan], [1], 256, "must be finite"),
        ([], [], 256, "D of at least 1"),
        ([[0]], [[1]], 256, "D of at least 1"),
        ([0], [1], 1, "num_action_bins is 1"),
        ([0], [1], 5000, "num_action_bins is 5000"),
    ],
)
def test_bad_bounds(low, high, bins, message):
    with pytest.raises(ValueError, match=message):
        ActionTokenizer(low, high, bins=bins)


def test_bad_ids():
    with pytest.raises(VocabularyError, match="float64; integers"):
        ours.decode(np.zeros(7))
    with pytest.raises(VocabularyError, match=r"action id 15004 at index \(0, 6\) is outside 10006 … 10261"):
        ours.decode([[10_006] * 6 + [15_004]])


def test_it_needs_numpy_only():
    code = (
        "import sys, worldvla_tokenizers as w; w.ActionTokenizer.published().encode([0.0] * 7);"
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'PIL', 'huggingface_hub') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- statistics of real data -------------------------------------------------------------------------------------
# What others met: a gripper that is open in all but a few steps, whose 1 % and 99 % quantiles are one value, so
# that closing it could not be said (openvla#184; openpi pads such ranges, others fall back to other statistics);
# dimensions that are never used and constant (a locked joint, padding to a common width), with noise or without;
# a gripper of three positions; commands that saturate; faults of a sensor, a thousand times any command.


def motions(steps=1000, dimensions=3):
    return np.random.default_rng(0).normal(size=(steps, dimensions))


def fitted(actions, quantile):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokenizer = ActionTokenizer.fit(actions, quantile)
    assert all(issubclass(warning.category, BoundsWarning) for warning in caught)
    assert all(warning.filename == __file__ for warning in caught)
    return tokenizer, [str(warning.message) for warning in caught]


def back(tokenizer, value, dimension):
    action = (tokenizer.low + tokenizer.high) / 2
    action[dimension] = value
    return tokenizer.decode(tokenizer.encode(action))[dimension]


@pytest.mark.parametrize(
    ("usual", "rare"),
    [
        (-1.0, [1.0] * 5),
        (-1.0, [1.0]),
        (1.0, [-1.0] * 9),
        (0.0, [1.0] * 3),  # a gripper of 0 and 1
        (0.04, [0.0] * 5),  # of metres
        (100.0, [0.0, 40.0]),  # of percent
        (0.0, [-1.0, 1.0, -1.0]),  # both ways from rest
        ([0.0, 0.0, 1.0], [2.0] * 4),  # three positions, of which two are usual
        ([-1.0, -1.0, 1.0], [0.0] * 2),  # the rare one between the others
        (-1.0 + 1e-3 * np.random.default_rng(0).normal(size=1000), [1.0] * 5),  # measured, so with noise
        (-1.0 + 1e-3 * np.random.default_rng(0).normal(size=1000), [0.98, 0.99, 1.0]),
    ],
)
@pytest.mark.parametrize("quantile", [0.01, 0.05])
def test_every_command_of_a_rare_gripper_is_in_reach(usual, rare, quantile):
    actions = motions()
    actions[:, 2] = np.resize(usual, 1000)
    actions[100 : 100 + len(rare), 2] = rare
    tokenizer, words = fitted(actions, quantile)
    values = actions[:, 2]
    for value in (values.min(), values.max(), *rare):
        assert back(tokenizer, value, 2) == pytest.approx(value, abs=np.ptp(values) / 255)
    within = tokenizer.low[2] == np.quantile(values, quantile) and tokenizer.high[2] == np.quantile(
        values, 1 - quantile
    )
    assert within or f"dimension 2: {values.min():.6g} … {values.max():.6g} (quantiles " in words[0]
    assert (tokenizer.high[:2] < actions[:, :2].max(axis=0)).all()  # the others keep their quantiles


@pytest.mark.parametrize("quantile", [None, 0.01])
def test_constant_dimensions_need_no_word(quantile):
    actions = np.concatenate(
        [np.random.default_rng(0).uniform(-1, 1, (20, 1)), np.full((20, 2), [0.0, 0.3])], axis=1
    )
    tokenizer, words = fitted(actions, quantile)
    np.testing.assert_allclose(tokenizer.decode(tokenizer.encode(actions))[:, 1:], actions[:, 1:], atol=1e-7)
    assert not any("dimension 1" in message or "dimension 2" in message for message in words)


@pytest.mark.parametrize("outliers", [[1e6], [50.0, -80.0, 60.0], [1e3, 1e3]])  # the last: a fault that recurs
def test_wild_outliers_are_clipped_with_a_word(outliers):
    actions = motions()
    actions[: len(outliers), 1] = outliers
    tokenizer, words = fitted(actions, 0.01)
    assert abs(tokenizer.low[1]) < 3
    assert tokenizer.high[1] < 3
    (message,) = words
    assert f" of 1,000, in {actions[:, 1].min():.6g} … {actions[:, 1].max():.6g}, to -2." in message
    assert "dimension 1: " in message
    assert "None for minimum and maximum" in message


def test_minimum_and_maximum_that_are_outliers_are_told():
    actions = motions()
    assert fitted(actions, None)[1] == []
    actions[0, 1] = 1e4
    tokenizer, words = fitted(actions, None)
    assert tokenizer.high[1] == 1e4
    assert back(tokenizer, 0.5, 1) != pytest.approx(0.5, abs=1)  # which is why
    (message,) = words
    assert "dimension 1: 90 % in -1." in message
    assert "… 10000" in message
    assert "a quantile such as 0.01" in message


def test_what_quantiles_do_not_cut_needs_no_word():
    actions = np.tile([[-1.0, 0.0], [1.0, 0.5]], (50, 1))  # an ordinary gripper
    tokenizer, words = fitted(actions, 0.01)
    assert (words, tokenizer.low.tolist(), tokenizer.high.tolist()) == ([], [-1.0, 0.0], [1.0, 0.5])
    actions = np.random.default_rng(0).uniform(-1, 1, (1000, 20))
    assert "; and 4 more dimensions; remedy" in fitted(actions, 0.01)[1][0]


def test_commands_that_saturate_count_as_the_end_of_a_tail():
    """As LIBERO's at 0.9375: OpenVLA's quantiles stay what they are, with a word."""
    actions = motions().clip(-2.7, 2.7)
    tokenizer, words = fitted(actions, 0.01)
    np.testing.assert_array_equal([tokenizer.low, tokenizer.high], np.quantile(actions, [0.01, 0.99], axis=0))
    assert [message.partition(":")[0] for message in words] == ["quantile 0.01 clips recorded values"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (b"<html>", "HTML or XML page"),
        (b"[]", "JSON list; an object"),
        (b'{"low": [0], "high": [1], "bins": "256"}', "'low', 'high' and 'bins' needed"),
        (b'{"low": [0], "high": ["a"], "bins": 256}', "'low', 'high' and 'bins' needed"),
        (b'{"low": [1], "high": [0], "bins": 256}', "dimension 0: low 1.0 is above high 0.0"),
    ],
)
def test_files_that_hold_no_bounds(tmp_path, content, message):
    (tmp_path / "action_tokenizer.json").write_bytes(content)
    with pytest.raises(ActionError, match=message) as caught:
        ActionTokenizer.from_pretrained(tmp_path)
    assert "action_tokenizer.json" in str(caught.value)
