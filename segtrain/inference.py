"""From an RGB image of any size to class probabilities or labels of that size.

A view is the image at one scale, mirrored or not. Its logits come from windows that are summed into
one buffer and divided by their count (or from one forward pass), are resized to the image, mirrored
back and softmaxed; probabilities of views are averaged (Segmenter's released inference).

Memory: the buffer of one view [K, h, w] in float32, with several views the sum of probabilities
[K, H, W] as well, and a stripe of rows. Nothing else grows with K.

Letters: K classes, H W image, h w view.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ctxops.resize import resize_bilinear
from segtrain.data.transforms import target_size
from segtrain.errors import UserError
from segtrain.normalisation import NORMALISATIONS

STRIPE_BYTES = 32 * 2**20  # of the float32 class scores of the rows that are looked at together


def window_starts(size: int, *, window: int, stride: int) -> list[int]:
    """Where windows start along one axis: multiples of the stride, and one flush with the end.

    Args:
        size: Pixels of the axis, at least `window`.
        window: Pixels of a window.
        stride: Pixels from one window to the next, at most `window`.

    Returns:
        Growing positions from 0 to size - window.

    Raises:
        ValueError: If the windows would leave pixels out.
    """
    if not 1 <= stride <= window <= size:
        raise ValueError(
            "expected 1 <= stride <= window <= size, got "
            f"stride {stride}, window {window}, size {size}; lower the stride or enlarge the image"
        )
    return [*range(0, size - window, stride), size - window]


def at_least(size: Sequence[int], window: int) -> tuple[int, int]:
    """Size after enlarging the short side to the window, where it is shorter.

    Args:
        size: (h, w).
        window: Pixels.

    Returns:
        (h, w) with both sides at least `window`; the long side is cut to a whole number.
    """
    height, width = size
    if min(size) >= window:
        return height, width
    if height < width:
        return window, int(width / height * window)
    return int(height / width * window), window


def resized_rows(logits: Tensor, size: Sequence[int], start: int, stop: int) -> Tensor:
    """Some rows of the bilinear resize (align_corners False) of a map, without the other rows.

    Args:
        logits: [K, h, w].
        size: (H, W) of the whole result.
        start: First row.
        stop: Row behind the last.

    Returns:
        [K, stop - start, W]; a view of `logits` where the sizes agree.
    """
    height, width = logits.shape[1:]
    if (height, width) == tuple(size):
        return logits[:, start:stop]
    rows = torch.arange(start, stop, device=logits.device, dtype=torch.float32)
    # In float32, as torch's own kernel does.
    scale = torch.tensor(height / size[0], device=logits.device, dtype=torch.float32)
    position = ((rows + 0.5) * scale - 0.5).clamp(min=0)
    low = position.long().clamp(max=height - 1)
    high = (low + 1).clamp(max=height - 1)
    part = torch.lerp(logits[:, low], logits[:, high], (position - low)[:, None])  # [K, r, w]
    return resize_bilinear(part[None], (stop - start, size[1]), align_corners=False)[0]


class Inferencer:
    """A model with everything that turns an image into a prediction.

    Args:
        model: Normalised images [B, 3, h, w] to {"logits": [B, K, h, w]}.
        num_classes: K, at most 255.
        normalisation: "vit" or "imagenet": what the pixels are normalised with.
        device: Where the model is.
        mode: "slide" for windows, "whole" for one forward pass of each view.
        window: Side of a window.
        stride: Pixels from one window to the next.
        pad: What is done with views that are smaller than a window: "resize" enlarges them as
            `at_least`, "zero" fills them up at the right and at the bottom.
        window_batch: Windows of one forward pass.
        ratios: Scales of the views.
        flip: Whether each view is seen mirrored as well.
        base_size: Long and short side that images are resized into at ratio 1; None keeps theirs.
        flip_pairs: Classes that a mirror turns into each other, left arm and right arm.
        precision: "fp32" or "bf16" activations; sums are float32 in any case.

    Raises:
        ValueError: If a name is unknown, or the windows would leave pixels out.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_classes: int,
        normalisation: str,
        device: torch.device | str = "cpu",
        mode: str = "slide",
        window: int = 512,
        stride: int = 480,
        pad: str = "resize",
        window_batch: int = 4,
        ratios: Sequence[float] = (1.0,),
        flip: bool = False,
        base_size: tuple[int, int] | None = None,
        flip_pairs: Sequence[tuple[int, int]] = (),
        precision: str = "fp32",
    ) -> None:
        _check_name("mode", mode, ("slide", "whole"))
        _check_name("normalisation", normalisation, tuple(NORMALISATIONS))
        _check_name("pad", pad, ("resize", "zero"))
        _check_name("precision", precision, ("fp32", "bf16"))
        window_starts(window, window=window, stride=stride)
        self.model, self.num_classes, self.device = model, num_classes, torch.device(device)
        self.mode, self.window, self.stride, self.pad = mode, window, stride, pad
        self.window_batch, self.ratios, self.flip = window_batch, tuple(ratios), flip
        self.base_size, self.flip_pairs, self.precision = base_size, tuple(flip_pairs), precision
        self.normalisation = normalisation
        mean, std = torch.tensor(NORMALISATIONS[normalisation], device=self.device)
        self._mean, self._std = mean[:, None, None], std[:, None, None]
        self._mirrored_classes = _mirrored(num_classes, self.flip_pairs).to(self.device)

    def labels(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The most probable class of each pixel.

        Args:
            image: RGB [H, W, 3].

        Returns:
            Classes [H, W].

        Raises:
            UserError: If it is no such image, or the model has another number of classes.
        """
        with torch.inference_mode(), _evaluating(self.model):
            size = _checked(image)
            if len(self.ratios) * (1 + self.flip) == 1:
                # Softmax changes no order, so that one view needs no probabilities.
                ((logits, _),) = self._views(image)
            else:
                logits = self.mean_probabilities(self._views(image), size)
            result = np.empty(size, np.uint8)
            for start, stop in self._stripes(logits, size):
                # The first maximum, as argmax; on a CPU in less than half of its time.
                part = resized_rows(logits, size, start, stop).max(dim=0).indices  # [r, W]
                result[start:stop] = part.to(torch.uint8).cpu().numpy()
            return result

    def probabilities(self, image: NDArray[np.uint8]) -> Tensor:
        """Mean over the views of the probability of each class.

        Args:
            image: RGB [H, W, 3].

        Returns:
            float32 [K, H, W].

        Raises:
            UserError: If it is no such image, or the model has another number of classes.
        """
        with torch.inference_mode(), _evaluating(self.model):
            return self.mean_probabilities(self._views(image), _checked(image))

    def settings(self) -> dict[str, object]:
        """What a result must be told with.

        Returns:
            Plain values.
        """
        slides = {"window": self.window, "stride": self.stride, "pad": self.pad}
        windows = slides if self.mode == "slide" else {}
        return {
            "mode": self.mode,
            **windows,
            "ratios": list(self.ratios),
            "flip": self.flip,
            "base_size": list(self.base_size) if self.base_size else None,
            "normalisation": self.normalisation,
            "precision": self.precision,
        }

    def view_logits(self, view: Tensor) -> Tensor:
        """Logits of one view, by windows or at once.

        Args:
            view: Normalised image [3, h, w].

        Returns:
            float32 [K, h, w]; larger where the view was enlarged.

        Raises:
            UserError: If the model has another number of classes.
        """
        if self.mode == "whole":
            return self._forward(view[None])[0]
        if self.pad == "zero":
            height, width = view.shape[1:]
            lacking = [0, max(self.window - width, 0), 0, max(self.window - height, 0)]
            return self._slide(F.pad(view, lacking))[:, :height, :width]
        size = at_least(view.shape[1:], self.window)
        if size != tuple(view.shape[1:]):
            view = resize_bilinear(view[None], size, align_corners=False)[0]
        return self._slide(view)

    def mean_probabilities(
        self, views: Iterable[tuple[Tensor, bool]], size: Sequence[int]
    ) -> Tensor:
        """Resize, mirror back and softmax each view; average.

        Args:
            views: Logits [K, h, w] of each view, and whether it was mirrored; made one by one.
            size: (H, W).

        Returns:
            float32 [K, H, W].
        """
        total, count = torch.zeros((self.num_classes, *size), device=self.device), 0
        for logits, mirrored in views:
            for start, stop in self._stripes(logits, size):
                part = resized_rows(logits, size, start, stop)
                if mirrored:
                    part = part.flip(2)[self._mirrored_classes]
                total[:, start:stop] += part.softmax(dim=0)
            count += 1
            del logits, part  # before the next view makes its own
        return total.div_(count)

    def _views(self, image: NDArray[np.uint8]) -> Iterator[tuple[Tensor, bool]]:
        pixels = torch.tensor(image, device=self.device).permute(2, 0, 1).float() / 255
        normalised = (pixels - self._mean) / self._std  # [3, H, W]
        for ratio in self.ratios:
            size = target_size(image.shape[:2], self.base_size or _own_box(image), ratio)
            view = resize_bilinear(normalised[None], size, align_corners=False)[0]
            for mirrored in (False, True)[: 1 + self.flip]:
                yield self.view_logits(view.flip(2) if mirrored else view), mirrored

    def _slide(self, view: Tensor) -> Tensor:
        window, (height, width) = self.window, view.shape[1:]
        rows = window_starts(height, window=window, stride=self.stride)
        columns = window_starts(width, window=window, stride=self.stride)
        places = [(y, x) for y in rows for x in columns]
        total = torch.zeros((self.num_classes, height, width), device=self.device)
        for first in range(0, len(places), self.window_batch):
            self._add_windows(total, view, places[first : first + self.window_batch])
        covers = [_cover(s, starts, window) for s, starts in ((height, rows), (width, columns))]
        return total.div_((covers[0][:, None] * covers[1]).to(self.device))

    def _add_windows(self, total: Tensor, view: Tensor, places: list[tuple[int, int]]) -> None:
        """One forward pass; its logits are gone before the next one."""
        cuts = [(..., slice(y, y + self.window), slice(x, x + self.window)) for y, x in places]
        windows = torch.stack([view[cut] for cut in cuts])
        for cut, logits in zip(cuts, self._forward(windows), strict=True):
            total[cut] += logits

    def _forward(self, images: Tensor) -> Tensor:
        enabled = self.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            logits = self.model(images)["logits"]
        if logits.shape[1] != self.num_classes:
            raise UserError(
                f"the model scores {logits.shape[1]} classes, the data set has "
                f"{self.num_classes}; use weights that were trained on it"
            )
        return logits.float()

    def _stripes(self, logits: Tensor, size: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Rows of the image, so many at a time as `STRIPE_BYTES` allows."""
        width = max(size[1], logits.shape[2])
        step = max(1, STRIPE_BYTES // (4 * self.num_classes * width))
        return ((start, min(start + step, size[0])) for start in range(0, size[0], step))


def _cover(size: int, starts: Sequence[int], window: int) -> Tensor:
    """[size]: how many windows lie over each position."""
    count = torch.zeros(size)
    for start in starts:
        count[start : start + window] += 1
    return count


def _own_box(image: NDArray[np.uint8]) -> tuple[int, int]:
    height, width = image.shape[:2]
    return max(height, width), min(height, width)


def _mirrored(num_classes: int, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """[K]: the class that each class is in the mirror."""
    order = list(range(num_classes))
    for left, right in pairs:
        order[left], order[right] = right, left
    return torch.tensor(order)


def _checked(image: NDArray[np.uint8]) -> tuple[int, int]:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise UserError(
            f"expected an RGB image [H, W, 3] of bytes, got {image.dtype} {image.shape}; convert "
            "it to RGB"
        )
    return image.shape[0], image.shape[1]


def _check_name(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"{what} must be {' or '.join(known)}, got {name!r}")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation, and afterwards every part back to what it was."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
