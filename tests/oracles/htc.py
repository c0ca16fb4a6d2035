"""Hybrid Task Cascade, written from the paper's definitions with loops, in float64."""

import torch
from torch import Tensor


def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolution with stride 1 and zero padding of half the kernel: [B, C, H, W]."""
    half = weight.shape[-1] // 2
    batch, _, height, width = x.shape
    padded = torch.zeros(*x.shape[:2], height + 2 * half, width + 2 * half, dtype=x.dtype)
    padded[:, :, half : half + height, half : half + width] = x
    out = bias[None, :, None, None].expand(batch, -1, height, width).clone()
    for dy in range(weight.shape[-2]):
        for dx in range(weight.shape[-1]):
            window = padded[:, :, dy : dy + height, dx : dx + width]
            out += torch.einsum("bchw,oc->bohw", window, weight[:, :, dy, dx])
    return out


def deconv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Transposed convolution, kernel 2, stride 2; weight [C, D, 2, 2]."""
    batch, _, height, width = x.shape
    out = torch.zeros(batch, weight.shape[1], 2 * height, 2 * width, dtype=x.dtype)
    for dy in range(2):
        for dx in range(2):
            out[:, :, dy::2, dx::2] = torch.einsum("bchw,cd->bdhw", x, weight[:, :, dy, dx])
    return out + bias[None, :, None, None]


def resize_corners(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resizing in which corner pixels keep their places."""
    out = torch.zeros(*x.shape[:2], *size, dtype=x.dtype)
    for i in range(size[0]):
        for j in range(size[1]):
            y = i * (x.shape[2] - 1) / (size[0] - 1) if size[0] > 1 else 0.0
            z = j * (x.shape[3] - 1) / (size[1] - 1) if size[1] > 1 else 0.0
            top, left = int(y), int(z)
            bottom, right = min(top + 1, x.shape[2] - 1), min(left + 1, x.shape[3] - 1)
            a, b = y - top, z - left
            out[:, :, i, j] = (
                (1 - a) * (1 - b) * x[:, :, top, left]
                + (1 - a) * b * x[:, :, top, right]
                + a * (1 - b) * x[:, :, bottom, left]
                + a * b * x[:, :, bottom, right]
            )
    return out


def mask_feature(state: dict[str, Tensor], pooled: Tensor, stage: int, *, num_convs: int) -> Tensor:
    """m_t: what head t has before its deconvolution; m_t = M_t(x + G_t(m_{t - 1})), recursively."""
    x = pooled
    if stage > 0:
        before = mask_feature(state, pooled, stage - 1, num_convs=num_convs)
        name = f"mask_flow.{stage - 1}"
        x = pooled + conv(before, state[f"{name}.weight"], state[f"{name}.bias"]).relu()
    for k in range(1, num_convs + 1):
        name = f"mask_head.{stage}.mask_fcn{k}"
        x = conv(x, state[f"{name}.weight"], state[f"{name}.bias"]).relu()
    return x


def mask_logits(state: dict[str, Tensor], pooled: Tensor, stage: int, *, num_convs: int) -> Tensor:
    """Logits of head t from its m_t."""
    x = mask_feature(state, pooled, stage, num_convs=num_convs)
    name = f"mask_head.{stage}"
    x = deconv(x, state[f"{name}.deconv.weight"], state[f"{name}.deconv.bias"]).relu()
    return conv(x, state[f"{name}.predictor.weight"], state[f"{name}.predictor.bias"])


def semantic_branch(
    state: dict[str, Tensor], maps: dict[str, Tensor], *, common: str, num_convs: int
) -> tuple[Tensor, Tensor]:
    """Logits and embedding of the semantic branch."""
    size = tuple(maps[common].shape[-2:])
    total = 0
    for name, x in maps.items():
        weight, bias = state[f"lateral.{name}.weight"], state[f"lateral.{name}.bias"]
        total = total + conv(resize_corners(x, size), weight, bias).relu()
    for k in range(num_convs):
        total = conv(total, state[f"convs.{k}.weight"], state[f"convs.{k}.bias"]).relu()
    logits = conv(total, state["predictor.weight"], state["predictor.bias"])
    return logits, conv(total, state["embedding.weight"], state["embedding.bias"]).relu()


def semantic_loss(logits: Tensor, labels: Tensor, *, stride: int, ignore: int) -> Tensor:
    """Mean cross entropy over the pixels that count, labels taken at every stride-th pixel."""
    terms = []
    for b in range(logits.shape[0]):
        for y in range(logits.shape[2]):
            for x in range(logits.shape[3]):
                label = int(labels[b, y * stride, x * stride])
                if label != ignore:
                    z = logits[b, :, y, x]
                    terms.append(z.exp().sum().log() - z[label])
    return sum(terms) / len(terms)
