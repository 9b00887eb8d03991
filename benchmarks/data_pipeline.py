"""Token shards against the published pre-tokenization: frames encoded, disk, samples a second, memory.

The published procedure, restated: every sample is made alone, each of its frames goes through the encoder anew,
and its ids and labels are pickled as Python lists into a file of their own. It runs once for every set of samples,
that is for every M and K: the released models need one set of action samples and one of world samples, the paper's
comparisons need more. Ours is `prepare`: each frame is encoded once, whatever is trained then, and samples are
assembled when they are asked for. Both sides must give the same samples, id by id.

    python benchmarks/data_pipeline.py [--quick] [--seed 0]

Linux only: memory is read from /proc.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads would spin

import argparse
import json
import pickle
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from common import FIXTURES, print_machine, print_others, table, watching_others, yes
from PIL import Image

from worldvla_libero.data.episodes import Episode, EpisodeKey
from worldvla_libero.data.record import RECORD_FILE, DataRecord, SplitRecord, fingerprint_of
from worldvla_libero.data.samples import ActionSamples, SampleKind, SampleWriter, TokenSamples, WorldSamples
from worldvla_libero.data.shards import TokenDataset, TokenEpisode, read_episodes, write_episodes
from worldvla_libero.hdf5 import HDF5Source, write_demonstrations
from worldvla_libero.jobs.parts import WORK_FOLDER, Dropped
from worldvla_libero.prepare import PART_SUFFIX, PrepareSettings, load_image_tokenizer, plan, prepare
from worldvla_tokenizers import ActionTokenizer, TextTokenizer
from worldvla_tokenizers.sequence import Sample

if TYPE_CHECKING:
    from worldvla_tokenizers import VQGAN

TOKENIZER = FIXTURES / "published" / "tokenizer"
CAMERA = "agentview"
CODES = 16  # rows and columns of codes of a frame of 256 px

Kinds: TypeAlias = tuple[SampleKind, ...]

ACTION, ONE_ACTION, LONG_ACTION = ActionSamples(2, 5), ActionSamples(2, 1), ActionSamples(2, 10)
WORLD = WorldSamples(1, 1)
MIX: Kinds = (ACTION, WORLD)  # what the released models are trained on, about 1:1
TABLE_3: Kinds = (*MIX, ONE_ACTION)  # the paper's main comparison: with and without chunks and world data
TABLE_5: Kinds = tuple(ActionSamples(history, actions) for history in (1, 2, 4) for actions in (1, 5))

AGAINST = ("", "published", "ours", "ratio", "needed", "reached")


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
    with tempfile.TemporaryDirectory() as folder, watching_others() as others:
        for part in (encoding, storage, memory):
            (Path(folder) / part.__name__).mkdir()
            part(Path(folder) / part.__name__, sizes, options.seed)
    print_others(others)


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

    published, pickles = {}, {}
    for kind in TABLE_3:
        with encoder_counted() as published[kind], timed(published[kind]):
            samples = (
                sample_alone(episode, kind, t, tokenizer.encode, sizes.image_size, writer)
                for episode in episodes
                for t in range(kind.count(len(episode)))
            )
            pickles[kind] = write_pickles(folder / named(kind), samples)
        assert published[kind].frames == sum(encodings(kind, len(episode)) for episode in episodes)
    settings = PrepareSettings(image_size=sizes.image_size, fraction=1.0)  # all train: one split to compare
    with encoder_counted() as ours, timed(ours):
        prepare(plan(source, settings), folder / "shards", TOKENIZER, settings)

    data = TokenDataset(folder / "shards")
    for kind, paths in pickles.items():
        assembled = [tuple(sample) for sample in TokenSamples(data, kind, text, actions=actions)]
        assert [read_pickle(path) for path in paths] == assembled, f"not the same samples: {named(kind)}"

    counts = ", ".join(f"{len(paths):,} of {named(kind)}" for kind, paths in pickles.items())
    print(
        f"\n1  From frames to samples: {len(episodes)} episodes (actions of the raw demonstrations in "
        f"tests/fixtures, at most {sizes.steps}\n   steps; frames from there with noise), {frames} frames of "
        f"{sizes.image_size} px; narrow VQ-GAN of tests/fixtures, batch size 1;\n   samples: {counts}.\n   All "
        f"{sum(map(len, pickles.values())):,} samples of both sides are equal."
    )
    mix, comparison = (sum_of(published[kind] for kind in kinds) for kinds in (MIX, TABLE_3))
    table(
        [
            ratio("frames encoded, Table 3 (all three sets)", comparison.frames, ours.frames, needed=4),
            ratio("  of these for the released mix alone", mix.frames, ours.frames, needed=4),
            ratio("seconds in the encoder, Table 3", comparison.encoding, ours.encoding),
            ratio("  released mix alone", mix.encoding, ours.encoding),
            ratio("seconds in all, Table 3 (ours: all of `prepare`)", comparison.seconds, ours.seconds),
            ratio("  released mix alone", mix.seconds, ours.seconds),
        ],
        AGAINST,
    )
    print_counts()


def print_counts() -> None:
    """Frames that the published procedure encodes, set by set; the sets above have shown that it is so counted."""
    lengths = [key.steps for key in HDF5Source(FIXTURES / "demos" / "libero_object").list()[0]]
    frames = sum(lengths)
    print(
        f"\n   Counted for the {len(lengths)} raw demonstrations at full length (T = "
        f"{', '.join(map(str, lengths))}): {frames} frames, which ours encodes\n   once, whatever is then trained:"
    )

    def row(what: str, kinds: Kinds, *, needed: int | None = None) -> list[str]:
        encoded = sum(encodings(kind, steps) for kind in kinds for steps in lengths)
        reached = ["", ""] if needed is None else [f"{needed}x", yes(encoded >= needed * frames)]
        return [what, formula(kinds), f"{encoded:,}", f"{encoded / frames:.2f}x", *reached]

    rows = [row(named(kind), (kind,)) for kind in (*TABLE_5, LONG_ACTION, WORLD)]
    rows.append(row("released mix: action M=2 K=5, world", MIX, needed=4))
    rows.append(row("  of LIBERO-Long: action M=2 K=10, world", (LONG_ACTION, WORLD), needed=4))
    rows.append(row("Table 3: action M=2 K=1 and 5, world", TABLE_3, needed=4))
    rows.append(row("Tables 3 and 5: action M=1, 2, 4 K=1 and 5, world", (*TABLE_5, WORLD), needed=4))
    table(rows, ["", "frames of T steps", "published", "ratio", "needed", "reached"])
    print("   In the released mix a frame stands in 4 samples, one near an end in fewer: always below 4x.")


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
        left_out = {"states": None, "robot_states": None, "proprioception": None}  # of the whole episode
        return replace(episode, actions=actions, frames={CAMERA: frames}, **left_out)

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


def encodings(kind: SampleKind, steps: int) -> int:
    """Frames that the published procedure encodes for an episode."""
    return sum(len(frames_of(kind, t)) for t in range(kind.count(steps)))


def formula(kinds: Kinds) -> str:
    """Frames encoded for a long episode: it is linear in T, the number of steps."""
    short, long = (sum(encodings(kind, steps) for kind in kinds) for steps in (100, 101))
    slope = long - short
    return f"{slope if slope > 1 else ''}T {short - 100 * slope:+d}".replace(" -", " - ").replace(" +0", "")


def named(kind: SampleKind) -> str:
    if isinstance(kind, WorldSamples):
        return f"world h={kind.history} N={kind.rounds}"
    assert isinstance(kind, ActionSamples)
    return f"action M={kind.history} K={kind.actions}"


@dataclass
class Tally:
    """What one side has cost: frames through the encoder, seconds in it, seconds in all."""

    frames: int = 0
    encoding: float = 0.0
    seconds: float = 0.0


def sum_of(tallies: Iterable[Tally]) -> Tally:
    return Tally(*map(sum, zip(*map(astuple, tallies), strict=True)))


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

    VQGAN.encode = encode  # type: ignore[method-assign, assignment]
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
    kinds = {kind: TokenSamples(data, kind, text) for kind in (*MIX, LONG_ACTION)}
    last = sum(int(n) for n in data.lengths[: sizes.pickled])
    pickles: dict[SampleKind, list[Path]] = {}
    for kind, samples in kinds.items():
        count = sum(kind.count(int(n)) for n in data.lengths[: sizes.pickled])
        pickles[kind] = write_pickles(folder / named(kind), (samples[i] for i in range(count)))
        assert [read_pickle(path) for path in pickles[kind][:50]] == [tuple(sample) for sample in samples[:50]]
    print(
        f"\n2  On disk: {sizes.stored} episodes, {steps:,} frames of 256 px (codes drawn at random); pickles of "
        f"the first\n   {sizes.pickled} episodes ({last:,} steps), {named(ACTION)} and {named(WORLD)}; "
        "50 of each are read back and are equal"
    )
    stored = sum(len(kinds[kind]) for kind in MIX)
    shards = list((folder / "shards" / "data").iterdir())
    table(disk_rows([path for kind in MIX for path in pickles[kind]], shards, stored), AGAINST)

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
                named(kind),
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
    file = "data/train-00000-of-00001.arrow"
    (folder / "data").mkdir(parents=True)
    write_episodes(folder / file, episodes, {"fingerprint": fingerprint_of(settings)})
    steps = [len(episode) for episode in read_episodes(folder / file)[0]]
    ActionTokenizer.published().save_pretrained(folder)
    record = DataRecord(settings=settings, splits={"train": SplitRecord(len(steps), sum(steps), (file,))})
    (folder / RECORD_FILE).write_text(json.dumps(record.content()))
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
        "\n4  Memory [MiB], each figure from a process of its own: `prepare` with all episodes tokenized (split, "
        f"bounds, shards,\n   page), and opening the data set and assembling {draws:,} random samples, "
        f"{named(ACTION)}; each with 8 episodes\n   first, to warm. private: memory of the process itself, over "
        "what it had when warm; mapped: pages of the shards,\n   which the system shares and takes back at will; "
        "peak RSS: all of it, imports (torch among them) included."
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


def ratio(what: str, published: float, ours: float, *, needed: float | None = None) -> list[str]:
    """A row of the usual table: how many times less ours is."""
    digits = ",.1f" if isinstance(ours, float) else ",d"
    reached = ["", ""] if needed is None else [f"{needed:g}x", yes(published / ours >= needed)]
    return [what, f"{published:{digits}}", f"{ours:{digits}}", f"{published / ours:.2f}x", *reached]


if __name__ == "__main__":
    main()
