import random
from collections import Counter

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from grammar_models import GRAMMAR, V, grammar_model, outcome, random_prompt, slot_model, telling_model

from worldvla_model import DecodingError, Sampling, SequenceLengthError
from worldvla_model.decoding import (
    GREEDY,
    ChunkGrammar,
    Decoder,
    PlacedSequences,
    Workspace,
    chunks,
    continue_chunks,
    continue_freely,
    decode_chunks,
    decode_frames,
    fill_chunk,
)
from worldvla_model.masks import MaskError
from worldvla_tokenizers import sequence


def compare(models, prompts_per_model):
    """How answers ended, once all of them were found equal."""
    seen = Counter()
    for seed in range(models):
        model = grammar_model(seed, leaves=(0, 0.02, 0.1)[seed % 3], ends=(1.0, 1.2, 1.5)[seed // 3 % 3])
        rng = random.Random(seed)
        for _ in range(prompts_per_model):
            prompt, speculated = random_prompt(rng), rng.randrange(1, 17)
            expected = outcome(lambda model=model, prompt=prompt: continue_freely(Decoder(model, prompt), V.eot))
            found = outcome(
                lambda model=model, prompt=prompt, k=speculated: continue_chunks(
                    model, [prompt], GRAMMAR, speculated=k
                )[0]
            )
            assert found == expected, f"model {seed}, {speculated} speculated, prompt {prompt}"
            if isinstance(expected, list):
                kept, state = GRAMMAR.confirm(expected)
                seen[state] += 1
                seen[f"at {(len(kept) - 1) % 9}"] += state == "left"
            else:
                seen[expected[0]] += 1
    return seen


def test_free_answers_equal_those_of_one_token_after_the_other():
    seen = compare(18, 3)
    assert seen["ended"] >= 15


@pytest.mark.campaign
def test_a_thousand_free_answers_equal_those_of_one_token_after_the_other():
    seen = compare(200, 5)
    assert seen["ended"] >= 300
    for place in range(9):  # begin, seven dimensions, end: the grammar was left at each of them
        assert seen[f"at {place}"] >= 1, seen


@pytest.mark.parametrize(
    ("actions", "cases"),
    [(1, 3), (5, 3), (16, 2), *(pytest.param(k, 64, marks=pytest.mark.campaign) for k in range(1, 17))],
)
def test_free_chunks_of_any_length_that_leave_the_grammar_anywhere(actions, cases):
    """Models that end after so many actions, or say something else before."""
    rng, slots = random.Random(actions), [*list(GRAMMAR.slots) * actions, [V.eot]]
    for case in range(cases):
        prompt = random_prompt(rng, images=1)
        place = rng.randrange(len(slots)) if case else None
        says = rng.choice([V.eot, V.boa, V.eoa, V.boi, V.eoi, V.newline, 16_500, 10_007, 5])
        model = slot_model(slots, [len(prompt)], place, says if case else None, seed=case)
        decoder = Decoder(model, prompt)
        expected = outcome(lambda decoder=decoder: [continue_freely(decoder, V.eot)])
        found = outcome(
            lambda model=model, prompt=prompt: continue_chunks(
                model, [prompt], GRAMMAR, speculated=rng.choice([1, 3, 10, 16])
            )
        )
        assert found == expected, f"{place} of {len(slots)}, {says}"
        if place is None:
            assert len(expected[0]) == len(slots)


@pytest.mark.parametrize("num_actions", [1, 3, None])
@pytest.mark.parametrize("attention", ["action_isolated", "causal", "first_image_only"])
def test_constrained_chunks_equal_those_of_one_token_after_the_other(num_actions, attention):
    for seed in range(4):
        model, rng = grammar_model(seed, leaves=0.1, ends=1.1), random.Random(seed)
        prompts = [random_prompt(rng) for _ in range(3)]

        def one_by_one(model=model, prompts=prompts):
            decoders = [Decoder(model, prompt, attention=attention) for prompt in prompts]
            return [fill_chunk(decoder, GRAMMAR, num_actions=num_actions) for decoder in decoders]

        found = outcome(
            lambda model=model, prompts=prompts: decode_chunks(
                model, prompts, GRAMMAR, num_actions=num_actions, attention=attention
            )
        )
        assert found == outcome(one_by_one)


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.campaign)])
def test_constrained_chunks_always_parse(count):
    rng = random.Random(0)
    for batch in range(count // 50):
        model = grammar_model(batch, leaves=(0.0, 0.1, 0.5)[batch % 3], ends=1.3)
        prompts = [random_prompt(rng, images=1) for _ in range(50)]
        actions = rng.randrange(1, 17)
        for answer in decode_chunks(model, prompts, GRAMMAR, num_actions=actions):
            blocks = sequence.parse(answer, V)
            assert [type(block) for block in blocks] == [sequence.ActionBlock] * actions + [sequence.Marker]


def test_passes_do_not_depend_on_the_number_of_actions(monkeypatch):
    model, prompt = grammar_model(0, ends=2.0), random_prompt(random.Random(0))
    passes = []
    forward = type(model.model).forward
    monkeypatch.setattr(type(model.model), "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
    for num_actions in (1, 5, 10):
        passes.clear()
        decode_chunks(model, [prompt], GRAMMAR, num_actions=num_actions)
        assert len(passes) == 7
        passes.clear()
        continue_chunks(model, [prompt], GRAMMAR, speculated=num_actions)
        assert len(passes) == 8


@pytest.mark.parametrize("actions", [11, 16])
def test_eight_passes_for_chunks_that_nobody_has_said_the_length_of(actions):
    slots, prompt = [*list(GRAMMAR.slots) * actions, [V.eot]], random_prompt(random.Random(0), images=1)
    model = slot_model(slots, [len(prompt)])
    for decode in (continue_chunks, decode_chunks):
        workspace = Workspace(model)
        (answer,) = decode(model, [prompt], GRAMMAR, workspace=workspace)
        assert len(answer) == len(slots)
        assert workspace.passes == 8


def test_as_many_actions_as_were_allowed_and_no_more():
    slots, prompt = [*list(GRAMMAR.slots) * 5, [V.eot]], random_prompt(random.Random(0), images=1)
    model = slot_model(slots, [len(prompt)])
    (expected,) = decode_chunks(model, [prompt], GRAMMAR)
    assert decode_chunks(model, [prompt], GRAMMAR, max_actions=5) == [expected]
    assert fill_chunk(Decoder(model, prompt), GRAMMAR, max_actions=5) == expected
    for most in (1, 4):
        with pytest.raises(DecodingError, match=f"after {most} actions"):
            decode_chunks(model, [prompt], GRAMMAR, max_actions=most)
        with pytest.raises(DecodingError, match=f"after {most} actions"):
            fill_chunk(Decoder(model, prompt), GRAMMAR, max_actions=most)


def apart_after_two_images(query, key):
    """Keeps actions apart, but only in prompts of two images."""
    earlier = (key.action >= 0) & (key.action < query.action)
    return (key.position <= query.position) & ~((query.action >= 0) & (query.last_image > 0) & earlier)


@pytest.mark.parametrize("num_actions", [3, None])
def test_a_mask_may_keep_actions_apart_after_some_prompts_only(num_actions):
    rng = random.Random(5)
    prompts = [prompt for prompt in (random_prompt(rng) for _ in range(9)) if len(prompt) < 40][:4]
    assert len({prompt.count(V.boi) for prompt in prompts}) == 2
    model, where = grammar_model(3, ends=1.5), {"attention": apart_after_two_images}
    expected = [fill_chunk(Decoder(model, p, **where), GRAMMAR, num_actions=num_actions) for p in prompts]
    for order in (prompts, prompts[::-1]):
        found = decode_chunks(model, order, GRAMMAR, num_actions=num_actions, **where)
        assert found == [expected[prompts.index(prompt)] for prompt in order]
    if num_actions is None:
        expected = [continue_freely(Decoder(model, prompt, **where), V.eot) for prompt in prompts]
        assert continue_chunks(model, prompts, GRAMMAR, **where) == expected


def test_passes_of_one_token_after_the_other_count():
    model, prompt = grammar_model(0, ends=2.0), random_prompt(random.Random(0))
    for decode, alone in (
        (decode_chunks, lambda decoder: fill_chunk(decoder, GRAMMAR)),
        (continue_chunks, lambda decoder: continue_freely(decoder, V.eot)),
    ):
        workspace, decoder = Workspace(model), Decoder(model, prompt, attention="causal")
        assert decode(model, [prompt], GRAMMAR, attention="causal", workspace=workspace) == [alone(decoder)]
        assert workspace.passes == decoder.passes


@pytest.mark.parametrize("models", [6, pytest.param(60, marks=pytest.mark.campaign)])
def test_what_follows_an_image_that_nobody_expected(models):
    """Actions have entered before it was known that they are not the last of the sequence."""
    for seed in range(models):
        rng = random.Random(seed)
        prompt = random_prompt(rng, images=1)
        actions = [sequence.action_block([10_006 + rng.randrange(200) for _ in range(7)], V) for _ in range(2)]
        told = [*actions[0], *actions[1], V.boi]
        model = telling_model(seed, {len(prompt) + i: token for i, token in enumerate(told)}, len(prompt) + 40)
        expected = outcome(lambda model=model, prompt=prompt: [continue_freely(Decoder(model, prompt), V.eot)])
        found = outcome(lambda model=model, prompt=prompt: continue_chunks(model, [prompt], GRAMMAR))
        assert found == expected
        assert expected[0][:19] == told


def test_prompts_that_leave_a_block_open():
    model, rng = grammar_model(0), random.Random(0)
    prompts = [[*random_prompt(rng, images=1), *more] for more in ([V.boa, 10_007], [V.eoi])]
    for prompt in prompts:
        expected = outcome(lambda prompt=prompt: [continue_freely(Decoder(model, prompt), V.eot)])
        assert outcome(lambda prompt=prompt: continue_chunks(model, [prompt], GRAMMAR)) == expected


@pytest.mark.parametrize("split", [False, True])
def test_weights_that_are_brought_and_taken_away(split):
    """As `device_map` leaves a model of which parts do not fit into memory."""
    model, rng = grammar_model(0, ends=1.5), random.Random(0)
    prompts, slots = [random_prompt(rng) for _ in range(2)], [*sequence.image_slots(2, 2, V), [V.eot]]

    def answers():
        decoder = Decoder(model, prompts[0])
        return [
            decode_chunks(model, prompts, GRAMMAR, num_actions=2),
            decode_chunks(model, prompts, GRAMMAR, num_actions=2, workspace=Workspace(model)),
            continue_chunks(model, prompts, GRAMMAR),
            decode_frames(model, prompts, slots, attention="causal"),
            fill_chunk(decoder, GRAMMAR, num_actions=2),
        ]

    expected = answers()
    if split:  # the head alone
        kept = {name: value.detach().clone() for name, value in model.lm_head.state_dict().items()}
        add_hook_to_module(model.lm_head, AlignDevicesHook("cpu", offload=True, weights_map=kept))
    else:
        cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.device.type == "meta"
    assert answers() == expected
    with pytest.raises(DecodingError, match="slots is 99, but device_map has spread or offloaded the model"):
        Workspace(model, slots=99)


def test_a_batch_gives_what_each_of_its_prompts_gives_alone():
    model, rng = grammar_model(1, leaves=0.05, ends=1.1), random.Random(1)
    prompts = [random_prompt(rng, images=3) for _ in range(6)]
    assert len({len(prompt) for prompt in prompts}) > 2
    alone = [decode_chunks(model, [prompt], GRAMMAR, num_actions=4)[0] for prompt in prompts]
    assert decode_chunks(model, prompts, GRAMMAR, num_actions=4) == alone


def test_the_published_generations(published, model):
    references = [r for r in published.json("generations") if r["kind"] == "action"]
    grammar = ChunkGrammar(sequence.action_slots(7, V), V.eot)
    prompts = [r["prompt"] for r in references]
    expected = [r["generated"] for r in references]
    assert continue_chunks(model, prompts, grammar) == expected
    assert decode_chunks(model, prompts, grammar) == expected
    for reference in references:
        actions = (len(reference["generated"]) - 1) // 9
        (found,) = decode_chunks(model, [reference["prompt"]], grammar, num_actions=actions)
        assert found == reference["generated"]


def test_drawn_values_are_distributed_as_those_of_one_token_after_the_other():
    model, prompt = grammar_model(2, ends=1.2), random_prompt(random.Random(2))
    sampling = Sampling(temperature=1.0, generator=torch.Generator().manual_seed(0))
    draws = 100
    together = decode_chunks(model, [prompt] * draws, GRAMMAR, num_actions=2, sampling=sampling)
    apart = [fill_chunk(Decoder(model, prompt, sampling=sampling), GRAMMAR, num_actions=2) for _ in range(draws)]
    for place in (1, 7, 10, 16):  # first and last dimension of both actions; 4.5 standard errors
        counts = [Counter(answer[place] for answer in answers) for answers in (together, apart)]
        for token in counts[0] | counts[1]:
            shares = [count[token] / draws for count in counts]
            mean = sum(shares) / 2
            assert abs(shares[0] - shares[1]) < 4.5 * (2 * mean * (1 - mean) / draws) ** 0.5


def test_free_values_are_drawn_with_the_probabilities_of_the_model():
    """Those of the second dimension by what was drawn for the first; in the second action too."""
    model, prompt = grammar_model(2, ends=-3.0), random_prompt(random.Random(2), images=1)
    sampling = Sampling(temperature=0.4, generator=torch.Generator().manual_seed(0))
    draws = 250
    answers = continue_after_two_actions(model, [prompt] * draws, sampling)
    checked = 0
    for begin in (0, 9):
        groups = {}
        for answer in answers:
            if answer[begin] == V.boa:
                groups.setdefault(tuple(answer[: begin + 2]), []).append(answer[begin + 2])
        if begin:  # the first action is nothing to the second
            merged = {}
            for known, drawn in groups.items():
                merged.setdefault((*answers[0][:9], *known[9:]), []).extend(drawn)
            groups = merged
        assert len(groups) > 2
        for known, drawn in groups.items():
            with torch.inference_mode():
                logits = model(torch.tensor([[*prompt, *known]]), logits_to_keep=1).logits[0, -1]
            likely = (logits / sampling.temperature).softmax(-1)
            counts = Counter(drawn)
            for token in _likeliest(likely):
                share, chance = counts[token] / len(drawn), float(likely[token])
                assert abs(share - chance) < 4.5 * (chance * (1 - chance) / len(drawn)) ** 0.5 + 1 / len(drawn)
                checked += 1
    assert checked > 20


def _likeliest(likely):
    return likely.topk(6).indices.tolist()


def continue_after_two_actions(model, prompts, sampling):
    """What was drawn for two actions: the rest is not asked for."""
    blocks = chunks._Blocks(model, prompts, GRAMMAR, 2, None, None)
    return blocks.say(sampling, begun=False)


def test_bad_requests():
    model = grammar_model(0)
    with pytest.raises(DecodingError, match="num_actions is 0; allowed: 1 and above, or None"):
        decode_chunks(model, [[0]], GRAMMAR, num_actions=0)
    with pytest.raises(DecodingError, match="speculated is 0; allowed: 1 and above"):
        continue_chunks(model, [[0]], GRAMMAR, speculated=0)
    with pytest.raises(DecodingError, match=r"max_actions is 0; allowed: 1 and above$"):
        decode_chunks(model, [[0]], GRAMMAR, max_actions=0)
    for slots, end, place in (
        ([[V.boa], range(20_000, 20_010), [V.eoa]], V.eot, 1),
        ([[16_640], range(9), [V.eoa]], V.eot, 0),
        ([[V.boa], [7, 3, 16_640], [V.eoa]], V.eot, 1),
        ([[V.boa], range(9), [V.eoa]], 16_640, 3),
    ):
        for decode in (decode_chunks, continue_chunks):
            with pytest.raises(DecodingError, match=rf"slot {place}: ids .* wanted; .* 0 … 16639"):
                decode(model, [[0]], ChunkGrammar(slots, end))
    with pytest.raises(DecodingError, match="slot 1: a position allows 0 ids; at least 1 needed"):
        decode_chunks(model, [[0]], ChunkGrammar([[V.boa], [], [V.eoa]], V.eot))
    with pytest.raises(MaskError, match="attention is 'none'"):
        decode_chunks(model, [[0]], GRAMMAR, attention="none")
    with pytest.raises(DecodingError, match="0 prompts"):
        decode_chunks(model, [], GRAMMAR, num_actions=1)
    with pytest.raises(
        SequenceLengthError, match="a prompt of 180 ids and 19 to come; the model has 192 positions"
    ):
        decode_chunks(model, [[0] * 180], GRAMMAR, num_actions=2)
    with pytest.raises(DecodingError, match="an action block needs"):
        ChunkGrammar([range(3), range(4), [5]], 6)


@pytest.mark.parametrize("among", [None, range(5, 12), [7, 9]])
def test_logits_of_a_model_in_fp64_are_compared_in_fp64(small, among):
    """Two that are one number in fp32."""
    placed = PlacedSequences(small.double(), [[1]], [2])
    with torch.no_grad():
        small.lm_head.weight.zero_()
        small.lm_head.weight[7, 0], small.lm_head.weight[9, 0] = 5_000, 5_000 + 1e-5
    states = torch.eye(1, small.config.hidden_size, dtype=torch.float64)
    assert placed.choose(states, GREEDY, among).tolist() == [9]
