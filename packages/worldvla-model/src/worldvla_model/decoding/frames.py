"""Frames from a draft: most of the next frame is known before it is decoded.

The camera stands still and so does most of what it sees: the codes of the frame before, place by place, are
a draft of those to come. A window of the draft is fed in one pass, which says for each of its tokens what
the model would have chosen there. Up to the first that differs the draft is what decoding one token after
the other gives; there the model's own choice stands, and the rest is drafted again. What the model said after
a wrong guess is no more than another guess, but one that has seen the prompt's action: it is tried where the
draft does badly. Tokens that the grammar leaves no choice for are written without asking, or in the exact mode
guessed and asked for in the same pass.

Slots may describe several frames and what stands between them, such as the next action: a whole rollout then
shares one cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import torch

from worldvla_model.cost import HARDWARE, TYPICAL_CPU, free_tokens
from worldvla_model.decoding.places import EMPTY, PlacedSequences, check_prompts
from worldvla_model.decoding.sampling import GREEDY, Sampling, check_slots
from worldvla_model.decoding.sequential import continue_from, is_balanced
from worldvla_model.decoding.workspace import Workspace
from worldvla_model.masks import Strategy
from worldvla_model.modeling_worldvla import WorldVLAForConditionalGeneration

Draft: TypeAlias = Callable[[Sequence[int], Sequence[int]], Sequence[int]]
"""(ids of the prompt, ids decided after it) → guesses at the ids that follow, as many as it likes."""

WIDEST = 64
"""Drafted tokens in one pass at most."""

_MEMORY = 0.95  # how much of what was seen of the draft stays after one more token of it
_PROBE = 12  # a draft that does not pay is tried in every so many passes, with one token
_DOUBTED = 0.7  # below this agreement the model's own guesses are tried instead …
_SEEN = 6  # … once as many tokens of the draft are remembered …
_LOST = -0.25  # … and until they have been wrong more often than the draft
_WON = 0.5  # above that agreement they are tried where they have been right so much more often


def decode_frames(
    model: WorldVLAForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    slots: Sequence[Sequence[int]],
    *,
    draft: Draft | None = None,
    sampling: Sampling = GREEDY,
    attention: str | Strategy | None = None,
    workspace: Workspace | None = None,
) -> list[list[int]]:
    """Decode what a grammar describes, one answer for each prompt.

    Args:
        model: the model, in evaluation mode.
        prompts: of world queries; their lengths may differ.
        slots: for each position the ids that may stand there, as a range or a list.
        draft: guesses; wrong ones cost time and change nothing. None for none.
        sampling: how ids are chosen. Drawn answers are distributed as those of one token after the other.
        attention: mask strategy; default that of the model's configuration.
        workspace: what earlier queries left.

    Returns:
        An id for each slot: those that decoding one token after the other gives.

    Raises:
        DecodingError: no prompt or an empty one, a slot that allows nothing, an id outside the model's vocabulary,
            or the workspace of another model.
        MaskError: an unknown mask strategy, or a prompt whose blocks do not nest.
        SequenceLengthError: the slots do not fit into the model's positions.
    """
    check_prompts(model, prompts)
    check_slots(slots, model.config.vocab_size)
    rows = _decode(model, prompts, slots, None, draft, sampling, attention, workspace)
    return [row.decided for row in rows]


def continue_frames(
    model: WorldVLAForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    slots: Sequence[Sequence[int]],
    end_of_turn: int,
    *,
    draft: Draft | None = None,
    sampling: Sampling = GREEDY,
    attention: str | Strategy | None = None,
    workspace: Workspace | None = None,
) -> list[list[int]]:
    """Answers of the unconstrained model, id for id as decoding one token after the other gives them.

    Args:
        model: the model, in evaluation mode.
        prompts: of world queries; their lengths may differ.
        slots: what answers are expected to look like, the end of the turn included.
        end_of_turn: id that ends the answer.
        draft: guesses; wrong ones cost time and change nothing. None for none.
        sampling: how ids are chosen. Drawn answers are distributed as those of one token after the other.
        attention: mask strategy; default that of the model's configuration.
        workspace: what earlier queries left.

    Returns:
        The ids up to the end of the turn, which may be no frame at all.

    Raises:
        DecodingError: as `decode_frames`.
        MaskError: an unknown mask strategy, or a prompt whose blocks do not nest.
        SequenceLengthError: a prompt fills all of the model's positions.
        UnfinishedAnswerError: the model's positions were used up before the turn ended, or the model has begun
            blocks inside blocks. It has the ids said so far.
    """
    check_prompts(model, prompts)
    check_slots([*slots, [end_of_turn]], model.config.vocab_size)
    answers: list[list[int]] = [[] for _ in prompts]
    fit = [row for row, prompt in enumerate(prompts) if is_balanced(prompt, model.config)]
    # What does not fit is not expected: the model may end its turn before.
    room = model.config.max_position_embeddings - max((len(prompts[row]) for row in fit), default=0)
    if fit and room > 0:
        asked = [prompts[row] for row in fit]
        found = _decode(model, asked, slots[:room], end_of_turn, draft, sampling, attention, workspace)
        for row, one in zip(fit, found, strict=True):
            answers[row] = one.decided
    for row, decided in enumerate(answers):
        if not decided or decided[-1] != end_of_turn:  # it has left the grammar
            answers[row] = continue_from(
                model,
                prompts[row],
                decided,
                end_of_turn,
                sampling=sampling,
                attention=attention,
                workspace=workspace,
            )
    return answers


def repeat(codes: Sequence[int], *, period: int | None = None) -> Draft:
    """The draft that says: everything stays as it is.

    Args:
        codes: ids expected at the places of the answer, block tokens included.
        period: of a rollout: ids from one frame to the next. Later frames are drafted from those before them.
    """

    def draft(prompt: Sequence[int], decided: Sequence[int]) -> Sequence[int]:
        done = len(decided)
        if period is None or done < period:
            return codes[done:]
        return decided[done - period : done - period + len(codes)]

    return draft


def _decode(
    model: WorldVLAForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    slots: Sequence[Sequence[int]],
    end_of_turn: int | None,
    draft: Draft | None,
    sampling: Sampling,
    attention: str | Strategy | None,
    workspace: Workspace | None,
) -> list[_Row]:
    layout = [slot[0] for slot in slots]
    ahead = _ahead(slots, exact=end_of_turn is not None)
    placed = PlacedSequences(model, prompts, layout, ahead=ahead, attention=attention, workspace=workspace)
    hardware = TYPICAL_CPU if placed.device.type == "cpu" else HARDWARE["H100"]
    free = free_tokens(model.config, hardware, bytes_per_value=model.dtype.itemsize) / len(prompts)
    rows = [
        _Row(prompt, known, slots, end_of_turn, draft, free)
        for prompt, known in zip(prompts, placed.known, strict=True)
    ]
    while not all(row.finished for row in rows):
        plans = [row.plan() for row in rows]
        width = max(len(plan.tokens) for plan in plans)
        asked = max(plan.guesses + 1 for plan in plans)
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        places = torch.full((len(rows), width), EMPTY)
        wanted = torch.zeros(len(rows), asked, dtype=torch.long)
        for i, plan in enumerate(plans):
            count = len(plan.tokens)
            tokens[i, :count] = torch.tensor(plan.tokens)
            places[i, :count] = torch.arange(plan.start, plan.start + count)
            first = max(0, count - plan.guesses - 1)
            wanted[i] = torch.arange(first, first + asked).clamp(max=max(0, count - 1))
        upto = max(plan.start + len(plan.tokens) for plan in plans)
        device = placed.device
        states = placed.feed(tokens.to(device), places.to(device), wanted.to(device), upto=upto)
        # Positions that allow the same ids are chosen for at once.
        choices: dict[Sequence[int] | None, list[tuple[int, int]]] = defaultdict(list)
        for i, (row, plan) in enumerate(zip(rows, plans, strict=True)):
            for column in range(plan.guesses + 1):
                if not row.finished and row.is_asked(len(row.decided) + column):
                    choices[row.choice(len(row.decided) + column)].append((i, column))
        chosen: dict[tuple[int, int], int] = {}
        for among, cells in choices.items():
            at = torch.tensor(cells, device=device)
            found = placed.choose(states[at[:, 0], at[:, 1]], sampling, among)
            chosen |= zip(cells, found.tolist(), strict=True)
        for i, (row, plan) in enumerate(zip(rows, plans, strict=True)):
            if not row.finished:
                row.settle(plan, {column: token for (r, column), token in chosen.items() if r == i})
    return rows


def _ahead(slots: Sequence[Sequence[int]], *, exact: bool) -> list[int]:
    """How much of the answer is known when the prompt, and when each of its ids, enters one after the other."""
    if exact:
        return list(range(len(slots) + 1))
    # What the grammar leaves no choice for is known beforehand.
    known = [len(slots)] * (len(slots) + 1)
    choices = [place for place, slot in enumerate(slots) if len(slot) > 1]
    for first, place in zip([0, *(place + 1 for place in choices)], choices, strict=False):
        known[first : place + 1] = [place] * (place + 1 - first)
    if choices:  # nothing is asked after the last choice
        known[choices[-1] + 1 :] = [choices[-1]] * (len(slots) - choices[-1])
    return known


class _Plan(NamedTuple):
    """Tokens to feed, the place of the first, and how many of the last are guesses."""

    tokens: list[int]
    start: int
    guesses: int


class _Row:
    """One answer: what is decided, what of it has been fed, and how well the draft has done."""

    def __init__(
        self,
        prompt: Sequence[int],
        known: int,
        slots: Sequence[Sequence[int]],
        end_of_turn: int | None,
        draft: Draft | None,
        free: float,
    ) -> None:
        self.prompt, self.draft, self.end_of_turn = list(prompt), draft, end_of_turn
        self.slots = [slot if isinstance(slot, range) else tuple(slot) for slot in slots]
        self.exact = end_of_turn is not None
        self.decided: list[int] = []
        self.finished = not slots
        self._fed = known  # tokens in the cache, from the beginning of the prompt
        self._free = free  # tokens that take as long as all else of a pass
        self._right, self._drafted, self._passes = 0.8, 1.0, 0
        self._said: dict[int, int] = {}  # what the model chose after a wrong guess, by place
        self._rivals: dict[int, tuple[int, int]] = {}  # that and what the draft says, where they differ
        self._lead = 0.0  # times that the model was right there, less those that the draft was
        self._write_forced()

    def plan(self) -> _Plan:
        """The next tokens to feed: what is decided and not yet fed, and a window of guesses."""
        if self.finished:
            return _Plan([], 0, 0)
        guesses = self._guess()
        return _Plan([*self.prompt, *self.decided][self._fed :] + guesses, self._fed, len(guesses))

    def is_asked(self, position: int) -> bool:
        """Whether the model has a say in what stands there."""
        return position < len(self.slots) and (self.exact or len(self.slots[position]) > 1)

    def choice(self, position: int) -> Sequence[int] | None:
        """Ids that the model may choose from; None for all."""
        return None if self.exact else self.slots[position]

    def settle(self, plan: _Plan, chosen: dict[int, int]) -> None:
        """Take over what holds.

        Args:
            plan: what was fed.
            chosen: what the model chose after the last decided token (0) and after each guess (1 …).
        """
        position, count = len(self.decided), len(plan.tokens)
        drafted = agreed = held = 0
        for i in range(min(plan.guesses + 1, len(self.slots) - position)):
            slot = self.slots[position + i]
            token = chosen.get(i, slot[0])
            self.decided.append(token)
            last = len(self.decided) == len(self.slots) or token == self.end_of_turn
            self.finished = last or token not in slot
            if i == plan.guesses:
                break
            guess = plan.tokens[count - plan.guesses + i]
            drafted += len(slot) > 1
            if token != guess or self.finished:
                break
            agreed += len(slot) > 1
            held += 1
        self._compare(position)
        # The first place after a wrong guess is left out: the model took the guess for right.
        done = len(self.decided)
        self._said = {position + i: token for i, token in chosen.items() if position + i > done}
        fading = _MEMORY**drafted
        self._right, self._drafted = fading * self._right + agreed, fading * self._drafted + drafted
        self._passes += 1
        self._fed += count - plan.guesses + held
        self._write_forced()

    def _compare(self, start: int) -> None:
        """See which of two guesses was right, from a place on."""
        for place in range(start, len(self.decided)):
            if place in self._rivals:
                said, drafted = self._rivals[place]
                won = (self.decided[place] == said) - (self.decided[place] == drafted)
                self._lead = _MEMORY * self._lead + won

    def _write_forced(self) -> None:
        while not self.exact and not self.finished and len(self.slots[len(self.decided)]) == 1:
            self.decided.append(self.slots[len(self.decided)][0])
            self.finished = len(self.decided) == len(self.slots)

    def _guess(self) -> list[int]:
        """Ids at the next positions, as far as they are likely enough to hold."""
        done = len(self.decided)
        draft = self._drafts()
        wanted = self._window()
        found: list[int] = []
        free = 0
        for place, slot in enumerate(self.slots[done:]):
            if len(slot) > 1:
                free += 1
                if free > wanted or place >= len(draft) or draft[place] not in slot:
                    break
            found.append(draft[place] if len(slot) > 1 else slot[0])
        return found

    def _drafts(self) -> list[int]:
        """The draft of what comes next; where it does badly, what the model said in its place."""
        done = len(self.decided)
        draft = [] if self.draft is None else list(self.draft(self.prompt, self.decided))
        self._rivals = {
            place: (said, draft[place - done])
            for place, said in self._said.items()
            if done <= place < done + len(draft) and said in self.slots[place] and said != draft[place - done]
        }
        doubted = self._drafted > _SEEN and self._right / self._drafted < _DOUBTED
        if self._lead > (_LOST if doubted else _WON):
            for place, (said, _) in self._rivals.items():
                draft[place - done] = said
        return draft

    def _window(self) -> int:
        """Drafted tokens worth a try: so many that the time of a pass decides the most."""
        agreement = self._right / self._drafted
        decided = list(accumulate(agreement**ahead for ahead in range(WIDEST + 1)))  # on average, by width
        best = max(range(WIDEST + 1), key=lambda width: decided[width] / (self._free + width))
        return best or int(self._passes % _PROBE == 0)
