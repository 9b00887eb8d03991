"""Decoding against the published algorithm: chunks of actions and frames, on the same weights, with the same ids.

    python benchmarks/decoding.py [--quick] [--device cpu|cuda] [--runs 20] [--only PART …]

`published`: one token after the other as the released code does it: key-value cache, logits of the whole
prompt, and the T x T mask made anew in Python for every token. `careful`: one token after the other with one
mask for the whole answer and logits of the last position only. `ours`: what `WorldVLA` does. Beside them two ways
of transformers' `generate` on the same weights: `lookup`, which guesses from the prompt
(`prompt_lookup_num_tokens=10`), and `static`, one token after the other over a static cache with its steps
compiled (`cache_implementation="static"`). The compiler takes its time before the clock starts. A random model, of
about 100 million parameters in fp32 on a CPU, of 7 billion in bf16 on a GPU; vocabulary 65,536, a prompt of 569
tokens: words and two frames of 256 px, or one frame and an action. All are held to the grammar, since random
weights would leave it. They run in turn, `--runs` times; medians are reported, and every run's ids are compared.
"After the first pass" begins with the second one, the mask made for it included: what the prompt costs, the logits
of all of it in the published way, counts on neither side. Prompts of chunks are those of one episode: the words
stay, and `ours` reads them once.

Then several prompts at once; the frames that come with the package under the default model; the image tokenizer
of the paper; how often bf16 chooses another id than fp32, and by how little; and, beside what was measured, the
least time that multiplications and bytes allow at the rates that this device was measured to have. Their ids are
compared too.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import common
import numpy as np
import torch
from transformers import CompileConfig, DynamicCache, LogitsProcessor, LogitsProcessorList

from worldvla_libero import TokenDataset, default_model_path, sample_data_path
from worldvla_model import WorldVLA, WorldVLAConfig, WorldVLAForConditionalGeneration
from worldvla_model.cost import Cost, Hardware, chunk_cost, frame_cost, pass_cost
from worldvla_model.decoding import (
    ChunkGrammar,
    PlacedSequences,
    Workspace,
    decode_chunks,
    decode_frames,
    repeat,
)
from worldvla_model.masks import dense
from worldvla_tokenizers import VQGAN, Vocabulary, VQGANConfig, sequence

Ids = Sequence[int]

V = Vocabulary.published()
GRAMMAR = ChunkGrammar(sequence.action_slots(7, V), V.eot)
FRAME: list[Ids] = [*sequence.image_slots(16, 16, V), [V.eot]]
SIZES: dict[str, dict[str, int]] = {
    "quick": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4},
    "100M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12, "num_attention_heads": 8},
    "7B": {},
}
PROMPT = 569
SLOTS = 1_024
PARTS = ("chunks", "frames", "batches", "real", "images", "precision", "bounds")
NEEDED = {5: (5.0, 3.5), 10: (8.0, 5.0)}  # on a CPU: times faster after the first pass, and in all, by K
NEEDED_OF_DRAFTS = {0.5: (1.8, 1.4), 0.8: (4.0, 2.8), 0.95: (10.0, 4.5)}  # times fewer passes, times faster
MOST_PASSES = 256  # of a frame of as many codes, with no help from the draft
MOST_FOR_NOTHING = 1.1  # times the seconds of no draft that a useless one may take


@dataclass
class Timing:
    """What one way to decode took.

    Attributes:
        passes: of each query.
        query: seconds of each query.
        later: seconds of each query from the beginning of its second pass; all of them, where there is one.
        gaps: where ids were not those of the first way, by how much logits led, in units of their resolution.
    """

    passes: list[int] = field(default_factory=list)
    query: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


class Clock:
    """When queries, and the second passes of queries, begin and end."""

    def __init__(self, model: WorldVLAForConditionalGeneration) -> None:
        self.model = model
        self.passes, self.second = 0, 0.0

    def pass_begins(self) -> None:
        """A pass begins: first of all with its mask."""
        self.passes += 1
        if self.passes == 2:
            wait(self.model.device)
            self.second = time.perf_counter()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Be told by `PlacedSequences` and by `generate` of their passes."""
        kinds = (PlacedSequences, "feed"), (WorldVLAForConditionalGeneration, "prepare_inputs_for_generation")
        plain = [getattr(kind, name) for kind, name in kinds]

        def telling(way: Callable[..., Any]) -> Callable[..., Any]:
            def told(*args: Any, **kwargs: Any) -> Any:
                self.pass_begins()
                return way(*args, **kwargs)

            return functools.wraps(way)(told)  # `generate` looks at names of arguments

        for (kind, name), way in zip(kinds, plain, strict=True):
            setattr(kind, name, telling(way))
        try:
            yield
        finally:
            for (kind, name), way in zip(kinds, plain, strict=True):
                setattr(kind, name, way)

    @contextmanager
    def run(self, timing: Timing) -> Iterator[None]:
        """Time a query."""
        self.passes = 0
        wait(self.model.device)
        began = time.perf_counter()
        yield
        wait(self.model.device)
        ended = time.perf_counter()
        timing.query.append(ended - began)
        timing.later.append(ended - (self.second if self.passes > 1 else began))
        timing.passes.append(self.passes)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def published_mask(ids: Ids) -> torch.Tensor:
    """The published rule, restated: causal, and an action after the last image sees no earlier action."""
    length = len(ids)
    mask = torch.tril(torch.ones(length, length, dtype=torch.bool))
    images = [i for i in range(length) if ids[i] == V.eoi]
    begins = [i for i in range(length) if ids[i] == V.boa]
    ends = [i for i in range(length) if ids[i] == V.eoa]
    if len(begins) > len(ends):
        ends.append(length - 1)
    for later, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        if not images or begin > images[-1]:
            for earlier in range(later):
                mask[begin : end + 1, begins[earlier] : ends[earlier] + 1] = False
    return mask


@torch.inference_mode()
def published(
    model: WorldVLAForConditionalGeneration,
    prompt: Ids,
    slots: Sequence[Ids],
    pass_begins: Callable[[], None] = lambda: None,
) -> list[int]:
    """One pass for each token, the mask made anew for each, logits of the whole prompt."""
    ids, cache = list(prompt), DynamicCache(config=model.config)
    for slot in slots:
        pass_begins()
        past = cache.get_seq_length()
        mask = published_mask(ids)[past:][None, None].to(model.device)
        new = torch.tensor([ids[past:]], device=model.device)
        places = torch.arange(past, len(ids), device=model.device)[None]
        states = model.model(
            new, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
        ).last_hidden_state
        logits = model.lm_head(states).float()[0, -1]
        ids.append(slot[int(logits[torch.tensor(slot, device=model.device)].argmax())])
    return ids[len(prompt) :]


@torch.inference_mode()
def careful(model: WorldVLAForConditionalGeneration, prompt: Ids, slots: Sequence[Ids]) -> list[int]:
    """One pass for each token, one mask for all, logits of the last position."""
    placed = PlacedSequences(model, [prompt], [slot[0] for slot in slots])
    (tokens, places, last), answer = placed.prompt(), []
    for slot in slots:
        at = len(prompt) + len(answer)
        logits = model.lm_head(placed.feed(tokens, places, last, upto=at)).float()[0, 0]
        token = slot[int(logits[slot.start : slot.stop].argmax())] if isinstance(slot, range) else slot[0]
        answer.append(token)
        tokens, places = (torch.tensor([[i]], device=model.device) for i in (token, at))
        last = torch.zeros_like(tokens)
    return answer


class Slots(LogitsProcessor):
    """Of an answer to a prompt: at each position all ids but those that may stand there are ruled out."""

    def __init__(self, prompt: Ids, slots: Sequence[Ids]) -> None:
        self.length, self.slots = len(prompt), slots

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(B, V) logits of the next id, of others than those allowed there -inf."""
        place = input_ids.shape[1] - self.length
        if place == len(self.slots):  # a guess at the last place is asked what comes after it
            return scores
        slot, held = self.slots[place], torch.full_like(scores, -torch.inf)
        held[:, slot[0] : slot[-1] + 1] = scores[:, slot[0] : slot[-1] + 1]
        return held


def generated(
    model: WorldVLAForConditionalGeneration, prompt: Ids, slots: Sequence[Ids], **options: Any
) -> list[int]:
    """What transformers' `generate` says, held to the grammar."""
    ids = torch.tensor([prompt], device=model.device)
    answer = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=len(slots),
        logits_processor=LogitsProcessorList([Slots(prompt, slots)]),
        **options,
    )
    return answer[0, len(prompt) :].tolist()


def peers(
    model: WorldVLAForConditionalGeneration, slots: Sequence[Ids], warm: Ids, *, compiled: bool
) -> dict[str, Callable[[Ids], list[int]]]:
    """The ways of `generate`; compiled for prompts as long as the one to warm up with."""
    ways = {"lookup": lambda prompt: generated(model, prompt, slots, prompt_lookup_num_tokens=10)}
    if compiled:
        static = {"cache_implementation": "static", "compile_config": CompileConfig()}
        if model.device.type == "cpu":  # transformers compiles there only when told to
            static["compile_config"] = CompileConfig(mode="default")
            static["compile_config"]._compile_all_devices = True
        ways["static"] = lambda prompt: generated(model, prompt, slots, **static)
        for _ in range(3):
            ways["static"](warm)
    return ways


def image(rng: random.Random, side: int = 16) -> list[int]:
    return sequence.image_block([[rng.randrange(8_192) for _ in range(side)] for _ in range(side)], V)


def chunk_words(rng: random.Random, length: int = PROMPT) -> list[int]:
    """What stands before the two frames of a prompt of a length."""
    return [0, *(rng.randrange(16_388, 65_000) for _ in range(length - 2 - 2 * len(image(rng))))]


def chunk_prompt(rng: random.Random, words: Ids | None = None) -> list[int]:
    return [*(words or chunk_words(rng)), *image(rng), *image(rng), V.eot]


def frame_prompt(rng: random.Random) -> list[int]:
    action = [V.boa, *(rng.randrange(10_006, 10_262) for _ in range(7)), V.eoa]
    words = [rng.randrange(16_388, 65_000) for _ in range(18)]
    return [0, *words, *image(rng), *action, V.eot]


def compare(
    clock: Clock, ways: dict[str, Callable[[Ids], list[int]]], prompts: Sequence[Ids]
) -> dict[str, Timing]:
    """Run all ways in turn on each prompt.

    Raises:
        AssertionError: in fp32 two ways gave different ids.
    """
    found = {name: Timing() for name in ways}
    with clock.listening():
        for prompt in prompts:
            answers = {}
            for name, way in ways.items():
                with clock.run(found[name]):
                    answers[name] = way(prompt)
            first = next(iter(answers.values()))
            for name, answer in answers.items():
                found[name].gaps += differing(clock.model, name, prompt, first, answer)
    return found


def differing(
    model: WorldVLAForConditionalGeneration, name: str, prompt: Ids, one: Ids, other: Ids
) -> list[float]:
    """The gap, if two answers are not the same.

    Raises:
        AssertionError: they are not, in fp32.
    """
    if one == other:
        return []
    assert model.dtype != torch.float32, f"{name} gave other ids"
    return [gap(model, prompt, one, other)]


@torch.inference_mode()
def gap(model: WorldVLAForConditionalGeneration, prompt: Ids, one: Ids, other: Ids) -> float:
    """Between the logits of the first ids that differ, in units of the type's resolution there."""
    at = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    ids = torch.tensor([[*prompt, *one[:at]]], device=model.device)
    logits = model(ids, logits_to_keep=1).logits[0, -1].float()
    first, second = logits[one[at]], logits[other[at]]
    unit = torch.maximum(first.abs(), second.abs()) * torch.finfo(model.dtype).eps
    return float((first - second).abs() / unit)


def told_ids(found: dict[str, Timing], runs: int) -> str:
    gaps = [gap for timing in found.values() for gap in timing.gaps]
    if not gaps:
        return f"ids of all {runs} runs are equal."
    return told_gaps(gaps, runs * (len(found) - 1), "those of the first row")


def told_gaps(gaps: Sequence[float], answers: int, others: str) -> str:
    return (
        f"{len(gaps)} of {answers} answers differ from {others}; where they part, "
        f"their logits do by at most {max(gaps):.1f} units of bf16's resolution."
    )


def pass_ms(way: Timing) -> str:
    """The median of what a pass after the first takes."""
    later = [s / (passes - 1) for s, passes in zip(way.later, way.passes, strict=True) if passes > 1]
    return f"{1e3 * statistics.median(later):.2f}" if later else ""


def typical(passes: Sequence[int]) -> str:
    return f"{statistics.median_high(passes)}"


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    return statistics.median(one) / statistics.median(other)


def chunks(model: WorldVLAForConditionalGeneration, runs: int, *, compiled: bool) -> None:
    rng, clock, workspace = random.Random(0), Clock(model), Workspace(model)
    words = chunk_words(rng)
    for actions, needed in NEEDED.items():
        slots = [*list(GRAMMAR.slots) * actions, [GRAMMAR.end_of_turn]]
        found = compare(
            clock,
            {
                "published": lambda prompt, slots=slots: published(model, prompt, slots, clock.pass_begins),
                "careful": lambda prompt, slots=slots: careful(model, prompt, slots),
                "ours": lambda prompt, k=actions: decode_chunks(
                    model, [prompt], GRAMMAR, num_actions=k, workspace=workspace
                )[0],
                **peers(model, slots, chunk_prompt(random.Random(6)), compiled=compiled),
            },
            [chunk_prompt(rng, words) for _ in range(runs)],
        )
        print(f"\nChunk of {actions} actions, prompt of {PROMPT} tokens; {told_ids(found, runs)}")
        ours, base = found["ours"], found["published"]
        rows = [
            [
                name,
                typical(way.passes),
                f"{statistics.median(way.query):.3f}",
                f"{ratio(way.query, ours.query):.2f}x",
                f"{statistics.median(way.later):.3f}",
                f"{ratio(way.later, ours.later):.2f}x",
                pass_ms(way),
            ]
            for name, way in found.items()
        ]
        common.table(rows, ["", "passes", "query s", "to ours", "after first pass s", "to ours", "ms a pass"])
        most = max(ours.passes)
        print(f"   passes: {most} at most, needed 8: {common.yes(most <= 8)}")
        reached = ratio(base.later, ours.later), ratio(base.query, ours.query)
        for what, times, need in zip(("after the first pass", "query"), reached, needed, strict=True):
            print(f"   {what}: {times:.2f}x, needed {need}x: {common.yes(times >= need)}")


def frames(model: WorldVLAForConditionalGeneration, runs: int, *, compiled: bool) -> None:
    rng = random.Random(1)
    prompts = [frame_prompt(rng) for _ in range(runs)]
    answers = {tuple(prompt): decode_frames(model, [prompt], FRAME)[0] for prompt in prompts}

    def drafted(agreement: float) -> Callable[[Ids], list[int]]:
        drafts = {
            prompt: [
                token if len(slot) == 1 or rng.random() < agreement else rng.choice(slot)
                for token, slot in zip(answer, FRAME, strict=True)
            ]
            for prompt, answer in answers.items()
        }
        return lambda prompt: decode_frames(model, [prompt], FRAME, draft=repeat(drafts[tuple(prompt)]))[0]

    ways: dict[str, Callable[[Ids], list[int]]] = {
        "careful": lambda prompt: careful(model, prompt, FRAME),
        "undrafted": lambda prompt: decode_frames(model, [prompt], FRAME)[0],
    }
    ways |= {f"draft right for {100 * a:.0f} %": drafted(a) for a in (0.0, *NEEDED_OF_DRAFTS)}
    others = peers(model, FRAME, frame_prompt(random.Random(6)), compiled=compiled)
    found = compare(Clock(model), ways | others, prompts)
    base, useless = found["undrafted"], found["draft right for 0 %"]
    print(f"\nFrame of 256 codes, prompt of {len(prompts[0])} tokens; {told_ids(found, runs)}")
    rows = []
    for (name, way), need in zip(
        found.items(), [None, None, None, *NEEDED_OF_DRAFTS.values(), *[None] * len(others)], strict=True
    ):
        fewer = statistics.median_high(base.passes) / statistics.median_high(way.passes)
        faster = ratio(base.query, way.query)
        wanted, reached = ("", ""), ""
        if need is not None:
            wanted = f"{need[0]:.1f}x", f"{need[1]:.2f}x"
            reached = common.yes(fewer >= need[0] and faster >= need[1])
        seconds = f"{statistics.median(way.query):.2f}"
        rows.append(
            [name, typical(way.passes), f"{fewer:.2f}x", wanted[0], seconds, f"{faster:.2f}x", wanted[1], reached]
            + [pass_ms(way)]
        )
    common.table(rows, ["", "passes", "fewer", "needed", "query s", "faster", "needed", "reached", "ms a pass"])
    for name, way in (("no draft", base), ("a useless draft", useless)):
        most = max(way.passes)
        print(f"   passes with {name}: {most} at most, needed {MOST_PASSES}: {common.yes(most <= MOST_PASSES)}")
    slower = ratio(useless.query, base.query)
    print(
        f"   seconds with a useless draft: {slower:.2f}x those of none, needed {MOST_FOR_NOTHING}x at most: "
        f"{common.yes(slower <= MOST_FOR_NOTHING)}"
    )


def batches(model: WorldVLAForConditionalGeneration, runs: int) -> None:
    """Prompts of different lengths at once, and what each costs then."""
    rng, rows = random.Random(2), []
    on_gpu = model.device.type == "cuda"
    workspace = Workspace(model, slots=SLOTS) if on_gpu else None
    alone, gaps, answered = None, [], 0
    for batch in (1, 4, 16):
        for actions in NEEDED:
            seconds = []
            for _ in range(runs + 3):
                prompts = [
                    chunk_prompt(rng, chunk_words(rng, PROMPT + rng.randrange(-15, 16))) for _ in range(batch)
                ]
                wait(model.device)
                began = time.perf_counter()
                answers = decode_chunks(model, prompts, GRAMMAR, num_actions=actions, workspace=workspace)
                wait(model.device)
                seconds.append(time.perf_counter() - began)
                which = rng.randrange(batch)
                (one,) = decode_chunks(model, [prompts[which]], GRAMMAR, num_actions=actions)
                gaps += differing(model, f"a batch of {batch}", prompts[which], one, answers[which])
                answered += 1
            half, late = (float(np.quantile(seconds[3:], share)) for share in (0.5, 0.99))  # the first ones warm
            alone = alone or half
            rows.append(
                [
                    f"{batch}",
                    f"{actions}",
                    f"{batch / half:.2f}",
                    f"{batch * alone / half:.2f}x",
                    f"{1e3 * half:.0f}",
                    f"{1e3 * late:.0f}",
                    f"{late / half:.2f}x",
                ]
            )
    same = f"ids of {answered} prompts, one of each run, are those that it gets alone."
    print(
        f"\nPrompts of different lengths at once{', compiled passes' if on_gpu else ''}; {runs} runs of each; "
        f"{told_gaps(gaps, answered, 'those that the prompt gets alone') if gaps else same}"
    )
    common.table(rows, ["prompts", "actions", "queries/s", "to the first", "p50 ms", "p99 ms", "p99 to p50"])


def real(runs: int) -> None:
    """The frames that come with the package, under the default model."""
    agent, data = WorldVLA.from_pretrained(default_model_path(), device="cpu"), TokenDataset(sample_data_path())
    model, vocabulary = agent.model.float(), agent.processor.vocabulary
    text = agent.processor.text.encode(agent.processor.settings.world_prompt)
    rows, columns = data[0].codes[0].shape
    size = agent.processor.images.codebook_size
    slots: list[Ids] = [*sequence.image_slots(rows, columns, vocabulary, codebook_size=size), [vocabulary.eot]]
    free = [place for place, slot in enumerate(slots) if len(slot) > 1]
    rng, drafts = random.Random(3), {}
    for _ in range(runs):
        episode = data[rng.randrange(len(data))]
        at = rng.randrange(len(episode) - 1)
        action = agent.processor.actions.encode(episode.actions[at : at + 1])
        prompt = sequence.world_prompt(text, [episode.codes[at]], action, vocabulary)
        drafts[tuple(prompt)] = [*sequence.image_block(episode.codes[at], vocabulary), vocabulary.eot]
    workspace, passes, imagined = Workspace(model, prefixes=0), [], []

    def drafted(prompt: Ids) -> list[int]:
        draft, before = drafts[tuple(prompt)], workspace.passes
        (answer,) = decode_frames(
            model, [prompt], slots, draft=repeat(draft), attention="causal", workspace=workspace
        )
        passes.append(workspace.passes - before)
        imagined.append(np.mean([answer[place] == draft[place] for place in free]))
        return answer

    ways = {"undrafted": lambda p: decode_frames(model, [p], slots, attention="causal")[0], "drafted": drafted}
    found = compare(Clock(model), ways, [list(prompt) for prompt in drafts])
    stays = [float(np.mean(episode.codes[1:] == episode.codes[:-1])) for episode in data]
    faster = ratio(found["undrafted"].query, found["drafted"].query)
    print(
        f"\nReal frames: {len(data)} episodes, {sum(map(len, data)):,} frames of {len(free)} codes, the default "
        f"model; {told_ids(found, len(drafts))}\n"
        f"   codes that stay in the next frame: {100 * np.mean(stays):.1f} % of the camera's, "
        f"{100 * np.mean(imagined):.1f} % of those imagined\n"
        f"   passes a frame: {statistics.mean(passes):.1f} drafted, "
        f"{typical(found['undrafted'].passes)} undrafted; {faster:.2f}x faster"
    )


@torch.inference_mode()
def images(device: torch.device, runs: int, *, quick: bool) -> None:
    """The image tokenizer in the published topology: two frames to codes, one frame back."""
    torch.manual_seed(0)
    config = VQGANConfig(ch=32) if quick else VQGANConfig()
    plain = VQGAN(config).eval().to(device)
    kinds = {"fp32": plain, "fp32, channels last": copy(plain).to(memory_format=torch.channels_last)}
    if device.type == "cuda":
        half = copy(plain).to(dtype=torch.bfloat16, memory_format=torch.channels_last)
        kinds |= {"bf16, channels last": half}
    pixels = torch.rand(2, 3, 256, 256, device=device) * 2 - 1
    codes = plain.encode(pixels)
    ways: dict[str, Callable[[], torch.Tensor]] = {"encode one by one, fp32": lambda: one_by_one(plain, pixels)}
    ways |= {f"encode both, {name}": lambda kind=kind: kind.encode(pixels) for name, kind in kinds.items()}
    seconds: dict[str, list[float]] = {}
    other = {}
    for _ in range(runs):
        for name, way in ways.items():
            found = timed(device, seconds.setdefault(name, []), way)
            other[name] = float((found != codes).float().mean())
        for name, kind in kinds.items():
            timed(device, seconds.setdefault(f"decode one, {name}", []), lambda kind=kind: kind.decode(codes[:1]))
    print(f"\nImage tokenizer of the paper's size, 256 px; {runs} runs")
    base = {"encode": seconds["encode one by one, fp32"], "decode": seconds["decode one, fp32"]}
    common.table(
        [
            [
                name,
                f"{1e3 * statistics.median(took):.0f}",
                f"{ratio(base[name.split()[0]], took):.2f}x",
                f"{100 * other[name]:.2f} %" if name in other else "",
            ]
            for name, took in seconds.items()
        ],
        ["", "ms", "faster", "other codes"],
    )


def copy(vqgan: VQGAN) -> VQGAN:
    other = VQGAN(vqgan.config).eval().to(vqgan.device)
    other.load_state_dict(vqgan.state_dict())
    return other


def one_by_one(vqgan: VQGAN, pixels: torch.Tensor) -> torch.Tensor:
    return torch.cat([vqgan.encode(frame[None]) for frame in pixels])


def timed(device: torch.device, seconds: list[float], way: Callable[[], torch.Tensor]) -> torch.Tensor:
    wait(device)
    began = time.perf_counter()
    found = way()
    wait(device)
    seconds.append(time.perf_counter() - began)
    return found


@torch.inference_mode()
def rates(model: WorldVLAForConditionalGeneration) -> Hardware:
    """What this device can do, measured: a product of large matrices, and reading a large vector."""
    on_gpu = model.device.type == "cuda"
    side, length = (8_192, 1 << 30) if on_gpu else (2_048, 1 << 26)
    kind = {"dtype": model.dtype, "device": model.device}
    a, b = torch.randn(side, side, **kind), torch.randn(side, side, **kind)
    matrix, vector = torch.randn(length // side, side, **kind), torch.randn(side, **kind)
    products: list[float] = []
    reads: list[float] = []
    for _ in range(7):
        timed(model.device, products, lambda: a @ b)
        timed(model.device, reads, lambda: matrix @ vector)
    flops = 2 * side**3 / min(products)
    return Hardware(flops, matrix.numel() * matrix.element_size() / min(reads))


@torch.inference_mode()
def precision(model: WorldVLAForConditionalGeneration, runs: int) -> None:
    """The same weights, rounded to bf16, computed with in fp32 and in bf16: ids, and by how much logits led."""
    rough = model if model.dtype == torch.bfloat16 else deepcopy(model).to(torch.bfloat16)
    exact = deepcopy(rough).float()
    rng, actions = random.Random(5), 10
    slots = [*list(GRAMMAR.slots) * actions, [GRAMMAR.end_of_turn]]
    free = [place for place, slot in enumerate(slots) if len(slot) > 1]
    leads: list[float] = []  # of the first over the second, at every place
    others: list[float] = []  # of fp32's choice over bf16's, where they are not the same
    squares: list[float] = []
    chunks_equal = 0
    for _ in range(runs):
        prompt = chunk_prompt(rng)
        (answer,) = decode_chunks(exact, [prompt], GRAMMAR, num_actions=actions)
        (found,) = decode_chunks(rough, [prompt], GRAMMAR, num_actions=actions)
        chunks_equal += found == answer
        # Both are shown fp32's answer, so that one other id is not counted again in all that follow from it.
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        mask = dense(model.config.attention, ids, V)[:, None]
        places = torch.arange(ids.shape[1], device=model.device)[None]
        values = slice(V.action_range.start, V.action_range.stop)
        at = torch.tensor([len(prompt) + place - 1 for place in free], device=model.device)
        fine, coarse = (
            kind.lm_head(
                kind.model(ids, attention_mask=mask, position_ids=places).last_hidden_state[0, at]
            ).float()
            for kind in (exact, rough)
        )
        fine, coarse = fine[:, values], coarse[:, values]
        first, second = fine.topk(2).values.unbind(-1)
        leads += (first - second).tolist()
        lost = first - fine.gather(-1, coarse.argmax(-1, keepdim=True))[:, 0]
        others += lost[lost > 0].tolist()
        squares.append(float((coarse - fine).square().mean()))
    noise = statistics.mean(squares) ** 0.5
    narrow = sum(lead < 2 * noise for lead in leads)
    share = 100 * len(others) / len(leads)
    print(
        f"\nbf16 beside fp32, the same weights; {chunks_equal} of {runs} chunks of {actions} actions have equal "
        f"ids\n"
        f"   {len(others)} of {len(leads)} ids ({share:.2f} %) differ, each given the same ids before it\n"
        f"   noise of bf16 logits: {noise:.2e} (root mean square); the first of two logits leads by "
        f"{statistics.median(leads):.2e} (median), by less than twice the noise for {narrow} ids\n"
        f"   where ids differ, fp32's leads by {max(others, default=0.0) / noise:.1f} times the noise at most, by "
        f"{statistics.median(others or [0.0]) / noise:.1f} times in the median"
    )


def bounds(model: WorldVLAForConditionalGeneration, runs: int) -> None:
    """What was measured beside the least that it can cost."""
    device, config = rates(model), model.config
    bytes_per_value = {"bytes_per_value": model.dtype.itemsize}
    rng, on_gpu = random.Random(4), model.device.type == "cuda"
    workspace = Workspace(model, slots=SLOTS) if on_gpu else Workspace(model, prefixes=0)
    print(
        f"\nMeasured and least, at {device.flops / 1e9:,.0f} GFLOP/s and {device.bandwidth / 1e9:,.1f} GB/s, as "
        "this device was measured to reach"
    )
    frame_length = len(frame_prompt(rng))
    todo: dict[str, tuple[Cost, Sequence[Ids], Callable[[Ids], list[int]]]] = {
        "prefill": (
            Cost((pass_cost(config, new=PROMPT + 1, among=256, **bytes_per_value),)),
            [*ONE_VALUE.slots, [ONE_VALUE.end_of_turn]],
            lambda prompt: decode_chunks(model, [prompt], ONE_VALUE, num_actions=1, workspace=workspace)[0],
        )
    }
    for actions in NEEDED:
        todo[f"chunk of {actions}"] = (
            chunk_cost(config, prompt=PROMPT, actions=actions, among=256, **bytes_per_value),
            [*list(GRAMMAR.slots) * actions, [GRAMMAR.end_of_turn]],
            lambda prompt, k=actions: decode_chunks(model, [prompt], GRAMMAR, num_actions=k, workspace=workspace)[
                0
            ],
        )
    todo["frame, undrafted"] = (
        frame_cost(config, prompt=frame_length, rows=16, columns=16, among=8_192, **bytes_per_value),
        FRAME,
        lambda prompt: decode_frames(model, [prompt], FRAME, workspace=workspace)[0],
    )
    rows, gaps = [], []
    for name, (cost, slots, way) in todo.items():
        seconds: list[float] = []
        for run in range(runs + 2):
            prompt = frame_prompt(rng) if slots is FRAME else chunk_prompt(rng)
            before = workspace.passes
            wait(model.device)
            began = time.perf_counter()
            answer = way(prompt)
            wait(model.device)
            if run >= 2:
                seconds.append(time.perf_counter() - began)
            passes = workspace.passes - before
            assert passes == cost.passes, f"{name}: {passes} passes, counted {cost.passes}"
            gaps += differing(model, name, prompt, careful(model, prompt, slots), answer)
        middle, least = statistics.median(seconds), cost.seconds(device)
        rows.append(
            [
                name,
                f"{cost.passes}",
                f"{cost.flops / 1e9:,.0f}",
                f"{cost.bytes / 1e9:,.2f}",
                f"{1e3 * least:,.1f}",
                f"{1e3 * middle:,.1f}",
                f"{100 * least / middle:.0f} %",
            ]
        )
    common.table(rows, ["", "passes", "GFLOP", "GB", "least ms", "measured ms", "reached"])
    answered, others = len(todo) * (runs + 2), "those of one token after the other"
    equal = f"ids of all {answered} answers are {others}."
    print(f"   {told_gaps(gaps, answered, others) if gaps else equal}")


ONE_VALUE = ChunkGrammar([GRAMMAR.slots[0], GRAMMAR.slots[1], GRAMMAR.slots[-1]], GRAMMAR.end_of_turn)
"""Actions of one dimension: a chunk of one is a single pass."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and few runs: shows that it runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    options = parser.parse_args()
    device = torch.device(options.device)
    size = "quick" if options.quick else ("100M" if device.type == "cpu" else "7B")
    runs = options.runs or (2 if options.quick else 20)
    torch.manual_seed(0)
    if device.type == "cpu":
        torch.set_num_threads(2)
    with torch.device(device):
        config = WorldVLAConfig(**SIZES[size], max_position_embeddings=1_024)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = WorldVLAForConditionalGeneration(config).to(dtype).eval()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    threads = torch.get_num_threads()
    common.print_machine(
        device=name, parameters=f"{model.num_parameters():,}", dtype=dtype, threads=threads, runs=runs
    )
    if options.quick:
        print("no row `static`: compilers take longer than all the rest here")
    with common.watching_others() as others:
        if "chunks" in options.only:
            chunks(model, runs, compiled=not options.quick)
        if "frames" in options.only:
            frames(model, runs, compiled=not options.quick)
        if "batches" in options.only:
            batches(model, runs if device.type == "cpu" else 5 * runs)
        if "real" in options.only:
            real(runs)
        if "images" in options.only:
            images(device, runs, quick=options.quick)
        if "precision" in options.only:
            precision(model, runs)
        if "bounds" in options.only:
            bounds(model, runs)
    common.print_others(others)


if __name__ == "__main__":
    main()
