"""Token data sets on disk: per episode image codes, actions and instruction, and nothing derived from them.

    dataset.json            settings, their fingerprint, the split, what was dropped and why
    action_tokenizer.json   bounds of the actions, fitted to the training split
    data/train-00000-of-00002.arrow …, data/validation-00000-of-00001.arrow …
    README.md, index.html   for people

Every shard carries the fingerprint of the data set: the image tokenizer's weights and all settings. A shard of
another data set is refused, wherever it was copied from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from worldvla_libero.data.hub import data_path
from worldvla_libero.data.record import DATA_FOLDER, RECORD_FILE, DataRecord, ShardError
from worldvla_tokenizers import ActionTokenizer
from worldvla_tokenizers.action import FILE_NAME as BOUNDS_FILE
from worldvla_tokenizers.files import HubOptions, PushOptions, push_folder

if TYPE_CHECKING:
    from datasets import Features, IterableDataset

    from worldvla_tokenizers import ImageTokenizer

CARD_FILE = "README.md"
PAGE_FILE = "index.html"

_METADATA_KEY = b"worldvla"
_EPISODES_PER_BATCH = 64
_WORDS = ("episode", "task", "instruction")


@dataclass(frozen=True, eq=False)
class TokenEpisode:
    """One episode of a token data set.

    Attributes:
        id: unique in the data set.
        task: name of what it demonstrates.
        instruction: the task in words.
        codes: (T, rows, columns) uint16 codebook indices; frame t is what the camera saw before action t.
        actions: (T, D) float64 in data units.
    """

    id: str
    task: str
    instruction: str
    codes: NDArray[np.uint16]
    actions: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.actions)


class TokenDataset(Sequence[TokenEpisode]):
    """One split of a token data set, memory-mapped: opening it reads nothing, an episode is a view of the file.

    Args:
        root: folder of the data set.
        split: name of the split, such as `train`.

    Attributes:
        root: the folder.
        split: the split.
        record: what `dataset.json` says.
        actions: bounds fitted to the training split.

    Raises:
        ShardError: the data set is unfinished, has no such split, or a shard is missing or foreign.
    """

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        self.root, self.split = Path(root), split
        self.record = DataRecord.read(self.root)
        if split not in self.record.splits:
            raise ShardError(f"{root} has no split {split!r}; existing: {', '.join(self.record.splits)}")
        self.actions = ActionTokenizer.from_pretrained(self.root)
        self._open()

    @classmethod
    def from_pretrained(
        cls, dir_or_repo: str | os.PathLike[str], *, split: str = "train", **hub: Unpack[HubOptions]
    ) -> Self:
        """Open a split of a data set, from a folder or a Hub repository.

        Args:
            dir_or_repo: a folder, or the id of a data set on the Hub, of which this split is downloaded.
            split: name of the split.
            hub: `revision`, `cache_dir`, `token`, `local_files_only`, as in transformers.

        Raises:
            ShardError: see the class.
            DataNotFoundError: there is no such folder, and the Hub's data set cannot be fetched.
        """
        return cls(dataset_folder(dir_or_repo, split, **hub), split)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the settings, in hexadecimal; equal in every shard."""
        return self.record.fingerprint

    def digest(self) -> str:
        """SHA-256 of everything in the split's shards, in hexadecimal; reads all of them."""
        found = hashlib.sha256()
        for name in self.record.splits[self.split].files:
            with (self.root / name).open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        return found.hexdigest()

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(episodes,) steps of each episode."""
        return self._lengths

    def check_tokenizer(self, tokenizer: ImageTokenizer) -> None:
        """Make sure that the codes are this image tokenizer's.

        Raises:
            ShardError: they are another's.
        """
        made_by, given = self.record.image_tokenizer, tokenizer.vqgan.fingerprint
        if made_by != given:
            raise ShardError(
                f"{self.root} was made with image tokenizer {made_by[:12]}, not {given[:12]}; load the one it was "
                "made with, or prepare the data again"
            )

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: Any) -> Any:
        """An episode; codes and actions are read-only views of the file."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= position < len(self):
            raise IndexError(f"episode {index} of {len(self)} in split {self.split!r} of {self.root}")
        batch = int(np.searchsorted(self._ends, position, side="right"))
        return self._batches[batch].episode(position - (int(self._ends[batch - 1]) if batch else 0))

    def __iter__(self) -> Iterator[TokenEpisode]:
        return (self[i] for i in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "split": self.split}  # workers map the files anew instead of being sent them

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> str:
        """Upload the whole data set, all splits with card and page, to a data set repository of the Hub."""

        def link(folder: str) -> None:
            for file in _files(self.root):
                target = Path(folder, file.relative_to(self.root))
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(file.resolve())

        options.setdefault("commit_message", "Upload token data set")
        return push_folder(link, repo_id, repo_type="dataset", **options)

    def _open(self) -> None:
        shards = self.record.splits[self.split].files
        self._batches = [batch for file in shards for batch in _batches(self.root / file, self.fingerprint)]
        self._ends = np.cumsum([len(batch) for batch in self._batches])
        lengths = [batch.lengths for batch in self._batches]
        self._lengths = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)


def stream(dir_or_repo: str, *, split: str = "train", **options: Any) -> IterableDataset:
    """Read a split from the front without having it here, through `datasets`.

    Args:
        dir_or_repo: a folder or the id of a data set on the Hub.
        split: name of the split.
        options: of `datasets.load_dataset`.

    Returns:
        Rows that `token_episode` turns into episodes; `shuffle`, `map` and the like are those of `datasets`.
    """
    from datasets import load_dataset

    return load_dataset(dir_or_repo, split=split, streaming=True, **options)


def token_episode(row: Mapping[str, Any]) -> TokenEpisode:
    """A row as `datasets` reads it → an episode."""
    actions = np.asarray(row["actions"], dtype=np.float64)
    codes = np.asarray(row["codes"], dtype=np.uint16).reshape(len(actions), row["rows"], row["columns"])
    return TokenEpisode(row["episode"], row["task"], row["instruction"], codes, actions)


def dataset_folder(dir_or_repo: str | os.PathLike[str], split: str, **hub: Unpack[HubOptions]) -> Path:
    """The folder of a data set: itself if it exists, else the Hub's, downloaded as far as the split needs it."""
    subfolder = hub.pop("subfolder", None)
    inside = f"{subfolder}/" if subfolder else ""
    names = (RECORD_FILE, BOUNDS_FILE, f"{DATA_FOLDER}/{split}-*")
    options: dict[str, Any] = {**hub, "allow_patterns": [inside + name for name in names]}
    folder = data_path(dir_or_repo, **options)
    return folder if folder == Path(dir_or_repo) else folder / (subfolder or "")


def write_episodes(path: Path, episodes: Iterable[TokenEpisode], metadata: Mapping[str, Any]) -> int:
    """Write one Arrow file of episodes, as `datasets` reads them; memory is flat in their number.

    Args:
        path: of the file.
        episodes: of one action width.
        metadata: JSON to go with the file, such as the fingerprint.

    Returns:
        How many were written.
    """
    schema: pa.Schema | None = None
    writer: Any = None
    rows: list[dict[str, Any]] = []
    count = 0
    with pa.OSFile(str(path), "wb") as sink:
        for episode in episodes:
            if schema is None:
                schema = features(episode.actions.shape[1]).arrow_schema
                schema = schema.with_metadata({**schema.metadata, _METADATA_KEY: json.dumps(metadata).encode()})
                writer = pa.ipc.new_stream(sink, schema)
            rows.append(_row(episode))
            count += 1
            if len(rows) == _EPISODES_PER_BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
                rows = []
        if rows:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
        if writer is not None:
            writer.close()
    return count


def read_episodes(path: Path) -> tuple[list[TokenEpisode], dict[str, Any]]:
    """Episodes and metadata of one file that `write_episodes` wrote."""
    batches, metadata = _mapped(path)
    return [batch.episode(i) for batch in batches for i in range(len(batch))], metadata


def features(dimensions: int) -> Features:
    """Columns of a shard, for actions of D dimensions."""
    from datasets import Features, List, Value

    return Features(
        {
            "episode": Value("string"),
            "task": Value("string"),
            "instruction": Value("string"),
            "rows": Value("uint16"),
            "columns": Value("uint16"),
            "codes": List(Value("uint16")),  # all frames, each in raster order
            "actions": List(List(Value("float64"), length=dimensions)),
        }
    )


class _Batch:
    """A record batch: where its columns lie in the mapped file."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch
        codes, actions = batch.column("codes"), batch.column("actions")
        self._codes = codes.values.to_numpy(zero_copy_only=True)
        self._code_offsets = codes.offsets.to_numpy()
        width = actions.type.value_type.list_size
        self._actions = actions.values.flatten().to_numpy(zero_copy_only=True).reshape(-1, width)
        self._action_offsets = actions.offsets.to_numpy()
        self._shapes = np.stack([batch.column(name).to_numpy() for name in ("rows", "columns")], axis=1)
        self.lengths = np.diff(self._action_offsets).astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def episode(self, i: int) -> TokenEpisode:
        id, task, instruction = (self._batch.column(name)[i].as_py() for name in _WORDS)
        rows, columns = (int(n) for n in self._shapes[i])
        actions = self._actions[self._action_offsets[i] : self._action_offsets[i + 1]]
        codes = self._codes[self._code_offsets[i] : self._code_offsets[i + 1]].reshape(-1, rows, columns)
        return TokenEpisode(id, task, instruction, codes, actions)


def _row(episode: TokenEpisode) -> dict[str, Any]:
    frames, rows, columns = episode.codes.shape
    if frames != len(episode.actions):
        raise ShardError(f"{episode.id}: {frames} frames of codes for {len(episode.actions)} actions")
    return {
        "episode": episode.id,
        "task": episode.task,
        "instruction": episode.instruction,
        "rows": rows,
        "columns": columns,
        "codes": np.ascontiguousarray(episode.codes).ravel(),
        "actions": list(episode.actions),
    }


def _batches(path: Path, fingerprint: str) -> list[_Batch]:
    batches, metadata = _mapped(path)
    found = metadata.get("fingerprint", "none")
    if found != fingerprint:
        raise ShardError(
            f"{path} belongs to another data set: its fingerprint is {found[:12]}, not {fingerprint[:12]}"
        )
    return batches


def _mapped(path: Path) -> tuple[list[_Batch], dict[str, Any]]:
    """Record batches of a file in `datasets`' own format, mapped; and our metadata, which `datasets` drops."""
    if not path.is_file():
        raise ShardError(f"shard {path} is missing")
    try:
        reader = pa.ipc.open_stream(pa.memory_map(str(path)))
        metadata = json.loads((reader.schema.metadata or {})[_METADATA_KEY])
        return [_Batch(batch) for batch in reader], metadata
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise ShardError(f"{path} is truncated, or no shard: {' '.join(str(error).split())}") from error


def _files(root: Path) -> list[Path]:
    names = (RECORD_FILE, BOUNDS_FILE, CARD_FILE, PAGE_FILE)
    return [*(root / name for name in names if (root / name).is_file()), *sorted((root / DATA_FOLDER).iterdir())]
