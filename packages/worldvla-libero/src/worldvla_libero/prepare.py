"""From demonstrations to token shards: read or replay, tokenize each frame once, split, fit bounds, write."""

from __future__ import annotations

import base64
import io
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from worldvla_libero.conventions import ACTION_DIM
from worldvla_libero.data.episodes import (
    Episode,
    EpisodeError,
    EpisodeKey,
    Frames,
    NoEpisodeLeftError,
    Reason,
    Source,
    SplitRule,
    check_episode,
    digest,
    fit_bounds,
    split,
    spread,
)
from worldvla_libero.data.hub import data_path
from worldvla_libero.data.page import Preview, data_page
from worldvla_libero.data.record import DATA_FOLDER, RECORD_FILE, DataRecord, SplitRecord, fingerprint_of
from worldvla_libero.data.shards import CARD_FILE, PAGE_FILE, TokenEpisode, read_episodes, write_episodes
from worldvla_libero.demonstrations.replay import Replayer, ReplaySettings
from worldvla_libero.hdf5 import HDF5Source
from worldvla_libero.jobs.job import Executor, Job, StartWorker
from worldvla_libero.jobs.parts import WORK_FOLDER, Dropped
from worldvla_libero.lerobot import LeRobotSource, is_lerobot
from worldvla_libero.versions import SIMULATOR, installed_versions
from worldvla_tokenizers.files import write_text_atomic

if TYPE_CHECKING:
    from worldvla_tokenizers import ActionTokenizer, ImageTokenizer

PART_SUFFIX = ".arrow"

# Third-person views that WorldVLA is trained on, as LIBERO's, LeRobot's and openpi's data sets call them.
USUAL_CAMERAS = ("agentview", "observation.images.image", "image")

_PREVIEW_FRAMES, _PREVIEW_HEIGHT, _PREVIEWS_PER_TASK = 6, 96, 2
_PIXELS_PER_CODE = 16
_SHOWN_REASONS = 3


DataPage: TypeAlias = Callable[
    [DataRecord, Iterable[tuple[str, TokenEpisode]], "ActionTokenizer", Sequence[Preview]], str
]
"""(record, split and episode of each, bounds, previews) → HTML, see `data_page`."""


class PrepareError(ValueError):
    """Demonstrations that no data set can be made of, or settings that do not fit them."""


@dataclass(frozen=True)
class PrepareSettings:
    """How demonstrations become a token data set; everything the result depends on but sources and tokenizer.

    Attributes:
        image_size: pixels; every frame is cropped and scaled to about this size squared before it is tokenized.
        camera: whose frames; None for the source's only or usual one (LIBERO: agentview).
        replay: how raw demonstrations are replayed. Frames are rendered at `replay.image_size`.
        min_steps: episodes with fewer actions are dropped; give the K of the longest chunk you will train.
        dimensions: D, the width of the actions; None for that of the first readable episode.
        split: `paper` (by trajectory, drawn by `seed`) or `published` (by task, then by trajectory).
        fraction: share of the training split.
        seed: of the paper's split.
        quantile: None for bounds at minimum and maximum of the training actions, else see `ActionTokenizer.fit`.
        batch_size: frames tokenized at once; 1 gives the published codes to the last one (see `ImageTokenizer`).

    Raises:
        ValueError: a value out of its range.
    """

    image_size: int = 256
    camera: str | None = None
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    min_steps: int = 5
    dimensions: int | None = None
    split: SplitRule = "paper"
    fraction: float = 0.9
    seed: int = 0
    quantile: float | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name, least in (("min_steps", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {least} and above")
        if self.image_size < 32 or self.image_size % 32:
            raise ValueError(f"image_size is {self.image_size} px; allowed: multiples of 32 from 32")
        # Used only after all frames are tokenized: raise on an unknown rule, and on values out of range, now.
        split([EpisodeKey("", "", 1)], self.split, fraction=self.fraction)
        fit_bounds([np.zeros((1, 1))], quantile=self.quantile)


@dataclass(frozen=True)
class Plan:
    """What a preparation will do, before it does it.

    Attributes:
        source: the demonstrations.
        keys: the episodes chosen.
        unreadable: files of the source that cannot be read.
        camera: whose frames.
        replayed: whether the simulator renders them.
        dimensions: D.
        bytes_final: estimate of the data set's size.
        bytes_peak: estimate of the disk needed on the way: parts and shards side by side.
        notes: what was guessed, and what one may not expect; for people to read before the work begins.
    """

    source: Source
    keys: Sequence[EpisodeKey]
    unreadable: Sequence[Dropped]
    camera: str
    replayed: bool
    dimensions: int
    bytes_final: int
    bytes_peak: int
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Recorded actions of all episodes chosen; a replay leaves no-ops out."""
        return sum(key.steps for key in self.keys)


def open_source(
    path: str | os.PathLike[str],
    *,
    replay: bool | None = None,
    download: Callable[..., str] | None = None,
    **lerobot: Any,
) -> Source:
    """Demonstrations in a folder (or file), of whatever kind they are.

    Args:
        path: a LeRobotDataset v3, or a folder or file of LIBERO-like HDF5; or, if it is a string and there is
            none, the Hub repository of one.
        replay: whether HDF5 files have to be replayed; None to tell by the files.
        download: what fetches a Hub repository, see `data_path`.
        lerobot: options of `LeRobotSource`.

    Raises:
        FileNotFoundError: there are no demonstrations, or the Hub's cannot be fetched.
        PrepareError: `replay` for a data set that the simulator cannot replay.
    """
    path = data_path(path, download=download)
    if is_lerobot(path):
        if replay:
            raise PrepareError(f"{path} is a LeRobotDataset, which holds no simulator states to replay from")
        return LeRobotSource(path, **lerobot)
    if lerobot:
        raise PrepareError(f"{path} is no LeRobotDataset; options {', '.join(lerobot)} are for those")
    return HDF5Source(path, replay)


def plan(source: Source, settings: PrepareSettings = PrepareSettings(), *, limit: int | None = None) -> Plan:
    """Look at the demonstrations without reading frames.

    Args:
        source: the demonstrations.
        settings: how they will be prepared.
        limit: how many episodes, taken turn by turn from every task; None for all.

    Raises:
        NoEpisodeLeftError: no episode can be read.
        PrepareError: there is none, or the camera is not clear.
    """
    everything, unreadable = source.list()
    keys = spread(everything, limit)
    if not keys:
        shown = [dropped.message for dropped in unreadable[:_SHOWN_REASONS]] or ["it is empty"]
        more = [f"and {len(unreadable) - _SHOWN_REASONS} more"] if len(unreadable) > _SHOWN_REASONS else []
        told = f"{source.name} has no episode that can be read: {'; '.join([*shown, *more])}"
        raise NoEpisodeLeftError(told) if unreadable else PrepareError(told)
    camera, dimensions = _camera(source, settings), settings.dimensions
    if dimensions is None:
        dimensions = ACTION_DIM if source.needs_replay else _first_width(source, keys)
    codes = (settings.image_size // _PIXELS_PER_CODE) ** 2
    size = sum(key.steps for key in keys) * (2 * codes + 8 * dimensions)
    previews = len(keys) * 20_000
    notes = [*source.notes]
    splits = split(keys, settings.split, fraction=settings.fraction, seed=settings.seed)
    if settings.fraction < 1 and set(splits.values()) == {"train"}:
        notes.append(
            f"no validation split: {settings.fraction:g} of {len(keys)} episodes, rounded up, is all of them; a "
            "smaller fraction (--train-fraction) or more episodes leave some"
        )
    return Plan(
        source,
        keys,
        unreadable,
        camera,
        source.needs_replay,
        dimensions,
        bytes_final=size,
        bytes_peak=2 * size + previews,
        notes=tuple(notes),
    )


def prepare(
    plan: Plan,
    out: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str],
    settings: PrepareSettings = PrepareSettings(),
    *,
    workers: int = 1,
    device: str | None = None,
    strict: bool = False,
    executor: Executor | StartWorker = "local",
    gpus: float = 0,
    max_shard_bytes: int = 256 * 2**20,
    replayer: Callable[[Episode], Episode] | None = None,
    page: DataPage = data_page,
    on_part: Callable[[str, Path | Dropped], None] | None = None,
) -> DataRecord:
    """Make a token data set. Killed at any moment, the same call goes on; the result is the same to the byte.

    Args:
        plan: see `plan`, made with the same settings.
        out: folder of the data set, made if need be.
        tokenizer: folder or Hub repository of the image tokenizer; see `load_image_tokenizer`.
        settings: how.
        workers: processes that read or replay; this process tokenizes.
        device: where frames are tokenized; None for a GPU if there is one.
        strict: stop at the first episode that has to be dropped.
        executor: `local`, or `ray` for a cluster (see `Job.run`); then `workers` are Ray's.
        gpus: with Ray, GPUs of the tokenizing process.
        max_shard_bytes: shards are about this large at most.
        replayer: what replays an episode, in a worker process; None for a `Replayer` with these settings.
        page: writes `index.html`, see `data_page`.
        on_part: called for every episode that is done, with its part or why it was dropped.

    Returns:
        What `dataset.json` says.

    Raises:
        EpisodeError: with `strict`, the first episode dropped.
        ImageError: the tokenizer's codes have no ids in the vocabulary.
        JobError: `out` holds another data set, or one begun with other settings.
        NoEpisodeLeftError: all episodes were dropped.
        StorageError: the disk is full, or a file cannot be written; what is done stays.
    """
    out = Path(out)
    if strict and plan.unreadable:
        first = plan.unreadable[0]
        raise EpisodeError(Reason(first.reason), first.message)
    tokenize = Tokenize(tokenizer, settings.image_size, settings.batch_size, device)
    _warn_of_another_size(tokenize.tokenizer, settings.image_size)
    resolved = _resolved(plan, tokenize.tokenizer.vqgan.fingerprint, settings)
    items = {f"{number:06d}": key for number, key in enumerate(plan.keys)}
    with Job[EpisodeKey, Episode](out, RECORD_FILE, resolved, error=EpisodeError) as job:
        if job.ended:
            return DataRecord.read(out)
        if executor != "ray" and (plan.replayed or workers > 1):
            _warn_of_spinning(tokenize.tokenizer)
        parts = job.run(
            items,
            LoadEpisode(plan, settings, replayer),
            tokenize,
            suffix=PART_SUFFIX,
            workers=workers,
            strict=strict,
            on_part=on_part,
            executor=executor,
            store_gpus=gpus,
        )
        dropped = [*plan.unreadable, *(part for part in parts.values() if isinstance(part, Dropped))]
        kept = {items[name]: part for name, part in parts.items() if isinstance(part, Path)}
        with job.storing("the data set"):
            record = _finish(out, kept, dropped, resolved, plan.source.name, settings, max_shard_bytes, page)
        job.end(record.content())
    return DataRecord.read(out)


class LoadEpisode:
    """In a worker: an episode with the frames of one camera, read, or replayed in the simulator.

    Args:
        plan: the source and camera.
        settings: how to replay, and what to refuse.
        replayer: what replays; None for a `Replayer`.
    """

    def __init__(
        self, plan: Plan, settings: PrepareSettings, replayer: Callable[[Episode], Episode] | None = None
    ) -> None:
        self.source, self.camera, self.dimensions = plan.source, plan.camera, plan.dimensions
        self.min_steps = settings.min_steps
        self.replayer: Callable[[Episode], Episode] | None = None
        if plan.replayed:
            how = replace(settings.replay, cameras=(plan.camera,))
            self.replayer = replayer or Replayer(how, suite=plan.source.name)

    def __call__(self, key: EpisodeKey) -> Episode:
        """Load an episode.

        Raises:
            EpisodeError: it cannot be read, replayed or used.
        """
        episode = self.source.read(key.id, () if self.replayer else (self.camera,))
        check_episode(episode, dimensions=self.dimensions, min_steps=self.min_steps)
        if self.replayer:
            episode = self.replayer(episode)
            check_episode(episode, min_steps=self.min_steps)  # it has lost its no-ops
        return replace(episode, states=None, robot_states=None, proprioception=None)  # not needed further on


class Tokenize:
    """Where the tokenizer is: an episode with frames → its part on disk, codes instead of frames.

    Args:
        source: folder or Hub repository of the image tokenizer, also inside that of a model.
        image_size: pixels that frames are brought to.
        batch_size: frames at once.
        device: where to compute; None for a GPU if there is one.
    """

    def __init__(
        self, source: str | os.PathLike[str], image_size: int, batch_size: int = 1, device: str | None = None
    ) -> None:
        self.source, self.image_size, self.batch_size, self.device = source, image_size, batch_size, device
        self._tokenizer: ImageTokenizer | None = None

    @property
    def tokenizer(self) -> ImageTokenizer:
        """The image tokenizer, loaded when it is first used."""
        if self._tokenizer is None:
            import torch

            device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
            self._tokenizer = load_image_tokenizer(self.source, device)
        return self._tokenizer

    def __call__(self, episode: Episode, path: Path) -> None:
        """Tokenize an episode's frames and write them, with actions and instruction, to `path`."""
        ((_, frames),) = episode.frames.items()
        codes = self.tokenizer.encode(frames, target=self.image_size, batch_size=self.batch_size)
        tokens = TokenEpisode(
            episode.id, episode.task, episode.instruction, codes.astype(np.uint16), episode.actions
        )
        preview = base64.b64encode(_strip(frames)).decode()
        write_episodes(path, [tokens], {"preview": preview, "control_hz": episode.control_hz})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": None}


def choose_camera(source: Source, wanted: str | None = None) -> str:
    """The camera whose frames are meant, of a source that holds frames.

    Args:
        source: demonstrations.
        wanted: its name; None for the only or usual one (LIBERO: agentview).

    Raises:
        PrepareError: there is no such camera, or none is clear.
    """
    known = ", ".join(source.cameras) or "none"
    if wanted is None:
        if not source.cameras:
            seen = "".join(f"; {note}" for note in source.notes if "no image" in note)
            raise PrepareError(f"{source.name} holds no camera frames and cannot be replayed{seen}")
        if len(source.cameras) > 1 and source.cameras[0] not in USUAL_CAMERAS:
            raise PrepareError(f"{source.name} has several cameras: {known}; choose one")
        return source.cameras[0]
    if wanted not in source.cameras:
        raise PrepareError(f"{source.name} has no camera {wanted!r}; existing: {known}")
    return wanted


def load_image_tokenizer(
    source: str | os.PathLike[str], device: str = "cpu", *, image_size: int | None = None
) -> ImageTokenizer:
    """Load an image tokenizer whose codes a WorldVLA model can read.

    Args:
        source: folder or Hub repository of the tokenizer, or of a model with one inside; also
            `hf://organisation/name@revision/sub/folder`.
        device: where to compute.
        image_size: pixels that frames are brought to; None for what is saved with it.

    Raises:
        ImageError: its codes have no ids in the vocabulary.
        PretrainedFilesError: there is none.
    """
    from worldvla_tokenizers import ImageTokenizer, Vocabulary

    tokenizer = ImageTokenizer.from_pretrained(source, device=device, image_size=image_size)
    tokenizer.check_vocabulary(Vocabulary.published())
    return tokenizer


def _camera(source: Source, settings: PrepareSettings) -> str:
    if source.needs_replay:
        return settings.camera or settings.replay.cameras[0]
    return choose_camera(source, settings.camera)


def _first_width(source: Source, keys: Sequence[EpisodeKey]) -> int:
    for key in keys:
        try:
            actions = source.read(key.id).actions
        except EpisodeError:
            continue  # dropped by name when its turn comes
        if actions.ndim == 2:
            return actions.shape[1]
    raise PrepareError(f"none of {len(keys)} episodes of {source.name} has readable actions")


def _warn_of_spinning(tokenizer: ImageTokenizer) -> None:
    if tokenizer.device.type == "cpu" and os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        warnings.warn(
            "frames are tokenized on the CPU beside worker processes, and torch's waiting threads take the cores "
            "from them; remedy: set OMP_WAIT_POLICY=PASSIVE in the environment before torch is imported",
            RuntimeWarning,
            stacklevel=3,
        )


def _warn_of_another_size(tokenizer: ImageTokenizer, image_size: int) -> None:
    if tokenizer.image_size not in (None, image_size):
        warnings.warn(
            f"frames are tokenized at {image_size} px; the image tokenizer is made for {tokenizer.image_size} px, "
            f"and so is a model it belongs to; remedy: image_size={tokenizer.image_size}, unless that is meant",
            RuntimeWarning,
            stacklevel=3,
        )


def _resolved(plan: Plan, tokenizer: str, settings: PrepareSettings) -> dict[str, Any]:
    """All that the data set depends on; its fingerprint is theirs."""
    return {
        "format": 1,
        "image_tokenizer": tokenizer,
        "image_size": settings.image_size,
        "batch_size": settings.batch_size,
        "episodes": digest([*plan.keys, *plan.unreadable]),
        "camera": plan.camera,
        "replay": asdict(replace(settings.replay, cameras=(plan.camera,))) if plan.replayed else None,
        "simulator": installed_versions(SIMULATOR) if plan.replayed else None,
        "min_steps": settings.min_steps,
        "dimensions": plan.dimensions,
        "split": {"rule": settings.split, "fraction": settings.fraction, "seed": settings.seed},
        "quantile": settings.quantile,
    }


def _finish(
    out: Path,
    parts: Mapping[EpisodeKey, Path],
    dropped: Sequence[Dropped],
    settings: Mapping[str, Any],
    name: str,
    how: PrepareSettings,
    max_shard_bytes: int,
    page: DataPage,
) -> DataRecord:
    """Write shards, bounds, card and page from the parts; one episode is in memory at a time."""
    if not parts:
        raise NoEpisodeLeftError.of(name, dropped)
    splits = split(parts, how.split, fraction=how.fraction, seed=how.seed)
    fingerprint = fingerprint_of(settings)
    made: dict[str, SplitRecord] = {}
    staged = out / WORK_FOLDER  # until all shards are whole: readers of Arrow alone would take what is there
    shutil.rmtree(staged / DATA_FOLDER, ignore_errors=True)  # of a run that was killed here
    (staged / DATA_FOLDER).mkdir()

    def tokens(part: Path) -> TokenEpisode:
        return read_episodes(part)[0][0]

    training = (tokens(part).actions for key, part in parts.items() if splits[key.id] == "train")
    actions = fit_bounds(training, quantile=how.quantile)
    for split_name in sorted(set(splits.values())):
        members = [part for key, part in parts.items() if splits[key.id] == split_name]
        shards = _shards(members, max_shard_bytes)
        files = []
        for number, shard in enumerate(shards):
            file = f"{DATA_FOLDER}/{split_name}-{number:05d}-of-{len(shards):05d}.arrow"
            write_episodes(staged / file, (tokens(part) for part in shard), {"fingerprint": fingerprint})
            files.append(file)
        steps = sum(len(tokens(part)) for part in members)
        made[split_name] = SplitRecord(len(members), steps, tuple(files))
    shutil.rmtree(out / DATA_FOLDER, ignore_errors=True)
    os.replace(staged / DATA_FOLDER, out / DATA_FOLDER)
    actions.save_pretrained(out)
    record = DataRecord(
        settings=settings,
        splits=made,
        name=name,
        control_hz=read_episodes(next(iter(parts.values())))[1]["control_hz"],
        dropped=tuple(dropped),
        versions=installed_versions(),
    )
    write_text_atomic(out / PAGE_FILE, page(record, _episodes(parts, splits), actions, _previews(parts, splits)))
    write_text_atomic(out / CARD_FILE, _card(record))
    return record


def _shards(parts: Sequence[Path], max_bytes: int) -> list[list[Path]]:
    """Consecutive parts that fill a shard each, at least one part a shard."""
    shards: list[list[Path]] = []
    filled = max_bytes
    for part in parts:
        size = part.stat().st_size
        if not shards or filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += size
    return shards


def _episodes(parts: Mapping[EpisodeKey, Path], splits: Mapping[str, str]) -> Iterator[tuple[str, TokenEpisode]]:
    for key, part in parts.items():
        yield splits[key.id], read_episodes(part)[0][0]


def _previews(parts: Mapping[EpisodeKey, Path], splits: Mapping[str, str]) -> list[Preview]:
    """The first episodes of each task."""
    previews: list[Preview] = []
    shown = Counter[str]()
    for key, part in parts.items():
        shown[key.task] += 1
        if shown[key.task] <= _PREVIEWS_PER_TASK:
            (episode,), metadata = read_episodes(part)
            strip = base64.b64decode(metadata["preview"])
            previews.append(Preview(episode.id, episode.task, episode.instruction, splits[key.id], strip))
    return previews


def _strip(frames: Frames) -> bytes:
    """(T, H, W, 3) → JPEG of some frames in a row, from the first to the last."""
    from PIL import Image

    chosen = np.linspace(0, len(frames) - 1, min(_PREVIEW_FRAMES, len(frames))).round().astype(int)
    width = max(1, round(frames.shape[2] * _PREVIEW_HEIGHT / frames.shape[1]))
    row: list[NDArray[np.uint8]] = [
        np.asarray(Image.fromarray(frames[i]).resize((width, _PREVIEW_HEIGHT), Image.Resampling.BOX))
        for i in chosen
    ]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(row, axis=1)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _card(record: DataRecord) -> str:
    """The data card of the Hub: which file is which split, what is inside, how to read it."""
    files = "".join(f"  - split: {name}\n    path: {DATA_FOLDER}/{name}-*.arrow\n" for name in record.splits)
    table = "".join(f"| {name} | {s.episodes:,} | {s.steps:,} |\n" for name, s in record.splits.items())
    camera, size = record.settings["camera"], record.image_size
    return f"""---
tags:
- robotics
- worldvla
configs:
- config_name: default
  data_files:
{files}---

# {record.name}: tokens for WorldVLA

Robot demonstrations as image codes and actions: per episode the codebook indices of every frame (uint16, raster
order), the actions in data units (float64), and the instruction. Training samples are assembled from them on the
fly; `index.html` shows what is inside.

| split | episodes | steps |
|---|---:|---:|
{table}
Frames of camera `{camera}` at about {size} x {size} pixels, tokenized by the VQ-GAN with fingerprint
`{record.image_tokenizer}`. {len(record.dropped)} episodes or files were dropped; `dataset.json` says which
and why. Bounds of the action bins are in `action_tokenizer.json`, fitted to `train`.

```python
from worldvla_libero import ActionSamples, TokenDataset, TokenSamples
from worldvla_tokenizers import TextTokenizer

data = TokenDataset.from_pretrained("this-repository", split="train")
text = TextTokenizer.from_pretrained("tokenizer-of-your-model")
ids, labels = TokenSamples(data, ActionSamples(history=2, actions=5), text)[0]
```
"""
