"""What is done with each episode: read or replayed in a worker, tokenized where the tokenizer is."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from worldvla_libero.data.episodes import (
    Episode,
    EpisodeKey,
    Frames,
    check_episode,
)
from worldvla_libero.data.shards import TokenEpisode, write_episodes
from worldvla_libero.demonstrations.replay import Replayer
from worldvla_libero.prepare.planning import Plan, PrepareSettings
from worldvla_libero.prepare.sources import load_image_tokenizer

if TYPE_CHECKING:
    from worldvla_tokenizers import ImageTokenizer

PART_SUFFIX = ".arrow"

_PREVIEW_FRAMES, _PREVIEW_HEIGHT = 6, 96


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
            replay_settings = replace(settings.replay, cameras=(plan.camera,))
            self.replayer = replayer or Replayer(replay_settings, suite=plan.source.name)

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
