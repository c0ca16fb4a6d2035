"""The trainer's optimizer and gradient clipping, its results, and that a model learns."""

import math

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from d2ctx import UserError
from d2ctx.config import load_config
from d2ctx.trainer import Trainer
from tests.d2ctx import tiny

INSTANT = "a2fpn/mask_rcnn_a2fpn_instant.yaml"
OPTIMIZERS = ["SGD", "AdamW"]


def build_optimizer(model: nn.Module, name: str, **clip: object) -> torch.optim.Optimizer:
    """The trainer's optimizer; `clip` are keys of SOLVER.CLIP_GRADIENTS, none switches it off."""
    opts = ["SOLVER.OPTIMIZER", name, "SOLVER.CLIP_GRADIENTS.ENABLED", bool(clip)]
    for key, value in clip.items():
        opts += [f"SOLVER.CLIP_GRADIENTS.{key}", value]
    return Trainer.build_optimizer(tiny.config(INSTANT, *opts), model)


def two_layers() -> nn.Module:
    """Always the same; the gradients of the second layer are a tenth of those of the first."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    for scale, layer in zip((1.0, 0.1), model, strict=True):
        for parameter in layer.parameters():
            nn.init.normal_(parameter, generator=generator)
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return model


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters()]


def total_norm(model: nn.Module) -> float:
    return torch.cat([g.flatten() for g in gradients(model)]).norm().item()


# ---- clipping --------------------------------------------------------------------------------
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_full_model_clips_the_norm_over_all_parameters(name, norm_type):
    model, expected = two_layers(), two_layers()
    nn.utils.clip_grad_norm_(expected.parameters(), 0.5, norm_type)
    build_optimizer(expected, name).step()
    build_optimizer(model, name, CLIP_TYPE="full_model", CLIP_VALUE=0.5, NORM_TYPE=norm_type).step()
    torch.testing.assert_close(gradients(model), gradients(expected))
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    assert total_norm(model) < 1.0 < total_norm(two_layers())


def test_full_model_leaves_smaller_gradients_alone():
    model, before = two_layers(), gradients(two_layers())
    limit = 1.01 * total_norm(model)
    build_optimizer(model, "SGD", CLIP_TYPE="full_model", CLIP_VALUE=limit).step()
    assert all(map(torch.equal, gradients(model), before))


def test_full_model_sees_unscaled_gradients_under_mixed_precision():
    model, expected = two_layers(), two_layers()
    nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(1))  # as the loss would be
    for gradient in gradients(model):
        gradient.mul_(scaler.get_scale())
    scaler.step(build_optimizer(model, "SGD", CLIP_TYPE="full_model", CLIP_VALUE=0.5))
    torch.testing.assert_close(gradients(model), gradients(expected))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("kind", "clip"),
    [("norm", nn.utils.clip_grad_norm_), ("value", nn.utils.clip_grad_value_)],
)
def test_detectron2s_types_clip_each_parameter_alone(name, kind, clip):
    model, expected = two_layers(), two_layers()
    for parameter in expected.parameters():
        clip(parameter, 0.05)
    build_optimizer(model, name, CLIP_TYPE=kind, CLIP_VALUE=0.05).step()
    torch.testing.assert_close(gradients(model), gradients(expected))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_clipping_gradients_stay(name):
    model, before = two_layers(), gradients(two_layers())
    build_optimizer(model, name).step()
    assert all(map(torch.equal, gradients(model), before))


# ---- optimizers ------------------------------------------------------------------------------
def test_adamw_has_the_rates_and_decays_of_detectron2s_groups():
    model = Trainer.build_model(tiny.config(INSTANT))
    sgd, adamw = (
        {
            parameter: (group["lr"], group["weight_decay"])
            for group in build_optimizer(model, name).param_groups
            for parameter in group["params"]
        }
        for name in OPTIMIZERS
    )
    assert adamw == sgd
    assert adamw.keys() == {p for p in model.parameters() if p.requires_grad}
    assert len(set(adamw.values())) > 1


def test_an_unknown_optimizer_is_named():
    with pytest.raises(UserError, match="must be one of SGD, AdamW, got 'LAMB'"):
        build_optimizer(two_layers(), "LAMB")


# ---- training --------------------------------------------------------------------------------
def test_results_are_empty_until_the_first_evaluation(launch):
    launch.output.mkdir()
    trainer = Trainer(load_config(str(launch.config), ["SOLVER.MAX_ITER", "1"]))
    assert trainer.last_results == {}
    trainer.train()
    assert set(trainer.last_results) == {"bbox", "segm"}


def test_loss_on_one_batch_falls():
    torch.manual_seed(0)
    cfg = tiny.config(INSTANT, "SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", 0.002)
    model = Trainer.build_model(cfg).train()
    optimizer = Trainer.build_optimizer(cfg, model)
    batch, totals, masks = tiny.batch(), [], []
    with EventStorage():
        for _ in range(15):
            losses = model(batch)
            total = sum(losses.values())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            totals.append(total.item())
            masks.append(losses["loss_mask"].item())
    assert sum(totals[-3:]) / 3 < 0.6 * totals[0]
    assert masks[0] == pytest.approx(math.log(2), abs=0.05)  # a coin per pixel
    assert masks[-1] < 0.6
