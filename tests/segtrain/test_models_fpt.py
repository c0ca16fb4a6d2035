"""The head of FPT: the paper's numbers, every switch, gradients, what it refuses."""

import pytest
import torch
from torch import nn

from ctxops.drop import DropBlock
from ctxops.grounding import GroundingTransformer, LocalGroundingTransformer, SelfTransformer
from ctxops.rendering import RenderingTransformer
from segtrain.config.schema import LossConfig, NetworkConfig
from segtrain.criterion import build_criterion, count_pixels
from segtrain.errors import UserError
from segtrain.models import build_model
from segtrain.models.heads import build_head
from segtrain.models.maps import MapInfo
from tests.segtrain.data_samples import needs_data
from tests.segtrain.network_runs import check_commands
from tests.segtrain.overfit import NUM_CLASSES, camvid_images, learned, synthetic_images
from tests.segtrain.toy_network import RESNET, network, section

BASE_HEAD = {"name": "fpt", "channels": 16, "width": 16}
# Switches -> parameters of the block, levels 256 wide (the specification's table).
BLOCKS = {
    (True, "lgt", True): 25_062_400,
    (True, "none", False): 5_776_384,
    (False, "lgt", False): 7_482_368,
    (False, "none", True): 16_526_336,
    (True, "lgt", False): 10_897_408,
    (True, "none", True): 19_941_376,
    (False, "lgt", True): 21_647_360,
    (False, "gt", False): 7_486_976,
}


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def head_of(**fields):
    """A head on a map of ResNet-101, without numbers."""
    head = section(head={"name": "fpt", **fields}).head
    maps = {"c5": MapInfo(channels=2048, stride=8)}
    with torch.device("meta"):
        return build_head(head, maps, num_classes=19, image_size=(969, 969))


def tiny(*, num_classes: int = 5, **fields):
    return network(num_classes=num_classes, head=BASE_HEAD | fields, aux=None)


# ---- the paper's numbers -----------------------------------------------------------------------
@pytest.mark.parametrize(("switches", "count"), BLOCKS.items())
def test_parameters_of_the_block(switches, count):
    st, gt, rt = switches
    assert parameters(head_of(fpt={"st": st, "gt": gt, "rt": rt}).context) == count


@pytest.mark.parametrize(
    ("pyramid", "count"), [("ufp", 16_257_024), ("ppm", 2_099_200), ("aspp", 14_682_112)]
)
def test_parameters_of_the_pyramids(pyramid, count):
    assert parameters(head_of(pyramid=pyramid).pyramid) == count


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 86_184_275),
        ({"width": 512}, 88_548_947),
        ({"context": "none"}, 61_121_875),
        ({"context": "oc"}, 62_045_523),
    ],
)
def test_parameters_of_the_model(fields, count):
    backbone = {"name": "resnet", "depth": 101, "stem": "plain"}
    config = NetworkConfig.model_validate(
        {"name": "network", "backbone": backbone, "head": {"name": "fpt", **fields}}
    )
    with torch.device("meta"):
        model = build_model(config, 19, image_size=(969, 969))
    assert parameters(model.backbone) == 42_500_160
    assert parameters(model) == count


# ---- the paper's settings ----------------------------------------------------------------------
def test_defaults_are_those_of_the_paper():
    block = head_of().context
    assert [type(m) for m in block.st.values()] == [SelfTransformer] * 4
    assert [type(m) for m in block.gt.values()] == [LocalGroundingTransformer] * 6
    assert [type(m) for m in block.rt.values()] == [RenderingTransformer] * 6
    assert {m.window for m in block.gt.values()} == {5}
    assert {m.mixture.parts for m in block.st.values()} == {2}
    assert {(m.mixture.parts, m.similarity) for m in block.gt.values()} == {(4, "euclidean")}
    assert {(m.block_size, m.drop_prob) for m in block.drop.values()} == {(3, 0.1)}
    assert {m.stride for m in block.modules() if isinstance(m, nn.Conv2d)} == {(1, 1)}


def test_options_reach_the_block():
    block = tiny(
        fpt={
            **{"gt": "gt", "pairs": "adjacent", "st_parts": 4, "gt_parts": 2, "scale": 0.5},
            **{"st_similarity": "euclidean", "gt_similarity": "dot", "inner_channels": 8},
            **{"share_qk": True, "kv_pool": [2, 1, 1, 1], "attn_dropout": 0.1},
            **{"dropblock_size": 5, "dropblock_prob": 0.2, "dropblock_ramp": 7},
        }
    ).head.context
    assert [type(m) for m in block.gt.values()] == [GroundingTransformer] * 3
    assert [m.kv_pool for m in block.st.values()] == [2, 1, 1, 1]
    assert {(m.mixture.parts, m.similarity, m.scale) for m in block.st.values()} == {
        (4, "euclidean", 0.5)
    }
    assert {(m.mixture.parts, m.similarity) for m in block.gt.values()} == {(2, "dot")}
    drops = [m for m in block.modules() if isinstance(m, DropBlock)]
    assert {(m.block_size, m.drop_prob, m.ramp) for m in drops} == {(5, 0.2, 7)}


# ---- forms -------------------------------------------------------------------------------------
FORMS = [
    *({"fpt": {"st": st, "gt": gt, "rt": rt}} for st, gt, rt in BLOCKS),
    {"context": "none"},
    {"context": "oc"},
    {"pyramid": "ppm"},
    {"pyramid": "aspp", "context": "oc"},
]


@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_one_step_reaches_every_parameter(fields):
    torch.manual_seed(0)
    model = tiny(**fields).train()
    truth = {"label": torch.randint(5, (2, 45, 61))}
    outputs = model(torch.randn(2, 3, 45, 61))
    assert outputs["logits"].shape == (2, 5, 45, 61)
    terms = build_criterion(LossConfig())(outputs, truth, count_pixels([truth]))
    sum(terms.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("size", [(33, 47), (8, 8), (16, 80)])
def test_in_evaluation_images_are_independent_of_each_other(size):
    torch.manual_seed(0)
    model = tiny().eval()
    images = torch.randn(3, 3, *size)
    with torch.no_grad():
        together = model(images)["logits"]
        alone = torch.cat([model(image[None])["logits"] for image in images])
    assert together.shape == (3, 5, *size)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_a_single_image_trains():
    model = tiny().train()
    model(torch.randn(1, 3, 32, 32))["logits"].mean().backward()


def test_autocast():
    torch.manual_seed(0)
    model = tiny().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.randn(2, 3, 40, 32))["logits"]
    logits.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_levels_reach_the_fusion_in_order():
    """The classifier's input is the fusion of the context's levels, k = 1 first."""
    torch.manual_seed(0)
    head = tiny(context="none").eval().head
    seen = {}
    head.fuse.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    features = {head.feature: torch.randn(1, 32, 5, 7)}
    head(features, torch.empty(0))
    levels = head.pyramid(features[head.feature])
    assert list(head.pyramid.branches) == ["k1", "k7", "k15", "k31"]
    torch.testing.assert_close(seen["x"], torch.cat(levels, dim=1))


# ---- frozen backbone ---------------------------------------------------------------------------
def test_a_frozen_backbone_does_not_change():
    torch.manual_seed(0)
    model = network(head=BASE_HEAD, freeze_backbone=True).train()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    outputs = model(torch.randn(2, 3, 32, 32))
    (outputs["logits"].square().mean() + outputs["aux"][0].square().mean()).backward()
    optimizer.step()
    after = model.backbone.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert [n for n, p in model.named_parameters() if p.grad is None] == [
        n for n, _ in model.named_parameters() if n.startswith("backbone.")
    ]
    assert (model.training, model.head.training, model.backbone.training) == (True, True, False)


def test_a_backbone_is_not_frozen_unasked():
    model = network(head=BASE_HEAD).train()
    assert model.backbone.training
    assert all(p.requires_grad for p in model.parameters())


# ---- errors ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"fpt": {"local_size": 4}}, "local_size 4 must be odd; write local_size: 5"),
        ({"fpt": {"dropblock_size": 2}}, "dropblock_size 2 must be odd; write dropblock_size: 3"),
        ({"fpt": {"st_parts": 3}}, "fpt.st_parts 3 must divide channels 16"),
        ({"fpt": {"inner_channels": 6}}, "fpt.gt_parts 4 must divide fpt.inner_channels 6"),
        ({"context": "oc", "oc": {"reduction": 3}}, "oc.reduction 3 must divide channels 16"),
        (
            {"fpt": {"st": False, "gt": "none", "rt": False}},
            "context fpt without any transformer does nothing; write context: none",
        ),
    ],
)
def test_contradictions(fields, text):
    with pytest.raises(ValueError, match=text):
        section(head=BASE_HEAD | fields)


def test_a_backbone_without_maps_is_refused():
    with pytest.raises(UserError, match="^head fpt needs 1 maps, the backbone offers "):
        build_head(section(head=BASE_HEAD).head, {}, num_classes=3, image_size=(32, 32))


# ---- the real commands -------------------------------------------------------------------------
def test_commands(tmp_path, capsys):
    check_commands(tmp_path, section(head=BASE_HEAD).model_dump(mode="json"), capsys)


# ---- learning ----------------------------------------------------------------------------------
SMALL = RESNET | {"stem": "plain", "widths": [16, 16, 32, 64]}


def memoriser():
    torch.manual_seed(0)
    head = {"name": "fpt", "channels": 16, "width": 32, "dropout": 0.0}
    head["fpt"] = {"dropblock_prob": 0.0}
    return network(num_classes=NUM_CLASSES, backbone=SMALL, head=head, aux=None)


def test_learns_four_scenes_by_heart():
    assert learned(memoriser(), *synthetic_images(48, 64), steps=25, lr=1e-2) > 0.7


@needs_data
def test_learns_four_real_images_by_heart():
    assert learned(memoriser(), *camvid_images(48, 64), steps=25, lr=1e-2) > 0.7
