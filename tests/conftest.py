"""Reference answers of the published code, shared by all tests."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

# Before torch is imported, as the command does: torch's waiting threads would spin on the cores of the renderer.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Machines are noisy and CI must not depend on luck; at a desk every run draws new examples.
settings.register_profile("worldvla", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("worldvla")

PUBLISHED = Path(__file__).parent / "fixtures" / "published"


@dataclass(frozen=True)
class Published:
    """What the published code answers on small inputs; `tests/fixtures/published/README.md` describes it."""

    root: Path = PUBLISHED
    checkpoint: Path = PUBLISHED / "checkpoint"
    tokenizer: Path = PUBLISHED / "tokenizer"

    def json(self, name: str) -> Any:
        return json.loads((self.root / f"{name}.json").read_text())

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.root / f"{name}.npz") as content:
            return dict(content)

    def frame(self, episode: str, number: int) -> Image.Image:
        with Image.open(self.root / "frames" / f"{episode}_{number}.png") as image:
            return image.convert("RGB")

    def samples(self, *, size: int, kind: str | None = None) -> list[dict]:
        return [s for s in self.json("samples") if s["size"] == size and kind in (None, s["kind"])]

    def codes(self, episode: str, number: int) -> np.ndarray:
        return np.array(self.json("image_codes")[f"{episode}_{number}"]).reshape(16, 16)


@pytest.fixture(scope="session")
def published() -> Published:
    return Published()
