"""Content-aware reassembly, pixel by pixel (A²-FPN, Eqs. 8 and 12)."""

import torch


def softmax_over_taps(logits, kernel_size, scale=1):
    """Kernels [B, k^2, s H, s W] from [B, k^2 s^2, H, W]: pixel shuffle, then softmax."""
    shuffled = torch.nn.functional.pixel_shuffle(logits.double(), scale)
    assert shuffled.shape[1] == kernel_size**2, "one channel per tap"
    return shuffled.softmax(1)


def to_subpixels(kernels, scale):
    """[B, k^2, s H, s W] -> [B, k^2, s^2, H, W], sub-pixel = s * sy + sx."""
    batch, taps, height, width = kernels.shape
    blocks = kernels.reshape(batch, taps, height // scale, scale, width // scale, scale)
    return blocks.permute(0, 1, 3, 5, 2, 4).flatten(2, 3)


def reassemble(x, kernels, *, scale=1, stride=1):
    """out(y, x) = sum_k K[k](y, x) in(c + offset_k), c = (stride y // scale, stride x // scale).

    `kernels` is [B, k^2, Ho, Wo] at the resolution of the output.
    """
    x, kernels = x.double(), kernels.double()
    size = round(kernels.shape[1] ** 0.5)
    batch, _, height, width = kernels.shape
    out = x.new_zeros(batch, x.shape[1], height, width)
    for image in range(batch):
        for row in range(height):
            for column in range(width):
                centre = stride * row // scale, stride * column // scale
                out[image, :, row, column] = _weighted_window(
                    x[image], kernels[image, :, row, column], centre, size
                )
    return out


def _weighted_window(x, weights, centre, size):
    total = x.new_zeros(x.shape[0])
    for tap in range(size**2):
        row = centre[0] + tap // size - size // 2
        column = centre[1] + tap % size - size // 2
        if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
            total = total + weights[tap] * x[:, row, column]
    return total
