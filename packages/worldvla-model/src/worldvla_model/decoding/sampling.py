"""How an id is chosen from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


class DecodingError(ValueError):
    """A request that cannot be decoded, or an answer that never ended."""


class UnfinishedAnswerError(DecodingError):
    """An unconstrained answer that could not go on: positions used up, or blocks that no mask can be made of.

    Attributes:
        ids: what the model had said by then.
    """

    def __init__(self, message: str, ids: Sequence[int]) -> None:
        super().__init__(message)
        self.ids = list(ids)


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

    def choose(self, logits: Tensor) -> Tensor:
        """Choose one of the entries of each of (*, N) logits; returns (*) their indices, on the same device."""
        if self.temperature == 0.0:
            return logits.argmax(dim=-1)
        # transformers takes no other numbers for these: no 1 for 1.0, no NumPy integer.
        scores = TemperatureLogitsWarper(float(self.temperature))(None, logits.flatten(0, -2))
        if self.top_k is not None:
            scores = TopKLogitsWarper(int(self.top_k))(None, scores)
        if self.top_p is not None:
            scores = TopPLogitsWarper(float(self.top_p))(None, scores)
        drawn = torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator)
        return drawn.view(logits.shape[:-1])

    def choose_among(self, logits: Tensor, allowed: Sequence[int]) -> Tensor:
        """Choose one of the allowed ids by each of (*, V) logits; returns (*) ids.

        Raises:
            DecodingError: an allowed id is outside the model's vocabulary.
        """
        check_ids(allowed, logits.shape[-1])
        if isinstance(allowed, range) and allowed.step == 1:  # a view instead of a copy
            return self.choose(logits[..., allowed.start : allowed.stop]) + allowed.start
        ids = torch.as_tensor(allowed, device=logits.device)
        return ids[self.choose(logits[..., ids])]


GREEDY = Sampling()


def check_ids(allowed: Sequence[int], size: int) -> None:
    """Refuse ids that the model cannot say.

    Raises:
        DecodingError: there is none, or one is outside the model's vocabulary of `size` ids.
    """
    if len(allowed) == 0:
        raise DecodingError("a position allows 0 ids; at least 1 needed")
    # A range is looked at by its ends: there are passes that allow thousands of ids.
    ends = (allowed[0], allowed[-1]) if isinstance(allowed, range) else allowed
    if min(ends) < 0 or max(ends) >= size:
        raise DecodingError(f"ids {min(ends)} … {max(ends)} wanted; the model's vocabulary is 0 … {size - 1}")


def check_slots(slots: Sequence[Sequence[int]], size: int) -> None:
    """Refuse a grammar that allows what the model cannot say, before any pass.

    Raises:
        DecodingError: as `check_ids`, with the place of the slot.
    """
    for place, slot in enumerate(slots):
        try:
            check_ids(slot, size)
        except DecodingError as error:
            raise DecodingError(f"slot {place}: {error}") from None
