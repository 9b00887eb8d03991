"""Small models that keep to the grammar of chunks for a while, and leave it anywhere."""

import random

import torch

from worldvla_model import SequenceLengthError, WorldVLAConfig, WorldVLAForConditionalGeneration
from worldvla_model.decoding import ChunkGrammar, UnfinishedAnswerError
from worldvla_model.masks import MaskError
from worldvla_tokenizers import Vocabulary, sequence

V = Vocabulary.published()
DIMENSIONS = 7
GRAMMAR = ChunkGrammar(sequence.action_slots(DIMENSIONS, V), V.eot)
VALUES = 6  # different values of each dimension

# What follows what: eot (of the prompt), begin, dimension 1 … 7, end.
_STEPS = [
    [V.eot],
    [V.boa],
    *[[10_006 + 30 * d + r for r in range(VALUES)] for d in range(DIMENSIONS)],
    [V.eoa],
]


def grammar_model(seed, *, leaves=0.0, ends=0.3, positions=192):
    """A model that says begin, a value of each dimension, end, then begin or end of turn.

    Which values it says depends, through attention with random weights, on the prompt and the block so far.

    Args:
        seed: of all weights.
        leaves: share of tokens after which it says something out of place.
        ends: how much it likes to end its turn after an action.
        positions: its longest sequence.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    width = 48
    config = WorldVLAConfig(
        vocab_size=16_640,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=positions,
        initializer_range=0.1,
    )
    model = WorldVLAForConditionalGeneration(config).eval().double()  # in fp32 near ties could fall either way
    with torch.no_grad():
        marks = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.normal_(std=0.3)
        head.normal_(std=0.02)
        for place, ids in enumerate(_STEPS):
            embedding[ids] += 8 * marks[place]
            following = _STEPS[(place + 1) % len(_STEPS)]
            head[following] += 2 * marks[place]
        for token in {token for ids in _STEPS for token in ids}:  # which of them depends on all before it
            head[token] += 0.3 * torch.randn(width, dtype=torch.float64)
        head[V.boa] += 2 * marks[len(_STEPS) - 1]
        head[V.eot] += (2 * ends - 2) * marks[len(_STEPS) - 1]
        for ids in _STEPS:
            for token in ids:
                if rng.random() < leaves:
                    wrong = rng.choice([V.eot, V.boa, V.eoa, V.boi, V.eoi, 16_500, 40, rng.choice(_STEPS[4])])
                    head[wrong] += 3.0 * embedding[token] / embedding[token].norm()
    return model


def random_prompt(rng, images=2):
    """Words, small images, end of turn."""
    ids = [0, *[rng.randrange(16_388, 16_640) for _ in range(rng.randrange(1, 9))]]
    for _ in range(rng.randrange(1, images + 1)):
        ids += sequence.image_block([[rng.randrange(8_192) for _ in range(2)] for _ in range(2)], V)
    return [*ids, V.eot]


def slot_model(slots, start, leaves_at=None, says=None, seed=0):
    """A model that says at each place of an answer one of the ids that its slot allows, but at one place another.

    Which of several ids it says depends, through attention with random weights, on all before it.

    Args:
        slots: of the answer; the last is the end of the turn.
        start: place of the first, for each prompt of a batch.
        leaves_at: place in the answer where it leaves the grammar; None for nowhere.
        says: what it says there; after it, anything, and before long the end of the turn.
        seed: of all weights.
    """
    model = grammar_model(seed)
    width = model.config.hidden_size
    marks = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]
    end = slots[-1][0]
    kinds = sorted({slot[0] for slot in slots} | {says or end})
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.05)
        for slot in slots:
            model.lm_head.weight[list(slot)] += 2 * marks[kinds.index(slot[0])]
        if says is not None:
            model.lm_head.weight[says] += 2 * marks[kinds.index(says)]
    starts = torch.tensor(start).reshape(-1, 1)

    def at_places(module, args, inputs, output):
        states = output.last_hidden_state
        places = places_of(states, **inputs)
        rank = places + 1 - starts  # of the id that is said there
        for row, ranks in enumerate(rank.expand(len(states), -1).tolist()):
            for column, place in enumerate(ranks):
                if leaves_at is not None and place > leaves_at:
                    wanted = end if (place - leaves_at) % 3 == 0 else None
                elif place == leaves_at:
                    wanted = says
                else:
                    wanted = slots[place][0] if 0 <= place < len(slots) else None
                if wanted is not None:
                    states[row, column] += 40 * marks[kinds.index(wanted)]
        return output

    model.model.register_forward_hook(at_places, with_kwargs=True)
    return model


def places_of(states, *, past_key_values, position_ids=None, states_to_keep=None, **inputs):
    """(B or 1, m) places in their sequences of the tokens whose states a pass has returned."""
    if position_ids is None:
        total = past_key_values.get_seq_length()
        return torch.arange(total - states.shape[1], total)[None]
    return position_ids if states_to_keep is None else position_ids.gather(1, states_to_keep)


def scripted_model(vocab_size, positions):
    """A model that says what it is told to, whatever it is asked.

    Returns:
        The model, and a function of the length of the prompt and the ids to say after it, over and over.
    """
    torch.manual_seed(0)
    config = WorldVLAConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=positions,
    )
    model, told = WorldVLAForConditionalGeneration(config).eval(), {}
    with torch.no_grad():
        head = model.lm_head.weight
        head.copy_(torch.nn.functional.normalize(torch.randn_like(head), dim=1))  # each id is likest to itself

    def says(module, args, inputs, output):
        states = output.last_hidden_state
        places = places_of(states, **inputs)
        rank = (places + 1 - told["start"]).clamp(min=0) % len(told["script"])
        states[:] = model.lm_head.weight[told["script"][rank]]
        return output

    def tell(start, script):
        told.update(start=start, script=torch.tensor(script))

    model.model.register_forward_hook(says, with_kwargs=True)
    return model, tell


def telling_model(seed, told, end):
    """Random weights, but at some places it says what it is told; elsewhere what depends much on all before."""
    torch.manual_seed(seed)
    config = WorldVLAConfig(
        vocab_size=16_640,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=192,
        initializer_range=0.5,
    )
    model = WorldVLAForConditionalGeneration(config).eval().double()
    with torch.no_grad():
        head = torch.nn.functional.normalize(model.lm_head.weight, dim=1)
        model.lm_head.weight.copy_(head)

    def says(module, args, inputs, output):
        states = output.last_hidden_state
        places = places_of(states, **inputs)
        for place, token in {**told, end: V.eot}.items():
            states[places.expand(len(states), -1) == place - 1] = head[token]
        return output

    model.model.register_forward_hook(says, with_kwargs=True)
    return model


def outcome(decode):
    """Ids, or the error: a model that has left the grammar may run out of positions, or of a mask."""
    try:
        return decode()
    except UnfinishedAnswerError as error:
        return type(error).__name__, error.ids
    except (SequenceLengthError, MaskError) as error:
        return type(error).__name__
