"""The networks of LPIPS and FVD, with random weights: how they are found, read and asked."""

import pickle
import sys
from http.client import IncompleteRead
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from worldvla_libero.evaluation.world.backbones import (
    I3D,
    I3D_URL,
    WeightsError,
    fetch_weights,
    load_backbones,
    load_lpips,
)
from worldvla_libero.evaluation.world.metrics import frame_lpips

# (outside, inside, kernel) of the convolutions of AlexNet, by their place in torchvision's `features`.
ALEXNET = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}


def alexnet(path: Path, **changes: torch.Tensor | None) -> Path:
    """Random weights by torchvision's names, with a layer of the classifier, which is not needed."""
    generator, tensors = torch.Generator().manual_seed(0), {"classifier.6.bias": torch.zeros(1_000)}
    for place, (outside, inside, kernel) in ALEXNET.items():
        weight = torch.randn(outside, inside, kernel, kernel, generator=generator)
        tensors |= {f"features.{place}.weight": weight / (inside * kernel**2) ** 0.5}
        tensors |= {f"features.{place}.bias": torch.zeros(outside)}
    torch.save({name: value for name, value in {**tensors, **changes}.items() if value is not None}, path)
    return path


def test_without_weights_there_is_a_reason_instead_of_a_number():
    found = load_backbones()
    assert found.lpips is None
    assert found.video is None
    assert found.described == {}
    assert found.missing == {
        "lpips": "no weights: give --lpips-weights FILE, or --fetch-weights",
        "fvd": "no weights: give --fvd-weights FILE, or --fetch-weights",
    }


def test_lpips_is_that_of_the_weights_given(tmp_path):
    found = load_backbones(lpips_weights=alexnet(tmp_path / "alex.pth"))
    assert found.described["lpips"]["network"] == "alex"
    assert len(found.described["lpips"]["weights"]) == 64
    assert list(found.missing) == ["fvd"]
    rng = np.random.default_rng(0)
    true = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    near = (true.astype(int) + rng.integers(-9, 10, true.shape)).clip(0, 255).astype(np.uint8)
    far = rng.integers(0, 256, true.shape, dtype=np.uint8)
    distances = [frame_lpips(frames, true, found.lpips) for frames in (true, near, far)]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert (distances[0] < distances[1]).all()
    assert (distances[1] < distances[2]).all()


def test_lpips_brings_frames_to_where_it_computes(tmp_path):
    # Tensors of the device `meta` hold nothing, but to mix them with others fails as it does on a GPU.
    found = load_backbones(lpips_weights=alexnet(tmp_path / "alex.pth"), device="meta")
    frames = torch.zeros(2, 3, 64, 64)
    assert found.lpips(frames, frames).device.type == "meta"


def test_files_that_hold_something_else_are_refused_and_nothing_in_them_is_run(tmp_path):
    with pytest.raises(
        WeightsError, match=r"alex\.pth holds no AlexNet: features\.3\.bias missing or of another sh"
    ):
        load_lpips(alexnet(tmp_path / "alex.pth", **{"features.3.bias": None}))
    with pytest.raises(WeightsError, match="holds no VGG-16"):
        load_lpips(alexnet(tmp_path / "alex.pth"), "vgg")
    with pytest.raises(WeightsError, match="network of LPIPS is 'alexa'; allowed: 'vgg', 'alex', 'squeeze'"):
        load_lpips(tmp_path / "alex.pth", "alexa")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_lpips(tmp_path / "nowhere.pth")

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    with (tmp_path / "trap.pth").open("wb") as file:
        pickle.dump(Trap(), file)
    torch.save({"features.0.weight": Trap()}, tmp_path / "trap2.pth")
    for trap in ("trap.pth", "trap2.pth"):
        with pytest.raises(WeightsError, match=trap):
            load_lpips(tmp_path / trap)
    assert not (tmp_path / "sprung").exists()


def test_a_missing_package_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"LPIPS needs lpips; remedy: pip install 'worldvla-libero\[metrics\]'"):
        load_lpips(alexnet(tmp_path / "alex.pth"))
    monkeypatch.setitem(sys.modules, "cdfvd.third_party.i3d.pytorch_i3d", None)
    with pytest.raises(ImportError, match=r"FVD needs cd-fvd; remedy: pip install 'worldvla-libero\[metrics\]'"):
        load_backbones(fvd_weights=tmp_path / "i3d.pt")


def test_weights_are_fetched_once_with_their_checksum_and_only_when_asked(tmp_path, monkeypatch):
    asked = []

    def download(url, file, checksum, progress):
        asked.append((url.rsplit("/", 1)[1], checksum))
        alexnet(Path(file))

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    load_backbones(lpips_weights=alexnet(tmp_path / "mine.pth"))
    assert asked == []
    file = fetch_weights("alex")
    assert fetch_weights("alex") == file
    assert asked == [("alexnet-owt-7be5be79.pth", "7be5be79")]
    assert load_lpips(file)
    assert fetch_weights("i3d").is_file()
    assert asked[1:] == [(I3D_URL.rsplit("/", 1)[1], None)]


@pytest.mark.parametrize(("network", "option"), [("squeeze", "--lpips-weights"), ("i3d", "--fvd-weights")])
def test_without_a_network_it_says_what_to_bring(network, option, tmp_path, monkeypatch):
    def download(*_, **__):
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(WeightsError, match=rf"cannot fetch https://\S+: .*no route.*; remedy: .* {option} FILE"):
        fetch_weights(network)


@pytest.mark.parametrize("broken", ["half", "page", "list", "raised"])
def test_half_a_file_never_has_the_name_of_the_weights(broken, tmp_path, monkeypatch):
    def download(_, file, *__, **___):
        whole = alexnet(tmp_path / "whole.pth").read_bytes()
        if broken == "list":
            torch.save([1, 2], file)
        else:
            Path(file).write_bytes(b"<html>" if broken == "page" else whole[: len(whole) // 2])
        if broken == "raised":
            raise IncompleteRead(b"", 9)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(
        WeightsError, match=r"cannot fetch https://\S+: .*; remedy: .* --fvd-weights FILE"
    ) as raised:
        fetch_weights("i3d")
    assert ".i3d" not in str(raised.value).replace(I3D_URL, "")  # no name of a draft
    assert list((tmp_path / "hub" / "checkpoints").iterdir()) == []


@pytest.mark.slow
def test_fvd_looks_with_the_i3d_of_the_weights_given(tmp_path):
    from cdfvd.third_party.i3d.pytorch_i3d import InceptionI3d
    from cdfvd.third_party.i3d.utils import preprocess_i3d

    torch.manual_seed(0)
    network = InceptionI3d(400, in_channels=3).eval()
    torch.save(network.state_dict(), tmp_path / "i3d.pt")
    found = load_backbones(fvd_weights=tmp_path / "i3d.pt")
    assert list(found.missing) == ["lpips"]
    videos = np.random.default_rng(0).integers(0, 256, (2, found.min_frames, 64, 64, 3), dtype=np.uint8)
    with torch.inference_mode():
        expected = network(preprocess_i3d(videos.astype(np.float32)))
    np.testing.assert_allclose(found.video(videos), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError):  # nothing would be left of time
        found.video(videos[:, :-1])
    state = network.state_dict()
    del state["logits.conv3d.bias"]
    torch.save(state, tmp_path / "i3d.pt")
    with pytest.raises(WeightsError, match=r"no weights of I3D of Kinetics-400: logits\.conv3d\.bias missing"):
        I3D(tmp_path / "i3d.pt")
