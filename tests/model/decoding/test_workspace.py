import functools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from grammar_models import GRAMMAR, V, grammar_model, random_prompt
from mixed_calls import answer, calls, make_models
from torch._dynamo.testing import CompileCounter

from worldvla_model import DecodingError
from worldvla_model.decoding import Workspace, decode_chunks, decode_frames
from worldvla_tokenizers import sequence


@pytest.fixture
def fed(monkeypatch):
    """Numbers of tokens in each pass."""
    model, counts = grammar_model(0, ends=1.5), []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda *a, **k: counts.append(k["input_ids"].shape[1]) or forward(*a, **k)
    )
    return model, counts


def prompt_of(words, images, rng):
    blocks = [
        sequence.image_block([[rng.randrange(8_192) for _ in range(2)] for _ in range(2)], V)
        for _ in range(images)
    ]
    return [0, *words, *(token for block in blocks for token in block), V.eot]


def test_words_are_read_once(fed):
    model, counts = fed
    rng, words = random.Random(0), [16_400 + i for i in range(12)]
    prompts = [prompt_of(words, images, rng) for images in (1, 2, 2)]
    alone = [decode_chunks(model, [prompt], GRAMMAR, num_actions=2)[0] for prompt in prompts]
    workspace = Workspace(model)
    counts.clear()
    for prompt, expected in zip(prompts, alone, strict=True):
        assert decode_chunks(model, [prompt], GRAMMAR, num_actions=2, workspace=workspace) == [expected]
    begun = [counts[pass_] for pass_ in (0, 7, 14)]
    known = 1 + len(words)
    assert begun == [len(prompt) + 2 - (known if i else 0) for i, prompt in enumerate(prompts)]
    assert workspace.reused == 2
    # A prompt without an image, one with other words, and one with the same, in one batch.
    mixed = [[0, *words], prompt_of(words[::-1], 1, rng), prompts[0]]
    expected = [decode_chunks(model, [prompt], GRAMMAR, num_actions=2)[0] for prompt in mixed]
    assert decode_chunks(model, mixed, GRAMMAR, num_actions=2, workspace=workspace) == expected
    assert workspace.reused == 3


def test_words_under_another_mask_are_read_anew():
    model, rng = grammar_model(0), random.Random(0)
    workspace, prompt = Workspace(model), random_prompt(rng)
    for attention, reused in (("causal", 0), ("action_isolated", 0), ("causal", 1)):
        decode_chunks(model, [prompt], GRAMMAR, num_actions=1, workspace=workspace, attention=attention)
        assert workspace.reused == reused


def test_the_words_not_used_for_longest_go():
    model, rng = grammar_model(0), random.Random(0)
    workspace = Workspace(model, prefixes=2)
    first, second, third = (prompt_of([16_400 + i], 1, rng) for i in range(3))
    for prompt in (first, second, first, third, first, second):
        decode_chunks(model, [prompt], GRAMMAR, num_actions=1, workspace=workspace)
    assert workspace.reused == 2  # the third and the fifth


def test_after_a_change_of_weights_forgetting_helps():
    model, rng = grammar_model(0), random.Random(0)
    workspace, prompt = Workspace(model), random_prompt(rng)
    decode_chunks(model, [prompt], GRAMMAR, num_actions=3, workspace=workspace)
    model.load_state_dict(grammar_model(1).state_dict())
    workspace.forget()
    expected = decode_chunks(model, [prompt], GRAMMAR, num_actions=3)
    assert decode_chunks(model, [prompt], GRAMMAR, num_actions=3, workspace=workspace) == expected


# Lengths of every remainder, and the round ones, which compilers like to treat apart; and two hundred in a row.
@pytest.mark.parametrize(
    "lengths", [(*range(3, 161, 13), *range(16, 161, 32)), pytest.param(range(3, 203), marks=pytest.mark.slow)]
)
def test_no_length_of_a_prompt_costs_a_compilation(lengths):
    model, rng, counter = grammar_model(0, ends=1.5, positions=256), random.Random(0), CompileCounter()
    workspace = Workspace(model, slots=240, backend=counter)
    frame = [*sequence.image_slots(2, 2, V), [V.eot]]

    def both(prompt, **where):
        chunk = decode_chunks(model, [prompt], GRAMMAR, num_actions=3, **where)
        return chunk, decode_frames(model, [prompt], frame, **where)

    both([0, 16_400, V.eot], workspace=workspace)
    warm = counter.frame_count
    assert warm >= 2
    for length in lengths:
        prompt = [0, *[rng.randrange(16_388, 16_640) for _ in range(length - 2)], V.eot]
        found = both(prompt, workspace=workspace)
        if length % 16 == 0:
            assert found == both(prompt)
    for _ in range(10):
        prompt = random_prompt(rng)
        assert both(prompt, workspace=workspace) == both(prompt)
    assert counter.frame_count == warm


@pytest.mark.slow
def test_the_default_compiler_gives_the_same():
    model, rng = grammar_model(0, ends=1.5), random.Random(0)
    workspace = Workspace(model, slots=160)
    for batch in (2, 2, 1, 3, 2, 1):
        prompts = [random_prompt(rng) for _ in range(batch)]
        expected = decode_chunks(model, prompts, GRAMMAR, num_actions=3)
        assert decode_chunks(model, prompts, GRAMMAR, num_actions=3, workspace=workspace) == expected


@pytest.mark.parametrize(
    ("count", "slots"),
    [
        (40, None),
        (40, 64),
        pytest.param(1_000, None, marks=pytest.mark.campaign),
        pytest.param(1_000, 64, marks=pytest.mark.campaign),
    ],
)
def test_mixed_calls_leave_no_state_behind(count, slots, monkeypatch):
    """On one workspace, in any order, and without one the other way; campaigns do that in a process of its own."""
    if slots and count < 100:  # all but the compiler itself
        monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    models, kept = make_models(), {}
    # Some calls fit into the slots and some do not.
    workspaces = [Workspace(model, prefixes=3, slots=slots, **compiler(slots)) for model in models]
    todo = list(enumerate(calls(count)))
    random.Random(0).shuffle(todo)
    for number, call in todo:
        kept[str(number)] = answer(models, call, workspaces)
    expected = answers_that_nothing_is_kept_for(count) if count < 100 else answers_of_a_fresh_process(count)
    assert kept == json.loads(expected)
    assert sum(workspace.reused for workspace in workspaces) > count / 10


@functools.cache
def answers_that_nothing_is_kept_for(count):
    models = make_models()  # others than those that have a workspace
    return json.dumps(
        {number: answer(models, call, None) for number, call in reversed(list(enumerate(calls(count))))}
    )


@functools.cache
def answers_of_a_fresh_process(count):
    work = [sys.executable, str(Path(__file__).parent / "mixed_calls.py"), str(count)]
    return subprocess.run(work, capture_output=True, text=True, check=True).stdout


def compiler(slots):
    return {} if slots is None else {"backend": "eager"}


def test_one_allocation_serves_batches_of_all_sizes(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    model, rng = grammar_model(0), random.Random(0)
    workspace = Workspace(model, slots=100)
    for batch in (1, 3, 2, 8, 5, 1):
        prompts = [random_prompt(rng, images=1) for _ in range(batch)]
        expected = decode_chunks(model, prompts, GRAMMAR, num_actions=2)
        assert decode_chunks(model, prompts, GRAMMAR, num_actions=2, workspace=workspace) == expected
    parts = {batch: workspace.cache(batch, 50) for batch in (1, 3, 5, 8)}
    assert [len(parts[batch]) for batch in parts] == [1, 4, 8, 8]
    assert parts[5] is parts[8]
    assert len({part.layers[0].data_ptr() for part in parts.values()}) == 1
    assert all(part.compiled for part in parts.values())


def test_a_query_that_needs_more_slots_is_not_compiled():
    model, prompt, counter = grammar_model(0), random_prompt(random.Random(0)), CompileCounter()
    workspace = Workspace(model, slots=len(prompt) + 10, backend=counter)
    expected = decode_chunks(model, [prompt], GRAMMAR, num_actions=2)
    assert decode_chunks(model, [prompt], GRAMMAR, num_actions=2, workspace=workspace) == expected
    assert counter.frame_count == 0
    assert not workspace.cache(1, len(prompt) + 11).compiled


def test_autocast(small):
    """Keys and values then come in another type than the weights'."""
    prompt = [0, 16_400, *sequence.image_block([[1, 2], [3, 4]], V), V.eot]
    workspace = Workspace(small)
    plain = decode_chunks(small, [prompt], GRAMMAR, num_actions=2, workspace=workspace)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (answer,) = decode_chunks(small, [prompt], GRAMMAR, num_actions=2, workspace=workspace)
    assert len(sequence.actions_of(sequence.parse(answer, V))) == 2
    assert workspace.reused == 0  # words read in one type are not taken for those in another
    assert decode_chunks(small, [prompt], GRAMMAR, num_actions=2, workspace=workspace) == plain


def test_nothing_is_kept_where_nothing_is_to_be(small):
    prompt = [0, 16_400, *sequence.image_block([[1, 2], [3, 4]], V), V.eot]
    workspace = Workspace(small, prefixes=0)
    cache = workspace.cache(1, 40)
    cache.layers = None  # not even looked at
    workspace.keep(cache, [prompt], "causal")
    assert workspace.load(cache, [prompt], "causal") == [0]


def test_bad_requests():
    model, other = grammar_model(0), grammar_model(1)
    with pytest.raises(DecodingError, match=r"slots is 0; allowed: 1 … 192 \(max_position_embeddings\), or None"):
        Workspace(model, slots=0)
    with pytest.raises(DecodingError, match="slots is 193"):
        Workspace(model, slots=193)
    with pytest.raises(DecodingError, match="prefixes is -1; allowed: 0 and above"):
        Workspace(model, prefixes=-1)
    with pytest.raises(DecodingError, match="the workspace belongs to another model"):
        decode_chunks(model, [[0]], GRAMMAR, num_actions=1, workspace=Workspace(other))


def test_keys_and_values_do_not_outlive_the_inference(small):
    """Tensors made under inference mode must not come back in training."""
    prompt = [0, 16_400, *sequence.image_block([[1, 2], [3, 4]], V), V.eot]
    workspace = Workspace(small)
    decode_chunks(small, [prompt], GRAMMAR, num_actions=1, workspace=workspace)
    ids = torch.tensor([prompt])
    small(ids, labels=ids).loss.backward()
    decode_chunks(small, [prompt], GRAMMAR, num_actions=1, workspace=workspace)
    assert workspace.reused == 1
