"""What people are told of a data set: its page and its card."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from worldvla_libero.data.episodes import (
    EpisodeKey,
)
from worldvla_libero.data.page import Preview
from worldvla_libero.data.record import DATA_FOLDER, DataRecord
from worldvla_libero.data.shards import TokenEpisode, read_episodes

if TYPE_CHECKING:
    from worldvla_tokenizers import ActionTokenizer

_PREVIEWS_PER_TASK = 2

DataPage: TypeAlias = Callable[
    [DataRecord, Iterable[tuple[str, TokenEpisode]], "ActionTokenizer", Sequence[Preview]], str
]
"""(record, split and episode of each, bounds, previews) → HTML, see `data_page`."""


def episodes_of(parts: Mapping[EpisodeKey, Path], splits: Mapping[str, str]) -> Iterator[tuple[str, TokenEpisode]]:
    """Split and episode of each part, one in memory at a time."""
    for key, part in parts.items():
        yield splits[key.id], read_episodes(part)[0][0]


def previews_of(parts: Mapping[EpisodeKey, Path], splits: Mapping[str, str]) -> list[Preview]:
    """The first episodes of each task."""
    previews: list[Preview] = []
    count = Counter[str]()
    for key, part in parts.items():
        count[key.task] += 1
        if count[key.task] <= _PREVIEWS_PER_TASK:
            (episode,), metadata = read_episodes(part)
            strip = base64.b64decode(metadata["preview"])
            previews.append(Preview(episode.id, episode.task, episode.instruction, splits[key.id], strip))
    return previews


def card(record: DataRecord) -> str:
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
