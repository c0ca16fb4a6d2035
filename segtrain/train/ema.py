"""Running average of the weights, evaluated and saved in place of the weights themselves."""

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def build_average(model: nn.Module, decay: float) -> AveragedModel | None:
    """Start a running average: decay x average + (1 - decay) x weights, after every update.

    Statistics of batch norms are averaged like weights.

    Args:
        model: What is trained.
        decay: In (0, 1); 0 for no average.

    Returns:
        The average, whose `update_parameters(model)` takes an update in; its first takes the
        weights as they are. None for decay 0.
    """
    if not decay:
        return None
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    return average.eval().requires_grad_(False)
