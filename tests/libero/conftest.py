"""What several files of tests need: a simulator, which takes seconds to build, and made-up token data sets."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from worldvla_libero.data.record import RECORD_FILE, DataRecord, SplitRecord, fingerprint_of
from worldvla_libero.data.shards import TokenEpisode, write_episodes
from worldvla_libero.evaluation.policy import AGENTVIEW, WRIST
from worldvla_libero.simulator.simulator import Simulator
from worldvla_libero.simulator.suites import load_suite
from worldvla_tokenizers import ActionTokenizer

# Read when Ray is imported: under `uv run` each actor would otherwise run in an environment made anew for it.
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"


@pytest.fixture(scope="session")
def simulator() -> Iterator[Simulator]:
    with Simulator(load_suite("libero_goal").task(0), image_size=128) as simulator:
        yield simulator


@pytest.fixture(scope="session")
def two_cameras() -> Iterator[Simulator]:
    task = load_suite("libero_goal").task(0)
    with Simulator(task, image_size=128, cameras=(AGENTVIEW, WRIST)) as simulator:
        yield simulator


def make_episodes(count: int, *, dimensions: int = 7, seed: int = 0) -> list[TokenEpisode]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        steps, rows, columns = int(rng.integers(3, 12)), 2 * int(rng.integers(1, 4)), 4
        codes = rng.integers(0, 8192, (steps, rows, columns)).astype(np.uint16)
        words = f"lift “{i % 3}” [it] ünï"
        made.append(
            TokenEpisode(f"a/demo_{i}", f"task {i % 3}", words, codes, rng.normal(size=(steps, dimensions)))
        )
    return made


def make_data_set(root: Path, made: list[TokenEpisode], *, per_shard: int = 100, tokenizer: str = "x") -> Path:
    settings = {"image_tokenizer": tokenizer}
    (root / "data").mkdir(parents=True)
    files = []
    for start in range(0, len(made), per_shard):
        files.append(f"data/train-{len(files):05d}.arrow")
        chunk = made[start : start + per_shard]
        write_episodes(root / files[-1], chunk, {"fingerprint": fingerprint_of(settings)})
    train = SplitRecord(len(made), sum(map(len, made)), tuple(files))
    record = DataRecord(settings=settings, splits={"train": train}, name=root.name)
    (root / RECORD_FILE).write_text(json.dumps(record.content()))
    ActionTokenizer.published().save_pretrained(root)
    return root


@pytest.fixture
def episodes() -> Callable[..., list[TokenEpisode]]:
    return make_episodes


@pytest.fixture
def data_set() -> Callable[..., Path]:
    return make_data_set


@pytest.fixture
def hub_cache() -> Callable[[Path, str, Path], Path]:
    """Lays a folder out as huggingface_hub caches a data set: links in a folder named by commit, to blobs."""

    def lay(cache: Path, repository: str, folder: Path) -> Path:
        base, commit = cache / f"datasets--{repository.replace('/', '--')}", "0123456789abcdef" * 2 + "01234567"
        (base / "blobs").mkdir(parents=True)
        for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
            blob = base / "blobs" / f"{number:064d}"
            shutil.copy(file, blob)
            link = base / "snapshots" / commit / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        (base / "refs").mkdir()
        (base / "refs" / "main").write_text(commit)
        return base / "snapshots" / commit

    return lay


@pytest.fixture(scope="module")
def ray() -> Iterator[ModuleType]:
    """Ray, on a cluster of two nodes of a core each that ends with the file of tests."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # what the tests' own modules need
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        try:
            cluster.add_node(num_cpus=1)
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            ray.data.DataContext.get_current().enable_progress_bars = False
            yield ray
        finally:
            ray.shutdown()
            cluster.shutdown()
