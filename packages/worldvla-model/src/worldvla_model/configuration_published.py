"""Configurations of the paper's authors ↔ ours.

A published folder names itself `chameleon`, with an architecture of its own (`ChameleonXLLMX…`) that plain
transformers loads wrongly or not at all: its query and key norms have one row for all heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worldvla_model.checkpoint_files import CheckpointError

PUBLISHED_ARCHITECTURE = "ChameleonXLLMXForConditionalGeneration_ck"
# With the name that the code base they built on gives to the checkpoints they start from.
_PUBLISHED_ARCHITECTURES = (PUBLISHED_ARCHITECTURE, PUBLISHED_ARCHITECTURE.removesuffix("_ck"))
# RynnVLA-002 adds these to the configuration: its actions come from a head of their own, under other bounds.
_RYNNVLA_FIELDS = ("action_dim", "time_horizon", "action_head_type")

# Fields that both configurations have, under one name and with one meaning.
_SHARED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "attention_bias", "mlp_bias", "attention_dropout", "dropout", "tie_word_embeddings", "use_cache",
    "z_loss_weight", "bos_token_id", "pad_token_id",
)  # fmt: skip


class PublishedFormatError(ValueError):
    """A folder that is not in the published layout, or cannot be written in it."""


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
