import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from worldvla_tokenizers import ActionError, ActionTokenizer, VocabularyError
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
