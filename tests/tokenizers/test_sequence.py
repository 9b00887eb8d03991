import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldvla_tokenizers import SequenceError, Vocabulary, VocabularyError, sequence
from worldvla_tokenizers.sequence import ActionBlock, ImageBlock, Marker, TextBlock

V = Vocabulary.published()
TEXT = [16_500, 16_501, 20_000]

bins = st.integers(10_006, 10_261)
actions = st.lists(bins, min_size=7, max_size=7)
sizes = st.tuples(st.integers(1, 3), st.integers(1, 3)).map(lambda s: (2 * s[0], 2 * s[1]))


def images(minimum: int, maximum: int):
    def draw(shape):
        codes = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).integers(0, 8192, shape))
        return st.lists(codes, min_size=minimum, max_size=maximum)

    return sizes.flatmap(draw)


def supervised(sample):
    return [i for i, label in zip(sample.ids, sample.labels, strict=True) if label != sequence.IGNORED]


@pytest.mark.parametrize("size", [128, 256])
def test_samples_of_the_published_code(published, size):
    from worldvla_tokenizers import ActionTokenizer, ImageTokenizer, TextTokenizer

    text = TextTokenizer.from_pretrained(published.tokenizer)
    pixels = ImageTokenizer.from_pretrained(published.tokenizer)
    binned = ActionTokenizer.published()
    vocabulary = text.vocabulary
    for reference in published.samples(size=size):
        frames = [published.frame(reference["episode"], i) for i in reference["frames"]]
        if size == 256:  # whose near ties are the business of test_vqgan.py
            codes = [published.codes(reference["episode"], i) for i in reference["frames"]]
        else:
            codes = list(pixels.encode(frames, target=size))
        ids = binned.encode(reference["actions"])
        if reference["kind"] == "action":
            words = text.encode(sequence.ACTION_PROMPT.format(instruction=reference["instruction"]))
            prompt = sequence.action_prompt(words, codes, vocabulary)
            sample = sequence.action_sample(words, codes, ids, vocabulary)
        else:
            words = text.encode(sequence.WORLD_PROMPTS["published"])
            prompt = sequence.world_prompt(words, codes[:1], ids, vocabulary)
            sample = sequence.world_sample(words, codes[:1], ids, codes[1:], vocabulary)
        assert prompt == reference["prompt"]
        assert sample.ids == reference["tokens"]
        assert sample.labels == reference["labels"]


@given(images(1, 4), st.lists(actions, min_size=1, max_size=12))
def test_action_sample_parses_into_its_blocks(pictures, chunk):
    sample = sequence.action_sample(TEXT, pictures, chunk, V)
    assert sequence.parse(sample.ids, V) == [
        Marker.BOS,
        TextBlock(tuple(TEXT)),
        *map(ImageBlock, pictures),
        Marker.EOT,
        *(ActionBlock(tuple(ids)) for ids in chunk),
        Marker.EOT,
    ]
    prompt = sequence.action_prompt(TEXT, pictures, V)
    assert sample.ids[: len(prompt)] == prompt
    assert sample.labels == [-100] * len(prompt) + sample.ids[len(prompt) :]
    paper = sequence.action_sample(TEXT, pictures, chunk, V, labels="paper")
    assert supervised(paper) == [i for ids in chunk for i in ids]


@given(images(2, 6), st.data())
def test_world_sample_parses_into_its_blocks(pictures, data):
    rounds = data.draw(st.integers(1, len(pictures) - 1))
    h = len(pictures) - rounds
    taken = data.draw(st.lists(actions, min_size=h + rounds - 1, max_size=h + rounds - 1))
    sample = sequence.world_sample(TEXT, pictures[:h], taken, pictures[h:], V)
    expected = [Marker.BOS, TextBlock(tuple(TEXT))]
    for image, ids in zip(pictures[:h], taken, strict=False):
        expected += [ImageBlock(image), ActionBlock(tuple(ids))]
    for n, image in enumerate(pictures[h:]):
        if n:
            expected.append(ActionBlock(tuple(taken[h + n - 1])))
        expected += [Marker.EOT, ImageBlock(image), Marker.EOT]
    assert sequence.parse(sample.ids, V) == expected
    answers = [[*sequence.image_block(image, V), V.eot] for image in pictures[h:]]
    assert supervised(sample) == [i for answer in answers for i in answer]
    paper = sequence.world_sample(TEXT, pictures[:h], taken, pictures[h:], V, labels="paper")
    assert supervised(paper) == [i for image in pictures[h:] for i in V.image_ids(image).ravel()]


@given(images(2, 5), st.data())
def test_video_sample_parses_into_its_blocks(pictures, data):
    m = data.draw(st.integers(1, len(pictures) - 1))
    sample = sequence.video_sample(TEXT, pictures[:m], pictures[m:], V)
    blocks = sequence.parse(sample.ids, V)
    assert blocks == [
        Marker.BOS, TextBlock(tuple(TEXT)), *map(ImageBlock, pictures[:m]), Marker.EOT,
        *map(ImageBlock, pictures[m:]), Marker.EOT,
    ]  # fmt: skip
    assert [i.shape for i in sequence.images_of(blocks)] == [p.shape for p in pictures]


@pytest.mark.parametrize(("side", "tokens"), [(8, 76), (16, 276), (32, 1060)])
def test_block_lengths(side, tokens):
    block = sequence.image_block(np.zeros((side, side), dtype=int), V)
    assert len(block) == tokens
    assert block[1] == block[2] == V.grid(side // 2)
    assert all(i in slot for i, slot in zip(block, sequence.image_slots(side, side, V), strict=True))


def test_height_comes_before_width():
    block = sequence.image_block(np.zeros((4, 8), dtype=int), V)
    assert block[1:3] == [V.grid(2), V.grid(4)]


SAMPLE = sequence.action_sample(TEXT, [np.arange(4).reshape(2, 2)], [[10_006] * 7] * 2, V).ids


@given(st.integers(0, len(SAMPLE) - 1), st.integers(0, 65_535))
def test_a_changed_id_is_never_read_as_the_same_blocks(position, token):
    changed = [*SAMPLE[:position], token, *SAMPLE[position + 1 :]]
    with contextlib.suppress(SequenceError):
        assert (sequence.parse(changed, V) == sequence.parse(SAMPLE, V)) == (changed == SAMPLE)


@given(st.lists(st.one_of(st.integers(0, 65_535), st.sampled_from(SAMPLE)), max_size=60))
def test_parse_answers_or_raises_its_own_error(ids):
    with contextlib.suppress(SequenceError):
        sequence.parse(ids, V)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([10_004, *[10_006] * 7], r"position 8: expected 15004 \(end of action\), found the end"),
        ([10_004, *[10_006] * 3, 8_197], r"position 4: expected 10006 .*, found 8197 \(begin of image\)"),
        ([10_004, *[10_006] * 8, 15_004], r"position 8: expected 15004 .*, found 10006 \(action bin 1\)"),
        ([8_197, 8_805, 8_805, 4, 5, 8_803, 6, 7, 8_196], r"position 8: expected 8803 \(new line\), found 8196"),
        ([8_197, 10_004], r"position 1: expected 8805 \(grid 1\) … .*, found 10004"),
        ([15_004], r"position 0: expected bos .*, found 15004"),
        ([16_500, 0], r"position 1: expected bos \(at the start only\)"),
        ([2], r"found 2 \(eos\)"),
        ([-1], r"outside 0 … 65535"),
    ],
)
def test_parse_says_where_and_what(ids, message):
    with pytest.raises(SequenceError, match=message):
        sequence.parse(ids, V)


def test_bad_parts():
    image, chunk = np.zeros((2, 2), dtype=int), [[10_006] * 7]
    with pytest.raises(SequenceError, match="0 images"):
        sequence.action_prompt(TEXT, [], V)
    with pytest.raises(SequenceError, match="0 actions"):
        sequence.action_sample(TEXT, [image], np.zeros((0, 7), dtype=int), V)
    with pytest.raises(SequenceError, match="1 images and 2 actions"):
        sequence.world_prompt(TEXT, [image], chunk * 2, V)
    with pytest.raises(SequenceError, match="2 images, 1 actions, 1 next images"):
        sequence.world_sample(TEXT, [image] * 2, chunk, [image], V)
    with pytest.raises(SequenceError, match="0 frames"):
        sequence.video_sample(TEXT, [image], [], V)
    with pytest.raises(SequenceError, match="3 x 2 codes; both must be even"):
        sequence.image_block(np.zeros((3, 2), dtype=int), V)
    with pytest.raises(SequenceError, match=r"10004 \(begin of action\) at position 1 is no text"):
        sequence.action_prompt([16_500, 10_004], [image], V)
    with pytest.raises(SequenceError, match="label rule is 'all'"):
        sequence.action_sample(TEXT, [image], chunk, V, labels="all")
    with pytest.raises(VocabularyError, match="image code 8192"):
        sequence.image_block(np.full((2, 2), 8192), V)
    with pytest.raises(VocabularyError, match="action id 3"):
        sequence.action_block([3] * 7, V)
