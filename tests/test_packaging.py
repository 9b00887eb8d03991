"""The wheels as a user gets them: built, installed each alone into an empty environment, and used there."""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ["worldvla-tokenizers", "worldvla-model", "worldvla-libero"]
SCRIPTS = "Scripts" if os.name == "nt" else "bin"

pytestmark = pytest.mark.slow
each_package = pytest.mark.parametrize("package", PACKAGES)


def _run(*command: str | Path, cwd: Path) -> str:
    # The home and the user's package index must hold here too; what points to our own environment must not.
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _module_files(package: str) -> list[str]:
    source = ROOT / "packages" / package / "src"
    return [
        path.relative_to(source).as_posix()
        for path in (source / package.replace("-", "_")).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]


def _wheel(dist: Path, package: str) -> Path:
    (wheel,) = dist.glob(f"{package.replace('-', '_')}-*.whl")
    return wheel


@pytest.fixture(scope="module")
def uv() -> str:
    found = os.environ.get("UV") or shutil.which("uv")  # `uv run` names its own executable in UV
    assert found, "uv: not found on PATH; install it with `pip install uv`"
    return found


@pytest.fixture(scope="module")
def dist(uv, tmp_path_factory) -> Path:
    """Folder with a wheel of every package; uv builds each out of its source archive, which is so tested too."""
    folder = tmp_path_factory.mktemp("dist")
    _run(uv, "build", "--quiet", "--all-packages", "--out-dir", folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def python_with(uv, dist) -> Iterator[Callable[[str], Path]]:
    """Maps a package to the Python of an environment with its wheel and what that declares.

    There are two: NumPy only, and torch; the simulator's package comes into that of the model's, once the model's
    has shown what it declares.
    """
    # Not tmp_path: pytest keeps the folders of its last three runs, and these take gigabytes.
    with tempfile.TemporaryDirectory(prefix="worldvla-wheels-") as folder:
        # The versions of the present environment, so that somebody's release of tomorrow does not fail this test.
        frozen = _run(uv, "pip", "freeze", "--exclude-editable", "--python", sys.executable, cwd=dist)
        versions = Path(folder) / "versions.txt"
        versions.write_text("\n".join(line for line in frozen.splitlines() if "==" in line), "utf-8")

        @functools.cache
        def environment(name: str) -> Path:
            _run(uv, "venv", "--quiet", "--python", sys.executable, Path(folder) / name, cwd=dist)
            return Path(folder) / name / SCRIPTS / "python"

        @functools.cache
        def install(package: str) -> Path:
            python = environment("numpy" if package == "worldvla-tokenizers" else "torch")
            # The folder offers the sibling wheels; that they come along shows that the package declares them.
            options = ["--quiet", "--python", python, "--find-links", dist, "--constraints", versions]
            _run(uv, "pip", "install", *options, _wheel(dist, package), cwd=dist)
            return python

        yield install


@each_package
def test_wheel_holds_the_whole_package_and_nothing_else(dist, package):
    names = zipfile.ZipFile(_wheel(dist, package)).namelist()
    assert set(_module_files(package)) <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {package.replace("-", "_")}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.parametrize(
    ("package", "whole"),
    [  # in this order: an environment must not hold yet what a later package brings
        ("worldvla-tokenizers", []),
        # It asks for the tokenizers' extras, so there every module of theirs must load.
        ("worldvla-model", ["worldvla-tokenizers", "worldvla-model"]),
        ("worldvla-libero", ["worldvla-libero"]),
    ],
)
def test_wheel_alone_imports(uv, python_with, package, whole, tmp_path):
    python, module = python_with(package), package.replace("-", "_")
    files = [file for each in whole for file in _module_files(each) if file.endswith(".py")]
    names = [file.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for file in files]
    assert bool(names) == bool(whole)
    program = f"""
import importlib
from importlib.metadata import version
import {module}
print({module}.__file__, version("{package}"))
for name in {[name for name in names if not name.endswith(".__main__")]}:
    importlib.import_module(name)
"""
    where, version = _run(python, "-c", program, cwd=tmp_path).rsplit(maxsplit=1)
    assert not Path(where).is_relative_to(ROOT), "the checkout was imported, not the wheel"
    project = tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text("utf-8"))["project"]
    assert version == project["version"]
    _run(uv, "pip", "check", "--python", python, cwd=tmp_path)


def test_tokenizers_bring_numpy_only(uv, python_with):
    python = python_with("worldvla-tokenizers")
    listed = json.loads(_run(uv, "pip", "list", "--format", "json", "--python", python, cwd=python.parent))
    assert {package["name"] for package in listed} == {"numpy", "worldvla-tokenizers"}


def test_actions_round_trip_with_numpy_only(python_with, tmp_path):
    program = """
import sys
import numpy as np
from worldvla_tokenizers import ActionTokenizer

tokenizer = ActionTokenizer(low=[-1.0, -2.0, 0.0], high=[1.0, 2.0, 10.0])
actions = np.random.default_rng(0).uniform([-0.9, -1.9, 0.1], [0.9, 1.9, 9.9], (5, 4, 3))
ids = tokenizer.encode(actions)
assert ids.shape == actions.shape and ids.dtype == np.int64
half_bin = np.array([2.0, 4.0, 10.0]) / 255 / 2
assert (abs(tokenizer.decode(ids) - actions) <= half_bin * (1 + 1e-6)).all()
tokenizer.save_pretrained("here")
assert (ActionTokenizer.from_pretrained("here").encode(actions) == ids).all()
assert not {"torch", "transformers", "tokenizers", "PIL"} & set(sys.modules)
"""
    _run(python_with("worldvla-tokenizers"), "-c", program, cwd=tmp_path)


def test_what_an_extra_brings_names_the_extra(python_with, tmp_path):
    program = """
import worldvla_tokenizers
for name in ("TextTokenizer", "ImageTokenizer"):
    try:
        getattr(worldvla_tokenizers, name)
    except ModuleNotFoundError as error:
        print(error)
"""
    text, image = _run(python_with("worldvla-tokenizers"), "-c", program, cwd=tmp_path).splitlines()
    assert "worldvla-tokenizers[text]" in text
    assert "worldvla-tokenizers[image]" in image


def test_worldvla_command_runs(python_with, tmp_path):
    command = python_with("worldvla-libero").parent / "worldvla"
    shown = _run(command, "--help", cwd=tmp_path)
    for name in ("demo", "evaluate", "convert", "doctor"):
        assert name in shown
