"""Which model a command works with: the options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from worldvla_libero.embedded import default_model_path

if TYPE_CHECKING:
    from worldvla_model import WorldVLA

Flat = tyro.conf.OmitArgPrefixes


class MissingModelError(FileNotFoundError):
    """The model that comes with the package is not there."""


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how to load it.

    Attributes:
        model: Folder or Hub repository; by default the model that comes with the package.
        tokenizers: Folder or Hub repository of the tokenizers, where they are not with the model; also
            hf://organisation/name@revision/sub/folder.
        image_size: Size in pixels at which images are tokenized, where not as saved.
        device: Such as cuda or cpu; by default a GPU if there is one.
        dtype: Such as bfloat16; by default as stored.
        revision: Branch, tag or commit on the Hub.
        subfolder: Folder inside the repository, such as model_256/libero_goal.
    """

    model: str | None = None
    tokenizers: str | None = None
    image_size: int | None = None
    device: str | None = None
    dtype: str = "auto"
    revision: str | None = None
    subfolder: str | None = None


def load_model(options: ModelOptions) -> tuple[WorldVLA, str]:
    """The model, and what to call it.

    Raises:
        MissingModelError: the default model is asked for and not there.
    """
    from transformers.utils import logging

    from worldvla_model import WorldVLA

    logging.disable_progress_bar()  # ours is on screen
    if options.model is None and not (default_model_path() / "config.json").is_file():
        raise MissingModelError(
            f"no default model in {default_model_path()}; remedy: reinstall worldvla-libero, or pass --model"
        )
    folder = default_model_path() if options.model is None else options.model
    agent = WorldVLA.from_pretrained(
        folder,
        tokenizers=options.tokenizers,
        image_size=options.image_size,
        dtype=options.dtype,
        device=options.device,
        revision=options.revision,
        subfolder=options.subfolder,
    )
    return agent, "the default model" if options.model is None else options.model
