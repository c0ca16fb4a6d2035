"""A split as training samples; the same (seed, epoch, index) gives the same bytes everywhere.

Letters: H W image, h w crop.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from segtrain.config.data import DataConfig
from segtrain.data.datasets.layout import Layout
from segtrain.data.reading import read_image, read_labels
from segtrain.data.transforms import EvalImage, TrainTransform
from segtrain.errors import UserError
from segtrain.normalisation import NORMALISATIONS

_SUBSET = 3  # keeps the choice of images apart from other uses of the seed


class Transform(Protocol):
    """What turns image uint8 [3, H, W] and label uint8 [H, W] into float32 and int64 of a size."""

    def __call__(
        self, image: Tensor, label: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw one sample; all randomness comes from `generator`."""
        ...


# Label int64 [H, W] of a crop to further labels of its size, by name.
Targets = Callable[[Tensor], dict[str, Tensor]]


class SegDataset(Dataset[dict[str, Any]]):
    """Images and labels of a split.

    Args:
        layout: The data set.
        split: Name of a split; it must have labels.
        transform: Augmentation; None gives uint8 [3, H, W] and int64 [H, W] as they are.
        seed: Seed of the augmentation.
        targets: What else the loss needs, made from the transformed label; None: nothing.
        images: How many to take, drawn by the seed; None takes all.

    Raises:
        UserError: If the split has not so many images.
    """

    def __init__(
        self,
        layout: Layout,
        split: str,
        transform: Transform | None,
        *,
        seed: int = 0,
        targets: Targets | None = None,
        images: int | None = None,
    ) -> None:
        self.layout, self.split, self.transform, self.seed = layout, split, transform, seed
        self.targets = targets
        every = layout.samples(split)
        # What an image goes through does not depend on which others there are.
        self.numbers = list(range(len(every)))
        if images is not None:
            self.numbers = _drawn(len(every), images, seed, split)
        self.samples = [every[number] for number in self.numbers]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        """One sample.

        Args:
            key: (epoch, index), or an index of epoch 0.

        Returns:
            "image" float32 [3, h, w], "label" int64 [h, w], "name", "index", and `targets`.

        Raises:
            UserError: If a file is missing or damaged, sizes disagree, or a label is unknown.
            IndexError: If there is no such index.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        sample = self.samples[index]
        pixels, numbers = read_image(sample.image), read_labels(self.layout, sample)
        if pixels.shape[:2] != numbers.shape:
            raise UserError(
                f"{sample.label}: label of {numbers.shape[1]}x{numbers.shape[0]} pixels for an "
                f"image of {pixels.shape[1]}x{pixels.shape[0]}; write it at the image's size"
            )
        image, label = torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(numbers)
        if self.transform is None:
            label = label.long()
        else:
            generator = generator_of(self.seed, epoch, self.numbers[index])
            image, label = self.transform(image, label, generator)
        more = self.targets(label) if self.targets else {}
        return {"image": image, "label": label, "name": sample.name, "index": index, **more}


def _drawn(total: int, images: int, seed: int, split: str) -> list[int]:
    """The same images for the same seed, in order; the first ones of one shuffled list."""
    if images > total:
        raise UserError(
            f"data.train_images {images} is more than the {total} images of {split}; write "
            "data.train_images: null for all"
        )
    order = torch.randperm(total, generator=generator_of(seed, _SUBSET))
    return sorted(order[:images].tolist())


def generator_of(*numbers: int) -> torch.Generator:
    """A generator whose stream depends on every number and on their order.

    Args:
        *numbers: Seed, epoch, index; 0 or more, below 2^63.

    Returns:
        A CPU generator.
    """
    state = 0
    for number in numbers:
        state = _mixed(state ^ _mixed(number + 0x9E3779B97F4A7C15))
    return torch.Generator().manual_seed(state >> 1)


def build_train_transform(
    config: DataConfig, layout: Layout, *, normalisation: str = "vit"
) -> TrainTransform:
    """The augmentation of a configuration.

    Args:
        config: The section `data`.
        layout: The data set, for its flip pairs.
        normalisation: What "auto" in the configuration means: the model's entry.

    Returns:
        The transform.
    """
    mean, std = statistics(config, normalisation)
    return TrainTransform(
        crop=config.crop,
        base_size=config.base_size,
        scale=config.scale,
        short_sides=config.short_sides,
        cat_max_ratio=config.cat_max_ratio,
        flip=config.flip,
        flip_pairs=layout.flip_pairs,
        photometric=config.photometric,
        mean=mean,
        std=std,
    )


def build_eval_transform(config: DataConfig, *, normalisation: str = "vit") -> EvalImage:
    """Whole images, normalised as in training.

    Args:
        config: The section `data`.
        normalisation: What "auto" in the configuration means: the model's entry.

    Returns:
        The transform.
    """
    mean, std = statistics(config, normalisation)
    return EvalImage(mean=mean, std=std)


def statistics(
    config: DataConfig, normalisation: str
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and deviation of the pixels.

    Args:
        config: The section `data`.
        normalisation: What "auto" in the configuration means: "imagenet" or "vit".

    Returns:
        Both for values in 0..1, RGB.

    Raises:
        UserError: If the name is unknown.
    """
    name = normalisation if config.normalisation == "auto" else config.normalisation
    if name not in NORMALISATIONS:
        raise UserError(f"no normalisation {name!r}; known: {', '.join(NORMALISATIONS)}")
    return NORMALISATIONS[name]


def _mixed(number: int) -> int:
    """A permutation of 64-bit numbers in which each bit moves all others (splitmix64)."""
    number &= 0xFFFFFFFFFFFFFFFF
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    number = (number ^ number >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return number ^ number >> 31
