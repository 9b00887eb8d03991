"""Keys and values in slots, and what of a query may stay for the next one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from worldvla_model.decoding.sampling import DecodingError
from worldvla_model.masks import Strategy
from worldvla_model.modeling_worldvla import WorldVLAForConditionalGeneration

RECOMPILATIONS = 128
"""Shapes that compiled passes may take: numbers of prompts, times numbers of new tokens; powers of two both."""

_PrefixKey: TypeAlias = tuple[str | Strategy, torch.dtype | None, tuple[int, ...]]


class SlotCache:
    """Keys and values of B sequences in one allocation, each token's in the slot of its place.

    Stands where transformers' attention layers take their cache. The last slot takes what is not needed.

    Args:
        layers: (B, 2, L + 1, heads, D) for each layer, on its device: keys and values.
        device: of the tokens.

    Attributes:
        slots: L, places of a sequence.
        places: (b, n) slots of the tokens of the next pass, over the first b sequences.
        shown: attention sees the slots before this one.
        compiled: passes over it may be compiled: it stays where it is.
    """

    is_compileable = True

    def __init__(self, layers: Sequence[Tensor], device: torch.device) -> None:
        self.layers, self.compiled = list(layers), False
        batch, _, length = layers[0].shape[:3]
        self.slots = self.shown = length - 1
        self.places = torch.zeros(batch, 0, dtype=torch.long, device=device)
        self._rows = torch.arange(batch, device=device)[:, None]

    def __len__(self) -> int:
        return len(self._rows)

    @classmethod
    def empty(cls, model: WorldVLAForConditionalGeneration, batch: int, slots: int) -> SlotCache:
        """Slots for B sequences of L tokens, each layer's where that layer computes."""
        config = model.config
        heads = config.num_key_value_heads or config.num_attention_heads
        shape = (batch, 2, slots + 1, heads, config.hidden_size // config.num_attention_heads)
        # Zeros: whatever a mask hides must at least be finite.
        layers = [torch.zeros(shape, dtype=model.dtype, device=device_of(layer)) for layer in model.model.layers]
        return cls(layers, device_of(model.model.embed_tokens))

    def first(self, batch: int) -> SlotCache:
        """The first sequences of the same allocation, for compiled passes."""
        whole = batch == len(self)
        layers = [layer if whole else layer[:batch] for layer in self.layers]
        part = SlotCache(layers, self.places.device)
        for layer in part.layers:  # CUDA graphs need not copy what stays where it is
            torch._dynamo.mark_static_address(layer)
        part.compiled = True
        return part

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put new keys and values (b, heads, n, D) in their slots; returns those of all slots shown."""
        kept_keys, kept_values = self.layers[layer_idx][: len(keys)].unbind(1)
        rows, places = self._rows[: len(keys)].to(keys.device), self.places.to(keys.device)
        # Under autocast they come in another type than the weights'.
        kept_keys[rows, places] = keys.transpose(1, 2).to(kept_keys.dtype)
        kept_values[rows, places] = values.transpose(1, 2).to(kept_values.dtype)
        return kept_keys[:, : self.shown].transpose(1, 2), kept_values[:, : self.shown].transpose(1, 2)


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: elsewhere than its weights lie, where accelerate has offloaded them."""
    hook = getattr(module, "_hf_hook", None)
    for each in (hook, *getattr(hook, "hooks", ())):
        if getattr(each, "execution_device", None) is not None:
            return torch.device(each.execution_device)
    inner = next((m for m in module.modules() if m is not module and hasattr(m, "_hf_hook")), None)
    return next(module.parameters()).device if inner is None else device_of(inner)


class Workspace:
    """What queries leave for the next ones, as long as the weights of the model stay as they are.

    Always: keys and values of the words that prompts begin with, so that an instruction is read once an episode.
    With `slots`: one cache for the largest batch so far and compiled passes over it, which on a GPU become CUDA
    graphs. The first pass of a query, over its prompt, is not compiled, so that no prompt's length costs a
    compilation; nor is a query that needs more slots than there are.

    Answers do not depend on what was asked before. Not for several threads at once.

    Args:
        model: the model, in evaluation mode.
        slots: tokens of the longest prompt with its answer that is worth compiling for; None to compile nothing.
        prefixes: beginnings of prompts that are kept; the one not used for longest goes first.
        compile_options: of `torch.compile`; default `mode="reduce-overhead"` on CUDA.

    Attributes:
        passes: forward passes so far.
        reused: beginnings of prompts that did not have to be read again.

    Raises:
        DecodingError: `slots` or `prefixes` out of range, or `slots` for a model spread by `device_map`.
    """

    def __init__(
        self,
        model: WorldVLAForConditionalGeneration,
        *,
        slots: int | None = None,
        prefixes: int = 8,
        **compile_options: Any,
    ) -> None:
        positions = model.config.max_position_embeddings
        if slots is not None and not 1 <= slots <= positions:
            raise DecodingError(f"slots is {slots}; allowed: 1 … {positions} (max_position_embeddings), or None")
        if prefixes < 0:
            raise DecodingError(f"prefixes is {prefixes}; allowed: 0 and above")
        if slots is not None and any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise DecodingError(
                f"slots is {slots}, but device_map has spread or offloaded the model; allowed then: None, which "
                "compiles nothing"
            )
        self.model, self.slots, self.size = model, slots, prefixes
        self.passes = self.reused = 0
        self._prefixes: OrderedDict[_PrefixKey, list[Tensor]] = OrderedDict()
        self._whole: SlotCache | None = None
        self._parts: dict[int, SlotCache] = {}
        self._compiled: Any = None
        if slots is not None:
            if model.device.type == "cuda":
                compile_options.setdefault("mode", "reduce-overhead")
            limits = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, RECOMPILATIONS)
            self._compiled = torch.compile(model.model, dynamic=False, fullgraph=True, **compile_options)

    def forget(self) -> None:
        """Drop keys and values; needed when the model's weights have changed."""
        self._prefixes.clear()
        self._whole = None
        self._parts.clear()

    def cache(self, batch: int, slots: int) -> SlotCache:
        """Slots for at least B sequences; those that compiled passes run over, if they suffice."""
        if self.slots is None or slots > self.slots:
            return SlotCache.empty(self.model, batch, slots)
        rows = 1 << (batch - 1).bit_length()  # so that few numbers of prompts are compiled for
        if self._whole is None or len(self._whole) < rows:
            self._parts.clear()
            self._whole = SlotCache.empty(self.model, rows, self.slots)
        if rows not in self._parts:
            self._parts[rows] = self._whole.first(rows)
        return self._parts[rows]

    def run(self, *, compiled: bool, **inputs: Any) -> Tensor:
        """One pass through the decoder, over a cache from `cache`; (B, n, H)."""
        self.passes += 1
        if compiled and self.model.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        return (self._compiled if compiled else self.model.model)(**inputs).last_hidden_state

    def load(self, cache: SlotCache, prompts: Sequence[Sequence[int]], attention: str | Strategy) -> list[int]:
        """Fill in what is known of the words that prompts begin with; returns how many tokens, for each."""
        if self.size == 0:
            return [0] * len(prompts)
        known = []
        for row, prompt in enumerate(prompts):
            key = self._key(prompt, attention)
            kept = self._prefixes.get(key)
            if kept is not None:
                self._prefixes.move_to_end(key)
                self.reused += 1
                for layer, values in zip(cache.layers, kept, strict=True):
                    layer[row, :, : values.shape[1]] = values
            known.append(0 if kept is None else len(key[-1]))
        return known

    def keep(self, cache: SlotCache, prompts: Sequence[Sequence[int]], attention: str | Strategy) -> None:
        """Keep what has become known of the words that prompts begin with."""
        if self.size == 0:
            return
        for row, prompt in enumerate(prompts):
            key = self._key(prompt, attention)
            if key[-1] and key not in self._prefixes:
                self._prefixes[key] = [layer[row, :, : len(key[-1])].clone() for layer in cache.layers]
        while len(self._prefixes) > self.size:
            self._prefixes.popitem(last=False)

    def _key(self, prompt: Sequence[int], attention: str | Strategy) -> _PrefixKey:
        """The words before the first image, where there is one, and what else their keys depend on."""
        boi = self.model.config.boi
        words = next((place for place, token in enumerate(prompt) if token == boi), 0)
        kind = device_of(self.model.model.embed_tokens).type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return attention, autocast, tuple(prompt[:words])
