"""From demonstrations to token shards."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldvla_libero.data.episodes import (
    Episode,
    EpisodeError,
    EpisodeKey,
    NoEpisodeLeftError,
    Reason,
    digest,
    fit_bounds,
    split,
)
from worldvla_libero.data.page import data_page
from worldvla_libero.data.record import DATA_FOLDER, RECORD_FILE, DataRecord, SplitRecord, fingerprint_of
from worldvla_libero.data.shards import CARD_FILE, PAGE_FILE, TokenEpisode, read_episodes, write_episodes
from worldvla_libero.jobs.job import Executor, Job
from worldvla_libero.jobs.local import StartWorker
from worldvla_libero.jobs.parts import WORK_FOLDER, Dropped
from worldvla_libero.prepare.describe import DataPage, card, episodes_of, previews_of
from worldvla_libero.prepare.parts import PART_SUFFIX, LoadEpisode, Tokenize
from worldvla_libero.prepare.planning import Plan, PrepareSettings
from worldvla_libero.versions import SIMULATOR, installed_versions
from worldvla_tokenizers.files import write_text_atomic

if TYPE_CHECKING:
    from worldvla_tokenizers import ImageTokenizer


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
    # 1. What there is, the plan has listed
    tokenize = Tokenize(tokenizer, settings.image_size, settings.batch_size, device)
    _warn_of_another_size(tokenize.tokenizer, settings.image_size)
    resolved = _resolved(plan, tokenize.tokenizer.vqgan.fingerprint, settings)
    items = {f"{number:06d}": key for number, key in enumerate(plan.keys)}
    with Job[EpisodeKey, Episode](out, RECORD_FILE, resolved, error=EpisodeError) as job:
        if job.ended:
            return DataRecord.read(out)
        if executor != "ray" and (plan.replayed or workers > 1):
            _warn_of_spinning(tokenize.tokenizer)
        # 2. Load each episode in a worker, and tokenize it here: a part each
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
        if not kept:
            raise NoEpisodeLeftError.of(plan.source.name, dropped)
        with job.storing("the data set"):
            # 3. Split; fit the bounds of actions to what trains
            splits = split(kept, settings.split, fraction=settings.fraction, seed=settings.seed)
            training = (episode.actions for name, episode in episodes_of(kept, splits) if name == "train")
            bounds = fit_bounds(training, quantile=settings.quantile)
            # 4. Write
            shards = _write_shards(out, kept, splits, fingerprint_of(resolved), max_shard_bytes)
            bounds.save_pretrained(out)
            # 5. Describe
            record = DataRecord(
                settings=resolved,
                splits=shards,
                name=plan.source.name,
                control_hz=read_episodes(next(iter(kept.values())))[1]["control_hz"],
                dropped=tuple(dropped),
                versions=installed_versions(),
            )
            html = page(record, episodes_of(kept, splits), bounds, previews_of(kept, splits))
            write_text_atomic(out / PAGE_FILE, html)
            write_text_atomic(out / CARD_FILE, card(record))
        job.end(record.content())
    return DataRecord.read(out)


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


def _write_shards(
    out: Path, parts: Mapping[EpisodeKey, Path], splits: Mapping[str, str], fingerprint: str, max_bytes: int
) -> dict[str, SplitRecord]:
    """Write the shards of all splits; they appear together, one episode is in memory at a time."""
    staged = out / WORK_FOLDER  # until all shards are whole: readers of Arrow alone would take what is there
    shutil.rmtree(staged / DATA_FOLDER, ignore_errors=True)  # of a run that was killed here
    (staged / DATA_FOLDER).mkdir()

    def tokens(part: Path) -> TokenEpisode:
        return read_episodes(part)[0][0]

    made: dict[str, SplitRecord] = {}
    for name in sorted(set(splits.values())):
        members = [part for key, part in parts.items() if splits[key.id] == name]
        shards = _shards(members, max_bytes)
        files = []
        for number, shard in enumerate(shards):
            file = f"{DATA_FOLDER}/{name}-{number:05d}-of-{len(shards):05d}.arrow"
            write_episodes(staged / file, (tokens(part) for part in shard), {"fingerprint": fingerprint})
            files.append(file)
        made[name] = SplitRecord(len(members), sum(len(tokens(part)) for part in members), tuple(files))
    shutil.rmtree(out / DATA_FOLDER, ignore_errors=True)
    os.replace(staged / DATA_FOLDER, out / DATA_FOLDER)
    return made


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
