"""Token shards against the published pre-tokenization: frames encoded, disk, samples a second, memory.

The published procedure, restated: every sample is made alone, each of its frames goes through the encoder anew,
and its ids and labels are pickled as Python lists into a file of their own. Ours is `prepare`: each frame is encoded
once, and samples are assembled when they are asked for. Both sides must give the same samples, id by id.

    python benchmarks/data_pipeline.py [--quick] [--seed 0]

Linux only: memory is read from /proc.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads would spin

import argparse
import json
import pickle
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from worldvla_libero.episodes import Dropped, Episode, EpisodeKey
from worldvla_libero.hdf5 import HDF5Source, write_demonstrations
from worldvla_libero.jobs import WORK_FOLDER
from worldvla_libero.prepare import PART_SUFFIX, PrepareSettings, load_image_tokenizer, plan, prepare
from worldvla_libero.samples import ActionSamples, SampleKind, SampleWriter, TokenSamples, WorldSamples
from worldvla_libero.shards import RECORD_FILE, TokenDataset, TokenEpisode, fingerprint_of, write_episodes
from worldvla_libero.versions import installed_versions
from worldvla_tokenizers import ActionTokenizer, TextTokenizer
from worldvla_tokenizers.sequence import Sample

if TYPE_CHECKING:
    from worldvla_tokenizers import VQGAN

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
TOKENIZER = FIXTURES / "published" / "tokenizer"
CAMERA = "agentview"
CODES = 16  # rows and columns of codes of a frame of 256 px

ACTION, LONG_ACTION, WORLD = ActionSamples(2, 5), ActionSamples(2, 10), WorldSamples(1, 1)
MIX = (ACTION, WORLD)  # the published training data, about 1:1


class Sizes(NamedTuple):
    """How much is measured.

    Attributes:
        image_size: pixels of the frames that are encoded.
        steps: how many steps at most are taken from each raw demonstration.
        stored: episodes of the data set that samples are drawn from; the default is about a LIBERO suite.
        pickled: those of them whose samples are pickled, too.
        draws: samples drawn in one repeat.
        repeats: of drawing.
        episodes: sizes of the data sets whose memory is compared.
    """

    image_size: int = 128
    steps: int = 200
    stored: int = 500
    pickled: int = 24
    draws: int = 2_000
    repeats: int = 9
    episodes: tuple[int, ...] = (100, 1_000, 5_000)


QUICK = Sizes(64, 20, 40, 4, 200, 3, (20, 100))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smallest sizes: to see that it runs, not how fast")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sizes = QUICK if options.quick else Sizes()
    print_machine(seed=options.seed, sizes="quick" if options.quick else "default")
    with tempfile.TemporaryDirectory() as folder:
        for part in (encoding, storage, memory):
            (Path(folder) / part.__name__).mkdir()
            part(Path(folder) / part.__name__, sizes, options.seed)
    print("\nload average at the end: {:.2f} {:.2f} {:.2f}".format(*os.getloadavg()))


# Frames encoded -----------------------------------------------------------------------------------------------


def encoding(folder: Path, sizes: Sizes, seed: int) -> None:
    """Both procedures from the same frames on: encoder calls, seconds and bytes."""
    source = HDF5Source(write_frames(folder / "frames", sizes, seed), replay=False)
    episodes = [source.read(key.id, [CAMERA]) for key in source.list()[0]]
    frames = sum(len(episode) for episode in episodes)
    text, actions = TextTokenizer.from_pretrained(TOKENIZER), ActionTokenizer.published()
    writer = SampleWriter(text, actions)
    tokenizer = load_image_tokenizer(TOKENIZER)
    tokenizer.encode(episodes[0].frames[CAMERA][:2], target=sizes.image_size)  # warm

    with encoder_counted() as published, timed(published):
        samples = (
            sample_alone(episode, kind, t, tokenizer.encode, sizes.image_size, writer)
            for kind in MIX
            for episode in episodes
            for t in range(kind.count(len(episode)))
        )
        pickles = write_pickles(folder / "pickles", samples)
    settings = PrepareSettings(image_size=sizes.image_size, fraction=1.0)  # all train: one split to compare
    with encoder_counted() as ours, timed(ours):
        prepare(plan(source, settings), folder / "shards", TOKENIZER, settings)

    data = TokenDataset(folder / "shards")
    assembled = [sample for kind in MIX for sample in TokenSamples(data, kind, text, actions=actions)]
    assert [read_pickle(path) for path in pickles] == [tuple(sample) for sample in assembled], (
        "not the same samples"
    )

    counts = [sum(kind.count(len(episode)) for episode in episodes) for kind in MIX]
    print(
        f"\n1  From frames to samples: {len(episodes)} episodes (actions and lengths of the raw demonstrations in "
        f"tests/fixtures,\n   frames from there with noise), {frames} frames of {sizes.image_size} px, "
        f"{counts[0]} samples {ACTION} and {counts[1]} {WORLD};\n   narrow VQ-GAN of tests/fixtures, batch size 1. "
        f"The {len(assembled)} samples of both sides are equal."
    )
    both = sum(frames_encoded(kind, len(episode)) for kind in (*MIX, LONG_ACTION) for episode in episodes)
    table(
        [
            ratio("frames encoded", published.frames, ours.frames, needed=4),
            ratio("frames encoded, K = 10 too (counted)", both, frames),
            ratio("seconds in the encoder", published.encoding, ours.encoding),
            ratio("seconds in all (ours: all of `prepare`)", published.seconds, ours.seconds),
            *disk_rows(pickles, list((folder / "shards" / "data").iterdir()), len(assembled)),
        ]
    )
    print("   An episode of T steps has 4T - 11 encodings in the published procedure: its ratio is below 4.")


def write_frames(folder: Path, sizes: Sizes, seed: int) -> Path:
    """The raw demonstrations of the fixtures with frames, as replayed HDF5 files."""
    rng = np.random.default_rng(seed)
    size = (sizes.image_size, sizes.image_size)
    pictures = []
    for path in sorted((FIXTURES / "published" / "frames").glob("*.png")):
        with Image.open(path) as picture:
            pictures.append(np.asarray(picture.convert("RGB").resize(size), dtype=np.float64))
    raw = HDF5Source(FIXTURES / "demos" / "libero_object")

    def with_frames(id: str) -> Episode:
        episode = raw.read(id)
        actions = episode.actions[: sizes.steps]
        clean = np.stack([pictures[t % len(pictures)] for t in range(len(actions))])
        frames = (clean + rng.normal(scale=4, size=clean.shape)).clip(0, 255).astype(np.uint8)
        return replace(episode, actions=actions, frames={CAMERA: frames}, states=None, robot_states=None)

    keys = raw.list()[0]
    for task in sorted({key.task for key in keys}):
        demonstrations = (with_frames(key.id) for key in keys if key.task == task)
        write_demonstrations(folder / f"{task}_demo.hdf5", demonstrations)
    return folder


def sample_alone(
    episode: Episode, kind: SampleKind, t: int, encode: Callable[..., Any], image_size: int, writer: SampleWriter
) -> Sample:
    """The published way to one sample: all of its frames are encoded for it, one by one."""
    frames = episode.frames[CAMERA]
    codes = {i: encode(frames[i], target=image_size)[0] for i in frames_of(kind, t)}
    shown = np.stack([codes.get(i, np.zeros_like(codes[t])) for i in range(len(episode))])
    return kind.assemble(
        TokenEpisode(episode.id, episode.task, episode.instruction, shown, episode.actions), t, writer
    )


def frames_of(kind: SampleKind, t: int) -> range:
    """Frames that the sample at step t holds."""
    if isinstance(kind, WorldSamples):
        return range(max(0, t + 1 - kind.history), t + 1 + kind.rounds)
    assert isinstance(kind, ActionSamples)
    return range(max(0, t + 1 - kind.history), t + 1)


def frames_encoded(kind: SampleKind, steps: int) -> int:
    return sum(len(frames_of(kind, t)) for t in range(kind.count(steps)))


@dataclass
class Tally:
    """What one side has cost: frames through the encoder, seconds in it, seconds in all."""

    frames: int = 0
    encoding: float = 0.0
    seconds: float = 0.0


@contextmanager
def encoder_counted() -> Iterator[Tally]:
    """Counts on the VQ-GAN's own encoder, so that no side can pass by."""
    from worldvla_tokenizers import VQGAN  # brings torch, which the processes of part 4 can do without

    tally, plain = Tally(), VQGAN.encode

    def encode(self: VQGAN, pixels: Any) -> Any:
        began = time.perf_counter()
        codes = plain(self, pixels)
        tally.encoding += time.perf_counter() - began
        tally.frames += len(pixels)
        return codes

    VQGAN.encode = encode  # type: ignore[method-assign]
    try:
        yield tally
    finally:
        VQGAN.encode = plain  # type: ignore[method-assign]


@contextmanager
def timed(tally: Tally) -> Iterator[None]:
    began = time.perf_counter()
    yield
    tally.seconds = time.perf_counter() - began


# Samples on disk, and samples a second ------------------------------------------------------------------------


def storage(folder: Path, sizes: Sizes, seed: int) -> None:
    """256 px: bytes of a sample, and how fast samples come back in random order."""
    text = TextTokenizer.from_pretrained(TOKENIZER)
    data = write_data_set(folder / "shards", synthetic(sizes.stored, seed))
    steps = int(data.lengths.sum())
    kinds = {kind: TokenSamples(data, kind, text) for kind in (ACTION, LONG_ACTION, WORLD)}
    last = sum(int(n) for n in data.lengths[: sizes.pickled])
    pickles = {}
    for kind, samples in kinds.items():
        count = sum(kind.count(int(n)) for n in data.lengths[: sizes.pickled])
        pickles[kind] = write_pickles(folder / type(kind).__name__ / str(kind), (samples[i] for i in range(count)))
        assert [read_pickle(path) for path in pickles[kind][:50]] == [tuple(sample) for sample in samples[:50]]
    print(
        f"\n2  On disk: {sizes.stored} episodes, {steps:,} frames of 256 px (codes drawn at random); pickles of the "
        f"first {sizes.pickled} episodes ({last:,} steps);\n   samples {ACTION} and {WORLD}"
    )
    stored = sum(len(kinds[kind]) for kind in MIX)
    shards = list((folder / "shards" / "data").iterdir())
    table(disk_rows([path for kind in MIX for path in pickles[kind]], shards, stored))

    print(
        f"\n3  Samples a second, in random order, one thread: ours assembled from all {sizes.stored} episodes, "
        f"against pickles read from\n   {sizes.pickled} episodes with their files in the page cache; medians of "
        f"{sizes.repeats} repeats of {sizes.draws:,}, in turn (lowest … highest)"
    )
    rng = np.random.default_rng(seed)
    rows = []
    for kind, samples in kinds.items():
        paths = pickles[kind]
        for path in paths:  # into the page cache
            read_pickle(path)
        for i in range(0, len(samples), 7):
            samples[i]
        wall: dict[str, list[float]] = {"published": [], "ours": []}
        cpu: list[float] = []
        for _ in range(sizes.repeats):
            chosen = [paths[i] for i in rng.integers(len(paths), size=sizes.draws)]
            wall["published"].append(rate(read_pickle, chosen)[0])
            by_wall, by_cpu = rate(samples.__getitem__, rng.integers(len(samples), size=sizes.draws).tolist())
            wall["ours"].append(by_wall)
            cpu.append(by_cpu)
        published, ours = (median(rates) for rates in wall.values())
        rows.append(
            [
                str(kind),
                f"{published:,.0f}",
                f"{ours:,.0f} ({min(wall['ours']):,.0f} … {max(wall['ours']):,.0f})",
                f"{median(cpu):,.0f}",
                f"{ours / published:.2f}x",
                "5,000",
                yes(ours >= 5_000),
            ]
        )
    table(rows, ["", "pickles/s", "ours/s", "ours per CPU second", "ratio", "needed/s", "reached"])


def rate(get: Callable[[Any], object], what: Sequence[Any]) -> tuple[float, float]:
    """Calls per second of the clock and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    for one in what:
        get(one)
    return len(what) / (time.perf_counter() - wall), len(what) / (time.process_time() - cpu)


def synthetic(episodes: int, seed: int, *, shortest: int = 90, longest: int = 160) -> Iterator[TokenEpisode]:
    """Episodes of random codes, as long as LIBERO's, one at a time."""
    rng = np.random.default_rng(seed)
    for i in range(episodes):
        steps = int(rng.integers(shortest, longest + 1))
        codes = rng.integers(8_192, size=(steps, CODES, CODES), dtype=np.uint16)
        task = f"pick_up_object_{i % 10}_and_place_it_in_the_basket"
        yield TokenEpisode(f"{task}/demo_{i}", task, task.replace("_", " "), codes, rng.uniform(-1, 1, (steps, 7)))


def write_data_set(folder: Path, episodes: Iterable[TokenEpisode]) -> TokenDataset:
    """A token data set of one shard."""
    settings: dict[str, Any] = {"codes": "synthetic"}
    fingerprint, file = fingerprint_of(settings), "data/train-00000-of-00001.arrow"
    (folder / "data").mkdir(parents=True)
    write_episodes(folder / file, episodes, {"fingerprint": fingerprint})
    ActionTokenizer.published().save_pretrained(folder)
    record = {"settings": settings, "fingerprint": fingerprint, "splits": {"train": {"files": [file]}}}
    (folder / RECORD_FILE).write_text(json.dumps(record))
    return TokenDataset(folder)


def write_pickles(folder: Path, samples: Iterable[Sample]) -> list[Path]:
    """A file per sample, as the published pre-tokenization writes them."""
    folder.mkdir(parents=True)
    paths = []
    for number, (ids, labels) in enumerate(samples):
        paths.append(folder / f"{number}.pkl")
        with paths[-1].open("wb") as file:
            pickle.dump({"token": ids, "label": labels, "id": number}, file)
    return paths


def read_pickle(path: Path) -> tuple[list[int], list[int]]:
    with path.open("rb") as file:
        item = pickle.load(file)  # noqa: S301 -- written above
    return item["token"], item["label"]


def disk_rows(pickles: Sequence[Path], shards: Sequence[Path], samples: int) -> list[list[str]]:
    """Bytes of a sample: of its content, and of the blocks that it occupies."""
    rows = []
    for what, needed in (("bytes of a sample", 15), ("bytes of a sample, in blocks of the disk (du)", None)):
        size = (lambda path: path.stat().st_size) if needed else (lambda path: path.stat().st_blocks * 512)
        rows.append(ratio(what, mean(map(size, pickles)), sum(map(size, shards)) / samples, needed=needed))
    return rows


# Memory -------------------------------------------------------------------------------------------------------


def memory(folder: Path, sizes: Sizes, seed: int) -> None:
    """Data sets of growing size, each written and read in processes of their own."""
    draws = sizes.draws
    print(
        f"\n4  Memory [MiB], each figure from a process of its own: `prepare` with all episodes tokenized (split, bounds,"
        f"\n   shards, page), and opening the data set and assembling {draws:,} random samples {ACTION}. private: memory"
        "\n   of the process itself, over what it had after its imports; mapped: pages of the shards, which the system"
        "\n   shares and takes back at will; peak RSS: all of it, imports (torch among them) included."
    )
    rows, grown = [], {}
    for episodes in sizes.episodes:
        place = folder / str(episodes)
        for what, function in (("prepare", prepare_synthetic), ("open, draw", open_and_draw)):
            # A process for each: what one has needed at its peak would hide the next.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                used = pool.submit(watched, function, place, episodes, seed, draws).result()
            size = sum(path.stat().st_size for path in place.glob("data/*"))
            grown[what, episodes] = used
            values = (size, used.private, used.mapped, used.peak)
            rows.append([what, f"{episodes:,}", *(f"{value / 2**20:,.1f}" for value in values)])
        for path in sorted(place.rglob("*"), reverse=True):  # disks of CI are small
            path.rmdir() if path.is_dir() else path.unlink()
    table(rows, ["", "episodes", "shards", "private", "mapped", "peak RSS"])
    few, many = min(sizes.episodes), max(sizes.episodes)
    flat = []
    for what in ("prepare", "open, draw"):
        small, large = (grown[what, episodes] for episodes in (few, many))
        factor = (large.base + large.private) / (small.base + small.private)
        flat.append(
            [what, f"{factor:.3f}x", f"{(large.private - small.private) / (many - few) / 1024:.2f}", "1.1x"]
        )
        flat[-1].append(yes(factor <= 1.1))
    print(f"   From {few:,} to {many:,} episodes ({many / few:g}x):")
    table(flat, ["", "private in all", "KiB an episode", "allowed", "reached"])


class Memory(NamedTuple):
    """Bytes: private before, private growth at its highest, mapped growth at its highest, peak of everything."""

    base: int
    private: int
    mapped: int
    peak: int


def watched(function: Callable[[Path, int, int, int], None], *arguments: Any) -> Memory:
    """Call a function and look at this process's memory every few milliseconds."""
    place, _, *others = arguments
    function(place / "warm", 8, *others)  # imports and first uses are no matter of size
    base, ended, seen = resident(), threading.Event(), []

    def look() -> None:
        while not ended.wait(0.005):
            seen.append(resident())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        function(*arguments)
    finally:
        ended.set()
        watcher.join()
    seen.append(resident())
    private, mapped = (max(values) - before for values, before in zip(zip(*seen, strict=True), base, strict=True))
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the process that started this one
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return Memory(base[0], private, mapped, peak)


def resident() -> tuple[int, int]:
    """Private and file-backed bytes of this process."""
    _, everything, files, *_ = map(int, Path("/proc/self/statm").read_text().split())
    page = os.sysconf("SC_PAGE_SIZE")
    return (everything - files) * page, files * page


@dataclass(frozen=True)
class Tokenized:
    """A source whose episodes are all tokenized already: a job that was stopped before its last step."""

    keys: Sequence[EpisodeKey]
    name: str = "synthetic"
    cameras: tuple[str, ...] = (CAMERA,)
    needs_replay: bool = False

    def list(self) -> tuple[Sequence[EpisodeKey], Sequence[Dropped]]:
        """All of them."""
        return self.keys, ()

    def read(self, id: str, cameras: Sequence[str] = ()) -> Episode:
        """Nothing is left to be read."""
        raise NotImplementedError(id)


def prepare_synthetic(folder: Path, episodes: int, seed: int, draws: int) -> None:
    """Leave the parts of a stopped job, as `prepare` writes them; then let `prepare` go on."""
    (folder / WORK_FOLDER).mkdir(parents=True)
    keys = []
    for number, episode in enumerate(synthetic(episodes, seed, shortest=30, longest=60)):
        keys.append(EpisodeKey(episode.id, episode.task, len(episode)))
        preview = {"preview": "", "control_hz": 20.0}
        write_episodes(folder / WORK_FOLDER / f"{number:06d}{PART_SUFFIX}", [episode], preview)
    settings = PrepareSettings(dimensions=7)
    prepare(plan(Tokenized(keys), settings), folder, TOKENIZER, settings)


def open_and_draw(folder: Path, episodes: int, seed: int, draws: int) -> None:
    samples = TokenSamples(TokenDataset(folder), ACTION, TextTokenizer.from_pretrained(TOKENIZER))
    for i in np.random.default_rng(seed).integers(len(samples), size=draws).tolist():
        samples[i]


# Printing -----------------------------------------------------------------------------------------------------


def print_machine(**settings: object) -> None:
    """What the figures below depend on."""
    described = platform.processor() or platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        described = next(
            (line.split(": ")[1].strip() for line in file if line.startswith("model name")), described
        )
    versions = {**installed_versions(), **installed_versions(["pyarrow", "datasets"])}
    print(f"machine   {described}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.release()}")
    print("load      {:.2f} {:.2f} {:.2f}".format(*os.getloadavg()))
    print("versions  " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    print("settings  " + ", ".join(f"{name} {value}" for name, value in settings.items()))


def ratio(what: str, published: float, ours: float, *, needed: float | None = None) -> list[str]:
    """A row of the usual table: how many times less ours is."""
    digits = ",.1f" if isinstance(ours, float) else ",d"
    reached = ["", ""] if needed is None else [f"{needed:g}x", yes(published / ours >= needed)]
    return [what, f"{published:{digits}}", f"{ours:{digits}}", f"{published / ours:.2f}x", *reached]


def table(
    rows: Sequence[Sequence[str]], head: Sequence[str] = ("", "published", "ours", "ratio", "needed", "reached")
) -> None:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        print("   " + "  ".join(cells).rstrip())


def yes(reached: bool) -> str:
    return "yes" if reached else "NO"


if __name__ == "__main__":
    main()
