"""Losses of mixed action and world data: cross-entropy on supervised positions, two weightings, z-loss.

Both take logits at all positions and shift: the logits at t are scored against the label at t + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100
PUBLISHED_IMAGE_IDS = range(3, 8_195)
"""Ids that the published code weights by alpha. The image codes are 4 … 8195: it is off by one."""


class SupervisedLosses(NamedTuple):
    """Per-token losses at the N supervised positions of a batch.

    Attributes:
        cross_entropy: (N,) -log p(label).
        squared_logsumexp: (N,) squared log-partition function, the term of the z-loss.
        labels: (N,) the ids supervised.
        sample: (N,) row of the batch each belongs to.
    """

    cross_entropy: Tensor
    squared_logsumexp: Tensor
    labels: Tensor
    sample: Tensor


def supervised_losses(logits: Tensor, labels: Tensor) -> SupervisedLosses:
    """Losses of each supervised token.

    Args:
        logits: (B, T, V), or of the first T - 1 positions at least.
        labels: (B, T) ids, -100 where nothing is supervised; the first is never scored.

    Raises:
        ValueError: shapes that do not fit, or no supervised token in the batch.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}; (B, T, V), (B, T) needed")
    targets = labels[:, 1:]
    sample, position = torch.nonzero(targets != IGNORED, as_tuple=True)
    if len(sample) == 0:
        raise ValueError(f"labels of shape {tuple(labels.shape)} supervise no token; at least one is needed")
    chosen = logits[sample, position].float()  # (N, V)
    wanted = targets[sample, position]
    return SupervisedLosses(
        cross_entropy=functional.cross_entropy(chosen, wanted, reduction="none"),
        squared_logsumexp=chosen.logsumexp(dim=-1) ** 2,
        labels=wanted,
        sample=sample,
    )


def published_loss(logits: Tensor, labels: Tensor, *, alpha: float = 0.04, z_loss_weight: float = 1e-5) -> Tensor:
    """The released code's loss: one weighted mean over the mixed batch, plus z-loss.

    Σ wℓ / Σ w with w = alpha for ids 3 … 8194 and 1 for all others, structure tokens included;
    plus `z_loss_weight` times the unweighted mean of the squared log-partition function.

    Args:
        logits: (B, T, V).
        labels: (B, T) ids, -100 where nothing is supervised.
        alpha: weight of image ids; 1 gives the plain mean.
        z_loss_weight: weight of the z-loss.

    Returns:
        The loss, a scalar.
    """
    losses = supervised_losses(logits, labels)
    image = (losses.labels >= PUBLISHED_IMAGE_IDS.start) & (losses.labels < PUBLISHED_IMAGE_IDS.stop)
    weights = torch.where(image, alpha, 1.0)
    weighted_mean = (weights * losses.cross_entropy).sum() / weights.sum()
    return weighted_mean + z_loss_weight * losses.squared_logsumexp.mean()


def paper_loss(
    logits: Tensor, labels: Tensor, is_world: Tensor, *, alpha: float = 0.04, z_loss_weight: float = 0.0
) -> Tensor:
    """The paper's loss, L_action + alpha · L_world, each the mean over the tokens of its own samples.

    Args:
        logits: (B, T, V).
        labels: (B, T) ids, -100 where nothing is supervised.
        is_world: (B,) bool, True for world (and video) samples, False for action samples. A part without any
            sample contributes nothing.
        alpha: weight of the world samples.
        z_loss_weight: weight of the mean squared log-partition function (the paper names none).

    Returns:
        The loss, a scalar.

    Source: paper §3.3, eq. 4.
    """
    losses = supervised_losses(logits, labels)
    world = is_world[losses.sample]
    parts = [
        weight * (losses.cross_entropy * chosen).sum() / chosen.sum().clamp(min=1)
        for weight, chosen in ((1.0, ~world), (alpha, world))
    ]
    return parts[0] + parts[1] + z_loss_weight * losses.squared_logsumexp.mean()
