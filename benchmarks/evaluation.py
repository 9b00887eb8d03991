"""Evaluation against the published procedure: frames rendered, steps a second, workers, batches, memory.

    python benchmarks/evaluation.py [--quick] [--repeats 3] [--only PART …]

`published`: one of LIBERO's own environments, both cameras rendered at every step, as the released evaluation
does it. `ours`: `rollout`, which renders one camera where the policy is shown a frame. Both execute the same
actions from the same initial states on one core, in turn; the frames that the policy is shown, the simulator's
state and success must be equal, bit by bit. Then the scripted expert with two workers against one, the default
model's answers to eight observations at once against one after the other, and the memory of a worker.

Linux only. Two free cores are needed.
"""

from __future__ import annotations

import os

os.environ["LP_NUM_THREADS"] = "1"  # before imports; the workers inherit it

import argparse
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
import numpy as np
from numpy.typing import NDArray

from worldvla_libero import (
    OPENVLA,
    EpisodeRecord,
    ExpertPolicy,
    ModelPolicy,
    Observation,
    Simulator,
    Task,
    default_model_path,
    evaluate,
    load_suite,
    rollout,
)
from worldvla_libero.simulator.rendering import renderer_name
from worldvla_libero.simulator.simulator import NO_MOTION

if TYPE_CHECKING:
    from worldvla_model import WorldVLA

PARTS = ("rendering", "workers", "batches")
HISTORY = 2
NEEDED = {5: (0.20, 3.0), 10: (0.10, 4.0)}  # by K: share of renders, times the steps a second
NEEDED_OF_BATCHES = 3.0  # times the queries a second
CORES, GPU = 16, "H100"  # of the worked plan
SUITES_OF_PAPER = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
STEPS = 150  # of an episode, as the plan takes them; its other column takes each suite's limit
PROMPT = 569  # ids that two frames of 256 pixels and an instruction make


class Given:
    """A policy that says what it was given, K actions at a time, and keeps what it was shown."""

    history_length = HISTORY

    def __init__(self, actions: NDArray[np.float64], chunk: int) -> None:
        self.actions, self.chunk = actions, chunk
        self.shown: list[NDArray[np.uint8]] = []

    def act(self, observation: Observation) -> NDArray[np.float64]:
        """The next K of them."""
        self.shown += observation.images
        return self.actions[observation.step : observation.step + self.chunk]


@dataclass
class Run:
    """One side: what it took, and what came of it."""

    seconds: float = 0.0
    begins: float = 0.0  # seconds until the scene has settled
    renders: int = 0
    shown: list[NDArray[np.uint8]] = field(default_factory=list)
    state: NDArray[np.float64] | None = None
    success: bool = False


@contextmanager
def counting(run: Run) -> Iterator[None]:
    """Counts what cameras draw, and the seconds."""
    from robosuite.utils.binding_utils import MjSim

    render = MjSim.render

    def counted(*args: Any, **options: Any) -> Any:
        run.renders += 1
        return render(*args, **options)

    MjSim.render = counted
    began = time.perf_counter()
    try:
        yield
    finally:
        run.seconds = time.perf_counter() - began
        MjSim.render = render


def published(task: Task, initial_state: int, actions: NDArray[np.float64], chunk: int, size: int) -> Run:
    """LIBERO's own environment; the policy is shown the last two frames before each query."""
    from libero.libero.envs import OffScreenRenderEnv

    environment = OffScreenRenderEnv(bddl_file_name=str(task.bddl_file), camera_heights=size, camera_widths=size)
    run, frames = Run(), []
    try:
        environment.seed(OPENVLA.seed)
        environment.reset()
        environment.set_init_state(task.initial_states()[initial_state])
        for _ in range(OPENVLA.wait_steps):
            observation, *_ = environment.step(list(NO_MOTION))
        frames.append(observation["agentview_image"][::-1, ::-1])
        with counting(run):
            for step, action in enumerate(actions):
                if step % chunk == 0:
                    run.shown += [frame.copy() for frame in frames[-HISTORY:]]
                observation, _, run.success, _ = environment.step(action)
                frames.append(observation["agentview_image"][::-1, ::-1])
        run.state = environment.get_sim_state()
    finally:
        environment.close()
    return run


def ours(simulator: Simulator, initial_state: int, actions: NDArray[np.float64], chunk: int) -> Run:
    """Settling is the same on both sides and is not timed."""
    policy, run, began, called = Given(actions, chunk), Run(), 0.0, time.perf_counter()

    def settled(step: int, frame: object) -> None:
        nonlocal began
        if step == 0:
            began, run.renders = time.perf_counter(), 0

    with counting(run):
        played = rollout(
            policy,
            simulator,
            initial_state=initial_state,
            seed=OPENVLA.seed,
            max_steps=len(actions),
            on_step=settled,
        )
        ended = time.perf_counter()
    run.seconds, run.begins = ended - began, began - called
    run.shown, run.state, run.success = policy.shown, simulator.state, played.success
    return run


def rendering(repeats: int, steps: int, size: int) -> None:
    """Both sides in turn, and what our rate makes of the paper's evaluation."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    task = load_suite("libero_goal").task(0)
    actions = np.random.default_rng(0).uniform(-0.5, 0.5, (steps, 7))
    rates: dict[int, float] = {}
    begins: list[float] = []
    print(
        f"\n{steps} steps of {task}, {size} px, renderer {renderer_name()}, one core, one thread; {repeats} runs"
    )
    rows, verdicts = [], []
    with Simulator(task, replace(OPENVLA, image_size=size)) as simulator:
        for chunk, (share_needed, times_needed) in NEEDED.items():
            sides: dict[str, list[Run]] = {"published": [], "ours": []}
            for number in range(repeats):
                sides["published"].append(published(task, number, actions, chunk, size))
                sides["ours"].append(ours(simulator, number, actions, chunk))
                one, other = (runs[-1] for runs in sides.values())
                assert all(map(np.array_equal, one.shown, other.shown)), "other frames were shown"
                assert len(one.shown) == len(other.shown)
                assert np.array_equal(one.state, other.state), "another state was reached"
                assert one.success == other.success
            seconds = {name: statistics.median(run.seconds for run in runs) for name, runs in sides.items()}
            renders = {name: runs[0].renders for name, runs in sides.items()}
            share, times = renders["ours"] / renders["published"], seconds["published"] / seconds["ours"]
            rates[chunk] = steps / seconds["ours"]
            begins += [run.begins for run in sides["ours"]]
            for name in sides:
                rows.append([f"K = {chunk}, {name}", f"{renders[name]}", f"{steps / seconds[name]:.1f}"])
            reached = common.yes(share <= share_needed), common.yes(times >= times_needed)
            verdicts += [
                f"   K = {chunk}: {100 * share:.0f} % of the renders, at most {100 * share_needed:.0f} % needed: "
                f"{reached[0]}",
                f"   K = {chunk}: {times:.2f}x the steps a second, {times_needed:.0f}x needed: {reached[1]}",
            ]
    common.table(rows, ["", "renders", "steps/s"])
    print("\n".join([*verdicts, "   Frames shown, states and successes of all runs are equal, bit by bit."]))
    plan(rates, statistics.median(begins))


def plan(rates: dict[int, float], begins: float) -> None:
    """Hours of the paper's four suites, for simulators and policy each alone: it takes what is more."""
    from worldvla_model import WorldVLAConfig
    from worldvla_model.cost import HARDWARE, chunk_cost

    episodes = {name: OPENVLA.episodes_per_task * len(load_suite(name).tasks) for name in SUITES_OF_PAPER}
    rows = []
    for chunk, rate in rates.items():
        bound = chunk_cost(WorldVLAConfig(), prompt=PROMPT, actions=chunk, among=256, batch=8).seconds(
            HARDWARE[GPU]
        )
        hours: dict[str, list[float]] = {"simulators": [], "policy": []}
        for lengths in (dict.fromkeys(episodes, STEPS), {name: OPENVLA.max_steps[name] for name in episodes}):
            seconds = sum(count * (begins + lengths[name] / rate) for name, count in episodes.items())
            queries = sum(count * math.ceil(lengths[name] / chunk) for name, count in episodes.items())
            hours["simulators"].append(seconds / CORES / 3600)
            hours["policy"].append(queries * bound / 8 / 3600)
        rows += [[f"K = {chunk}, {name}", *(f"{number:.2f} h" for number in row)] for name, row in hours.items()]
    print(
        f"\n{sum(episodes.values()):,} episodes ({', '.join(episodes)}) on {CORES} such cores; a scene takes "
        f"{begins:.1f} s to settle;\nthe 7B policy, eight at once in bf16: the cost model's bound for one {GPU}"
    )
    common.table(rows, ["", f"{STEPS} steps each", "all to the step limit"])


def workers(episodes: int, size: int) -> None:
    """The scripted expert, which is shown no frame: episodes a second once every worker has done its first.

    Of one task, whose simulator every worker has built by then: none is built while the clock runs.
    """
    tasks = [load_suite("libero_object").task(0)]
    rates, found = {}, {}
    for count in (1, 2):
        ended: list[float] = []
        with tempfile.TemporaryDirectory() as folder:

            def note(record: EpisodeRecord, ended: list[float] = ended) -> None:
                ended.append(time.perf_counter())

            options: dict[str, Any] = {"protocol": replace(OPENVLA, image_size=size), "episodes": episodes}
            result = evaluate(
                ExpertPolicy(),
                tasks,
                Path(folder) / "run",
                **options,
                video_stride=0,
                workers=count,
                on_episode=note,
            )
        rates[count] = (len(ended) - count) / (ended[-1] - ended[count - 1])
        found[count] = [(record.key, record.outcome, record.steps) for record in result.records]
    assert found[1] == found[2], "other episodes"
    faster = rates[2] / rates[1]
    print(f"\nThe scripted expert, {episodes} episodes of a task; all are the same with one worker and with two")
    common.table([[f"{n}", f"{rate:.3f}"] for n, rate in rates.items()], ["workers", "episodes/s"])
    print(f"   {faster:.2f}x, needed 1.8x: {common.yes(faster >= 1.8)}")


def batches(runs: int, size: int) -> None:
    """Answers of the default model, and what a worker's process holds."""
    from worldvla_model import WorldVLA  # not above: workers import this file, and torch would count as theirs

    agents = [
        WorldVLA.from_pretrained(default_model_path(), device="cpu", dtype=dtype) for dtype in ("auto", "float32")
    ]
    task = load_suite("libero_object").task(0)
    observations = []
    with Simulator(task, image_size=agents[0].processor.image_size) as simulator:
        for number in range(8):
            frames = [simulator.reset(number).frame, simulator.step(NO_MOTION).frame]
            observations.append(
                Observation(tuple(frame for frame in frames if frame is not None), task.language, 1)
            )
    for agent in agents:
        batch(agent, observations, runs)

    policy = ModelPolicy(agents[0])
    held: list[float] = []
    protocol = replace(OPENVLA, image_size=size, max_steps={"libero_object": 10})
    with tempfile.TemporaryDirectory() as folder:
        evaluate(
            policy,
            [task],
            Path(folder) / "run",
            protocol=protocol,
            episodes=2,
            video_stride=0,
            workers=1,
            on_episode=lambda record: held.append(private_memory()),
        )
    print(f"\nA worker holds {max(held):,.0f} MiB of its own; what it shares with others is not counted")


def batch(agent: WorldVLA, observations: Sequence[Observation], runs: int) -> None:
    """Answers to observations one by one and at once, and how much of that their images take."""
    policy = ModelPolicy(agent)
    pairs, count = [list(observation.images) for observation in observations], len(observations)
    ways: dict[str, Callable[[], Any]] = {
        "one by one": lambda: [policy.act(observation) for observation in observations],
        "all at once": lambda: policy.act_batch(observations),
        "images, one by one": lambda: [agent.processor.encode_images(pair) for pair in pairs],
        "images, all at once": lambda: agent.processor.encode_images([*chain(*pairs)]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, Any] = {name: way() for name, way in ways.items()}
    for _ in range(runs):
        for name, way in ways.items():
            began = time.perf_counter()
            answers[name] = way()
            seconds[name].append(time.perf_counter() - began)
    chunks = zip(answers["one by one"], answers["all at once"], strict=True)
    same = 100 * float(np.mean([np.array_equal(*pair) for pair in chunks]))
    print(
        f"\n{count} observations, the default model in {agent.model.dtype}; {same:.0f} % of the chunks are equal"
    )
    typical = {name: statistics.median(taken) / count for name, taken in seconds.items()}
    rows = []
    for name in ("one by one", "all at once"):
        query, images = typical[name], typical[f"images, {name}"]
        rows.append([name, f"{1 / query:.1f}", f"{1e3 * images:.0f}", f"{1e3 * (query - images):.0f}"])
    common.table(rows, ["", "queries/s", "images ms", "the rest ms"])
    faster = typical["one by one"] / typical["all at once"]
    print(f"   {faster:.2f}x, needed {NEEDED_OF_BATCHES:g}x: {common.yes(faster >= NEEDED_OF_BATCHES)}")


def private_memory() -> float:
    """MiB of the worker process."""
    (worker,) = multiprocessing.active_children()
    lines = Path(f"/proc/{worker.pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps of small frames: shows that it runs")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    options = parser.parse_args()
    repeats = options.repeats or (1 if options.quick else 3)
    size = 64 if options.quick else 256
    common.print_machine(sizes="quick" if options.quick else "default")
    cores: Sequence[int] = sorted(os.sched_getaffinity(0))
    with common.watching_others() as others:
        if "rendering" in options.only:
            rendering(repeats, 20 if options.quick else 60, size)
            os.sched_setaffinity(0, cores)
        if "workers" in options.only:
            workers(4 if options.quick else 12, size)
        if "batches" in options.only:
            batches(3 if options.quick else 20, size)
    common.print_others(others)


if __name__ == "__main__":
    main()
