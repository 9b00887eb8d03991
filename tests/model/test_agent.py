import json
import random
from collections import Counter, deque
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from grammar_models import scripted_model
from huggingface_hub import HfApi, constants
from PIL import Image
from transformers import AutoModel, BitNetQuantConfig

from worldvla_model import (
    DecodingError,
    Sampling,
    SequenceLengthError,
    WorldVLA,
    WorldVLAConfig,
    WorldVLAForConditionalGeneration,
    WorldVLAModel,
)
from worldvla_model.decoding import Decoder, fill
from worldvla_model.masks import MaskError
from worldvla_model.published import to_ours
from worldvla_tokenizers import ActionTokenizer, PretrainedFilesError, SequenceError, sequence
from worldvla_tokenizers.image import ImageError


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
def test_hub_repositories(published, tmp_path, monkeypatch, subfolder):
    """The cache as huggingface_hub knows it from the environment, which it reads when it is imported."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_cache(tmp_path, "someone/weights", published.checkpoint, "v1", subfolder or "")
    hub_cache(tmp_path, "someone/tokenizers", published.tokenizer)
    place = {"revision": "v1", "subfolder": subfolder}
    agent = WorldVLA.from_pretrained("someone/weights", "someone/tokenizers", image_size=128, **place)
    assert agent.processor.image_size == 128
    place = {key: value for key, value in place.items() if value}
    assert type(AutoModel.from_pretrained("someone/weights", **place)) is WorldVLAModel
    model = WorldVLAForConditionalGeneration.from_pretrained("someone/weights", **place)
    assert torch.equal(model.lm_head.weight, agent.model.lm_head.weight)
    with pytest.raises(PretrainedFilesError, match="nobody/nothing"):
        WorldVLA.from_pretrained("someone/weights", "nobody/nothing", **place)


def test_push_to_hub_uploads_the_whole_folder(agent, monkeypatch):
    uploads, deleted = [], []

    def upload_folder(self, *, repo_id, folder_path, commit_message, **options):
        names = {path.name for path in Path(folder_path).iterdir()}
        uploads.append((self.token, repo_id, commit_message, names, (Path(folder_path) / "README.md").read_text()))
        deleted.extend(options["delete_patterns"])
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
    # Weights of an older checkpoint go with the same commit; those of the tokenizers stay.
    stale = [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "adapter_config.json",
    ]
    kept = ["image_tokenizer/model.safetensors", "model.fp16.safetensors", "README.md", "config.json"]
    gone = [name for name in [*stale, *kept] if any(fnmatch(name, pattern) for pattern in deleted)]
    assert gone == stale


def test_constrained_answers_are_chunks_whatever_is_asked(agent):
    """Words it never saw and a picture of noise."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 200, 3), dtype=np.uint8))
    constrained = agent.predict_actions([noise], "do whatever you like", num_actions=4)
    assert constrained.shape == (4, 7)
    assert np.isfinite(constrained).all()


def test_free_answers_are_read_strictly(published, agent, monkeypatch):
    from worldvla_model import agent as module

    for name in ("continue_chunks", "continue_frames"):
        monkeypatch.setattr(module, name, lambda *_, **__: [[10_004, 10_006, 8_710]])
    picture = [published.frame("libero_goal_0", 0)]
    message = r"left the grammar: position 2: expected 10006 .* found 8710.* It said \[10004, 10006, 8710\]"
    with pytest.raises(SequenceError, match=message):
        agent.predict_actions(picture, "open it", constrained=False)
    with pytest.raises(SequenceError, match=message):
        agent.predict_frame(picture, np.zeros((1, 7)), constrained=False)


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.campaign)])
def test_free_answers_become_actions_or_an_error_that_shows_them(published, agent, monkeypatch, count):
    from worldvla_model import agent as module

    rng, outcomes = random.Random(0), Counter()
    chunks = [r["generated"] for r in references(published, "action")]
    monkeypatch.setattr(agent.processor, "action_prompts", lambda *_: [[0]])
    for _ in range(count):
        said = list(rng.choice(chunks))
        for _ in range(rng.randrange(3)):  # some ids replaced, left out or doubled
            at = rng.randrange(len(said) - 1)
            said[at : at + 1] = rng.choice([[], [said[at]] * 2, [rng.randrange(65_536)], [10_006]])
        monkeypatch.setattr(module, "continue_chunks", lambda *_, answer=said, **__: [answer])
        try:
            actions = agent.predict_actions([None], "open it", constrained=False)
        except SequenceError as error:
            shown = str(error)
            assert str(said) in shown
            outcomes["refused"] += 1
        else:
            assert actions.shape == (len(actions), 7)
            assert len(said) == 9 * len(actions) + 1
            assert np.isfinite(actions).all()
            outcomes["understood"] += 1
    assert min(outcomes["refused"], outcomes["understood"]) > count / 5


def scripts(rng, vocabulary, size):
    """Answers that are nearly chunks or frames, and some that are."""
    image = sequence.image_block([[rng.randrange(99) for _ in range(size)] for _ in range(size)], vocabulary)
    actions = [
        sequence.action_block([10_006 + rng.randrange(256) for _ in range(7)], vocabulary)
        for _ in range(rng.randrange(1, 5))
    ]
    said = [*image] if rng.random() < 0.5 else [token for action in actions for token in action]
    said.append(vocabulary.eot)
    kind = rng.randrange(8)
    at = rng.randrange(len(said))
    strange = rng.choice(
        [vocabulary.boa, vocabulary.eoa, vocabulary.boi, vocabulary.eoi, vocabulary.bos, vocabulary.eot]
        + [vocabulary.newline, rng.choice(said), 10_007, 40, 16_400, rng.randrange(vocabulary.size)]
    )
    if kind == 0:
        said[at] = strange
    elif kind == 1:
        said.insert(at, strange)
    elif kind == 2:
        del said[at]
    elif kind == 3:
        said[:0] = rng.choice([actions[0], image, [vocabulary.bos], [16_400], [vocabulary.boa], [vocabulary.eot]])
    elif kind == 4:
        said[-1:] = rng.choice([actions[0], image, [16_400]]) + [vocabulary.eot]
    elif kind == 5 and rng.random() < 0.2:
        said.pop()  # it says it over and over and never ends its turn
    return said


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 40), *(pytest.param(seed, 1_000, marks=pytest.mark.campaign) for seed in range(10))]
)
def test_models_that_say_anything_give_chunks_and_frames_or_an_error_that_shows_the_ids(
    published, agent, monkeypatch, seed, count
):
    """From the model to the caller: no malformed answer comes through, and none is lost."""
    rng, outcomes, vocabulary = random.Random(seed), Counter(), agent.processor.vocabulary
    model, tell = scripted_model(vocabulary.size, positions=96)
    parts = agent.with_settings(history_length=1).processor  # whose prompts fit
    scripted = WorldVLA(model, parts)
    frame = published.frame("libero_goal_0", 0)
    codes = np.zeros((2, 2), int)
    to_act = sequence.action_prompt([16_400], [codes], vocabulary)
    to_imagine = sequence.world_prompt([16_400], [codes], np.full((1, 7), 10_006), vocabulary)
    monkeypatch.setattr(parts, "action_prompts", lambda *_: [to_act])
    monkeypatch.setattr(parts, "world_prompt", lambda *_: to_imagine)
    monkeypatch.setattr(parts.images, "decode", lambda codes: np.zeros((1, 32, 32, 3), np.uint8))
    for _ in range(count):
        said, size = scripts(rng, vocabulary, rng.choice([2, 2, 2, 4])), agent.processor.images.codebook_size
        whole = said[: said.index(vocabulary.eot) + 1] if vocabulary.eot in said else None
        for prompt, kind in ((to_act, "chunk"), (to_imagine, "frame")):
            tell(len(prompt), said)
            try:
                if kind == "chunk":
                    answer = scripted.predict_actions([frame], "open it", constrained=False)
                else:
                    answer = scripted.predict_frame([frame], np.zeros((1, 7)), constrained=False)
            except SequenceError as error:
                answer, shown = None, str(error).split("It said [")[1].rstrip("]")
                ids = [int(token) for token in shown.split(", ")]
                assert ids == (whole or [*said, *said * 96])[: len(ids)]
                assert whole is None or len(ids) == len(whole) or len(prompt) + len(whole) > 96 or is_nested(ids)
            if kind == "chunk":
                right = whole is not None and is_chunk(whole, vocabulary)
            else:
                slots = [*sequence.image_slots(2, 2, vocabulary, codebook_size=size), [vocabulary.eot]]
                fits = whole is not None and len(whole) == len(slots)
                right = fits and all(token in slot for token, slot in zip(whole, slots, strict=True))
            assert (answer is not None) == right, said
            if kind == "chunk" and right:
                np.testing.assert_array_equal(answer, agent.processor.decode_actions(whole))
            outcomes[kind, right] += 1
    assert min(outcomes.values()) > count / 20, outcomes
    assert len(outcomes) == 4


def is_chunk(ids, vocabulary):
    slots = sequence.action_slots(7, vocabulary)
    actions, rest = divmod(len(ids) - 1, len(slots))
    grammar = [*slots * actions, [vocabulary.eot]]
    return actions > 0 and rest == 0 and all(token in slot for token, slot in zip(ids, grammar, strict=True))


def is_nested(ids):
    """Whether blocks of a kind have begun or ended one too many times, which no mask can be made of."""
    return any(abs(ids.count(begin) - ids.count(end)) > 1 for begin, end in ((10_004, 15_004), (8_197, 8_196)))


def test_several_scenes_at_once(published, agent):
    known = references(published, "action")
    scenes = [(frames(published, r), instruction(published, r)) for r in known]
    assert len({len(r["prompt"]) for r in known}) > 1
    for constrained in (True, False):
        found = agent.predict_actions_batch(*zip(*scenes, strict=True), constrained=constrained)
        for actions, (images, words) in zip(found, scenes, strict=True):
            np.testing.assert_array_equal(actions, agent.predict_actions(images, words, constrained=constrained))
    pictures = scenes[0][0]
    with pytest.raises(ValueError, match="2 lists of images and 1 instructions"):
        agent.predict_actions_batch([pictures, pictures], ["open it"])
    with pytest.raises(ValueError, match="0 lists of images"):
        agent.predict_actions_batch([], [])


def test_imagined_frames_follow_from_imagined_ones(published, agent):
    picture, actions = published.frame("libero_goal_0", 0), np.full((3, 7), 0.1)
    frames = agent.imagine([picture], actions)
    assert frames.shape == (3, 128, 128, 3)
    near = {"atol": 1, "rtol": 0}  # decoded in a batch, pixels round differently
    np.testing.assert_allclose(1.0 * frames[0], agent.predict_frame([picture], actions[:1]), **near)
    text = agent.processor.text.encode(agent.processor.settings.world_prompt)
    vocabulary, ids = agent.processor.vocabulary, agent.processor.actions.encode(actions)
    codes = agent.processor.encode_images([picture])

    def next_frame(prompt):
        slots = [*sequence.image_slots(8, 8, vocabulary), [vocabulary.eot]]
        answer = fill(Decoder(agent.model, prompt, attention="causal"), slots)
        return answer, sequence.images_of(sequence.parse(answer, vocabulary))[0]

    for step in range(3):
        _, now = next_frame(sequence.world_prompt(text, codes[-1:], ids[step : step + 1], vocabulary))
        codes.append(now)
    np.testing.assert_array_equal(frames, agent.processor.images.decode(np.stack(codes[1:])))

    codes, prompt = codes[:1], sequence.world_prompt(text, codes[:1], ids[:1], vocabulary)
    for step in range(2):  # two rounds: the second goes on where the first has ended
        answer, now = next_frame(prompt)
        codes.append(now)
        prompt = [*prompt, *answer, *sequence.action_block(ids[step + 1], vocabulary), vocabulary.eot]
    _, last = next_frame(sequence.world_prompt(text, codes[-1:], ids[2:], vocabulary))
    together = agent.imagine([picture], actions, rounds=2)
    np.testing.assert_array_equal(together, agent.processor.images.decode(np.stack([*codes[1:], last])))


def test_frames_that_are_codes_already_are_imagined_from_as_they_are(published, agent):
    codes = np.array(agent.processor.encode_images([published.frame("libero_goal_0", step) for step in (0, 1)]))
    actions = np.full((3, 7), 0.1)
    imagined = agent.imagine_codes(codes, actions)
    assert imagined.shape == (2, 8, 8)
    pictures = [published.frame("libero_goal_0", step) for step in (0, 1)]
    np.testing.assert_array_equal(agent.imagine(pictures, actions), agent.processor.images.decode(imagined))
    with pytest.raises(ValueError, match="3 actions for 0 images, 1 rounds; at least 1 image"):
        agent.imagine_codes(codes[:0], actions)


def test_imagining_needs_an_action_for_each_frame(published, agent):
    pictures = [published.frame("libero_goal_0", step) for step in (0, 1)]
    for count, rounds in ((1, 1), (2, 0)):
        with pytest.raises(
            ValueError, match=f"{count} actions for 2 images, {rounds} rounds; at least 1 image, an action"
        ):
            agent.imagine(pictures, np.zeros((count, 7)), rounds=rounds)


@pytest.mark.slow
def test_compiled_passes_give_the_same(published, agent):
    reference = references(published, "action")[0]
    scene = frames(published, reference), instruction(published, reference)
    compiled = WorldVLA(agent.model, agent.processor)
    assert compiled.compile(backend="eager") is compiled
    assert compiled.workspace.slots == 256 + 2 * 76 + 16 * 9
    assert compiled.with_settings(num_actions=3).workspace is compiled.workspace
    for constrained in (True, False):
        found, expected = (each.predict_actions(*scene, constrained=constrained) for each in (compiled, agent))
        np.testing.assert_array_equal(found, expected)
    found, expected = (each.predict_frame(scene[0][:1], np.zeros((1, 7))) for each in (compiled, agent))
    np.testing.assert_array_equal(found, expected)
    assert agent.workspace is None
    compiled.compile(backend="eager", slots=120)  # what does not fit is not compiled
    found, expected = (each.predict_actions(*scene, num_actions=3) for each in (compiled, agent))
    np.testing.assert_array_equal(found, expected)


def test_bad_requests(published, agent, monkeypatch):
    picture = published.frame("libero_goal_0", 0)
    with pytest.raises(ValueError, match="unconstrained decoding ends where the model ends"):
        agent.predict_actions([picture], "open it", num_actions=3, constrained=False)
    with pytest.raises(SequenceLengthError, match="4096 positions"):
        agent.predict_actions([picture], "open it", num_actions=500)
    with pytest.raises(DecodingError, match="num_actions is 0"):
        agent.predict_actions([picture], "open it", num_actions=0)
    monkeypatch.setattr(agent.model.config, "attention", "none")
    with pytest.raises(MaskError, match="attention is 'none'"):
        agent.predict_actions([picture], "open it", num_actions=1)
    with pytest.raises(SequenceError, match="1 images and 2 actions"):
        agent.predict_frame([picture], np.zeros((2, 7)))
    with pytest.raises(ValueError, match="index \\(0, 0\\) is nan"):
        agent.predict_frame([picture], np.full((1, 7), np.nan))


def test_tokenizers_in_a_folder_of_a_repository_of_their_own(published, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_cache(tmp_path, "lab/WorldVLA", published.checkpoint, "v1", "model_256/libero_goal")
    hub_cache(tmp_path, "lab/WorldVLA", published.tokenizer, "v1", "chameleon/tokenizer")
    model = {"revision": "v1", "subfolder": "model_256/libero_goal"}
    for tokenizers, place in (
        ("lab/WorldVLA", {"tokenizers_revision": "v1", "tokenizers_subfolder": "chameleon/tokenizer"}),
        ("hf://lab/WorldVLA@v1/chameleon/tokenizer", {}),
        (None, {"tokenizers_subfolder": "chameleon/tokenizer"}),  # of the model's repository, at its revision
    ):
        agent = WorldVLA.from_pretrained("lab/WorldVLA", tokenizers, 128, device="cpu", **model, **place)
        assert agent.processor.images.image_size == 128
    with pytest.raises(ValueError, match="tokenizers_revision is 'v1', but tokenizers names no repository"):
        WorldVLA.from_pretrained("lab/WorldVLA", tokenizers_revision="v1", **model)
    with pytest.raises(PretrainedFilesError, match=r"tokenizer\.json or text_tokenizer\.json"):
        WorldVLA.from_pretrained("lab/WorldVLA", "lab/WorldVLA", **model)


# What people pass for the history of one prompt: a picture, an array, a list, a tuple or a deque of them, an array
# (M, H, W, 3), tensors of uint8 (torchvision's channels come first, though), RGBA of simulators, pictures of
# several sizes.
@pytest.mark.parametrize(
    "given",
    [
        lambda picture: picture,
        lambda picture: np.asarray(picture),
        lambda picture: torch.from_numpy(np.array(picture)),
        lambda picture: np.asarray(picture)[None],
        lambda picture: (picture,),
        lambda picture: deque([picture]),
        lambda picture: np.asarray(picture.convert("RGBA")),
    ],
    ids=["PIL", "array", "tensor", "batch", "tuple", "deque", "RGBA"],
)
def test_one_image_is_a_list_of_one(published, agent, given):
    picture, action = published.frame("libero_goal_0", 0), np.full(7, 0.1)
    expected = agent.processor.action_prompt([picture], "open it")
    assert agent.processor.action_prompt(given(picture), "open it") == expected
    assert agent.processor.action_prompts([given(picture), [picture]], ["open it"] * 2) == [expected] * 2
    expected = agent.processor.world_prompt([picture], action[None])
    assert agent.processor.world_prompt(given(picture), action) == expected
    np.testing.assert_array_equal(
        agent.predict_actions(given(picture), "open it", num_actions=1),
        agent.predict_actions([picture], "open it", num_actions=1),
    )


def test_one_image_is_imagined_from(published, agent):
    picture, action = published.frame("libero_goal_0", 0), np.full(7, 0.1)
    np.testing.assert_array_equal(agent.imagine(picture, action), agent.imagine([picture], action[None]))
    assert agent.processor.world_sample(picture, action, picture) == agent.processor.world_sample(
        [picture], action[None], [picture]
    )


def test_images_of_several_shapes_are_one_history(published, agent):
    picture = published.frame("libero_goal_0", 0)
    wide = picture.resize((256, 64))
    assert agent.predict_actions([wide, picture], "open it", num_actions=1).shape == (1, 7)
    assert agent.predict_frame([wide, picture], np.zeros((2, 7))).shape == (128, 128, 3)
    assert agent.imagine([picture, wide], np.zeros((2, 7))).shape == (1, 64, 256, 3)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            np.zeros((3, 64, 64), np.uint8),
            r"image 1 of 1, uint8 of shape \(3, 64, 64\): .*channels come first",
        ),
        (torch.zeros(3, 64, 64), r"image 1 of 1, float32 of shape \(3, 64, 64\): .*uint8 or uint16 needed"),
        (np.zeros((64, 64, 3)), r"image 1 of 1, float64 of shape \(64, 64, 3\): .*uint8 or uint16 needed"),
        ([np.zeros((64, 64, 3), np.uint8), np.zeros(5, np.uint8)], r"image 2 of 2, uint8 of shape \(5,\)"),
        ([[np.zeros((64, 64, 3), np.uint8)]], "image 1 of 1: image is list"),
        ("frame.png", r"images are str, 'frame.png'; an image \(PIL, or an array .* or a list of them needed"),
        ({"agentview": None}, "images are dict"),
        (None, "images are NoneType"),
    ],
)
def test_what_is_no_image_is_named_with_shape_and_type(agent, image, message):
    with pytest.raises(ImageError, match=message):
        agent.predict_actions(image, "open it")
    with pytest.raises(ImageError, match=message):
        agent.predict_frame(image, np.zeros((1, 7)))


def load(published, **options):
    return WorldVLA.from_pretrained(published.checkpoint, published.tokenizer, image_size=128, **options)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"torch_dtype": torch.float32}, torch.float32),
        ({"torch_dtype": "float32"}, torch.float32),
        ({"torch_dtype": "auto"}, torch.bfloat16),
        ({"torch_dtype": torch.float16, "dtype": "auto"}, torch.float16),
        ({"torch_dtype": "torch.float32", "dtype": torch.float32}, torch.float32),
        ({"torch_dtype": None, "dtype": "float32"}, torch.float32),
    ],
)
def test_the_older_name_of_dtype_is_obeyed(published, options, dtype):
    assert load(published, device="cpu", **options).model.dtype == dtype


def test_two_dtypes_are_refused(published):
    with pytest.raises(ValueError, match=r"dtype is torch\.float16 and torch_dtype, its older name, is float32"):
        load(published, dtype=torch.float16, torch_dtype="float32")


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({}, "meta"),
        ({"device_map": None}, "meta"),
        ({"device_map": "cpu"}, "cpu"),
        ({"device_map": {"": "cpu"}}, "cpu"),
    ],
)
def test_models_that_were_placed_already_are_not_moved(published, options, where):
    found = load(published, device="meta", **options)
    assert {parameter.device.type for parameter in found.model.parameters()} == {where}
    assert found.processor.images.device.type == "meta"  # only this is what `device` says


# bitsandbytes, GPTQ, AWQ and others put weights where they can use them, and `.to` raises then. They come with
# quantization_config=, with load_in_4bit= or load_in_8bit=, or quantized already, as config.json says. BitNet's
# needs neither a GPU nor another package: it quantizes while it computes.
def test_quantized_models_are_not_moved(published, tmp_path):
    to_ours(published.checkpoint, tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    how = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps({**config, "quantization_config": how}))
    found = WorldVLA.from_pretrained(tmp_path / "quantized", published.tokenizer, image_size=128, device="meta")
    assert found.model.is_quantized
    assert {parameter.device.type for parameter in found.model.parameters()} == {"cpu"}


def test_bits_of_bitsandbytes_are_one_thing_only(published):
    config = BitNetQuantConfig()
    with pytest.raises(ValueError, match="load_in_8bit and quantization_config are given; one of them"):
        load(published, device="cpu", load_in_8bit=True, quantization_config=config)
    assert load(published, device="cpu", load_in_4bit=False).model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "fields", "message"),
    [
        (
            {"image_size": 1024},
            {},
            r"2 images .* of 1024 px .* takes 8340 tokens at least; .* 4096 pos",
        ),
        ({"history_length": 60}, {}, r"60 images \(history_length\) of 128 px .* the model has 4096 positions"),
        ({"num_actions": 500}, {}, r"with 500 actions takes 4655 tokens at least"),
        ({}, {"max_position_embeddings": 96}, r"takes 164 tokens at least; the model has 96 positions"),
        (
            {},
            {"boi_token_id": 8_196},
            r"boi is 8197 in the tokenizer, 8196 in .* \(boi_token_id",
        ),
        ({}, {"vocab_size": 16_640}, r"the tokenizer has 16971 ids; the model has 16640 \(vocab_size\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused_when_put_together(agent, small_config, settings, fields, message):
    changed = agent.processor.with_settings(**settings)
    whole = {**small_config.to_dict(), "vocab_size": 17_024, "max_position_embeddings": 4096, **fields}
    with pytest.raises(ValueError, match=message):
        WorldVLA(WorldVLAForConditionalGeneration(WorldVLAConfig(**whole)), changed)
