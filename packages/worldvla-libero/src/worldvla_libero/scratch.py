"""A folder that lives as long as this process, for what libraries would write into the user's home."""

from __future__ import annotations

import atexit
import functools
import os
import tempfile
from pathlib import Path


@functools.cache
def scratch_folder() -> Path:
    """The folder; worker processes that are started after it was made may share what lies in it."""
    folder = tempfile.TemporaryDirectory(prefix="worldvla-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def prepare_matplotlib() -> None:
    """Keep matplotlib out of the home folder; called before it is first imported.

    Only where the user has neither set a folder nor one of theirs exists.
    """
    config_home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    if "MPLCONFIGDIR" not in os.environ and not (config_home / "matplotlib").is_dir():
        os.environ["MPLCONFIGDIR"] = str(scratch_folder())
