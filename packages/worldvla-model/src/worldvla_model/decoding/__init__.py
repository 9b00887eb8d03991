"""Chunks of actions and frames from a prompt. Everything here works on ids.

- `sequential`: one token after the other, the plain way and the measure of all others.
- `chunks`: all actions of a chunk at once, where the mask keeps them apart.
- `frames`: frames from a draft.
- `workspace`: what queries leave for the next ones; compiled passes.

All give the same ids.
"""

from worldvla_model.decoding.chunks import continue_chunks, decode_chunks
from worldvla_model.decoding.frames import Draft, continue_frames, decode_frames, repeat
from worldvla_model.decoding.grammar import ChunkGrammar
from worldvla_model.decoding.places import PlacedSequences
from worldvla_model.decoding.sampling import GREEDY, DecodingError, Sampling, UnfinishedAnswerError
from worldvla_model.decoding.sequential import Decoder, continue_freely, fill, fill_chunk
from worldvla_model.decoding.workspace import Workspace

__all__ = [
    "GREEDY",
    "ChunkGrammar",
    "Decoder",
    "DecodingError",
    "Draft",
    "PlacedSequences",
    "Sampling",
    "UnfinishedAnswerError",
    "Workspace",
    "continue_chunks",
    "continue_frames",
    "continue_freely",
    "decode_chunks",
    "decode_frames",
    "fill",
    "fill_chunk",
    "repeat",
]
