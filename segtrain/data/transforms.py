"""Augmentation of training crops, and the plain preparation of whole images.

Recipe of Segmenter and most of its field: scale, crop, flip, photometric distortion, normalise,
pad. Every random number comes from the generator that is handed in.

Letters: H W image, h w crop.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from segtrain.data.labels import IGNORE_INDEX
from segtrain.normalisation import NORMALISATIONS

_TRIES = 10  # crops that are rejected at most
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 18


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """Random crops of one size.

    Attributes:
        crop: Height and width.
        base_size: Longest and shorter side that scale 1 means.
        scale: Range of the random scale.
        short_sides: Short sides drawn from in place of a scale; None for none.
        cat_max_ratio: A crop is drawn again while one class covers this share of it; 1 keeps all.
        flip: Probability of a mirrored crop.
        flip_pairs: Classes that change places in a mirrored crop.
        photometric: Whether to distort brightness, contrast, saturation and hue.
        mean: Of values in 0..1.
        std: Of values in 0..1.
    """

    crop: tuple[int, int]
    base_size: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)
    short_sides: tuple[int, ...] | None = None
    cat_max_ratio: float = 0.75
    flip: float = 0.5
    flip_pairs: tuple[tuple[int, int], ...] = ()
    photometric: bool = True
    mean: tuple[float, float, float] = NORMALISATIONS["vit"][0]
    std: tuple[float, float, float] = NORMALISATIONS["vit"][1]

    def __call__(
        self, image: Tensor, label: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw one crop.

        Args:
            image: uint8 [3, H, W], RGB.
            label: uint8 [H, W], 255 ignored.
            generator: The only source of randomness.

        Returns:
            Image float32 [3, h, w], normalised, and label int64 [h, w]; what lies outside the
            image is 0 and 255.
        """
        image, label = self.cut(image, label, generator)
        image = normalise(image, self.mean, self.std)
        bottom, right = self.crop[0] - label.shape[0], self.crop[1] - label.shape[1]
        image = F.pad(image, [0, 0, right, bottom], fill=0)
        label = F.pad(label[None], [0, 0, right, bottom], fill=IGNORE_INDEX)[0]
        return image, label.long()

    def cut(
        self, image: Tensor, label: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw one crop as a person would look at it: neither normalised nor padded.

        Args:
            image: uint8 [3, H, W], RGB.
            label: uint8 [H, W].
            generator: The only source of randomness.

        Returns:
            Image uint8 [3, a, b] and label uint8 [a, b], at most as large as the crop.
        """
        image, label = rescale(image, label, self._size(label, generator))
        box = choose_crop(label, self.crop, self.cat_max_ratio, generator)
        image, label = F.crop(image, *box), F.crop(label[None], *box)[0]
        if _chance(self.flip, generator):
            image, label = F.horizontal_flip(image), F.horizontal_flip(label)
            label = swap_pairs(label, self.flip_pairs)
        if self.photometric:
            image = distort_colours(image, generator)
        return image, label

    def _size(self, label: Tensor, generator: torch.Generator) -> tuple[int, int]:
        """Height and width that an image gets before it is cropped."""
        if self.short_sides is None:
            ratio = _uniform(*self.scale, generator)
            return target_size(label.shape, self.base_size, ratio)
        drawn = int(torch.randint(len(self.short_sides), (), generator=generator))
        return target_size(label.shape, (self.base_size[0], self.short_sides[drawn]), 1.0)


@dataclass(frozen=True, kw_only=True)
class EvalImage:
    """Whole images at their own size, normalised.

    Attributes:
        mean: Of values in 0..1.
        std: Of values in 0..1.
    """

    mean: tuple[float, float, float] = NORMALISATIONS["vit"][0]
    std: tuple[float, float, float] = NORMALISATIONS["vit"][1]

    def __call__(
        self, image: Tensor, label: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Prepare one image.

        Args:
            image: uint8 [3, H, W], RGB.
            label: uint8 [H, W].
            generator: Not used.

        Returns:
            Image float32 [3, H, W] and label int64 [H, W].
        """
        return normalise(image, self.mean, self.std), label.long()


def target_size(size: Sequence[int], base_size: tuple[int, int], ratio: float) -> tuple[int, int]:
    """Size with the ratio of its sides kept, in a box of `base_size * ratio`.

    The factor is min(long' / max(H, W), short' / min(H, W)) with sides of the box rounded down,
    sizes of the result rounded to nearest.

    Args:
        size: H and W.
        base_size: Longest and shorter side at ratio 1.
        ratio: Scale.

    Returns:
        New height and width, at least 1.
    """
    long, short = (int(side * ratio) for side in base_size)
    factor = min(long / max(size), short / min(size))
    height, width = (max(int(side * factor + 0.5), 1) for side in size)
    return height, width


def rescale(image: Tensor, label: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Resize an image bilinearly and its label to the nearest pixel.

    Deviation: the nearest pixel by centres, as the bilinear image has it; the released recipes
    take the pixel above and left of it, half a pixel away.

    Args:
        image: uint8 [3, H, W].
        label: uint8 [H, W].
        size: New height and width.

    Returns:
        Both at the new size.
    """
    height_width = list(size)
    image = F.resize(image, height_width, InterpolationMode.BILINEAR, antialias=False)
    label = F.resize(label[None], height_width, InterpolationMode.NEAREST_EXACT)[0]
    return image, label


def choose_crop(
    label: Tensor, crop: tuple[int, int], cat_max_ratio: float, generator: torch.Generator
) -> tuple[int, int, int, int]:
    """Draw the place of a crop that one class does not fill.

    A crop is taken when it has two classes and the largest covers less than `cat_max_ratio` of
    what is not ignored; after ten rejections the next one is taken as it is.

    Args:
        label: uint8 [H, W].
        crop: Height and width; what the image lacks is cut off.
        cat_max_ratio: Largest share of one class; 1 takes the first crop.
        generator: The only source of randomness.

    Returns:
        Top, left, height, width.
    """
    height, width = min(crop[0], label.shape[0]), min(crop[1], label.shape[1])
    top = left = 0
    for _ in range(_TRIES + 1):
        top = _below(label.shape[0] - height + 1, generator)
        left = _below(label.shape[1] - width + 1, generator)
        window = label[top : top + height, left : left + width]
        if cat_max_ratio >= 1 or _varied(window, cat_max_ratio):
            break
    return top, left, height, width


def swap_pairs(label: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Exchange the classes of each pair; doing it twice changes nothing.

    Args:
        label: uint8 [H, W].
        pairs: Class numbers, each in one pair at most.

    Returns:
        [H, W].
    """
    if not pairs:
        return label
    table = torch.arange(256, dtype=label.dtype)
    for left, right in pairs:
        table[left], table[right] = right, left
    return table[label.long()]


def distort_colours(image: Tensor, generator: torch.Generator) -> Tensor:
    """Photometric distortion (SSD) on 0..255, each step with p = 0.5 and rounded down to bytes.

    Brightness, contrast, saturation, hue; or contrast last, with equal probability. OpenCV's HSV
    with hues 0..179 is part of the recipe: torchvision's saturation is another formula.

    Args:
        image: uint8 [3, H, W], RGB.
        generator: The only source of randomness.

    Returns:
        uint8 [3, H, W].
    """
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    if _chance(0.5, generator):
        pixels = _linear(pixels, 1.0, _uniform(-_BRIGHTNESS, _BRIGHTNESS, generator))
    contrast_first = _chance(0.5, generator)
    if contrast_first:
        pixels = _contrast(pixels, generator)
    pixels = _saturation_and_hue(pixels, generator)
    if not contrast_first:
        pixels = _contrast(pixels, generator)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def normalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bytes to (value / 255 - mean) / std.

    Args:
        image: uint8 [3, H, W].
        mean: Per channel.
        std: Per channel.

    Returns:
        float32 [3, H, W], contiguous.
    """
    scaled = F.to_dtype(image, torch.float32, scale=True)
    return F.normalize(scaled, list(mean), list(std), inplace=True).contiguous()


def _varied(window: Tensor, cat_max_ratio: float) -> bool:
    counts = np.bincount(window.numpy().ravel(), minlength=256)[:IGNORE_INDEX]
    return bool((counts > 0).sum() > 1 and counts.max() < cat_max_ratio * counts.sum())


def _contrast(pixels: NDArray[np.uint8], generator: torch.Generator) -> NDArray[np.uint8]:
    if _chance(0.5, generator):
        return _linear(pixels, _uniform(*_CONTRAST, generator), 0.0)
    return pixels


def _saturation_and_hue(pixels: NDArray[np.uint8], generator: torch.Generator) -> NDArray[np.uint8]:
    factor = _uniform(*_SATURATION, generator) if _chance(0.5, generator) else None
    turn = _below(2 * _HUE, generator) - _HUE if _chance(0.5, generator) else None
    if factor is None and turn is None:
        return pixels
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
    if factor is not None:
        hsv[..., 1] = _linear(hsv[..., 1], factor, 0.0)
    if turn is not None:
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + turn) % 180
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _linear(values: NDArray[np.uint8], factor: float, offset: float) -> NDArray[np.uint8]:
    table = np.clip(np.arange(256) * factor + offset, 0, 255).astype(np.uint8)
    return cv2.LUT(np.ascontiguousarray(values), table)


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    share = torch.rand((), generator=generator, dtype=torch.float64).item()
    return low + (high - low) * share


def _chance(probability: float, generator: torch.Generator) -> bool:
    return torch.rand((), generator=generator, dtype=torch.float64).item() < probability


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator).item())
