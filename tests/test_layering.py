"""The shape of the repository: who imports whom, what each package carries, and that no index address is in it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent
PACKAGES = sorted((ROOT / "packages").iterdir())


def test_imports_keep_the_contracts(monkeypatch):
    """Those in `pyproject.toml`: which package and which room may import which, and that there are no circles."""
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_logo=True, no_cache=True) == 0


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
