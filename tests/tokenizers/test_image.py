"""Pixels ↔ codes: reference blocks, the crop rule, every kind of input, and what is refused."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from worldvla_tokenizers.image import ImageError, ImageTokenizer, crop_sizes, fit, to_rgb
from worldvla_tokenizers.vocabulary import Vocabulary
from worldvla_tokenizers.vqgan import VQGAN, PixelError, VQGANConfig

PUBLISHED = Path(__file__).parents[1] / "fixtures" / "published"
SMALL = VQGANConfig(ch=32, z_channels=8, embed_dim=4, n_embed=32, num_res_blocks=1)


@cache
def reference() -> ImageTokenizer:
    return ImageTokenizer.from_pretrained(PUBLISHED / "tokenizer")


@cache
def small() -> ImageTokenizer:
    torch.manual_seed(0)
    vqgan = VQGAN(SMALL).eval()
    with torch.no_grad():  # entries spread over what the encoder answers, so that codes differ
        z = vqgan.quant_conv(vqgan.encoder(torch.rand(2, 3, 64, 64) * 2 - 1))
        vqgan.quantize.embedding.weight.copy_(z.permute(0, 2, 3, 1).reshape(-1, 4))
    return ImageTokenizer(vqgan)


def frame(name: str) -> Image.Image:
    return Image.open(PUBLISHED / "frames" / f"{name}.png").convert("RGB")


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


# --- reference answers ------------------------------------------------------------------------------------------


def test_crop_sizes_are_the_published_ones_in_order():
    expected = json.loads((PUBLISHED / "crop_sizes.json").read_text())
    assert expected
    for target, sizes in expected.items():
        assert [list(size) for size in crop_sizes(int(target))] == sizes


@pytest.mark.parametrize("target", [128, 256, 512])
def test_published_image_blocks(target):
    """Halved, left alone and enlarged: the ids depend on the order of the filters."""
    ids = json.loads((PUBLISHED / "image_blocks.json").read_text())[f"square256@{target}"]
    v = Vocabulary.published()
    exact = ImageTokenizer.from_pretrained(PUBLISHED / "tokenizer").to(dtype=torch.float64)  # no near ties there
    codes = exact.encode(frame("libero_goal_8_0"), target=target)
    assert codes.shape == (1, target // 16, target // 16)
    rows = [[*v.image_ids(row).tolist(), v.newline] for row in codes[0]]
    grid = v.grid(target // 32)
    assert [v.boi, grid, grid, *[i for row in rows for i in row], v.eoi] == ids


def test_decoded_image_is_the_published_one_within_a_level():
    codes = json.loads((PUBLISHED / "image_codes.json").read_text())["libero_goal_0_0"]
    image = reference().decode(np.array(codes).reshape(16, 16))
    expected = np.asarray(Image.open(PUBLISHED / "decoded_libero_goal_0_0.png").convert("RGB"))
    assert image.shape == (1, 256, 256, 3)
    assert abs(image[0].astype(int) - expected.astype(int)).max() <= 1


# --- batches ----------------------------------------------------------------------------------------------------


def test_arrays_pil_images_and_batch_sizes_agree():
    batch = np.stack([noise(32, 48, seed=i) for i in range(5)])
    codes = small().encode(batch)
    assert codes.shape == (5, 2, 3)
    assert codes.dtype == np.int64
    assert np.array_equal(codes, small().encode([Image.fromarray(image) for image in batch], batch_size=2))
    assert np.array_equal(codes[:1], small().encode(batch[0]))
    assert np.array_equal(codes[:1], small().encode(Image.fromarray(batch[0])))
    assert len(np.unique(codes)) > 5
    images = small().decode(codes)
    assert images.shape == batch.shape
    assert images.dtype == np.uint8
    # Convolutions of other batch sizes round differently, and truncation turns that into a level.
    others = small().decode(codes.astype(np.uint16), batch_size=2)
    assert abs(images.astype(int) - others.astype(int)).max() <= 1


def test_configured_size_fits_images_of_any_sizes():
    tokenizer = ImageTokenizer(small().vqgan, image_size=64)
    assert tokenizer.encode([noise(50, 60), noise(300, 290)]).shape == (2, 4, 4)
    assert tokenizer.encode(noise(50, 60), target=32).shape == (1, 2, 2)
    with pytest.raises(ImageError, match=r"2 sizes .*\(32, 128\), \(128, 32\)"):
        tokenizer.encode([noise(40, 400), noise(400, 40)])


def test_save_and_load(tmp_path):
    ImageTokenizer(small().vqgan, image_size=64).save_pretrained(tmp_path / "out")
    loaded = ImageTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.image_size == 64
    assert ImageTokenizer.from_pretrained(tmp_path / "out", image_size=32).image_size == 32
    image = noise(64, 64)
    assert np.array_equal(loaded.encode(image), small().encode(image))
    (tmp_path / "out" / "image_tokenizer.json").write_text('{"image_size": 65}')
    with pytest.raises(ImageError, match="65"):
        ImageTokenizer.from_pretrained(tmp_path / "out")
    (tmp_path / "out" / "image_tokenizer.json").write_text("[]")
    with pytest.raises(ImageError, match=r"image_tokenizer\.json"):
        ImageTokenizer.from_pretrained(tmp_path / "out")


def test_moving_and_casting(tmp_path):
    small().save_pretrained(tmp_path)
    tokenizer = ImageTokenizer.from_pretrained(tmp_path)
    assert tokenizer.to("cpu", torch.bfloat16) is tokenizer
    assert (tokenizer.device.type, tokenizer.dtype) == ("cpu", torch.bfloat16)
    assert tokenizer.decode(tokenizer.encode(noise(32, 32))).shape == (1, 32, 32, 3)
    assert ImageTokenizer.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


# --- the crop rule ----------------------------------------------------------------------------------------------


@given(units=st.integers(1, 40))
def test_crop_sizes_cover_about_the_target_area(units):
    sizes = crop_sizes(32 * units)
    assert (32 * units, 32 * units) in sizes
    assert len(set(sizes)) == len(sizes)
    assert {(height, width) for width, height in sizes} == set(sizes)
    for width, height in sizes:
        assert width % 32 == height % 32 == 0
        assert width * height <= (32 * units) ** 2
        assert max(width, height) <= 4 * min(width, height)


@settings(deadline=None, max_examples=50)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    target=st.sampled_from([32, 64, 128]),
    seed=st.none() | st.integers(0, 9),
)
def test_any_image_fits(width, height, target, seed):
    generator = None if seed is None else np.random.default_rng(seed)
    fitted = fit(Image.new("RGB", (width, height), (9, 8, 7)), target, generator=generator)
    assert fitted.size in crop_sizes(target)
    assert (np.asarray(fitted) == (9, 8, 7)).all()


@pytest.mark.parametrize("size", [(256, 256), (512, 128), (128, 512)])
def test_images_of_a_candidate_size_are_left_alone(size):
    image = noise(size[1], size[0])
    for generator in (None, np.random.default_rng(0)):
        assert np.array_equal(np.asarray(fit(image, 256, generator=generator)), image)


def test_crops_are_centred_unless_a_generator_is_passed():
    image = np.zeros((64, 78, 3), dtype=np.uint8)
    image[:, :, 0] = np.arange(78)
    assert np.asarray(fit(image, 64))[0, 0, 0] == 7
    lefts = {
        int(np.asarray(fit(image, 64, generator=np.random.default_rng(seed)))[0, 0, 0]) for seed in range(200)
    }
    assert lefts == set(range(15))
    tokenizer = ImageTokenizer(small().vqgan, image_size=64)
    first, same = (tokenizer.encode(noise(64, 78), generator=np.random.default_rng(1)) for _ in range(2))
    assert np.array_equal(first, same)


@pytest.mark.parametrize("target", [0, 31, 48, -32, 2**31, 64.0, True, "64"])
def test_targets_out_of_range(target):
    with pytest.raises(ImageError, match="multiple of 32"):
        crop_sizes(target)
    with pytest.raises(ImageError, match="multiple of 32"):
        small().encode(noise(64, 64), target=target)


# --- kinds of images --------------------------------------------------------------------------------------------


def test_transparency_is_blended_onto_white():
    rgba = np.array([[[0, 0, 0, 255], [0, 0, 0, 0], [255, 0, 0, 128]]], dtype=np.uint8)
    expected = [[0, 0, 0], [255, 255, 255], [255, 127, 127]]
    assert np.asarray(to_rgb(rgba))[0].tolist() == expected
    assert np.asarray(to_rgb(Image.fromarray(rgba)))[0].tolist() == expected
    grey = np.array([[[0, 255], [0, 0]]], dtype=np.uint8)
    assert np.asarray(to_rgb(grey))[0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_palette_with_and_without_a_transparent_colour():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert np.asarray(to_rgb(image))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    image.info["transparency"] = 1
    assert np.asarray(to_rgb(image))[0].tolist() == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1)])
def test_grey(shape):
    grey = noise(4, 5, 1).reshape(shape)
    rgb = np.asarray(to_rgb(grey))
    assert rgb.shape == (4, 5, 3)
    assert (rgb == grey.reshape(4, 5, 1)).all()


def test_sixteen_bits_are_scaled_to_eight():
    values = np.array([[0, 128, 129, 257, 32_896, 65_535]], dtype=np.uint16)
    expected = [0, 0, 1, 1, 128, 255]
    assert np.asarray(to_rgb(values))[0, :, 0].tolist() == expected
    assert np.asarray(to_rgb(np.repeat(values[:, :, None], 3, axis=2)))[0, :, 2].tolist() == expected
    assert np.asarray(to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == expected
    assert np.asarray(to_rgb(Image.fromarray(values.astype(np.int32))))[0, :, 0].tolist() == expected
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    assert np.asarray(to_rgb(Image.open(file)))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("mode", ["1", "L", "LA", "PA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_modes_of_pil(mode):
    assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((32, 32, 3), dtype=np.float32), "float32; uint8 or uint16"),
        (np.full((32, 32, 3), np.nan), "float64"),
        (np.zeros((32, 32, 3), dtype=bool), "bool"),
        (np.zeros((32, 32, 5), dtype=np.uint8), r"shape \(32, 32, 5\)"),
        (np.zeros((2, 3, 32, 32), dtype=np.uint8), r"shape \(3, 32, 32\)"),
        (np.zeros((32,), dtype=np.uint8), r"shape \(32,\)"),
        (np.zeros((0, 32, 3), dtype=np.uint8), r"shape \(0, 32, 3\); at least one pixel"),
        (np.zeros((0, 32, 32, 3), dtype=np.uint8), "no images"),
        ([], "no images"),
        ("frame.png", "str; an array"),
        (["frame.png"], "image is str"),
        (None, "NoneType"),
        (Image.new("F", (32, 32)), "'F'"),
        (Image.new("RGB", (0, 32)), "0 x 32 px"),
        (Image.new("I", (32, 32), 70_000), "70000; allowed: 0 … 65535"),
        (Image.new("I", (32, 32), -1), "-1"),
        (np.zeros((32, 40, 3), dtype=np.uint8), "40 x 32 px; both must be multiples of 16"),
        ([np.zeros((32, 32, 3), np.uint8), np.zeros((32, 48, 3), np.uint8)], "2 sizes"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ImageError, match=message):
        small().encode(images)


def test_bad_batch_size_and_codes():
    with pytest.raises(ImageError, match="batch_size is 0"):
        small().encode(noise(32, 32), batch_size=0)
    with pytest.raises(ImageError, match="batch_size is -1"):
        small().decode([[0]], batch_size=-1)
    with pytest.raises(PixelError, match="allowed: 0 … 31"):
        small().decode([[32]])
    with pytest.raises(PixelError, match="integers needed"):
        small().decode([[0.5]])
    with pytest.raises(PixelError, match=r"\(B, h, w\)"):
        small().decode([1, 2])


def test_a_network_of_other_channels_is_refused():
    config = VQGANConfig(ch=32, ch_mult=(1,), in_channels=4, n_embed=2, z_channels=2, embed_dim=2)
    with pytest.raises(ValueError, match="4 channels in and 3 out"):
        ImageTokenizer(VQGAN(config))


def test_images_go_one_by_one_unless_told_otherwise(monkeypatch):
    vqgan, asked = VQGAN(SMALL).eval(), []
    encode = vqgan.encode
    monkeypatch.setattr(vqgan, "encode", lambda pixels: asked.append(len(pixels)) or encode(pixels))
    pictures = np.zeros((3, 64, 64, 3), np.uint8)
    for tokenizer, options in (
        (ImageTokenizer(vqgan, batch_size=2), {}),
        (ImageTokenizer(vqgan, batch_size=2), {"batch_size": 3}),
        (ImageTokenizer(vqgan), {}),
    ):
        tokenizer.encode(pictures, **options)
    assert asked == [2, 1, 3, 1, 1, 1]
    with pytest.raises(ImageError, match="batch_size is 0; at least 1 needed"):
        ImageTokenizer(vqgan, batch_size=0)


def test_channels_last_gives_the_same_codes():
    tokenizer = ImageTokenizer(VQGAN(SMALL).eval())
    pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    expected = tokenizer.encode(pictures)
    assert tokenizer.to(memory_format=torch.channels_last) is tokenizer
    np.testing.assert_array_equal(tokenizer.encode(pictures), expected)


def test_inside_a_model_the_model_says_the_size(tmp_path):
    """Older models say null, or what the tokenizer was trained with, in image_tokenizer.json."""
    inside = tmp_path / "image_tokenizer"
    for saved, expected in ((None, 128), (64, 128)):
        ImageTokenizer(five_stages(), image_size=saved).save_pretrained(inside)
        (tmp_path / "config.json").write_text('{"model_type": "worldvla"}')
        (tmp_path / "processor_config.json").write_text('{"image_size": 128, "history_length": 2}')
        assert ImageTokenizer.from_pretrained(tmp_path).image_size == expected
        assert ImageTokenizer.from_pretrained(tmp_path, image_size=32).image_size == 32
        assert ImageTokenizer.from_pretrained(tmp_path.parent, subfolder=tmp_path.name).image_size == expected
        assert ImageTokenizer.from_pretrained(inside).image_size == saved
    (tmp_path / "processor_config.json").write_text("{}")
    assert ImageTokenizer.from_pretrained(tmp_path).image_size == 64
    (tmp_path / "processor_config.json").write_text('{"image_size": "128"}')
    with pytest.raises(
        ImageError, match=r"processor_config\.json: image_size is '128'; a positive multiple of 32"
    ):
        ImageTokenizer.from_pretrained(tmp_path)


def test_a_tokenizer_inside_a_model_of_the_hub(tmp_path):
    repository = tmp_path / "hub" / "models--lab--robot"
    model = repository / "snapshots" / ("c" * 40) / "nano"
    ImageTokenizer(five_stages()).save_pretrained(model / "image_tokenizer")
    (model / "processor_config.json").write_text('{"image_size": 96}')
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text("c" * 40)
    options = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    for place, named in (
        ("lab/robot", {"revision": "v2", "subfolder": "nano"}),
        ("lab/robot", {"revision": "v2", "subfolder": "nano/image_tokenizer", "image_size": 96}),
        ("hf://lab/robot@v2/nano", {}),
    ):
        loaded = ImageTokenizer.from_pretrained(place, **named, **options)
        assert loaded.image_size == 96
        assert loaded.codebook_size == 8


def five_stages(**fields: Any) -> VQGAN:
    fields = {
        "ch": 32,
        "ch_mult": (1,) * 5,
        "n_embed": 8,
        "embed_dim": 8,
        "z_channels": 8,
        "num_res_blocks": 1,
    } | fields
    return VQGAN(VQGANConfig(**fields)).eval()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_embed": 16_384}, r"codebook of 16384 entries; the vocabulary has ids for 8192 \(4 … 8195\)"),
        ({"n_embed": 8_193}, "codebook of 8193"),
        ({"ch_mult": (1,) * 4}, "codes of 8 x 8 pixels; image blocks hold codes of 16 x 16"),  # taming's f8
        ({"ch_mult": (1,) * 6}, "codes of 32 x 32 pixels"),
        ({"stem": 4}, "codes of 64 x 64 pixels.*of stem 4 with 3"),
    ],
)
def test_codes_that_no_model_could_read(fields, message):
    with pytest.raises(ImageError, match=message):
        ImageTokenizer(five_stages(**fields)).check_vocabulary(Vocabulary.published())


def test_smaller_codebooks_are_welcome():
    ImageTokenizer(five_stages()).check_vocabulary(Vocabulary.published())
    ImageTokenizer(five_stages(n_embed=8_192)).check_vocabulary(Vocabulary.published())


def test_a_stem_may_stand_for_stages():
    tokenizer = ImageTokenizer(five_stages(ch_mult=(1, 1, 1), stem=4), image_size=32)
    tokenizer.check_vocabulary(Vocabulary.published())
    codes = tokenizer.encode(np.zeros((1, 32, 32, 3), np.uint8))
    assert codes.shape == (1, 2, 2)
    assert tokenizer.decode(codes).shape == (1, 32, 32, 3)


def test_another_size_on_the_same_network():
    tokenizer = ImageTokenizer(small().vqgan, image_size=64, batch_size=3)
    other = tokenizer.with_image_size(32)
    assert (other.image_size, other.batch_size, tokenizer.image_size) == (32, 3, 64)
    assert other.vqgan is tokenizer.vqgan
    with pytest.raises(ImageError, match="33"):
        tokenizer.with_image_size(33)
