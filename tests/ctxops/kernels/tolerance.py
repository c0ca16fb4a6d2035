"""What remains of a sum in float32 that is stored in fewer bits."""

import os

import torch


def last_rounding(dtype):
    """Relative error: half a unit in the last place, or a whole one.

    Triton's interpreter cuts bfloat16 off where the compiler rounds.
    """
    eps = torch.finfo(dtype).eps
    cut_off = dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    return eps if cut_off else eps / 2
