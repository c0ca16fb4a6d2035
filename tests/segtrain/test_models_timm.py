"""Models of timm as backbones, and the all-MLP head on them."""

import pytest
import timm
import torch
from torch import nn

from segtrain.config.schema import LossConfig
from segtrain.criterion import build_criterion, count_pixels
from segtrain.errors import UserError
from segtrain.models.backbones import build_backbone
from segtrain.models.heads import build_head
from segtrain.models.maps import MapInfo
from segtrain.weights.load import initial_weights
from tests.segtrain.data_samples import needs_data
from tests.segtrain.network_runs import check_commands
from tests.segtrain.overfit import NUM_CLASSES, camvid_images, learned, synthetic_images
from tests.segtrain.toy_network import network, section
from tests.segtrain.train_toys import config as run_config

MLP = {"name": "mlp", "channels": 16}
SMALL = "mobilenetv3_small_050"


def backbone_section(model: str, **fields):
    return section(backbone={"name": "timm", "model": model, **fields}).backbone


def backbone(model: str, **fields):
    return build_backbone(backbone_section(model, **fields), image_size=(64, 96))


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---- maps --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("model", "channels", "strides", "normalisation"),
    [
        (SMALL, (16, 8, 16, 24, 288), (2, 4, 8, 16, 32), "imagenet"),
        ("pvt_v2_b0", (32, 64, 160, 256), (4, 8, 16, 32), "imagenet"),
        ("convnext_atto", (40, 80, 160, 320), (4, 8, 16, 32), "imagenet"),
        ("swin_tiny_patch4_window7_224", (96, 192, 384, 768), (4, 8, 16, 32), "imagenet"),
        ("vit_tiny_patch16_224", (192,) * 12, (16,) * 12, "vit"),
    ],
)
def test_maps_are_what_is_announced(model, channels, strides, normalisation):
    """At a size that is neither square nor that of the model's weights."""
    found = backbone(model).train()
    assert tuple(info.channels for info in found.maps.values()) == channels
    assert tuple(info.stride for info in found.maps.values()) == strides
    assert list(found.maps) == [f"f{k}" for k in range(1, len(channels) + 1)]
    assert found.normalisation == normalisation
    assert found.multiple == max(strides)
    maps = found(torch.randn(2, 3, 64, 96))
    for name, info in found.maps.items():
        assert maps[name].shape == (2, info.channels, 64 // info.stride, 96 // info.stride)
    sum(x.square().mean() for x in maps.values()).backward()
    assert [n for n, p in found.named_parameters() if p.grad is None] == []


def test_what_the_maps_do_not_need_is_cut_off():
    whole, cut = backbone(SMALL), backbone(SMALL, out_indices=[1, 2])
    assert list(cut.maps) == ["f2", "f3"]
    assert cut.maps["f3"] == MapInfo(channels=16, stride=8)
    assert parameters(cut) < parameters(whole) / 10
    own = {name.removeprefix("net.") for name in cut.state_dict()}
    assert cut.unused == set(timm.create_model(SMALL).state_dict()) - own


def test_stochastic_depth_reaches_the_model():
    found = backbone("pvt_v2_b0", drop_path_rate=0.3)
    rates = [m.drop_prob for m in found.modules() if hasattr(m, "drop_prob")]
    assert max(rates) == pytest.approx(0.3)
    assert not any(getattr(m, "drop_prob", 0) for m in backbone("pvt_v2_b0").modules())


def test_tables_are_spared_by_weight_decay():
    model = network(backbone={"name": "timm", "model": "vit_tiny_patch16_224"}, head=MLP)
    names = {name for name, _ in model.named_parameters()}
    assert model.no_weight_decay() == {"backbone.net.pos_embed", "backbone.net.cls_token"}
    assert model.no_weight_decay() <= names


# ---- weights -----------------------------------------------------------------------------------
def loaded(tmp_path, model: str, source: nn.Module, **fields):
    path = tmp_path / "w.pth"
    torch.save(source.state_dict(), path)
    given = {"name": "timm", "model": model, "pretrained": str(path), **fields}
    found = section(backbone=given)
    net = network(backbone=given)
    return net, initial_weights(net, run_config(tmp_path).model_copy(update={"model": found}))


def test_weights_of_timm_fit_strictly(tmp_path):
    source = timm.create_model(SMALL, num_classes=7)
    net, lines = loaded(tmp_path, SMALL, source)
    assert lines[0].startswith("backbone of ")
    for name, value in net.backbone.net.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


def test_weights_fit_a_backbone_that_is_cut(tmp_path):
    source = timm.create_model(SMALL)
    net, _ = loaded(tmp_path, SMALL, source, out_indices=[2, 3])
    assert torch.equal(net.backbone.net.conv_stem.weight, source.conv_stem.weight)


def test_weights_of_another_model_are_refused(tmp_path):
    source = timm.create_model("mobilenetv3_small_075")
    with pytest.raises(UserError, match="does not fit the model"):
        loaded(tmp_path, SMALL, source)


def test_pretrained_can_be_true():
    assert backbone_section("pvt_v2_b0.in1k", pretrained=True).pretrained == "pvt_v2_b0.in1k"
    assert backbone_section("pvt_v2_b0.in1k", pretrained=False).pretrained is None


# ---- errors ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"model": "resnet1"}, "model resnet1 is no model of timm; did you mean resnet1"),
        ({"model": "pvt_v2_b0.in1"}, "timm has no such weights; did you mean pvt_v2_b0.in1k"),
        ({"model": "hiera_tiny_224"}, "hiera_tiny_224 of timm takes images of one size only"),
        ({"model": "mobilevit_xxs"}, r"expects pixels with mean \(0.0, 0.0, 0.0\) and deviation"),
        ({"model": "sknet"}, "sknet is no model of timm"),
        ({"model": SMALL, "out_indices": [4, 5]}, "out_indices 5: .* has maps 0 to 4"),
    ],
)
def test_models_that_do_not_fit(fields, text):
    with pytest.raises(UserError, match=text):
        backbone(**fields)


def test_a_model_without_maps(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda name, **options: nn.Identity())
    with pytest.raises(UserError, match="resnet18 of timm gives no feature maps"):
        backbone("resnet18")


def test_indices_rise():
    with pytest.raises(ValueError, match=r"out_indices must rise, got \[2, 1\]; sort them"):
        backbone_section(SMALL, out_indices=[2, 1])


def test_a_head_that_wants_more_maps_says_so():
    shown = r"f2 \(1/4, 8 channels\), f3 \(1/8, 16 channels\); take another backbone"
    small = {"name": "timm", "model": SMALL, "out_indices": [1, 2]}
    with pytest.raises(UserError, match=f"head mlp needs 4 maps, the backbone offers {shown}"):
        network(backbone=small, head=MLP)


# ---- the head ----------------------------------------------------------------------------------
def test_parameters_of_segformers_head():
    """SegFormer-B0's head at 150 classes: linear layers with bias, one fusion with norm."""
    widths = (32, 64, 160, 256)
    maps = {f"f{k}": MapInfo(channels=w, stride=2 ** (k + 2)) for k, w in enumerate(widths)}
    config = section(head={"name": "mlp", "channels": 256}).head
    head = build_head(config, maps, num_classes=150, image_size=(512, 512))
    # (sum of widths + 4 biases) 256 + fusion 4 * 256 * 256 + norm 512 + classifier
    assert parameters(head) == (sum(widths) + 4) * 256 + 4 * 256**2 + 512 + 257 * 150 == 433_302


def test_the_head_equals_its_definition():
    torch.manual_seed(0)
    maps = {"a": MapInfo(channels=3, stride=4), "b": MapInfo(channels=5, stride=8)}
    config = section(head=MLP | {"num_maps": 2}).head
    head = build_head(config, maps, num_classes=4, image_size=(32, 32)).eval()
    a, b = torch.randn(2, 3, 7, 9), torch.randn(2, 5, 4, 5)
    one = torch.einsum("oc,bchw->bohw", head.project["a"].weight[..., 0, 0], a)
    two = torch.einsum("oc,bchw->bohw", head.project["b"].weight[..., 0, 0], b)
    one = one + head.project["a"].bias[:, None, None]
    two = two + head.project["b"].bias[:, None, None]
    two = nn.functional.interpolate(two, (7, 9), mode="bilinear", align_corners=False)
    expected = head.classifier(head.fuse(torch.cat([one, two], dim=1)))
    torch.testing.assert_close(head({"a": a, "b": b}, a)["logits"], expected)


def baseline(num_classes: int = 5):
    torch.manual_seed(0)
    fields = {"backbone": {"name": "timm", "model": "pvt_v2_b0"}, "head": MLP | {"channels": 32}}
    return network(num_classes=num_classes, **fields, aux=None)


@pytest.mark.parametrize("size", [(45, 61), (64, 96), (20, 70)])
def test_any_size(size):
    model = baseline().eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        together = model(images)["logits"]
        alone = torch.cat([model(image[None])["logits"] for image in images])
    assert together.shape == (2, 5, *size)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_one_step_reaches_every_parameter_in_half_precision():
    model = baseline().train()
    truth = {"label": torch.randint(5, (2, 45, 61))}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(torch.randn(2, 3, 45, 61))
        terms = build_criterion(LossConfig())(outputs, truth, count_pixels([truth]))
    sum(terms.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_commands(tmp_path, capsys):
    fields = {"backbone": {"name": "timm", "model": SMALL}, "head": MLP}
    check_commands(tmp_path, section(**fields).model_dump(mode="json"), capsys)


def test_learns_four_scenes_by_heart():
    images, labels = synthetic_images(64, 96)
    assert learned(baseline(NUM_CLASSES), images, labels, steps=25, lr=5e-3) > 0.7


@needs_data
def test_learns_four_real_images_by_heart():
    images, labels = camvid_images(64, 96)
    assert learned(baseline(NUM_CLASSES), images, labels, steps=25, lr=5e-3) > 0.7
