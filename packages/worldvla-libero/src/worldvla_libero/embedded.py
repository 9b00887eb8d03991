"""What comes with this package: the default model, and a few demonstrations as token shards."""

from __future__ import annotations

from pathlib import Path


def default_model_path() -> Path:
    """The folder of the model that comes with this package: weights, tokenizers and model card."""
    return Path(__file__).parent / "default_model"


def sample_data_path() -> Path:
    """A few demonstrations as token shards, made with the image tokenizer of the default model."""
    return Path(__file__).parent / "sample_data"
