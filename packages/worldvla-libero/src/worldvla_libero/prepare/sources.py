"""Demonstrations and image tokenizers, opened by their names."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from worldvla_libero.data.episodes import (
    Source,
)
from worldvla_libero.data.hub import data_path
from worldvla_libero.hdf5 import HDF5Source
from worldvla_libero.lerobot import LeRobotSource, is_lerobot

if TYPE_CHECKING:
    from worldvla_tokenizers import ImageTokenizer

# Third-person views that WorldVLA is trained on, as LIBERO's, LeRobot's and openpi's data sets call them.
USUAL_CAMERAS = ("agentview", "observation.images.image", "image")


class PrepareError(ValueError):
    """Demonstrations that no data set can be made of, or settings that do not fit them."""


def open_source(
    path: str | os.PathLike[str],
    *,
    replay: bool | None = None,
    download: Callable[..., str] | None = None,
    **lerobot: Any,
) -> Source:
    """Demonstrations in a folder (or file), of whatever kind they are.

    Args:
        path: a LeRobotDataset v3, or a folder or file of LIBERO-like HDF5; or, if it is a string and there is
            none, the Hub repository of one.
        replay: whether HDF5 files have to be replayed; None to tell by the files.
        download: what fetches a Hub repository, see `data_path`.
        lerobot: options of `LeRobotSource`.

    Raises:
        FileNotFoundError: there are no demonstrations, or the Hub's cannot be fetched.
        PrepareError: `replay` for a data set that the simulator cannot replay.
    """
    path = data_path(path, download=download)
    if is_lerobot(path):
        if replay:
            raise PrepareError(f"{path} is a LeRobotDataset, which holds no simulator states to replay from")
        return LeRobotSource(path, **lerobot)
    if lerobot:
        raise PrepareError(f"{path} is no LeRobotDataset; options {', '.join(lerobot)} are for those")
    return HDF5Source(path, replay)


def choose_camera(source: Source, wanted: str | None = None) -> str:
    """The camera whose frames are meant, of a source that holds frames.

    Args:
        source: demonstrations.
        wanted: its name; None for the only or usual one (LIBERO: agentview).

    Raises:
        PrepareError: there is no such camera, or none is clear.
    """
    known = ", ".join(source.cameras) or "none"
    if wanted is None:
        if not source.cameras:
            seen = "".join(f"; {note}" for note in source.notes if "no image" in note)
            raise PrepareError(f"{source.name} holds no camera frames and cannot be replayed{seen}")
        if len(source.cameras) > 1 and source.cameras[0] not in USUAL_CAMERAS:
            raise PrepareError(f"{source.name} has several cameras: {known}; choose one")
        return source.cameras[0]
    if wanted not in source.cameras:
        raise PrepareError(f"{source.name} has no camera {wanted!r}; existing: {known}")
    return wanted


def load_image_tokenizer(
    source: str | os.PathLike[str], device: str = "cpu", *, image_size: int | None = None
) -> ImageTokenizer:
    """Load an image tokenizer whose codes a WorldVLA model can read.

    Args:
        source: folder or Hub repository of the tokenizer, or of a model with one inside; also
            `hf://organisation/name@revision/sub/folder`.
        device: where to compute.
        image_size: pixels that frames are brought to; None for what is saved with it.

    Raises:
        ImageError: its codes have no ids in the vocabulary.
        PretrainedFilesError: there is none.
    """
    from worldvla_tokenizers import ImageTokenizer, Vocabulary

    tokenizer = ImageTokenizer.from_pretrained(source, device=device, image_size=image_size)
    tokenizer.check_vocabulary(Vocabulary.published())
    return tokenizer
