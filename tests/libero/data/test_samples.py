import pickle

import numpy as np
import pytest

from worldvla_libero.data.samples import (
    ActionSamples,
    SampleWriter,
    TokenSamples,
    VideoSamples,
    WorldSamples,
    samples_of,
)
from worldvla_libero.data.shards import TokenDataset
from worldvla_tokenizers import ActionTokenizer, TextTokenizer, sequence
from worldvla_tokenizers.sequence import ActionBlock, ImageBlock, Marker, Prompts, TextBlock

KINDS = [
    ActionSamples(1, 1),
    ActionSamples(2, 5),
    ActionSamples(4, 10),
    WorldSamples(1, 1),
    WorldSamples(3, 1),
    WorldSamples(2, 3),
    VideoSamples(1, 1),
    VideoSamples(3, 4),
]


@pytest.fixture(scope="module")
def text(published):
    return TextTokenizer.from_pretrained(published.tokenizer)


def blocks_of_spec(kind, episode, t, text, actions):
    """SPEC §3, step by step: what the sample at t is made of."""
    ids = actions.encode(episode.actions)
    taken = [ActionBlock(tuple(int(i) for i in row)) for row in ids]

    def image(step):
        return ImageBlock(episode.codes[step].astype(int))

    def words(prompt):
        return TextBlock(tuple(text.encode(prompt)))

    if isinstance(kind, ActionSamples):
        shown = [image(s) for s in range(t - kind.history + 1, t + 1) if s >= 0]
        question = words(f"What action should the robot take to {episode.instruction}?")
        return [Marker.BOS, question, *shown, Marker.EOT, *taken[t : t + kind.actions], Marker.EOT]
    if isinstance(kind, VideoSamples):
        shown = [image(s) for s in range(t - kind.history + 1, t + 1) if s >= 0]
        question = words(
            f"Generate the future image based on the task and current image.{episode.instruction}",
        )
        future = [image(t + k) for k in range(1, kind.frames + 1)]
        return [Marker.BOS, question, *shown, Marker.EOT, *future, Marker.EOT]
    question = words(
        "Generate the next image based on the provided sequence of historical images and corresponding actions."
    )
    shown = [part for s in range(t - kind.history + 1, t + 1) if s >= 0 for part in (image(s), taken[s])]
    rounds = [image(t + 1), Marker.EOT]
    for k in range(1, kind.rounds):
        rounds += [taken[t + k], Marker.EOT, image(t + k + 1), Marker.EOT]
    return [Marker.BOS, question, *shown, Marker.EOT, *rounds]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_sample_is_the_one_of_the_spec(tmp_path, text, episodes, data_set, kind):
    made = episodes(6)
    data = TokenDataset(data_set(tmp_path / "d", made))
    samples = TokenSamples(data, kind, text)
    needed = (
        kind.actions
        if isinstance(kind, ActionSamples)
        else 1 + getattr(kind, "rounds", getattr(kind, "frames", 0))
    )
    expected = [(e, t) for e, episode in enumerate(made) for t in range(len(episode) - needed + 1)]
    assert [samples.locate(i) for i in range(len(samples))] == expected
    assert samples.too_short == sum(len(episode) < needed for episode in made)
    for (e, t), sample in zip(expected, samples, strict=True):
        assert sequence.parse(sample.ids, text.vocabulary) == blocks_of_spec(kind, made[e], t, text, data.actions)
        assert all(label in (i, -100) for i, label in zip(sample.ids, sample.labels, strict=True))


def test_an_episode_s_samples_are_the_same_streamed(tmp_path, text, episodes, data_set):
    data = TokenDataset(data_set(tmp_path / "d", episodes(3)))
    for kind in KINDS:
        writer = SampleWriter(text, data.actions)
        streamed = [sample for episode in data for sample in samples_of(episode, kind, writer)]
        assert streamed == list(TokenSamples(data, kind, text))


def test_prompts_label_rule_and_bounds_can_be_others(tmp_path, text, episodes, data_set):
    from worldvla_model.processing_worldvla import ProcessorSettings

    data = TokenDataset(data_set(tmp_path / "d", episodes(2)))
    paper = TokenSamples(data, ActionSamples(1, 2), text, settings=Prompts(labels="paper"))
    supervised = [label for label in paper[0].labels if label != -100]
    assert len(supervised) == 2 * 7
    assert set(supervised) <= set(text.vocabulary.action_range)
    ours = Prompts(action_prompt="Do: {instruction}", world_prompt="Then?", labels="paper")
    theirs = ProcessorSettings(action_prompt="Do: {instruction}", world_prompt="Then?", labels="paper")
    for kind in (ActionSamples(), WorldSamples()):
        assert list(TokenSamples(data, kind, text, settings=ours)) == list(
            TokenSamples(data, kind, text, settings=theirs)
        )
    wide = ActionTokenizer(-10 * np.ones(7), 10 * np.ones(7))
    block = sequence.actions_of(
        sequence.parse(TokenSamples(data, ActionSamples(1, 2), text, actions=wide)[0].ids, text.vocabulary)
    )
    np.testing.assert_array_equal(block, wide.encode(data[0].actions[:2]))


def test_samples_are_a_sequence_that_workers_can_be_sent(tmp_path, text, episodes, data_set):
    samples = TokenSamples(TokenDataset(data_set(tmp_path / "d", episodes(4))), WorldSamples(), text)
    assert samples[-1] == samples[len(samples) - 1]
    assert samples[2:5] == [samples[2], samples[3], samples[4]]
    assert pickle.loads(pickle.dumps(samples))[3] == samples[3]
    with pytest.raises(IndexError, match=f"sample {len(samples)} of {len(samples)}"):
        samples[len(samples)]


def test_a_dataloader_takes_them(tmp_path, text, episodes, data_set):
    from torch.utils.data import DataLoader

    samples = TokenSamples(TokenDataset(data_set(tmp_path / "d", episodes(4))), ActionSamples(2, 2), text)
    loaded = [s for batch in DataLoader(samples, batch_size=3, num_workers=2, collate_fn=list) for s in batch]
    assert loaded == list(samples)


@pytest.mark.parametrize(
    ("kind", "arguments", "name"),
    [(ActionSamples, (0, 5), "history"), (WorldSamples, (1, 0), "rounds"), (VideoSamples, (1, -1), "frames")],
)
def test_numbers_out_of_range_are_refused(kind, arguments, name):
    with pytest.raises(ValueError, match=rf"{name} of {kind.__name__} is -?\d; allowed: 1 and above"):
        kind(*arguments)
