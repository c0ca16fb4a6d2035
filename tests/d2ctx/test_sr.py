"""Squeeze Reasoning in the ResNet from YAML: keys, the untouched start, training, errors."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_resnet_backbone
from torch import nn

from ctxops.sr import SqueezeReasoning
from d2ctx import UserError
from d2ctx.context_resnet import ContextResNet
from d2ctx.sr import build_sr, sr_keywords
from d2ctx.weights import load_initial_weights
from tests.d2ctx import tiny
from tests.d2ctx.context_parts import PLAIN, config, detections, losses, mixed_sizes, model, step

FPN = ("MODEL.BACKBONE.NAME", "build_sr_resnet_fpn_backbone", "MODEL.CONTEXT_BLOCK.KIND", "none")
SR = "MODEL.SR."
# Another value for every key.
CHANGED = {
    "REDUCTION": 4,
    "NODES": 8,
    "SQUEEZE": "gap",
    "POOL": "sum",
    "REASON": "sa",
    "ADJ": "released",
    "WR": "full",
    "NORM": "GN",
    "NODE_NORM": "BN",
    "SA_SOFTMAX": False,
    "ZERO_INIT": False,
}


def plain(*opts):
    return model(PLAIN, "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", *opts)


def with_sr(*opts):
    return model(PLAIN, *FPN, *opts)


def filled(built, source):
    """`built` with the weights of `source`; what is missing must be the context's."""
    missing, unexpected = built.load_state_dict(source.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("backbone.bottom_up.context.") for name in missing)
    return built


def context(built) -> dict[str, nn.Parameter]:
    return dict(built.backbone.bottom_up.context.named_parameters())


# ---- from YAML -------------------------------------------------------------------------------
@pytest.mark.parametrize("key", CHANGED)
def test_every_key_reaches_the_module(key):
    keywords = sr_keywords(config(PLAIN, SR + key, CHANGED[key]))
    assert keywords[key.lower()] == CHANGED[key]


def test_every_key_is_tested_and_has_a_keyword():
    node = config(PLAIN).MODEL.SR
    assert set(CHANGED) == set(node) - {"STAGES", "BLOCKS"}
    assert not [key for key in CHANGED if CHANGED[key] == node[key]]
    assert isinstance(build_sr(config(PLAIN), 256), SqueezeReasoning)


@pytest.mark.parametrize("name", ["build_sr_resnet_backbone", "build_sr_resnet_fpn_backbone"])
@pytest.mark.parametrize("kind", ["none", "sr"])
def test_builders_of_the_name_always_have_it(name, kind):
    cfg = config(PLAIN, "MODEL.BACKBONE.NAME", name, "MODEL.CONTEXT_BLOCK.KIND", kind)
    built = build_backbone(cfg)
    net = built if name == "build_sr_resnet_backbone" else built.bottom_up
    assert list(net.context) == ["res5_0", "res5_1", "res5_2"]
    assert cfg.MODEL.CONTEXT_BLOCK.KIND == kind


@pytest.mark.parametrize(("blocks", "names"), [("last", ["res4_5"]), ("before_last", ["res4_4"])])
def test_stages_and_blocks(blocks, names):
    built = build_backbone(config(PLAIN, SR + "STAGES", ["res4"], SR + "BLOCKS", blocks))
    assert list(built.bottom_up.context) == names


def test_direct_construction_equals_yaml():
    cfg = config(PLAIN)
    torch.manual_seed(0)
    from_yaml = build_backbone(cfg).bottom_up.eval()
    contexts = {
        f"res5_{i}": SqueezeReasoning(in_channels=256, norm="BN", node_norm="LN", zero_init=True)
        for i in range(3)
    }
    resnet = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    direct = ContextResNet(resnet=resnet, contexts=contexts).eval()
    for parameter in from_yaml.context.parameters():
        nn.init.normal_(parameter, std=0.1)
    direct.load_state_dict(from_yaml.state_dict())
    image = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(direct(image), from_yaml(image))
    assert not torch.equal(direct(image)["res5"], resnet.eval()(image)["res5"])


def test_names_of_the_weights():
    module = [f"squeeze_{p}.weight" for p in "bc"] + ["project.weight", "expand.weight"]
    names = [name for name in context(with_sr()) if name.startswith("res5_1.")]
    reason = [f"reason.{part}" for part in (
        "adjacency.weight", "adjacency_norm.weight", "adjacency_norm.bias", "transform.weight",
        "transform_norm.weight", "transform_norm.bias")]  # fmt: skip
    norm = ["norm.weight", "norm.bias"]
    assert names == [f"res5_1.{name}" for name in (*module, *reason, *norm)]


# ---- the start -------------------------------------------------------------------------------
def test_before_training_the_detector_is_the_plain_one():
    reference = plain()
    built = filled(with_sr(), reference)
    assert losses(built) == losses(reference)
    (ours,), (theirs,) = (detections(m, tiny.batch(num_images=1)) for m in (built, reference))
    assert len(theirs["instances"]) > 0
    for name, value in theirs["instances"].get_fields().items():
        mine = ours["instances"].get(name)
        assert torch.equal(getattr(mine, "tensor", mine), getattr(value, "tensor", value))


def test_without_zero_init_it_is_another_detector():
    reference = plain()
    built = filled(with_sr(SR + "ZERO_INIT", False), reference)
    assert losses(built) != losses(reference)


def test_only_the_last_norm_learns_in_the_first_step_and_all_in_the_second():
    built = with_sr("MODEL.BACKBONE.FREEZE_AT", 2)
    optimizer = torch.optim.SGD(context(built).values(), lr=0.1)

    def moved() -> set[str]:
        built.zero_grad()
        step(built)
        optimizer.step()
        return {name for name, p in context(built).items() if p.grad.abs().max() > 0}

    last = {f"res5_{i}.norm.{kind}" for i in range(3) for kind in ("weight", "bias")}
    assert moved() == last
    assert moved() == set(context(built))


# ---- training --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "opts",
    [
        (SR + "SQUEEZE", "gap"),
        (SR + "REASON", "sa"),
        (SR + "REASON", "fc"),
        (SR + "REASON", "none"),
        (SR + "WR", "full", SR + "NORM", "GN"),
        (SR + "REDUCTION", 16),
        (SR + "NODE_NORM", "BN"),
    ],
    ids=lambda opts: "_".join(str(o).removeprefix(SR).lower() for o in opts),
)
def test_variants_train_on_one_image(opts):
    built = with_sr(SR + "BLOCKS", "last", SR + "ZERO_INIT", False, *opts)
    found = step(built, tiny.batch(num_images=1))
    assert all(loss.isfinite() for loss in found.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in context(built).values())


def test_images_of_different_odd_sizes():
    built = with_sr(SR + "ZERO_INIT", False)
    assert all(loss.isfinite() for loss in step(built, mixed_sizes()).values())
    for given, found in zip(mixed_sizes(), detections(built, mixed_sizes()), strict=True):
        assert found["instances"].image_size == given["image"].shape[1:]


def test_an_image_does_not_depend_on_its_neighbours():
    # In float64: a random ResNet, nowhere normalised in evaluation mode, magnifies rounding.
    built = with_sr(SR + "ZERO_INIT", False).backbone.eval().double()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    both = built(images)
    alone = [built(image[None]) for image in images]
    for name, maps in both.items():
        torch.testing.assert_close(maps, torch.cat([m[name] for m in alone]))


# ---- errors ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ((SR + "NODES", 12), "MODEL.SR: nodes and reduced channels: .* got 12 and 128; use"),
        ((SR + "REDUCTION", 3), "MODEL.SR: reduction and in_channels: .* got 3 and 256; use"),
        ((SR + "REASON", "gnn"), "MODEL.SR: reason: expected one of .* got 'gnn'"),
        ((SR + "NORM", "GN", SR + "REDUCTION", 16),
         "MODEL.SR: norm: .*normalise the reasoned factor away"),
        ((SR + "POOL", "sum", SR + "SQUEEZE", "gap"), "MODEL.SR: pool: expected 'mean'"),
        ((SR + "STAGES", ["layer4"]), "MODEL.SR: stage: expected one of 'res2', .* got 'layer4'"),
        ((SR + "BLOCKS", "first"), "MODEL.SR: blocks: expected one of 'all'"),
        ((SR + "STAGES", []), "MODEL.SR.STAGES is empty"),
    ],
)  # fmt: skip
def test_values_that_no_module_can_have_are_the_users_to_mend(opts, message):
    with pytest.raises(UserError, match=message):
        build_backbone(config(PLAIN, *opts))


def test_two_kinds_of_context_are_one_too_many():
    cfg = config(PLAIN, *FPN, "MODEL.CONTEXT_BLOCK.KIND", "gc")
    with pytest.raises(UserError, match="KIND is gc, but .* has Squeeze Reasoning; set"):
        build_backbone(cfg)


# ---- weights ---------------------------------------------------------------------------------
def test_weights_of_a_plain_resnet_fit(tmp_path):
    net = build_resnet_backbone(config(PLAIN), ShapeSpec(channels=3))
    torch.save(net.state_dict(), tmp_path / "resnet.pth")
    built = with_sr()
    report = load_initial_weights(built, str(tmp_path / "resnet.pth"))
    assert report.file_fraction == 1
    loaded = built.backbone.bottom_up.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in net.state_dict().items())
