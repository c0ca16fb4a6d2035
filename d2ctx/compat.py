"""Every difference between Detectron2's versions, and every path that is not public there."""

import warnings
from collections.abc import Iterable, Mapping

from detectron2.checkpoint.c2_model_loading import (
    align_and_update_state_dicts,
    convert_basic_c2_names,
)
from detectron2.modeling.backbone import fpn
from detectron2.modeling.roi_heads import mask_head
from torch import Tensor

# The same in 0.5, 0.6 and main, outside their `__all__`.
mask_rcnn_loss = mask_head.mask_rcnn_loss
LastLevelMaxPool = fpn.LastLevelMaxPool


# ---- weights ---------------------------------------------------------------------------------
def align_names(
    model_state: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, caffe2: bool
) -> dict[str, Tensor]:
    """Rename a file's tensors to the model's names that end in them.

    The same function in 0.5, 0.6 and main, never exported.

    Args:
        model_state: The model's `state_dict()`.
        weights: The file's tensors.
        caffe2: Whether the file has Caffe2's names.

    Returns:
        The tensors, under the model's names where one was found.
    """
    return align_and_update_state_dicts(dict(model_state), dict(weights), c2_conversion=caffe2)


def caffe2_names(names: Iterable[str]) -> list[str]:
    """Detectron2's names of a backbone's Caffe2 blobs, in order.

    The same function in 0.5, 0.6 and main, never exported.
    """
    return convert_basic_c2_names(list(names))


# ---- notices ---------------------------------------------------------------------------------
# Warnings of PyTorch about Detectron2's own lines (all versions), which no user can act on.
_NOTICES = (
    r"Creating a tensor from a list of numpy\.ndarrays",
    r"The given NumPy array is not writable",
    # The first update of a process was left out: by the scaler, or by SOLVER.ON_NONFINITE.
    r"Detected call of `lr_scheduler\.step\(\)` before",
)


def silence_notices() -> None:
    """Hide the warnings that Detectron2's data loading causes once per process."""
    for message in _NOTICES:
        warnings.filterwarnings("ignore", message, UserWarning, module=r"detectron2\.")
