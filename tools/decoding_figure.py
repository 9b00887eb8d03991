"""Draws docs/images/decoding.png: the mask of a chunk, and the pass in which each of its ids becomes known.

python tools/decoding_figure.py
"""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Rectangle

from worldvla_model import masks
from worldvla_tokenizers import Vocabulary, sequence

ACTIONS, DIMENSIONS = 3, 7
TARGET = Path(__file__).parent.parent / "docs" / "images" / "decoding.png"
NAMES = ["begin", *[f"{d + 1}" for d in range(DIMENSIONS)], "end"]
GIVEN = "#d9d9d9"


def main() -> None:
    """Draw and write."""
    vocabulary = Vocabulary.published()
    image = sequence.image_block(np.zeros((2, 2), int), vocabulary)
    prompt = sequence.action_prompt([16_400] * 3, [np.zeros((2, 2), int)], vocabulary)
    chunk = [*sequence.action_block([10_006] * DIMENSIONS, vocabulary)] * ACTIONS
    allowed = masks.dense("action_isolated", torch.tensor([[*prompt, *chunk]]), vocabulary)[0].numpy()
    computed_in = [*[1] * len(prompt), *[1, *range(2, DIMENSIONS + 2), DIMENSIONS + 1] * ACTIONS]

    colours = plt.get_cmap("viridis_r", 8)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11.5, 5.2), dpi=130, width_ratios=(1.15, 1), layout="constrained"
    )
    picture = np.ones((*allowed.shape, 3))
    for row, seen in enumerate(allowed):
        picture[row, seen] = colours(computed_in[row] - 1)[:3]
    left.imshow(picture, interpolation="nearest")
    edges = [0, 4, 4 + len(image), len(prompt)]
    edges += [len(prompt) + (DIMENSIONS + 2) * (k + 1) for k in range(ACTIONS)]
    for edge in edges[1:]:
        left.axhline(edge - 0.5, color="white", linewidth=0.8)
        left.axvline(edge - 0.5, color="white", linewidth=0.8)
    labels = ["words", "image", "", *[f"action {k + 1}" for k in range(ACTIONS)]]
    middles = [(low + high - 1) / 2 for low, high in itertools.pairwise(edges)]
    left.set_yticks(middles, labels)
    left.set_xticks(middles, labels, rotation=90)
    left.tick_params(length=0)
    left.set_title("who looks at whom; colour: the pass that computes the row", fontsize=10)
    left.set_ylabel("query")
    left.set_xlabel("key")

    right.set_xlim(0, DIMENSIONS + 2)
    right.set_ylim(ACTIONS + 0.9, -0.7)
    right.set_axis_off()
    for column, name in enumerate(NAMES):
        right.text(column + 0.5, -0.12, name, ha="center", fontsize=9)
        for row in range(ACTIONS):
            colour = GIVEN if column == 0 else colours(column - 1)
            right.add_patch(Rectangle((column + 0.05, row + 0.05), 0.9, 0.9, color=colour))
            if column:
                ink = "white" if column > 4 else "black"
                at = {"x": column + 0.5, "y": row + 0.5, "ha": "center", "va": "center"}
                right.text(s=f"{column}", fontsize=13, color=ink, **at)
    for row in range(ACTIONS):
        right.text(-0.15, row + 0.5, f"action {row + 1}", ha="right", va="center", fontsize=9)
    right.text(
        0,
        ACTIONS + 0.25,
        "Number and colour: the pass that chooses the id; grey needs none.\n"
        "Pass 8 confirms the end and what follows it; constrained chunks do without.",
        va="top",
        fontsize=9,
    )
    right.set_title("in which pass each id becomes known", fontsize=10)
    TARGET.parent.mkdir(exist_ok=True)
    figure.savefig(TARGET)


if __name__ == "__main__":
    main()
