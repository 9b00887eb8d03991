"""The action tokenizer in the places where other vision-language-action projects have theirs.

Needs `pip install worldvla-tokenizers` and nothing else: neither torch nor transformers is imported.
"""

import sys

import numpy as np

from worldvla_tokenizers import ActionTokenizer

rng = np.random.default_rng(0)
demonstrations = rng.normal(scale=0.2, size=(500, 7))  # (T, D) actions of the training split

# OpenVLA scales actions to [-1, 1] by quantiles outside its tokenizer. Either leave it there …
openvla = ActionTokenizer(low=-np.ones(7), high=np.ones(7))
scaled = rng.uniform(-1, 1, size=7)
token_ids = openvla.encode(scaled)
print("OpenVLA  ", token_ids, "->", openvla.decode_token_ids_to_actions(token_ids).round(2))

# … or let the tokenizer own the bounds, fitted by the same quantiles.
fitted = ActionTokenizer.fit(demonstrations, quantile=0.01)
print("bounds   ", fitted.low.round(2), fitted.high.round(2))

# FAST takes a chunk, returns one flat list of ids per sequence, and needs the shape to go back.
chunks = demonstrations[:20].reshape(2, 10, 7)  # (B, T, D)
tokens = fitted(chunks)
back = fitted.decode(tokens, time_horizon=10, action_dim=7)
print("FAST     ", [len(sequence) for sequence in tokens], "ids ->", back.shape)
half_a_bin = (fitted.high - fitted.low) / 255 / 2
assert (np.abs(back - chunks.clip(fitted.low, fitted.high)) <= half_a_bin + 1e-6).all()

# Ids live on their own range; a project with another vocabulary takes bins instead.
bins = fitted.vocabulary.action_bins(fitted.encode(demonstrations[0]))  # 1 … 256
vocabulary_size = 32_000
print("own ids  ", vocabulary_size - bins, "(OpenVLA's descending ids)")

assert "torch" not in sys.modules
assert "transformers" not in sys.modules
