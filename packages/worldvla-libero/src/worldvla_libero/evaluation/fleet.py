"""Many episodes at once: simulators that ask, one policy that answers them in batches.

The policy stays in this process, with the GPU if there is one. Simulators run elsewhere; whenever the policy is
free it answers all that have asked by then, so that it is never idle while somebody waits. What goes wrong in a
simulator is tried once more in a fresh process; what goes wrong in the policy is not.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from typing import Any

from worldvla_libero.evaluation.episode_runner import (
    Act,
    Begin,
    EpisodeEnd,
    EpisodeFault,
    EpisodePlan,
    Fail,
    GoOn,
    Message,
)
from worldvla_libero.evaluation.policy import Observation, Policy
from worldvla_libero.jobs.parts import StorageError
from worldvla_libero.jobs.pools import Pool, Seat
from worldvla_libero.jobs.processes import WorkerKilledError
from worldvla_libero.simulator.libero_files import LiberoNotInstalledError
from worldvla_libero.simulator.rendering import RenderingError
from worldvla_libero.simulator.suites import Task

TRIES = 2
"""Of an episode whose simulator or process failed."""

ENDING = (StorageError, RenderingError, LiberoNotInstalledError)
"""What a simulator raises about the machine: no other episode would fare better."""


class TimeLimitError(RuntimeError):
    """Something took longer than it may."""


class PolicyTimeLimitError(TimeLimitError):
    """The policy does not answer any more; the run cannot go on."""


def run_episodes(
    plans: Sequence[EpisodePlan],
    policy: Policy,
    pool: Pool,
    *,
    workers: int = 1,
    batch_size: int = 32,
    time_limit: float = 600.0,
) -> Generator[tuple[EpisodePlan, EpisodeEnd, int], None, None]:
    """Run episodes, in the order that is fastest.

    Args:
        plans: the episodes.
        policy: who drives; with a method `act_batch(observations) -> list of chunks` several are answered at
            once, otherwise one by one.
        pool: where simulators run.
        workers: how many of them.
        batch_size: observations in one answer at most.
        time_limit: seconds that a simulator or the policy may take for one answer.

    Yields:
        Each episode as it ends, and how often it was tried.

    Raises:
        PolicyTimeLimitError: the policy hangs.
        WorkerStartError: no worker process can start, or read what it is sent.
        StorageError: a worker cannot write a video or frame.
        RenderingError: workers have no OpenGL to render with.
        LiberoNotInstalledError: workers have no LIBERO.
    """
    if not plans:
        return
    waiting = _Queue(plans)
    crew = [_Member(pool) for _ in range(max(1, min(workers, len(plans))))]
    ask = _Asker(policy, time_limit)
    batch_size = batch_size if ask.batches else 1
    try:
        for member in crew:
            member.begin(waiting)
        while any(member.plan for member in crew):
            working = [member for member in crew if member.plan and member.asks is None]
            asking = [member for member in crew if member.asks is not None]
            patience = min((member.patience(time_limit) for member in working), default=0.0)
            ready = pool.wait([member.seat for member in working], 0 if asking else max(0.0, patience))
            for member in working:
                if member.seat in ready:
                    ended = member.hear()
                elif member.patience(time_limit) < 0:
                    late = TimeLimitError(f"no answer for {time_limit:g} s (time limit)")
                    ended = member.give_up(late, "worker")
                else:
                    continue
                if ended is not None:
                    yield ended
                if member.plan is None:
                    member.begin(waiting)
            if asking and not ready:
                _answer(asking[:batch_size], ask)
    finally:
        ask.close()
        for member in crew:
            member.seat.stop()


class _Member:
    """A simulator, what it does, and since when."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.seat: Seat = pool.start()
        self.plan: EpisodePlan | None = None
        self.asks: Observation | None = None
        self._since = 0.0
        self._tries = 0
        self._task: Task | None = None
        self._placed = False

    def begin(self, waiting: _Queue) -> None:
        """Take an episode, if there is one, best of the task whose simulator is there."""
        self.plan, self._tries = waiting.take(self._task), 0
        if self.plan is None:
            self.seat.stop()  # its core may be what another one waits for
        else:
            self._task = self.plan.task
            self._try()

    def patience(self, limit: float) -> float:
        """Seconds that it may still take for its answer."""
        now = time.monotonic()
        if not self._placed:
            self._placed, self._since = self.seat.has_place, now
        return self._since + limit - now

    def tell(self, message: Act | Fail) -> None:
        """Pass the policy's answer on."""
        self.asks = None
        self._send(message)

    def hear(self) -> tuple[EpisodePlan, EpisodeEnd, int] | None:
        """Take its answer; returns the episode if it has ended."""
        try:
            event, failure = self.seat.answer()
        except WorkerKilledError as error:
            return self.give_up(error, "worker")
        if isinstance(failure, ENDING):
            raise failure
        if failure is not None:
            return self.give_up(failure, "simulator")
        if isinstance(event, EpisodeEnd):
            return self._end(event)
        self.asks = event
        if event is None:  # a sign of life
            self._send(GoOn())
        return None

    def give_up(self, error: Exception, origin: Any) -> tuple[EpisodePlan, EpisodeEnd, int] | None:
        """Start a fresh process, and the episode once more; returns it if it was tried often enough."""
        self.seat.stop()
        self.seat = self._pool.start()
        if self._tries < TRIES:
            self._try()
            return None
        return self._end(EpisodeEnd(error=EpisodeFault.of(origin, error)))

    def _try(self) -> None:
        assert self.plan is not None
        self._tries += 1
        self._placed = False
        self._send(Begin(self.plan))

    def _send(self, message: Message) -> None:
        self._since = time.monotonic()
        self.seat.send(message)

    def _end(self, event: EpisodeEnd) -> tuple[EpisodePlan, EpisodeEnd, int]:
        assert self.plan is not None
        ended, self.plan = (self.plan, event, self._tries), None
        return ended


class _Queue:
    """Episodes by task; tasks with most left to do come first, so that the end is not left to one worker."""

    def __init__(self, plans: Iterable[EpisodePlan]) -> None:
        self._left: dict[Task, list[EpisodePlan]] = defaultdict(list)
        for plan in plans:
            self._left[plan.task].append(plan)

    def take(self, task: Task | None) -> EpisodePlan | None:
        """The next episode, of this task if there is one left."""
        if not self._left:
            return None
        if task not in self._left:
            task = max(self._left, key=lambda key: sum(plan.max_steps for plan in self._left[key]))
        plan = self._left[task].pop(0)
        if not self._left[task]:
            del self._left[task]
        return plan


def _answer(asking: Sequence[_Member], ask: _Asker) -> None:
    """Have the policy answer; an observation that makes it raise costs the others of the batch nothing."""
    observations = [member.asks for member in asking if member.asks is not None]
    try:
        chunks = ask(observations)
    except PolicyTimeLimitError:
        raise
    except Exception as error:  # noqa: BLE001 -- told to the episode that it belongs to
        if len(asking) == 1:
            asking[0].tell(Fail(EpisodeFault.of("policy", error)))
            return
        for member in asking:
            _answer([member], ask)
        return
    for member, chunk in zip(asking, chunks, strict=True):
        member.tell(Act(chunk))


class _Asker:
    """The policy in a thread of its own, since nobody can interrupt one that hangs.

    Attributes:
        batches: whether it answers several at once.
    """

    def __init__(self, policy: Policy, time_limit: float) -> None:
        self.batches = hasattr(policy, "act_batch")
        self._policy, self._limit = policy, time_limit
        self._questions: queue.SimpleQueue[Sequence[Observation] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __call__(self, observations: Sequence[Observation]) -> Sequence[Any]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, daemon=True)
            self._thread.start()
        self._questions.put(observations)
        try:
            chunks, failure = self._answers.get(timeout=self._limit)
        except queue.Empty:
            raise PolicyTimeLimitError(
                f"the policy gave no answer for {self._limit:g} s (time limit); episodes that have ended are "
                "recorded: run the same command again to go on"
            ) from None
        if failure is not None:
            raise failure
        return chunks

    def close(self) -> None:
        """Let the thread end, which holds the policy; one that hangs cannot be helped."""
        self._questions.put(None)

    def _serve(self) -> None:
        while (observations := self._questions.get()) is not None:
            try:
                self._answers.put((self._act(observations), None))
            except BaseException as error:  # noqa: BLE001 -- raised where it was asked
                self._answers.put((None, error))

    def _act(self, observations: Sequence[Observation]) -> Sequence[Any]:
        if len(observations) == 1:
            return [self._policy.act(observations[0])]
        chunks = self._policy.act_batch(observations)  # type: ignore[attr-defined]
        if len(chunks) != len(observations):
            raise ValueError(f"act_batch gave {len(chunks)} chunks for {len(observations)} observations")
        return chunks
