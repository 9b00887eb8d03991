"""Folders of runs as `worldvla evaluate` and `worldvla imagine` leave them, with real pictures and videos."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from worldvla_libero.evaluation.records import SuccessRate
from worldvla_libero.video import VideoWriter

FRAMES = Path(__file__).parents[3] / "fixtures" / "published" / "frames"
VERSIONS = {"python": "3.11.2", "mujoco": "3.2.7", "robosuite": "1.4.0", "worldvla-libero": "0.1.0"}
GOAL = (
    "open the middle drawer of the cabinet",
    "put the bowl on the stove",
    "put the wine bottle on top of the cabinet",
    "open the top drawer and put the bowl inside",
    "put the bowl on top of the cabinet",
    "push the plate to the front of the stove",
    "put the cream cheese in the bowl",
    "turn on the stove",
    "put the bowl on the plate",
    "put the wine bottle on the rack",
)
LIMITS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}


def frame(number: int, size: int = 96) -> np.ndarray:
    """A real camera image."""
    files = sorted(FRAMES.glob("*.png"))
    with Image.open(files[number % len(files)]) as image:
        return np.asarray(image.convert("RGB").resize((size, size)))


def write_video(path: Path, numbers: range) -> None:
    with VideoWriter(path, fps=20) as video:
        for number in numbers:
            video.write(frame(number))


def episode_line(suite: str, task: int, episode: int, outcome: str, **changed) -> dict:
    """What one episode leaves in `episodes.jsonl`."""
    limit = LIMITS.get(suite, 400)
    steps = {"success": 90 + 7 * episode + 11 * task, "failure": limit, "error": 41}[outcome]
    queries = -(-steps // 5)
    error = {
        "origin": "policy",
        "type": "ValueError",
        "message": "actions hold NaN",
        "traceback": "Traceback (most recent call last):\n  …\nValueError: actions hold NaN",
    }
    return {
        "suite": suite,
        "task": task,
        "task_name": GOAL[task % len(GOAL)].replace(" ", "_"),
        "instruction": GOAL[task % len(GOAL)],
        "protocol": "openvla",
        "episode": episode,
        "initial_state": episode,
        "seed": 0,
        "outcome": outcome,
        "steps": steps,
        "max_steps": limit,
        "queries": queries,
        "seconds": 0.125 * steps,
        "policy_seconds": 0.0625 * queries,
        "query_seconds": [0.0625] * queries,
        "attempts": 2 if outcome == "error" else 1,
        "error": error if outcome == "error" else None,
        "video": None,
        "last_frame": None,
        "versions": VERSIONS,
    } | changed


def evaluation_info(lines: list[dict], **changed) -> dict:
    """What the end of a run leaves in `eval_info.json`, as far as a report reads it."""
    outcomes = [line["outcome"] for line in lines]
    errors = outcomes.count("error")
    rate = SuccessRate(outcomes.count("success"), len(outcomes) - errors, errors)
    protocol = {"name": "openvla", "max_steps": LIMITS, "episodes_per_task": 50, "seed": 0, "control_hz": 20}
    return {
        "policy": "the default model",
        "protocol": protocol,
        "overall": rate.to_dict(),
        "versions": VERSIONS,
        "warnings": [],
    } | changed


def write_evaluation(folder: Path, lines: list[dict], *, finished: bool = True, **info) -> Path:
    """A run of these lines; the pictures and videos that they name are made."""
    folder.mkdir(parents=True)
    (folder / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    for number, line in enumerate(lines):
        if line["last_frame"]:
            (folder / line["last_frame"]).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(frame(number)).save(folder / line["last_frame"])
        if line["video"]:
            write_video(folder / line["video"], range(number, number + 4))
    if finished:
        (folder / "eval_info.json").write_text(json.dumps(evaluation_info(lines, **info)), "utf-8")
    return folder


def evaluation_lines(
    suites=("libero_goal",), *, tasks=3, episodes=4, skill=0.6, seed=0, error_at=None, media=True
) -> list[dict]:
    """Episodes with outcomes, steps and latencies that vary."""
    rng, lines = np.random.default_rng(seed), []
    for suite in suites:
        for task in range(tasks):
            for episode in range(episodes):
                outcome = "success" if rng.random() < skill - 0.04 * task else "failure"
                if (task, episode) == error_at:
                    outcome = "error"
                line = episode_line(suite, task, episode, outcome)
                if outcome == "success":
                    line["steps"] = int(min(line["max_steps"], rng.gamma(18, 5 + task % 4)))
                line["queries"] = -(-line["steps"] // 5)
                line["query_seconds"] = list(rng.gamma(9, 0.01 + 0.004 * seed, line["queries"]))
                line["policy_seconds"] = sum(line["query_seconds"])
                line["seconds"] = line["policy_seconds"] + 0.06 * line["steps"]
                if media:
                    stem = f"{suite}_{task:02d}_{episode:03d}"
                    line |= {"video": f"videos/{stem}.mp4", "last_frame": f"frames/{stem}.png"}
                lines.append(line)
    return lines


def world_content(*, episodes=5, frames=50, seed=0, lpips=False, **changed) -> dict:
    """What `worldvla imagine` leaves in `world.json`: metrics that decay over the horizon."""
    rng = np.random.default_rng(seed)
    horizons = [frames] if frames <= 10 else [10, frames]

    def curves(start, end, spread):
        t = 1 - np.exp(-np.arange(frames) / 12)
        return [[float(v) for v in start + rng.normal(0, spread) + (end - start) * t] for _ in range(episodes)]

    found = {
        "psnr": {
            "imagined": curves(27 + seed, 20 + seed, 0.8),
            "copied": curves(31, 17, 1),
            "reconstructed": curves(28.5, 28.4, 0.4),
        },
        "ssim": {
            "imagined": curves(0.91, 0.80, 0.01),
            "copied": curves(0.96, 0.74, 0.02),
            "reconstructed": curves(0.93, 0.93, 0.004),
        },
        "lpips": {
            "imagined": curves(0.10, 0.19, 0.01),
            "copied": curves(0.03, 0.24, 0.02),
            "reconstructed": curves(0.08, 0.08, 0.003),
        }
        if lpips
        else None,
    }

    def summary(values):
        mean = float(np.mean(values))
        return {"mean": mean, "low": 0.98 * mean, "high": 1.02 * mean}

    return {
        "settings": {
            "format": 1,
            "model": "4f" * 32,
            "data": {"name": "sample_data", "split": "validation", "camera": "agentview"},
            "clips": "7d" * 32,
            "backbones": {"lpips": {"network": "alex", "weights": "7b" * 32}} if lpips else {},
            "frames": horizons,
            "seed": 0,
        },
        "model": "the default model",
        "image_size": 256,
        "world_prompt": "Generate the next image based on the provided sequence of historical images.",
        "data": "sample_data",
        "split": "validation",
        "truth": "camera",
        "context": 1,
        "rounds": 1,
        "control_hz": 20.0,
        "too_short": {str(horizon): [] for horizon in horizons},
        "dropped": [],
        "episodes": [
            {"id": f"goal_demo/demo_{i}", "task": GOAL[i], "start": 3 * i, "frames": frames, "videos": None}
            for i in range(episodes)
        ],
        "curves": found,
        "horizons": {
            str(horizon): {"episodes": episodes}
            | {
                metric: kinds and {kind: summary(np.array(c)[:, :horizon]) for kind, c in kinds.items()}
                for metric, kinds in found.items()
            }
            | {"fvd": None}
            for horizon in horizons
        },
        "psnr_limit_db": 100.0,
        "not_computed": {"fvd": "no weights: name a file with --fvd-weights"}
        | ({} if lpips else {"lpips": "no weights: name a file with --lpips-weights"}),
        "seconds_per_frame": 0.21,
        "versions": VERSIONS,
    } | changed


def write_world(folder: Path, content: dict, *, videos: bool = True) -> Path:
    folder.mkdir(parents=True)
    for place, episode in enumerate(content["episodes"] if videos else ()):
        episode["videos"] = f"videos/{place:03d}.mp4"
        write_video(folder / episode["videos"], range(place, place + 4))
    (folder / "world.json").write_text(json.dumps(content), "utf-8")
    return folder
