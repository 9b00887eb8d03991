"""What answers may look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from worldvla_model.decoding.sampling import DecodingError


@dataclass(frozen=True)
class ChunkGrammar:
    """What a chunk may look like.

    Attributes:
        slots: allowed ids at each position of one action block; begin and end have one.
        end_of_turn: id that ends the answer.

    Raises:
        DecodingError: the first or last slot allows several ids.
    """

    slots: Sequence[Sequence[int]]
    end_of_turn: int

    def __post_init__(self) -> None:
        if len(self.slots) < 3 or len(self.slots[0]) != 1 or len(self.slots[-1]) != 1:
            raise DecodingError(
                "an action block needs one id that begins it, one that ends it, and values between"
            )

    @property
    def begin(self) -> int:
        """Id that begins an action."""
        return self.slots[0][0]

    @property
    def end(self) -> int:
        """Id that ends an action."""
        return self.slots[-1][0]

    def confirm(self, said: Sequence[int]) -> tuple[list[int], Literal["ended", "left", "open"]]:
        """How much of what a model said at the places of whole actions holds.

        Args:
            said: begin, values, end, then begin of the next action or end of the turn, and so on.

        Returns:
            The ids up to the first that is not in its place, that one included, and whether the turn `ended`
            there, the model `left` the grammar, or said that another action follows, which is not returned.
        """
        for place, token in enumerate(said):
            if token == self.end_of_turn:
                return list(said[: place + 1]), "ended"
            if token not in self.slots[place % len(self.slots)]:
                return list(said[: place + 1]), "left"
        return list(said[:-1]), "open"

    def layout(self, actions: int) -> list[int]:
        """Ids of blocks as masks see them: which values stand there does not matter."""
        return [slot[0] for slot in self.slots] * actions
