"""One token after the other: the plain way to decode, which every faster one is tested against.

Two ways, on the same cache:

- *constrained* (`fill`): a grammar says for each position which ids may stand there. Where only one may, it is
  written without asking the model; where several may, the most likely of them is taken. The answer always parses.
- *unconstrained* (`continue_freely`): the published algorithm, over the whole vocabulary until the model ends its
  turn. The answer may be anything.

As long as the model keeps to the grammar, both give the same ids. (Under a mask that looks ahead for images this
takes a prompt without actions: the first way shows the prompt's tokens that an image is to follow, the second does
not. World queries are `causal`.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from worldvla_model.decoding.grammar import ChunkGrammar
from worldvla_model.decoding.places import check_prompts
from worldvla_model.decoding.sampling import GREEDY, DecodingError, Sampling, UnfinishedAnswerError, check_slots
from worldvla_model.decoding.workspace import Workspace, device_of
from worldvla_model.masks import BlockTokens, MaskError, Strategy, causal, resolve
from worldvla_model.modeling_worldvla import SequenceLengthError, WorldVLAForConditionalGeneration


class Decoder:
    """One sequence that grows: a prompt, its cache, and the ids chosen so far.

    Ids that need no choice (`write`) wait until the next `choose` and enter the model together with it.

    Args:
        model: the model, in evaluation mode.
        prompt: ids of the prompt.
        attention: mask strategy by name or as a function; default that of the model's configuration.
        sampling: how ids are chosen.
        workspace: where passes are counted; nothing is taken from it or left there.

    Raises:
        DecodingError: an empty prompt, or an id outside the model's vocabulary.
        SequenceLengthError: the prompt fills all positions of the model.
    """

    def __init__(
        self,
        model: WorldVLAForConditionalGeneration,
        prompt: Sequence[int],
        *,
        attention: str | Strategy | None = None,
        sampling: Sampling = GREEDY,
        workspace: Workspace | None = None,
    ) -> None:
        check_prompts(model, [prompt])
        self.model = model
        self.attention = attention
        self.sampling = sampling
        self.ids = [int(i) for i in prompt]
        self.prompt_length = len(self.ids)
        self.workspace = workspace
        self.passes = 0
        self._cache = DynamicCache(config=model.config)
        self.require(1)

    @property
    def generated(self) -> list[int]:
        """Ids after the prompt."""
        return self.ids[self.prompt_length :]

    def require(self, count: int) -> None:
        """Make sure that `count` more ids fit.

        Raises:
            SequenceLengthError: they do not.
        """
        limit = self.model.config.max_position_embeddings
        if len(self.ids) + count > limit:
            raise SequenceLengthError(
                f"{len(self.ids)} ids so far and {count} to come; the model has {limit} positions "
                "(max_position_embeddings)"
            )

    def write(self, token: int) -> None:
        """Append an id that needs no choice."""
        self.require(1)
        self.ids.append(token)

    def read(self) -> None:
        """Let the model read what is written so far, before more is."""
        if len(self.ids) > self._cache.get_seq_length():
            self._next_logits()

    def choose(self, allowed: Sequence[int] | None = None) -> int:
        """Let the model choose the next id, among `allowed` ids or among all, and append it.

        Raises:
            DecodingError: an allowed id is outside the model's vocabulary.
        """
        logits = self._next_logits()
        if allowed is None:
            token = int(self.sampling.choose(logits[None])[0])
        else:
            token = int(self.sampling.choose_among(logits[None], allowed)[0])
        self.write(token)
        return token

    @torch.inference_mode()
    def _next_logits(self) -> Tensor:
        """Logits (V,) of the id after those so far."""
        context = torch.tensor([self.ids], device=device_of(self.model.model.embed_tokens))  # (1, T)
        output = self.model(
            context[:, self._cache.get_seq_length() :],
            context_ids=context,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            attention=self.attention,
        )
        self.passes += 1
        if self.workspace is not None:
            self.workspace.passes += 1
        return output.logits[0, -1]


def fill(decoder: Decoder, slots: Sequence[Sequence[int]]) -> list[int]:
    """Append one id for each slot: the only one allowed, or the model's choice among those allowed.

    Args:
        decoder: the sequence so far.
        slots: for each position the ids that may stand there, as a range or a list.

    Returns:
        The ids appended, one for each slot.

    Raises:
        DecodingError: a slot that allows nothing, or an id outside the model's vocabulary.
        SequenceLengthError: the slots do not fit into the model's positions.
    """
    check_slots(slots, decoder.model.config.vocab_size)
    decoder.require(len(slots))
    start = len(decoder.ids)
    for slot in slots:
        if len(slot) == 1:
            decoder.write(slot[0])
        else:
            decoder.choose(slot)
    return decoder.ids[start:]


def fill_chunk(
    decoder: Decoder, grammar: ChunkGrammar, *, num_actions: int | None = None, max_actions: int = 64
) -> list[int]:
    """Append a chunk of whole actions and the end of the turn; see `chunks.decode_chunks`.

    Args:
        decoder: the prompt of an action query.
        grammar: of the chunk.
        num_actions: K; None to let the model choose after each action between another one and the end of the turn.
        max_actions: give up where the model has not ended its turn after so many actions.

    Returns:
        The ids appended.

    Raises:
        DecodingError: no end after `max_actions`, or an id outside the model's vocabulary.
        SequenceLengthError: the chunk does not fit into the model's positions.
    """
    if num_actions is not None:
        return fill(decoder, [*list(grammar.slots) * num_actions, [grammar.end_of_turn]])
    generated = fill(decoder, grammar.slots)
    for _ in range(max_actions):
        if decoder.choose([grammar.begin, grammar.end_of_turn]) == grammar.end_of_turn:
            return [*generated, grammar.end_of_turn]
        generated += [grammar.begin, *fill(decoder, grammar.slots[1:])]
    raise DecodingError(
        f"the model did not end its turn after {max_actions} actions (max_actions); pass num_actions"
    )


def continue_freely(decoder: Decoder, end_of_turn: int, *, max_new_tokens: int | None = None) -> list[int]:
    """Append the model's choice among all ids, one after the other, until it ends its turn.

    This is how the published code decodes. The answer is not checked; `worldvla_tokenizers.sequence.parse`
    reads it strictly.

    Args:
        decoder: the prompt.
        end_of_turn: id that ends the answer.
        max_new_tokens: stop after so many ids; default as many as the model has positions.

    Returns:
        The ids appended; the last is `end_of_turn` unless `max_new_tokens` came first.

    Raises:
        UnfinishedAnswerError: the model's positions were used up before the turn ended, or the model has begun
            blocks inside blocks, which have no mask.
    """
    start = len(decoder.ids)
    while max_new_tokens is None or len(decoder.ids) - start < max_new_tokens:
        try:
            if decoder.choose() == end_of_turn:
                break
        except (SequenceLengthError, MaskError) as error:
            if not decoder.generated:  # not the answer's fault
                raise
            said = decoder.generated
            raise UnfinishedAnswerError(f"an answer did not end within {len(said)} ids: {error}", said) from error
    return decoder.ids[start:]


def continue_from(
    model: WorldVLAForConditionalGeneration,
    prompt: Sequence[int],
    decided: Sequence[int],
    end_of_turn: int,
    *,
    sampling: Sampling = GREEDY,
    attention: str | Strategy | None = None,
    workspace: Workspace | None = None,
) -> list[int]:
    """`continue_freely` after ids that are decided already; returns the whole answer, these included."""
    decoder = Decoder(model, prompt, attention=attention, sampling=sampling, workspace=workspace)
    tokens = model.config
    looks_ahead = resolve(attention or tokens.attention) is not causal
    for place, token in enumerate(decided, start=1):
        # What stands before an image has entered without it, where ids were chosen one after the other. And where
        # the last id nests blocks, there is no mask for it: the plain causal pass over a prompt would not notice.
        image = token in (tokens.boi, tokens.eoi)
        if (image and looks_ahead) or (place == len(decided) and (image or token in (tokens.boa, tokens.eoa))):
            decoder.read()
        decoder.write(token)
    continue_freely(decoder, end_of_turn)
    return decoder.generated


def is_balanced(prompt: Sequence[int], tokens: BlockTokens) -> bool:
    """Whether each block that begins in a prompt ends there: else it is not known how masks of an answer go on."""
    counts = Counter(prompt)
    return counts[tokens.boi] == counts[tokens.eoi] and counts[tokens.boa] == counts[tokens.eoa]
