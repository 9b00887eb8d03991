"""Chunks of actions and frames from a prompt.

Everything here works on ids. Two ways to decode, on the same cache:

- *constrained* (`fill`, `decode_chunk`): a grammar says for each position which ids may stand there. Where
  only one may, it is written without asking the model; where several may, the most likely of them is taken.
  The answer always parses.
- *unconstrained* (`continue_freely`): the published algorithm, one token after the other over the whole
  vocabulary until the model ends its turn. The answer may be anything.

As long as the model keeps to the grammar, both give the same ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from worldvla_model.masks import Strategy
from worldvla_model.modeling_worldvla import SequenceLengthError, WorldVLAForConditionalGeneration


class DecodingError(ValueError):
    """A request that cannot be decoded, or an answer that never ended."""


@dataclass(frozen=True)
class Sampling:
    """How an id is chosen from the logits.

    Attributes:
        temperature: 0 for the most likely id, else the logits are divided by it and an id is drawn.
        top_k: draw among the k most likely ids only.
        top_p: draw among the most likely ids that together hold this probability.
        generator: source of randomness, on the model's device; default PyTorch's own.

    Raises:
        DecodingError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise DecodingError(f"temperature is {self.temperature}; allowed: 0 (greedy) and above")
        if self.top_k is not None and self.top_k < 1:
            raise DecodingError(f"top_k is {self.top_k}; allowed: 1 and above, or None")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise DecodingError(f"top_p is {self.top_p}; allowed: above 0 and up to 1, or None")

    def choose(self, logits: Tensor) -> int:
        """Choose one of the entries of (N,) logits; returns its index."""
        if self.temperature == 0.0:
            return int(logits.argmax())
        scores = TemperatureLogitsWarper(self.temperature)(None, logits[None])
        if self.top_k is not None:
            scores = TopKLogitsWarper(self.top_k)(None, scores)
        if self.top_p is not None:
            scores = TopPLogitsWarper(self.top_p)(None, scores)
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator))


GREEDY = Sampling()


class Decoder:
    """One sequence that grows: a prompt, its cache, and the ids chosen so far.

    Ids that need no choice (`write`) wait until the next `choose` and enter the model together with it.

    Args:
        model: the model, in evaluation mode.
        prompt: ids of the prompt.
        attention: mask strategy by name or as a function; default that of the model's configuration.
        sampling: how ids are chosen.

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
    ) -> None:
        if len(prompt) == 0:
            raise DecodingError("the prompt has 0 ids; at least 1 needed")
        size = model.config.vocab_size
        foreign = next((i for i, token in enumerate(prompt) if not 0 <= token < size), None)
        if foreign is not None:
            raise DecodingError(
                f"prompt id {prompt[foreign]} at position {foreign}; the model's vocabulary is 0 … {size - 1}"
            )
        self.model = model
        self.attention = attention
        self.sampling = sampling
        self.ids = [int(i) for i in prompt]
        self.prompt_length = len(self.ids)
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

    def choose(self, allowed: Sequence[int] | None = None) -> int:
        """Let the model choose the next id, among `allowed` ids or among all, and append it.

        Raises:
            DecodingError: an allowed id is outside the model's vocabulary.
        """
        logits = self._next_logits()
        if allowed is None:
            token = self.sampling.choose(logits)
        else:
            if min(allowed) < 0 or max(allowed) >= len(logits):
                raise DecodingError(
                    f"ids {min(allowed)} … {max(allowed)} wanted; the model's vocabulary is 0 … {len(logits) - 1}"
                )
            candidates = logits[torch.as_tensor(allowed, device=logits.device)]
            token = allowed[self.sampling.choose(candidates)]
        self.write(token)
        return token

    @torch.inference_mode()
    def _next_logits(self) -> Tensor:
        """Logits (V,) of the id after those so far."""
        context = torch.tensor([self.ids], device=self.model.device)  # (1, T)
        output = self.model(
            context[:, self._cache.get_seq_length() :],
            context_ids=context,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            attention=self.attention,
        )
        self.passes += 1
        return output.logits[0, -1]


def fill(decoder: Decoder, slots: Sequence[Sequence[int]]) -> list[int]:
    """Append one id for each slot: the only one allowed, or the model's choice among those allowed.

    Args:
        decoder: the sequence so far.
        slots: for each position the ids that may stand there, as a range or a list.

    Returns:
        The ids appended, one for each slot.

    Raises:
        SequenceLengthError: the slots do not fit into the model's positions.
    """
    decoder.require(len(slots))
    start = len(decoder.ids)
    for slot in slots:
        if len(slot) == 1:
            decoder.write(slot[0])
        else:
            decoder.choose(slot)
    return decoder.ids[start:]


def decode_chunk(
    decoder: Decoder,
    action_slots: Sequence[Sequence[int]],
    end_of_turn: int,
    *,
    num_actions: int | None = None,
    max_actions: int = 64,
) -> list[int]:
    """Append a chunk of whole actions and the end of the turn.

    Args:
        decoder: the prompt of an action query.
        action_slots: the grammar of one action block, begin and end tokens included.
        end_of_turn: id that ends the answer.
        num_actions: K, the number of actions; None to let the model choose after each action between another
            one and the end of the turn, as it does when it decodes freely.
        max_actions: give up where the model has not ended its turn after so many actions.

    Returns:
        The ids appended: K blocks and the end of the turn.

    Raises:
        DecodingError: `num_actions` below 1, or no end after `max_actions`.
        SequenceLengthError: the chunk does not fit into the model's positions.
    """
    if num_actions is not None:
        if num_actions < 1:
            raise DecodingError(f"num_actions is {num_actions}; allowed: 1 and above, or None")
        return fill(decoder, [*list(action_slots) * num_actions, [end_of_turn]])
    generated = fill(decoder, action_slots)
    begin_of_action = action_slots[0][0]
    for _ in range(max_actions):
        if decoder.choose([begin_of_action, end_of_turn]) == end_of_turn:
            return [*generated, end_of_turn]
        generated += [begin_of_action, *fill(decoder, action_slots[1:])]
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
        SequenceLengthError: the model's positions were used up before the turn ended.
    """
    start = len(decoder.ids)
    while max_new_tokens is None or len(decoder.ids) - start < max_new_tokens:
        if decoder.choose() == end_of_turn:
            break
    return decoder.ids[start:]
