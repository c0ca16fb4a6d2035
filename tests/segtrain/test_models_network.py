"""Networks of a backbone and a head: sizes, maps, weights, gradients, errors."""

import pytest
import torch
from torch import nn

from segtrain.errors import UserError
from segtrain.models.backbones import build_backbone
from segtrain.models.maps import MapInfo, at_stride, deepest
from segtrain.weights.load import initial_weights, load_weights
from tests.segtrain.toy_network import CONTEXT, RESNET, network, section
from tests.segtrain.train_toys import config as run_config

MAPS = {
    "low": MapInfo(channels=8, stride=4),
    "mid": MapInfo(channels=16, stride=8),
    "deep": MapInfo(channels=32, stride=8),
}


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def backbone(**fields):
    return build_backbone(section(backbone=RESNET | fields).backbone, image_size=(32, 32))


@pytest.mark.parametrize(
    ("depth", "stem", "count"),
    [
        (50, "deep64", 23_631_808),
        (101, "deep64", 42_623_936),
        (50, "deep32", 23_527_264),
        (50, "plain", 23_508_032),
    ],
)
def test_resnet_has_the_papers_parameters(depth, stem, count):
    with torch.device("meta"):
        model = backbone(depth=depth, stem=stem, widths=[64, 128, 256, 512])
    assert parameters(model) == count


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("size", [(32, 32), (45, 61)])
def test_maps_have_the_sizes_they_announce(output_stride, size):
    model = backbone(output_stride=output_stride).eval()
    maps = model(torch.randn(2, 3, *size))
    assert list(maps) == list(model.maps) == ["c2", "c3", "c4", "c5"]
    for name, info in model.maps.items():
        cells = [-(-side // info.stride) for side in size]
        assert list(maps[name].shape) == [2, info.channels, *cells]


def dilations(model, stage):
    return [
        [m.dilation[0] for m in block.modules() if getattr(m, "kernel_size", 0) == (3, 3)]
        for block in model.get_submodule(stage)
    ]


@pytest.mark.parametrize(
    ("fields", "layer3", "layer4"),
    [
        ({}, [2] * 6, [4, 4, 4]),
        ({"multi_grid": True}, [2] * 6, [4, 8, 16]),
        ({"contract_dilation": True}, [1, 2, 2, 2, 2, 2], [2, 4, 4]),
        ({"output_stride": 16}, [1] * 6, [2, 2, 2]),
        ({"output_stride": 32}, [1] * 6, [1, 1, 1]),
    ],
)
def test_dilations(fields, layer3, layer4):
    model = backbone(depth=50, **fields)
    assert dilations(model, "layer3") == [[d] for d in layer3]
    assert dilations(model, "layer4") == [[d] for d in layer4]


def test_every_parameter_learns():
    model = network().train()
    outputs = model(torch.randn(2, 3, 32, 48))
    assert outputs["logits"].shape == (2, 5, 32, 48)
    assert outputs["aux"][0].shape == (2, 5, 32, 48)
    (outputs["logits"].square().mean() + outputs["aux"][0].square().mean()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_in_evaluation_there_is_no_auxiliary_head():
    outputs = network().eval()(torch.randn(1, 3, 33, 47))
    assert list(outputs) == ["logits"]
    assert outputs["logits"].shape == (1, 5, 33, 47)


def test_autocast():
    model = network().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(torch.randn(2, 3, 32, 32))
    outputs["logits"].float().sum().backward()
    assert torch.isfinite(outputs["logits"]).all()


def test_deepest_and_at_stride():
    assert deepest(MAPS, 2, head="h") == ("mid", "deep")
    assert at_stride(MAPS, 8, head="h") == "deep"


def test_what_a_backbone_lacks_is_said():
    shown = "low (1/4, 8 channels), mid (1/8, 16 channels), deep (1/8, 32 channels)"
    with pytest.raises(UserError, match=r"^h needs 4 maps, the backbone offers ") as error:
        deepest(MAPS, 4, head="h")
    assert shown in str(error.value)
    with pytest.raises(UserError, match="h needs a map at 1/16, the backbone offers low"):
        at_stride(MAPS, 16, head="h")


def test_whole_weights_fit_another_number_of_classes(tmp_path):
    from safetensors.torch import save_file

    old, new = network(), network(num_classes=7)
    save_file(old.state_dict(), tmp_path / "w.safetensors")
    assert load_weights(network(), tmp_path / "w.safetensors").complete
    with pytest.raises(UserError, match="does not fit the model"):
        load_weights(new, tmp_path / "w.safetensors")
    fit = load_weights(new, tmp_path / "w.safetensors", new_classes=True)
    assert set(fit.reinitialised) == set(new.class_parameters())
    assert len(fit.reinitialised) == 4  # weight and bias of both classifiers
    assert torch.equal(new.backbone.conv1[0].weight, old.backbone.conv1[0].weight)


def test_a_pretrained_backbone_is_strict_about_the_stem(tmp_path):
    import timm

    source = timm.create_model("resnet18", channels=(8, 8, 16, 32), num_classes=9)
    torch.save(source.state_dict(), tmp_path / "r18.pth")
    pretrained = {"pretrained": str(tmp_path / "r18.pth")}
    plain = network(backbone=RESNET | {"stem": "plain"} | pretrained)
    config = run_config(tmp_path / "run").model_copy(
        update={"model": section(backbone=RESNET | {"stem": "plain"} | pretrained)}
    )
    (line,) = initial_weights(plain, config)
    assert line.startswith("backbone of ")
    assert torch.equal(plain.backbone.layer4[0].conv1.weight, source.layer4[0].conv1.weight)
    with pytest.raises(UserError, match="does not fit the model"):
        initial_weights(network(), config)


def test_random_weights_are_told(tmp_path):
    config = run_config(tmp_path).model_copy(update={"model": section()})
    lines = initial_weights(network(), config)
    assert lines == ["random weights: init and model.backbone.pretrained are null"]


def test_a_frozen_backbone_of_random_weights_is_warned_of(tmp_path):
    config = run_config(tmp_path).model_copy(update={"model": section(freeze_backbone=True)})
    _, warning = initial_weights(network(), config)
    assert warning.startswith("model.freeze_backbone keeps random weights: the backbone never")
    assert "\n" not in warning


def test_a_frozen_backbone_of_known_weights_is_not_warned_of(tmp_path):
    from safetensors.torch import save_file

    save_file(network().state_dict(), tmp_path / "w.safetensors")
    config = run_config(tmp_path).model_copy(
        update={"model": section(freeze_backbone=True), "init": str(tmp_path / "w.safetensors")}
    )
    assert not [line for line in initial_weights(network(), config) if "freeze" in line]


POOLING = [
    CONTEXT | {"sr": {"nodes": 8, "reason": "gcn"}},
    {"name": "psp", "channels": 16},
    {"name": "aspp", "channels": 16},
    {"name": "df", "channels": 8},
]


@pytest.mark.parametrize("head", POOLING, ids=lambda head: head["name"])
def test_one_image_is_refused_where_a_batch_norm_would_see_one_number(head):
    model = network(head=head).train()
    with pytest.raises(UserError, match=r"one value .* 1 of 32x48; write train.micro_batch: 2"):
        model(torch.randn(1, 3, 32, 48))
    assert model(torch.randn(2, 3, 32, 48))["logits"].shape == (2, 5, 32, 48)
    assert model.eval()(torch.randn(1, 3, 32, 48))["logits"].shape == (1, 5, 32, 48)


def test_other_errors_of_a_network_stay_as_they_are(monkeypatch):
    def refuse(*_):
        raise ValueError("another reason")

    model = network()
    monkeypatch.setattr(model.head, "forward", refuse)
    with pytest.raises(ValueError, match="^another reason$") as error:
        model(torch.randn(1, 3, 32, 48))
    assert not isinstance(error.value, UserError)
