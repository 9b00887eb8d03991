"""Words, pixels and robot actions to and from one shared vocabulary.

Importing this package needs NumPy only. What needs more is loaded when it is first touched: `TextTokenizer`
with the `text` extra, `VQGAN` and `ImageTokenizer` with the `image` extra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from worldvla_tokenizers import sequence
from worldvla_tokenizers.action import ActionError, ActionTokenizer, BoundsWarning
from worldvla_tokenizers.files import PretrainedFilesError
from worldvla_tokenizers.sequence import SequenceError
from worldvla_tokenizers.vocabulary import Vocabulary, VocabularyError

if TYPE_CHECKING:
    from worldvla_tokenizers.image import ImageError, ImageTokenizer
    from worldvla_tokenizers.text import TextTokenizer
    from worldvla_tokenizers.vqgan import VQGAN, CheckpointError, PixelError, VQGANConfig, VQGANError

__all__ = [
    "VQGAN",
    "ActionError",
    "ActionTokenizer",
    "BoundsWarning",
    "CheckpointError",
    "ImageError",
    "ImageTokenizer",
    "PixelError",
    "PretrainedFilesError",
    "SequenceError",
    "TextTokenizer",
    "VQGANConfig",
    "VQGANError",
    "Vocabulary",
    "VocabularyError",
    "sequence",
]

_LAZY = {
    "TextTokenizer": ("text", "text"),
    "VQGAN": ("vqgan", "image"),
    "VQGANConfig": ("vqgan", "image"),
    "CheckpointError": ("vqgan", "image"),
    "VQGANError": ("vqgan", "image"),
    "PixelError": ("vqgan", "image"),
    "ImageTokenizer": ("image", "image"),
    "ImageError": ("image", "image"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, extra = _LAZY[name]
    try:
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} needs {error.name!r}: pip install 'worldvla-tokenizers[{extra}]'", name=error.name
        ) from error


def __dir__() -> list[str]:
    return sorted(__all__)
