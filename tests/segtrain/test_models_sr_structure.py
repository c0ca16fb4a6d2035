"""Networks of Squeeze Reasoning, written out once more."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segtrain.models.backbones.df import BasicBlock
from segtrain.models.backbones.wide_resnet import IdentityBlock
from tests.segtrain.toy_sr import toy


def moved(module: nn.Module) -> nn.Module:
    """Float64, evaluation, statistics and scales of norms that are not those of the start."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.running_mean.uniform_(-0.3, 0.3)
            part.running_var.uniform_(0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.3, 0.3)
    return module.double().eval()


def norm(x: torch.Tensor, part: nn.Module, *, act: bool = True) -> torch.Tensor:
    y = F.batch_norm(x, part.running_mean, part.running_var, part.weight, part.bias)
    return y.relu() if act else y


def up(x: torch.Tensor, like: torch.Tensor, *, align_corners: bool = True) -> torch.Tensor:
    size = like.shape[2:]
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def picture() -> torch.Tensor:
    return torch.randn(2, 3, 61, 83, dtype=torch.float64)


@pytest.mark.parametrize(("stride", "out"), [(1, 6), (2, 6), (1, 8), (2, 8)])
def test_basic_block(stride, out):
    block = moved(BasicBlock(in_channels=6, out_channels=out, stride=stride))
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    y = norm(F.conv2d(x, block.conv1.conv.weight, stride=stride, padding=1), block.conv1.norm)
    y = norm(F.conv2d(y, block.conv2.conv.weight, padding=1), block.conv2.norm, act=False)
    if (stride, out) == (1, 6):
        shortcut = x
    else:
        shortcut = F.conv2d(x, block.shortcut.conv.weight, stride=stride)
        shortcut = norm(shortcut, block.shortcut.norm, act=False)
    torch.testing.assert_close(block(x), (y + shortcut).relu())


@pytest.mark.parametrize(
    ("widths", "stride", "dilation"), [((6, 6), 1, 2), ((8, 8), 2, 1), ((4, 5, 9), 1, 4)]
)
def test_identity_block(widths, stride, dilation):
    block = moved(
        IdentityBlock(in_channels=6, widths=widths, stride=stride, dilation=dilation, dropout=0.5)
    )
    x = torch.randn(2, 6, 11, 13, dtype=torch.float64)
    first = y = norm(x, block.bn1[0])
    for number in range(1, len(widths) + 1):
        if number > 1:
            y = norm(y, block.convs.get_submodule(f"bn{number}")[0])
        weight = block.convs.get_submodule(f"conv{number}").weight
        reach = dilation if weight.shape[-1] == 3 else 1
        y = F.conv2d(
            y,
            weight,
            stride=stride if number == 1 else 1,
            padding=reach * (weight.shape[-1] // 2),
            dilation=reach,
        )
    shortcut = x
    if block.proj_conv is not None:
        shortcut = F.conv2d(first, block.proj_conv.weight, stride=stride)
    assert (block.proj_conv is None) == (widths == (6, 6))
    torch.testing.assert_close(block(x), y + shortcut)


def test_dropout_stands_before_the_last_convolution():
    names = list(
        dict(IdentityBlock(in_channels=4, widths=(4, 4, 8), dropout=0.5).convs.named_children())
    )
    assert names == ["conv1", "bn2", "conv2", "bn3", "dropout", "conv3"]  # fmt: skip


@pytest.mark.parametrize("kind", ["df 1", "df 2", "srnet", "df on resnet"])
def test_real_time_decoder(kind):
    model = moved(toy(kind))
    head, image = model.head, picture()
    maps = model.backbone(image)
    fine, middle, deep = list(maps.values())[-3:]
    x = head.laterals[2](head.context(deep))
    for index, finer in ((1, middle), (0, fine)):
        lateral = head.laterals[index](finer)
        x = torch.cat([up(x, lateral), lateral], dim=1)
        x = F.conv2d(x, head.fusions[index].weight, padding=1)
    x = F.conv2d(x, head.refine.conv.weight, head.refine.conv.bias, padding=1)
    logits = head.classifier(norm(x, head.refine.norm))
    assert logits.shape[2:] == fine.shape[2:]
    torch.testing.assert_close(model(image)["logits"], up(logits, image))


@pytest.mark.parametrize("kind", ["wide none", "wide after_aspp", "deeplab on resnet"])
def test_deeplab_decoder(kind):
    model = moved(toy(kind))
    head, image = model.head, picture()
    maps = list(model.backbone(image).values())
    low = F.conv2d(maps[0], head.lateral.weight)
    deep = maps[-1]
    for part in head.context:
        deep = part(deep)
    x = torch.cat([low, up(deep, low)], dim=1)
    for conv in head.refine:
        x = norm(F.conv2d(x, conv.conv.weight, padding=1), conv.norm)
    expected = up(head.classifier(x), image)
    torch.testing.assert_close(model(image)["logits"], expected)


@pytest.mark.parametrize("kind", ["context sr", "official 2021", "official 2024"])
def test_context_head(kind):
    model = moved(toy(kind))
    head, image = model.head, picture()
    deep = model.backbone(image)["c5"]
    if kind == "official 2024":
        x = F.conv2d(deep, head.reduce.weight, head.reduce.bias)
    else:
        x = norm(F.conv2d(deep, head.reduce.conv.weight, padding=1), head.reduce.norm)
    x = F.conv2d(head.context(x), head.refine.conv.weight, head.refine.conv.bias, padding=1)
    x = norm(x, head.refine.norm)
    if kind == "official 2021":
        x = torch.cat([deep, x], dim=1)
        x = norm(F.conv2d(x, head.fuse.conv.weight, padding=1), head.fuse.norm)
    expected = up(head.classifier(x), image)
    torch.testing.assert_close(model(image)["logits"], expected)


@pytest.mark.parametrize("align_corners", [True, False])
def test_auxiliary_logits_are_resized_as_the_main_ones(align_corners):
    model = moved(toy("context sr", align_corners=align_corners)).train()
    image = picture()
    for part in model.modules():
        if isinstance(part, nn.Dropout2d | nn.BatchNorm1d | nn.BatchNorm2d):
            part.eval()
    aux = model.aux_head
    coarse = aux.classifier(aux.conv(model.backbone(image)["c4"]))
    expected = up(coarse, image, align_corners=align_corners)
    torch.testing.assert_close(model(image)["aux"][0], expected)


@pytest.mark.parametrize("kind", ["sr gate", "se gate"])
def test_gates_stand_before_the_sum(kind):
    block = moved(toy(kind)).backbone.layer1[0]
    x = torch.randn(2, 128, 9, 7, dtype=torch.float64)
    y = norm(block.conv1(x), block.bn1)
    y = block.se(norm(block.conv2(y), block.bn2, act=False))
    torch.testing.assert_close(block(x), (y + block.downsample(x)).relu())
