"""Where weight files come from: a local path, or an address that Detectron2 knows."""

import numpy as np
from detectron2.utils.file_io import PathManager
from torch import Tensor

from d2ctx.errors import UserError
from d2ctx.safe_read import read_checkpoint

PATH_FIX = 'set MODEL.WEIGHTS to an existing file, or to "" for random weights'


def load_weights_file(path: str, *, fix: str = PATH_FIX) -> dict[str, Tensor | np.ndarray]:
    """Read the tensors of a weight file without running any code that it may contain.

    Args:
        path: .safetensors, .pth, .pt, .pyth or .pkl; local, or an address that Detectron2 knows.
        fix: What an error about an absent file suggests.

    Returns:
        Tensor name -> values on the CPU, unwrapped from `{"model": ...}`.

    Raises:
        UserError: If the file is absent, unreadable, unsafe or holds something else.
    """
    return read_checkpoint(local_path(path, fix=fix))["model"]


def local_path(path: str, *, fix: str = PATH_FIX) -> str:
    """Fetch an address, or check that a local file is there.

    Args:
        path: What the user named.
        fix: What an error suggests.

    Returns:
        A file on this machine.

    Raises:
        UserError: If there is none.
    """
    try:
        local = PathManager.get_local_path(path)
    except (OSError, KeyError, RuntimeError) as error:
        raise UserError(f"weights {path} could not be fetched ({error}); {fix}") from error
    if not PathManager.isfile(local):
        raise UserError(f"weights {path} do not exist; {fix}")
    return local
