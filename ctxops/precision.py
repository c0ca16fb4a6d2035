"""Float32 islands under autocast: where similarities, softmax and normalisation are computed."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def widened_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32 for half precision, else the dtype itself.

    Args:
        dtype: A floating point dtype.

    Returns:
        float32 for bfloat16, float16 and float32; float64 for float64.
    """
    return torch.promote_types(dtype, torch.float32)


def widen(x: Tensor) -> Tensor:
    """Return `x` in at least float32, itself where it is wide enough.

    Args:
        x: Tensor of any shape, floating point.

    Returns:
        The same values, the same shape.
    """
    return x.to(widened_dtype(x.dtype))


def autocast_off(x: Tensor) -> AbstractContextManager[object]:
    """Context in which autocast leaves the operators on `x`'s device alone.

    Args:
        x: Any tensor on the device in question.

    Returns:
        A context manager; on devices without autocast (meta) it does nothing.
    """
    if not torch.amp.is_autocast_available(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
