"""Training samples, assembled on the fly by index from a token data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from worldvla_libero.data.shards import TokenDataset, TokenEpisode
from worldvla_tokenizers import ActionTokenizer, TextTokenizer, sequence
from worldvla_tokenizers.sequence import Prompts, Sample


class SampleWriter:
    """What a kind of sample writes with: ids of words and actions, prompts and label rule.

    Args:
        text: words ↔ ids.
        actions: actions ↔ ids.
        settings: prompts and label rule: `Prompts`, or the settings of a model's processor.
    """

    def __init__(self, text: TextTokenizer, actions: ActionTokenizer, settings: Prompts = Prompts()) -> None:
        self.text, self.settings, self.vocabulary = text, settings, text.vocabulary
        self.actions = actions.encode  # (n, D) in data units → (n, D) ids
        self._known: dict[str, list[int]] = {}

    def words(self, text: str) -> list[int]:
        """Ids of a text; a data set has few different ones, and each is encoded once."""
        if text not in self._known:
            self._known[text] = self.text.encode(text)
        return self._known[text]


class SampleKind(Protocol):
    """What a sample is made of. A step t belongs to a sample if all it predicts is inside the episode."""

    def count(self, steps: int) -> int:
        """Samples of an episode of `steps` steps: one for each of t = 0 … count - 1."""
        ...

    def assemble(self, episode: TokenEpisode, t: int, writer: SampleWriter) -> Sample:
        """The sample at step t."""
        ...


@dataclass(frozen=True)
class ActionSamples:
    """Words and frames t - M + 1 … t (fewer at the start) → actions t … t + K - 1.

    Attributes:
        history: M, frames in the prompt.
        actions: K, actions to predict.
    """

    history: int = 2
    actions: int = 5

    def __post_init__(self) -> None:
        _check_positive(self, "history", "actions")

    def count(self, steps: int) -> int:
        """One sample for each step with K actions left."""
        return max(0, steps - self.actions + 1)

    def assemble(self, episode: TokenEpisode, t: int, writer: SampleWriter) -> Sample:
        """See `SampleKind.assemble`."""
        return sequence.action_sample(
            writer.words(writer.settings.action_prompt.replace("{instruction}", episode.instruction)),
            _history(episode, t, self.history),
            writer.actions(episode.actions[t : t + self.actions]),
            writer.vocabulary,
            labels=writer.settings.labels,
        )


@dataclass(frozen=True)
class WorldSamples:
    """Frames t - h + 1 … t (fewer at the start), each with its action → frames t + 1 … t + N, one a round.

    Attributes:
        history: h, frames and actions in the first prompt.
        rounds: N, frames to predict, each given all before it.
    """

    history: int = 1
    rounds: int = 1

    def __post_init__(self) -> None:
        _check_positive(self, "history", "rounds")

    def count(self, steps: int) -> int:
        """One sample for each step with N frames after it."""
        return max(0, steps - self.rounds)

    def assemble(self, episode: TokenEpisode, t: int, writer: SampleWriter) -> Sample:
        """See `SampleKind.assemble`."""
        images = _history(episode, t, self.history)
        return sequence.world_sample(
            writer.words(writer.settings.world_prompt),
            images,
            writer.actions(episode.actions[t + 1 - len(images) : t + self.rounds]),
            list(episode.codes[t + 1 : t + 1 + self.rounds]),
            writer.vocabulary,
            labels=writer.settings.labels,
        )


@dataclass(frozen=True)
class VideoSamples:
    """Words and frames t - M + 1 … t (fewer at the start) → frames t + 1 … t + K, without actions.

    Attributes:
        history: M, frames in the prompt.
        frames: K, frames to predict.
    """

    history: int = 1
    frames: int = 1

    def __post_init__(self) -> None:
        _check_positive(self, "history", "frames")

    def count(self, steps: int) -> int:
        """One sample for each step with K frames after it."""
        return max(0, steps - self.frames)

    def assemble(self, episode: TokenEpisode, t: int, writer: SampleWriter) -> Sample:
        """See `SampleKind.assemble`."""
        return sequence.video_sample(
            writer.words(writer.settings.video_prompt.replace("{instruction}", episode.instruction)),
            _history(episode, t, self.history),
            list(episode.codes[t + 1 : t + 1 + self.frames]),
            writer.vocabulary,
            labels=writer.settings.labels,
        )


class TokenSamples(Sequence[Sample]):
    """All samples of one kind in a data set, each assembled when it is asked for.

    A map-style data set for PyTorch: it has a length, takes an index, and can be sent to worker processes.

    Args:
        data: the episodes.
        kind: `ActionSamples`, `WorldSamples`, `VideoSamples`, or anything with their two methods.
        text: words ↔ ids.
        actions: actions ↔ ids; by default the bounds that are stored with the data.
        settings: prompts and label rule: `Prompts`, or the settings of a model's processor.

    Attributes:
        too_short: how many episodes have too few steps for any sample of this kind.

    Example:
        >>> from worldvla_libero.embedded import default_model_path, sample_data_path
        >>> data = TokenDataset.from_pretrained(sample_data_path())
        >>> text = TextTokenizer.from_pretrained(default_model_path())
        >>> ids, labels = TokenSamples(data, ActionSamples(history=2, actions=5), text)[0]
        >>> len(ids) == len(labels), ids[-1] == text.vocabulary.eot
        (True, True)
    """

    def __init__(
        self,
        data: TokenDataset,
        kind: SampleKind,
        text: TextTokenizer,
        *,
        actions: ActionTokenizer | None = None,
        settings: Prompts = Prompts(),
    ) -> None:
        self.data, self.kind = data, kind
        self.writer = SampleWriter(text, actions or data.actions, settings)
        counts = np.array([kind.count(int(steps)) for steps in data.lengths], dtype=np.int64)
        self.too_short = int((counts == 0).sum())
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: Any) -> Any:
        """The sample of an index; samples of one episode are neighbours, in order of time."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        episode, t = self.locate(index)
        return self.kind.assemble(self.data[episode], t, self.writer)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def longest(self) -> Iterator[Sample]:
        """For each instruction a sample that none with this instruction is longer than.

        The last one of its longest episode is: there, all history is, if it is anywhere.
        """
        episodes: dict[str, tuple[int, int]] = {}  # instruction → steps and number of its longest episode
        for number, episode in enumerate(self.data):
            episodes[episode.instruction] = max(
                (len(episode), number), episodes.get(episode.instruction, (0, number))
            )
        for steps, number in episodes.values():
            if last := self.kind.count(steps):
                yield self.kind.assemble(self.data[number], last - 1, self.writer)

    def locate(self, index: int) -> tuple[int, int]:
        """Episode and step of a sample.

        Raises:
            IndexError: there is no such sample.
        """
        position = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= position < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        episode = int(np.searchsorted(self._ends, position, side="right"))
        return episode, position - (int(self._ends[episode - 1]) if episode else 0)


def samples_of(episode: TokenEpisode, kind: SampleKind, writer: SampleWriter) -> Iterator[Sample]:
    """All samples of one episode in order of time, for data that is streamed."""
    return (kind.assemble(episode, t, writer) for t in range(kind.count(len(episode))))


def _history(episode: TokenEpisode, t: int, length: int) -> list[NDArray[np.uint16]]:
    return list(episode.codes[max(0, t - length + 1) : t + 1])


def _check_positive(kind: Any, *names: str) -> None:
    for name in names:
        if getattr(kind, name) < 1:
            raise ValueError(f"{name} of {type(kind).__name__} is {getattr(kind, name)}; allowed: 1 and above")


__all__ = [
    "ActionSamples",
    "SampleKind",
    "SampleWriter",
    "TokenSamples",
    "VideoSamples",
    "WorldSamples",
    "samples_of",
]
