"""The commands that train: `worldvla train`, `worldvla train-tokenizer`.

Their options are the fields of a recipe, whose name is among the arguments: they are made when it is known.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from worldvla_libero.cli.bars import phase_bars
from worldvla_libero.embedded import default_model_path, sample_data_path
from worldvla_libero.training.recipes import (
    PRINTED,
    RECIPES,
    SMOKE,
    TOKENIZER_RECIPES,
    Recipe,
    RecipeError,
    changed_fields,
    find_recipe,
)
from worldvla_libero.training.tokenizer_training import FrameSettings, Intervals
from worldvla_libero.training.training import RunOptions
from worldvla_tokenizers.vqgan import VQGANConfig
from worldvla_tokenizers.vqgan_training import VQGANTraining

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_RECIPE = "nano"

EXIT_OK = 0

Flat = tyro.conf.OmitArgPrefixes

_AS_USUAL, _INTERVALS = RunOptions(), Intervals()


def commands(arguments: Sequence[str]) -> dict[str, Callable[..., int]]:
    """The two commands with the defaults of the recipe that the arguments name.

    Raises:
        RecipeError: there is no such recipe.
    """
    name = _recipe_name(arguments)
    if arguments[:1] == ["train-tokenizer"]:
        if name not in TOKENIZER_RECIPES:
            raise RecipeError(f"no recipe {name!r} for image tokenizers; existing: {', '.join(TOKENIZER_RECIPES)}")
        return {"train-tokenizer": _train_tokenizer_command(name)}
    return {"train": _train_command(find_recipe(name))}


def _train_command(default: Recipe) -> Callable[..., int]:
    def train(
        recipe: str = default.name,
        data: str | None = None,
        out: Path | None = None,
        tokenizer: str | None = None,
        init: str | None = None,
        limit: int | None = None,
        list: bool = False,
        run: Annotated[RunOptions, Flat] = _AS_USUAL,
        settings: Annotated[Recipe, Flat] = default,
    ) -> int:
        """Train a recipe of the paper, or one of your own: any field of the recipe can be set.

        Interrupted, the same command goes on, to the same weights. On several GPUs or machines start it with
        `accelerate launch` or `torchrun` (docs/cluster.md).

        Args:
            recipe: Name; with --list, all of them are shown.
            data: Token data set that `worldvla prepare` made, a folder or a repository of the Hub; of recipe smoke
                by default the few demonstrations that come with the package.
            out: Folder of the run; by default worldvla-runs/ and the name of the recipe.
            tokenizer: Folder or Hub repository of the image tokenizer that the data were made with; by default
                the one of the default model.
            init: Folder or Hub repository of the weights to start from, unless the recipe starts from scratch.
            limit: Stop after so many optimizer steps, as if interrupted.
            list: Show the recipes and stop.
            run: How to run it here.
            settings: The recipe.
        """
        console = _console()
        if list:
            _print_recipes(console)
            return EXIT_OK
        if data is None and settings.name == SMOKE.name:
            data = str(sample_data_path())
        if data is None:
            raise RecipeError(
                f"recipe {settings.name} needs --data, frames of {settings.image_size} px of "
                f"{' and '.join(settings.suites) or 'your own'}: worldvla prepare SOURCE "
                f"--image-size {settings.image_size}"
            )
        return _train(settings, data, out, tokenizer, init, limit, run, console)

    return train


def _train(
    recipe: Recipe,
    data: str,
    out: Path | None,
    tokenizer: str | None,
    init: str | None,
    limit: int | None,
    run: RunOptions,
    console: Console,
) -> int:
    from worldvla_libero.training.training import train_recipe

    folder = out or Path("worldvla-runs") / recipe.name
    changes = changed_fields(recipe)
    told = "".join(f"\n  {name} = {value}" for name, value in changes.items())
    console.print(f"recipe {recipe.name}: {recipe.source}{told}", highlight=False, markup=False)
    _warn_of_slow_bf16(console, recipe.precision, cpu=run.cpu)
    record = train_recipe(
        recipe,
        data,
        folder,
        tokenizer=default_model_path() if tokenizer is None else tokenizer,
        init=init,
        limit=limit,
        options=run,
    )
    _leave_group()
    _print_numbers(console, f"{record['steps']:,} of {record['of_steps']:,} steps", record["last"])
    console.print(f"wrote {folder}", highlight=False, markup=False)
    return EXIT_OK


def _warn_of_slow_bf16(console: Console, precision: str, *, cpu: bool) -> None:
    """Say so where bf16, which is meant to be fast, is computed without instructions for it."""
    import torch

    if precision != "bf16" or (torch.cuda.is_available() and not cpu):
        return
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch does not tell
    if told.get("architecture") == "x86_64" and not told.get("avx512_bf16"):
        console.print(
            "this CPU has no instructions for bf16: --precision fp32 is faster", style="yellow", highlight=False
        )


def _train_tokenizer_command(name: str) -> Callable[..., int]:
    default = TOKENIZER_RECIPES[name]
    frame_settings = FrameSettings(image_size=default.image_size)

    def train_tokenizer(
        source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
        out: Path = Path("worldvla-tokenizer"),
        recipe: str = name,
        init: str | None = None,
        until: int | None = None,
        perceptual_weights: Path | None = None,
        dtype: Literal["bf16", "fp32"] = "bf16",
        frames: Annotated[FrameSettings, Flat] = frame_settings,
        topology: Annotated[VQGANConfig, Flat] = default.topology,
        training: Annotated[VQGANTraining, Flat] = default.training,
        every: Intervals = _INTERVALS,
    ) -> int:
        """Fit a VQ-GAN to the frames of demonstrations.

        Takes HDF5 with frames and LeRobotDataset v3 (`worldvla replay` makes both). Interrupted, the same command
        goes on, to the same weights.

        Args:
            source: Folder, file or Hub repository of demonstrations with frames.
            out: Folder of the run, and of the image tokenizer in the end.
            recipe: Name of a preset: nano or published.
            init: Folder or Hub repository of the VQ-GAN to start from, whose topology it keeps; by default a fresh
                one.
            until: Stop before this step, as if interrupted.
            perceptual_weights: torchvision's file of VGG-16, for the perceptual loss; without it there is none.
            dtype: What the weights are rounded to in the end.
            frames: Which frames.
            topology: The network.
            training: How it is trained.
            every: Steps between two logs, looks and checkpoints.
        """
        return _train_tokenizer(
            source, out, init, until, perceptual_weights, dtype, frames, topology, training, every, _console()
        )

    return train_tokenizer


def _train_tokenizer(
    source: str,
    out: Path,
    init: str | None,
    until: int | None,
    perceptual_weights: Path | None,
    dtype: Literal["bf16", "fp32"],
    frames: FrameSettings,
    topology: VQGANConfig,
    training: VQGANTraining,
    every: Intervals,
    console: Console,
) -> int:
    import torch

    from worldvla_libero.prepare import load_image_tokenizer, open_source
    from worldvla_libero.training.tokenizer_training import train_tokenizer
    from worldvla_tokenizers import VQGAN, ImageTokenizer, Vocabulary

    if init is None:
        torch.manual_seed(training.seed)
        vqgan = VQGAN(topology)
    else:
        vqgan = load_image_tokenizer(init).vqgan
    ImageTokenizer(vqgan).check_vocabulary(Vocabulary.published())  # now, not when a model is to read its codes
    if perceptual_weights is None and training.perceptual_weight:
        console.print(
            "without perceptual loss: --perceptual-weights names no file of VGG-16 (torchvision's "
            "vgg16-397923af.pth)",
            style="yellow",
            highlight=False,
        )
    _warn_of_slow_bf16(console, training.precision, cpu=False)
    with phase_bars(console) as show:
        record = train_tokenizer(
            vqgan,
            open_source(source, replay=False),
            out,
            frames=frames,
            training=training,
            intervals=every,
            perceptual_weights=perceptual_weights,
            dtype=dtype,
            until=until,
            fresh=init is None,
            on_progress=show,
        )
    _leave_group()
    _print_numbers(console, f"{record['steps']:,} of {training.steps:,} steps", record["held_out"])
    console.print(f"wrote {out}", highlight=False, markup=False)
    return EXIT_OK


def _leave_group() -> None:
    """Leave the other processes in order: threads of the group can abort an interpreter that ends with them."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _recipe_name(arguments: Sequence[str]) -> str:
    for place, argument in enumerate(arguments):
        if argument == "--recipe" and place + 1 < len(arguments):
            return arguments[place + 1]
        if argument.startswith("--recipe="):
            return argument.removeprefix("--recipe=")
    return DEFAULT_RECIPE


def _print_recipes(console: Console) -> None:
    from rich.table import Column, Table

    table = Table(Column("recipe", no_wrap=True), Column("what", overflow="fold"), "the paper's")
    for recipe in RECIPES.values():
        table.add_row(recipe.name, recipe.source, PRINTED.get(recipe.name, ""))
    console.print(table)
    console.print("all fields of one: worldvla train --recipe NAME --help", highlight=False)


def _print_numbers(console: Console, title: str, numbers: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("", "value", title=title)
    for name, value in numbers.items():
        if isinstance(value, int | float):
            table.add_row(name, f"{value:.6g}")
    console.print(table)


def _console() -> Console:
    """Of several processes only the first speaks."""
    from rich.console import Console

    return Console(quiet=os.environ.get("RANK", "0") != "0")
