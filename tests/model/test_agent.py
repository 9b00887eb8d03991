import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image

from worldvla_model import Sampling, SequenceLengthError, WorldVLA
from worldvla_tokenizers import ActionTokenizer, SequenceError


def frames(published, reference):
    return [published.frame(reference["episode"], i) for i in reference["frames"]]


def references(published, kind):
    return [r for r in published.json("generations") if r["kind"] == kind]


def instruction(published, reference):
    return next(e["instruction"] for e in published.json("episodes") if e["name"] == reference["episode"])


@pytest.mark.parametrize("constrained", [True, False])
def test_actions_of_the_published_code(published, agent, constrained):
    bounds = agent.processor.actions
    for reference in references(published, "action"):
        words = instruction(published, reference)
        actions = agent.predict_actions(frames(published, reference), words, constrained=constrained)
        scaled = np.array(reference["actions_normalised"])
        expected = (scaled + 1) / 2 * (bounds.high - bounds.low + 1e-8) + bounds.low
        np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-6)  # the reference went through fp32
        assert actions.dtype == np.float64


@pytest.mark.parametrize("constrained", [True, False])
def test_frames_of_the_published_code(published, agent, constrained):
    for reference in references(published, "world")[:3]:
        first, second = frames(published, reference)
        sample = next(
            s for s in published.samples(size=128, kind="world")
            if (s["episode"], s["frames"]) == (reference["episode"], reference["frames"])
        )  # fmt: skip
        imagined = agent.predict_frame([first], sample["actions"], constrained=constrained)
        assert imagined.shape == (128, 128, 3)
        assert imagined.dtype == np.uint8
        np.testing.assert_array_equal(imagined, agent.processor.decode_images(reference["generated"])[0])
        # It learned these frames by heart: what it imagines is the true next frame's own reconstruction.
        codes = agent.processor.images.encode([second], target=128)
        np.testing.assert_array_equal(imagined, agent.processor.images.decode(codes)[0])


def test_arrays_and_pictures_are_the_same(published, agent):
    reference = references(published, "action")[0]
    pictures = frames(published, reference)
    words = instruction(published, reference)
    from_pictures = agent.predict_actions(pictures, words)
    np.testing.assert_array_equal(agent.predict_actions([np.asarray(p) for p in pictures], words), from_pictures)
    assert agent.predict_actions(pictures, words, num_actions=2).shape == (2, 7)
    sampled = agent.predict_actions(
        pictures, words, num_actions=2, sampling=Sampling(5.0, generator=torch.Generator().manual_seed(0))
    )
    assert not np.array_equal(sampled, from_pictures[:2])


def test_one_folder_brings_everything_back(published, agent, tmp_path):
    changed = agent.with_settings(num_actions=3)
    changed.processor.actions = ActionTokenizer(np.full(7, -2.0), np.full(7, 2.0))
    changed.save_pretrained(tmp_path / "mine")
    again = WorldVLA.from_pretrained(tmp_path / "mine", device="cpu")
    assert again.processor.settings == changed.processor.settings
    reference = references(published, "action")[0]
    pictures, words = frames(published, reference), instruction(published, reference)
    expected = changed.predict_actions(pictures, words)
    assert expected.shape == (3, 7)
    np.testing.assert_array_equal(again.predict_actions(pictures, words), expected)
    card = (tmp_path / "mine" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: worldvla-model")
    assert "| 0 | -2 | 2 |" in card
    (tmp_path / "mine" / "README.md").write_text("mine")
    again.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"


def hub_cache(root, repo, folder, revision="main", subfolder=""):
    """Lay a folder out as huggingface_hub caches a repository."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    base = root / f"models--{repo.replace('/', '--')}"
    snapshot = base / "snapshots" / commit / subfolder
    snapshot.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file.absolute())
    (base / "refs").mkdir(exist_ok=True)
    (base / "refs" / revision).write_text(commit)


@pytest.mark.parametrize("subfolder", [None, "model_256/libero_goal"])
def test_hub_repositories(published, tmp_path, subfolder):
    """In a process of its own: huggingface_hub reads its settings when it is imported."""
    hub_cache(tmp_path, "someone/weights", published.checkpoint, "v1", subfolder or "")
    hub_cache(tmp_path, "someone/tokenizers", published.tokenizer)
    code = f"""
import torch, transformers, worldvla_tokenizers, worldvla_model as w
place = dict(revision="v1", subfolder={subfolder!r})
agent = w.WorldVLA.from_pretrained("someone/weights", "someone/tokenizers", image_size=128, **place)
assert agent.processor.image_size == 128
place = {{key: value for key, value in place.items() if value}}
assert type(transformers.AutoModel.from_pretrained("someone/weights", **place)) is w.WorldVLAModel
model = w.WorldVLAForConditionalGeneration.from_pretrained("someone/weights", **place)
assert torch.equal(model.lm_head.weight, agent.model.lm_head.weight)
try:
    w.WorldVLA.from_pretrained("someone/weights", "nobody/nothing", **place)
except worldvla_tokenizers.PretrainedFilesError as error:
    assert "nobody/nothing" in str(error)
else:
    raise SystemExit("loaded tokenizers that are not there")
"""
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_push_to_hub_uploads_the_whole_folder(agent, monkeypatch):
    uploads = []

    def upload_folder(self, *, repo_id, folder_path, commit_message, **options):
        names = {path.name for path in Path(folder_path).iterdir()}
        uploads.append((self.token, repo_id, commit_message, names, (Path(folder_path) / "README.md").read_text()))
        return SimpleNamespace(commit_url="https://huggingface.co/lab/robot/commit/1")

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert agent.push_to_hub("lab/robot", token="t").endswith("/commit/1")
    ((token, repo_id, message, names, card),) = uploads
    assert (token, repo_id, message) == ("t", "lab/robot", "Upload WorldVLA")
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "image_tokenizer",
        "processor_config.json",
    }
    assert 'WorldVLA.from_pretrained("lab/robot")' in card


def test_constrained_answers_are_chunks_whatever_is_asked(agent):
    """Words it never saw and a picture of noise."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 200, 3), dtype=np.uint8))
    constrained = agent.predict_actions([noise], "do whatever you like", num_actions=4)
    assert constrained.shape == (4, 7)
    assert np.isfinite(constrained).all()


def test_free_answers_are_read_strictly(published, agent, monkeypatch):
    from worldvla_model import agent as module

    monkeypatch.setattr(module, "continue_freely", lambda *_, **__: [10_004, 10_006, 8_710])
    picture = [published.frame("libero_goal_0", 0)]
    with pytest.raises(SequenceError, match=r"position 2: expected 10006 .* found 8710"):
        agent.predict_actions(picture, "open it", constrained=False)
    with pytest.raises(SequenceError, match="position 2"):
        agent.predict_frame(picture, np.zeros((1, 7)), constrained=False)


def test_bad_requests(published, agent):
    picture = published.frame("libero_goal_0", 0)
    with pytest.raises(ValueError, match="unconstrained decoding ends where the model ends"):
        agent.predict_actions([picture], "open it", num_actions=3, constrained=False)
    with pytest.raises(SequenceLengthError, match="4096 positions"):
        agent.predict_actions([picture], "open it", num_actions=500)
    with pytest.raises(SequenceError, match="1 images and 2 actions"):
        agent.predict_frame([picture], np.zeros((2, 7)))
    with pytest.raises(ValueError, match="index \\(0, 0\\) is nan"):
        agent.predict_frame([picture], np.full((1, 7), np.nan))
