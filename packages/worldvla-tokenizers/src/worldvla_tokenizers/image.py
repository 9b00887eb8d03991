"""Pixels ↔ codes: the crop rule, every kind of input image, batches and devices."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias, Unpack

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from worldvla_tokenizers.files import HubOptions, resolve_files, staged_folder, write_text_atomic
from worldvla_tokenizers.signatures import read_json
from worldvla_tokenizers.vocabulary import Vocabulary
from worldvla_tokenizers.vqgan import CONFIG_NAME, VQGAN

SETTINGS_NAME = "image_tokenizer.json"
FOLDER_NAME = "image_tokenizer"
"""Folder of the image tokenizer beside a model's weights."""

MODEL_SETTINGS_NAME = "processor_config.json"
"""Where a model says what it was trained with; `image_size` in it counts for the image tokenizer inside, too."""

UNIT = 32
"""Pixels of one unit of image size, as the grid tokens count it."""

CODE = 16
"""Pixels of one code along each side in an image block."""

LARGEST_SIZE = 8_192
"""Pixels of the largest image size: a quarter of a million codes. Crops are listed by area, which has to end."""

_MAX_ASPECT_RATIO = 4.0
_WHITE = (255, 255, 255, 255)

ImageLike: TypeAlias = Image.Image | NDArray
"""A PIL image, or an array (H, W), (H, W, 1 | 2 | 3 | 4) of uint8 or uint16: grey, grey + alpha, RGB, RGBA."""


class ImageError(ValueError):
    """An image, a batch of them, or a size that cannot be tokenized."""


class ImageTokenizer:
    """Images ↔ codebook indices.

    Args:
        vqgan: the network.
        image_size: None to take images as they are (sides multiples of `vqgan.config.factor`, published: 16 px),
            or a target in pixels, a multiple of 32: images of any size then go through `fit` first.
        batch_size: images that are encoded at once. One at a time gives the published codes to the last one; in a
            batch convolutions round differently, and near ties may fall otherwise. On a GPU larger is faster.

    Attributes:
        vqgan: the network.
        image_size: the target in pixels, or None.
        batch_size: images that are encoded at once where a call does not say.

    Raises:
        ImageError: `image_size` is no multiple of 32, or `batch_size` below 1.
        ValueError: the network is not one of RGB images.

    Example:
        >>> from worldvla_tokenizers import VQGAN, VQGANConfig
        >>> tokenizer = ImageTokenizer(VQGAN(VQGANConfig(ch=32, n_embed=16)).eval(), image_size=64)
        >>> codes = tokenizer.encode(np.zeros((48, 48, 3), dtype=np.uint8))
        >>> codes.shape, tokenizer.decode(codes).shape
        ((1, 4, 4), (1, 64, 64, 3))
    """

    def __init__(self, vqgan: VQGAN, *, image_size: int | None = None, batch_size: int = 1) -> None:
        if (vqgan.config.in_channels, vqgan.config.out_ch) != (3, 3):
            raise ValueError(
                f"the VQ-GAN has {vqgan.config.in_channels} channels in and {vqgan.config.out_ch} out; "
                "3 and 3 (RGB) needed"
            )
        if image_size is not None:
            crop_sizes(image_size)
        _check_batch_size(batch_size)
        self.vqgan = vqgan
        self.image_size = image_size
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(
        cls,
        dir_or_repo: str | os.PathLike[str],
        *,
        image_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        **hub: Unpack[HubOptions],
    ) -> ImageTokenizer:
        """Load a VQ-GAN, ours or published (see `VQGAN.from_pretrained`), and the image size saved with it.

        Args:
            dir_or_repo: a folder, or the id of a Hub repository: of the tokenizer, or of a model with one inside.
            image_size: target in pixels; None for the saved one, if any. Inside a model, the model's counts.
            device: where to compute (default: CPU).
            dtype: type to compute in; the search for the nearest code is in fp32 at any rate.
            hub: `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only`, as in transformers.

        Raises:
            VQGANError: the VQ-GAN cannot be used.
            ImageError: the settings file holds something else than an image size.
            FileNotFoundError: there is no VQ-GAN.
        """
        config_inside, settings_inside = f"{FOLDER_NAME}/{CONFIG_NAME}", f"{FOLDER_NAME}/{SETTINGS_NAME}"
        found = resolve_files(
            dir_or_repo, optional=[config_inside, settings_inside, MODEL_SETTINGS_NAME, SETTINGS_NAME], **hub
        )
        sizes = [SETTINGS_NAME]
        if config_inside in found:
            hub["subfolder"] = "/".join(part for part in (hub.get("subfolder"), FOLDER_NAME) if part)
            sizes = [MODEL_SETTINGS_NAME, settings_inside]
        vqgan = VQGAN.from_pretrained(dir_or_repo, device=device, dtype=dtype, **hub)
        for name in sizes:
            if image_size is None and name in found:
                image_size = _saved_image_size(found[name], required=name != MODEL_SETTINGS_NAME)
        return cls(vqgan, image_size=image_size)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the VQ-GAN in our format and the image size: all files, or on failure none."""
        with staged_folder(folder) as stage:
            self.vqgan.save_pretrained(stage)
            write_text_atomic(stage / SETTINGS_NAME, json.dumps({"image_size": self.image_size}) + "\n")

    def with_image_size(self, image_size: int | None) -> ImageTokenizer:
        """A tokenizer of the same network, which both share, that fits images to another size.

        Raises:
            ImageError: `image_size` is no multiple of 32.
        """
        return ImageTokenizer(self.vqgan, image_size=image_size, batch_size=self.batch_size)

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Make sure that image blocks can hold what `encode` gives, before work is done with it.

        Args:
            vocabulary: owner of the ids of the codes.

        Raises:
            ImageError: there are more codes than ids, or a code is not one of 16 x 16 pixels.
        """
        ids, factor = vocabulary.image_range, self.vqgan.config.factor
        if self.codebook_size > len(ids):
            raise ImageError(
                f"the image tokenizer has a codebook of {self.codebook_size} entries; the vocabulary has ids for "
                f"{len(ids)} ({ids[0]} … {ids[-1]}); remedy: an image tokenizer with n_embed of at most {len(ids)}"
            )
        if factor != CODE:
            raise ImageError(
                f"the image tokenizer has codes of {factor} x {factor} pixels; image blocks hold codes of {CODE} "
                f"x {CODE}; remedy: an image tokenizer with 5 stages (ch_mult), or of stem 4 with 3"
            )

    @property
    def codebook_size(self) -> int:
        """Number of different codes."""
        return self.vqgan.config.n_embed

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.vqgan.device

    @property
    def dtype(self) -> torch.dtype:
        """Type the network computes in."""
        return self.vqgan.dtype

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
    ) -> ImageTokenizer:
        """Move the network to a device, change the type it computes in, or how its weights lie.

        On GPUs half precision and `torch.channels_last` are made for each other. Codes of half precision are not
        always those of fp32.

        Returns:
            This tokenizer.
        """
        self.vqgan.to(device=device, dtype=dtype)
        if memory_format is not None:
            self.vqgan.to(memory_format=memory_format)
        return self

    def encode(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        target: int | None = None,
        batch_size: int | None = None,
        generator: np.random.Generator | None = None,
    ) -> NDArray[np.int64]:
        """Find the codes of images.

        Args:
            images: an array (B, H, W, 3) of uint8; or one image or a list of images, each a PIL image or an
                array (H, W) or (H, W, C) of uint8 or uint16. See `to_rgb` for what is understood.
            target: size in pixels to fit images to, instead of `image_size`.
            batch_size: images that go through the network at once; default that of the tokenizer.
            generator: source of random crop offsets; None for centred crops.

        Returns:
            (B, H/factor, W/factor) codes (published: 16 px each); one image gives B = 1.

        Raises:
            ImageError: no image, one of a type, shape or size that is not understood, or images of several
                sizes.
        """
        batch_size = self.batch_size if batch_size is None else batch_size
        _check_batch_size(batch_size)
        target = self.image_size if target is None else target
        pictures = [to_rgb(image) for image in _as_list(images)]
        if target is not None:
            pictures = [fit(picture, target, generator=generator) for picture in pictures]
        sizes = sorted({picture.size for picture in pictures})
        if len(sizes) > 1:
            raise ImageError(
                f"images of {len(sizes)} sizes (width, height) in one batch: {sizes[:5]}; one size needed, or "
                "one call for each"
            )
        factor, (width, height) = self.vqgan.config.factor, sizes[0]
        if width % factor or height % factor:
            raise ImageError(
                f"image of {width} x {height} px; both must be multiples of {factor}, "
                "or give a target for it to be cropped to"
            )
        codes = []
        for start in range(0, len(pictures), batch_size):
            batch = np.stack([np.asarray(picture) for picture in pictures[start : start + batch_size]])
            pixels = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2)  # (B, 3, H, W)
            codes.append(self.vqgan.encode(pixels.float() / 255 * 2 - 1).cpu().numpy())
        return np.concatenate(codes)

    def decode(self, codes: ArrayLike, *, batch_size: int = 8) -> NDArray[np.uint8]:
        """Draw the images of codes.

        Args:
            codes: (B, h, w), or (h, w) for one image, in 0 … n_embed - 1.
            batch_size: images that go through the network at once.

        Returns:
            (B, factor·h, factor·w, 3) uint8; one image gives B = 1. As in the published code, values are cut to
            [-1, 1] and truncated, not rounded, to 8 bits.

        Raises:
            PixelError: another shape or type, or a code outside the codebook.
        """
        _check_batch_size(batch_size)
        array = torch.as_tensor(np.asarray(codes))
        array = array[None] if array.ndim == 2 else array
        images = []
        for batch in array.split(batch_size):
            pixels = self.vqgan.decode(batch).clamp(-1, 1)
            images.append(((pixels + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(images)


@lru_cache
def crop_sizes(target: int) -> tuple[tuple[int, int], ...]:
    """Sizes an image may be cropped to: about target² pixels, sides of whole units, aspect ratio up to 4.

    Args:
        target: side of the square one [px], a multiple of 32 up to `LARGEST_SIZE`.

    Returns:
        (width, height) in pixels, from widest to tallest.

    Raises:
        ImageError: `target` is no positive multiple of 32, or above `LARGEST_SIZE`.

    Example:
        >>> crop_sizes(64)
        ((128, 32), (96, 32), (64, 32), (64, 64), (32, 64), (32, 96), (32, 128))
    """
    whole = isinstance(target, int | np.integer) and not isinstance(target, bool)
    if not whole or not UNIT <= target <= LARGEST_SIZE or target % UNIT:
        raise ImageError(
            f"target size is {target!r}; a positive multiple of {UNIT} px up to {LARGEST_SIZE} needed"
        )
    area = (int(target) // UNIT) ** 2
    sizes = []
    width, height = area, 1  # in units
    while width > 0:
        if max(width, height) / min(width, height) <= _MAX_ASPECT_RATIO:
            sizes.append((UNIT * width, UNIT * height))
        if (height + 1) * width <= area:
            height += 1
        else:
            width -= 1
    return tuple(sizes)


def fit(image: ImageLike, target: int, *, generator: np.random.Generator | None = None) -> Image.Image:
    """Resize and crop an image to the size of `crop_sizes(target)` that keeps most of it.

    An image of such a size already is left as it is. Halving with a box filter, as long as the image stays at
    least as large as the crop, comes before the bicubic resize: the published ids depend on that order.

    Args:
        image: what `to_rgb` takes.
        target: size in pixels, a multiple of 32.
        generator: source of a random crop offset; None for the centre. (The published function draws one
            although its name says centre.)

    Returns:
        An RGB image.

    Raises:
        ImageError: `target` is no multiple of 32, or the image is not understood.
    """
    picture = to_rgb(image)
    width, height = picture.size

    def kept(size: tuple[int, int]) -> float:
        scales = size[0] / width, size[1] / height
        return min(scales) / max(scales)

    crop_width, crop_height = max(crop_sizes(target), key=lambda size: (kept(size), size))
    while picture.width >= 2 * crop_width and picture.height >= 2 * crop_height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(crop_width / picture.width, crop_height / picture.height)
    covering = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(covering, Image.Resampling.BICUBIC)

    spare_x, spare_y = picture.width - crop_width, picture.height - crop_height
    if generator is None:
        left, top = spare_x // 2, spare_y // 2
    else:
        left, top = (int(generator.integers(spare + 1)) for spare in (spare_x, spare_y))
    return picture.crop((left, top, left + crop_width, top + crop_height))


def to_rgb(image: ImageLike) -> Image.Image:
    """Turn an image of any usual kind into 8-bit RGB.

    Transparency is blended onto white; grey becomes three equal channels; 16-bit values are scaled to 8 bits
    (65,535 becomes 255). A floating-point array is refused: whether it means 0 … 1, -1 … 1 or 0 … 255 cannot
    be known.

    Raises:
        ImageError: no image, an array that is not uint8 or uint16, another number of channels, or no pixels.
    """
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if not isinstance(image, Image.Image):
        raise ImageError(f"image is {type(image).__name__}; a PIL image or a NumPy array needed")
    if 0 in image.size:
        raise ImageError(f"image of {image.width} x {image.height} px; at least 1 x 1 needed")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ImageError("image of mode 'F' (floating point); 8 or 16 bits per channel needed")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_8_bit(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image)
    return image.convert("RGB")


def _from_array(array: NDArray) -> Image.Image:
    if array.dtype not in (np.uint8, np.uint16):
        raise ImageError(
            f"image array is {array.dtype}; uint8 or uint16 needed. Scale other values yourself, for "
            "instance (x * 255).round().astype(np.uint8) for 0 … 1"
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and not 1 <= array.shape[2] <= 4):
        raise ImageError(f"image array has shape {array.shape}; (H, W) or (H, W, 1 … 4) needed")
    if 0 in array.shape:
        raise ImageError(f"image array has shape {array.shape}; at least one pixel needed")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(_to_8_bit(array)))


def _to_8_bit(array: NDArray) -> NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65_535:  # PIL's mode "I" has 32 bits but stands for 16-bit files
        raise ImageError(f"image values reach from {low} to {high}; allowed: 0 … 65535")
    return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _as_list(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    single = isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4)
    if single:
        return [images]  # type: ignore[list-item]
    if not isinstance(images, np.ndarray | list | tuple):
        raise ImageError(f"images are {type(images).__name__}; an array, a PIL image or a list of them needed")
    if len(images) == 0:
        raise ImageError("no images; at least one needed")
    return list(images)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ImageError(f"batch_size is {batch_size}; at least 1 needed")


def _saved_image_size(path: Path, *, required: bool) -> int | None:
    content = read_json(path, ImageError)
    if required and "image_size" not in content:
        raise ImageError(f"{path} holds {', '.join(content) or 'nothing'}; 'image_size' needed")
    image_size = content.get("image_size")
    try:
        if image_size is not None:
            crop_sizes(image_size)
    except (ImageError, TypeError) as error:  # TypeError: a value that cannot be looked up in the cache
        raise ImageError(
            f"{path}: image_size is {image_size!r}; a positive multiple of {UNIT} px up to {LARGEST_SIZE} needed"
        ) from error
    return image_size
