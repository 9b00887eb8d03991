"""Checkpoints of the paper's authors ↔ ours, both ways and strictly.

Names and shapes of a published checkpoint's tensors are ours already, so converting weights is copying them, one
shard at a time; what is translated is the configuration, see `configuration_published`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from worldvla_model.checkpoint_files import check_tensors
from worldvla_model.configuration_published import (
    PUBLISHED_ARCHITECTURE,
    PublishedFormatError,
    config_from_published,
    config_to_published,
    is_published,
)
from worldvla_model.configuration_worldvla import WorldVLAConfig
from worldvla_model.modeling_worldvla import WorldVLAForConditionalGeneration

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def to_ours(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Write a published checkpoint in our layout: `config.json`, `generation_config.json` and weights.

    Args:
        source: folder in the published layout.
        target: folder to make; it appears whole or not at all.

    Raises:
        PublishedFormatError: the folder is not in the published layout.
        CheckpointError: it is another model's, or tensors are missing, unexpected or of another shape.
        FileExistsError: the target exists.
    """
    config = _read_json(Path(source) / "config.json")
    if not is_published(config):
        raise PublishedFormatError(
            f"{source}: model_type {config.get('model_type')!r}, architectures {config.get('architectures')!r}; "
            f"'chameleon' and '{PUBLISHED_ARCHITECTURE}' needed"
        )
    ours = config_from_published(config)
    generation = {
        "bos_token_id": ours.get("bos_token_id", 0),
        "eos_token_id": 8_710,
        "pad_token_id": ours.get("pad_token_id", 1),
    }
    _convert(Path(source), Path(target), ours, ours, generation)


def to_published(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Write one of our checkpoints in the published layout.

    Args:
        source: folder in our layout, with the `tokenizer.json` that fills the published `vocabulary_map`.
        target: folder to make; it appears whole or not at all.

    Raises:
        PublishedFormatError: the folder is not in our layout, lacks the tokenizer, or has a setting that the
            published model does not have.
        CheckpointError: tensors are missing, unexpected or of another shape.
        FileExistsError: the target exists.
    """
    source = Path(source)
    config = _read_json(source / "config.json")
    if config.get("model_type") != "worldvla":
        raise PublishedFormatError(f"{source}: model_type is {config.get('model_type')!r}; 'worldvla' needed")
    if not (source / "tokenizer.json").is_file():
        raise PublishedFormatError(f"{source}: no tokenizer.json; the published config lists every token")
    table = _read_json(source / "tokenizer.json")["model"]["vocab"]
    published = config_to_published(config, table)
    generation = {field: published.get(field) for field in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _convert(source, Path(target), config, published, generation)


def _convert(
    source: Path, target: Path, ours: Mapping[str, Any], config: Mapping[str, Any], generation: Mapping[str, Any]
) -> None:
    """Check the weights against our configuration, then copy them shard by shard beside a new `config.json`."""
    if target.exists():
        raise FileExistsError(f"{target} exists; the converted checkpoint needs a folder of its own")
    shards = _shards(source)
    expected, found = _expected_shapes(ours), dict(_found_shapes(source, shards))
    check_tensors(
        f"{source} does not fit its configuration",
        missing=expected.keys() - found.keys(),
        unexpected=found.keys() - expected.keys(),
        shapes={n: (found[n], expected[n]) for n in expected.keys() & found.keys() if found[n] != expected[n]},
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = target.with_name(f".{target.name}.{uuid4().hex}")
    stage.mkdir()
    try:
        for shard in shards:
            with safe_open(source / shard, framework="pt") as tensors:
                content = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
            save_file(content, stage / shard, metadata={"format": "pt"})
            del content  # a 7B checkpoint must never need more than one shard in memory
        if shards != [SINGLE_NAME]:
            shutil.copyfile(source / INDEX_NAME, stage / INDEX_NAME)
        for name, values in (("config.json", config), ("generation_config.json", generation)):
            text = json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True)
            (stage / name).write_text(text + "\n", encoding="utf-8")
        stage.rename(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = WorldVLAForConditionalGeneration(WorldVLAConfig(**config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def _found_shapes(source: Path, shards: list[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for shard in shards:
        try:
            with safe_open(source / shard, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    yield name, tuple(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise PublishedFormatError(f"{source / shard} cannot be read: {error}") from error


def _shards(source: Path) -> list[str]:
    # One file goes before shards, as in transformers: a folder with both must not mean two different models.
    if (source / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    if (source / INDEX_NAME).is_file():
        shards = _read_json(source / INDEX_NAME).get("weight_map")
        if not isinstance(shards, dict) or not all(Path(str(shard)).name == shard for shard in shards.values()):
            raise PublishedFormatError(f"{source / INDEX_NAME}: no weight_map of tensors and files beside it")
        return sorted(set(shards.values()))
    raise PublishedFormatError(f"{source}: neither {INDEX_NAME} nor {SINGLE_NAME}; weights in safetensors needed")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PublishedFormatError(f"{path} is missing") from error
    except ValueError as error:
        raise PublishedFormatError(f"{path} is no JSON file: {error}") from error
    if not isinstance(content, dict):
        raise PublishedFormatError(f"{path} holds {type(content).__name__}; an object needed")
    return content
