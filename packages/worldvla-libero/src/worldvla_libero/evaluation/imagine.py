"""The world-model evaluation: imagine held-out clips from their true actions, and judge every frame."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from worldvla_libero.data.episodes import Frames, digest
from worldvla_libero.evaluation.report.world_page import save_world_panels, world_panels
from worldvla_libero.evaluation.report.world_run import WorldRun
from worldvla_libero.evaluation.world.backbones import Backbones, load_backbones
from worldvla_libero.evaluation.world.clips import Clip, ClipError, ClipKey, ImagineSettings, choose_clips
from worldvla_libero.evaluation.world.metrics import frame_lpips, frame_psnr, frame_ssim
from worldvla_libero.evaluation.world.record import PSNR_LIMIT, RECORD_FILE, VIDEO_FOLDER, Results
from worldvla_libero.evaluation.world.trajectories import Trajectories
from worldvla_libero.figures import save_strips, side_by_side
from worldvla_libero.jobs.job import Job
from worldvla_libero.jobs.parts import Dropped
from worldvla_libero.pages.panels import COLOURS
from worldvla_libero.versions import EVERYTHING, installed_versions
from worldvla_libero.video import VideoWriter

if TYPE_CHECKING:
    from worldvla_model import WorldVLA

CURVES_FILE = "curves.png"
STRIPS_FILE = "frames.png"

_PART_SUFFIX = ".npz"
_STRIP_FRAMES = 8


def imagine(
    agent: WorldVLA,
    trajectories: Trajectories,
    out: str | os.PathLike[str],
    settings: ImagineSettings = ImagineSettings(),
    *,
    model_name: str = "a model",
    backbones: Backbones | None = None,
    on_part: Callable[[str, Path | Dropped], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a model as a world model. Killed at any moment, the same call goes on.

    Every frame is imagined from the one imagined before it and the true action. Beside the model stand two that
    need none: the last true frame, copied, and the true frames as the image tokenizer reconstructs them.

    Args:
        agent: the model.
        trajectories: held-out ones.
        out: folder for `world.json`, which appears when all else is there, and curves, film strips and videos.
        settings: what is imagined.
        model_name: what the record calls the model.
        backbones: for LPIPS and FVD; of those that are missing the record says why they are not computed.
        on_part: called with every clip that is done, those of an interrupted run first.

    Returns:
        The content of `world.json`.

    Raises:
        ClipError: no trajectory is long enough, all are unusable, or they do not suit the model.
        JobError: `out` holds something else, or an evaluation of another model, other data or settings.
        ShardError: the data are codes of another image tokenizer.
        StorageError: a file cannot be written; what is done stays.
    """
    out, backbones = Path(out), backbones or load_backbones()
    trajectories.check(agent.processor)
    planned = choose_clips(trajectories.keys, settings)
    clips = {clip.name: clip for clip in planned.clips}
    identity = {
        "format": 1,
        "model": agent.fingerprint,
        "data": {"name": trajectories.name, "split": trajectories.split, **trajectories.identity},
        "clips": digest(planned.clips),
        "backbones": dict(backbones.described),
        **asdict(settings),
    }
    with Job[ClipKey, Clip](out, RECORD_FILE, identity) as job:
        if job.ended:
            return job.content()
        store = _Imagine(agent, trajectories, settings, backbones, job.folder / VIDEO_FOLDER)
        parts = job.run(clips, _Read(trajectories, settings.context), store, suffix=_PART_SUFFIX, on_part=on_part)
        dropped = [part for part in parts.values() if isinstance(part, Dropped)]
        kept = [(clips[name], part) for name, part in parts.items() if isinstance(part, Path)]
        if not kept:
            raise ClipError(f"none of {len(parts)} trajectories can be used: {dropped[0].message}")
        results = Results(kept, settings.frames)
        content = {
            "model": model_name,
            "image_size": agent.processor.image_size,
            "world_prompt": agent.processor.settings.world_prompt,
            "data": trajectories.name,
            "split": trajectories.split,
            "truth": trajectories.truth,
            "context": settings.context,
            "rounds": settings.rounds,
            "control_hz": trajectories.control_hz,
            "too_short": {str(horizon): ids for horizon, ids in planned.short.items()},
            "dropped": [part._asdict() for part in (*trajectories.unreadable, *dropped)],
            **results.record(backbones, trajectories.truth),
            "versions": installed_versions((*EVERYTHING, "torchmetrics", "lpips", "cd-fvd")),
        }
        title = f"{model_name} on {trajectories.name}"
        with job.storing("the evaluation"):
            runs = [WorldRun(title, COLOURS[0], out, content)]
            save_world_panels(out / CURVES_FILE, runs, world_panels(runs))
            save_strips(out / STRIPS_FILE, results.strips(), title=f"{title}: some of the frames imagined")
            shutil.rmtree(out / VIDEO_FOLDER, ignore_errors=True)  # of a run that was killed here
            shutil.copytree(store.videos, out / VIDEO_FOLDER, ignore=shutil.ignore_patterns(".*"))
        job.end(content)
        return job.content()


class _Read:
    """In a worker: which clip → the clip."""

    def __init__(self, trajectories: Trajectories, context: int) -> None:
        self.trajectories, self.context = trajectories, context

    def __call__(self, key: ClipKey) -> Clip:
        return self.trajectories.read(key, self.context)


class _Imagine:
    """Where the model is: a clip → its video, and its part: what was judged of every frame."""

    def __init__(
        self,
        agent: WorldVLA,
        trajectories: Trajectories,
        settings: ImagineSettings,
        backbones: Backbones,
        videos: Path,
    ) -> None:
        from worldvla_model.decoding import Workspace

        self.agent, self.settings, self.backbones, self.videos = agent, settings, backbones, videos
        self.control_hz = trajectories.control_hz
        self.true_label = "true" if trajectories.truth == "camera" else "true, tokenized"
        self.workspace = agent.workspace or Workspace(agent.model)

    def __call__(self, clip: Clip, path: Path) -> None:
        context, draw = self.settings.context, self.agent.processor.images.decode
        seen, codes = self._look(clip)
        began = time.perf_counter()
        answer = self.agent.imagine_codes(
            codes[:context], clip.actions, rounds=self.settings.rounds, workspace=self.workspace
        )
        imagined = draw(answer)
        seconds = time.perf_counter() - began
        drawn = draw(codes)
        everything = drawn if seen is None else seen
        true, last = everything[context:], everything[context - 1]
        kinds: dict[str, Frames] = {"imagined": imagined, "copied": np.broadcast_to(last, true.shape)}
        if seen is not None:  # codes reconstruct to what they show: nothing to compare
            kinds["reconstructed"] = drawn[context:]
        columns = np.unique(np.linspace(0, len(true) - 1, _STRIP_FRAMES).round().astype(int))
        with VideoWriter(self.videos / f"{clip.key.name}.mp4", self.control_hz) as video:
            for wanted, made in zip(true, imagined, strict=True):
                video.write(side_by_side({self.true_label: wanted, "imagined": made}))
        np.savez(
            path,
            allow_pickle=False,
            seconds=seconds,
            **{f"strip/{self.true_label}": true[columns], "strip/imagined": imagined[columns]},
            **self._judge(kinds, true),
        )

    def _look(self, clip: Clip) -> tuple[Frames | None, NDArray[np.int64]]:
        """The camera's frames at the model's size, if there are any, and the codes of all frames."""
        from worldvla_tokenizers.image import fit

        if clip.codes is not None:
            return None, clip.codes
        assert clip.frames is not None  # a clip has either
        processor = self.agent.processor
        pictures = [fit(frame, processor.image_size) for frame in clip.frames]
        return np.stack([np.asarray(p) for p in pictures]), np.stack(processor.encode_images(pictures))

    def _judge(self, kinds: dict[str, Frames], true: Frames) -> dict[str, NDArray[np.floating]]:
        """Numbers by `metric/kind`, one for each frame; by `video/horizon/kind`, features."""
        device, backbones = self.agent.model.device, self.backbones
        found: dict[str, NDArray[np.floating]] = {}
        for kind, frames in kinds.items():
            found[f"psnr/{kind}"] = np.minimum(frame_psnr(frames, true), PSNR_LIMIT)
            found[f"ssim/{kind}"] = frame_ssim(frames, true, device=device)
            if backbones.lpips is not None:
                found[f"lpips/{kind}"] = frame_lpips(frames, true, backbones.lpips)
        if backbones.video is not None:
            for horizon in self.settings.frames:
                if backbones.min_frames <= horizon <= len(true):
                    for kind, frames in {"true": true, **kinds}.items():
                        found[f"video/{horizon}/{kind}"] = backbones.video(frames[None, :horizon])[0]
        return found
