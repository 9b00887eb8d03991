"""Fit a VQ-GAN to the frames of demonstrations.

The frames go into one array once; training can be interrupted, and leaves numbers and pictures on the way.

    frames/             the frames as arrays, what moves in them if that is weighted, and what they were taken from
    checkpoint.pt       where training goes on
    log.jsonl, log.csv, curves.png, reconstructions.png
    config.json, model.safetensors, image_tokenizer.json, training.json, README.md      the result
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from worldvla_libero.data.episodes import EpisodeKey, Source, check_episode, digest, split
from worldvla_libero.figures import save_strips
from worldvla_libero.training.run_log import RunLog
from worldvla_libero.versions import installed_versions
from worldvla_tokenizers import VQGAN, ImageTokenizer
from worldvla_tokenizers.files import staged_folder, write_text_atomic
from worldvla_tokenizers.image import fit
from worldvla_tokenizers.vqgan_training import (
    Frames,
    Masks,
    VQGANTrainer,
    VQGANTraining,
    VQGANTrainingError,
    perceptual_loss,
)

FRAMES_FOLDER = "frames"
CHECKPOINT_FILE = "checkpoint.pt"
STRIPS_FILE = "reconstructions.png"
RECORD_FILE = "training.json"
CARD_FILE = "README.md"

STILL_LEVELS = 8
"""How far a pixel may be from the background and be still, in levels of 255 of any channel.

Codecs and sensors change still pixels by less; a shadow is often a matter of more.
"""

_TRAINING, _HELD_OUT = "train.npy", "validation.npy"
_TRAINING_MOVING, _HELD_OUT_MOVING = "train_moving.npy", "validation_moving.npy"
_SHOWN = 8  # frames in a strip


class FramesError(ValueError):
    """Demonstrations without frames to train on, or other frames than an interrupted run began with."""


@dataclass(frozen=True)
class FrameSettings:
    """Which frames a tokenizer is trained on.

    Attributes:
        image_size: pixels that frames are brought to.
        camera: whose frames; None where there is only one.
        limit: frames at most, spread evenly over the episodes; None for all.
        held_out: frames at most to measure on, of the episodes held out.
        train_fraction: share of the episodes that train.
        split_seed: of that split; with the same seed `worldvla prepare` holds out the same episodes.

    Raises:
        FramesError: `limit` or `held_out` is below 1.
    """

    image_size: int = 256
    camera: str | None = None
    limit: int | None = None
    held_out: int = 256
    train_fraction: float = 0.9
    split_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("limit", "held_out"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FramesError(f"{name} is {value} frames; allowed: 1 and above")


@dataclass(frozen=True)
class Intervals:
    """What happens every so many steps.

    Attributes:
        log: average the losses and write them down.
        evaluate: reconstruct held-out frames and draw them.
        save: write a checkpoint.

    Raises:
        VQGANTrainingError: one is below 1.
    """

    log: int = 50
    evaluate: int = 1_000
    save: int = 500

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise VQGANTrainingError(f"{name} is every {value} steps; allowed: 1 and above")


def moving_pixels(frames: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Tell what moves from the background: the median frame of the episode.

    What rests in one place for more than half of the episode is background there, an arm, too. A camera that moves
    has none: then everything moves.

    Args:
        frames: (T, H, W, 3), all of one episode.

    Returns:
        (T, H, W) True where a channel differs from the background by more than `STILL_LEVELS`.
    """
    background = np.median(frames, axis=0)
    # Frame by frame: the differences of all of them would take several times the memory of the episode.
    return np.stack([(np.abs(frame - background) > STILL_LEVELS).any(axis=-1) for frame in frames])


def gather_frames(
    source: Source,
    folder: str | os.PathLike[str],
    settings: FrameSettings,
    *,
    moving: bool = False,
    on_episode: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Bring frames to one size and into two arrays on disk, for training and held out; memory-mapped.

    What an earlier run gathered from the same episodes under the same settings is taken as it is.

    Args:
        source: demonstrations with frames.
        folder: for the arrays.
        settings: which frames.
        moving: also find out which of their pixels move, for `gathered_masks` to read.
        on_episode: told how many episodes are done, and how many there are.

    Returns:
        (N, S, S, 3) each.

    Raises:
        FramesError: the demonstrations have no frames or none that become square, no episode is held out, or
            others were gathered into this folder.
        EpisodeError: an episode cannot be read.
    """
    folder = Path(folder)
    keys, _ = source.list()
    camera = _camera(source, settings)
    record = {**dataclasses.asdict(settings), "camera": camera, "episodes": digest(keys)}
    record["still_levels"] = STILL_LEVELS if moving else None
    path = folder / "frames.json"
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        other = [
            f"{name} {known.get(name)!r}, not {record[name]!r}"
            for name in record
            if known.get(name) != record[name]
        ]
        if other:
            raise FramesError(f"{folder} holds frames of another run: {'; '.join(other)}; choose another folder")
    else:
        parts = split(keys, fraction=settings.train_fraction, seed=settings.split_seed)
        training = [key for key in keys if parts[key.id] == "train"]
        held_out = [key for key in keys if parts[key.id] != "train"]
        if not held_out:
            raise FramesError(f"{source.name}: no episode is held out of {len(keys)}; lower the share that trains")
        with staged_folder(folder) as stage:
            done, size = 0, settings.image_size
            for name, masks_name, chosen, limit in (
                (_TRAINING, _TRAINING_MOVING, training, settings.limit),
                (_HELD_OUT, _HELD_OUT_MOVING, held_out, settings.held_out),
            ):
                picks = _spread_frames(chosen, limit)
                total = sum(len(pick) for pick in picks.values())
                array = np.lib.format.open_memmap(stage / name, "w+", np.uint8, (total, size, size, 3))
                masks = None
                if moving:  # packed, a bit a pixel: sizes are multiples of 32 px
                    masks = np.lib.format.open_memmap(stage / masks_name, "w+", np.uint8, (total, size, size // 8))
                place = 0
                for key in chosen:
                    done += 1
                    picked = picks[key.id]
                    if not len(picked):
                        continue
                    episode = source.read(key.id, (camera,))
                    check_episode(episode)
                    frames, rows = episode.frames[camera], slice(place, place + len(picked))
                    if masks is None:
                        array[rows] = _squares(key.id, frames[picked], size)
                    else:  # the background is that of all frames
                        pictures = _squares(key.id, frames, size)
                        array[rows] = pictures[picked]
                        masks[rows] = np.packbits(moving_pixels(pictures)[picked], axis=-1)
                    place = rows.stop
                    on_episode(done, len(keys))
                array.flush()
                if masks is not None:
                    masks.flush()
            write_text_atomic(stage / path.name, json.dumps(record, indent=2) + "\n")
    return tuple(np.load(folder / name, mmap_mode="r") for name in (_TRAINING, _HELD_OUT))


def gathered_masks(folder: str | os.PathLike[str]) -> tuple[Masks, Masks]:
    """Which pixels of the frames for training and held out move: what `gather_frames` found, memory-mapped.

    Args:
        folder: that of `gather_frames`, called with `moving`.

    Returns:
        (S, S) bool each, by the index of the frames.

    Raises:
        FileNotFoundError: the frames were gathered without.
    """
    names = (_TRAINING_MOVING, _HELD_OUT_MOVING)
    training, held_out = (_PackedMasks(np.load(Path(folder) / name, mmap_mode="r")) for name in names)
    return training, held_out


def train_tokenizer(
    vqgan: VQGAN,
    source: Source,
    out: str | os.PathLike[str],
    *,
    frames: FrameSettings,
    training: VQGANTraining,
    intervals: Intervals = Intervals(),
    perceptual_weights: str | os.PathLike[str] | None = None,
    dtype: Literal["bf16", "fp32"] = "bf16",
    until: int | None = None,
    fresh: bool = True,
    on_progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Train, or go on where an interrupted run stopped, and write the image tokenizer.

    Args:
        vqgan: where training starts; changed in place.
        source: demonstrations with frames.
        out: folder of the run.
        frames: which frames.
        training: how.
        intervals: how often to log, measure and save.
        perceptual_weights: file of VGG-16 for the perceptual loss; None for none.
        dtype: what the weights are rounded to in the end. All codes are computed from the rounded ones.
        until: stop before this step, as if interrupted.
        fresh: whether `vqgan` was trained on nothing yet; the codes of one that was are kept.
        on_progress: told the phase (`gathering`, `training`), how much of it is done, and how much there is.

    Returns:
        What `training.json` holds.

    Raises:
        FramesError: see `gather_frames`.
        VQGANTrainingError: the run in `out` was started under other settings, or a loss is not finite.
    """
    folder = Path(out)
    perceptual = None if perceptual_weights is None else perceptual_loss(perceptual_weights)
    trainer = VQGANTrainer(vqgan, training, perceptual=perceptual, fresh=fresh)
    weighted = training.motion_weight > 1
    is_main = trainer.accelerator.is_main_process
    with trainer.accelerator.main_process_first():
        train_frames, held_out = gather_frames(
            source,
            folder / FRAMES_FOLDER,
            frames,
            moving=weighted,
            on_episode=lambda done, total: on_progress("gathering", done, total),
        )
    moving, held_out_moving = gathered_masks(folder / FRAMES_FOLDER) if weighted else (None, None)
    checkpoint = folder / CHECKPOINT_FILE
    if checkpoint.is_file():
        trainer.restore(checkpoint)
        end = training.steps if until is None else min(until, training.steps)
        if trainer.step >= end and (known := _finished(folder, trainer.step, dtype)) is not None:
            _round(vqgan, dtype)
            return known
    log = RunLog(folder, step=trainer.step) if is_main else None
    since: dict[str, list[float]] = {}
    began, seconds_before = time.perf_counter(), log.seconds if log is not None else 0.0

    def on_step(step: int, losses: dict[str, float]) -> None:
        if log is None:  # the first process speaks for all
            return
        last = step == training.steps
        for name, value in losses.items():
            since.setdefault(name, []).append(value)
        if step % intervals.log == 0 or last:
            # Over as many steps as there were: a resumed run, or a loss that set in, began between two logs.
            averages = {f"loss_{name}": sum(values) / len(values) for name, values in since.items()}
            since.clear()
            elapsed = seconds_before + time.perf_counter() - began
            log.write(step, {**averages, "learning_rate": training.rate(step - 1), "seconds": elapsed})
        if step % intervals.evaluate == 0 or last:
            measured = trainer.evaluate(held_out, moving=held_out_moving)
            log.write(step, {f"eval_{name}": value for name, value in measured.items()})
            log.draw()
            _draw_strip(folder / STRIPS_FILE, trainer.vqgan, held_out, step)
        if step % intervals.save == 0 or last:
            trainer.save(checkpoint)
        on_progress("training", step, training.steps)

    trainer.train(train_frames, moving=moving, until=until, on_step=on_step)
    _round(vqgan, dtype)
    record = {
        "steps": trainer.step,
        "frames": {**dataclasses.asdict(frames), "training": len(train_frames), "held_out": len(held_out)},
        "episodes": json.loads((folder / FRAMES_FOLDER / "frames.json").read_text(encoding="utf-8"))["episodes"],
        "source": source.name,
        "topology": dataclasses.asdict(vqgan.config),
        "training": dataclasses.asdict(training),
        "perceptual_loss": perceptual_weights is not None,
        "dtype": dtype,
        "held_out": trainer.evaluate(held_out, moving=held_out_moving),
        "parameters": sum(parameter.numel() for parameter in vqgan.parameters()),
        "seconds": seconds_before + time.perf_counter() - began,
        "versions": installed_versions(),
    }
    if is_main:
        ImageTokenizer(vqgan.eval(), image_size=frames.image_size).save_pretrained(folder)
        write_text_atomic(folder / RECORD_FILE, json.dumps(record, indent=2) + "\n")
        write_text_atomic(folder / CARD_FILE, _card(folder.absolute().name, record))
    return record


def _round(vqgan: VQGAN, dtype: str) -> None:
    if dtype == "bf16":
        vqgan.to(torch.bfloat16).to(torch.float32)


def _finished(folder: Path, step: int, dtype: str) -> dict[str, Any] | None:
    """The record of a run that has nothing left to do."""
    path = folder / RECORD_FILE
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return known if (known.get("steps"), known.get("dtype")) == (step, dtype) else None


def _camera(source: Source, settings: FrameSettings) -> str:
    known = ", ".join(source.cameras)
    if not source.cameras:
        raise FramesError(f"{source.name} holds no frames; render them: worldvla replay SOURCE OUT --to hdf5")
    if settings.camera is None and len(source.cameras) > 1:
        raise FramesError(f"{source.name} has several cameras: {known}; choose one")
    if settings.camera is not None and settings.camera not in source.cameras:
        raise FramesError(f"{source.name} has no camera {settings.camera!r}; existing: {known}")
    return settings.camera or source.cameras[0]


def _spread_frames(keys: Sequence[EpisodeKey], limit: int | None) -> dict[str, NDArray[np.int64]]:
    """Which frames of each episode: all, or `limit` of them at even distances over everything."""
    total = sum(key.steps for key in keys)
    wanted = total if limit is None else min(limit, total)
    places = np.linspace(0, total, wanted, endpoint=False).astype(np.int64)
    found, first = {}, 0
    for key in keys:
        inside = places[(places >= first) & (places < first + key.steps)]
        found[key.id] = inside - first
        first += key.steps
    return found


def _squares(id: str, frames: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(T, H, W, 3) → (T, size, size, 3)."""
    pictures = [np.asarray(fit(frame, size)) for frame in frames]
    height, width = pictures[0].shape[:2]
    if (height, width) != (size, size):
        raise FramesError(
            f"{id}: frames of {frames.shape[2]} x {frames.shape[1]} px would become {width} x {height} px; "
            "square ones are needed"
        )
    return np.stack(pictures)


class _PackedMasks:
    """Masks of which each byte holds eight pixels of a row."""

    def __init__(self, packed: NDArray[np.uint8]) -> None:
        self.packed = packed

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, index: int, /) -> NDArray[np.bool_]:
        return np.unpackbits(self.packed[index], axis=-1).astype(bool)


def _draw_strip(path: Path, vqgan: VQGAN, frames: Frames, step: int) -> None:
    tokenizer = ImageTokenizer(vqgan.eval())
    shown = [frames[i] for i in np.linspace(0, len(frames) - 1, min(_SHOWN, len(frames))).astype(int)]
    drawn = tokenizer.decode(tokenizer.encode(np.stack(shown)))
    vqgan.train()
    save_strips(path, [{"held out": shown, "reconstructed": list(drawn)}], title=f"after {step:,} steps")


def _card(name: str, record: dict[str, Any]) -> str:
    measured, frames = record["held_out"], record["frames"]
    moving = f"| PSNR of what moves | {measured['psnr_moving']:.2f} dB |\n" if "psnr_moving" in measured else ""
    return f"""---
library_name: worldvla-tokenizers
tags: [worldvla, vq-gan, image-tokenizer]
---

# {name}

A VQ-GAN of {record["parameters"]:,} parameters for frames of {frames["image_size"]} px, trained on
{frames["training"]:,} frames of {record["source"]} in {record["steps"]:,} steps
({record["seconds"] / 3600:.1f} hours).

| on {frames["held_out"]} frames of episodes held out | |
|---|---|
| PSNR | {measured["psnr"]:.2f} dB |
{moving}| mean absolute error | {255 * measured["l1"]:.2f} of 255 |
| codes that occur | {measured["codes_used"]:.0f} of {record["topology"]["n_embed"]} |
| perplexity of the codes | {measured["perplexity"]:.0f} |

```python
from worldvla_tokenizers import ImageTokenizer

tokenizer = ImageTokenizer.from_pretrained("{name}")
```
"""


__all__ = [
    "FrameSettings",
    "FramesError",
    "Intervals",
    "gather_frames",
    "gathered_masks",
    "moving_pixels",
    "train_tokenizer",
]
