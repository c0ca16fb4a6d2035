"""Conversion of ResNet weights: the same features, the same shapes, and what is refused."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_resnet_backbone
from safetensors import safe_open
from torch import Tensor, nn

from d2ctx.compat import align_names
from d2ctx.convert import convert, describe, main
from d2ctx.convert_names import find_naming
from d2ctx.convert_resnet import Architecture, translate
from d2ctx.errors import UserError
from d2ctx.weights import load_initial_weights, load_weights_file
from tests.d2ctx import tiny

RECIPE = "torchvision's; timm's are the same"


def lively(model: nn.Module) -> nn.Module:
    """Every number of a network drawn at random, so that none can be left out unseen."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            drawn = torch.rand(value.shape, generator=generator) - 0.5
            if value.dim() > 1:
                value.copy_(drawn * 2 / value[0].numel() ** 0.5)
            else:
                value.copy_(drawn if name.endswith(("bias", "running_mean")) else drawn + 1)
    return model.eval()


def stages_of(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Maps of torchvision's ResNet, under Detectron2's names."""
    x = model.maxpool(model.relu(model.bn1(model.conv1(image))))
    maps = {}
    for number in range(1, 5):
        x = getattr(model, f"layer{number}")(x)
        maps[f"res{number + 1}"] = x
    return maps


def meta(name: str, package=torchvision.models.get_model) -> dict[str, Tensor]:
    """Names and shapes of a network, without values."""
    with torch.device("meta"):
        return package(name).state_dict()


def blobs(depth: int = 18) -> dict[str, np.ndarray]:
    """A ResNet as Caffe2 names it: affine layers in the place of norms."""
    generator = np.random.default_rng(0)
    found = {"fc1000_w": np.zeros((3, 2), np.float32)}
    letters = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}
    for name, value in Architecture(depth=depth).build().state_dict().items():
        if "running" in name:
            continue
        drawn = generator.normal(size=value.shape).astype(np.float32) / 8
        first, *rest = name.split(".")
        last = {"weight": "s", "bias": "b"}[rest[-1]] if "norm" in name else "w"
        if first == "stem":
            found[f"res_conv1_bn_{last}" if "norm" in name else "conv1_w"] = drawn
        else:
            norm = "_bn" if "norm" in name else ""
            found[f"{first}_{rest[0]}_{letters[rest[1]]}{norm}_{last}"] = drawn
    return found


def dump(path: Path, content: object) -> str:
    path.write_bytes(pickle.dumps(content, protocol=2))
    return str(path)


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


@pytest.fixture(scope="module")
def resnet18():
    return lively(torchvision.models.resnet18())


@pytest.fixture
def file18(resnet18, tmp_path):
    path = tmp_path / "resnet18.pth"
    torch.save(resnet18.state_dict(), path)
    return str(path)


# ---- the same features -----------------------------------------------------------------------
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_features_of_torchvision_and_of_the_converted_file_are_equal(tmp_path, name):
    source = lively(torchvision.models.get_model(name))
    torch.save(source.state_dict(), tmp_path / "in.pth")
    found = convert(str(tmp_path / "in.pth"), tmp_path / "new" / "out.safetensors", arch=name)
    resnet = build_resnet_backbone(found.architecture.config(), ShapeSpec(channels=3)).eval()
    report = load_initial_weights(resnet, str(tmp_path / "new" / "out.safetensors"))
    assert report.complete
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, maps = stages_of(source, image), resnet(image)
    for stage, x in expected.items():
        assert (maps[stage] - x).abs().max() <= 1e-5 * x.abs().max(), stage


def test_the_written_file_holds_only_what_the_resnet_takes(file18, tmp_path):
    found = convert(file18, tmp_path / "out.safetensors")
    assert found.left_out == ("fc.weight", "fc.bias")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert set(file.keys()) == set(Architecture(depth=18).build().state_dict())
        assert file.metadata() == {
            "format": "pt",
            "architecture": "resnet18",
            "names": "Detectron2",
        }
    assert [path.name for path in tmp_path.glob("out*")] == ["out.safetensors"]


def test_half_precision_and_step_counters_are_not_carried_over(resnet18, tmp_path):
    state = {
        name: v.half() if v.is_floating_point() else v for name, v in resnet18.state_dict().items()
    }
    torch.save(state, tmp_path / "in.pth")
    convert(str(tmp_path / "in.pth"), tmp_path / "out.safetensors")
    written = load_weights_file(str(tmp_path / "out.safetensors"))
    assert {value.dtype for value in written.values()} == {torch.float32}
    assert not any("num_batches" in name for name in written)


def test_a_converted_file_is_the_start_of_a_run(launch, file18, tmp_path):
    target = tmp_path / "r18.safetensors"
    convert(file18, target)
    node = {"DEPTH": 18, "RES2_OUT_CHANNELS": 64, "STEM_OUT_CHANNELS": 64, "NORM": "FrozenBN"}
    keys = [part for key, value in node.items() for part in (f"MODEL.RESNETS.{key}", value)]
    assert launch.main("MODEL.WEIGHTS", target, *keys, "SOLVER.MAX_ITER", 1) == 0
    log = (launch.output / "log.txt").read_text()
    assert f"Weights from {target}" in log
    trained = torch.load(launch.output / "model_final.pth", weights_only=False)["model"]
    source = load_weights_file(file18)["layer1.0.bn1.running_mean"]  # frozen: as it was
    assert np.array_equal(trained["backbone.bottom_up.res2.0.conv1.norm.running_mean"], source)


# ---- names -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name",
    [
        "resnet34",
        "resnet101",
        "resnet152",
        "resnext101_32x8d",
        "resnext101_64x4d",
        "wide_resnet101_2",
    ],
)
def test_torchvision_networks_are_recognised_and_fit(name):
    found = translate(meta(name))
    assert found.architecture.name == name
    assert found.problem() == ""
    assert found.left_out == ("fc.weight", "fc.bias")


@pytest.mark.parametrize("name", ["resnext101_64x4d", "resnext101_32x4d", "resnet50"])
def test_timm_networks_are_recognised_and_fit(name):
    found = translate(meta(name, timm.create_model))
    assert (found.architecture.name, found.problem()) == (name, "")


def test_the_configured_resnext_is_the_one_that_fits():
    with torch.device("meta"):
        resnet = build_resnet_backbone(
            tiny.config("a2fpn/mask_rcnn_x101_64x4d_a2fpn_1x.yaml"), ShapeSpec(channels=3)
        )
    found = translate(meta("resnext101_64x4d"))
    assert {n: t.shape for n, t in found.usable().items()} == {
        n: t.shape for n, t in resnet.state_dict().items()
    }


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "backbone.bottom_up."])
def test_a_prefix_is_found(prefix):
    weights = {prefix + name: value for name, value in meta("resnet18").items()}
    weights["neck.stem.conv1.weight"] = torch.zeros(1, device="meta")
    found = translate(weights)
    assert found.naming.prefix == prefix
    assert found.problem() == ""
    assert "neck.stem.conv1.weight" in found.left_out


def test_two_networks_in_one_file_are_refused():
    weights = {p + name: v for name, v in meta("resnet18").items() for p in ("model.", "ema.")}
    assert "expected one ResNet, got 2, below" in refusal(find_naming, weights)


def test_our_own_names_are_kept_and_the_classifier_in_the_stem_is_left_out():
    weights = {**Architecture(depth=50).build().state_dict(), "stem.fc.bias": torch.zeros(1)}
    found = translate(weights)
    assert (found.naming.kind, found.problem()) == ("Detectron2", "")
    assert found.left_out == ("stem.fc.bias",)


def test_group_norms_have_no_statistics():
    with torch.device("meta"):
        model = torchvision.models.resnet50(norm_layer=lambda width: nn.GroupNorm(32, width))
    found = translate(model.state_dict())
    assert (found.architecture.norm, found.problem()) == ("GN", "")


# ---- Caffe2 ----------------------------------------------------------------------------------
def test_caffe2_blobs_become_what_detectron2_loads(tmp_path):
    path = dump(tmp_path / "r.pkl", {"blobs": blobs(50)})
    found = convert(path, tmp_path / "out.safetensors")
    assert (found.naming.kind, found.left_out) == ("Caffe2", ("fc1000_w",))
    ours, theirs = (
        build_resnet_backbone(found.architecture.config(), ShapeSpec(channels=3)) for _ in "ab"
    )
    load_initial_weights(ours, str(tmp_path / "out.safetensors"))
    tensors = {name: torch.from_numpy(value) for name, value in blobs(50).items()}
    theirs.load_state_dict(align_names(theirs.state_dict(), tensors, caffe2=True), strict=False)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_a_bias_in_front_of_a_norm_is_folded_into_it(tmp_path):
    bias = np.random.default_rng(1).normal(size=64).astype(np.float32)
    found = translate({**blobs(), "conv1_b": bias})
    assert (found.folded, found.problem()) == (("stem.conv1.bias",), "")
    resnet = build_resnet_backbone(found.architecture.config(), ShapeSpec(channels=3)).eval()
    resnet.load_state_dict(found.usable())
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    norm = resnet.stem.conv1.norm
    with torch.no_grad():
        x = nn.functional.conv2d(image, resnet.stem.conv1.weight, torch.from_numpy(bias), 2, 3)
        scale, shift = norm.weight[:, None, None], norm.bias[:, None, None]
        expected = (x * scale + shift).relu()
        # Detectron2 computes with a variance of 1 + eps
        torch.testing.assert_close(resnet.stem.conv1(image).relu(), expected, atol=2e-5, rtol=1e-4)


def test_group_norms_of_caffe2_get_no_statistics():
    named = {name.replace("_bn_", "_gn_"): value for name, value in blobs(50).items()}
    found = translate({n.replace("res_conv1_gn", "conv1_gn"): v for n, v in named.items()})
    assert (found.architecture.norm, found.problem()) == ("GN", "")


# ---- what does not fit -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50s", "DEEP STEM"),
        ("resnet50d", "DEEP STEM"),
        ("seresnet50", "parts that Detectron2's ResNet lacks (layer1.0.se.fc1.weight"),
        ("resnet26", "got stages of (2, 2, 2, 2) bottleneck blocks"),
        ("vit_tiny_patch16_224", "expected a ResNet or ResNeXt, with a tensor layer1.0"),
    ],
)
def test_other_networks_are_refused_by_what_differs(name, message):
    def reason() -> str:
        return translate(meta(name, timm.create_model)).problem()

    assert message in (refusal(reason) if "expected" in message or "got" in message else reason())


def test_deep_stems_of_detectron2_are_recognised_by_their_kernels():
    weights = Architecture(depth=50).build().state_dict()
    weights["stem.conv1.weight"] = torch.zeros(32, 3, 3, 3, device="meta")
    assert "DEEP STEM" in translate(weights).problem()


def test_pooled_shortcuts_are_recognised_under_a_plain_stem():
    weights = meta("resnet50d", timm.create_model)
    plain = {name: v for name, v in weights.items() if not name.startswith(("conv1.", "bn1."))}
    plain |= {n: v for n, v in meta("resnet50").items() if n.startswith(("conv1.", "bn1."))}
    assert "average pooling in its shortcuts (ResNet-D)" in translate(plain).problem()


def test_incomplete_weights_are_refused_with_a_table_and_nothing_is_written(resnet18, tmp_path):
    state = resnet18.state_dict()
    del state["layer3.1.conv2.weight"]
    state["layer4.0.conv1.weight"] = torch.zeros(7, 256, 3, 3)
    torch.save(state, tmp_path / "in.pth")
    message = refusal(convert, str(tmp_path / "in.pth"), tmp_path / "new" / "out.safetensors")
    assert "1 tensors are missing and 1 have another shape" in message
    assert "wrong shape: res5.0.conv1.weight is (7, 256, 3, 3) in the file" in message
    assert "missing: res4.1.conv2.weight" in message
    assert not (tmp_path / "new").exists()


class Runs:
    """Unpickling it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("command", [["convert", "out.safetensors"], ["inspect"]])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, capsys, command):
    trace = tmp_path / "trace"
    path = dump(tmp_path / "in.pkl", {"model": Runs(f"touch {trace}")})
    assert main([command[0], path, *(str(tmp_path / name) for name in command[1:])]) == 2
    assert "could run code" in capsys.readouterr().err
    assert not trace.exists()


# ---- command line ----------------------------------------------------------------------------
def test_command_reports_what_it_did(file18, tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    assert main(["convert", file18, str(target), "--arch", "resnet18"]) == 0
    out = capsys.readouterr().out
    assert "torchvision names: resnet18 (MODEL.RESNETS.DEPTH 18, NUM_GROUPS 1" in out
    assert "left out: fc.weight, fc.bias" in out
    assert f"wrote {target}: 100 tensors" in out
    assert f"set MODEL.WEIGHTS {target} and" in out
    assert "STRIDE_IN_1X1 False" in out
    assert RECIPE in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out.pth"], "OUT must end in .safetensors, got"),
        (["out.safetensors", "--arch", "resnet50"], "holds a resnet18, expected resnet50"),
    ],
)
def test_wrong_arguments_are_one_line(file18, tmp_path, capsys, arguments, message):
    target, *options = arguments
    assert main(["convert", file18, str(tmp_path / target), *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / target).exists()


def test_absent_files_are_one_line(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "none.pth")]) == 2
    assert "do not exist; mend the path" in capsys.readouterr().err


def test_inspect_describes_resnets_and_other_files(file18, capsys):
    assert main(["inspect", file18]) == 0
    out = capsys.readouterr().out
    assert "122 tensors (102 float32, 20 int64)" in out
    assert out.endswith("convertible\n")
    assert "not convertible" not in out
    other = describe({"head.weight": torch.zeros(2, 3), "head.bias": torch.zeros(2)})
    assert other.startswith("2 tensors (2 float32), 8 numbers\n  head: 2 tensors\nnot convertible")
    assert "not convertible: it has a DEEP STEM" in describe(meta("resnet50d", timm.create_model))
