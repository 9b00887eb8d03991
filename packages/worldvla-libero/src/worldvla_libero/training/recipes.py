"""Every training set-up of the paper as one frozen dataclass, and nano, the small model that comes with us.

    RECIPES["table3-row5-goal"]     a row of a table, on a suite
    RECIPES["nano"]

A recipe says what is trained on what; where the data and the initial weights lie is for the command line. Sources:
paper §4.1 and §4.2, and the released training scripts where the paper is silent (SPEC §8).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from worldvla_libero.data.samples import SampleKind, VideoSamples, WorldSamples
from worldvla_libero.evaluation import published_results
from worldvla_model.loss import LossRule
from worldvla_tokenizers.vqgan import VQGANConfig
from worldvla_tokenizers.vqgan_training import VQGANTraining

Initial = Literal["chameleon", "checkpoint", "scratch"]
"""Chameleon-7B in the published layout, whose image rows of the head are zeroed; any other weights; none."""

SUITES = {"goal": "libero_goal", "object": "libero_object", "spatial": "libero_spatial", "long": "libero_10"}
"""The suites by the paper's names."""


class RecipeError(ValueError):
    """A recipe that does not exist, or one with values that do not fit together."""


@dataclass(frozen=True)
class ModelSize:
    """Size of a model that is trained from scratch; the vocabulary is that of its text tokenizer.

    Attributes:
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated MLP.
        layers: decoder layers.
        heads: attention heads.
        max_positions: longest sequence.
        tied: one matrix for embedding and head.
    """

    hidden_size: int = 256
    intermediate_size: int = 704
    layers: int = 4
    heads: int = 4
    max_positions: int = 1_024
    tied: bool = True


@dataclass(frozen=True)
class Recipe:
    """One training set-up.

    Attributes:
        name: what it is called.
        source: what of the paper it is.
        suites: whose demonstrations; empty for any.
        image_size: pixels that frames are tokenized at.
        history: M, frames in an action prompt.
        chunk: K, actions of a chunk.
        mixture: what is trained: actions, a world model, both, or actions and video prediction.
        world_history: frames and actions in a world prompt.
        rounds: N, frames a world sample predicts, one after the other.
        video_frames: frames a video sample predicts.
        world_share: share of world (or video) samples in every batch; None to shuffle all samples uniformly.
        held_out: whether 10 % of the trajectories are kept for validation.
        attention: mask of action samples; world samples are causal.
        loss: rule of the loss.
        alpha: weight of image tokens (published) or of world samples (paper).
        z_loss_weight: weight of the z-loss.
        initial: weights to start from.
        lora_rank: of adapters (LoRA, extra `lora`), which then are all that is trained; 0 to train all weights.
            Weights beneath are in the type of `precision`, adapters and Adam in fp32 (docs/fine-tune.md counts
            the memory). They learn at higher rates than all weights do, 1e-4 or so.
        lora_alpha: what adapters add is multiplied by lora_alpha / lora_rank; 0 for twice the rank.
        size: of a model from scratch.
        epochs: passes over the data, of the kind of sample that takes longest.
        max_steps: optimizer steps in place of epochs; 0 for epochs.
        batch_size: samples an optimizer step, over all processes and accumulation steps.
        learning_rate: the highest.
        schedule: of the learning rate after the warm-up.
        warmup_epochs: in which it rises.
        weight_decay: of AdamW, on all parameters.
        beta2: of AdamW; beta1 is 0.9.
        max_grad_norm: gradients are cut to this norm.
        dropout: of what each sublayer adds.
        precision: type to compute in; weights that are trained are fp32.
        gradient_checkpointing: compute activations again instead of keeping them.
        stored: type that the finished weights are stored in; checkpoints hold fp32.
        seed: of weights, dropout and the order of samples.

    Raises:
        RecipeError: values that do not fit together.
    """

    name: str
    source: str
    suites: tuple[str, ...]
    image_size: int = 256
    history: int = 2
    chunk: int = 5
    mixture: Literal["action", "world", "action+world", "action+video"] = "action+world"
    world_history: int = 1
    rounds: int = 1
    video_frames: int = 1
    world_share: float | None = None
    held_out: bool = True
    attention: str = "action_isolated"
    loss: LossRule = "published"
    alpha: float = 0.04
    z_loss_weight: float = 1e-5
    initial: Initial = "chameleon"
    lora_rank: int = 0
    lora_alpha: float = 0.0
    size: ModelSize = field(default_factory=ModelSize)
    epochs: float = 40
    max_steps: int = 0
    batch_size: int = 32
    learning_rate: float = 5e-6
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_epochs: float = 0.01
    weight_decay: float = 0.1
    beta2: float = 0.95
    max_grad_norm: float = 4.0
    dropout: float = 0.05
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = True
    stored: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("history", "chunk", "world_history", "rounds", "video_frames", "batch_size"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{self.name}: {name} is {getattr(self, name)}; allowed: 1 and above")
        for name in ("epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"{self.name}: {name} is {getattr(self, name)}; allowed: above 0")
        weights = ("weight_decay", "max_grad_norm", "alpha", "z_loss_weight", "lora_rank", "lora_alpha")
        for name in ("max_steps", "warmup_epochs", *weights):
            if not getattr(self, name) >= 0:
                raise RecipeError(f"{self.name}: {name} is {getattr(self, name)}; allowed: 0 and above")
        if self.lora_rank and self.initial != "checkpoint":
            # Frozen would be a head that knows no actions yet: random, or Chameleon's with its image rows zeroed.
            raise RecipeError(
                f"{self.name}: lora_rank is {self.lora_rank} and initial is {self.initial!r}; adapters need a "
                "'checkpoint' that acts already, or lora_rank 0"
            )
        if self.lora_alpha and not self.lora_rank:
            raise RecipeError(f"{self.name}: lora_alpha is {self.lora_alpha}, but lora_rank is 0: no adapters")
        if self.world_share is not None and not 0 < self.world_share < 1:
            raise RecipeError(f"{self.name}: world_share is {self.world_share}; allowed: between 0 and 1, or None")
        if self.world_share is not None and "+" not in self.mixture:
            raise RecipeError(
                f"{self.name}: world_share is {self.world_share}, but only {self.mixture} is trained"
            )

    @property
    def trains_actions(self) -> bool:
        """Whether action samples are in the mixture."""
        return self.mixture.startswith("action")

    @property
    def second_kind(self) -> SampleKind | None:
        """The other kind of sample in the mixture."""
        if self.mixture == "action+video":
            return VideoSamples(self.history, self.video_frames)
        return WorldSamples(self.world_history, self.rounds) if "world" in self.mixture else None


@dataclass(frozen=True)
class TokenizerRecipe:
    """How an image tokenizer is trained.

    Attributes:
        name: what it is called.
        topology: the network.
        training: losses, steps and schedule.
        image_size: pixels that frames are brought to.
    """

    name: str
    topology: VQGANConfig
    training: VQGANTraining
    image_size: int = 256


def _paper_recipes() -> Iterator[tuple[Recipe, str]]:
    """Tables 2 to 6, Figures 6 and 7, in this order, and what the paper printed for each."""

    def on(suite: str, name: str, source: str, **changes: object) -> Recipe:
        chunk = 10 if suite == "long" else 5  # paper §4.1
        values = {"chunk": chunk, **changes}
        return Recipe(f"{name}-{suite}", source, (SUITES[suite],), **values)  # type: ignore[arg-type]

    for size, printed in ((256, published_results.SUCCESS[1]), (512, published_results.SUCCESS[0])):
        for suite in SUITES:
            # Released: a smaller batch for LIBERO-Goal at 256 px, 2 a GPU on 4 GPUs.
            batch = 8 if (suite, size) == ("goal", 256) else 32
            about = f"Table 2, WorldVLA at {size} px, trained on all trajectories"
            recipe = on(suite, f"table2-{size}", about, image_size=size, held_out=False, batch_size=batch)
            yield recipe, _rate(printed.rates[SUITES[suite]])
    rows: tuple[tuple[str, dict[str, object]], ...] = (
        ("action model", {"mixture": "action", "chunk": 1}),
        ("action and world model", {"chunk": 1}),
        ("chunks under the causal mask", {"mixture": "action", "attention": "causal"}),
        ("chunks under the proposed mask", {"mixture": "action"}),
        ("chunks under the proposed mask, and world model", {}),
    )
    for number, (about, changes) in enumerate(rows, start=1):
        rates = published_results.ACTION_ABLATION[number - 1]
        for suite in SUITES:
            recipe = on(suite, f"table3-row{number}", f"Table 3, row {number}: {about}", **changes)
            yield recipe, _rate(rates[SUITES[suite]])
    both, world = (_decibels(row) for row in published_results.IMAGINATION)
    for suite in SUITES:  # printed once, for all
        yield on(suite, "table4-world", "Table 4: world model alone", mixture="world"), world
        yield on(suite, "table4-action-world", "Table 4: action and world model"), both
    # Which suite Table 5 and Figure 6 are of is not said: the rates of Table 5 are those of Goal in Table 3.
    for frames in (1, 2, 4):
        for chunk, about in ((1, "without chunks"), (5, "with chunks")):
            name = f"table5-{frames}-frames-{'chunks' if chunk > 1 else 'single'}"
            source = f"Table 5: {frames} frames in the prompt, {about}"
            recipe = on("goal", name, source, history=frames, mixture="action", chunk=chunk)
            yield recipe, _rate(published_results.HISTORY_ABLATION[frames, chunk > 1])
    for suite in SUITES:
        single: dict[str, object] = {"mixture": "action", "chunk": 1}
        plain, pretrained = (published_results.PRETRAINING_ABLATION[done][SUITES[suite]] for done in (False, True))
        yield on(suite, "table6-plain", "Table 6: without world model pretraining", **single), _rate(plain)
        source = "Table 6: from the weights of table4-world"
        recipe = on(suite, "table6-pretrained", source, initial="checkpoint", **single)
        yield recipe, _rate(pretrained)
    for chunk in (1, 2, 4, 5, 6, 8, 10):  # ours: the text names no lengths
        for mask in ("causal", "action_isolated"):
            name, source = (
                f"figure6-k{chunk}-{mask.replace('_', '-')}",
                f"Figure 6: {chunk} actions a chunk, {mask}",
            )
            yield on("goal", name, source, mixture="action", chunk=chunk, attention=mask), ""
    for suite in ("goal", "object", "spatial"):
        yield on(suite, "figure7-action", "Figure 7: action model", mixture="action"), ""
        yield on(suite, "figure7-world", "Figure 7: action and world model"), ""
        video: dict[str, object] = {"mixture": "action+video", "video_frames": 5}  # as many as actions: K
        yield on(suite, "figure7-video", "Figure 7: action model and video prediction", **video), ""


def _rate(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def _decibels(row: published_results.PublishedImagination) -> str:
    return f"{row.metrics[10]['psnr']:.2f}, {row.metrics[50]['psnr']:.2f} dB"


NANO = Recipe(
    "nano",
    "the default model of this package, for CPUs; not of the paper",
    ("libero_object", "libero_spatial"),
    image_size=128,
    world_share=0.3,
    initial="scratch",
    loss="paper",
    alpha=0.3,
    max_steps=12_000,
    batch_size=16,
    learning_rate=1e-3,
    schedule="cosine",
    warmup_epochs=0.1,
    max_grad_norm=1.0,
    dropout=0.0,
    gradient_checkpointing=False,
)
"""Small enough to be trained without a GPU and to be shipped."""

SMOKE = dataclasses.replace(
    NANO,
    name="smoke",
    source="does training work here? a minute or two on a CPU; not of the paper",
    max_steps=40,
    batch_size=8,
    warmup_epochs=0.03,
    precision="fp32",
)
"""Nano's model for a few steps, by default on the demonstrations that come with the package."""

FINE_TUNE = Recipe(
    "fine-tune",
    "a published checkpoint, or one of your own, on your data; not of the paper",
    (),
    initial="checkpoint",
    epochs=10,
)
"""The paper's settings, from weights that act already."""

_PAPER = tuple(_paper_recipes())

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (NANO, SMOKE, FINE_TUNE, *(recipe for recipe, _ in _PAPER))
}

PRINTED: dict[str, str] = {recipe.name: printed for recipe, printed in _PAPER if printed}
"""By name of a recipe what the paper printed: success, or PSNR after 10 and 50 frames. Figures have no numbers."""

TOKENIZER_RECIPES: dict[str, TokenizerRecipe] = {
    recipe.name: recipe
    for recipe in (
        TokenizerRecipe(
            "nano",
            VQGANConfig(
                ch=32, ch_mult=(1, 1, 2, 2, 3), num_res_blocks=1, z_channels=64, embed_dim=32, n_embed=2_048
            ),
            VQGANTraining(
                steps=10_000, learning_rate=4e-4, discriminator_start=None, restart_after=100, precision="bf16"
            ),
            image_size=128,
        ),
        TokenizerRecipe("published", VQGANConfig(), VQGANTraining(precision="bf16")),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        RecipeError: there is none; the message names those that are like it.
    """
    import difflib

    if name not in RECIPES:
        like = difflib.get_close_matches(name, RECIPES, n=5, cutoff=0.3)
        raise RecipeError(f"no recipe {name!r}; like it: {', '.join(like) or 'none'}; all: worldvla train --list")
    return RECIPES[name]


def changed_fields(recipe: Recipe) -> dict[str, object]:
    """Where a recipe differs from the one of its name."""
    if recipe.name not in RECIPES:
        return dataclasses.asdict(recipe)
    known = RECIPES[recipe.name]
    return {
        part.name: getattr(recipe, part.name)
        for part in dataclasses.fields(recipe)
        if getattr(recipe, part.name) != getattr(known, part.name)
    }


__all__ = [
    "FINE_TUNE",
    "NANO",
    "PRINTED",
    "RECIPES",
    "SMOKE",
    "SUITES",
    "TOKENIZER_RECIPES",
    "ModelSize",
    "Recipe",
    "RecipeError",
    "TokenizerRecipe",
    "changed_fields",
    "find_recipe",
]
