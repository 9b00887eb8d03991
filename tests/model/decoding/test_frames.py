import random

import pytest
import torch
from grammar_models import V, outcome, random_prompt, scripted_model, slot_model, telling_model

from worldvla_model import DecodingError, Sampling, SequenceLengthError, WorldVLAForConditionalGeneration
from worldvla_model.decoding import (
    Decoder,
    Workspace,
    continue_frames,
    continue_freely,
    decode_frames,
    fill,
    repeat,
)
from worldvla_tokenizers import sequence

FRAME = [*sequence.image_slots(4, 4, V), [V.eot]]
CODES = 16


@pytest.fixture
def model(small):
    return small.double()  # in fp32 near ties could fall either way


def one_by_one(model, prompt):
    return fill(Decoder(model, prompt, attention="causal"), FRAME)


@pytest.fixture
def passes(monkeypatch, model):
    counted = []
    forward = type(model.model).forward
    monkeypatch.setattr(type(model.model), "forward", lambda *a, **k: counted.append(1) or forward(*a, **k))
    return counted


def spoiled(answer, agreement, rng):
    return [
        token if len(slot) == 1 or rng.random() < agreement else rng.choice(slot)
        for token, slot in zip(answer, FRAME, strict=True)
    ]


@pytest.mark.parametrize("agreement", [0, 0.3, 0.5, 0.8, 0.95, 1])
def test_whatever_the_draft_says_the_answer_is_the_same(model, agreement):
    compare(model, agreement, 8)


@pytest.mark.campaign
def test_a_thousand_answers_are_the_same_whatever_the_draft_says(small_config):
    for seed in range(10):
        torch.manual_seed(seed)
        model = WorldVLAForConditionalGeneration(small_config).eval().double()
        for agreement in range(0, 101, 10):
            compare(model, agreement / 100, 10)


def compare(model, agreement, prompts):
    rng = random.Random(int(100 * agreement))
    for _ in range(prompts):
        prompt = random_prompt(rng)
        expected = one_by_one(model, prompt)
        draft = repeat(spoiled(expected, agreement, rng))
        assert decode_frames(model, [prompt], FRAME, draft=draft, attention="causal") == [expected]


def test_free_answers_equal_those_of_one_token_after_the_other_wherever_they_leave_the_grammar():
    rng, states = random.Random(7), set()
    small_frame = [*sequence.image_slots(2, 2, V), [V.eot]]
    # An end, a begin, another code, words; the frame's own tokens out of place.
    for place in range(len(small_frame)):
        for says in rng.sample([V.eot, V.boi, V.eoi, V.newline, V.boa, V.eoa, 16_500, 5], 2):
            prompt = random_prompt(rng)
            model = slot_model(small_frame, [len(prompt)], place, says, seed=place)
            expected = outcome(
                lambda model=model, prompt=prompt: [
                    continue_freely(Decoder(model, prompt, attention="causal"), V.eot)
                ]
            )
            for draft in (None, repeat([*expected[0][:place], 9, *expected[0][place:]])):
                found = outcome(
                    lambda model=model, prompt=prompt, draft=draft: continue_frames(
                        model, [prompt], small_frame, V.eot, draft=draft, attention="causal"
                    )
                )
                assert found == expected
            states.add((place, says in small_frame[place]))
    assert {place for place, fits in states if not fits} == set(range(len(small_frame)))


def history(rng):
    """A world prompt of two images, each with its action."""
    ids = [0, 16_400 + rng.randrange(200)]
    for _ in range(2):
        ids += sequence.image_block([[rng.randrange(8_192) for _ in range(2)] for _ in range(2)], V)
        ids += sequence.action_block([10_006 + rng.randrange(200) for _ in range(7)], V)
    return [*ids, V.eot]


@pytest.mark.parametrize("models", [6, pytest.param(60, marks=pytest.mark.campaign)])
def test_masks_that_look_ahead_do_not_see_the_frame_that_is_to_come(models):
    """By default the last action of the prompt is kept apart from the first, as long as no image follows it."""
    slots = [*sequence.image_slots(2, 2, V), [V.eot]]
    for seed in range(models):
        prompt = history(random.Random(seed))
        told = {i: slot[0] for i, slot in enumerate(slots) if len(slot) == 1}  # the codes are its own choice
        model = telling_model(seed, {len(prompt) + i: t for i, t in told.items()}, len(prompt) + len(slots) - 1)
        for attention in ("action_isolated", "first_image_only"):
            expected = outcome(lambda: [continue_freely(Decoder(model, prompt, attention=attention), V.eot)])  # noqa: B023
            found = outcome(lambda: continue_frames(model, [prompt], slots, V.eot, attention=attention))  # noqa: B023
            assert found == expected, f"model {seed}, {attention}"


@pytest.mark.parametrize("attention", ["action_isolated", "causal"])
def test_rollouts_under_any_mask(model, attention):
    rng, code = random.Random(8), range(4, 8_196)
    between = [[token] for token in [*sequence.action_block([10_006] * 7, V), V.eot]]
    small_frame = sequence.image_slots(2, 2, V)
    for slots in (
        [*small_frame, [V.eot], *between, *small_frame, [V.eot]],
        [code, *between[:-1], code, *small_frame],
    ):
        prompts = [history(rng), random_prompt(rng)]
        expected = [fill(Decoder(model, prompt, attention=attention), slots) for prompt in prompts]
        assert decode_frames(model, prompts, slots, attention=attention) == expected


def test_a_turn_that_ends_early_needs_no_room_for_a_frame():
    slots = [*sequence.image_slots(2, 2, V), [V.eot]]
    for length in (185, 191):
        prompt = [0, *[16_400 + i % 99 for i in range(length - 2)], V.eot]
        model = slot_model(slots, [length], 0, V.eot)
        assert continue_freely(Decoder(model, prompt), V.eot) == [V.eot]
        assert continue_frames(model, [prompt], slots, V.eot) == [[V.eot]]
        with pytest.raises(SequenceLengthError, match="11 to come; the model has 192 positions"):
            decode_frames(model, [prompt], slots)
    model = slot_model(slots, [185])  # it goes on until there is no room
    expected = outcome(lambda: [continue_freely(Decoder(model, prompt[-185:]), V.eot)])
    assert expected[0] == "UnfinishedAnswerError"
    assert outcome(lambda: continue_frames(model, [prompt[-185:]], slots, V.eot)) == expected


@pytest.mark.parametrize("drafted", [False, True])
def test_the_first_end_of_turn_ends_the_answer(drafted):
    small_frame = [*sequence.image_slots(2, 2, V), [V.eot]]
    slots, prompt = [*small_frame, *small_frame], random_prompt(random.Random(0))
    model = slot_model(slots, [len(prompt)])
    expected = continue_freely(Decoder(model, prompt), V.eot)
    assert len(expected) == len(small_frame)
    draft = repeat([*expected, *expected]) if drafted else None
    assert continue_frames(model, [prompt], slots, V.eot, draft=draft) == [expected]


def test_slots_that_cannot_be_filled_are_refused_before_any_pass(model, passes):
    for slot, message in (
        ([16_640], "slot 1: ids 16640 … 16640 wanted; .* 0 … 16639"),
        ([-1], "slot 1: ids -1 … -1 wanted"),
        ([], "slot 1: a position allows 0 ids"),
    ):
        for decode in (decode_frames, lambda *a: continue_frames(*a, V.eot)):
            with pytest.raises(DecodingError, match=message):
                decode(model, [[0]], [[V.boi], slot, [V.eot]])
        with pytest.raises(DecodingError, match=message):
            fill(Decoder(model, [0]), [[V.boi], slot, [V.eot]])
    with pytest.raises(DecodingError, match="slot 1: ids 16640"):
        continue_frames(model, [[0]], [[V.boi]], 16_640)
    assert not passes


def test_free_frames_are_checked_in_the_passes_that_they_need_anyway(passes):
    prompt = random_prompt(random.Random(0))
    model = slot_model(FRAME, [len(prompt)])
    expected = continue_freely(Decoder(model, prompt, attention="causal"), V.eot)
    assert len(expected) == len(FRAME)
    forward, count = model.model.forward, []
    model.model.forward = lambda *a, **k: count.append(1) or forward(*a, **k)
    for draft, most in ((None, CODES + 1), (repeat(expected), 3)):
        count.clear()
        assert continue_frames(model, [prompt], FRAME, V.eot, draft=draft, attention="causal") == [expected]
        assert len(count) <= most


def test_free_frames_in_a_batch():
    rng = random.Random(1)
    prompts = [random_prompt(rng, images=3) for _ in range(3)]
    expected = []
    for prompt in prompts:
        model = slot_model(FRAME, [len(prompt)], 9, V.boa)
        expected.append(continue_freely(Decoder(model, prompt, attention="causal"), V.eot))
    model = slot_model(FRAME, [len(prompt) for prompt in prompts], 9, V.boa)
    rows = decode_rows_until_they_leave(model, prompts)
    assert [answer[: len(row)] for answer, row in zip(expected, rows, strict=True)] == rows


def decode_rows_until_they_leave(model, prompts):
    """The model of a batch has no meaning one prompt at a time, so the rest is not asked for."""
    from worldvla_model.decoding.frames import GREEDY, _decode

    rows = _decode(model, prompts, FRAME, V.eot, None, GREEDY, "causal", None)
    assert all(row.decided[-1] not in FRAME[len(row.decided) - 1] for row in rows)
    return [row.decided for row in rows]


def test_a_rollout_shares_one_cache(model, passes):
    """Frame, action, frame, action, frame: each drafted from the one before it."""
    rng = random.Random(2)
    prompt = random_prompt(rng)
    between = [*sequence.action_block([10_006 + 9 * d for d in range(7)], V), V.eot]
    slots = [*FRAME, *[[token] for token in between], *FRAME, *[[token] for token in between], *FRAME]
    expected = fill(Decoder(model, prompt, attention="causal"), slots)
    period = len(FRAME) + len(between)
    passes.clear()
    draft = repeat(expected[: len(FRAME)], period=period)
    assert decode_frames(model, [prompt], slots, draft=draft, attention="causal") == [expected]
    assert len(passes) <= 3 * CODES
    # What the draft says of later frames are the frames before them.
    assert draft(prompt, expected[:3]) == expected[3 : len(FRAME)]
    assert draft(prompt, expected[: period + 5])[:4] == expected[5:9]
    assert draft(prompt, expected[: 2 * period])[:9] == expected[period : period + 9]


def test_a_good_draft_saves_passes_and_a_bad_one_costs_none(model, passes):
    rng = random.Random(0)
    prompt = random_prompt(rng)
    expected = one_by_one(model, prompt)
    counts = {}
    for agreement in (None, 0, 1):
        passes.clear()
        draft = None if agreement is None else repeat(spoiled(expected, agreement, rng))
        decode_frames(model, [prompt], FRAME, draft=draft, attention="causal")
        counts[agreement] = len(passes)
    assert counts[None] == CODES  # begin, grid, new-line, end and end of turn cost no pass
    assert counts[0] <= CODES
    assert counts[1] <= 4


def test_what_the_model_said_after_a_wrong_guess_is_a_guess_too():
    """Of a model that says the same whatever it has seen, all of it holds."""
    rng, codes = random.Random(9), 64
    slots, prompt = [*sequence.image_slots(8, 8, V), [V.eot]], random_prompt(rng)
    model, tell = scripted_model(16_640, 192)
    expected = [slot[0] if len(slot) == 1 else rng.choice(slot) for slot in slots]
    tell(len(prompt), expected)
    draft = [token if rng.random() < 0.5 or len(s) == 1 else 5 for token, s in zip(expected, slots, strict=True)]
    workspace = Workspace(model)
    assert decode_frames(model, [prompt], slots, draft=repeat(draft), workspace=workspace) == [expected]
    wrong = sum(token != guess for token, guess in zip(expected, draft, strict=True))
    assert wrong > codes / 3
    assert workspace.passes < 0.8 * wrong  # by the draft alone each wrong guess costs a pass


def test_a_batch_gives_what_each_of_its_prompts_gives_alone(model):
    rng = random.Random(3)
    prompts = [random_prompt(rng, images=3) for _ in range(5)]
    alone = [one_by_one(model, prompt) for prompt in prompts]
    assert decode_frames(model, prompts, FRAME, attention="causal") == alone

    def right_for_some(prompt, decided):
        place = prompts.index(prompt)
        return alone[place][len(decided) :] if place % 2 else [5] * 40

    assert decode_frames(model, prompts, FRAME, draft=right_for_some, attention="causal") == alone


def test_a_draft_that_does_not_fit_is_cut(model):
    prompt = random_prompt(random.Random(4))
    expected = one_by_one(model, prompt)
    for guesses in ([], [V.boa], [*expected, *expected], expected[:5]):
        draft = repeat(guesses)
        assert decode_frames(model, [prompt], FRAME, draft=draft, attention="causal") == [expected]


def test_drawn_codes_are_distributed_as_without_a_draft(model):
    prompt = random_prompt(random.Random(5))
    draws = 300
    sampling = Sampling(temperature=1.0, top_k=4, generator=torch.Generator().manual_seed(0))
    draft = repeat(one_by_one(model, prompt))
    shares = []
    for used in (draft, None):
        answers = []
        for _ in range(draws // 50):
            answers += decode_frames(
                model, [prompt] * 50, FRAME[:6], draft=used, sampling=sampling, attention="causal"
            )
        shares.append([[answer[place] for answer in answers] for place in (3, 5)])
    for first, second in zip(*shares, strict=True):
        for token in {*first, *second}:
            a, b = first.count(token) / draws, second.count(token) / draws
            mean = (a + b) / 2
            assert abs(a - b) < 4.5 * (2 * mean * (1 - mean) / draws) ** 0.5


def test_the_published_generations(published, agent):
    slots = [*sequence.image_slots(8, 8, V), [V.eot]]
    for reference in published.json("generations"):
        if reference["kind"] == "world":
            for draft in (None, repeat(reference["generated"])):
                found = decode_frames(agent.model, [reference["prompt"]], slots, draft=draft, attention="causal")
                assert found == [reference["generated"]]
                found = continue_frames(
                    agent.model, [reference["prompt"]], slots, V.eot, draft=draft, attention="causal"
                )
                assert found == [reference["generated"]]


def test_slots_may_differ_from_place_to_place(model):
    rng = random.Random(6)
    slots = [[V.boi], range(4, 40), [50, 60, 70, 80], range(100, 8_000), [5], [6, 7]]
    for guesses in (None, [V.boi, 5, 60, 200, 5, 7]):
        prompt = random_prompt(rng)
        expected = fill(Decoder(model, prompt, attention="causal"), slots)
        draft = None if guesses is None else repeat(guesses)
        assert decode_frames(model, [prompt], slots, draft=draft, attention="causal") == [expected]


def test_no_room_is_said_before_any_pass(model, passes):
    with pytest.raises(
        SequenceLengthError, match="a prompt of 500 ids and 25 to come; the model has 512 positions"
    ):
        decode_frames(model, [[0] * 500], FRAME)
    assert not passes
