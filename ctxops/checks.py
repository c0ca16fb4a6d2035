"""Argument checks with messages that say what was expected, what came and how to mend it.

All of them look at types, shapes and dtypes only, never at values, so that they are free on a GPU
and do not break `torch.compile`. Letters: B batch, C channels, H W map, L levels.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor


def check_map(x: Tensor, name: str, *, channels: int | None = None) -> None:
    """Refuse anything but a floating point map [B, C, H, W].

    Args:
        x: The argument to look at.
        name: What the caller calls it.
        channels: The required C, or None where any will do.

    Raises:
        TypeError: If `x` is not a floating point tensor.
        ValueError: If `x` has not four axes, is empty, or C differs from `channels`.
    """
    _check_features(
        x, name, "a {} map", "[B, C, H, W]", channels, "a single image needs a batch axis: x[None]"
    )


def check_neighbours(finer: Tensor, coarser: Tensor, names: str) -> None:
    """Refuse two maps that are not neighbouring levels of a pyramid, one half the other.

    Args:
        finer: Map [B, C, H, W].
        coarser: Map [B, C', ceil(H / 2), ceil(W / 2)].
        names: What the caller calls them.

    Raises:
        ValueError: If the coarser map is not half the finer one, rounded up.
    """
    expected = tuple((extent + 1) // 2 for extent in finer.shape[-2:])
    if tuple(coarser.shape[-2:]) != expected:
        raise ValueError(
            f"{names}: expected sizes of neighbouring levels, the coarser one half the finer one "
            f"(rounded up): {expected} for {tuple(finer.shape[-2:])}, got "
            f"{tuple(coarser.shape[-2:])}; pad the image to a multiple of the coarsest stride"
        )


def check_pyramid(features: Sequence[Tensor], in_channels: Sequence[int]) -> None:
    """Refuse a pyramid that is not one map per level, fine to coarse, halving at each level.

    Args:
        features: L maps [B, C_l, H_l, W_l], fine to coarse.
        in_channels: The L channel counts a module was built for.

    Raises:
        TypeError: If a level is not a floating point tensor.
        ValueError: If the number of levels, the channels, or the sizes do not fit.
    """
    if len(features) != len(in_channels):
        raise ValueError(
            f"features: expected {len(in_channels)} maps, fine to coarse, got {len(features)}; "
            "pass one map per entry of in_channels"
        )
    for level, (x, channels) in enumerate(zip(features, in_channels, strict=True)):
        check_map(x, f"features[{level}]", channels=channels)
    for level in range(1, len(features)):
        names = f"features[{level - 1}] and features[{level}]"
        check_neighbours(features[level - 1], features[level], names)


def check_choice(value: str, name: str, choices: Collection[str]) -> None:
    """Refuse a name that is not one of `choices`.

    Args:
        value: The argument to look at.
        name: What the caller calls it.
        choices: Allowed values.

    Raises:
        ValueError: If `value` is none of them.
    """
    if value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected one of {known}, got {value!r}; choose one of them")


def check_positive(value: int, name: str) -> None:
    """Refuse anything but an integer of at least 1.

    Args:
        value: The argument to look at.
        name: What the caller calls it.

    Raises:
        TypeError: If `value` is not an integer.
        ValueError: If `value` is below 1.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {value!r}; pass a whole number")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}; pass a positive number")


def check_odd(value: int, name: str) -> None:
    """Refuse anything but a positive odd integer (a window with a centre).

    Args:
        value: The argument to look at.
        name: What the caller calls it.

    Raises:
        TypeError: If `value` is not an integer.
        ValueError: If `value` is even or below 1.
    """
    check_positive(value, name)
    if value % 2 == 0:
        raise ValueError(
            f"{name}: expected an odd size, got {value}; use {value - 1} or {value + 1}"
        )


def check_tokens(x: Tensor, name: str, *, channels: int | None = None) -> None:
    """Refuse anything but floating point tokens [B, N, C].

    Args:
        x: The argument to look at.
        name: What the caller calls it.
        channels: The required C, or None where any will do.

    Raises:
        TypeError: If `x` is not a floating point tensor.
        ValueError: If `x` has not three axes, is empty, or C differs from `channels`.
    """
    hint = "a map becomes tokens by x.flatten(2).transpose(1, 2)"
    _check_features(x, name, "{} tokens", "[B, N, C]", channels, hint)


def _check_features(
    x: Tensor, name: str, kind: str, axes: str, channels: int | None, hint: str
) -> None:
    """What maps and tokens have in common: `kind` with room for an adjective, `axes` by letter."""
    letters = axes.strip("[]").split(", ")
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor {axes}, got {type(x).__name__}")
    if not x.is_floating_point():
        wanted = kind.format("floating point")
        raise TypeError(f"{name}: expected {wanted}, got {x.dtype}; call .float() first")
    shape = tuple(x.shape)
    if x.dim() != len(letters) or x.numel() == 0:
        wanted = kind.format("non-empty")
        raise ValueError(f"{name}: expected {wanted} {axes}, got shape {shape}; {hint}")
    width = x.shape[letters.index("C")]
    if channels is not None and width != channels:
        raise ValueError(
            f"{name}: expected {channels} channels, got {width} (shape {shape}); "
            f"build the module for this width or pass the {kind.split()[-1]} it was built for"
        )


def check_labels(labels: Tensor, name: str, *, size: Sequence[int]) -> None:
    """Refuse anything but an integer label map [B, H, W] of the given size.

    Args:
        labels: The argument to look at.
        name: What the caller calls it.
        size: The required (B, H, W).

    Raises:
        TypeError: If `labels` is not an integer tensor.
        ValueError: If its shape differs from `size`.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: expected a label map [B, H, W], got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name}: expected integer labels, got {labels.dtype}; call .long() first")
    if tuple(labels.shape) != tuple(size):
        raise ValueError(
            f"{name}: expected shape {tuple(size)} [B, H, W], got {tuple(labels.shape)}; "
            "drop a channel axis with labels[:, 0], resize the logits to the labels"
        )


def check_divides(divisor: int, value: int, names: str) -> None:
    """Refuse a number of parts that does not divide a width.

    Args:
        divisor: Number of parts, at least 1.
        value: What is to be divided.
        names: What the caller calls the two, as "nodes and channels".

    Raises:
        ValueError: If a rest remains.
    """
    if value % divisor:
        fits = [d for d in range(1, value + 1) if value % d == 0]
        nearest = min(fits, key=lambda d: abs(d - divisor))
        raise ValueError(
            f"{names}: expected the first to divide the second, got {divisor} and {value}; "
            f"use {nearest} instead of {divisor}"
        )


def check_probability(value: float, name: str) -> None:
    """Refuse anything but a probability below 1.

    Args:
        value: The argument to look at.
        name: What the caller calls it.

    Raises:
        ValueError: If `value` is not in [0, 1).
    """
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {value}; use 0 to disable")
