"""UN-EPT's head and the transformer backbone: counts, stored numbers, behaviour, errors."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ctxops.tokens
from ctxops.boundary import refine_logits
from ctxops.resize import resize_bilinear
from ctxops.self_attention import FullAttention
from segtrain.analyze import analyze
from segtrain.config.schema import NetworkConfig, RunConfig
from segtrain.errors import UserError
from segtrain.models import build_model
from segtrain.models.backbones import build_backbone
from segtrain.weights.unept import from_released
from tests.segtrain.toy_network import RESNET, network
from tests.segtrain.toy_unept import (
    RELEASED,
    VIT,
    losses_of,
    patches,
    section,
    stirred,
    unept,
    with_boundaries,
)
from tests.shared_data import SHARED, needs_shared

GOLDENS = SHARED / "goldens" / "dev"
DEIT = {"name": "vit", "variant": "B", "distilled": True, "drop_path_rate": 0.0}
R50 = {"name": "resnet", "depth": 50, "stem": "deep32", "contract_dilation": True}
BACKBONES = {"resnet": RESNET, "vit": VIT, "distilled": VIT | {"distilled": True}}
ATTENTIONS = ("deformable", "full", "released")


def whole(backbone: dict, num_classes: int, side: int, **head) -> nn.Module:
    """The model of the paper, without numbers."""
    content = {"name": "network", "backbone": backbone, "head": {"name": "unept", **head}}
    config = NetworkConfig.model_validate(content)
    with torch.device("meta"):
        return build_model(config, num_classes, image_size=(side, side))


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---- the paper's sizes -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("backbone", "num_classes", "side", "paper", "released"),
    [
        (DEIT, 150, 480, 93_854_678, 94_842_326),
        (DEIT, 60, 480, 93_831_548, 94_819_196),
        (DEIT, 19, 768, 94_899_283, 97_324_627),
        (R50, 150, 480, 31_370_294, 32_357_942),
        (R50, 60, 480, 31_347_164, 32_334_812),
        (R50, 19, 768, 31_336_627, 33_761_971),
    ],
)
def test_parameters_of_both_presets(backbone, num_classes, side, paper, released):
    assert parameters(whole(backbone, num_classes, side)) == paper
    assert parameters(whole(backbone, num_classes, side, **RELEASED)) == released


@pytest.mark.parametrize("released", [False, True])
def test_parameters_of_the_parts(released):
    model = whole(DEIT, 150, 480, **(RELEASED if released else {}))
    head = model.head
    assert parameters(model.backbone) == 86_339_328
    assert parameters(whole(R50, 150, 480).backbone) == 23_527_264
    assert parameters(head.projections) == 590_592
    assert parameters(whole(R50, 150, 480).head.projections) == 918_272
    assert parameters(head.context) == (6_446_336 if released else 6_380_544)
    assert parameters(head.spatial) == 371_264
    heads = parameters(head.boundary) + parameters(head.direction)
    assert heads == (134_656 if released else 134_400)
    assert parameters(head.classifier) == 38_550
    assert (parameters(head.query_embed) if released else 921_600) == 921_600


def layer_macs(model: nn.Module, side: int) -> float:
    """Of all Linear and Conv2d modules but those within nn.MultiheadAttention's stand-ins."""
    apart = {id(m.out_proj) for m in model.modules() if isinstance(m, FullAttention)}
    total = 0

    def count(module, inputs, output):
        nonlocal total
        if id(module) not in apart:
            per_output = module.weight[0].numel()
            total += output.numel() * per_output

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(torch.empty(1, 3, side, side, device="meta"))
    return total / 1e9


@pytest.mark.parametrize(
    ("backbone", "released", "expected"),
    [(DEIT, True, 98.976), (DEIT, False, 100.627), (R50, True, 138.26), (R50, False, 139.91)],
)
def test_macs_of_linear_and_convolution_at_480(backbone, released, expected):
    head = RELEASED if released else {}
    # Refining computes the heads, which the released code evaluates without.
    model = whole(backbone, 150, 480, **head | {"refine_at_test": True})
    assert layer_macs(model, 480) == pytest.approx(expected, abs=6e-3)


def test_analysis_counts_every_part():
    model = section(backbone=VIT).model_dump()
    content = {
        "data": {"dataset": "camvid", "root": "r", "crop": [32, 48], "base_size": [48, 32]},
        **{"model": model, "loss": {"boundary": {}}, "optim": {"lr": 0.1}},
        "train": {"iters": 1, "global_batch": 1},
    }
    costs = analyze(RunConfig.model_validate(content), num_classes=5, size=(32, 48))
    assert costs["total"].parameters == parameters(unept(backbone=VIT))
    assert costs["head.classifier"].macs == 4 * 6 * 16 * 5
    assert costs["head.boundary"].macs == 4 * 6 * 16 * 17
    assert costs["head.context"].kept > 0


def test_names_of_the_state():
    head = {name.removeprefix("head.") for name in unept(**RELEASED).state_dict()}
    parts = {name.partition(".")[0] for name in head}
    assert parts == {"backbone", *"projections context spatial query_embed classifier".split()} | {
        *("boundary", "direction")
    }
    assert {name for name in head if name.startswith(("bound", "spatial.block3"))} == {
        *("boundary.0.conv.weight", "boundary.1.weight", "spatial.block3.conv.weight"),
        *(
            f"{part}.norm.{kind}"
            for part in ("boundary.0", "spatial.block3")
            for kind in "weight bias running_mean running_var num_batches_tracked".split()
        ),
    }


# ---- the backbone ----------------------------------------------------------------------------
def vit(**fields) -> nn.Module:
    return build_backbone(section(backbone=VIT | fields).backbone, image_size=(32, 48))


@pytest.mark.parametrize("distilled", [False, True])
def test_maps_are_tokens_behind_layers(distilled):
    model = vit(distilled=distilled).eval()
    maps = model(torch.randn(2, 3, 64, 32))
    assert list(maps) == list(model.maps) == ["b1", "b2", "b3"]
    assert {tuple(x.shape) for x in maps.values()} == {(2, 12, 4, 2)}
    assert {(m.channels, m.stride) for m in model.maps.values()} == {(12, 16)}


def test_maps_are_those_of_timm():
    import timm

    name = "deit_tiny_distilled_patch16_224"
    sizes = {"embed_dim": 12, "depth": 3, "num_heads": 3, "img_size": (32, 48)}
    theirs = timm.create_model(name, num_classes=0, **sizes).eval()
    ours = vit(distilled=True).eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("norm")}
    ours.load_state_dict(state)
    image = torch.randn(2, 3, 32, 48)
    expected = theirs.get_intermediate_layers(image, n=[0, 1, 2], reshape=True, norm=False)
    for found, wanted in zip(ours(image).values(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_pixels_belong_to_the_weights():
    named = {"pretrained": "vit_base_patch16_384.augreg_in21k_ft_in1k", "distilled": False}
    with torch.device("meta"):
        plain = build_backbone(section(backbone=DEIT | named).backbone, image_size=(32, 32))
    assert plain.normalisation == "vit"
    assert vit(distilled=True).normalisation == "imagenet"
    wrong = section(backbone=DEIT | named | {"distilled": True})
    with pytest.raises(UserError, match=r"model\.backbone\.pretrained vit_base.*distilled: false"):
        build_model(wrong, 3, image_size=(32, 32))


@pytest.mark.parametrize(
    ("blocks", "depth"), [([1, 2], 3), ([3, 1], 3), ([1, 1, 3], 3), ([1, 5], 3)]
)
def test_maps_end_at_the_last_layer(blocks, depth):
    with pytest.raises(ValueError, match=r"blocks must rise and end at the depth 3.*\[3\]"):
        section(backbone=VIT | {"blocks": blocks, "depth": depth})


def test_no_parameter_is_left_over():
    """A norm or a classifier behind the last map would get no gradient."""
    model = vit().train()
    sum(x.square().mean() for x in model(torch.randn(1, 3, 32, 48)).values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_tables_do_not_decay():
    model = unept(backbone=BACKBONES["distilled"], query_embedding="learned")
    assert model.no_weight_decay() == {
        *("backbone.cls_token", "backbone.dist_token", "backbone.pos_embed"),
        *("head.context.level_embed", "head.query_embed.weight"),
    }
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


# ---- stored numbers --------------------------------------------------------------------------
@needs_shared
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stored_model_under_its_released_names(dtype, monkeypatch):
    monkeypatch.setattr(ctxops.tokens, "MLP_RATIO", 2)
    backbone = {"name": "vit", "embed_dim": 36, "depth": 12, "num_heads": 3, "distilled": True}
    content = {
        "name": "network",
        "backbone": backbone,
        "head": {"name": "unept", "points": 4, "ffn_dim": 64, **RELEASED}
        | {"encoder_layers": 1, "decoder_layers": 1},
    }
    model = build_model(NetworkConfig.model_validate(content), 7, image_size=(96, 96))
    stored = load_file(GOLDENS / "unept_model.weights.safetensors")
    model.load_state_dict(from_released(stored))
    model = model.to(dtype).eval()
    tensors = load_file(GOLDENS / "unept_model.safetensors")
    tolerance = json.loads((GOLDENS / "unept_model.json").read_text())["tolerance"]
    seen = {}
    for name in ("boundary", "direction", "classifier"):
        model.head.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: seen.update({name: out})
        )
    image = tensors["input.image"].to(dtype)
    with torch.no_grad():
        seen["logits"] = model(image)["logits"]
        model.head.refine_at_test = True
        refined = model(image)["logits"]
    seen["logits_low"] = seen.pop("classifier")
    for name, value in seen.items():
        wide = dtype == torch.float64 and f"output_f64.{name}" in tensors
        expected = tensors[f"output_f64.{name}" if wide else f"output.{name}"]
        suffix = "float64" if wide else "float32"
        atol = tolerance[f"output.{name}"][f"suggested_atol_{suffix}"]
        torch.testing.assert_close(value.to(expected.dtype), expected, rtol=0, atol=atol)
    up = [resize_bilinear(seen[n], (96, 96), align_corners=True) for n in ("boundary", "direction")]
    assert torch.equal(refined, refine_logits(seen["logits"], *up, mask_rule="logit"))
    assert not torch.equal(refined, seen["logits"])


# ---- behaviour -------------------------------------------------------------------------------
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("size", [(32, 48), (33, 47), (96, 128), (8, 24), (1, 1)])
def test_any_size(backbone, size):
    model = unept(backbone=BACKBONES[backbone]).eval()
    image = torch.randn(1, 3, *size)
    found = model(image)
    assert list(found) == ["logits"]
    assert found["logits"].shape == (1, 5, *size)
    assert torch.equal(model(image)["logits"], found["logits"])


@pytest.mark.parametrize("size", [(32, 48), (37, 41)])
@pytest.mark.parametrize("classes", [1, 2])
def test_outputs_of_training_have_the_images_size(size, classes):
    model = unept(backbone=VIT, boundary_classes=classes).train()
    found = model(torch.randn(2, 3, *size))
    channels = {"logits": 5, "refined": 5, "boundary": classes, "direction": 8}
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        name: (2, width, *size) for name, width in channels.items()
    }


def test_pixels_beyond_the_patches_are_zeros_that_are_cut_off():
    model = unept(backbone=VIT).eval()
    image = torch.randn(1, 3, 37, 41)
    padded = torch.zeros(1, 3, 48, 48)
    padded[..., :37, :41] = image
    expected = model(padded)["logits"][..., :37, :41]
    assert torch.equal(model(image)["logits"], expected)


def test_predictions_are_the_refined_logits_or_not():
    model = stirred(unept()).eval()
    image = torch.randn(2, 3, 40, 56)
    head, seen = model.head, {}
    for name in ("boundary", "direction"):
        head.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: seen.update({name: out})
        )
    refined = model(image)["logits"]
    boundary, direction = (
        resize_bilinear(seen[name], (40, 56), align_corners=True)
        for name in ("boundary", "direction")
    )
    head.refine_at_test = False
    plain = model(image)["logits"]
    assert torch.equal(refined, refine_logits(plain, boundary, direction))
    moved = (refined != plain).any(dim=1)
    assert moved.any()
    assert not moved[boundary[:, 0] <= 0].any()


def test_options_of_the_refinement_reach_it():
    model = stirred(unept(mask_rule="logit", offset_scale=3))
    assert model.head.refinement == {"mask_rule": "logit", "offset_scale": 3}
    image = torch.randn(1, 3, 40, 56)
    twins = [stirred(unept(offset_scale=scale)).eval() for scale in (1, 3)]
    assert not torch.equal(twins[0](image)["logits"], twins[1](image)["logits"])


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("training", [False, True])
def test_images_of_a_batch_do_not_mix_in_the_context_branch(attention, training):
    branch = stirred(unept(self_attention=attention).head.context).train(training)
    maps, queries = [torch.randn(3, 16, 4, 5) for _ in range(3)], torch.randn(3, 16, 5, 7)
    together = branch(maps, queries)[:1]
    alone = branch([x[:1] for x in maps], queries[:1])
    if attention == "released" and training:  # as published
        assert (together - alone).abs().max() > 1e-3
    else:
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_predictions_do_not_depend_on_the_batch(attention):
    model = stirred(unept(self_attention=attention)).eval()
    images = torch.randn(3, 3, 32, 48)
    model.head.refine_at_test = False  # a logit of 0 +- rounding would move a pixel
    together, alone = model(images)["logits"][:1], model(images[:1])["logits"]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_a_learnt_table_is_added_and_resized():
    model = unept(query_embedding="learned", refine_at_test=False).eval()
    assert model.head.query_embed.grid == (4, 6)
    for size in ((32, 48), (64, 40)):
        image = torch.randn(1, 3, *size)
        before = model(image)["logits"]
        with torch.no_grad():
            model.head.query_embed.weight.add_(torch.randn(24, 16))
        assert not torch.allclose(model(image)["logits"], before)


def test_without_a_spatial_branch_queries_are_learnt_and_nothing_is_refined():
    model = unept(spatial_branch=False, query_embedding="learned", levels=1)
    assert list(model.train()(torch.randn(2, 3, 32, 48))) == ["logits"]
    assert model.eval()(torch.randn(2, 3, 33, 20))["logits"].shape == (2, 5, 33, 20)
    names = {name.split(".")[1] for name in model.state_dict() if name.startswith("head.")}
    assert names == {"projections", "context", "query_embed", "classifier"}
    assert len(model.head.projections) == 1


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_levels_are_the_deepest_maps(levels):
    model = unept(levels=levels)
    assert model.head.features == ("c3", "c4", "c5")[3 - levels :]


# ---- learning --------------------------------------------------------------------------------
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("options", [{}, RELEASED], ids=["paper", "released"])
def test_every_parameter_gets_a_gradient(backbone, options):
    torch.manual_seed(0)  # stochastic depth may drop a branch of both images
    model = stirred(unept(backbone=BACKBONES[backbone], **options)).train()
    labels = with_boundaries(patches(2, 32, 48))
    balance = options.get("boundary_classes") == 2
    terms = losses_of(model(torch.randn(2, 3, 32, 48)), labels, balance=balance)
    assert list(terms) == ["loss_seg", "loss_refined", "loss_boundary", "loss_direction"]
    assert all(term > 0 for term in terms.values())
    sum(terms.values()).backward()
    none = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert none == []


@pytest.mark.parametrize("backbone", BACKBONES)
def test_autocast(backbone):
    model = unept(backbone=BACKBONES[backbone]).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(torch.randn(2, 3, 32, 48))
        terms = losses_of(outputs, with_boundaries(patches(2, 32, 48)))
    sum(terms.values()).backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_batch_of_one_and_other_layouts_of_memory():
    model = unept().eval()
    image = torch.randn(1, 3, 32, 48)
    expected = model(image)["logits"]
    last = model(image.contiguous(memory_format=torch.channels_last))["logits"]
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)
    terms = losses_of(model.train()(image), with_boundaries(patches(1, 32, 48)))
    assert all(torch.isfinite(term) for term in terms.values())


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet", "vit"])
def test_compiles_as_one_graph(backbone):
    model = stirred(unept(backbone=BACKBONES[backbone], refine_at_test=False)).eval()
    # No graph break; the operations are compiled in their own tests.
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    image = torch.randn(2, 3, 32, 48)
    expected = model(image)["logits"]
    torch.testing.assert_close(compiled(image)["logits"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)  # two minutes on an idle core
@pytest.mark.parametrize("size", [(32, 48), (64, 40)])
def test_onnx_agrees_with_eager(tmp_path, size):
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = unept().eval()
    image = torch.randn(1, 3, *size)
    path = str(tmp_path / "unept.onnx")
    torch.onnx.export(model, (image,), path, dynamo=True, opset_version=20)
    session = runtime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    expected = model(image)["logits"]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)


# ---- errors ----------------------------------------------------------------------------------
def test_what_a_backbone_lacks_is_said():
    with pytest.raises(UserError, match=r"head unept needs 3 maps, the backbone offers b3 \(1/16"):
        unept(backbone=VIT | {"blocks": [3]})
    assert unept(backbone=VIT | {"blocks": [3]}, levels=1).head.features == ("b3",)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"channels": 18}, r"multiple of 4 and of num_heads 2; write channels: 64"),
        ({"num_heads": 3}, r"channels 16 must be a multiple of 4 and of num_heads 3"),
        ({"spatial_branch": False}, r"write query_embedding: learned"),
    ],
)
def test_contradictions_are_said(head, message):
    with pytest.raises(ValueError, match=message):
        section(**head)


def test_corners_are_the_heads_own():
    content = section().model_dump() | {"align_corners": True}
    with pytest.raises(ValueError, match="head unept resizes its logits itself"):
        NetworkConfig.model_validate(content)


def test_padding_reaches_the_auxiliary_head():
    """Any head on a transformer: what is trained on has the image's size."""
    outputs = network(backbone=VIT).train()(torch.randn(2, 3, 37, 41))
    assert outputs["logits"].shape == outputs["aux"][0].shape == (2, 5, 37, 41)
