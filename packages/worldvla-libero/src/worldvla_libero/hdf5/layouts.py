"""How people write demonstrations into HDF5: where words, scenes, frames and proprioception are, and in what form.

LIBERO's own files (raw, and as its `create_dataset.py` leaves them), robosuite's and robomimic's, RoboCasa's, and
what scripts of the field make of them agree on one thing: a group `data` with a group for each episode. All else
differs, and is known here and nowhere else.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from worldvla_libero.conventions import proprioception
from worldvla_libero.data.episodes import EpisodeError, Frames, Reason
from worldvla_libero.hdf5.probe import Identity, fault_of, identity, open_file
from worldvla_tokenizers.signatures import Kind, misnamed

# LIBERO's cameras, by their keys in `obs`.
LIBERO_CAMERAS = {"agentview_rgb": "agentview", "eye_in_hand_rgb": "robot0_eye_in_hand"}

# Attributes that hold words, and those that hold JSON with words in it: LIBERO's problem_info, RoboCasa's ep_meta.
_WORDS = ("language_instruction", "task_description", "instruction", "lang", "language")
_JSON_WITH_WORDS = ("ep_meta", "problem_info")

_IMAGE_NAME = re.compile(r"rgb|colou?r|image|img|cam|view|pixels", re.IGNORECASE)
_NO_IMAGE_NAME = re.compile(r"depth|seg|mask|normal|extrinsic|intrinsic|pose|pos|quat", re.IGNORECASE)
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_FRAMES_NEEDED = (
    "needed: (T, H, W, 3 or 4) or (T, 3 or 4, H, W), 8-bit or real numbers from 0 to 1 or to 255; or T times the "
    "bytes of a JPEG or PNG"
)


class FileInUseError(OSError):
    """A file that another process is writing. Nothing is wrong with it: later it can be read."""


@contextmanager
def opened(file: Path, *, tried: Identity | None = None) -> Iterator[h5py.File]:
    """An HDF5 file with a group `data`.

    Args:
        file: its path.
        tried: the file's identity when it was opened before, and the library survived it.

    Raises:
        EpisodeError: it is no such file, or truncated, or the HDF5 library does not survive it.
        FileInUseError: another process has it open for writing.
    """
    fault = fault_of(file) if tried is None or identity(file) != tried else None
    if fault is not None:
        raise EpisodeError(
            Reason.UNREADABLE,
            f"{file.name}: damaged, or still being written: the HDF5 library {fault} when it reads it; remedy: "
            "copy or download the file again",
        )
    try:
        content = open_file(file)
    except BlockingIOError as error:
        raise FileInUseError(f"{file} is in use: another process writes it; try again later") from error
    except OSError as error:
        words = " ".join(str(error).split())
        if "already open for write" in words:
            raise FileInUseError(
                f"{file} is marked as in use: another process writes it, or one did and was killed; try again "
                f"later, or take the mark off: h5clear -s {file.name}"
            ) from error
        wrong = misnamed(file, "HDF5 file", Kind.HDF5, called=file.name) if file.is_file() else None
        message = wrong or f"{file.name}: truncated, damaged, or still being copied ({words})"
        raise EpisodeError(Reason.UNREADABLE, message) from error
    with content:
        try:
            data, names = content.get("data"), ", ".join(content) or "nothing"
        except (OSError, RuntimeError, KeyError, ValueError) as error:  # h5py has no type of its own for damage
            raise EpisodeError(
                Reason.UNREADABLE, f"{file.name}: damaged ({' '.join(str(error).split())})"
            ) from error
        if not isinstance(data, h5py.Group):
            raise EpisodeError(
                Reason.MISSING_KEY, f"{file.name}: no group 'data'; LIBERO's layout needed, found {names}"
            )
        yield content


def natural(name: str) -> tuple[str | int, ...]:
    """Sorts demo_2 before demo_10."""
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name))


# Words


def text_of(value: Any) -> str:
    """The text of an attribute, as h5py gives it: str, bytes, an array of one text or of a sentence's words.

    Raises:
        ValueError: several texts that are no words of one sentence.
    """
    if value is None or isinstance(value, h5py.Empty):
        return ""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray | list | tuple):
        parts = [text_of(part) for part in np.ravel(np.asarray(value, dtype=object))]
        if len(set(parts)) < 2:  # none, one, or the same for every step
            return parts[0] if parts else ""
        if any(" " in part for part in parts):
            raise ValueError(f"{len(set(parts))} texts ({'; '.join(dict.fromkeys(parts))}); one needed")
        return " ".join(parts)
    return str(value)


def json_of(value: Any) -> Mapping[str, Any]:
    """The object in an attribute of JSON; some writers encode it twice.

    Raises:
        ValueError: no JSON, or JSON that is no object.
    """
    content = value
    for _ in range(2):
        content = json.loads(text_of(content))
        if not isinstance(content, str):
            break
    if not isinstance(content, dict):
        raise ValueError(f"{type(content).__name__} where an object is needed")
    return content


def words_of(id: str, demo: h5py.Group, data: h5py.Group) -> str | None:
    """The instruction of an episode, from wherever it stands: the episode itself, `data`, or the file.

    Returns:
        None where nothing says it.

    Raises:
        EpisodeError: it should stand somewhere and does not: nothing, broken JSON, or several instructions.
    """
    complaint: EpisodeError | None = None
    for holder in (demo, data, data.parent):
        where = "the file" if holder.name == "/" else repr(holder.name.rpartition("/")[2])
        values = {name: holder.attrs[name] for name in (*_WORDS, *_JSON_WITH_WORDS) if name in holder.attrs}
        for name in _WORDS:
            if name not in values and isinstance(array := holder.get(name), h5py.Dataset):
                values[name] = array[()]
        for name, value in values.items():
            try:
                words = _words_in_json(value) if name in _JSON_WITH_WORDS else text_of(value)
            except (ValueError, TypeError) as error:
                message = f"{id}: attribute {name!r} of {where} holds no 'language_instruction' ({error})"
                complaint = complaint or EpisodeError(Reason.MISSING_KEY, message)
                continue
            if words := words.strip().strip('"').strip():
                return words
            message = f"{id}: the instruction is empty; words are needed in attribute {name!r} of {where}"
            complaint = complaint or EpisodeError(Reason.MISSING_KEY, message)
    if complaint is not None:
        raise complaint
    return None


def _words_in_json(value: Any) -> str:
    content = json_of(value)
    for name in _WORDS:
        if name in content:
            return text_of(content[name])
    raise ValueError(f"keys are {', '.join(content) or 'none'}")


def scene_of(data: h5py.Group) -> str | None:
    """LIBERO's own name of the task: that of the scene's BDDL file, a path on whoever's machine it was."""
    for holder in (data, data.parent):
        arguments = _environment_arguments(holder)
        inner = arguments.get("env_kwargs")
        candidates = [holder.attrs.get("bddl_file_name")]
        candidates += [(inner if isinstance(inner, dict) else {}).get("bddl_file_name")]
        candidates += [arguments.get("bddl_file_name"), arguments.get("bddl_file")]
        for candidate in candidates:
            # Splits at both kinds of slash.
            if stem := PureWindowsPath(text_of(candidate).strip()).name.removesuffix(".bddl"):
                return stem
    return None


def environment_of(data: h5py.Group) -> str | None:
    """Name of the environment that a file was recorded in (`Lift`, `Isaac-Stack-Cube-…`), where it means a task.

    LIBERO's environments are named after the furniture, which many tasks share.
    """
    for holder in (data, data.parent):
        for candidate in (_environment_arguments(holder).get("env_name"), holder.attrs.get("env")):
            name = text_of(candidate).strip()
            if name and not name.lower().startswith("libero_"):
                return name
    return None


def control_rate_of(data: h5py.Group) -> float | None:
    """Actions a second [Hz]: ours, or what robosuite was told; None where nothing says it."""
    if "control_hz" in data.attrs:
        return float(data.attrs["control_hz"])
    for holder in (data, data.parent):
        inner = _environment_arguments(holder).get("env_kwargs")
        if isinstance(inner, dict) and isinstance(rate := inner.get("control_freq"), int | float) and rate > 0:
            return float(rate)
    return None


def _environment_arguments(holder: h5py.Group) -> Mapping[str, Any]:
    """Robomimic's `env_args`; empty where there is none, or none that is read."""
    try:
        return json_of(holder.attrs.get("env_args", "{}"))
    except ValueError:  # of an environment that is not known here; nothing else is read from it
        return {}


def is_raw(data: h5py.Group) -> bool:
    """Whether episodes are meant to be replayed: they name a LIBERO scene, and hold states to replay from."""
    if "bddl_file_name" not in data.attrs and "bddl_file_name" not in data.parent.attrs:
        return False
    first = next((demo for demo in data.values() if isinstance(demo, h5py.Group)), None)
    return first is None or "states" in first


# Frames


def cameras_of(demo: h5py.Group) -> dict[str, str]:
    """Key in `obs` of each camera, LIBERO's first: whatever is stored as colour images are."""
    observed = _observed(demo)
    keys = [key for key in LIBERO_CAMERAS if isinstance(observed.get(key), h5py.Dataset)]
    keys += [key for key in observed if key not in keys and _form(key, observed[key]) is not None]
    return {LIBERO_CAMERAS.get(key, key): key for key in keys}


def _observed(demo: h5py.Group) -> Mapping[str, Any]:
    observed = demo.get("obs", {})
    if isinstance(observed, h5py.Dataset):
        raise TypeError("'obs' is an array; a group needed")
    return observed


def unread_images_of(demo: h5py.Group) -> list[str]:
    """What is called like an image and cannot be read as one, with shape and type."""
    observed = _observed(demo)
    return [
        f"{key} is {observed[key].shape} {observed[key].dtype}"
        for key in observed
        if isinstance(observed[key], h5py.Dataset) and _is_called_image(key) and _form(key, observed[key]) is None
    ]


def frames_of(id: str, demo: h5py.Group, camera: str) -> Frames:
    """(T, H, W, 3) frames of a camera, upright.

    LIBERO's frames lie as OpenGL draws them, rows upwards, and are turned by 180°, as all published LIBERO data
    are. Where the file says that robosuite has flipped them already (`macros_image_convention` is `opencv`), what
    is left of that turn is to exchange left and right. Other robots' frames stay as they are.

    Raises:
        EpisodeError: they have no shape or values that images have; the message names both.
    """
    key = cameras_of(demo)[camera]
    array = demo["obs"][key]
    match _form(key, array):
        case "rows, columns, colours":
            frames = _eight_bit(id, camera, array[:])
        case "colours, rows, columns":
            frames = _eight_bit(id, camera, np.moveaxis(array[:], 1, 3))
        case "encoded":
            frames = _decoded(id, camera, array)
        case _:
            raise EpisodeError(
                Reason.BAD_FRAMES,
                f"{id}: frames of {camera!r} have shape {array.shape} and type {array.dtype}; {_FRAMES_NEEDED}",
            )
    if key in LIBERO_CAMERAS:
        flipped = _image_convention(demo) == "opencv"
        frames = frames[:, :, ::-1] if flipped else frames[:, ::-1, ::-1]
    return np.ascontiguousarray(frames[..., :3])


def _image_convention(demo: h5py.Group) -> str:
    for holder in (demo, demo.parent, demo.parent.parent):
        for name in ("macros_image_convention", "image_convention"):
            if name in holder.attrs:
                return text_of(holder.attrs[name]).strip().lower()
    return "opengl"


def _is_called_image(key: str) -> bool:
    return bool(_IMAGE_NAME.search(key)) and not _NO_IMAGE_NAME.search(key)


def _form(key: str, array: Any) -> str | None:
    """How frames are stored; None if these are none.

    Eight-bit arrays with three or four colours are images whatever they are called; real numbers could as well be
    points or forces and are images where the name says so.
    """
    if not isinstance(array, h5py.Dataset) or not array.shape:
        return None
    if array.ndim in (1, 2) and _first_bytes(array).startswith((_JPEG, _PNG)):
        return "encoded"
    if array.ndim != 4 or array.dtype.kind not in "uif" or not (array.dtype == np.uint8 or _is_called_image(key)):
        return None
    if array.shape[3] in (3, 4):
        return "rows, columns, colours"
    return "colours, rows, columns" if array.shape[1] in (3, 4) else None


def _first_bytes(array: h5py.Dataset) -> bytes:
    """Of the first of T images, if they are stored as bytes: of varying length, padded rows, or strings."""
    if not len(array) or array.dtype.kind not in "OSVu":
        return b""
    if array.ndim == 2:
        return bytes(array[0, :8]) if array.dtype == np.uint8 else b""
    return _bytes(array[0])[:8]


def _bytes(cell: Any) -> bytes:
    if isinstance(cell, np.ndarray):
        return cell.tobytes() if cell.dtype == np.uint8 else b""
    return cell.tobytes() if isinstance(cell, np.void) else cell if isinstance(cell, bytes) else b""


def _eight_bit(id: str, camera: str, values: NDArray) -> Frames:
    if values.dtype == np.uint8 or not values.size:
        return values.astype(np.uint8, copy=False)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):  # NaN is neither
        raise EpisodeError(
            Reason.BAD_FRAMES,
            f"{id}: frames of {camera!r}, shape {values.shape} and type {values.dtype}, have values from {low:g} "
            f"to {high:g}; allowed: 0 to 1, or 0 to 255",
        )
    if values.dtype.kind == "f" and high <= 1:
        values = values * 255.0
    return np.rint(values).astype(np.uint8)


def _decoded(id: str, camera: str, cells: h5py.Dataset) -> Frames:
    frames = []
    for t, cell in enumerate(cells):
        try:
            with Image.open(io.BytesIO(_bytes(cell))) as image:
                frames.append(np.asarray(image.convert("RGB")))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise EpisodeError(
                Reason.BAD_FRAMES, f"{id}: frame {t} of {camera!r} is no image ({error})"
            ) from error
        if frames[t].shape != frames[0].shape:
            raise EpisodeError(
                Reason.BAD_FRAMES,
                f"{id}: frame {t} of {camera!r} has shape {frames[t].shape}, frame 0 has {frames[0].shape}",
            )
    return np.stack(frames)


# Proprioception

_ROBOMIMIC = ("robot0_gripper_qpos", "robot0_eef_pos", "robot0_eef_quat")  # in the order of LIBERO's robot_states


def proprioception_of(demo: h5py.Group, *, raw: bool) -> NDArray[np.float64] | None:
    """(T, S) proprioception; None where there is none, or none that fits the actions.

    No episode is lost for it: whoever needs it looks whether it is there.
    """
    observed = _observed(demo)
    steps = len(demo["actions"])
    if "proprioception" in observed:
        return _columns(observed["proprioception"], steps)
    if all(key in observed for key in _ROBOMIMIC):
        states = _joined(observed, _ROBOMIMIC, steps)
        return proprioception(states) if states is not None and states.shape[1] == 9 else None
    hand = ("ee_states",) if "ee_states" in observed else ("ee_pos", "ee_ori")
    if all(key in observed for key in (*hand, "gripper_states")):
        return _joined(observed, (*hand, "gripper_states"), steps)
    states = robot_states_of(demo) if raw else None
    if states is not None:
        return proprioception(states) if len(states) == steps else None
    return _columns(demo["robot_states"], steps) if "robot_states" in demo else None


def robot_states_of(demo: h5py.Group) -> NDArray[np.float64] | None:
    """(T or 1, 9) what LIBERO's raw files call `robot_states`; None where there is none of this form.

    Like the states of the simulator, raw files may hold the first row alone.
    """
    if "robot_states" not in demo:
        return None
    states = _columns(demo["robot_states"], len(demo["actions"]))
    if states is None and (of_simulator := simulator_states_of(demo)) is not None:
        states = _columns(demo["robot_states"], len(of_simulator))
    return states if states is not None and states.shape[1] == 9 else None


def simulator_states_of(demo: h5py.Group) -> NDArray[np.float64] | None:
    """(T or 1, S) states of the simulator; None where there are none of this form, which only a replay needs."""
    array = demo.get("states")
    if not isinstance(array, h5py.Dataset) or array.dtype.kind not in "uif" or array.ndim != 2:
        return None
    return np.asarray(array, dtype=np.float64)


def _joined(observed: Mapping[str, Any], keys: Sequence[str], steps: int) -> NDArray[np.float64] | None:
    """(T, S) the columns of several data sets side by side; None where one of them does not fit."""
    parts = [_columns(observed[key], steps) for key in keys]
    found = [part for part in parts if part is not None]
    return np.concatenate(found, axis=1) if len(found) == len(keys) else None


def _columns(array: Any, steps: int) -> NDArray[np.float64] | None:
    """(T,) or (T, S) numbers → (T, S) float64; None for anything else."""
    if not isinstance(array, h5py.Dataset) or array.dtype.kind not in "uifb" or array.ndim not in (1, 2):
        return None
    if len(array) != steps:
        return None
    values = np.asarray(array, dtype=np.float64)
    return values[:, None] if values.ndim == 1 else values
