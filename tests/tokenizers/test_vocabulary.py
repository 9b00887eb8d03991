"""The table of ids: published places, ranges both ways, and files with another layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldvla_tokenizers.vocabulary import FIRST_TEXT_ID, Vocabulary, VocabularyError, layout, token_table

PUBLISHED = Path(__file__).parents[1] / "fixtures" / "published"
TOKENIZER_JSON = PUBLISHED / "tokenizer" / "tokenizer.json"
V = Vocabulary.published()


def test_published_ids():
    assert (V.size, V.bos, V.pad, V.eos, V.unk) == (65_536, 0, 1, 2, 3)
    assert (V.eoi, V.boi, V.eot, V.newline, V.boa, V.eoa) == (8_196, 8_197, 8_710, 8_803, 10_004, 15_004)
    assert [V.grid(n) for n in (4, 8, 16)] == [8_808, 8_812, 8_820]
    assert (V.image_range, V.action_range) == (range(4, 8_196), range(10_006, 10_262))


def test_names_of_the_layout():
    names = list(layout())
    assert len(names) == FIRST_TEXT_ID == len(set(names))
    assert names[1_333 + 4] == "IMGIMGBDDDZ"
    for number in (8_194, 8_706, 8_799, 10_000, 15_000, 16_383):
        assert names[number + 4] == f"<reserved{number:05d}>"
    table = token_table(json.loads(TOKENIZER_JSON.read_text()), TOKENIZER_JSON)
    assert all(table[name] == i for i, name in enumerate(names))


def test_files_of_the_published_layout():
    assert Vocabulary.from_tokenizer(TOKENIZER_JSON) == Vocabulary(size=16_971)
    assert Vocabulary.from_tokenizer(TOKENIZER_JSON.parent) == Vocabulary(size=16_971)
    size = json.loads((PUBLISHED / "checkpoint" / "config.json").read_text())["vocab_size"]
    assert Vocabulary.from_config(PUBLISHED / "checkpoint") == Vocabulary(size=size)


@given(st.lists(st.integers(0, 8_191)))
def test_image_codes_round_trip(codes):
    ids = V.image_ids(codes)
    assert ids.dtype == np.int64
    assert all(i in V.image_range for i in ids)
    assert V.image_codes(ids).tolist() == codes


@given(st.lists(st.integers(1, 256)))
def test_action_bins_round_trip(bins):
    assert all(i in V.action_range for i in V.action_ids(bins))
    assert V.action_bins(V.action_ids(bins)).tolist() == bins


@given(st.integers(1, 1_199))
def test_grid_round_trip(n):
    assert V.grid_size(V.grid(n)) == n
    assert V.newline < V.grid(n) < V.boa


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("image_ids", [[0, 1], [2, 8_192]], r"image code 8192 at index \(1, 1\) is outside 0 … 8191"),
        ("image_ids", [-1, -2], r"image code -1 .*\(2 such values\)"),
        ("image_codes", 3, r"image id 3 at index \(\) is outside 4 … 8195"),
        ("image_codes", [8_196], "8196"),
        ("action_ids", [0], "action bin 0 .*outside 1 … 256"),
        ("action_ids", [257], "257"),
        ("action_bins", [10_005], "action id 10005 .*outside 10006 … 10261"),
        ("action_bins", [10_262], "10262"),
        ("action_bins", [10_006.0], "float64; integers are needed"),
        ("grid", 0, "grid size is 0"),
        ("grid", 1_200, "allowed: 1 … 1199"),
        ("grid_size", 8_804, "id 8804 is no grid token"),
    ],
)
def test_values_out_of_range(method, values, message):
    with pytest.raises(VocabularyError, match=message):
        getattr(V, method)(values)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_image_codes": 8_193}, "num_image_codes is 8193"),
        ({"num_image_codes": 0}, "num_image_codes is 0"),
        ({"num_action_bins": 1}, "num_action_bins is 1"),
        ({"num_action_bins": 4_999}, "hold 2 … 4998"),
        ({"size": 15_004}, "size is 15004; at least 15005"),
    ],
)
def test_sizes_out_of_range(fields, message):
    with pytest.raises(VocabularyError, match=message):
        Vocabulary(**fields)


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (0, "0 (bos)"),
        (4, "4 (image code 0)"),
        (8_812, "8812 (grid 8)"),
        (10_006, "10006 (action bin 1)"),
        (10_005, "10005 (reserved)"),
        (20_000, "20000 (text)"),
        (65_536, "65536 (outside 0 … 65535)"),
    ],
)
def test_describe(token, words):
    assert V.describe(token) == words


def test_another_layout_is_refused_with_every_difference_counted():
    table = {name: i for i, name in enumerate(layout())}
    assert Vocabulary.from_mapping(table).size == FIRST_TEXT_ID
    table["<reserved10000>"] = 10_005
    del table["<racm3:break>"]
    with pytest.raises(VocabularyError) as caught:
        Vocabulary.from_mapping(table, origin="here")
    assert str(caught.value).startswith("here: ")
    assert "'<racm3:break>' should be 8197, is missing" in str(caught.value)
    assert "'<reserved10000>' should be 10004, is 10005" in str(caught.value)
    with pytest.raises(VocabularyError, match="and 16383 more"):
        Vocabulary.from_mapping({"a": 0})
    with pytest.raises(VocabularyError, match="16387 lies outside a vocabulary of 16387"):
        Vocabulary.from_mapping({name: i for i, name in enumerate(layout())}, size=16_387)


@pytest.mark.parametrize("content", ["no json", "[]", "{}", '{"model": {}}'])
def test_files_of_another_kind(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(VocabularyError, match=str(path)):
        Vocabulary.from_tokenizer(path)


def test_config_without_a_table(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "chameleon"}')
    with pytest.raises(VocabularyError, match="vocabulary_map"):
        Vocabulary.from_config(tmp_path)
    with pytest.raises(FileNotFoundError):
        Vocabulary.from_tokenizer(tmp_path)
