"""One simulator for all tests: building a scene takes seconds."""

from collections.abc import Iterator

import pytest

from worldvla_libero.simulator import Simulator
from worldvla_libero.suites import load_suite


@pytest.fixture(scope="session")
def simulator() -> Iterator[Simulator]:
    with Simulator(load_suite("libero_goal").task(0), image_size=128) as simulator:
        yield simulator
