"""What do the readers make of damaged and made-up files? Only typed errors, quickly, in flat memory?

    uv run python tools/mutations.py [--count 10000] [--seed 0] [KIND ...]

For each kind of file: a small good one, mutated (cut off, bits turned, fields exchanged, removed or of another
type), is read in a process of its own. An answer is good if the file was read after all, or if the error is one of
this project's own types. Prints a line a kind, and an example of each wrong answer; exit status 1 if there is one.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
TOKENIZER, CHECKPOINT = FIXTURES / "published" / "tokenizer", FIXTURES / "published" / "checkpoint"
SLOWEST = 2.0  # [s] that reading a small file may take
STUCK = 30.0  # [s] after which its process is killed

Read = Callable[[Path], Any]


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        file: which of the folder's files is mutated.
        make: fills an empty folder with good files, and returns what reads the folder.
        fields: whether the file is JSON, whose fields are exchanged as well.
    """

    file: str
    make: Callable[[Path], Read]
    fields: bool = False


# Good files


def _text_tokenizer(folder: Path) -> Read:
    from worldvla_tokenizers import TextTokenizer

    content = json.loads((TOKENIZER / "tokenizer.json").read_text("utf-8"))
    # The ids keep their places, which the vocabulary depends on; most merges go, which take long to read.
    content["model"]["merges"] = content["model"]["merges"][:50]
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    return TextTokenizer.from_pretrained


def _actions(folder: Path) -> Read:
    from worldvla_tokenizers import ActionTokenizer

    ActionTokenizer.published().save_pretrained(folder)
    return ActionTokenizer.from_pretrained


def _processor(folder: Path) -> Read:
    from worldvla_model import WorldVLAProcessor

    WorldVLAProcessor.from_pretrained(TOKENIZER).save_pretrained(folder)
    return WorldVLAProcessor.from_pretrained


def _config(folder: Path) -> Read:
    from worldvla_model import WorldVLAConfig, WorldVLAForConditionalGeneration

    WorldVLAForConditionalGeneration.from_pretrained(CHECKPOINT).config.save_pretrained(folder)
    return WorldVLAConfig.from_pretrained


def _weights(folder: Path) -> Read:
    import torch
    import transformers

    from worldvla_model import WorldVLAConfig, WorldVLAForConditionalGeneration

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    base = WorldVLAForConditionalGeneration.from_pretrained(CHECKPOINT).config.to_dict()
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = WorldVLAConfig.from_dict({**base, **small, "num_key_value_heads": 1})
    WorldVLAForConditionalGeneration(config).save_pretrained(folder)
    return WorldVLAForConditionalGeneration.from_pretrained


def _published_vqgan(folder: Path) -> Read:
    import torch
    import yaml

    from worldvla_tokenizers import VQGAN, VQGANConfig

    content = yaml.safe_load((TOKENIZER / "vqgan.yaml").read_text("utf-8"))
    content["model"]["params"]["ddconfig"] |= {"ch_mult": [1, 1], "num_res_blocks": 1}
    content["model"]["params"]["n_embed"] = 16
    (folder / "vqgan.yaml").write_text(yaml.safe_dump(content), "utf-8")
    torch.manual_seed(0)
    network = VQGAN(VQGANConfig.from_yaml(folder / "vqgan.yaml"))
    torch.save({"state_dict": network.state_dict()}, folder / "vqgan.ckpt")
    return VQGAN.from_published


def _hdf5(folder: Path) -> Read:
    import h5py
    import numpy as np

    with h5py.File(folder / "milk_demo.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "pick up the milk"})
        for i in range(2):
            demo = data.create_group(f"demo_{i}")
            demo["actions"] = np.zeros((6, 7))
            demo["states"] = np.zeros((6, 9))
            demo.create_dataset("obs/agentview_rgb", data=np.ones((6, 16, 16, 3), np.uint8), compression="gzip")
            demo["obs/ee_states"] = np.zeros((6, 6))
            demo["obs/gripper_states"] = np.zeros((6, 2))

    def read(folder: Path) -> None:
        from worldvla_libero import HDF5Source

        _read_all(HDF5Source(folder))

    return read


def _lerobot(folder: Path) -> Read:
    shutil.copytree(FIXTURES / "lerobot" / "libero", folder, dirs_exist_ok=True)

    def read(folder: Path) -> None:
        from worldvla_libero import LeRobotSource

        _read_all(LeRobotSource(folder))

    return read


def _read_all(source: Any) -> None:
    """As `prepare` does, which drops an episode by its typed error and goes on."""
    from worldvla_libero import EpisodeError

    for key in source.list()[0]:
        try:
            source.read(key.id, source.cameras)
        except EpisodeError:
            continue


def _record(folder: Path) -> Read:
    from worldvla_libero import TokenDataset, sample_data_path

    shutil.copytree(sample_data_path(), folder, dirs_exist_ok=True)
    return lambda folder: [len(episode) for episode in TokenDataset(folder)]


def _sequence(folder: Path) -> Read:
    from worldvla_tokenizers import Vocabulary, sequence

    vocabulary = Vocabulary.from_tokenizer(TOKENIZER / "tokenizer.json")
    samples = json.loads((FIXTURES / "published" / "samples.json").read_text("utf-8"))
    (folder / "ids.json").write_text(json.dumps(samples[0]["tokens"]))

    def read(folder: Path) -> None:
        try:
            ids = json.loads((folder / "ids.json").read_text("utf-8"))
        except ValueError:
            return  # not what is tried here
        if isinstance(ids, list):
            sequence.parse(ids, vocabulary)

    return read


KINDS = {
    "tokenizer.json": Kind("tokenizer.json", _text_tokenizer, fields=True),
    "action_tokenizer.json": Kind("action_tokenizer.json", _actions, fields=True),
    "processor_config.json": Kind("processor_config.json", _processor, fields=True),
    "config.json": Kind("config.json", _config, fields=True),
    "vqgan.yaml": Kind("vqgan.yaml", _published_vqgan),
    "vqgan.ckpt": Kind("vqgan.ckpt", _published_vqgan),
    "safetensors": Kind("model.safetensors", _weights),
    "HDF5": Kind("milk_demo.hdf5", _hdf5),
    "meta/episodes": Kind("meta/episodes/chunk-000/file-000.parquet", _lerobot),
    "info.json": Kind("meta/info.json", _lerobot, fields=True),
    "dataset.json": Kind("dataset.json", _record, fields=True),
    "sequences": Kind("ids.json", _sequence, fields=True),
}

# Mutations


def mutate(good: bytes, rng: random.Random, *, fields: bool) -> bytes:
    """One change, as an interrupted copy, a bad disk or a careless script makes it."""
    ways = [_cut, _turn_bits, _turn_bits, _zero]
    if fields:
        ways += [_change_fields] * 6
    return rng.choice(ways)(good, rng)


def _near_the_front(size: int, rng: random.Random) -> int:
    """Headers matter more than what follows."""
    return int(size * rng.random() ** rng.choice((1, 4, 12)))


def _cut(good: bytes, rng: random.Random) -> bytes:
    return good[: _near_the_front(len(good), rng)]


def _turn_bits(good: bytes, rng: random.Random) -> bytes:
    changed = bytearray(good)
    for _ in range(rng.choice((1, 1, 3, 20))):
        changed[min(_near_the_front(len(good), rng), len(good) - 1)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _zero(good: bytes, rng: random.Random) -> bytes:
    """A hole, as a download leaves it."""
    start = _near_the_front(len(good), rng)
    size = min(rng.choice((1, 8, 512, 4096)), len(good) - start)
    return good[:start] + bytes(size) + good[start + size :]


STRANGERS: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 2**100, 0.5, -1e308, float("nan"), float("inf")),
    *("", "x", "0", "../../x", "{0.__class__}", [], [[]], [1, 2], {}, {"x": 1}, "\udcff"),
)


def _change_fields(good: bytes, rng: random.Random) -> bytes:
    content = json.loads(good)
    for _ in range(rng.choice((1, 1, 2, 5))):
        places = list(_places(content))
        if not places:
            break
        holder, key = rng.choice(places)
        match rng.randrange(4):
            case 0:
                holder[key] = copy.deepcopy(rng.choice(STRANGERS))
            case 1:
                other, there = rng.choice(places)
                holder[key], other[there] = copy.deepcopy(other[there]), copy.deepcopy(holder[key])
            case 2:
                del holder[key]
            case _:
                if isinstance(holder, dict):
                    holder[rng.choice(("x", "", str(key) + "s"))] = holder[key]
                else:
                    holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(rng.choice(STRANGERS)))
    if rng.random() < 0.05:
        content = copy.deepcopy(rng.choice(STRANGERS))
    return json.dumps(content).encode("utf-8", "surrogatepass")


def _places(content: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Holders and keys of fields; of long lists a few."""
    if isinstance(content, dict | list) and depth < 6:
        keys: Any = content if isinstance(content, dict) else range(len(content))
        for key in [*keys][:200]:
            yield content, key
            yield from _places(content[key], depth + 1)


# Reading, in a process that may die


@dataclass
class Found:
    """What came of a kind."""

    read: int = 0
    refused: int = 0
    slow: int = 0
    seconds: float = 0.0  # of the slowest
    slowest: int = 0  # its number
    growth: float = 0.0  # [MiB] of memory after the first tenth
    wrong: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)  # number of the first mutation with a kind of wrong answer


def _work(kind: str, seed: int, begin: int, end: int, out: Connection) -> None:
    import warnings

    warnings.simplefilter("ignore")
    with _folder(kind) as (folder, read):
        path = folder / KINDS[kind].file
        good = path.read_bytes()
        read(folder)  # what it imports is not what is measured
        for number in range(begin, end):
            path.write_bytes(mutate(good, random.Random(f"{kind} {seed} {number}"), fields=KINDS[kind].fields))
            out.send(("begun", number, None, 0.0, 0))
            answer, seconds = _timed(read, folder)
            if seconds > SLOWEST:  # is it the file, or was the processor somebody else's?
                seconds = min(seconds, _timed(read, folder)[1])
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            out.send(("done", number, answer, seconds, memory))
    out.send(("end", end, None, 0.0, 0))


def _timed(read: Read, folder: Path) -> tuple[str, float]:
    began = time.perf_counter()
    try:
        read(folder)
        answer = "read"
    except Exception as error:  # noqa: BLE001 - every kind of answer is what is looked for
        known = type(error).__module__.startswith("worldvla")
        answer = "refused" if known else f"{type(error).__module__}.{type(error).__name__}: {error}"
    return answer, time.perf_counter() - began


@contextmanager
def _folder(kind: str) -> Iterator[tuple[Path, Read]]:
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as folder:
        read = KINDS[kind].make(Path(made))
        shutil.copytree(made, folder, dirs_exist_ok=True)
        yield Path(folder), read


def try_kind(kind: str, count: int, seed: int = 0) -> Found:
    """Read `count` mutations of a kind of file."""
    found, number = Found(), 0
    context = multiprocessing.get_context("spawn")
    memory: list[int] = []
    while number < count:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(kind, seed, number, count, theirs))
        process.start()
        theirs.close()
        ended = False
        try:
            while ours.poll(STUCK if memory else 10 * STUCK):
                what, number, answer, seconds, size = ours.recv()
                if what == "end":
                    ended = True
                    break
                if what == "done":
                    memory.append(size)
                    _count(found, number, answer, seconds)
                    number += 1
            if not ended:
                _count(found, number, f"stuck for {STUCK:.0f} s", STUCK)
        except EOFError:
            process.join()
            _count(found, number, f"its process died ({process.exitcode})", 0.0)
        process.kill()
        process.join()
        number = number if ended else number + 1
    early = memory[: max(1, len(memory) // 10)]
    found.growth = (max(memory, default=0) - max(early, default=0)) / 1024
    return found


def _count(found: Found, number: int, answer: str, seconds: float) -> None:
    if seconds > found.seconds:
        found.seconds, found.slowest = seconds, number
    found.slow += seconds > SLOWEST
    if answer == "read":
        found.read += 1
    elif answer == "refused":
        found.refused += 1
    else:
        message = " ".join(answer.split())[:160]
        kind = message.partition(":")[0]
        if not found.wrong[kind]:
            found.first[message] = number
        found.wrong[kind] += 1


def main(arguments: list[str]) -> int:
    """Print the table; 1 if an answer was wrong, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; by default all")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    print(
        f"{'file':<24}{'tried':>8}{'read':>8}{'refused':>9}{'wrong':>7}{'> 2 s':>7}{'slowest':>10}{'memory':>12}"
    )
    failed = False
    for kind in options.kinds or KINDS:
        found = try_kind(kind, options.count, options.seed)
        wrong = found.wrong.total()
        failed |= bool(wrong or found.slow)
        print(
            f"{kind:<24}{options.count:>8}{found.read:>8}{found.refused:>9}{wrong:>7}{found.slow:>7}"
            f"{found.seconds:>8.2f} s{found.growth:>+8.0f} MiB",
            flush=True,
        )
        if found.slow:
            print(f"    the slowest: mutation {found.slowest}")
        for told, number in found.first.items():
            print(f"    {found.wrong[told.partition(':')[0]]} such as mutation {number}: {told}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
