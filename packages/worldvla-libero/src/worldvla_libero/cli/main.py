"""The `worldvla` command: arguments in, exit code out. What takes long to import is imported by the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from worldvla_libero.cli.bars import phase_bars
from worldvla_libero.cli.data import collect, prepare, replay
from worldvla_libero.cli.model import Flat, ModelOptions, load_model
from worldvla_libero.cli.nano import make_nano
from worldvla_libero.cli.report import report
from worldvla_libero.cli.world import imagine

if TYPE_CHECKING:
    from rich.console import Console

    from worldvla_libero.evaluation.records import EpisodeRecord, EvaluationResult
    from worldvla_model import WorldVLA

DEBUG_VARIABLE = "WORLDVLA_DEBUG"

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130  # 130: as shells report Ctrl-C


def demo(
    out: Path = Path("worldvla-demo"),
    suite: str = "libero_object",
    task: str = "0",
    steps: int = 150,
    model: Annotated[ModelOptions, Flat] = ModelOptions(),
) -> int:
    """Let a model drive one real LIBERO task and imagine the frames to come; write a picture and a video.

    Args:
        out: Folder for demo.png, demo.mp4 and demo.json.
        suite: Suite of the task.
        task: Index, name or instruction of the task.
        steps: Control steps to drive, at 20 a second; fewer if the goal is reached.
        model: Which model, and how to load it.
    """
    from rich.text import Text

    from worldvla_libero.demo import FIGURE_FILE, NUMBERS_FILE, VIDEO_FILE, run_demo
    from worldvla_libero.simulator.suites import load_suite

    chosen = load_suite(suite).task(task)
    console = _console()
    with phase_bars(console) as show:
        show("loading", 0, 1)
        agent, name = load_model(model)
        show("loading", 1, 1)
        numbers = run_demo(agent, chosen, out, name=name, steps=steps, progress=show)
    outcome = "reached the goal" if numbers["success"] else "did not reach the goal"
    console.print(
        f"{name} {outcome} of “{chosen.language}” in {numbers['steps']} steps.", highlight=False, markup=False
    )
    for what, took in numbers["decoding"].items():
        console.print(
            f"A {what}: {took['passes']} passes, {1e3 * took['seconds']:.0f} ms; one token after the other "
            f"{took['passes_one_by_one']} passes, {1e3 * took['seconds_one_by_one']:.0f} ms.",
            highlight=False,
            soft_wrap=True,
        )
    for file, content in (
        (FIGURE_FILE, "true and imagined frames, actions"),
        (VIDEO_FILE, "true next frame beside the imagined one"),
        (NUMBERS_FILE, "actions, PSNR, seconds, versions"),
    ):
        console.print(Text.assemble(f"  {out / file}  ", (content, "dim")))
    return EXIT_OK


def evaluate(
    suite: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SUITE")],
    out: Path = Path("worldvla-eval"),
    policy: str = "model",
    tasks: tuple[str, ...] = (),
    episodes: int | None = None,
    protocol: str = "openvla",
    max_steps: int | None = None,
    render_size: int | None = None,
    num_actions: int | None = None,
    video_stride: int = 1,
    published_instructions: bool = False,
    strict: bool = False,
    retry_errors: bool = False,
    workers: int = 1,
    executor: Literal["local", "ray"] = "local",
    batch_size: int = 32,
    time_limit: float = 600.0,
    model: Annotated[ModelOptions, Flat] = ModelOptions(),
) -> int:
    """Run episodes of a suite and count successes. Exits with 1 if an episode ended in an error.

    Interrupted, the same command goes on.

    Args:
        suite: Suite, such as libero_goal; libero_goal_lan, _object, _swap or _task for LIBERO-PRO's, in which
            words, objects, places or goal are changed; a wrong name lists all.
        out: Folder for episodes.jsonl, eval_info.json, videos and last frames.
        policy: model; random, whose actions mean nothing; expert, the script that demonstrates the task; or the
            address of a policy server, such as ws://localhost:8000.
        tasks: Indices, names or instructions; by default all of the suite.
        episodes: Per task; by default the protocol's.
        protocol: openvla (as in the paper) or lerobot: step limits, seeds, image size.
        max_steps: Step limit, in place of the protocol's.
        render_size: Size in pixels of the camera image; by default the protocol's, of which openvla renders at the
            size that the model sees (256 or 512 for the paper's).
        num_actions: Length of the action chunks, in place of the model's.
        video_stride: Record every n-th simulator step; 0 for no videos.
        published_instructions: Give the instructions that published LIBERO-10 weights were trained on.
        strict: Stop at the first episode that ends in an error.
        retry_errors: Run episodes again that ended in an error before.
        workers: Processes that simulate, a core each; 0 to simulate in this one.
        executor: Ray runs workers on a cluster; all nodes need the output folder at the same path.
        batch_size: Observations that the policy is given at once, at most.
        time_limit: Seconds that a simulator or the policy may take for one answer.
        model: Which model, and how to load it.
    """
    from worldvla_libero.evaluation.closed_loop import evaluate as run_evaluation
    from worldvla_libero.evaluation.policies import open_policy
    from worldvla_libero.evaluation.records import RESULTS_FILE
    from worldvla_libero.evaluation.websocket_policy import WebsocketPolicy
    from worldvla_libero.simulator.protocols import OPENVLA, find_protocol
    from worldvla_libero.simulator.suites import load_suite

    found = load_suite(suite)
    chosen = [found.task(key) for key in tasks] or list(found.tasks)
    preset = find_protocol(protocol)
    if max_steps is not None:
        preset = replace(preset, max_steps={**preset.max_steps, found.name: max_steps})
    console = _console()
    loaded: list[tuple[WorldVLA, str]] = []

    def load() -> WorldVLA:
        loaded.append(load_model(model))
        return loaded[0][0]

    driver = open_policy(policy, load_model=load, num_actions=num_actions)
    if isinstance(driver, WebsocketPolicy):
        console.print(f"policy server: {driver.metadata}", markup=False)  # a wrong address is told now
    if render_size is None and preset.name == OPENVLA.name and loaded:
        render_size = loaded[0][0].processor.image_size
    if render_size is not None:
        preset = replace(preset, image_size=render_size)
    total = len(chosen) * (preset.episodes_per_task if episodes is None else episodes)
    done: list[EpisodeRecord] = []

    def show(record: EpisodeRecord) -> None:
        done.append(record)
        colour = {"success": "green", "failure": "yellow", "error": "red"}[record.outcome]
        console.print(
            f"[dim]{len(done)}/{total}[/dim] [{colour}]{record.outcome}[/{colour}] {record.suite}/{record.task} "
            f"episode {record.episode}: {record.steps} steps, {record.seconds:.1f} s",
            highlight=False,
        )
        if record.unsettled and not any(other.unsettled and other.task == record.task for other in done[:-1]):
            console.print(f"  not at rest at its start: {record.unsettled}", style="yellow", markup=False)
        if record.error:
            console.print(f"  {record.error['type']}: {record.error['message']}", style="red", markup=False)

    result = run_evaluation(
        driver,
        chosen,
        out,
        protocol=preset,
        episodes=episodes,
        policy_name=loaded[0][1] if loaded else policy,
        video_stride=video_stride,
        published_instructions=published_instructions,
        strict=strict,
        retry_errors=retry_errors,
        workers=workers,
        executor=executor,
        batch_size=batch_size,
        time_limit=time_limit,
        on_episode=show,
    )
    _print_rates(console, result)
    for warning in result.warnings:
        console.print(warning, style="yellow", markup=False, highlight=False)
    console.print(f"records and videos: {out / RESULTS_FILE}", highlight=False, markup=False)
    return EXIT_FAILED if result.overall.errors else EXIT_OK


def convert(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")],
    to: Literal["ours", "published"] = "ours",
    tokenizers: Path | None = None,
    trust_pickle: bool = False,
) -> int:
    """Convert checkpoints of the paper's authors to our layout, or back, or their tokenizers alone.

    Args:
        source: Folder with a checkpoint; or with vqgan.yaml, vqgan.ckpt and tokenizer.json alone.
        target: Folder to make.
        to: Layout to write.
        tokenizers: Folder with vqgan.yaml, vqgan.ckpt and tokenizer.json, to put into the target as well, so that
            it can be used alone.
        trust_pickle: Unpickle a vqgan.ckpt that holds more than tensors. This runs whatever code is in it.
    """
    from worldvla_model import WorldVLAProcessor, published
    from worldvla_tokenizers import VQGAN, ActionTokenizer, ImageTokenizer, TextTokenizer

    if to == "published" and (tokenizers or trust_pickle):
        raise ValueError("--tokenizers and --trust-pickle do not go with --to published: it writes weights only")
    if to == "published":
        published.to_published(source, target)
    elif not (source / "config.json").is_file() and (source / "vqgan.yaml").is_file():
        if target.exists():
            raise FileExistsError(f"{target} exists; choose another target or delete it")
        text = TextTokenizer.from_pretrained(source)
        VQGAN.from_published(source, trust_pickle=trust_pickle).save_pretrained(target)
        text.save_pretrained(target)
    else:
        processor = None
        if tokenizers is not None:  # loaded first, so that a wrong one leaves no half target
            processor = WorldVLAProcessor(
                TextTokenizer.from_pretrained(tokenizers),
                ImageTokenizer(VQGAN.from_published(tokenizers, trust_pickle=trust_pickle)),
                ActionTokenizer.published(),
            )
        published.to_ours(source, target)
        if processor is not None:
            processor.save_pretrained(target)
    _console().print(f"wrote {target}", highlight=False, markup=False)
    return EXIT_OK


def doctor(suite: str | None = None) -> int:
    """Say what is installed, where weights and data are looked for, what is missing and how to get it.

    Exits with 0 if the demo can run.

    Args:
        suite: Suite whose tasks to start, to see whether objects are at rest when the policy takes over, which
            depends on the version of MuJoCo; seconds a task.
    """
    from rich.text import Text

    from worldvla_libero.doctor import examine

    console = _console()
    signs = {"ok": ("✓", "green"), "note": ("!", "yellow"), "missing": ("✗", "red")}
    complete = True
    for finding in examine(suite):
        complete &= finding.level != "missing"
        sign, colour = signs[finding.level]
        console.print(
            Text.assemble((f"{sign} ", colour), (f"{finding.subject}: ", "bold"), finding.detail), soft_wrap=True
        )
        if finding.remedy:
            console.print(Text(f"    → {finding.remedy}", style=colour), soft_wrap=True)
    console.print("\n`worldvla demo` can run." if complete else "\n`worldvla demo` cannot run yet; see ✗ above.")
    return EXIT_OK if complete else EXIT_FAILED


def _train() -> int:
    """Train a recipe of the paper, or one of your own."""
    raise AssertionError("replaced in main")


def _train_tokenizer() -> int:
    """Fit an image tokenizer (VQ-GAN) to the frames of demonstrations."""
    raise AssertionError("replaced in main")


COMMANDS: dict[str, Callable[..., int]] = {
    "demo": demo,
    "collect": collect,
    "replay": replay,
    "prepare": prepare,
    "train": _train,
    "train-tokenizer": _train_tokenizer,
    "make-nano": make_nano,
    "evaluate": evaluate,
    "imagine": imagine,
    "report": report,
    "convert": convert,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Errors that name what is wrong become one line and an exit code: 2 where the arguments are to blame, 1
    otherwise. With `--debug`, or WORLDVLA_DEBUG set, and for errors nobody foresaw, the traceback is shown.

    Args:
        arguments: default those of the process.
    """
    from worldvla_libero.simulator.rendering import prepare_process
    from worldvla_libero.versions import installed_versions

    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:
        for name, version in sorted(installed_versions().items(), key=lambda item: "worldvla" not in item[0]):
            _console().print(name, version, highlight=False, soft_wrap=True)
        return EXIT_OK
    prepare_process()
    # Waiting threads of torch spin by default: with a software renderer or a second process on the same cores,
    # small models then slow down many times over.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = "--debug" in given or bool(os.environ.get(DEBUG_VARIABLE))
    given = [argument for argument in given if argument != "--debug"]
    try:
        known = COMMANDS
        if given[:1] in (["train"], ["train-tokenizer"]):
            # Their options depend on the recipe, and their modules take long to import.
            from worldvla_libero.cli.train import commands

            known = {**COMMANDS, **commands(given)}
        return tyro.extras.subcommand_cli_from_dict(
            known,
            prog="worldvla",
            description="A model that acts and imagines, on LIBERO. Every command takes --debug for tracebacks; "
            "--version names this package's and those it works with.",
            args=given,
        )
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if debug:
            raise
        from rich.text import Text

        line = Text.assemble((f"{type(error).__name__}: ", "bold red"), " ".join(str(error).split()))
        if not type(error).__module__.startswith("worldvla"):
            line.append(" (--debug shows where)", style="dim")
        _console(stderr=True).print(line, soft_wrap=True)
        return EXIT_USAGE if isinstance(error, ValueError | FileNotFoundError | FileExistsError) else EXIT_FAILED


def _print_rates(console: Console, result: EvaluationResult) -> None:
    from rich.table import Table

    from worldvla_libero.evaluation.records import SuccessRate

    table = Table(
        "task", "instruction", "success", "95 % interval", "errors", title=f"protocol {result.protocol.name}"
    )
    for column in table.columns[2:]:
        column.justify = "right"

    def row(task: str, instruction: str, rate: SuccessRate) -> None:
        low, high = rate.interval()
        share = "-" if rate.rate is None else f"{100 * rate.rate:.1f} % ({rate.successes}/{rate.episodes})"
        errors = f"[red]{rate.errors}[/red]" if rate.errors else "0"
        table.add_row(task, instruction, share, f"{100 * low:.1f} … {100 * high:.1f}", errors)

    instructions = {(r.suite, r.task): r.instruction for r in result.records}
    for (suite, task), rate in result.by_task.items():
        row(f"{suite}/{task}", instructions[suite, task], rate)
    table.add_section()
    row("all", "", result.overall)
    console.print(table)


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


if __name__ == "__main__":
    sys.exit(main())
