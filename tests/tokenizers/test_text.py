"""Words ↔ ids: the published encoding, training in the same layout, and text that stays text."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from worldvla_tokenizers.text import TextTokenizer
from worldvla_tokenizers.vocabulary import FIRST_TEXT_ID, Vocabulary, VocabularyError, layout

PUBLISHED = Path(__file__).parents[1] / "fixtures" / "published"
TOKENIZER_JSON = PUBLISHED / "tokenizer" / "tokenizer.json"
FIXED_NAMES = ["<s>", "<pad>", "</s>", "<unk>", "IMGIMGAZ", "IMGIMGBDDDZ", "<eoss>", "<racm3:break>"]
FIXED_NAMES += ["<reserved08706>", "<reserved10000>", "<reserved10002>", "<reserved15000>"]
TEXTS = [
    "open the middle drawer of the cabinet",
    "put the wine bottle on top of the cabinet",
    "turn on the stove",
    "pousse l'assiette à côté du four",
    "把碗放在盘子上",
]


@cache
def published() -> TextTokenizer:
    return TextTokenizer.from_pretrained(TOKENIZER_JSON.parent)


@cache
def reference() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER_JSON))


@cache
def trained() -> TextTokenizer:
    return TextTokenizer.train(TEXTS, vocab_size=16_700)


def test_prompts_of_the_published_samples():
    """The text ids of every reference sample, found between bos and the first image."""
    ids = published().encode("What action should the robot take to open the middle drawer of the cabinet?")
    samples = json.loads((PUBLISHED / "samples.json").read_text())
    prompts = {tuple(sample["tokens"][1 : 1 + len(ids)]) for sample in samples if sample["kind"] == "action"}
    assert tuple(ids) in prompts
    texts = set()
    for sample in samples:
        tokens = sample["tokens"]
        prompt = tokens[1 : tokens.index(Vocabulary.published().boi)]
        text = published().decode(prompt)
        assert published().encode(text) == prompt
        texts.add(text)
    assert "Generate the next image based on the provided sequence of historical images and corresponding " \
        "actions." in texts  # fmt: skip


@given(st.text())
def test_ordinary_text_is_encoded_as_published_and_comes_back(text):
    ids = published().encode(text)
    if not any(name in text for name in layout()):
        assert ids == reference().encode(text, add_special_tokens=False).ids
    assert published().decode(ids) == text


@given(st.lists(st.sampled_from([*FIXED_NAMES, "<image>", " ", "the", "<", "unused 16999"]), max_size=8))
def test_no_text_makes_a_control_token(parts):
    text = "".join(parts)
    for tokenizer in (published(), trained()):
        ids = tokenizer.encode(text)
        assert all(FIRST_TEXT_ID <= i < tokenizer.size for i in ids)
        assert tokenizer.decode(ids) == text


def test_control_tokens_cannot_be_typed_where_words_are_looked_up_whole():
    """`ignore_merges` finds a word in the table before any merge: the table must not hold fixed names."""
    content = json.loads(TOKENIZER_JSON.read_text())
    content["model"]["ignore_merges"] = True
    tokenizer = TextTokenizer(json.dumps(content))
    assert Tokenizer.from_str(json.dumps(content | {"added_tokens": []})).encode("IMGIMGAZ").ids == [4]
    assert min(tokenizer.encode("IMGIMGAZ")) >= FIRST_TEXT_ID
    assert tokenizer.encode("open the drawer") == published().encode("open the drawer")


def test_framing_settings_of_the_file_do_not_reach_the_text():
    content = json.loads(TOKENIZER_JSON.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    tokenizer = TextTokenizer(json.dumps(content))
    assert tokenizer.encode(TEXTS[0]) == published().encode(TEXTS[0])


def test_training_has_the_published_layout():
    tokenizer = trained()
    assert tokenizer.size <= 16_700
    assert tokenizer.vocabulary == Vocabulary(size=tokenizer.size)
    content, expected = json.loads(tokenizer._serialized), json.loads(TOKENIZER_JSON.read_text())
    for name in ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert content[name] == expected[name]
    assert content["model"].keys() == expected["model"].keys()
    # The 256 bytes come first, in the same order.
    bytes_only = range(FIRST_TEXT_ID, FIRST_TEXT_ID + 256)
    names = [{name for name, i in c["model"]["vocab"].items() if i in bytes_only} for c in (content, expected)]
    assert names[0] == names[1]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in TEXTS)
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_training_is_deterministic_whatever_the_order():
    assert TextTokenizer.train(iter(TEXTS[::-1]), vocab_size=16_700) == trained()


def test_training_text_cannot_take_a_fixed_name():
    tokenizer = TextTokenizer.train(["IMGIMGAZ <reserved10000>"] * 50 + ["IMGIMGBZ"] * 9, vocab_size=17_000)
    ids = tokenizer.encode("IMGIMGAZ <reserved10000>")
    assert min(ids) >= FIRST_TEXT_ID
    assert tokenizer.decode(ids) == "IMGIMGAZ <reserved10000>"


def test_padding_fills_the_table_with_names_nobody_can_type():
    tokenizer = TextTokenizer.train(TEXTS, vocab_size=16_700, pad_to=65_536)
    assert tokenizer.size == 65_536
    assert tokenizer.encode(TEXTS[0]) == trained().encode(TEXTS[0])
    assert 65_535 not in tokenizer.encode("unused 65535")
    with pytest.raises(VocabularyError, match=r"65535 .*at position 1 is no text"):
        tokenizer.decode([FIRST_TEXT_ID, 65_535])


@pytest.mark.parametrize("pad_to", [None, 20_000])
def test_transformers_loads_what_is_saved(tmp_path, pad_to):
    tokenizer = TextTokenizer.train(TEXTS, vocab_size=16_700, pad_to=pad_to)
    tokenizer.save_pretrained(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert len(auto) == tokenizer.size
    assert (auto.bos_token_id, auto.pad_token_id, auto.eos_token_id, auto.unk_token_id) == (0, 1, 2, 3)
    for text in (*TEXTS, "Ünïcödé 🤖\n\ttabs  and   spaces"):
        assert auto.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert auto.decode(tokenizer.encode(text)) == text
    assert TextTokenizer.from_pretrained(tmp_path) == tokenizer


def test_published_files_are_saved_byte_for_byte(tmp_path):
    published().save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == TOKENIZER_JSON.read_bytes()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_decode_takes_text_only():
    ids = published().encode("open")
    with pytest.raises(VocabularyError, match=r"10004 \(begin of action\) at position 0"):
        published().decode([10_004, *ids])
    assert published().decode([0, *ids, 8_710], skip_special_tokens=True) == "open"
    with pytest.raises(VocabularyError, match="outside 0 … 16970"):
        published().decode([16_971], skip_special_tokens=True)
    with pytest.raises(VocabularyError, match="integers needed"):
        published().decode([0.5])
    with pytest.raises(VocabularyError, match=r"\(T,\) integers"):
        published().decode([ids])
    assert published().decode([]) == ""


def test_text_that_is_no_text():
    with pytest.raises(TypeError, match="bytes"):
        published().encode(b"open")
    with pytest.raises(VocabularyError, match="no valid Unicode"):
        published().encode("\ud800")
    with pytest.raises(TypeError, match="text 1 is int"):
        TextTokenizer.train(["a", 1])


def test_sizes_out_of_range():
    with pytest.raises(VocabularyError, match="at least 16644"):
        TextTokenizer.train(TEXTS, vocab_size=16_643)
    with pytest.raises(VocabularyError, match=r"pad_to is 16700.*65536"):
        TextTokenizer.train(TEXTS, pad_to=16_700)


def _moved(content):
    token = next(token for token in content["added_tokens"] if token["content"] == "<reserved10000>")
    token["id"] = 10_005


def _dropped(content):
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<racm3:break>"]
    del content["model"]["vocab"]["<racm3:break>"]


def _stray(content):
    content["model"]["vocab"]["Ġinside"] = 10_005


def _merged(content):
    content["model"]["merges"].append(["<", "eoss>"])


def _unigram(content):
    content["model"] = {"type": "Unigram", "vocab": []}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_moved, "'<reserved10000>' should be 10004, is 10005"),
        (_dropped, "'<racm3:break>' should be 8197, is missing"),
        (_stray, "'Ġinside' is 10005"),
        (_merged, "make no BPE model"),
        (_unigram, "type BPE"),
    ],
)
def test_wrong_layouts_are_refused_with_what_and_where(tmp_path, damage, message):
    content = json.loads(TOKENIZER_JSON.read_text())
    damage(content)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(VocabularyError, match=message) as caught:
        TextTokenizer.from_file(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"no json", b"[]", b"\xff\xfe", b"{}"])
def test_files_of_another_kind(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(VocabularyError, match=str(path)):
        TextTokenizer.from_pretrained(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        TextTokenizer.from_pretrained(tmp_path)


# How others write the file: Chameleon, Lumina-mGPT and WorldVLA's authors call it text_tokenizer.json;
# transformers renames <reserved08707> to <image>, in the table and among the added tokens; others do so in one of
# the two, or add a second name; people name the tokens they use (end of turn, begin of action); conversations add
# marks after the table (<|image|>, <|action|>), which are no ids of the model.


def test_the_authors_name_of_the_file(tmp_path):
    (tmp_path / "text_tokenizer.json").write_bytes(TOKENIZER_JSON.read_bytes())
    assert TextTokenizer.from_pretrained(tmp_path) == published()
    assert Vocabulary.from_tokenizer(tmp_path) == published().vocabulary
    (tmp_path / "tokenizer.json").write_text(trained()._serialized)
    assert TextTokenizer.from_pretrained(tmp_path) == trained()  # what transformers would read comes first
    assert Vocabulary.from_tokenizer(tmp_path) == trained().vocabulary


def renamed(content, old, new, *, vocab=True, added=True):
    table = content["model"]["vocab"]
    if vocab:
        table[new] = table.pop(old)
    if added:
        next(token for token in content["added_tokens"] if token["content"] == old)["content"] = new


def marks(content, *names):
    next_id = max(content["model"]["vocab"].values()) + 1
    content["added_tokens"] += [
        {"id": next_id + i, "content": name, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for i, name in enumerate(names)
    ]


@pytest.mark.parametrize(
    ("change", "typed"),
    [
        (lambda c: renamed(c, "<reserved08707>", "<image>"), "<image>"),
        (lambda c: renamed(c, "<reserved08707>", "<image>", added=False), "<image>"),
        (lambda c: renamed(c, "<reserved08707>", "<image>", vocab=False), "<image>"),
        (lambda c: renamed(c, "<reserved08706>", "[EOT]"), "[EOT]"),
        (lambda c: renamed(c, "<reserved10000>", "begin of action"), "begin of action"),
        (lambda c: renamed(c, "<racm3:break>", "<boi>"), "<boi>"),
        (
            lambda c: [renamed(c, f"<reserved{n}>", f"<action_{n - 10_001}>") for n in range(10_002, 10_258)],
            "<action_7>",
        ),
        (lambda c: c["model"]["vocab"].update({"<grid>": 8_804}), "<grid>"),
        (lambda c: marks(c, "<|image|>", "<|action|>"), "<|image|>"),
    ],
    ids=["transformers", "table-only", "added-only", "brackets", "words", "boi", "actions", "two-names", "marks"],
)
def test_renamed_tokens_keep_their_ids_and_cannot_be_typed(tmp_path, change, typed):
    content = json.loads(TOKENIZER_JSON.read_text())
    change(content)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content, ensure_ascii=False))
    tokenizer = TextTokenizer.from_file(path)
    assert tokenizer.vocabulary == published().vocabulary
    for text in (*TEXTS, f"put {typed} down"):
        assert tokenizer.encode(text) == published().encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.save_pretrained(tmp_path / "saved")
    assert TextTokenizer.from_pretrained(tmp_path / "saved") == tokenizer


@pytest.mark.parametrize(
    ("old", "message"),
    [("IMGIMGAZ", "'IMGIMGAZ' should be 4, is missing"), ("<pad>", "'<pad>' should be 1, is missing")],
)
def test_names_that_tell_the_layout_cannot_be_renamed(tmp_path, old, message):
    content = json.loads(TOKENIZER_JSON.read_text())
    renamed(content, old, "<renamed>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(VocabularyError, match=message):
        TextTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html>", "HTML or XML page.*resolve"),
        (b'{"error": "Repository not found"}', "answer of a server"),
        (b"", "is empty"),
        (b'{"model": {"type": "BPE", "vocab": {}}, "added_tokens": [1]}', "'added_tokens' is no list"),
        (b'{"model": {"type": "BPE", "vocab": {"a": "b"}}}', "id of 'a' is 'b'"),
    ],
)
def test_what_is_no_tokenizer_is_named(tmp_path, content, message):
    (tmp_path / "text_tokenizer.json").write_bytes(content)
    for read in (TextTokenizer.from_pretrained, Vocabulary.from_tokenizer):
        with pytest.raises(VocabularyError, match=message):
            read(tmp_path)


def test_spell_names_every_id():
    ids = published().encode("open it")
    assert published().spell([0, 4, *ids, 10_004, 8_710]) == "<s>IMGIMGAZopen it<reserved10000><reserved08706>"
    assert published().spell([]) == ""
    for wrong, message in (
        ([-1], "allowed: 0 … 16970"),
        ([16_971], "16971"),
        ([[0]], r"shape \(1, 1\)"),
        ([0.5], "float"),
    ):
        with pytest.raises(VocabularyError, match=message):
            published().spell(wrong)
