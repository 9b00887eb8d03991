"""Checkpoints of the paper's authors ↔ ours, both ways and strictly.

A published folder names itself `chameleon`, with an architecture of its own (`ChameleonXLLMX…`) that plain
transformers loads wrongly or not at all: its query and key norms have one row for all heads. Names and shapes
of its tensors are ours already, so converting weights is copying them, one shard at a time; what is translated
is the configuration.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

PUBLISHED_ARCHITECTURE = "ChameleonXLLMXForConditionalGeneration_ck"
# With the name that the code base they built on gives to the checkpoints they start from.
_PUBLISHED_ARCHITECTURES = (PUBLISHED_ARCHITECTURE, PUBLISHED_ARCHITECTURE.removesuffix("_ck"))
# RynnVLA-002 adds these to the configuration: its actions come from a head of their own, under other bounds.
_RYNNVLA_FIELDS = ("action_dim", "time_horizon", "action_head_type")
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# Fields that both configurations have, under one name and with one meaning.
_SHARED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "attention_bias", "mlp_bias", "attention_dropout", "dropout", "tie_word_embeddings", "use_cache",
    "z_loss_weight", "bos_token_id", "pad_token_id",
)  # fmt: skip


class PublishedFormatError(ValueError):
    """A folder that is not in the published layout, or cannot be written in it."""


class CheckpointError(ValueError):
    """A checkpoint that is not the model's: of another family, or with tensors that are not those of the model."""


def check_tensors(
    complaint: str,
    *,
    missing: Iterable[str],
    unexpected: Iterable[str],
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Raise one error that lists everything wrong with the tensors of a checkpoint, if anything is.

    Args:
        complaint: how the message begins.
        missing: names that the model needs.
        unexpected: names that it does not have.
        shapes: for each name of another shape the one found and the one needed.

    Raises:
        CheckpointError: any of the three is not empty.
    """
    wrong = {
        "missing": sorted(missing),
        "unexpected": sorted(unexpected),
        "of another shape": [
            f"{name} {found}, {needed} needed" for name, (found, needed) in sorted(shapes.items())
        ],
    }
    if any(wrong.values()):
        listed = "; ".join(f"{len(names)} {how}: {', '.join(names)}" for how, names in wrong.items() if names)
        raise CheckpointError(f"{complaint}: {listed}")


def is_published(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is one of the paper's authors, of the code base they built on, or derived from it.

    `config_from_published` refuses those of other models among them.
    """
    return config.get("model_type") == "chameleon" and any(
        name.startswith("ChameleonXLLMX") for name in _architectures(config)
    )


def check_family(config: Mapping[str, Any], origin: str) -> None:
    """Refuse a `config.json` of another model, whose weights could otherwise load as if they were ours.

    Args:
        config: its content.
        origin: what the message calls it.

    Raises:
        CheckpointError: it is neither ours nor a published one.
    """
    architectures = _architectures(config)
    if is_published(config):
        foreign = [name for name in architectures if name not in _PUBLISHED_ARCHITECTURES]
        extra = [f"{field} {config[field]!r}" for field in _RYNNVLA_FIELDS if field in config]
        if foreign or extra:
            raise CheckpointError(
                f"{origin} is of another model, such as RynnVLA-002, which has an action_head and other bounds: "
                f"architectures {architectures}{', with ' if extra else ''}{', '.join(extra)}. Read as WorldVLA "
                f"are {' and '.join(_PUBLISHED_ARCHITECTURES)} without these; load it with the code it came with"
            )
    elif config.get("model_type") != "worldvla":
        raise CheckpointError(
            f"{origin} is of another family: model_type {config.get('model_type')!r}, architectures "
            f"{architectures}. Read as WorldVLA are model_type 'worldvla', and 'chameleon' with "
            f"{' or '.join(_PUBLISHED_ARCHITECTURES)}; transformers' Auto classes know others"
        )


def _architectures(config: Mapping[str, Any]) -> list[str]:
    """Names of the classes that a `config.json` is for, as text whatever stands there."""
    found = config.get("architectures") or []
    return [str(name) for name in (found if isinstance(found, list) else [found])]


def config_from_published(config: Mapping[str, Any]) -> dict[str, Any]:
    """A published configuration as fields of `WorldVLAConfig`.

    Raises:
        PublishedFormatError: a setting that our model does not have.
        CheckpointError: it is another model's.
    """
    check_family(config, str(config.get("_name_or_path") or "the checkpoint"))
    for field, allowed in (("swin_norm", False), ("mask_image_logits", False), ("model_parallel_size", 1)):
        if config.get(field, allowed) != allowed:
            raise PublishedFormatError(f"published config has {field} = {config[field]!r}; allowed: {allowed!r}")
    ours = {field: config[field] for field in _SHARED_FIELDS if field in config}
    ours["model_type"] = "worldvla"
    ours["architectures"] = ["WorldVLAForConditionalGeneration"]
    ours["qk_norm"] = "shared"
    ours["rope_parameters"] = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10_000.0)}
    if config.get("rope_scaling") is not None:
        raise PublishedFormatError(
            f"published config has rope_scaling = {config['rope_scaling']!r}; allowed: None"
        )
    ours["dtype"] = config.get("torch_dtype", config.get("dtype"))
    # `_name_or_path` and the like belong to transformers, which sets them itself.
    return ours


def config_to_published(config: Mapping[str, Any], vocabulary_map: Mapping[str, int]) -> dict[str, Any]:
    """Fields of `WorldVLAConfig` as a published configuration.

    Args:
        config: content of our `config.json`.
        vocabulary_map: every token of the text tokenizer and its id.

    Raises:
        PublishedFormatError: a setting that the published model does not have.
    """
    rope = config.get("rope_parameters") or {}
    for field, value, allowed in (
        ("qk_norm", config.get("qk_norm", "shared"), "shared"),
        ("rope_type", rope.get("rope_type", "default"), "default"),
        ("attention", config.get("attention", "action_isolated"), "action_isolated"),
    ):
        if value != allowed:
            raise PublishedFormatError(f"{field} is {value!r}; the published model has {allowed!r}")
    renamed = {("<image>" if name == "<reserved08707>" else name): i for name, i in vocabulary_map.items()}
    return {
        "architectures": [PUBLISHED_ARCHITECTURE],
        "model_type": "chameleon",
        **{field: config[field] for field in _SHARED_FIELDS if field in config},
        "eos_token_id": 2,  # what the published file says, although no `</s>` is ever written
        "mask_image_logits": False,
        "model_parallel_size": 1,
        "rope_scaling": None,
        "rope_theta": rope.get("rope_theta", 10_000.0),
        "swin_norm": False,
        "torch_dtype": config.get("dtype", config.get("torch_dtype")),
        "vocabulary_map": renamed,
        "vq_config": {"model_type": "chameleon_vqgan"},
    }


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
    import torch

    # Here and not above: the model reads published configurations by means of this module.
    from worldvla_model.modeling_worldvla import WorldVLAConfig, WorldVLAForConditionalGeneration

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
