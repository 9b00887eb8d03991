"""The commands that make data: `worldvla collect`, `worldvla replay`, `worldvla prepare`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from worldvla_libero.cli.bars import counting_bars
from worldvla_libero.cli.model import Flat

if TYPE_CHECKING:
    from rich.console import Console

    from worldvla_libero.jobs.parts import Dropped
    from worldvla_libero.prepare import Plan, PrepareSettings

EXIT_OK, EXIT_FAILED = 0, 1

_SHOWN_DROPPED = 10  # the rest is in the record


def collect(
    suite: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SUITE")],
    out: Path | None = None,
    tasks: tuple[str, ...] = (),
    episodes: int = 50,
    attempts: int | None = None,
    seed: int = 0,
    workers: int = 1,
) -> int:
    """Let scripted experts demonstrate a suite in the simulator; write LIBERO's HDF5, one file per task.

    Start states are drawn by the simulator, never those kept for evaluation. Interrupted, the same command goes
    on.

    Args:
        suite: Suite, such as libero_object.
        out: Folder for the files and collection.json; by default worldvla-demos/SUITE.
        tasks: Indices, names or instructions; by default all of the suite that have a scripted expert.
        episodes: Demonstrations wanted per task.
        attempts: Tries after which a task is given up; by default twice the demonstrations.
        seed: Of start states, speed and noise; another seed gives other episodes.
        workers: Processes; each needs a core.
    """
    from rich.table import Table

    from worldvla_libero.demonstrations.collect import RECORD_FILE
    from worldvla_libero.demonstrations.collect import collect as run_collect
    from worldvla_libero.demonstrations.experts import NoExpertError, has_expert
    from worldvla_libero.simulator.suites import load_suite

    found, console = load_suite(suite), _console()
    chosen = [found.task(key) for key in tasks] or [task for task in found.tasks if has_expert(task)]
    if not chosen:
        raise NoExpertError(f"no task of {found.name} has a scripted expert")
    if not tasks:
        for task in found.tasks:
            if task not in chosen:
                console.print(f"left out, for it has no scripted expert: {task}", style="yellow", highlight=False)
    folder = out or Path("worldvla-demos") / found.name
    # How many attempts it takes is not known beforehand: the bar counts successes.
    with _progress(console, "collecting", len(chosen) * episodes, count_dropped=False) as on_part:
        record = run_collect(
            chosen, folder, episodes=episodes, attempts=attempts, seed=seed, workers=workers, on_part=on_part
        )
    table = Table("task", "success", "kept", "steps", title=f"scripted experts on {found.name}, seed {seed}")
    for row in record["tasks"]:
        rate = f"{100 * row['successes'] / row['attempts']:.0f} % ({row['successes']}/{row['attempts']})"
        steps = "-" if row["mean_steps"] is None else f"{row['mean_steps']:.0f}"
        table.add_row(row["instruction"], rate, str(row["successes"]), steps)
    console.print(table)
    console.print(f"wrote {folder / RECORD_FILE} and a file per task", highlight=False, markup=False)
    return EXIT_OK


def replay(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[OUT]")] = None,
    to: Literal["lerobot", "lerobot-video", "hdf5"] = "lerobot",
    image_size: int = 256,
    cameras: tuple[str, ...] = ("agentview", "robot0_eye_in_hand"),
    wait_steps: int = 10,
    keep_noops: bool = False,
    limit: int | None = None,
    workers: int = 1,
    strict: bool = False,
    executor: Literal["local", "ray"] = "local",
) -> int:
    """Replay raw demonstrations: render frames, leave pauses out, keep what still succeeds.

    Without OUT nothing is rendered or written: it says how many demonstrations this simulator reproduces. Exits
    with 1 if it is none. Interrupted, the same command goes on.

    Args:
        source: Folder (or file) of raw LIBERO HDF5, or Hub repository of one.
        out: Folder for the frames.
        to: A LeRobotDataset v3 with lossless images or H.264 videos, or HDF5 with frames and without no-ops.
        image_size: Width and height of the frames in pixels.
        cameras: Whose frames.
        wait_steps: Steps of no motion before the first action.
        keep_noops: Keep actions that do nothing.
        limit: Replay so many episodes, taken turn by turn from every task.
        workers: Processes; each needs a core.
        strict: Stop at the first episode that has to be dropped.
        executor: Ray runs the workers on a cluster.
    """
    from rich.table import Column, Table

    from worldvla_libero.data.episodes import spread
    from worldvla_libero.demonstrations.replay import RECORD_FILE, ReplaySettings
    from worldvla_libero.demonstrations.replay import replay as run_replay
    from worldvla_libero.jobs.parts import Dropped
    from worldvla_libero.prepare import open_source

    demonstrations, console = open_source(source, replay=True), _console()
    everything, unreadable = demonstrations.list()
    keys = spread(everything, limit)
    _print_notes(console, demonstrations.notes)
    settings = ReplaySettings(image_size, cameras, wait_steps, not keep_noops)
    with _progress(console, "replaying", len(keys)) as on_part:
        record = run_replay(
            demonstrations,
            keys,
            out,
            settings,
            format=to,
            workers=workers,
            strict=strict,
            executor=executor,
            on_part=on_part,
        )
    # Folded, not cut: tasks of a suite often differ at their ends only.
    table = Table(Column("task", overflow="fold"), "replayed", "succeed", title=f"replay of {demonstrations.name}")
    for task, row in record["tasks"].items():
        share = f"{100 * row['kept'] / row['replayed']:.0f} %" if row["replayed"] else "-"
        table.add_row(task, str(row["replayed"]), f"{row['kept']} ({share})")
    console.print(table)
    _print_dropped(
        console, [*unreadable, *(Dropped(**row) for row in record["dropped"])], out and out / RECORD_FILE
    )
    if out is not None:
        console.print(f"wrote {out}", highlight=False, markup=False)
    return EXIT_OK if any(row["kept"] for row in record["tasks"].values()) else EXIT_FAILED


@dataclass(frozen=True)
class ShardOptions:
    """What token shards depend on, beside demonstrations and tokenizer.

    Attributes:
        image_size: Size in pixels at which frames are tokenized; by default as saved with the tokenizer, or 256.
        camera: Whose frames, where there are several.
        render_size: Size in pixels at which a replay renders; by default the image size.
        min_steps: Drop episodes with fewer actions: the K of the longest chunk to be trained.
        action_dim: Width of the actions; by default that of the first episode.
        split: By trajectory (paper), or by task and trajectory as the published code does.
        train_fraction: Share of the training split.
        split_seed: Of the paper's split.
        bounds_quantile: Cut action bounds at this quantile and one minus it, instead of minimum and maximum, which
            a dimension that is nearly always one value (a gripper) keeps.
        batch_size: Frames tokenized at once; above 1 near ties may fall otherwise than in the published codes.
    """

    image_size: int | None = None
    camera: str | None = None
    render_size: int | None = None
    min_steps: int = 5
    action_dim: int | None = None
    split: Literal["paper", "published"] = "paper"
    train_fraction: float = 0.9
    split_seed: int = 0
    bounds_quantile: float | None = None
    batch_size: int = 1

    def settings(self, image_size: int) -> PrepareSettings:
        """The same as `prepare` takes it, for frames of this size."""
        from worldvla_libero.demonstrations.replay import ReplaySettings
        from worldvla_libero.prepare import PrepareSettings

        return PrepareSettings(
            image_size=image_size,
            camera=self.camera,
            replay=ReplaySettings(image_size=self.render_size or image_size),
            min_steps=self.min_steps,
            dimensions=self.action_dim,
            split=self.split,
            fraction=self.train_fraction,
            seed=self.split_seed,
            quantile=self.bounds_quantile,
            batch_size=self.batch_size,
        )


def prepare(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    out: Path = Path("worldvla-data"),
    tokenizer: str | None = None,
    replay: Literal["auto", "always", "never"] = "auto",
    shards: Annotated[ShardOptions, Flat] = ShardOptions(),
    limit: int | None = None,
    workers: int = 1,
    device: str | None = None,
    action_key: str | None = None,
    state_key: str | None = None,
    strict: bool = False,
    executor: Literal["local", "ray"] = "local",
    gpus: float = 0,
) -> int:
    """Turn demonstrations into token shards, from which training samples of every kind are assembled.

    Takes raw LIBERO HDF5 (replayed in the simulator), HDF5 with frames, and LeRobotDataset v3. Each frame is
    tokenized once. Interrupted, the same command goes on.

    Args:
        source: Folder, file or Hub repository of demonstrations.
        out: Folder for the shards, with a page that shows what is inside.
        tokenizer: Folder or Hub repository of the image tokenizer, or of a model with one inside; also
            hf://organisation/name@revision/sub/folder. By default the one of the default model.
        replay: Whether to replay HDF5 files; auto replays those that name a LIBERO scene.
        shards: What the result depends on.
        limit: Prepare so many episodes, taken turn by turn from every task.
        workers: Processes that read or replay; each needs a core.
        device: Where frames are tokenized; by default a GPU if there is one.
        action_key: Name of the actions in a LeRobotDataset, where it is not the usual one.
        state_key: Name of the robot's state in a LeRobotDataset, where it is not the usual one.
        strict: Stop at the first episode that has to be dropped.
        executor: Ray runs workers and tokenizer on a cluster; all nodes need OUT at the same path.
        gpus: With Ray, GPUs of the tokenizing process.
    """
    from rich.table import Table

    from worldvla_libero.data.record import RECORD_FILE
    from worldvla_libero.data.shards import PAGE_FILE
    from worldvla_libero.embedded import default_model_path
    from worldvla_libero.prepare import load_image_tokenizer, open_source, plan
    from worldvla_libero.prepare import prepare as run_prepare

    console = _console()
    image_tokenizer = default_model_path() if tokenizer is None else tokenizer
    named = {"action_key": action_key, "state_key": state_key}
    keys: dict[str, Any] = {key: value for key, value in named.items() if value}
    demonstrations = open_source(source, replay={"auto": None, "always": True, "never": False}[replay], **keys)
    settings = shards.settings(shards.image_size or load_image_tokenizer(image_tokenizer).image_size or 256)
    planned = plan(demonstrations, settings, limit=limit)
    _announce(console, planned, settings, out)
    with _progress(console, "preparing", len(planned.keys)) as on_part:
        record = run_prepare(
            planned,
            out,
            image_tokenizer,
            settings,
            workers=workers,
            device=device,
            strict=strict,
            executor=executor,
            gpus=gpus,
            on_part=on_part,
        )
    table = Table("split", "episodes", "steps", title=f"{demonstrations.name} in {out}")
    for name, made in record.splits.items():
        table.add_row(name, f"{made.episodes:,}", f"{made.steps:,}")
    console.print(table)
    _print_dropped(console, record.dropped, out / RECORD_FILE)
    console.print(f"see what is inside: {out / PAGE_FILE}", highlight=False, markup=False)
    return EXIT_OK


def _announce(console: Console, plan: Plan, settings: PrepareSettings, out: Path) -> None:
    """Say what a preparation will do.

    Raises:
        OSError: the disk does not hold it.
    """
    import shutil

    from rich.filesize import decimal

    from worldvla_libero.data.record import DATA_FOLDER, RECORD_FILE
    from worldvla_libero.jobs.parts import WORK_FOLDER

    free = shutil.disk_usage(next(path for path in (out, *out.absolute().parents) if path.exists())).free
    # Of a run that was interrupted.
    parts = [file for folder in (WORK_FOLDER, DATA_FOLDER) for file in (out / folder).rglob("*") if file.is_file()]
    done = sum(file.stat().st_size for file in parts)
    rendered = f"replayed at {settings.replay.image_size} px, " if plan.replayed else ""
    console.print(
        f"{len(plan.keys):,} episodes, {plan.steps:,} steps of {plan.source.name}, "
        f"camera {plan.camera}, {rendered}tokenized at {settings.image_size} px: "
        f"about {decimal(plan.bytes_final)} of shards, {decimal(plan.bytes_peak)} on the way, "
        f"{decimal(free)} free" + (f" and {decimal(done)} done" if done else ""),
        highlight=False,
        markup=False,
    )
    _print_notes(console, plan.notes)
    if plan.bytes_peak > free + done and not (out / RECORD_FILE).is_file():
        raise OSError(f"{out}: about {decimal(plan.bytes_peak - done)} needed, {decimal(free)} free")


@contextmanager
def _progress(
    console: Console, label: str, total: int, *, count_dropped: bool = True
) -> Iterator[Callable[[str, Path | Dropped], None]]:
    """A bar that counts episodes as they are done, and how many of them were dropped."""
    with counting_bars(console, "dropped") as bars:
        bar = bars.add_task(label, total=total, dropped="")
        dropped = 0

        def on_part(_: str, part: Path | Dropped) -> None:
            nonlocal dropped
            kept = isinstance(part, Path)
            dropped += not kept
            word = "dropped" if count_dropped else "failed"
            bars.update(bar, advance=kept or count_dropped, dropped=f"{dropped} {word}" if dropped else "")

        yield on_part


def _print_notes(console: Console, notes: Iterable[str]) -> None:
    for note in notes:
        console.print(note, style="yellow", highlight=False, markup=False)


def _print_dropped(console: Console, dropped: Iterable[Dropped], record: Path | None) -> None:
    from rich.markup import escape
    from rich.table import Column, Table

    rows = list(dropped)
    if not rows:
        return
    counts = Counter(row.reason for row in rows)
    console.print(
        f"dropped: {len(rows)} (" + ", ".join(f"{reason}: {n}" for reason, n in counts.most_common()) + ")",
        style="yellow",
        highlight=False,
        markup=False,
    )
    table = Table(Column("episode", overflow="fold"), "why", "what")
    for row in rows[:_SHOWN_DROPPED]:
        table.add_row(*map(escape, row))
    console.print(table)
    if len(rows) > _SHOWN_DROPPED:
        where = f"; all are in {record}" if record else ""
        console.print(f"… and {len(rows) - _SHOWN_DROPPED} more{where}", highlight=False, markup=False)


def _console() -> Console:
    from rich.console import Console

    return Console()
