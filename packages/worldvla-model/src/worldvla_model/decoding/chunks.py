"""Chunks of actions, all actions at once.

Under a mask that keeps action blocks apart, such as `action_isolated`, the K actions of a chunk depend on the
prompt and on themselves alone, and the places of all their tokens are known. So all K advance by one dimension in
each pass:

    pass 1      prompt, begin × K          → dimension 1 of all actions
    pass 2 … 7  dimension 1 … 6 × K        → dimension 2 … 7
    pass 8      dimension 7, end × K       → is it the end, and does another action follow?

A constrained chunk of a set length needs seven passes, and one that the model itself ends eight, for any K. The
exact mode decodes over the whole vocabulary and returns id for id what token-by-token decoding does: as far as the
model keeps to the grammar the passes above have computed just that, and where it leaves it the rest is decoded one
token after the other. Where nobody has said how many actions to expect, `SPECULATED` of them are decoded at once;
a model that goes on after these is asked again, prompt and all, for as many more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from worldvla_model.decoding.grammar import ChunkGrammar
from worldvla_model.decoding.places import PlacedSequences, check_prompts
from worldvla_model.decoding.sampling import GREEDY, DecodingError, Sampling, check_slots
from worldvla_model.decoding.sequential import Decoder, continue_from, fill_chunk, is_balanced
from worldvla_model.decoding.workspace import Workspace
from worldvla_model.masks import Strategy
from worldvla_model.modeling_worldvla import WorldVLAForConditionalGeneration

SPECULATED = 16
"""Actions decoded at once where the model itself ends its chunk; the paper's longest chunks have ten.

Not ten: compiled passes, which take 1, 2, 4, 8 … tokens, cost the same for sixteen."""


def decode_chunks(
    model: WorldVLAForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    grammar: ChunkGrammar,
    *,
    num_actions: int | None = None,
    max_actions: int = 64,
    sampling: Sampling = GREEDY,
    attention: str | Strategy | None = None,
    workspace: Workspace | None = None,
) -> list[list[int]]:
    """Chunks that always parse, one for each prompt.

    Args:
        model: the model, in evaluation mode.
        prompts: of action queries; their lengths may differ.
        grammar: of the chunks.
        num_actions: K; None to let the model choose after each action between another one and the end of its turn.
        max_actions: give up where the model has not ended its turn after so many actions.
        sampling: how ids are chosen.
        attention: mask strategy; default that of the model's configuration.
        workspace: what earlier queries left.

    Returns:
        K blocks and the end of the turn for each prompt: the ids that decoding one token after the other gives.

    Raises:
        DecodingError: `num_actions` or `max_actions` below 1, no end after `max_actions`, no prompt or an empty
            one, an id outside the model's vocabulary, or the workspace of another model.
        MaskError: an unknown mask strategy, or a prompt whose blocks do not nest.
        SequenceLengthError: a chunk does not fit into the model's positions.
    """
    check_prompts(model, prompts)
    check_slots([*grammar.slots, [grammar.end_of_turn]], model.config.vocab_size)
    for name, count in {"num_actions": num_actions, "max_actions": max_actions}.items():
        if count is not None and count < 1:
            raise DecodingError(f"{name} is {count}; allowed: 1 and above{', or None' * (name == 'num_actions')}")
    begin, end, end_of_turn = grammar.begin, grammar.end, grammar.end_of_turn
    answers: list[list[int]] = [[] for _ in prompts]
    rows, done = list(range(len(prompts))), 0
    while rows:
        going = [[*prompts[row], *answers[row]] for row in rows]
        few = min(SPECULATED, max_actions - done)
        wanted = num_actions or max(1, min(few, _room(model, going, grammar, workspace)))
        blocks = _Blocks(model, going, grammar, wanted, attention, workspace)
        independent = blocks.independent
        if not all(independent):
            for row, alone in zip(rows, independent, strict=True):
                if not alone:
                    decoder = Decoder(
                        model, prompts[row], attention=attention, sampling=sampling, workspace=workspace
                    )
                    answers[row] = fill_chunk(decoder, grammar, num_actions=num_actions, max_actions=max_actions)
            rows = [row for row, alone in zip(rows, independent, strict=True) if alone]
            continue
        _, values = blocks.values(sampling, constrained=True)
        if num_actions is not None:
            for row, chunk in zip(rows, values.tolist(), strict=True):
                answers[row] = [i for block in chunk for i in (begin, *block, end)] + [end_of_turn]
            return answers
        done += wanted
        _, after_ends = blocks.endings(values)
        following = blocks.choose(after_ends, sampling, (begin, end_of_turn))
        for row, chunk, chosen in zip(list(rows), values.tolist(), following.tolist(), strict=True):
            for block, after in zip(chunk, chosen, strict=True):
                answers[row] += [begin, *block, end]
                if after == end_of_turn:
                    answers[row].append(after)
                    rows.remove(row)
                    break
            else:
                if done >= max_actions:
                    raise DecodingError(
                        f"the model did not end its turn after {max_actions} actions (max_actions); "
                        "pass num_actions"
                    )
    return answers


def continue_chunks(
    model: WorldVLAForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    grammar: ChunkGrammar,
    *,
    speculated: int = SPECULATED,
    sampling: Sampling = GREEDY,
    attention: str | Strategy | None = None,
    workspace: Workspace | None = None,
) -> list[list[int]]:
    """Answers of the unconstrained model, id for id as decoding one token after the other gives them.

    Args:
        model: the model, in evaluation mode.
        prompts: of action queries; their lengths may differ.
        grammar: what answers are expected to look like.
        speculated: actions decoded at once; what the model does not confirm is thrown away.
        sampling: how ids are chosen. Drawn answers are distributed as those of one token after the other.
        attention: mask strategy; default that of the model's configuration.
        workspace: what earlier queries left.

    Returns:
        The ids up to the end of the turn, which may be no chunk at all.

    Raises:
        DecodingError: `speculated` below 1, no prompt or an empty one, an id outside the model's vocabulary, or
            the workspace of another model.
        MaskError: an unknown mask strategy, or a prompt whose blocks do not nest.
        SequenceLengthError: a prompt fills all of the model's positions.
        UnfinishedAnswerError: the model's positions were used up before the turn ended, or the model has begun
            blocks inside blocks. It has the ids said so far.
    """
    check_prompts(model, prompts)
    check_slots([*grammar.slots, [grammar.end_of_turn]], model.config.vocab_size)
    if speculated < 1:
        raise DecodingError(f"speculated is {speculated}; allowed: 1 and above")
    answers: list[list[int]] = [[] for _ in prompts]
    rows, begun = [row for row, prompt in enumerate(prompts) if is_balanced(prompt, model.config)], False
    left = [row for row in range(len(prompts)) if row not in rows]  # for one token after the other
    while rows:
        going = [[*prompts[row], *answers[row]] for row in rows]
        wanted = min(speculated, _room(model, going, grammar, workspace))
        if wanted < 1:
            left += rows
            break
        blocks = _Blocks(model, going, grammar, wanted, attention, workspace)
        independent = blocks.independent
        if not all(independent):
            left += [row for row, alone in zip(rows, independent, strict=True) if not alone]
            rows = [row for row, alone in zip(rows, independent, strict=True) if alone]
            continue
        still_open: list[int] = []
        for row, said in zip(rows, blocks.say(sampling, begun=begun), strict=True):
            kept, state = grammar.confirm(said)
            answers[row] += kept
            if state != "ended":
                (still_open if state == "open" else left).append(row)
        rows, begun = still_open, True
    for row in left:
        answers[row] = continue_from(
            model,
            prompts[row],
            answers[row],
            grammar.end_of_turn,
            sampling=sampling,
            attention=attention,
            workspace=workspace,
        )
    return answers


def _room(
    model: WorldVLAForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    grammar: ChunkGrammar,
    workspace: Workspace | None,
) -> int:
    """Actions that fit behind the longest prompt; into the slots of compiled passes, if one does."""
    limits = [workspace.slots] if workspace is not None and workspace.slots is not None else []
    fitting = [
        (places - max(map(len, prompts)) - 1) // len(grammar.slots)
        for places in [*limits, model.config.max_position_embeddings]
    ]
    return fitting[0] if fitting[0] > 0 else fitting[-1]


class _Blocks(PlacedSequences):
    """Prompts, each followed by K action blocks and the end of the turn."""

    def __init__(
        self,
        model: WorldVLAForConditionalGeneration,
        prompts: Sequence[Sequence[int]],
        grammar: ChunkGrammar,
        actions: int,
        attention: str | Strategy | None,
        workspace: Workspace | None,
    ) -> None:
        layout = [*grammar.layout(actions), grammar.end_of_turn]
        super().__init__(model, prompts, layout, attention=attention, workspace=workspace)
        self.grammar, self.actions, self.size = grammar, actions, len(grammar.slots)
        self.begins = self.ends + self.size * torch.arange(actions, device=self.device)[None]  # (B, K)

    @property
    def independent(self) -> list[bool]:
        """Of each row, whether no block sees another one: it may depend on the prompt."""
        places = self.ends + torch.arange(self.actions * self.size, device=self.device)  # (B, n)
        rows = self.allowed.gather(1, places[..., None].expand(-1, -1, self.allowed.shape[-1]))
        seen = rows.gather(2, places[:, None].expand(-1, places.shape[1], -1))  # (B, n, n)
        blocks = seen.view(len(self), self.actions, self.size, self.actions, self.size)
        between = blocks.any(dim=4).any(dim=2)  # (B, K, K)
        return (~between.tril(-1).flatten(1).any(dim=1)).tolist()

    def values(self, sampling: Sampling, *, constrained: bool) -> tuple[Tensor | None, Tensor]:
        """What the unconstrained model says after each prompt (B,), and all values of all actions (B, K, D)."""
        begin = torch.full_like(self.begins, self.grammar.begin)
        tokens, places, last = self.prompt()
        width = tokens.shape[1]
        after_begins = torch.arange(width, width + self.actions, device=self.device).expand_as(self.begins)
        states = self.feed(
            torch.cat([tokens, begin], dim=1),
            torch.cat([places, self.begins], dim=1),
            after_begins if constrained else torch.cat([last, after_begins], dim=1),
            upto=max(self.lengths) + self.size * (self.actions - 1) + 1,
        )
        first = None
        if not constrained:
            first, states = self.choose(states[:, 0], sampling), states[:, 1:]
        values: list[Tensor] = []
        for place, slot in enumerate(self.grammar.slots[1:-1], start=1):
            if values:
                states = self.feed(values[-1], self.begins + place - 1)
            values.append(self.choose(states, sampling, slot if constrained else None))
        return first, torch.stack(values, dim=-1)

    def endings(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """States after the last values and after the ends; (B, K, H) each."""
        ends = torch.full_like(self.begins, self.grammar.end)
        place = self.begins + self.size - 1
        states = self.feed(torch.cat([values[..., -1], ends], dim=1), torch.cat([place - 1, place], dim=1))
        after_values, after_ends = states.split(self.actions, dim=1)
        return after_values, after_ends

    def say(self, sampling: Sampling, *, begun: bool) -> list[list[int]]:
        """What the unconstrained model says at each place, as long as all before it is a chunk.

        Args:
            sampling: how ids are chosen.
            begun: whether the first block has been chosen already.

        Returns:
            For each prompt begin, values, end, begin or end of turn, values …
        """
        first, values = self.values(sampling, constrained=False)
        ends, following = (self.choose(states, sampling) for states in self.endings(values))
        said = torch.cat([values, ends[..., None], following[..., None]], dim=-1).flatten(1).tolist()
        begins = [self.grammar.begin] * len(self) if begun or first is None else first.tolist()
        return [[begin, *rest] for begin, rest in zip(begins, said, strict=True)]
