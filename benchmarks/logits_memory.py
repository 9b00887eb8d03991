"""Memory that logits take in a training step: of all positions, and of supervised positions in chunks.

    python benchmarks/logits_memory.py [--samples 8] [--vocabulary 65536]

Half of the batch are action samples (two frames of 256 px, five actions), half world samples (one frame and
action, the next frame), in the published layout. Counted are the bytes of all tensors as wide as the vocabulary
that are alive at once, forward and backward: logits, their fp32 copies, probabilities, gradients.
"""

from __future__ import annotations

import argparse
import weakref
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from worldvla_model.loss import IGNORED, chunked_losses, combine, means

HIDDEN = 64


class WideTensors(TorchDispatchMode):
    """Counts bytes of living tensors with rows as wide as the vocabulary; weights are not among them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.living, self.now, self.peak = width, set(), 0, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.ndim >= 2 and tensor.shape[-1] == self.width:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self.living or not size:
            return
        self.living.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)

        def forget() -> None:
            self.living.discard(place)
            self.now -= size

        weakref.finalize(storage, forget)


def batch(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (B, T) in which just the positions of the published layout are supervised, and is_world (B,)."""
    text, image, action = 20, 276, 9
    shapes = {  # prompt, answer; eot belongs to both
        "action": (1 + text + 2 * image + 1, 5 * action + 1),
        "world": (1 + text + image + action + 1, image + 1),
    }
    kinds = ["action", "world"] * (samples // 2)
    longest = max(sum(shape) for shape in shapes.values())
    labels = torch.full((len(kinds), longest), IGNORED)
    for row, kind in enumerate(kinds):
        prompt, answer = shapes[kind]
        labels[row, prompt : prompt + answer] = torch.randint(4, 8_192, (answer,))
    return labels, torch.tensor([kind == "world" for kind in kinds])


def plain_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The published loss in the plainest way: over the logits of all positions."""
    scores, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    entropy = functional.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="none")
    weights = torch.where((targets >= 3) & (targets <= 8_194), 0.04, 1.0) * (targets != IGNORED)
    squares = scores.logsumexp(dim=-1)[targets != IGNORED] ** 2
    return (weights * entropy).sum() / weights.sum() + 1e-5 * squares.mean()


def peak(samples: int, vocabulary: int, chunk: int | None) -> tuple[int, torch.Tensor]:
    """Peak bytes of logits in a step, and the gradient of the hidden states."""
    torch.manual_seed(0)
    labels, is_world = batch(samples)
    hidden = torch.randn(*labels.shape, HIDDEN, requires_grad=True)
    head = torch.randn(vocabulary, HIDDEN, requires_grad=True)
    with WideTensors(vocabulary) as counted:
        if chunk is None:
            plain_loss(hidden @ head.T, labels).backward()
        else:
            losses = chunked_losses(hidden, head, labels, chunk=chunk)
            combine(means(losses, "published", is_world=is_world)).backward()
    return counted.peak, hidden.grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=65_536)
    parser.add_argument("--chunk", type=int, default=512)
    options = parser.parse_args()
    labels, _ = batch(options.samples)
    supervised = int((labels[:, 1:] != IGNORED).sum())
    print(
        f"{options.samples} samples, {labels.numel():,} positions, {supervised:,} of them supervised "
        f"({100 * supervised / labels.numel():.0f} %), vocabulary {options.vocabulary:,}, fp32"
    )
    full, gradient = peak(options.samples, options.vocabulary, None)
    print(f"all positions               {full / 2**20:9,.0f} MiB")
    for chunk in (supervised, options.chunk):
        size, found = peak(options.samples, options.vocabulary, chunk)
        error = float((found - gradient).norm() / gradient.norm())
        name = "supervised positions" if chunk == supervised else f"… in chunks of {chunk:,}"
        print(f"{name:27} {size / 2**20:9,.0f} MiB  {100 * size / full:4.1f} %   gradient off by {error:.1e}")


if __name__ == "__main__":
    main()
