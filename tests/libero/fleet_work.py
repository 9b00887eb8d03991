"""Stand-ins for simulators, which a test can have fail in every way; in a module, since workers import them."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from worldvla_libero.evaluation.episode_runner import Begin, EpisodeEnd, Fail, GoOn
from worldvla_libero.evaluation.policy import Observation
from worldvla_libero.jobs.parts import StorageError


@dataclass(frozen=True)
class Trouble:
    """What goes wrong in an episode, in how many of its tries, told by a file that all processes see."""

    kind: str
    tries: int
    place: Path

    def now(self) -> bool:
        with self.place.open("ab") as file:
            file.write(b".")
            return file.tell() <= self.tries


class Runner:
    """Asks three times, shows its episode's number, and then says how often it was right."""

    def __init__(self):
        self.plan, self.answers = None, []

    def __call__(self, message):
        if isinstance(message, Begin):
            self.plan, self.answers = message.plan, []
            trouble = self._trouble()
            if trouble is not None and trouble.kind == "beats":
                self.beats = trouble.tries
                return None
            if trouble is not None and trouble.now():
                cause(trouble.kind)
        elif isinstance(message, Fail):
            return EpisodeEnd(error=message.error)
        elif isinstance(message, GoOn):
            time.sleep(1)
            self.beats -= 1
            return None if self.beats else EpisodeEnd(success=True)
        else:
            self.answers.append(float(message.actions[0, 0]))
        if len(self.answers) == 3:
            return EpisodeEnd(success=self.answers == [self.plan.episode] * 3, steps=3)
        image = np.full((2, 2, 3), self.plan.episode, np.uint8)
        return Observation((image,), self.plan.instruction, len(self.answers))

    def _trouble(self):
        """Told by the instruction: kind and number of tries."""
        if ":" not in self.plan.instruction:
            return None
        kind, tries = self.plan.instruction.split(":")
        return Trouble(kind, int(tries), self.plan.folder / f"tries-{self.plan.episode}")


def cause(kind):
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hangs":
        time.sleep(3600)
    if kind == "full":
        raise StorageError("video.mp4: cannot be written")
    if kind == "raises":
        raise RuntimeError("the contact solver diverged")


class Answers:
    """Says what it is shown; keeps count of how many were shown at once."""

    history_length = 1

    def __init__(self, slow=0.0):
        self.batches, self.slow = [], slow

    def act(self, observation):
        return self.act_batch([observation])[0]

    def act_batch(self, observations):
        self.batches.append(len(observations))
        time.sleep(self.slow)
        for observation in observations:
            if observation.instruction == "refuse" and observation.step == 1:
                raise LookupError("no such token")
            if observation.instruction == "sleep":
                time.sleep(3600)
        return [np.full((1, 7), observation.images[0][0, 0, 0], float) for observation in observations]
