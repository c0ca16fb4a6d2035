"""Networks of Squeeze Reasoning learn; the real commands take them."""

import pytest
import torch
from torch import Tensor

from segtrain.config.schema import NetworkConfig
from segtrain.train.state import build_state
from tests.segtrain.network_runs import check_commands
from tests.segtrain.overfit import NUM_CLASSES, camvid_images, learned, synthetic_images
from tests.segtrain.toy_network import RESNET
from tests.segtrain.toy_sr import CONTEXT, DF2, KINDS, SR, toy
from tests.segtrain.train_toys import config
from tests.shared_data import needs_shared

LEARNERS = {
    "sr": {"backbone": RESNET | {"stem": "deep32", "widths": [16, 16, 32, 32]}, "head": CONTEXT},
    "real time": {
        "backbone": DF2 | {"width": 16},
        "head": {"name": "df", "context": "sr", "channels": 32, "sr": SR},
        "aux": None,
    },
}


def check_learning(name: str, images: Tensor, labels: Tensor) -> None:
    """What is wrong afterwards lies on borders: the maps have an eighth of the resolution."""
    assert labels[labels != 255].bincount().max() < 0.5 * labels.numel()
    model = toy("context sr", num_classes=NUM_CLASSES, **LEARNERS[name])
    assert learned(model, images, labels, steps=60, lr=1e-2) > 0.87


@pytest.mark.parametrize("name", LEARNERS)
def test_four_scenes_are_learned_by_heart(name):
    check_learning(name, *synthetic_images(64, 64))


@needs_shared
@pytest.mark.parametrize("name", LEARNERS)
def test_four_streets_are_learned_by_heart(name):
    check_learning(name, *camvid_images(72, 96))


# ---- bases of EMAU ---------------------------------------------------------------------------
def test_bases_move_after_every_update_and_are_averaged(tmp_path):
    run = config(tmp_path, ema_decay=0.5)
    model = toy("context emau")
    state = build_state(model, run, torch.device("cpu"))
    before = model.head.context.bases.clone()
    state.average.update_parameters(model)
    model(torch.randn(2, 3, 32, 32))
    assert torch.equal(model.head.context.bases, before)
    state.after_update()
    after = model.head.context.bases
    assert not torch.equal(after, before)
    averaged = state.average.module.head.context.bases
    torch.testing.assert_close(averaged, (before + after) / 2)


def test_training_moves_the_bases(tmp_path):
    """In the loop, update by update."""
    from segtrain.train.start import Parts, train
    from tests.segtrain.train_toys import IMAGES, feed

    model = toy("context emau", num_classes=3)
    before = model.head.context.bases.clone()
    run = config(tmp_path / "run", iters=2)
    train(run, build=lambda *_: Parts(model=model, feed=feed(run), images=IMAGES))
    moved = (model.head.context.bases - before).abs().max().item()
    assert moved > 1e-3
    model.eval()(torch.randn(1, 3, 16, 16))
    with pytest.raises(ValueError, match="expected a forward pass in training mode"):
        model.after_update()


# ---- commands --------------------------------------------------------------------------------
SMALL = {"name": "network", "backbone": RESNET, "head": CONTEXT, "align_corners": True}


@pytest.mark.parametrize("kind", ["context sr", "context emau", "srnet", "wide after_aspp"])
def test_commands(kind, tmp_path, capsys):
    model = {**SMALL, "aux": {"channels": 8}, **KINDS[kind]}
    assert NetworkConfig.model_validate(model)
    loss = {"kind": "ohem", "ohem_min_kept": 100}
    run = check_commands(tmp_path, model, capsys, loss=loss)
    assert (run / "checkpoints/last.pt").exists()


@pytest.mark.slow
def test_real_time_network_exports_as_one_graph():
    model = toy("srnet").eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(image)["logits"]
        exported = torch.export.export(model, (image,)).module()
        torch.testing.assert_close(exported(image)["logits"], expected)
