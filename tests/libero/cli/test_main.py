import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from worldvla_libero.cli import main as cli
from worldvla_libero.cli import model as cli_model
from worldvla_libero.doctor import rendering, start_of
from worldvla_libero.simulator.suites import Task, load_suite
from worldvla_libero.versions import installed_versions

FIXTURE = Path(__file__).parents[2] / "fixtures" / "published"


def run(*arguments: str, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; `code` runs before it."""
    ours = ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MPLCONFIGDIR", "MESA_SHADER_CACHE_DIR")
    kept = {k: v for k, v in os.environ.items() if k not in ours}
    program = f"import sys\n{code}\nfrom worldvla_libero.cli.main import main\nsys.exit(main({list(arguments)!r}))"
    return subprocess.run(
        [sys.executable, "-c", program], env=kept | environment, capture_output=True, text=True, timeout=600
    )


def test_help_is_fast_because_nothing_heavy_is_imported():
    ran = run(
        "--help",
        code="heavy = {'torch', 'transformers', 'libero', 'robosuite', 'mujoco', 'matplotlib', 'av'}\n"
        "import atexit; atexit.register(lambda: print(sorted(heavy & set(sys.modules))))",
    )
    assert ran.returncode == 0
    for command in ("demo", "evaluate", "convert", "doctor"):
        assert command in ran.stdout
    assert ran.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--suite", "libero_gaol"], "UnknownNameError: unknown suite 'libero_gaol' (did you mean"),
        (["demo", "--task", "11"], "UnknownNameError: task 11 of libero_object; allowed: 0 … 9"),
        (["evaluate", "libero_goal", "--out", "o", "--protocol", "lerobo"], "did you mean 'lerobot'"),
        (["doctor", "--suite", "libero_gaol"], "UnknownNameError: unknown suite 'libero_gaol' (did you mean"),
        (["convert", "nowhere", "target"], "nowhere"),
        (["convert", "a", "b", "--to", "published", "--trust-pickle"], "do not go with --to published"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(arguments, message, capsys):
    assert cli.main(arguments) == cli.EXIT_USAGE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1


def test_debug_shows_the_traceback(monkeypatch):
    with pytest.raises(ValueError, match="unknown suite"):
        cli.main(["--debug", "demo", "--suite", "nonsense"])
    monkeypatch.setenv(cli.DEBUG_VARIABLE, "1")
    with pytest.raises(ValueError, match="unknown suite"):
        cli.main(["demo", "--suite", "nonsense"])


def test_versions(capsys):
    assert cli.main(["--version"]) == cli.EXIT_OK
    printed = capsys.readouterr().out.splitlines()
    versions = dict(line.split() for line in printed)
    assert printed[0] == f"worldvla-libero {importlib.metadata.version('worldvla-libero')}"
    assert versions.keys() >= {
        "worldvla-model",
        "worldvla-tokenizers",
        "torch",
        "transformers",
        "mujoco",
        "python",
    }


def test_unparsable_arguments_exit_2(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["frobnicate"])
    assert caught.value.code == cli.EXIT_USAGE


def test_a_missing_default_model_names_the_remedy(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli_model, "default_model_path", lambda: tmp_path)
    assert cli.main(["demo"]) == cli.EXIT_USAGE
    assert "remedy: reinstall worldvla-libero, or pass --model" in capsys.readouterr().err


def test_doctor_finds_everything_for_the_demo(capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hides GPUs from the model, and none from the renderer
    code = cli.main(["doctor"])
    printed = capsys.readouterr().out
    assert code == cli.EXIT_OK, printed
    for subject in (
        "python",
        "torch",
        "transformers",
        "mujoco",
        "robosuite",
        "OpenGL",
        "GPU",
        "default model",
        "Hub",
    ):
        assert subject in printed
    assert torch.cuda.is_available() or "torch can use (CUDA_VISIBLE_DEVICES is '')" in printed
    assert "worldvla doctor --suite" in printed or "mujoco: 3.2.7" in printed
    assert "`worldvla demo` can run." in printed


def test_doctor_starts_no_task_that_cannot_be_built():
    found = start_of(Task("libero_goal_object", 3, "no_such_scene"))
    assert (found.subject, found.level) == ("start of libero_goal_object/3", "note")
    assert "the installed LIBERO has no " in found.detail


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "index", "moving"),  # with MuJoCo 3.4 and above
    [
        ("libero_spatial", 5, "akita_black_bowl_1"),
        ("libero_10", 0, "ketchup_1"),
        ("libero_spatial", 8, None),  # in its third initial state a bowl pushes the plate, and all comes to rest
    ],
)
def test_doctor_measures_how_a_task_starts(suite, index, moving):
    mujoco = installed_versions()["mujoco"]
    found = start_of(load_suite(suite).task(index))
    assert found.subject == f"start of {suite}/{index}"
    if moving and tuple(map(int, mujoco.split("."))) >= (3, 4):
        assert found.level == "note"
        assert f": not at rest with mujoco {mujoco}; from initial state 0 {moving} moves at" in found.detail
        assert found.remedy.endswith("pip install mujoco==3.2.7")
    else:
        assert (found.level, found.remedy) == ("ok", "")


@pytest.mark.skipif(sys.platform != "linux", reason="EGL is Linux's")
def test_doctor_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_DIRS", "/nonexistent")  # for the process in which it tries OpenGL
    assert cli.main(["doctor"]) == cli.EXIT_FAILED
    printed = capsys.readouterr().out
    assert "✗ OpenGL: " in printed
    assert "→ apt-get install libegl1 libgl1-mesa-dri" in printed
    assert "cannot run yet" in printed


def test_doctor_survives_a_driver_that_crashes(monkeypatch):
    crash = [sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"]
    real_run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda _, **options: real_run(crash, **options))
    found = rendering()
    assert found.level == "missing"
    assert "crashed with signal 11" in found.detail


NO_NETWORK = """
import socket
def refuse(*_): raise OSError("no network in this test")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


@pytest.mark.slow
def test_demo_needs_no_network_and_leaves_the_home_untouched(tmp_path):
    home, out = tmp_path / "home", tmp_path / "worldvla-demo"
    home.mkdir()
    ran = run("demo", "--out", str(out), "--steps", "1", code=NO_NETWORK, HOME=str(home))
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert list(home.rglob("*")) == []
    assert sorted(file.name for file in out.iterdir()) == ["demo.json", "demo.mp4", "demo.png"]


def test_demo_writes_a_picture_a_video_and_numbers(tmp_path, capsys):
    out = tmp_path / "worldvla-demo"
    assert cli.main(["demo", "--out", str(out), "--steps", "6"]) == cli.EXIT_OK
    assert capsys.readouterr().err == ""
    assert sorted(file.name for file in out.iterdir()) == ["demo.json", "demo.mp4", "demo.png"]
    numbers = json.loads((out / "demo.json").read_text())
    assert numbers["task"]["instruction"] == "pick up the alphabet soup and place it in the basket"
    assert numbers["model"]["image_size"] == [128, 128]
    for took in numbers["decoding"].values():
        assert took["passes"] < took["passes_one_by_one"]
    assert numbers["steps"] == len(numbers["actions"]) == len(numbers["psnr_imagined_vs_true_db"]) == 6
    assert all(20 < psnr < 60 for psnr in numbers["psnr_imagined_vs_true_db"].values())
    with av.open(str(out / "demo.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 6
    with Image.open(out / "demo.png") as picture:
        assert picture.width > 1000


def test_evaluate_reports_and_exits_by_outcome(tmp_path, capsys):
    arguments = [
        *("evaluate", "libero_goal", "--tasks", "0", "--out", str(tmp_path / "out"), "--episodes", "1"),
        *("--max-steps", "5", "--render-size", "128", "--num-actions", "5", "--video-stride", "0"),
        *("--workers", "0"),
        *(
            "--model",
            str(FIXTURE / "checkpoint"),
            "--tokenizers",
            str(FIXTURE / "tokenizer"),
            "--image-size",
            "128",
        ),
    ]
    assert cli.main(arguments) == cli.EXIT_OK
    printed = capsys.readouterr().out
    assert "failure libero_goal/0 episode 0: 5 steps" in printed
    assert "0.0 % (0/1)" in printed
    assert json.loads((tmp_path / "out" / "eval_info.json").read_text())["protocol"]["image_size"] == 128
    assert cli.main(arguments) == cli.EXIT_OK  # reads what is there
    assert capsys.readouterr().out == printed
    assert cli.main([*arguments, "--episodes", "2"]) == cli.EXIT_USAGE
    assert "begun with other settings (episodes was 1, now 2)" in capsys.readouterr().err


def test_convert_writes_a_folder_that_works_alone_and_back(tmp_path):
    from worldvla_model import WorldVLA

    ours, back = tmp_path / "ours", tmp_path / "back"
    published, tokenizers = FIXTURE / "checkpoint", FIXTURE / "tokenizer"
    assert cli.main(["convert", str(published), str(ours), "--tokenizers", str(tokenizers)]) == cli.EXIT_OK
    agent = WorldVLA.from_pretrained(ours, image_size=128)
    assert agent.processor.history_length == 2
    assert cli.main(["convert", str(ours), str(back), "--to", "published"]) == cli.EXIT_OK
    assert json.loads((back / "config.json").read_text())["model_type"] == "chameleon"


def test_convert_takes_tokenizers_alone_and_unpickles_only_when_told(tmp_path, capsys):
    import shutil

    import torch

    from worldvla_tokenizers import ImageTokenizer, TextTokenizer

    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(FIXTURE / "tokenizer", source)
    content = torch.load(source / "vqgan.ckpt", weights_only=True)
    torch.save(content | {"callbacks": Path("more than tensors")}, source / "vqgan.ckpt")
    assert cli.main(["convert", str(source), str(target)]) == cli.EXIT_USAGE
    assert "--trust-pickle" in capsys.readouterr().err
    assert not target.exists()
    assert cli.main(["convert", str(source), str(target), "--trust-pickle"]) == cli.EXIT_OK
    assert ImageTokenizer.from_pretrained(target).vqgan.config.n_embed == 8192
    assert TextTokenizer.from_pretrained(target).encode("put the bowl on the plate")


def test_recipes_are_listed(capsys):
    assert cli.main(["train", "--list"]) == cli.EXIT_OK
    printed = capsys.readouterr().out
    for name in (
        "nano",
        "table2-512-long",
        "table3-row5-goal",
        "table6-pretrained-spatial",
        "figure7-video-object",
    ):
        assert name in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--recipe", "nanoo"], "RecipeError: no recipe 'nanoo'; like it: nano"),
        (
            ["train", "--recipe=table3-row5-goal"],
            "needs --data, frames of 256 px of libero_goal: worldvla prepare",
        ),
        (["train-tokenizer", "x", "--recipe", "table3"], "for image tokenizers; existing: nano, published"),
        (["train-tokenizer", "nowhere"], "nowhere"),
    ],
)
def test_training_says_what_is_wrong_in_one_line(arguments, message, capsys):
    assert cli.main(arguments) == cli.EXIT_USAGE
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("machine", "options", "told"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False}, [], True),
        ({"architecture": "x86_64", "avx512_bf16": False}, ["--precision", "fp32"], False),
        ({"architecture": "x86_64", "avx512_bf16": True}, [], False),
        ({"architecture": "aarch64"}, [], False),
    ],
)
def test_training_tells_of_a_cpu_that_is_slow_in_bf16(machine, options, told, monkeypatch, capsys):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: machine, raising=False)
    assert cli.main(["train", "--cpu", "--data", "nowhere", *options]) == cli.EXIT_USAGE
    assert ("no instructions for bf16" in capsys.readouterr().out) == told


def test_every_field_of_a_recipe_is_an_option(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--recipe", "table3-row3-long", "--help"])
    printed = capsys.readouterr().out
    for shown in (
        "--chunk INT",
        "(default: 10)",
        "--attention",
        "(default: causal)",
        "--layers INT",
        "--keep INT",
    ):
        assert shown in printed
