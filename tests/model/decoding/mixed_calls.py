"""Random calls of all kinds on small models; run by itself, their answers as JSON, from the last to the first.

python mixed_calls.py COUNT
"""

import json
import random
import sys

from grammar_models import GRAMMAR, V, grammar_model, random_prompt

from worldvla_model import SequenceLengthError
from worldvla_model.decoding import (
    DecodingError,
    continue_chunks,
    continue_frames,
    decode_chunks,
    decode_frames,
    repeat,
)
from worldvla_model.masks import MaskError
from worldvla_tokenizers import sequence

MODELS = 3
FRAME = [*sequence.image_slots(2, 2, V), [V.eot]]


def calls(count):
    """What to ask of which model."""
    rng = random.Random(1)
    prompts = [random_prompt(rng) for _ in range(12)]
    found = []
    for _ in range(count):
        kind = rng.choice(["chunk", "free chunk", "frame", "free frame"])
        asked = rng.sample(prompts, rng.choice([1, 1, 2, 3]))
        draft = [slot[rng.randrange(min(3, len(slot)))] for slot in FRAME] if rng.random() < 0.5 else None
        mask = rng.choice(["action_isolated", "causal", "action_isolated_everywhere"])
        found.append((kind, rng.randrange(MODELS), asked, rng.randrange(1, 5), draft, mask))
    return found


def answer(models, call, workspaces):
    """Ids, or the name of the error."""
    kind, which, prompts, actions, guesses, attention = call
    model, where = models[which], {"attention": attention, "workspace": workspaces and workspaces[which]}
    draft = None if guesses is None else repeat(guesses)
    try:
        if kind == "chunk":
            return decode_chunks(model, prompts, GRAMMAR, num_actions=actions, **where)
        if kind == "free chunk":
            return continue_chunks(model, prompts, GRAMMAR, speculated=actions, **where)
        if kind == "frame":
            return decode_frames(model, prompts, FRAME, draft=draft, **where)
        return continue_frames(model, prompts, FRAME, V.eot, draft=draft, **where)
    except (SequenceLengthError, MaskError, DecodingError) as error:
        return type(error).__name__


def make_models():
    return [grammar_model(seed, leaves=0.05, ends=1.3) for seed in range(MODELS)]


def main():
    models = make_models()
    numbered = list(enumerate(calls(int(sys.argv[1]))))
    json.dump({number: answer(models, call, None) for number, call in reversed(numbered)}, sys.stdout)


if __name__ == "__main__":
    main()
