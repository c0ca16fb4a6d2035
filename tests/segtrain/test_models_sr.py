"""Networks of Squeeze Reasoning: sizes, gradients, resolution, what does not go together."""

import pytest
import torch
from torch import nn

from segtrain.config.schema import LossConfig, NetworkConfig
from segtrain.criterion import build_criterion
from segtrain.errors import UserError
from segtrain.models.backbones import build_backbone
from segtrain.models.maps import MapInfo
from tests.segtrain.toy_network import RESNET, network, section
from tests.segtrain.toy_sr import CONTEXT, DF1, KINDS, toy


# ---- how they behave -------------------------------------------------------------------------
def step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Losses and gradients of one training step."""
    count = {"label": (labels != 255).sum()}
    losses = build_criterion(LossConfig())(model.train()(images), {"label": labels}, count)
    sum(losses.values()).backward()
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind):
    torch.manual_seed(0)
    model = toy(kind)
    labels = torch.randint(0, 5, (2, 49, 65))
    losses = step(model, torch.randn(2, 3, 49, 65), labels)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert ("loss_aux" in losses) == (model.aux_head is not None)
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", ["df 1", "df 2", "wide none", "sr gate"])
@pytest.mark.parametrize("size", [(64, 64), (45, 61)])
def test_maps_have_the_sizes_they_announce(kind, size):
    backbone = toy(kind).backbone.eval()
    maps = backbone(torch.randn(1, 3, *size))
    assert list(maps) == list(backbone.maps)
    for name, info in backbone.maps.items():
        cells = [-(-side // info.stride) for side in size]
        assert list(maps[name].shape) == [1, info.channels, *cells], name


@pytest.mark.parametrize("kind", KINDS)
def test_any_size_one_image_and_the_same_answer_twice(kind):
    model = toy(kind).eval()
    for size in [(33, 47), (64, 40)]:
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            first, second = model(image)["logits"], model(image)["logits"]
        assert first.shape == (1, 5, *size)
        assert torch.equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_a_batch_do_not_meet_in_evaluation(kind):
    model = toy(kind).double().eval()
    images = torch.randn(3, 3, 40, 56, dtype=torch.float64)
    with torch.no_grad():
        together = model(images)["logits"]
        alone = torch.cat([model(images[k : k + 1])["logits"] for k in range(3)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    torch.manual_seed(0)
    model = toy(kind)
    labels = torch.randint(0, 5, (2, 48, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model.train()(torch.randn(2, 3, 48, 64))
        count = {"label": torch.tensor(labels.numel())}
        losses = build_criterion(LossConfig())(outputs, {"label": labels}, count)
    sum(losses.values()).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in grads)


def test_one_image_trains_where_no_pool_is_normalised():
    labels = torch.randint(0, 5, (1, 48, 64))
    for kind in ("context sr", "srnet", "sr gate"):
        losses = step(toy(kind), torch.randn(1, 3, 48, 64), labels)
        assert all(torch.isfinite(loss) for loss in losses.values())
    for kind in ("psp", "aspp", "df 2"):
        with pytest.raises(ValueError, match="one value per channel .* 1 of 48x64"):
            step(toy(kind), torch.randn(1, 3, 48, 64), labels)


@pytest.mark.parametrize("kind", ["context sr", "psp", "srnet", "wide after_aspp"])
def test_batch_norms_are_synchronised_without_losing_anything(kind):
    model = toy(kind).double().eval()
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)["logits"]
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert not [m for m in synced.modules() if isinstance(m, nn.BatchNorm2d)]
        torch.testing.assert_close(synced(x)["logits"], before)


@pytest.mark.parametrize("kind", ["context sr", "srnet"])
@pytest.mark.parametrize(("pool", "same"), [("mean", True), ("sum", False)])
def test_whole_images_reason_as_crops_do(kind, pool, same):
    """The vector that multiplies channels, for a map and for the map four times."""
    content = KINDS[kind]["head"] | {"sr": {"nodes": 4, "pool": pool}}
    module = toy(kind, head=content).double().eval().head.context
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.running_mean.uniform_(-0.1, 0.1)
            part.running_var.uniform_(0.5, 2)
    x = torch.randn(2, module.in_channels, 5, 7, dtype=torch.float64)
    seen = []
    hook = module.reason.register_forward_hook(lambda _, inputs, out: seen.append(out))
    with torch.no_grad():
        module(x)
        module(x.repeat(1, 1, 2, 2))
    hook.remove()
    small, large = seen
    change = ((large - small).norm() / small.norm()).item()
    assert (change < 1e-9) if same else (change > 0.1)


# ---- what does not go together ---------------------------------------------------------------
def test_a_head_says_what_it_lacks():
    from segtrain.models.heads import build_head

    one = {"only": MapInfo(channels=8, stride=8)}
    for name, count in (("df", 3), ("deeplab_plus", 2)):
        config = section(head={"name": name}).head
        with pytest.raises(UserError, match=f"^head {name} needs {count} maps, the backbone"):
            build_head(config, one, num_classes=3, image_size=(32, 32))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"preset": "released", "squeeze": "gap"}, "squeeze cannot be chosen with preset released"),
        ({"preset": "released", "pool": "sum", "norm": "GN"}, "norm, pool cannot be chosen"),
        ({"squeeze": "max"}, "ghp"),
    ],
)
def test_wrong_keys_of_reasoning(fields, text):
    with pytest.raises(ValueError, match=text):
        NetworkConfig.model_validate(
            {"name": "network", "backbone": RESNET, "head": CONTEXT | {"sr": fields}}
        )


def test_widths_that_do_not_divide_are_said():
    with pytest.raises(ValueError, match="nodes and reduced channels"):
        network(head=CONTEXT | {"sr": {"nodes": 7}})


def test_state_names_are_stable():
    names = {name.rsplit(".", 2)[0] for name, _ in toy("srnet").head.named_parameters()}
    assert {"laterals", "fusions", "context.reason", "refine"} <= names
    wide = set(dict(toy("wide none").backbone.named_parameters()))
    assert {
        "mod1.conv1.weight",
        "mod4.block1.bn1.0.weight",
        "mod4.block1.proj_conv.weight",
        "mod6.block1.convs.bn3.0.bias",
        "mod7.block1.convs.conv3.weight",
        "bn_out.0.weight",
    } <= wide
    backbone = build_backbone(section(backbone=DF1).backbone, image_size=(32, 32))
    assert "stage2.0.shortcut.conv.weight" in dict(backbone.named_parameters())
