"""The WorldVLA model: Chameleon's decoder under attention masks that depend on the blocks of the sequence.

    ids (B, T) -> embedding -> n x (norm, attention, norm, gated MLP) -> norm -> head -> logits (B, T, V)

The layers are transformers' own, with two differences of the published model: the query and key norms may be
shared over heads, and what each sublayer adds to the residual stream passes through dropout.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import BitsAndBytesConfig, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.chameleon.modeling_chameleon import (
    ChameleonAttention,
    ChameleonLayerNorm,
    ChameleonMLP,
    ChameleonRMSNorm,
    ChameleonRotaryEmbedding,
    eager_attention_forward,
    rotate_half,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from worldvla_model import masks
from worldvla_model.checkpoint_files import CheckpointError, check_tensors, damaged_weights, replaced_checkpoint
from worldvla_model.configuration_worldvla import WorldVLAConfig
from worldvla_model.loss import SupervisedLosses, chunked_losses, combine, means, supervised_losses

RowBlock: TypeAlias = tuple[slice, int]
"""Rows of a mask, and how many of the first keys they may see."""

BLOCK_ROWS = 256
"""Rows in a block: with fewer PyTorch's kernel for CPUs is slower."""

NEVER_WRITTEN = 2
"""`</s>`, which the generation settings of published checkpoints wait for in vain."""


class SequenceLengthError(ValueError):
    """More positions than the model has."""


@dataclass
class WorldVLAOutput(CausalLMOutputWithPast):
    """What `WorldVLAForConditionalGeneration` returns.

    Attributes:
        losses: per supervised token, where `labels` were given.
    """

    losses: SupervisedLosses | None = None


class WorldVLAAttention(ChameleonAttention):
    """Chameleon's attention, with query and key norms in either layout."""

    def __init__(self, config: WorldVLAConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.qk_norm == "shared":
            self.q_norm = ChameleonLayerNorm((1, self.head_dim))
            self.k_norm = ChameleonLayerNorm((1, self.head_dim))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | BlockMask | None = None,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Cache | None = None,
        kept: Tensor | None = None,
        row_blocks: Sequence[RowBlock] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; all tokens leave keys and values, those `kept` ask.

        Args:
            hidden_states: (B, T, H).
            attention_mask: of the tokens that ask.
            position_embeddings: cosine and sine, (B, T, D) each.
            past_key_values: keys and values of earlier tokens.
            kept: (B, m) columns of the tokens that ask; None for all.
            row_blocks: of `attention_mask`; None for one.
            kwargs: of transformers' attention functions.

        Returns:
            (B, m, H), and weights where the attention function gives them.
        """
        asking, turns = hidden_states, position_embeddings
        if kept is not None:
            asking = _columns(hidden_states, kept)
            turns = (_columns(turns[0], kept), _columns(turns[1], kept))
        query = _turned(self.q_norm(self._heads(self.q_proj(asking))), *turns)
        key = _turned(self.k_norm(self._heads(self.k_proj(hidden_states))), *position_embeddings)
        value = self._heads(self.v_proj(hidden_states)).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attend = partial(
            attend, dropout=self.attention_dropout if self.training else 0.0, scaling=self.scaling, **kwargs
        )
        if row_blocks is None or not isinstance(attention_mask, Tensor):
            attended, weights = attend(self, query, key, value, attention_mask)
        else:
            parts = []
            for rows, seen in row_blocks:
                inputs = query[:, :, rows], key[:, :, :seen], value[:, :, :seen]
                parts.append(attend(self, *inputs, attention_mask[:, :, rows, :seen])[0])
            attended, weights = torch.cat(parts, dim=1), None
        return self.o_proj(attended.flatten(2).contiguous()), weights

    def _heads(self, states: Tensor) -> Tensor:
        """(B, T, heads · D) → (B, T, heads, D)."""
        return states.unflatten(-1, (-1, self.head_dim))


class WorldVLADecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and gated MLP, each added to the residual stream through dropout."""

    def __init__(self, config: WorldVLAConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = WorldVLAAttention(config, layer_idx)
        self.mlp = ChameleonMLP(config)
        self.input_layernorm = ChameleonRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = ChameleonRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, *, kept: Tensor | None = None, **attention_inputs: Any) -> Tensor:
        """(B, T, H) → (B, T, H), or of the columns `kept` (B, m) alone → (B, m, H)."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), kept=kept, **attention_inputs)
        if kept is not None:
            hidden_states = _columns(hidden_states, kept)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class WorldVLAPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the family, and strict loading."""

    config_class = WorldVLAConfig
    base_model_prefix = "model"
    input_modalities = ("text",)  # images arrive as ids
    supports_gradient_checkpointing = True
    _no_split_modules = ("WorldVLADecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_flex_attn = True
    # FlashAttention knows no masks but the causal one.
    _supports_flash_attn = False
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": WorldVLADecoderLayer, "attentions": WorldVLAAttention}  # noqa: RUF012

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a checkpoint, ours or a published one, from a folder or the Hub; arguments as in transformers.

        Unlike transformers' this refuses a checkpoint that does not fit exactly, and reads only safetensors
        unless `use_safetensors=False` is passed. Two older names are understood: `torch_dtype` for `dtype`, and
        `load_in_4bit` or `load_in_8bit` for a `quantization_config` of bitsandbytes.

        Raises:
            CheckpointError: a file of weights is damaged or none of safetensors; the checkpoint is another
                model's; or tensors are missing, unexpected or of another shape, and all are listed.
            ValueError: an argument is given under both names, with different values.
        """
        kwargs.setdefault("use_safetensors", True)
        _use_new_names(kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        # Mismatches are collected rather than raised one by one, so that one error can list everything.
        kwargs["ignore_mismatched_sizes"] = True
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:  # it says what is wrong, but not with which file
            reason = damaged_weights(Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or ""))
            reason = reason or f"{pretrained_model_name_or_path}: weights that cannot be read ({error})"
            raise CheckpointError(reason) from error
        # A bare decoder may be read from a checkpoint with a head.
        unexpected = [k for k in info["unexpected_keys"] if k != "lm_head.weight" or hasattr(model, "lm_head")]
        check_tensors(
            f"{pretrained_model_name_or_path} does not fit {cls.__name__}",
            missing=info["missing_keys"],
            unexpected=unexpected,
            shapes={name: (tuple(found), tuple(needed)) for name, found, needed in info["mismatched_keys"]},
        )
        generation = getattr(model, "generation_config", None)
        if generation is not None and generation.eos_token_id == NEVER_WRITTEN:
            generation.eos_token_id = model.config.eos_token_id
        return (model, info) if wants_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write a checkpoint: all of it, or on failure nothing; arguments as in transformers.

        Unlike transformers' this leaves no weights of an older checkpoint in the folder: shards, an index, a
        pickle or adapters would be read instead of the new ones. Other variants stay. (What is written with
        `distributed_checkpoint=True`, by several processes at once, is transformers' own business.)

        Raises:
            NotADirectoryError: `save_directory` is a file.
        """
        options = {"is_main_process": is_main_process, "state_dict": state_dict, "push_to_hub": push_to_hub}
        if kwargs.get("distributed_checkpoint"):
            super().save_pretrained(save_directory, **options, **kwargs)
            return
        if push_to_hub:  # a repository is named after the folder
            kwargs.setdefault("repo_id", Path(save_directory).absolute().name)
        with replaced_checkpoint(save_directory) as stage:
            super().save_pretrained(stage, **options, **kwargs)


class WorldVLAModel(WorldVLAPreTrainedModel):
    """The decoder: ids to hidden states."""

    def __init__(self, config: WorldVLAConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(WorldVLADecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = ChameleonRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = ChameleonRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | BlockMask | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        attention: str | masks.Strategy | None = None,
        context_ids: Tensor | None = None,
        is_world: Tensor | None = None,
        states_to_keep: Tensor | None = None,
        row_blocks: Sequence[RowBlock] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: (B, Q) ids of the new tokens.
            attention_mask: (B, T) padding mask, 1 = a token, over cached and new tokens; or a mask made by the
                caller, taken as it is: (B, 1, Q, T) bool or additive, or a `BlockMask`.
            position_ids: (B, Q) positions; by default counted from the cache, padding left out.
            past_key_values: keys and values of the T - Q tokens before.
            inputs_embeds: (B, Q, H) instead of `input_ids`; a mask that depends on blocks needs `context_ids`.
            use_cache: return `past_key_values`.
            attention: mask strategy of this call, by name or as a function; default `config.attention`.
            context_ids: (B, T) ids of cached and new tokens. Needed where the mask depends on blocks among
                the cached ones; `generate` passes it by itself.
            is_world: (B,) bool, True for world and video samples, which are causal whatever the strategy.
            states_to_keep: (B, m) columns of the new tokens whose states are wanted, None for all. Of the others
                the last layer computes keys and values only, where `attention_mask` is no `BlockMask` nor missing.
            row_blocks: of an `attention_mask` that is a tensor, from `cut_rows`: saves time on a CPU.
            kwargs: `output_hidden_states`, `output_attentions` and other arguments of transformers' attention.

        Returns:
            `last_hidden_state` (B, Q, H), or (B, m, H) for `states_to_keep`, and, if asked, `past_key_values`,
            `hidden_states`, `attentions`.

        Raises:
            SequenceLengthError: more positions than `config.max_position_embeddings`.
            ValueError: neither or both of `input_ids` and `inputs_embeds`; `context_ids` are missing.
            MaskError: unknown strategy, or blocks that do not nest.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # (B, Q, H)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        queries = inputs_embeds.shape[1]
        padding = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None
        past = 0
        if context_ids is not None:
            past = context_ids.shape[1] - queries
        elif position_ids is None or attention_mask is None or padding is not None:
            past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
            if past == 0:
                context_ids = input_ids
        # With positions of their own, tokens need not stand where they come in the cache.
        if position_ids is None and past + queries > self.config.max_position_embeddings:
            raise SequenceLengthError(
                f"sequence of {past + queries} tokens; the model has "
                f"{self.config.max_position_embeddings} positions (max_position_embeddings)"
            )
        if position_ids is None:
            position_ids = _count_positions(padding, past, queries, inputs_embeds.device)
        if attention_mask is None or padding is not None:
            attention_mask = self._mask(
                attention or self.config.attention,
                context_ids,
                padding,
                past,
                inputs_embeds,
                past_key_values,
                is_world,
            )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        hidden_states = inputs_embeds
        kept = None
        for layer in self.layers:
            if layer is self.layers[-1] and states_to_keep is not None and isinstance(attention_mask, Tensor):
                kept, attention_mask = states_to_keep, _rows(attention_mask, states_to_keep)
                row_blocks = None
            hidden_states = layer(
                hidden_states,
                kept=kept,
                row_blocks=row_blocks,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        if states_to_keep is not None and kept is None:
            hidden_states = _columns(hidden_states, states_to_keep)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )

    def _mask(
        self,
        strategy: str | masks.Strategy,
        context_ids: Tensor | None,
        padding: Tensor | None,
        past: int,
        inputs_embeds: Tensor,
        cache: Cache | None,
        is_world: Tensor | None,
        known: int | None = None,
    ) -> Tensor | BlockMask | None:
        """The mask of the new tokens over all keys, in the form that the attention implementation takes.

        Of `inputs_embeds` only shape, device and type matter. Ids after the first `known` are guesses.
        """
        batch, queries = inputs_embeds.shape[:2]
        total = past + queries if cache is None else cache.get_mask_sizes(queries, 0)[0]
        implementation = self.config._attn_implementation
        if masks.resolve(strategy) is masks.causal:
            if padding is None and total == queries and implementation == "sdpa":
                return None  # sdpa has a kernel for it
            if context_ids is None:  # the ids do not matter
                context_ids = torch.zeros(batch, past + queries, dtype=torch.long, device=inputs_embeds.device)
        if context_ids is None:
            raise ValueError(
                f"attention {strategy!r} depends on the ids of all tokens: pass context_ids, (batch, "
                f"{past + queries}), the ids of {past} cached and {queries} new tokens; attention='causal' "
                "needs none"
            )
        options: dict[str, Any] = {
            "first_query": past,
            "keys": None if padding is None else padding.bool(),
            "plain": is_world,
        }
        if known is not None:
            allowed = masks.attend_in_turn(strategy, context_ids, self.config, known=known, **options)
        elif implementation == "flex_attention":
            rule = masks.mask_function(strategy, masks.positions(context_ids, self.config), **options)
            return create_block_mask(
                _within(rule, past + queries), batch, None, queries, total, device=inputs_embeds.device
            )
        else:
            allowed = masks.attend(strategy, masks.positions(context_ids, self.config), **options)  # (B, Q, T)
        # A static cache has slots that nothing was written to yet.
        allowed = nn.functional.pad(allowed, (0, total - allowed.shape[-1]))[:, None]  # (B, 1, Q, total)
        if implementation == "flex_attention":
            return create_block_mask(
                lambda batch, head, query, key: allowed[batch, 0, query, key],
                *(batch, None, queries, total),
                device=allowed.device,
            )
        return as_attention_mask(allowed, implementation, inputs_embeds.dtype)


class WorldVLAForConditionalGeneration(WorldVLAPreTrainedModel, GenerationMixin):
    """The decoder with its head: ids to logits, loss and generated ids."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: WorldVLAConfig) -> None:
        super().__init__(config)
        self.model = WorldVLAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | BlockMask | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        is_world: Tensor | None = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> WorldVLAOutput:
        """Run the model; arguments beyond these are those of `WorldVLAModel.forward`.

        Args:
            input_ids: (B, Q) ids of the new tokens.
            attention_mask: as in `WorldVLAModel.forward`.
            position_ids: as in `WorldVLAModel.forward`.
            past_key_values: as in `WorldVLAModel.forward`.
            inputs_embeds: as in `WorldVLAModel.forward`.
            labels: (B, Q) ids, -100 where nothing is supervised. The loss follows `config.loss`, `config.alpha`
                and `config.z_loss_weight`.
            use_cache: return `past_key_values`.
            logits_to_keep: compute logits of this many last positions only (0: of all), or of these positions.
            is_world: (B,) bool, True for world and video samples: they are causal whatever the strategy, and the
                paper's loss takes a mean of its own over them.
            skip_logits: compute the loss from supervised positions alone, a chunk at a time, and return no
                `logits`: the same loss and gradients for a fraction of the memory. By default while training.
            kwargs: `attention`, `context_ids`, `output_hidden_states`, …

        Returns:
            `logits` (B, Q, V) in fp32 and, if asked, `loss`, `losses`, `past_key_values`, `hidden_states`,
            `attentions`.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            is_world=is_world,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        logits, loss, losses = None, None, None
        if labels is not None and (self.training if skip_logits is None else skip_logits):
            losses = chunked_losses(hidden, self.lm_head.weight, labels)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = as_logits(self.lm_head(hidden[:, kept]))
            if labels is not None:
                losses = supervised_losses(logits, labels)
        if losses is not None:
            config = self.config
            parts = means(losses, config.loss, is_world=is_world, alpha=config.alpha)
            loss = combine(parts, alpha=config.alpha, z_loss_weight=config.z_loss_weight)
        return WorldVLAOutput(
            loss=loss,
            losses=losses,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers does, but go on to the end of the turn where no length is given.

        Its own default, 20 tokens, would cut every chunk and every frame.

        Raises:
            ValueError: `prefill_chunk_size` is given.
        """
        given = (generation_config, self.generation_config)

        def options(name: str) -> list[Any]:
            return [kwargs.get(name), *(getattr(config, name, None) for config in given)]

        size = next((size for size in options("prefill_chunk_size") if size is not None), None)
        if size is not None:  # transformers shows each part only its own ids
            raise ValueError(
                f"prefill_chunk_size is {size}; allowed: None, since masks depend on all ids of the prompt"
            )
        if all(limit is None for limit in [*options("max_length"), *options("max_new_tokens")]):
            kwargs["max_length"] = self.config.max_position_embeddings
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if ids is not None:  # what comes after may be guessed
            kwargs["prompt_length"] = ids.shape[1]
        return super().generate(inputs, generation_config, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        prompt_length: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one step of `generate`: the new ids, and all ids so far for the mask, or the mask itself."""
        # The padding mask is kept from transformers, which would turn it into a causal 4-D mask here.
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=None, inputs_embeds=inputs_embeds, **kwargs
        )
        # A prompt of embeddings has no ids, unless they are given as well.
        if inputs_embeds is not None and input_ids.shape[1] < inputs_embeds.shape[1]:
            return {**inputs, "attention_mask": attention_mask, "context_ids": None}
        cache, embeddings = inputs.get("past_key_values"), inputs.get("inputs_embeds")
        batch, queries = (inputs["input_ids"] if embeddings is None else embeddings).shape[:2]
        # Steps over a static cache may be compiled: ids that become more and more must not enter them. And what
        # assisted decoding guesses must not be seen by what comes before it.
        guessed = prompt_length is not None and queries > 1 and input_ids.shape[1] > prompt_length
        if not guessed and not (isinstance(cache, Cache) and cache.is_compileable):
            return {**inputs, "attention_mask": attention_mask, "context_ids": input_ids}
        mask = self.model._mask(
            inputs.get("attention") or self.config.attention,
            input_ids,
            attention_mask,
            input_ids.shape[1] - queries,
            torch.empty(batch, queries, 0, dtype=self.dtype, device=input_ids.device),
            cache,
            inputs.get("is_world"),
            prompt_length if guessed else None,
        )
        return {**inputs, "attention_mask": mask, "context_ids": None}


def _use_new_names(options: dict[str, Any]) -> None:
    """Replace arguments of `from_pretrained` under names that transformers has given up, or takes no more.

    Raises:
        ValueError: both names are given, with different values.
    """
    if "torch_dtype" in options:
        options["dtype"] = one_dtype(options.get("dtype"), options.pop("torch_dtype"))
    bits = {name: options.pop(name) for name in ("load_in_4bit", "load_in_8bit") if name in options}
    if any(bits.values()):
        if options.get("quantization_config") is not None:
            raise ValueError(
                f"{' and '.join(name for name in bits if bits[name])} and quantization_config are given; one of "
                "them needed"
            )
        options["quantization_config"] = BitsAndBytesConfig(**bits)


def one_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | str:
    """What `dtype` and its older name say together; None and `auto` say nothing.

    Raises:
        ValueError: they differ.
    """
    wanted = [_as_dtype(value) for value in (dtype, torch_dtype) if value is not None and value != "auto"]
    if len(wanted) == 2 and wanted[0] != wanted[1]:
        raise ValueError(
            f"dtype is {dtype} and torch_dtype, its older name, is {torch_dtype}; one of them, or the same, needed"
        )
    return wanted[0] if wanted else "auto"


def _as_dtype(value: torch.dtype | str) -> torch.dtype | str:
    """`float32` and `torch.float32` as the type; what names none is left for transformers to refuse."""
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    return found if isinstance(found, torch.dtype) else value


def as_logits(scores: Tensor) -> Tensor:
    """What the head gives, in fp32 at least: as the published code computes logits whatever the weights are."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def as_attention_mask(allowed: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """A mask (B, 1, Q, T), True = may attend, as an attention takes it: bool for sdpa on a GPU, else additive."""
    # On a CPU sdpa itself would make it additive, anew in every layer.
    if implementation == "sdpa" and allowed.device.type != "cpu":
        return allowed
    additive = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return additive.masked_fill_(~allowed, torch.finfo(dtype).min)


def cut_rows(allowed: Tensor) -> list[RowBlock] | None:
    """Cut a mask (B, Q, T) into rows, each with the number of first keys beyond which none of them sees any.

    A CPU's attention computes what a mask hides, too. None where there are too few rows to gain by it.
    """
    if allowed.device.type != "cpu" or allowed.shape[1] <= BLOCK_ROWS:
        return None
    cuts = [slice(start, start + BLOCK_ROWS) for start in range(0, allowed.shape[1], BLOCK_ROWS)]
    return [(rows, int(allowed[:, rows].any(dim=1).any(dim=0).nonzero().max()) + 1) for rows in cuts]


def _turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys by their positions: (B, T, heads, D) → (B, heads, T, D); cos and sin are (B, T, D)."""
    states = states.transpose(1, 2)
    return states * cos[:, None] + rotate_half(states) * sin[:, None]


def _columns(states: Tensor, kept: Tensor) -> Tensor:
    """(B or 1, T, D) states, of the columns (B, m) → (B, m, D)."""
    return states.expand(len(kept), -1, -1).gather(1, kept[..., None].expand(-1, -1, states.shape[-1]))


def _rows(mask: Tensor, kept: Tensor) -> Tensor:
    """The rows (B, m) of a mask (B or 1, 1, Q, T) → (B, 1, m, T)."""
    return mask.expand(len(kept), -1, -1, -1).gather(2, kept[:, None, :, None].expand(-1, -1, -1, mask.shape[-1]))


def _count_positions(padding: Tensor | None, past: int, queries: int, device: torch.device) -> Tensor:
    if padding is None:
        return torch.arange(past, past + queries, device=device)[None]  # (1, Q)
    return (padding.long().cumsum(dim=1) - 1).clamp(min=0)[:, -queries:]  # (B, Q)


def _within(rule: masks.MaskFunction, length: int) -> Callable[..., Tensor]:
    """The rule for keys below `length`; False for the empty slots of a static cache beyond it."""

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < length) & rule(batch, head, query, key.clamp(max=length - 1))

    return mask_mod


__all__ = [
    "CheckpointError",
    "SequenceLengthError",
    "WorldVLAForConditionalGeneration",
    "WorldVLAModel",
    "WorldVLAOutput",
    "WorldVLAPreTrainedModel",
]
