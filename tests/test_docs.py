"""Runs the code of the documentation: README.md, docs/, the packages' READMEs, and the scripts in examples/.

The Python blocks of a page share one namespace and run in order, in an empty folder where `tests/fixtures/…` leads
to the fixtures, as it does from the root of the checkout. In shell blocks the `worldvla` commands run. A comment
on the line above marks a block that the everyday run cannot afford; only marked blocks may build on a marked one:

    <!-- test: slow -->      runs with `pytest -m slow`
    <!-- test: campaign -->  runs with `pytest -m campaign`
    <!-- test: hub -->       needs the network: only its imports, attributes, arguments and options are checked
"""

import ast
import contextlib
import functools
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from worldvla_libero.cli.main import main

ROOT = Path(__file__).parent.parent
PAGES = [
    p for pattern in ("README.md", "docs/**/*.md", "packages/*/README.md") for p in sorted(ROOT.glob(pattern))
]
BLOCK = re.compile(
    r"^(?: *<!-- test: (?P<mark>.*?) -->\n\n?)?"
    r"(?P<indent> *)```(?:(?P<python>python|py)|console|bash|shell|sh) *\n(?P<code>.*?)(?:^ *``` *$|\Z)",
    re.MULTILINE | re.DOTALL,
)
SETS = ("slow", "campaign")
# Commands that a page may show and no test runs: they set things up, or are what CI itself consists of.
NOT_RUN = re.compile(
    r"(git|cd|apt-get|(uv )?pip|uv (sync|add|build)|uv run (pytest|ruff|mypy|pre-commit)|bash \.ci/run)\b"
)


@dataclass(frozen=True)
class Block:
    page: str
    number: int  # from 1, among the blocks of its page that this file tests
    line: int  # where its code begins
    is_python: bool
    code: str
    mark: str | None

    def __str__(self):
        return f"{self.page}[{self.number}]"


def blocks(page: str, text: str) -> list[Block]:
    found = []
    for number, match in enumerate(BLOCK.finditer(text), 1):
        line = text.count("\n", 0, match.start("code")) + 1
        mark = match["mark"]
        assert mark in {None, "hub", *SETS}, f"{page}, line {line}: {mark}; allowed: {', '.join(SETS)}, hub"
        code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        found.append(Block(page, number, line, bool(match["python"]), code, mark))
    return found


def run_python(block: Block, names: dict[str, object]) -> None:
    file = str(ROOT / block.page)
    try:
        tree = ast.increment_lineno(ast.parse(block.code), block.line - 1)
        if block.mark == "hub":
            check_names(tree, names)
        else:
            exec(compile(tree, file, "exec"), names)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = lines[-1] if lines else block.line
        raise AssertionError(f"{block}, line {line}: {type(error).__name__}: {error}") from error


def check_names(tree: ast.Module, names: dict[str, object]) -> None:
    """Do the imports, and hold the attributes and calls of what is then known against the real thing."""
    assigned = {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    unknown = object()

    def value(node: ast.expr) -> object:
        if isinstance(node, ast.Attribute):
            owner = value(node.value)
            return owner if owner is unknown else getattr(owner, node.attr)
        return names.get(node.id, unknown) if isinstance(node, ast.Name) and node.id not in assigned else unknown

    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), "imports", "exec"), names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            value(node)
        elif isinstance(node, ast.Call) and callable(called := value(node.func)):
            inspect.signature(called).bind(*node.args, **{word.arg: None for word in node.keywords if word.arg})


def run_shell(block: Block, folder: Path) -> None:
    lines = block.code.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):  # where there are prompts, the other lines are output
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    for command in filter(None, (shlex.join(shlex.split(line, comments=True)) for line in lines)):
        worldvla = re.match(r"(?:uv run )?worldvla\b(.*)", command)
        script = re.match(r"(?:uv run )?python (\S+\.py)", command)
        shell = re.match(r"(?:env .* )?bash (examples/\S+\.sh)", command)
        launch = re.match(r"accelerate launch (.*) -m worldvla_libero.cli (\w+) (.*)", command)
        if worldvla:
            arguments = shlex.split(worldvla[1])
            options = [word.split("=")[0] for word in arguments if word.startswith("--")]
            if block.mark != "hub":
                run_command(["worldvla", *arguments], block, folder)
            else:
                told = help_of("worldvla", *arguments[:1])
                unknown = [option for option in options if option not in told]
                assert not unknown, f"{block}: {command}: no such options: {unknown}"
        elif shell and block.mark:
            check = ["bash", "-n", str(ROOT / shell[1])] if block.mark == "hub" else ["bash", "-c", command]
            run_command(check, block, folder)
        elif launch and block.mark == "hub":
            launch_command_parser().parse_args(
                [*shlex.split(re.sub(r"\$\w+", "1", launch[1])), "-m", "worldvla_libero.cli"]
            )
            told = help_of("worldvla", launch[2])
            unknown = [option for option in re.findall(r"--[\w-]+", launch[3]) if option not in told]
            assert not unknown, f"{block}: {command}: no such options: {unknown}"
            for file in re.findall(r"examples/\S+", launch[1]):
                assert (ROOT / file).is_file(), f"{block}: {command}: no such file"
        elif script:
            assert (ROOT / script[1]).is_file(), f"{block}: {command}: no such file"
        else:
            assert NOT_RUN.match(command), f"{block}: {command}: no test runs or knows this command"


# The main job is shown as its user starts it, and training settles for a whole process how it computes.
OF_THEIR_OWN = {"demo", "train", "train-tokenizer"}


def run_command(command: list[str], block: Block | str, folder: Path) -> str:
    if command[0] == "worldvla" and ({"--help", "--list"} & {*command} or not OF_THEIR_OWN & {*command[1:2]}):
        return run_here(command, block)
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": programs},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{block}: {shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_here(command: list[str], block: Block | str) -> str:
    """In this process, which has paid for the imports."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = main(command[1:])
        except SystemExit as ended:  # after --help, and where an argument is not understood
            code = ended.code
    assert not code, f"{block}: {shlex.join(command)}\n{printed.getvalue()}"
    return printed.getvalue()


@functools.cache
def help_of(*program: str) -> str:
    return run_command([*program, "--help"], "--help", ROOT)


TESTED = [block for page in PAGES for block in blocks(page.relative_to(ROOT).as_posix(), page.read_text("utf-8"))]


@pytest.fixture(scope="module")
def state_of(tmp_path_factory):
    """Maps a page to its folder, its namespace and those of its blocks that have run."""

    @functools.cache
    def start(page: str) -> tuple[Path, dict[str, object], set[Block]]:
        folder = tmp_path_factory.mktemp("page")
        (folder / "tests").mkdir()
        (folder / "tests" / "fixtures").symlink_to(ROOT / "tests" / "fixtures", target_is_directory=True)
        (folder / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
        return folder, {"__name__": "__main__"}, set()

    return start


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=str(block), marks=getattr(pytest.mark, block.mark) if block.mark in SETS else ())
        for block in TESTED
    ],
)
def test_block(block, state_of, monkeypatch):
    folder, names, done = state_of(block.page)
    monkeypatch.chdir(folder)
    # Chosen alone, as by -k or -m slow, a block still finds what the Python before it has made.
    before = [b for b in TESTED if b.page == block.page and b.is_python and not b.mark and b.number < block.number]
    for step in [b for b in (*before, block) if b not in done and b.is_python]:
        run_python(step, names)
        done.add(step)
    if not block.is_python:
        run_shell(block, folder)


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_example(script, tmp_path):
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"


PAGE = """
<!-- test: hub -->
```python
from pathlib import Path

path = Path("x").{}
```

```json
{{}}
```

- indented
  ```python
  x = 1
  raise KeyError(x)
  ```

```console
$ {}
output
```
"""


def test_page_is_taken_apart():
    first, second, third = blocks("p.md", PAGE.format("name", "git clone x"))
    assert [str(first), first.mark, first.is_python, first.line] == ["p.md[1]", "hub", True, 4]
    assert [second.code, second.mark, second.line] == ["x = 1\nraise KeyError(x)\n", None, 15]
    assert not third.is_python
    run_python(first, {})
    run_shell(third, ROOT)
    with pytest.raises(AssertionError, match=r"p\.md\[2\], line 16: KeyError"):
        run_python(second, {})


def test_what_does_not_hold_is_named():
    with pytest.raises(AssertionError, match="sloow; allowed: slow, campaign, hub"):
        blocks("p.md", "<!-- test: sloow -->\n```python\n```\n")
    for code, message in (
        ("import os\nos.nowhere()", "nowhere"),
        ("import shlex\nshlex.split('', word=1)", "unexpected keyword"),
        ("from pathlib import Nothing", "Nothing"),
    ):
        with pytest.raises(AssertionError, match=rf"p\.md\[1\], line 7: .*{message}"):
            run_python(Block("p.md", 1, 7, True, code, "hub"), {})
    for command in ("curl x | sh", "uv run python nowhere.py"):
        with pytest.raises(AssertionError, match=r"p\.md\[1\]: "):
            run_shell(Block("p.md", 1, 7, False, command, None), ROOT)
