"""Opens a data set with the real `lerobot` and writes down what it sees; run by lerobot's Python, not by pytest's.

    python read_with_lerobot.py FOLDER OUT.npz

OUT.npz holds every row as LeRobotDataset gives it (images as (T, H, W, 3) uint8), with `ahead/` in front the rows
AHEAD steps later and whether they are padding, with `episodes/` and `stats/` its metadata, the rest in `about`.
"""

import json
import sys

import numpy as np

AHEAD = 2


def read(folder):
    import torchvision
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    # lerobot 0.4 reads videos through torchvision, which has no reader of them any more.
    missing = not hasattr(torchvision.io, "VideoReader")
    if missing:
        torchvision.io.VideoReader, torchvision.set_video_backend = _reader(), lambda backend: None
    dataset = LeRobotDataset("local/folder", root=folder, video_backend="pyav")
    meta, cameras = dataset.meta, dataset.meta.camera_keys
    items = [dataset[i] for i in range(len(dataset))]
    rows = {
        key: np.stack([_pixels(item[key]) if key in cameras else item[key].numpy() for item in items])
        for key in dataset.features
    }
    rows["task"] = np.array([item["task"] for item in items])

    times = {key: [0.0, AHEAD / dataset.fps] for key in ["action", *cameras]}
    ahead = LeRobotDataset("local/folder", root=folder, video_backend="pyav", delta_timestamps=times)
    items = [ahead[i] for i in range(len(ahead))]
    rows["ahead/action"] = np.stack([item["action"][1].numpy() for item in items])
    rows["ahead/is_pad"] = np.stack([item["action_is_pad"][1].numpy() for item in items])
    rows |= {f"ahead/{key}": np.stack([_pixels(item[key][1]) for item in items]) for key in cameras}

    names = ("dataset_from_index", "dataset_to_index", "length", "episode_index")
    rows |= {f"episodes/{name}": np.array(meta.episodes[name]) for name in names}
    for key, stats in meta.stats.items():
        rows |= {f"stats/{key}/{name}": np.asarray(value) for name, value in stats.items()}
    about = {
        "fps": dataset.fps,
        "robot_type": meta.robot_type,
        "frames": len(dataset),
        "episodes": dataset.num_episodes,
        "tasks": [*meta.tasks.index],
        "reader": "ours" if missing else "torchvision",
        "features": {key: [feature["dtype"], *feature["shape"]] for key, feature in dataset.features.items()},
    }
    return rows | {"about": np.array(json.dumps(about))}


def _pixels(image):
    return (image.numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8)


def _reader():
    """As much of torchvision's former reader as lerobot uses: a keyframe at or before a time, and what follows."""
    import av
    import torch

    class VideoReader:
        def __init__(self, path, stream):
            self.container = av.open(path)

        def seek(self, seconds, keyframes_only):
            self.container.seek(int(seconds * av.time_base))

        def __iter__(self):
            for frame in self.container.decode(video=0):
                yield {"pts": frame.time, "data": torch.tensor(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)}

    return VideoReader


if __name__ == "__main__":
    np.savez(sys.argv[2], **read(sys.argv[1]))
