"""Sequences whose tokens enter the model out of order, each at its place, when it becomes known."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from worldvla_model import masks
from worldvla_model.decoding.sampling import DecodingError, Sampling, check_ids
from worldvla_model.decoding.workspace import Workspace, device_of
from worldvla_model.modeling_worldvla import (
    SequenceLengthError,
    WorldVLAForConditionalGeneration,
    as_attention_mask,
    as_logits,
    cut_rows,
)

EMPTY = -1


class PlacedSequences:
    """B sequences of a prompt each and one layout of what follows.

    Keys and values of a token lie in the slot of its place, wherever in the order of feeding it comes. The mask
    of every pass is cut out of one that is made once, from the layout: masks depend on where blocks begin and
    end, and on nothing else of what the ids turn out to be. A token must be fed after all that it may see, or
    with it; what was fed in vain is fed again.

    A mask may look ahead: whether an action comes after the last image is not known before the sequence is. One
    token after the other, each enters under the mask of what is known by then, and so it does here.

    Args:
        model: the model, in evaluation mode.
        prompts: B sequences of ids; their lengths may differ.
        layout: ids that stand for what follows the prompts: block tokens as they will be, anything for the rest.
        ahead: for the prompt, and then for each token of the layout, how many tokens of the layout are known when
            one token after the other enters it; default all.
        attention: mask strategy by name or as a function; default that of the model's configuration.
        workspace: what earlier queries left.

    Attributes:
        passes: forward passes so far.
        known: for each prompt, how many tokens at its beginning the workspace knew.

    Raises:
        DecodingError: no prompt, an empty one, an id outside the model's vocabulary, or the workspace of another
            model.
        SequenceLengthError: prompt and layout do not fit into the model's positions.
    """

    def __init__(
        self,
        model: WorldVLAForConditionalGeneration,
        prompts: Sequence[Sequence[int]],
        layout: Sequence[int],
        *,
        ahead: Sequence[int] | None = None,
        attention: str | masks.Strategy | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        check_prompts(model, prompts)
        if workspace is None:
            workspace = Workspace(model, prefixes=0)
        if workspace.model is not model:
            raise DecodingError("the workspace belongs to another model")
        self.model, self.device, self.workspace = model, device_of(model.model.embed_tokens), workspace
        self.lengths = [len(prompt) for prompt in prompts]
        longest = max(self.lengths) + len(layout)
        limit = model.config.max_position_embeddings
        if longest > limit:
            raise SequenceLengthError(
                f"a prompt of {max(self.lengths)} ids and {len(layout)} to come; the model has {limit} positions "
                "(max_position_embeddings)"
            )
        self.passes = 0
        self._prompts, self._attention = prompts, attention or model.config.attention
        self.allowed = self._masks(layout, [len(layout)] * (len(layout) + 1) if ahead is None else ahead)
        self._cache = workspace.cache(len(prompts), longest)
        self.known = workspace.load(self._cache, prompts, self._attention)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def ends(self) -> Tensor:
        """(B, 1) place of what follows each prompt."""
        return torch.tensor(self.lengths, device=self.device)[:, None]

    def _masks(self, layout: Sequence[int], ahead: Sequence[int]) -> Tensor:
        """(B, L, L) masks, each row made of the ids that are known when its token enters."""
        config = self.model.config
        # All that masks look ahead for are images: where none begins or ends in between, they are the same.
        edges = [place for place, token in enumerate(layout) if token in (config.boi, config.eoi)]
        stages = [bisect_left(edges, known) for known in ahead]  # images begun and ended by then
        if masks.resolve(self._attention) is masks.causal:
            stages = [len(edges)] * len(ahead)
        edges.append(len(layout))
        longest = max(self.lengths) + len(layout)
        allowed: Tensor | None = None
        for stage in sorted(set(stages), reverse=True):
            ids = torch.full((len(self), longest), config.pad_token_id or 0)
            for row, prompt in enumerate(self._prompts):
                known = [*prompt, *layout[: edges[stage]]]
                ids[row, : len(known)] = torch.tensor(known)
            seen = masks.attend(self._attention, masks.positions(ids.to(self.device), config))
            if allowed is None:
                allowed = seen
                continue
            entered = torch.zeros(len(self), longest, dtype=torch.bool)
            for row, length in enumerate(self.lengths):
                entered[row, :length] = stages[0] == stage
                entered[row, length : length + len(layout)] = torch.tensor([s == stage for s in stages[1:]])
            allowed = torch.where(entered.to(self.device)[..., None], seen, allowed)
        assert allowed is not None
        return allowed

    def prompt(self) -> tuple[Tensor, Tensor, Tensor]:
        """What of the prompts has to be fed.

        Returns:
            (B, P) ids, (B, P) their places, `EMPTY` beyond the shorter ones, and (B, 1) columns of the last ids.
        """
        rest = [length - known for length, known in zip(self.lengths, self.known, strict=True)]
        tokens = torch.zeros(len(self), max(rest), dtype=torch.long)
        places = torch.full_like(tokens, EMPTY)
        for row, (prompt, known) in enumerate(zip(self._prompts, self.known, strict=True)):
            tokens[row, : rest[row]] = torch.tensor(prompt[known:])
            places[row, : rest[row]] = torch.arange(known, len(prompt))
        last = torch.tensor(rest)[:, None] - 1
        return tokens.to(self.device), places.to(self.device), last.to(self.device)

    @torch.inference_mode()
    def feed(
        self, tokens: Tensor, places: Tensor, wanted: Tensor | None = None, *, upto: int | None = None
    ) -> Tensor:
        """Feed tokens, and get logits where they are wanted.

        Args:
            tokens: (B, n) ids.
            places: (B, n) where they stand, `EMPTY` for none.
            wanted: (B, m) columns of `tokens` after which logits are wanted; None for all.
            upto: no place is this far or further; None for the whole layout.

        Returns:
            (B, m, H) hidden states, for `choose`.
        """
        prefill, new = self.passes == 0, tokens.shape[1]
        total, cache = self.allowed.shape[1], self._cache
        cache.shown = upto or total
        compiled = cache.compiled and not prefill
        rows = (0, 0)
        if compiled:
            # Compiled passes look at all slots, and take 1, 2, 4, 8 … tokens of 1, 2, 4, 8 … prompts, so that
            # there are few shapes.
            cache.shown = cache.slots
            rows = (0, len(cache) - len(self))
            spare = (0, (1 << (new - 1).bit_length()) - new)
            tokens = nn.functional.pad(tokens, (*spare, *rows))
            places = nn.functional.pad(places, (*spare, *rows), value=EMPTY)
        at = places.clamp(min=0)
        cache.places = torch.where(places == EMPTY, cache.slots, places)
        # Where there is no token, the row is that of place 0, so that none is empty.
        allowed = self.allowed.gather(1, at[: len(self), :, None].expand(-1, -1, total))[..., : cache.shown]
        allowed = nn.functional.pad(allowed, (0, cache.shown - allowed.shape[-1]))  # (B, n, shown)
        blocks = cut_rows(allowed) if prefill else None
        allowed = nn.functional.pad(allowed, (0, 0, 0, 0, *rows), value=True)
        states = self.workspace.run(
            compiled=compiled,
            input_ids=tokens,
            attention_mask=as_attention_mask(
                allowed[:, None], self.model.config._attn_implementation, self.model.dtype
            ),
            position_ids=at,
            past_key_values=cache,
            use_cache=True,
            # Compiled passes would have one more shape.
            states_to_keep=None if compiled else wanted,
            row_blocks=blocks,
        )[: len(self)].to(self.device)  # (B, n, H), or (B, m, H)
        self.passes += 1
        if prefill:
            self.workspace.keep(cache, self._prompts, self._attention)
        if wanted is None:
            return states[:, :new]
        if not compiled:
            return states
        return states.gather(1, wanted[..., None].expand(-1, -1, states.shape[-1]))

    @torch.inference_mode()
    def choose(self, states: Tensor, sampling: Sampling, among: Sequence[int] | None = None) -> Tensor:
        """Choose ids.

        Args:
            states: (*, H) from `feed`.
            sampling: how.
            among: ids that may be chosen; logits of no others are computed. None for all.

        Returns:
            (*) ids.

        Raises:
            DecodingError: an allowed id is outside the model's vocabulary.
        """
        head = self.model.lm_head
        # Weights that accelerate's hooks bring and take away can only be used by calling the head.
        whole = type(head) is not nn.Linear or hasattr(head, "_hf_hook") or head.weight.device != states.device
        if among is None:
            return sampling.choose(as_logits(head(states)).to(states.device))
        if isinstance(among, range) and among.step == 1 and not whole:
            check_ids(among, head.out_features)
            logits = nn.functional.linear(states, head.weight[among.start : among.stop])
            return sampling.choose(as_logits(logits)) + among.start
        return sampling.choose_among(as_logits(head(states)).to(states.device), among)


def check_prompts(model: WorldVLAForConditionalGeneration, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts that the model cannot read.

    Raises:
        DecodingError: none, an empty one, or an id outside the model's vocabulary.
    """
    if len(prompts) == 0:
        raise DecodingError("0 prompts; at least 1 needed")
    size = model.config.vocab_size
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise DecodingError(f"prompt {row} has 0 ids; at least 1 needed")
        foreign = next((i for i, token in enumerate(prompt) if not 0 <= token < size), None)
        if foreign is not None:
            raise DecodingError(
                f"prompt id {prompt[foreign]} at position {foreign}; the model's vocabulary is 0 … {size - 1}"
            )
