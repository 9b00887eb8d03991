"""The shape of the repository: who imports whom, what each package carries, and that no index address is in it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = sorted((ROOT / "packages").iterdir())
MODULES = sorted((ROOT / "packages").glob("*/src/*/**/*.py"))

# Data flows one way, so each package may import itself and those before it.
ORDER = ["worldvla_tokenizers", "worldvla_model", "worldvla_libero"]
# Everything else in worldvla_model knows ids only, so that another tokenizer can take their place.
MAY_IMPORT_TOKENIZERS = {"processing_worldvla.py", "agent.py"}


def _imports(source: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every module that a file imports, at its top or inside a function."""
    package = source.as_posix().rsplit("/src/", 1)[1].split("/")[:-1]
    for node in ast.walk(ast.parse(source.read_text("utf-8"), str(source))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _names_module(node):
            yield node.lineno, node.args[0].value


def _names_module(call: ast.Call) -> bool:
    """Is this `importlib.import_module("…")` or `__import__("…")`?"""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    first = call.args[0] if call.args else None
    return (
        name in {"import_module", "__import__"}
        and isinstance(first, ast.Constant)
        and isinstance(first.value, str)
    )


def test_there_is_something_to_check():
    assert {path.name for path in PACKAGES} == {name.replace("_", "-") for name in ORDER}
    assert {path.relative_to(ROOT).parts[3] for path in MODULES} == set(ORDER)


@pytest.mark.parametrize("source", MODULES, ids=lambda path: "/".join(path.relative_to(ROOT).parts[3:]))
def test_imports_follow_the_data(source):
    own = source.relative_to(ROOT).parts[3]
    later = ORDER[ORDER.index(own) + 1 :]
    for line, module in _imports(source):
        top = module.split(".")[0]
        assert top not in later, (
            f"{source}:{line}: {own} may not import {module}; allowed: {ORDER[: ORDER.index(own)]}"
        )
        if own == "worldvla_model" and source.name not in MAY_IMPORT_TOKENIZERS:
            assert top != "worldvla_tokenizers", (
                f"{source}:{line}: imports {module}; in {own} only {sorted(MAY_IMPORT_TOKENIZERS)} may"
            )


def test_imports_are_found_wherever_they_hide(tmp_path):
    source = tmp_path / "src" / "worldvla_model" / "inner" / "module.py"
    source.parent.mkdir(parents=True)
    source.write_text(
        "import a.b\nfrom . import c\nfrom ..d import e\n"
        "def f():\n    from g import h\n    importlib.import_module('i.j')\n",
        "utf-8",
    )
    found = {name for _, name in _imports(source)}
    assert found == {"a.b", "worldvla_model.inner.c", "worldvla_model.d.e", "g.h", "i.j"}


def test_tokenizers_import_neither_torch_nor_its_company():
    heavy = ["torch", "transformers", "tokenizers", "PIL", "safetensors", "huggingface_hub", "taming", "yaml"]
    program = f"import sys, worldvla_tokenizers; print([name for name in {heavy} if name in sys.modules])"
    # -S would hide the editable install; a fresh interpreter is what a user of the package starts.
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_package_is_complete(package):
    module = package / "src" / package.name.replace("-", "_")
    needed = [package / name for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE")]
    needed += [module / "__init__.py", module / "py.typed"]
    assert [str(path.relative_to(ROOT)) for path in needed if not path.is_file()] == []
    assert (package / "LICENSE").read_text("utf-8") == (ROOT / "LICENSE").read_text("utf-8")


def _git(*arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, f"git {' '.join(arguments)}: {done.stderr.decode().strip()}"
    return done.stdout


# An archive of the sources has neither an index nor ignored files to tell apart; there these two have no subject.
needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")

# One letter of each name in brackets, so that this file does not hold what it looks for.
_INDEX_ADDRESS = re.compile(
    r"""py[p]i\.org|python[h]osted\.org|download\.py[t]orch\.org
    |https?://(?!index\.invalid/)[^\s"'<>]+/sim[p]le(?:/|\b)
    |--(?:default-|extra-)?inde[x](?:-url)?[ =]+["']?(?:https?|file):
    |--find-link[s][ =]+["']?(?:https?|file):
    |(?:PIP|UV)_(?:DEFAULT_|EXTRA_)?INDE[X](?:_URL)?[ =:]+["']?(?:https?|file):
    |tool\.uv\.inde[x]\b""",
    re.VERBOSE,
)


@pytest.mark.parametrize(
    "line",
    [
        "https://py~pi.org/project/x",
        "https://files.python~hosted.org/packages/x.whl",
        "https://mirror.example/sim~ple",
        "pip install --index~-url https://example",
        "UV_DEFAULT_INDEX~=http://example",
        "[[tool.uv.in~dex]]",
    ],
)
def test_index_addresses_are_recognised(line):
    assert _INDEX_ADDRESS.search(line.replace("~", ""))


def test_other_lines_are_no_index_addresses():
    assert not _INDEX_ADDRESS.search('registry = "https://index.invalid/simple", on PyPI, --find-links dist')


@needs_git
def test_no_address_of_a_package_index():
    # With the files that the next commit may add. uv.lock has its own test: the copy in the working tree is uv's.
    listed = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard").decode().split("\0")
    files = [ROOT / name for name in listed if name not in {"", "uv.lock"}]
    found = {
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        if path.is_file() and (match := _INDEX_ADDRESS.search(path.read_text("utf-8", errors="ignore")))
    }
    assert not found


@needs_git
def test_committed_lock_has_no_address():
    held = _git("show", ":uv.lock").decode()
    others = set(re.findall(r"[a-z][a-z0-9+.-]*://[^\s\"']*", held)) - {"https://index.invalid/simple"}
    if others:
        pytest.fail(f"{len(others)} addresses, such as {min(others)}; mend it with `python tools/lock.py`")
    assert "[manifest]" not in held, "uv would take the file for a complete one, placeholder and all"
