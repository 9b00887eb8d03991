"""Attention-mask strategies: who may look at whom.

A strategy is one small function of a query's and a key's position, and of the blocks these lie in. The same
function serves as dense bool mask (`dense`), as transformers' mask function and as flex-attention's `mask_mod`
(`mask_function`); anyone's own function of the same shape plugs in wherever a strategy is asked for:

    def last_image_only(query, key):
        return causal(query, key) & ((key.image < 0) | (key.image == query.last_image))

The blocks of a sequence are found once, with tensor operations and without a synchronisation of the host.

Source: paper §3.3 and Fig. 3; the rules are those of the published `generate_att_mask`, `_2` and `_3`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn


class MaskError(ValueError):
    """An unknown strategy, or ids whose blocks do not nest."""


class BlockTokens(Protocol):
    """Whatever knows the four ids that open and close blocks: a `Vocabulary` or a `WorldVLAConfig`."""

    @property
    def boi(self) -> int:
        """Begin of image."""

    @property
    def eoi(self) -> int:
        """End of image."""

    @property
    def boa(self) -> int:
        """Begin of action."""

    @property
    def eoa(self) -> int:
        """End of action."""


class Positions(NamedTuple):
    """Positions of a sequence and the blocks they lie in; tensors that broadcast against each other.

    A block runs from its begin token to its end token, both inclusive; one that is still open runs to the end
    of the sequence. Blocks of a kind are counted from 0.

    Attributes:
        position: place in the sequence, from 0.
        action: number of the action block, -1 outside.
        image: number of the image block, -1 outside.
        last_image: number of the last image block that has begun, -1 before the first.
        trailing: True in action blocks that begin after the end of the sequence's last image block.
    """

    position: Tensor
    action: Tensor
    image: Tensor
    last_image: Tensor
    trailing: Tensor

    def at(self, batch: Tensor | int, index: Tensor) -> Positions:
        """Look up single positions: each field of (B, T) at [batch, index]."""
        return Positions(*(field[batch, index] for field in self))

    def rows(self, start: int = 0) -> Positions:
        """Fields of (B, T) as queries: (B, T - start, 1)."""
        return Positions(*(field[:, start:, None] for field in self))

    def columns(self) -> Positions:
        """Fields of (B, T) as keys: (B, 1, T)."""
        return Positions(*(field[:, None, :] for field in self))


Strategy: TypeAlias = Callable[[Positions, Positions], Tensor]
"""(query, key) → bool, True = may attend."""

MaskFunction: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query, key) indices → bool: transformers' mask function and flex-attention's `mask_mod`."""


def causal(query: Positions, key: Positions) -> Tensor:
    """Everything up to the position itself: the paper's Fig. 3a (actions) and 3c (world model).

    Of words w, images I and J, and actions a, b, c and d, rows may look at columns:

          w I a b J c d
        w 1
        I 1 1
        a 1 1 1
        b 1 1 1 1
        J 1 1 1 1 1
        c 1 1 1 1 1 1
        d 1 1 1 1 1 1 1

    Within a block, here and below, a token looks at those before it and at itself.
    """
    return key.position <= query.position


def action_isolated(query: Positions, key: Positions) -> Tensor:
    """Causal, but an action block after the last image sees no earlier action block: the paper's Fig. 3b.

    Released models are trained and run with it (published `generate_att_mask_3`).

          w I a b J c d
        w 1
        I 1 1
        a 1 1 1
        b 1 1 1 1
        J 1 1 1 1 1
        c 1 1 . . 1 1
        d 1 1 . . 1 . 1
    """
    return causal(query, key) & ~(query.trailing & _earlier_action(query, key))


def action_isolated_everywhere(query: Positions, key: Positions) -> Tensor:
    """Causal, but no action block sees any earlier action block (published `generate_att_mask`).

      w I a b J c d
    w 1
    I 1 1
    a 1 1 1
    b 1 1 . 1
    J 1 1 1 1 1
    c 1 1 . . 1 1
    d 1 1 . . 1 . 1
    """
    return causal(query, key) & ~((query.action >= 0) & _earlier_action(query, key))


def first_image_only(query: Positions, key: Positions) -> Tensor:
    """Causal, but an action block sees neither earlier actions nor any image but the first.

    Published as `generate_att_mask_2`.

          w I a b J c d
        w 1
        I 1 1
        a 1 1 1
        b 1 1 . 1
        J 1 1 1 1 1
        c 1 1 . . . 1
        d 1 1 . . . . 1
    """
    return action_isolated_everywhere(query, key) & ~((query.action >= 0) & (key.image > 0))


STRATEGIES: dict[str, Strategy] = {
    strategy.__name__: strategy
    for strategy in (causal, action_isolated, action_isolated_everywhere, first_image_only)
}


def resolve(strategy: str | Strategy) -> Strategy:
    """The strategy of a name; a function is returned as it is.

    Raises:
        MaskError: no strategy has this name.
    """
    if callable(strategy):
        return strategy
    if strategy not in STRATEGIES:
        raise MaskError(f"attention is {strategy!r}; allowed: {', '.join(STRATEGIES)}, or a function (query, key)")
    return STRATEGIES[strategy]


def positions(ids: Tensor, tokens: BlockTokens) -> Positions:
    """Find the blocks of sequences.

    Args:
        ids: (B, T) token ids.
        tokens: owner of the ids that open and close blocks.

    Returns:
        Fields of shape (B, T).

    Raises:
        MaskError: begin and end tokens of a kind differ in number by more than one. Checked for ids on the
            CPU only, and not in compiled code: the answer would cost a synchronisation.
    """
    action, action_begins, _ = _blocks(ids, tokens.boa, tokens.eoa, "action")
    image, image_begins, image_ends = _blocks(ids, tokens.boi, tokens.eoi, "image")
    position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)

    # The n-th end token closes the n-th block, so the last of n blocks is closed by the n-th end token.
    number = image_begins.sum(dim=1, keepdim=True)
    closes_last = image_ends & (image_ends.cumsum(dim=1) == number)
    open_end = torch.where(number > 0, ids.shape[1] - 1, -1)
    last_image_end = torch.where(
        closes_last.any(dim=1, keepdim=True), (position * closes_last).sum(dim=1, keepdim=True), open_end
    )
    begins_after = (action_begins & (position > last_image_end)).long()
    # An action block begins after the last image end if it is one of the last `begins_after` blocks.
    first_trailing = (action_begins.sum(dim=1) - begins_after.sum(dim=1))[:, None]
    return Positions(
        position=position,
        action=action,
        image=image,
        last_image=image_begins.cumsum(dim=1) - 1,
        trailing=(action >= 0) & (action >= first_trailing),
    )


def attend(
    strategy: str | Strategy,
    where: Positions,
    *,
    first_query: int = 0,
    keys: Tensor | None = None,
    plain: Tensor | None = None,
) -> Tensor:
    """Dense bool mask of some last queries over all keys of sequences.

    Args:
        strategy: name or function.
        where: positions of the whole sequences, fields (B, T).
        first_query: leave out the rows before it: those of cached tokens.
        keys: (B, T) bool, False where a key is padding. Every query may attend to itself all the same, so
            that no row is empty.
        plain: (B,) bool, True for sequences that are causal whatever the strategy: world samples (Fig. 3c).

    Returns:
        (B, T - first_query, T) bool, True = may attend.
    """
    query, key = where.rows(first_query), where.columns()
    allowed = resolve(strategy)(query, key)
    if plain is not None:
        allowed = torch.where(plain[:, None, None], causal(query, key), allowed)
    if keys is not None:
        allowed = (allowed & keys[:, None, :]) | (query.position == key.position)
    return allowed


def attend_in_turn(
    strategy: str | Strategy,
    ids: Tensor,
    vocabulary: BlockTokens,
    *,
    known: int,
    first_query: int = 0,
    keys: Tensor | None = None,
    plain: Tensor | None = None,
) -> Tensor:
    """`attend` for ids that are fed at once as if one had come after the other.

    Masks may look ahead for images. Here no id knows of an image that begins or ends after it, but those of the
    prompt, which enter together.

    Args:
        strategy: name or function.
        ids: (B, T) ids of whole sequences.
        vocabulary: owner of the ids that open and close blocks.
        known: ids of the prompt.
        first_query: as in `attend`.
        keys: as in `attend`.
        plain: as in `attend`.

    Returns:
        (B, T - first_query, T) bool, True = may attend.

    Raises:
        MaskError: as `dense`.
    """
    length, first = ids.shape[1], max(known, first_query + 1)
    images = ((ids == vocabulary.boi) | (ids == vocabulary.eoi)).any(dim=0)[first:]
    parts = []
    for end in [*(first + place for place in images.nonzero().flatten().tolist()), length]:
        part = attend(
            strategy,
            positions(ids[:, :end], vocabulary),
            first_query=first_query,
            keys=None if keys is None else keys[:, :end],
            plain=plain,
        )
        parts.append(nn.functional.pad(part, (0, length - end)))
        first_query = end
    return torch.cat(parts, dim=1)


def dense(strategy: str | Strategy, ids: Tensor, vocabulary: BlockTokens) -> Tensor:
    """The whole mask of sequences; the oracle that every faster form is tested against.

    Args:
        strategy: name or function.
        ids: (B, T) token ids.
        vocabulary: owner of the ids that open and close blocks.

    Returns:
        (B, T, T) bool, True = may attend.

    Raises:
        MaskError: unknown strategy, or blocks that do not nest.
    """
    return attend(strategy, positions(ids, vocabulary))


def mask_function(
    strategy: str | Strategy,
    where: Positions,
    *,
    first_query: int = 0,
    keys: Tensor | None = None,
    plain: Tensor | None = None,
) -> MaskFunction:
    """The mask as a function of indices, for flex attention and for transformers' mask builders.

    Arguments are those of `attend`; query index 0 is the position `first_query`.
    """
    rule = resolve(strategy)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = query + first_query
        rows, columns = where.at(batch, row), where.at(batch, key)
        allowed = rule(rows, columns)
        if plain is not None:
            allowed = torch.where(plain[batch], causal(rows, columns), allowed)
        if keys is not None:
            allowed = (allowed & keys[batch, key]) | (row == key)
        return allowed

    return mask_mod


def _earlier_action(query: Positions, key: Positions) -> Tensor:
    return (key.action >= 0) & (key.action < query.action)


def _blocks(ids: Tensor, begin: int, end: int, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """Number of the block of each position (-1 outside), and where blocks begin and end; (B, T) each."""
    begins, ends = ids == begin, ids == end
    opened = begins.cumsum(dim=1)
    closed_before = ends.cumsum(dim=1) - ends.long()
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        surplus = (begins.sum(dim=1) - ends.sum(dim=1)).abs()
        if bool((surplus > 1).any()):
            row = int(surplus.argmax())
            raise MaskError(
                f"sequence {row}: {int(begins[row].sum())} tokens {begin} that begin an {what} and "
                f"{int(ends[row].sum())} tokens {end} that end one; at most one may lack its partner"
            )
    return torch.where(opened > closed_before, opened - 1, -1), begins, ends
