"""The command that evaluates the world model: `worldvla imagine`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from worldvla_libero.cli.bars import counting_bars
from worldvla_libero.cli.model import Flat, ModelOptions, load_model

if TYPE_CHECKING:
    from rich.console import Console

    from worldvla_libero.evaluation.world.clips import Plan
    from worldvla_libero.jobs.parts import Dropped

EXIT_OK = 0

_SHOWN = 5  # ids; the rest is in the record


def imagine(
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")],
    out: Path = Path("worldvla-imagine"),
    frames: tuple[int, ...] = (10, 50),
    episodes: int | None = None,
    start: int | None = None,
    seed: int = 0,
    context: int = 1,
    rounds: int = 1,
    world_prompt: Literal["published", "published_inference", "paper"] | None = None,
    split: str = "validation",
    camera: str | None = None,
    split_of: Path | None = None,
    split_rule: Literal["paper", "published"] = "paper",
    train_fraction: float = 0.9,
    split_seed: int = 0,
    action_key: str | None = None,
    lpips_weights: Path | None = None,
    lpips_network: Literal["alex", "vgg", "squeeze"] = "alex",
    fvd_weights: Path | None = None,
    fetch_weights: bool = False,
    model: Annotated[ModelOptions, Flat] = ModelOptions(),
) -> int:
    """Imagine held-out trajectories from their true actions; measure PSNR, SSIM, LPIPS and FVD over the horizon.

    Each frame follows from the imagined one before it. The last true frame, copied, and the true frames as the
    image tokenizer reconstructs them stand beside the model. Interrupted, the same command goes on.

    Args:
        data: Token data set of `worldvla prepare`; or demonstrations with frames, HDF5 or LeRobotDataset v3. A
            folder, file or Hub repository.
        out: Folder for world.json, curves, film strips and videos.
        frames: Horizons: how many frames are imagined.
        episodes: Trajectories, one clip of each, taken turn by turn from every task; by default all.
        start: Step of the last true frame that is shown; by default drawn for each trajectory.
        seed: Of that draw.
        context: True frames that the model is shown.
        rounds: Frames that follow from one prompt, as the model was trained.
        world_prompt: Words that ask for the next frame; by default those saved with the model.
        split: Part of the data that is imagined.
        camera: Whose frames, where demonstrations have several.
        split_of: Token data set made of the demonstrations, whose split is theirs.
        split_rule: How demonstrations are divided otherwise, as `worldvla prepare --split` does.
        train_fraction: Share of the training split of demonstrations.
        split_seed: Of the paper's split of demonstrations.
        action_key: Name of the actions in a LeRobotDataset, where it is not the usual one.
        lpips_weights: File of torchvision's ImageNet weights of the LPIPS network.
        lpips_network: Network of LPIPS.
        fvd_weights: File of I3D weights, i3d_pretrained_400.pt.
        fetch_weights: Download the weights that no file is given for.
        model: Which model, and how to load it.
    """
    import torch

    from worldvla_libero.evaluation.imagine import imagine as run_imagine
    from worldvla_libero.evaluation.world.backbones import load_backbones
    from worldvla_libero.evaluation.world.clips import ImagineSettings, choose_clips
    from worldvla_libero.evaluation.world.trajectories import open_trajectories
    from worldvla_tokenizers.sequence import WORLD_PROMPTS

    console = _console()
    settings = ImagineSettings(frames, episodes, context, rounds, start, seed)
    trajectories = open_trajectories(
        data,
        split=split,
        camera=camera,
        rule=split_rule,
        fraction=train_fraction,
        seed=split_seed,
        prepared=split_of,
        **({"action_key": action_key} if action_key else {}),
    )
    planned = choose_clips(trajectories.keys, settings)
    # First what is small: a wrong file should not cost the loading of a large model.
    backbones = load_backbones(
        lpips_weights=lpips_weights,
        lpips_network=lpips_network,
        fvd_weights=fvd_weights,
        fetch=fetch_weights,
        device=model.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    agent, name = load_model(model)
    if world_prompt is not None:
        agent = agent.with_settings(world_prompt=WORLD_PROMPTS[world_prompt])
    with _progress(console, planned) as on_part:
        record = run_imagine(
            agent, trajectories, out, settings, model_name=name, backbones=backbones, on_part=on_part
        )
    _print_record(console, record)
    console.print(f"wrote {out / 'world.json'}, curves, film strips and videos", highlight=False, markup=False)
    return EXIT_OK


@contextmanager
def _progress(console: Console, planned: Plan) -> Iterator[Callable[[str, Path | Dropped], None]]:
    """A bar that counts frames, clip by clip."""
    lengths = {clip.name: clip.frames for clip in planned.clips}
    with counting_bars(console) as bars:
        bar = bars.add_task("imagining", total=planned.frames)
        yield lambda name, _: bars.advance(bar, lengths[name])


def _print_record(console: Console, record: Mapping[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from worldvla_libero.evaluation.world.record import KINDS, RECORD_FILE

    title = f"{record['model']} on {record['data']}, {record['split']}: mean (95 % interval)"
    table = Table(title=escape(title))
    for column in ("frames", "clips", "", "PSNR [dB]", "SSIM", "LPIPS", "FVD"):
        table.add_column(escape(column), justify="left" if not column else "right")
    for horizon, row in record["horizons"].items():
        for index, kind in enumerate(KINDS):
            cells = [
                _interval(row[metric], kind, digits) for metric, digits in (("psnr", 2), ("ssim", 4), ("lpips", 4))
            ]
            fvd = row["fvd"] and row["fvd"][kind]
            cells.append("-" if fvd is None else f"{fvd:.1f}")
            heads = (horizon, str(row["episodes"])) if index == 0 else ("", "")
            table.add_row(*heads, kind, *cells, end_section=kind == KINDS[-1])
    console.print(table)
    for horizon, ids in record["too_short"].items():
        if ids:
            _warn(console, f"{len(ids)} too short for {horizon} frames: {_some(ids)}")
    if record["dropped"]:
        dropped = [f"{one['id']} ({one['reason']})" for one in record["dropped"]]
        _warn(console, f"{len(dropped)} dropped, see {RECORD_FILE}: {_some(dropped)}")
    for what, why in record["not_computed"].items():
        _warn(console, f"{what} not computed: {why}")
    console.print(f"{record['seconds_per_frame']:.3f} s a frame", highlight=False)


def _interval(row: Mapping[str, Any] | None, kind: str, digits: int) -> str:
    found = row and row[kind]
    if not found:
        return "-"
    mean = f"{found['mean']:.{digits}f}"
    return mean if found["low"] is None else f"{mean} ({found['low']:.{digits}f} … {found['high']:.{digits}f})"


def _some(words: list[str]) -> str:
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more


def _warn(console: Console, line: str) -> None:
    console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)


def _console() -> Console:
    from rich.console import Console

    return Console()
