import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest

from worldvla_libero.data.record import RECORD_FILE, DataRecord, ShardError, SplitRecord
from worldvla_libero.data.shards import (
    TokenDataset,
    TokenEpisode,
    read_episodes,
    stream,
    token_episode,
    write_episodes,
)
from worldvla_libero.jobs.parts import Dropped
from worldvla_tokenizers import ImageTokenizer


def same(a: TokenEpisode, b: TokenEpisode) -> bool:
    words = (a.id, a.task, a.instruction) == (b.id, b.task, b.instruction)
    return words and np.array_equal(a.codes, b.codes) and np.array_equal(a.actions, b.actions)


@pytest.mark.parametrize("per_shard", [1000, 70, 1])
def test_episodes_come_back_from_any_number_of_shards_and_batches(tmp_path, per_shard, episodes, data_set):
    made = episodes(150 if per_shard > 1 else 5)
    data = TokenDataset(data_set(tmp_path / "d", made, per_shard=per_shard))
    assert len(data) == len(made)
    assert data.lengths.tolist() == [len(e) for e in made]
    assert all(same(a, b) for a, b in zip(data, made, strict=True))
    assert same(data[-1], made[-1])
    assert all(same(a, b) for a, b in zip(data[1:4], made[1:4], strict=True))
    with pytest.raises(IndexError, match=f"episode {len(made)} of {len(made)} in split 'train'"):
        data[len(made)]


def test_episodes_are_views_of_the_mapped_file(tmp_path, episodes, data_set):
    data = TokenDataset(data_set(tmp_path / "d", episodes(3)))
    assert not data[0].codes.flags.owndata
    assert not data[0].codes.flags.writeable
    assert not data[0].actions.flags.owndata


def test_the_same_episodes_give_the_same_bytes(tmp_path, episodes):
    for name in "ab":
        write_episodes(tmp_path / name, iter(episodes(70)), {"fingerprint": "f"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_metadata_goes_with_the_file(tmp_path, episodes):
    write_episodes(tmp_path / "part", episodes(1, dimensions=4), {"control_hz": 10})
    (episode,), metadata = read_episodes(tmp_path / "part")
    assert metadata == {"control_hz": 10}
    assert episode.actions.shape[1] == 4


def test_workers_are_sent_the_name_and_not_the_data(tmp_path, episodes, data_set):
    data = TokenDataset(data_set(tmp_path / "d", episodes(100)))
    sent = pickle.dumps(data)
    assert len(sent) < 1000
    assert same(pickle.loads(sent)[99], data[99])


def test_datasets_reads_the_shards_mapped_and_streamed(tmp_path, monkeypatch, episodes, data_set):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from datasets import Dataset

    made = episodes(5)
    root = data_set(tmp_path / "d", made)
    mapped = Dataset.from_file(str(root / "data" / "train-00000.arrow"))
    assert mapped.num_rows == 5
    assert same(token_episode(mapped[3]), made[3])
    assert all(same(token_episode(row), e) for row, e in zip(stream(str(root)), made, strict=True))


def test_a_shard_of_another_data_set_is_refused(tmp_path, episodes, data_set):
    ours = data_set(tmp_path / "a", episodes(2))
    other = data_set(tmp_path / "b", episodes(2), tokenizer="y")
    shutil.copy(other / "data" / "train-00000.arrow", ours / "data" / "train-00000.arrow")
    with pytest.raises(ShardError, match=r"is of another data set|belongs to another data set"):
        TokenDataset(ours)


def test_codes_of_another_tokenizer_are_refused(tmp_path, published, episodes, data_set):
    tokenizer = ImageTokenizer.from_pretrained(published.tokenizer)
    fingerprint = tokenizer.vqgan.fingerprint
    TokenDataset(data_set(tmp_path / "a", episodes(1), tokenizer=fingerprint)).check_tokenizer(tokenizer)
    data = TokenDataset(data_set(tmp_path / "b", episodes(1), tokenizer="0123456789abcdef"))
    with pytest.raises(ShardError, match=f"image tokenizer 0123456789ab, not {fingerprint[:12]}"):
        data.check_tokenizer(tokenizer)


def test_settings_changed_by_hand_are_noticed(tmp_path, episodes, data_set):
    root = data_set(tmp_path / "d", episodes(1))
    record = json.loads((root / RECORD_FILE).read_text())
    record["settings"]["image_tokenizer"] = "other"
    (root / RECORD_FILE).write_text(json.dumps(record))
    with pytest.raises(ShardError, match="changed by hand"):
        DataRecord.read(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splits": []}, r"splits is \[\]; dict needed"),
        ({"splits": {"train": 1}}, "split 'train' is 1; an object needed"),
        (
            {"splits": {"train": {"files": [], "episodes": -1, "steps": 0}}},
            "'train' has -1 episodes; a number",
        ),
        ({"splits": {"train": {"files": "x", "episodes": 1, "steps": 1}}}, "'train' has no list of files"),
        (
            {"splits": {"train": {"files": ["../x"], "episodes": 1, "steps": 1}}},
            r"file '\.\./x'; allowed: .* data/",
        ),
        ({"control_hz": 0}, "control_hz is 0; a number above 0"),
        ({"versions": 3}, "versions is 3; dict needed"),
        ({"dropped": {}}, r"dropped is \{\}; list needed"),
        ({"dropped": [{"id": "a"}]}, r"dropped holds \{'id': 'a'\}; id, reason, message needed"),
    ],
)
def test_what_is_wrong_in_a_record_is_named(tmp_path, change, message, episodes, data_set):
    root = data_set(tmp_path / "d", episodes(1))
    record = json.loads((root / RECORD_FILE).read_text())
    (root / RECORD_FILE).write_text(json.dumps(record | change))
    with pytest.raises(ShardError, match=rf"dataset\.json is damaged: .*{message}"):
        DataRecord.read(root)


def test_a_record_is_read_as_it_was_written(tmp_path):
    dropped = (Dropped("a/demo_0", "too short", "a/demo_0: 3 actions"),)
    splits = {"train": SplitRecord(2, 9, ("data/train-00000-of-00001.arrow",))}
    settings = {"image_tokenizer": "12ab", "image_size": 64}
    record = DataRecord(
        settings=settings, splits=splits, name="mine", control_hz=10.0, dropped=dropped, versions={"numpy": "2"}
    )
    (tmp_path / RECORD_FILE).write_text(json.dumps(record.content()))
    assert DataRecord.read(tmp_path) == record
    assert (record.image_tokenizer, record.image_size) == ("12ab", 64)
    with pytest.raises(ShardError, match="the settings of mine hold no image_size"):
        _ = replace(record, settings={}).image_size


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "empty"])
def test_damaged_shards_are_named(tmp_path, damage, episodes, data_set):
    root = data_set(tmp_path / "d", episodes(3))
    shard = root / "data" / "train-00000.arrow"
    content = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(
            {"truncated": content[: len(content) // 2], "foreign": b"PAR1" * 99, "empty": b""}[damage]
        )
    with pytest.raises(ShardError, match=r"train-00000\.arrow"):
        TokenDataset(root)


def test_what_is_no_data_set_is_told_apart(tmp_path, episodes, data_set):
    with pytest.raises(ShardError, match="it is no token data set"):
        TokenDataset(tmp_path)
    (tmp_path / ".work").mkdir()
    with pytest.raises(ShardError, match="preparation has not ended: run it again"):
        TokenDataset(tmp_path)
    root = data_set(tmp_path / "d", episodes(1))
    with pytest.raises(ShardError, match="no split 'test'; existing: train"):
        TokenDataset(root, "test")


def test_frames_and_actions_of_different_number_are_not_written(tmp_path, episodes):
    (episode,) = episodes(1)
    bad = TokenEpisode("x", "t", "i", episode.codes[:-1], episode.actions)
    with pytest.raises(ShardError, match=r"x: .* frames of codes for"):
        write_episodes(tmp_path / "part", [bad], {})


def test_a_data_set_is_pushed_and_pulled_as_the_hub_lays_it_out(tmp_path, monkeypatch, episodes, data_set):
    import huggingface_hub

    root = data_set(tmp_path / "d", episodes(3))
    calls = {}

    def create_repo(self, repo_id, **options):
        calls["create"] = options
        return huggingface_hub.RepoUrl(f"https://huggingface.co/datasets/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **options):
        calls["upload"] = options
        shutil.copytree(folder_path, tmp_path / "hub")
        return type("Commit", (), {"commit_url": "commit/1"})

    def snapshot_download(repo_id, *, repo_type, allow_patterns, **options):
        calls["download"] = (repo_id, repo_type, allow_patterns, options)
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert TokenDataset(root).push_to_hub("lab/data") == "commit/1"
    assert calls["create"]["repo_type"] == calls["upload"]["repo_type"] == "dataset"
    assert {p.relative_to(tmp_path / "hub").as_posix() for p in (tmp_path / "hub").rglob("*.*")} == {
        "dataset.json",
        "action_tokenizer.json",
        "data/train-00000.arrow",
    }
    assert len(TokenDataset.from_pretrained("lab/data", revision="v1")) == 3
    repo, kind, patterns, options = calls["download"]
    assert (repo, kind, options) == ("lab/data", "dataset", {"revision": "v1"})
    assert "data/train-*" in patterns
