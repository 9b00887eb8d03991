"""Losses of mixed action and world data: cross-entropy on supervised positions, two weightings, z-loss.

    logits or hidden states, labels -> `SupervisedLosses` -> means under a rule -> the loss

A loss is a weighted sum of `Mean`s. Each keeps its numerator and its denominator apart, so that the means can go
over a batch that is spread over several forward passes or processes: add up both, then divide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

IGNORED = -100
IMAGE_IDS = range(4, 8_196)
"""Ids of image codes."""
PUBLISHED_IMAGE_IDS = range(3, 8_195)
"""Ids that the published code weights by alpha. The image codes are 4 … 8195: it is off by one."""

LossRule = Literal["published", "paper"]
"""`published`: one mean over all tokens, weighted by id. `paper`: L_action + alpha · L_world, a mean each."""


class SupervisedLosses(NamedTuple):
    """Per-token losses at the N supervised positions of a batch.

    Attributes:
        cross_entropy: (N,) -log p(label).
        squared_logsumexp: (N,) squared log-partition function, the term of the z-loss.
        predicted: (N,) ids with the highest logit.
        labels: (N,) the ids supervised.
        sample: (N,) row of the batch each belongs to.
        position: (N,) column of the label.
    """

    cross_entropy: Tensor
    squared_logsumexp: Tensor
    predicted: Tensor
    labels: Tensor
    sample: Tensor
    position: Tensor


class Mean(NamedTuple):
    """A weighted mean over tokens, not yet divided.

    Attributes:
        total: scalar, Σ w·ℓ.
        weight: scalar, Σ w.
    """

    total: Tensor
    weight: Tensor


def supervised_positions(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where a prediction is scored: the logits at t are scored against the label at t + 1.

    Args:
        labels: (B, T) ids, -100 where nothing is supervised; the first is never scored.

    Returns:
        (N,) row and (N,) column of each such position t, and the (N,) labels.

    Raises:
        ValueError: no supervised token in the batch.
    """
    targets = labels[:, 1:]
    row, column = torch.nonzero(targets != IGNORED, as_tuple=True)
    if len(row) == 0:
        raise ValueError(f"labels of shape {tuple(labels.shape)} supervise no token; at least one is needed")
    return row, column, targets[row, column]


def supervised_losses(logits: Tensor, labels: Tensor) -> SupervisedLosses:
    """Losses of each supervised token, from logits at all positions.

    Args:
        logits: (B, T, V).
        labels: (B, T) ids, -100 where nothing is supervised.

    Returns:
        The losses of the N supervised tokens, (N,) each, in the order of rows and of positions within.

    Raises:
        ValueError: shapes that do not fit, or no supervised token in the batch.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}; (B, T, V), (B, T) needed")
    row, column, wanted = supervised_positions(labels)
    return SupervisedLosses(*_score(logits[row, column], wanted), wanted, row, column + 1)


def chunked_losses(hidden: Tensor, head: Tensor, labels: Tensor, *, chunk: int = 512) -> SupervisedLosses:
    """The same losses from hidden states, without ever holding all logits.

    The head is applied to supervised positions only, `chunk` at a time, and again in the backward pass: in memory
    are logits of (chunk, V) instead of (B, T, V), and their gradients.

    Args:
        hidden: (B, T, H) last hidden states.
        head: (V, H) weight of the head.
        labels: (B, T) ids, -100 where nothing is supervised.
        chunk: positions at once.

    Returns:
        What `supervised_losses` gives for the logits: (N,) each.

    Raises:
        ValueError: shapes that do not fit, no supervised token in the batch, or a chunk below 1.
    """
    if hidden.ndim != 3 or labels.shape != hidden.shape[:2]:
        raise ValueError(f"hidden {tuple(hidden.shape)}, labels {tuple(labels.shape)}; (B, T, H), (B, T) needed")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; allowed: 1 and above")
    row, column, wanted = supervised_positions(labels)
    *first, last = zip(hidden[row, column].split(chunk), wanted.split(chunk), strict=True)
    parts = [checkpoint(_score_hidden, states, head, targets, use_reentrant=False) for states, targets in first]
    # The backward pass begins with the last chunk: computing it again would save nothing.
    parts.append(_score_hidden(last[0], head, last[1]))
    cross_entropy, squared_logsumexp, predicted = (torch.cat(part) for part in zip(*parts, strict=True))
    return SupervisedLosses(cross_entropy, squared_logsumexp, predicted, wanted, row, column + 1)


def token_weights(
    labels: Tensor, rule: LossRule, *, is_world: Tensor | None = None, alpha: float = 0.04
) -> dict[str, Tensor]:
    """What a rule averages, and how much each token counts there.

    Args:
        labels: (N,) ids supervised.
        rule: `published`: `tokens`, alpha for ids 3 … 8194 and 1 for all others, structure tokens included.
            `paper`: `action` and `world`, 1 for the tokens of these samples. Both also `z`, 1 for every token.
        is_world: (N,) bool, True for tokens of world (and video) samples; needed by `paper`.
        alpha: weight of image ids under `published`.

    Returns:
        (N,) weights by name.

    Raises:
        ValueError: an unknown rule, or `is_world` is missing.

    Source: paper §3.3, eq. 4; the released code.
    """
    ones = torch.ones(labels.shape, device=labels.device)
    if rule == "published":
        image = (labels >= PUBLISHED_IMAGE_IDS.start) & (labels < PUBLISHED_IMAGE_IDS.stop)
        return {"tokens": torch.where(image, alpha, ones), "z": ones}
    if rule == "paper":
        if is_world is None:
            raise ValueError("the paper's loss needs is_world, (B,), to tell world samples from action samples")
        return {"action": (~is_world).float(), "world": is_world.float(), "z": ones}
    raise ValueError(f"rule is {rule!r}; allowed: 'published', 'paper'")


def means(
    losses: SupervisedLosses, rule: LossRule, *, is_world: Tensor | None = None, alpha: float = 0.04
) -> dict[str, Mean]:
    """The means of a rule over the tokens of a batch.

    Args:
        losses: of its N supervised tokens.
        rule: see `token_weights`.
        is_world: (B,) bool, True for world (and video) samples; needed by `paper`.
        alpha: weight of image ids under `published`.

    Returns:
        Each mean of the rule by name, numerator and denominator scalars.

    Raises:
        ValueError: an unknown rule, or `is_world` is missing.
    """
    world = None if is_world is None else is_world[losses.sample]
    weights = token_weights(losses.labels, rule, is_world=world, alpha=alpha)
    return {
        name: Mean((w * (losses.squared_logsumexp if name == "z" else losses.cross_entropy)).sum(), w.sum())
        for name, w in weights.items()
    }


def combine(
    parts: Mapping[str, Mean],
    *,
    alpha: float = 0.04,
    z_loss_weight: float = 1e-5,
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The loss from the means of a rule: `tokens`, or `action` + alpha · `world`; plus z_loss_weight · `z`.

    Args:
        parts: see `means`. A part without any token contributes nothing.
        alpha: weight of the mean over world samples.
        z_loss_weight: weight of the z-loss; 1e-5 in the released code, none is named in the paper.
        weights: denominators instead of the parts' own, for a batch of which this is a piece only.

    Returns:
        The loss, a scalar.
    """
    factors = {"tokens": 1.0, "action": 1.0, "world": alpha, "z": z_loss_weight}
    total = torch.zeros((), device=parts["z"].total.device)
    for name, part in parts.items():
        weight = part.weight if weights is None else weights[name]
        total = total + factors[name] * part.total / torch.where(weight > 0, weight, 1.0)
    return total


def _score_hidden(states: Tensor, head: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _score(functional.linear(states, head), wanted)


def _score(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, V), (N,) → cross-entropy, squared logsumexp, likeliest ids; in fp32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    rows = torch.arange(len(wanted), device=wanted.device)
    # Nearer to fp64 than log_softmax, whose error depends on the processor; the z-loss needs the logsumexp anyway.
    logsumexp = logits.logsumexp(dim=-1)
    return logsumexp - logits[rows, wanted], logsumexp**2, logits.detach().argmax(dim=-1)
