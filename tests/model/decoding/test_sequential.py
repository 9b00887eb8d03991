import numpy as np
import pytest
import torch

from worldvla_model import DecodingError, Sampling, SequenceLengthError
from worldvla_model.decoding import (
    ChunkGrammar,
    Decoder,
    UnfinishedAnswerError,
    continue_freely,
    fill,
    fill_chunk,
)
from worldvla_model.masks import MaskError
from worldvla_tokenizers import Vocabulary, sequence

V = Vocabulary.published()
ACTION = sequence.action_slots(7, V)
GRAMMAR = ChunkGrammar(ACTION, V.eot)
FRAME = [*sequence.image_slots(8, 8, V), [V.eot]]


@pytest.mark.parametrize("kind", ["action", "world"])
def test_free_decoding_equals_the_published_code(published, model, kind):
    for reference in published.json("generations"):
        if reference["kind"] == kind:
            decoder = Decoder(model, reference["prompt"])
            assert continue_freely(decoder, V.eot) == reference["generated"]
            assert decoder.passes == len(reference["generated"])


def test_constrained_chunks_equal_the_published_code(published, model):
    for reference in published.json("generations"):
        if reference["kind"] == "action":
            actions = (len(reference["generated"]) - 1) // 9
            for wanted in (None, actions):
                decoder = Decoder(model, reference["prompt"])
                assert fill_chunk(decoder, GRAMMAR, num_actions=wanted) == reference["generated"]
            assert decoder.passes == 7 * actions  # begin, end and end of turn cost nothing


@pytest.mark.parametrize("attention", [None, "causal"])
def test_constrained_frames_equal_the_published_code(published, model, attention):
    """A prompt of one frame and one action has no earlier action: both masks are the same."""
    for reference in published.json("generations"):
        if reference["kind"] == "world":
            decoder = Decoder(model, reference["prompt"], attention=attention)
            assert fill(decoder, FRAME) == reference["generated"]
            assert decoder.passes == 64


def test_random_weights_keep_to_the_grammar(small):
    for prompt in ([0, 16_400, V.eot], [0, 16_500, 16_501, V.eot]):
        chunk = fill_chunk(Decoder(small, prompt), GRAMMAR, num_actions=3)
        assert len(sequence.actions_of(sequence.parse(chunk, V))) == 3
        frame = fill(Decoder(small, prompt), FRAME)
        assert sequence.images_of(sequence.parse(frame, V))[0].shape == (8, 8)


def test_constrained_takes_the_most_likely_of_the_allowed_ids(small):
    prompt = [0, 16_400, V.eot]
    ids = fill(Decoder(small, prompt), ACTION)
    with torch.inference_mode():
        for position in range(1, 8):
            logits = small(torch.tensor([prompt + ids[:position]])).logits[0, -1]
            allowed = logits[V.action_range.start : V.action_range.stop]
            assert ids[position] == V.action_range[int(allowed.argmax())]


def test_sampling_is_repeatable_and_varied(small):
    def draw(seed, **settings):
        generator = torch.Generator().manual_seed(seed)
        sampling = Sampling(temperature=1.0, generator=generator, **settings)
        return fill(Decoder(small, [0, 16_400, V.eot], sampling=sampling), ACTION)

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert draw(0, top_k=1) == fill(Decoder(small, [0, 16_400, V.eot]), ACTION)
    assert draw(0, top_p=1e-6) == draw(1, top_p=1e-6)


def test_numbers_of_any_kind_say_how_to_sample():
    logits = torch.arange(9.0)[None]
    for temperature, top_k, top_p in ((1, np.int64(1), 1), (np.float32(2), 1, np.float64(0.5)), (1.0, None, 1e-9)):
        assert Sampling(temperature, top_k=top_k, top_p=top_p).choose(logits) == 8


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0])
    sampling = Sampling(temperature=0.5, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(3)
    for _ in range(4_000):
        counts[sampling.choose(logits[None])[0]] += 1
    expected = (logits / 0.5).softmax(-1)
    # Four standard errors of a proportion.
    assert ((counts / 4_000 - expected).abs() < 4 * (expected * (1 - expected) / 4_000).sqrt()).all()


def test_a_model_that_never_ends_its_turn(small):
    small.lm_head.weight.data[V.eot] = 0
    small.lm_head.weight.data[V.boa] = 0
    begin = small.model.norm.weight.data
    begin.fill_(0)  # all logits equal: the first of the two, another action, wins
    with pytest.raises(DecodingError, match=r"after 4 actions \(max_actions\); pass num_actions"):
        fill_chunk(Decoder(small, [0]), GRAMMAR, max_actions=4)


def test_bad_requests(small):
    with pytest.raises(DecodingError, match="prompt 0 has 0 ids"):
        Decoder(small, [])
    with pytest.raises(DecodingError, match=r"prompt id 16640 at position 1; .* 0 … 16639"):
        Decoder(small, [0, 16_640])
    with pytest.raises(DecodingError, match=r"ids 16640 … 16641 wanted; .* 0 … 16639"):
        Decoder(small, [0]).choose(range(16_640, 16_642))
    for settings in ({"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}):
        with pytest.raises(DecodingError, match=next(iter(settings))):
            Sampling(**settings)


def test_no_room_is_said_before_any_pass(small):
    decoder = Decoder(small, [0] * 500)
    with pytest.raises(SequenceLengthError, match="500 ids so far and 19 to come; the model has 512 positions"):
        fill_chunk(decoder, GRAMMAR, num_actions=2)
    assert decoder.passes == 0
    with pytest.raises(SequenceLengthError, match="512 ids so far and 1 to come"):
        Decoder(small, [0] * 512)
    with pytest.raises(UnfinishedAnswerError, match=r"within 7 ids: .*512 ids so far and 1 to come") as caught:
        continue_freely(Decoder(small, [0] * 505), end_of_turn=-1)
    assert len(caught.value.ids) == 7
    with pytest.raises(MaskError, match="begin an action"):  # the prompt's fault: no ids to show
        continue_freely(Decoder(small, [V.boa, V.boa]), end_of_turn=-1)
    assert len(continue_freely(Decoder(small, [0]), end_of_turn=-1, max_new_tokens=5)) == 5
