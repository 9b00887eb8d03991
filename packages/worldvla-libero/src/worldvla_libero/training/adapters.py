"""Adapters (LoRA, Hu et al. 2021): beside each linear layer of the decoder a product of two narrow matrices.

    lora_config(rank=16, alpha=32) -> with_adapters(model, …) -> train -> save_adapter, merged

Only they are trained. Embedding, head and norms stay as they are: a checkpoint that acts has rows for all ids, and
beside adapters embedding and head are large (docs/fine-tune.md counts). The files are peft's own.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from worldvla_model import WorldVLAForConditionalGeneration
from worldvla_model.checkpoint_files import replaced_checkpoint

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All linear layers of attention and MLP."""


def lora_config(*, rank: int, alpha: float) -> Any:
    """What peft needs to know of the adapters: a `peft.LoraConfig`.

    Args:
        rank: width of the two matrices.
        alpha: what they add is multiplied by alpha / rank.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("adapters need peft; remedy: pip install 'worldvla-libero[lora]'") from error
    # Dropout is the model's own: it is part of what each sublayer adds already.
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(LAYERS), lora_dropout=0.0)


def with_adapters(model: WorldVLAForConditionalGeneration, config: Any) -> Any:
    """A `peft.PeftModel` around the model: adapters in fp32 that add nothing yet, all else frozen.

    Args:
        model: whose layers get them, in place.
        config: see `lora_config`.
    """
    from peft import get_peft_model

    return get_peft_model(model, config, autocast_adapter_dtype=True)


def save_adapter(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write the adapters alone in peft's layout: `adapter_config.json`, `adapter_model.safetensors`, its card.

    Args:
        model: see `with_adapters`.
        folder: made if need be; an adapter in it is replaced.
    """
    with replaced_checkpoint(folder) as stage:
        # None of the embeddings: peft would look on the Hub whether they have grown.
        model.save_pretrained(str(stage), save_embedding_layers=False)


def merged(model: Any, dtype: torch.dtype) -> WorldVLAForConditionalGeneration:
    """The model inside with its adapters added to its weights, which are rounded once. Takes the model apart.

    Args:
        model: see `with_adapters`.
        dtype: of the weights.
    """
    # In place, for a second copy may not fit: fp32 products are added to bf16 weights in fp32.
    whole = model.float() if dtype == torch.float32 else model
    return whole.merge_and_unload().to(dtype)


__all__ = ["LAYERS", "lora_config", "merged", "save_adapter", "with_adapters"]
