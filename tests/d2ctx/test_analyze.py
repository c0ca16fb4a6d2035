"""The published complexity figures of A²-FPN (Table 6), and the command that prints them."""

import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from d2ctx.analyze import analyze, main
from d2ctx.complexity import BOX_ROIS, MASK_ROIS, Cost, detector_costs
from d2ctx.config import load_config
from tests.d2ctx import tiny
from tests.d2ctx.toy_coco import restored_catalogs

# M parameters and G multiply-accumulates at 1280x832, as the paper rounds them
TABLE_6 = {
    "fpn": (44.18, 283.28),
    "pafpn": (47.72, 309.05),
    "a2fpn": (57.49, 375.39),
    "a2fpn_lite": (48.83, 319.91),
}
NECKS = {"fpn": 3_344_384, "pafpn": 6_884_864, "a2fpn": 16_661_500, "a2fpn_lite": 7_997_757}

RUNS = sorted(
    str(path.relative_to(tiny.CONFIGS))
    for path in tiny.CONFIGS.rglob("*.yaml")
    if "_base_" not in path.parts
)


@pytest.mark.parametrize("name", TABLE_6)
def test_table_6(name):
    costs = analyze(tiny.config(f"a2fpn/mask_rcnn_r50_{name}_1x.yaml"), width=1280, height=832)
    total = costs["total"]
    params, macs = TABLE_6[name]
    # the paper cuts 44.175 to 44.18 and 309.055 to 309.05: half a unit of its last digit
    assert total.module_params / 1e6 == pytest.approx(params, abs=0.0051)
    assert total.module_macs / 1e9 == pytest.approx(macs, abs=0.0051)
    assert costs["neck"].all_params == costs["neck"].module_params == NECKS[name]


def test_parts_add_up_and_attention_is_in_the_second_convention_only():
    costs = analyze(tiny.config("a2fpn/mask_rcnn_r50_a2fpn_1x.yaml"), width=1280, height=832)
    parts = [cost for name, cost in costs.items() if name != "total"]
    assert sum(parts, Cost()) == costs["total"]
    gap = costs["neck"].all_macs - costs["neck"].module_macs
    # distributor 29.0 G, collector 5.3 G, graph 0.1 to 0.2 G, reassembly 0.71 G, less the biases
    assert 34e9 < gap < 36e9


# ---- every configuration ---------------------------------------------------------------------
def load(name: str) -> CfgNode:
    """A run's configuration, without the data sets that it registers."""
    with restored_catalogs():
        return load_config(str(tiny.CONFIGS / name), ["MODEL.WEIGHTS", ""])


def settings(node: object, key: str = "") -> Iterator[tuple[str, str]]:
    """What stands in a file about the model and its bases, as key and value."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from settings(value, f"{key}.{name}")
    elif key.startswith(".MODEL"):
        yield key, str(node)
    elif key == "._BASE_":
        bases = node if isinstance(node, list) else [node]
        yield from ((key, Path(base).name) for base in bases if "_base_" in base)


def new_settings() -> list[str]:
    """Runs whose file sets something about the model that no file in front of it does."""
    seen: set[tuple[str, str]] = set()
    chosen = []
    for name in RUNS:
        values = set(settings(yaml.load((tiny.CONFIGS / name).read_text(), yaml.CSafeLoader)))
        if values - seen:
            chosen.append(name)
        seen |= values
    return chosen


def check_parts(name: str) -> None:
    cfg = load(name)
    costs = analyze(cfg, width=64, height=64)
    parts = {part: cost for part, cost in costs.items() if part != "total"}
    assert sum(parts.values(), Cost()) == costs["total"]
    assert all(cost.all_macs > 0 < cost.all_params for cost in parts.values())
    semantic = cfg.MODEL.META_ARCHITECTURE in ("ContextHTC", "ContextPanopticFPN")
    optional = {"semantic": semantic, "mask head": cfg.MODEL.MASK_ON}
    expected = {"backbone", "neck", "rpn", "box head"} | {k for k, has in optional.items() if has}
    assert set(parts) == expected


@pytest.mark.parametrize("name", new_settings())
def test_every_setting_can_be_counted(name):
    check_parts(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_run_can_be_counted(name):
    check_parts(name)


def counted(name: str, *opts: object, height: int = 800, width: int = 1000) -> dict[str, Cost]:
    """Costs of an image that is not padded."""
    cfg: CfgNode = tiny.config(name, "MODEL.DEVICE", "meta", "MODEL.FPT.IMPL", "naive", *opts)
    with torch.device("meta"):
        model = build_model(cfg)
    return detector_costs(model, height=height, width=width)


# ---- FPT -------------------------------------------------------------------------------------
C = 256
POSITIONS = (50_000, 12_500, 3_150, 800)  # p2 to p5 at 800x1000
FPT = "fpt/mask_rcnn_r50_fpt_1x.yaml"


def fpt_convolutions() -> int:
    """Laterals and all convolutions of the block with all pairs, by its definition."""
    total = sum(c * C * n for c, n in zip((256, 512, 1024, 2048), POSITIONS, strict=True))
    total += sum(4 * C * C * n for n in POSITIONS)  # ST: query, key, value, output
    total += sum(9 * 5 * C * C * n for n in POSITIONS)  # fusion of five maps
    for fine, coarse in combinations(range(4), 2):
        total += 2 * C * C * (POSITIONS[fine] + POSITIONS[coarse])  # GT: query, output; key, value
        links = POSITIONS[fine + 1 : coarse + 1]  # RT: stride-2 chain, and two more
        total += 9 * C * C * (sum(links) + 2 * POSITIONS[coarse])
    return total


def fpt_attention(keys: tuple[int, ...] = POSITIONS) -> int:
    """One product with the keys and one with the values for every pair of positions."""
    own = sum(2 * C * n * k for n, k in zip(POSITIONS, keys, strict=True))
    return own + sum(2 * C * f * c for f, c in combinations(POSITIONS, 2))


def mixture_products() -> int:
    """W kbar of four ST with two parts and six GT with four."""
    return 4 * 2 * C + 6 * 4 * C


def test_fpt_counts_what_its_definition_says():
    assert (
        counted(FPT)["neck"].all_macs == fpt_convolutions() + fpt_attention() + mixture_products()
    )
    # the specification's rounded figures
    assert fpt_convolutions() / 1e9 == pytest.approx(295.5 + 6.15, abs=0.1)
    assert fpt_attention() / 1e9 == pytest.approx(1365 + 448, abs=1)


def test_pooled_keys_and_values_are_counted_at_their_size():
    keys = (100 * 125, 50 * 63, 3_150, 800)  # of p2 and p3 a quarter, rounded up
    pooled = counted(FPT, "MODEL.FPT.KV_POOL", [2, 2, 1, 1])["neck"].all_macs
    projections = 2 * C * C * (sum(POSITIONS) - sum(keys))
    convolutions = fpt_convolutions() - projections
    assert pooled == convolutions + fpt_attention(keys) + mixture_products()


def test_the_form_of_the_attention_does_not_change_the_count():
    name = "fpt/mask_rcnn_fpt_instant.yaml"
    plain = counted(name, height=64, width=64)["neck"]
    for form in ("auto", "sdpa", "naive"):
        assert (
            analyze(tiny.config(name, "MODEL.FPT.IMPL", form), width=64, height=64)["neck"] == plain
        )


def test_counting_a_model_again_gives_the_same():
    model = build_model(tiny.config())
    assert detector_costs(model, height=64, width=64) == detector_costs(model, height=64, width=64)
    assert model.backbone(torch.zeros(1, 3, 128, 64, device="meta"))["p2"].shape[-2:] == (32, 16)


# ---- other context and other systems ---------------------------------------------------------
def test_non_local_blocks_count_their_attention():
    plain, nl = (
        counted(f"sr/mask_rcnn_r50_fpn{kind}_1x.yaml", height=128, width=192)
        for kind in ("", "_nl")
    )
    cfg = tiny.config("sr/mask_rcnn_r50_fpn_nl_1x.yaml").MODEL.CONTEXT_BLOCK
    positions, channels = {"res4": (8 * 12, 1024), "res5": (4 * 6, 2048)}, 0
    blocks = {"res4": 6, "res5": 3}
    for stage in cfg.STAGES:
        n, c = positions[stage]
        width = c // cfg.REDUCTION
        count = blocks[stage] if cfg.BLOCKS == "all" else 1
        channels += count * (4 * n * c * width + 2 * n * n * width)
    assert nl["backbone"].all_macs - plain["backbone"].all_macs == channels


def test_squeeze_reasoning_is_counted_in_the_backbone_alone():
    plain, sr = (
        counted(f"sr/mask_rcnn_r50_fpn{k}_1x.yaml", height=128, width=192) for k in ("", "_sr")
    )
    same = [part for part in plain if plain[part] == sr[part]]
    assert set(plain) - set(same) == {"backbone"}
    gap = sr["backbone"].all_macs - plain["backbone"].all_macs
    n, c, p, nodes = 4 * 6, 2048, 1024, 16
    d = p // nodes
    # two squeezing and one projecting convolution, the grouped expansion, the graph
    assert gap == 3 * (3 * c * p * n + c * n + nodes * nodes * d + d * d * nodes)


def test_a_cascade_counts_three_stages_and_hybrid_tasks_their_flow():
    size = {"height": 128, "width": 192}
    cascade = counted("a2fpn/cascade_mask_rcnn_r50_fpn_1x.yaml", **size)
    htc = counted("a2fpn/htc_r50_fpn_20e.yaml", **size)
    single = counted("a2fpn/mask_rcnn_r50_fpn_1x.yaml", **size)
    class_specific = BOX_ROIS * 1024 * 4 * (80 - 1)
    per_stage = single["box head"].all_macs - class_specific
    assert cascade["box head"].all_macs == 3 * per_stage
    assert cascade["mask head"].all_macs == 3 * single["mask head"].all_macs
    assert htc["box head"] == cascade["box head"]
    flow = 2 * MASK_ROIS * 14 * 14 * 256 * 256
    assert htc["mask head"].all_macs == cascade["mask head"].all_macs + flow
    common = 16 * 24  # p3
    convs = (5 * 256 * 256 + 4 * 9 * 256 * 256 + 256 * 183 + 256 * 256) * common
    assert htc["semantic"].all_macs == convs
    off = counted("a2fpn/htc_r50_fpn_20e.yaml", "MODEL.HTC.SEMANTIC.ENABLED", False, **size)
    assert "semantic" not in off


def test_panoptic_fpn_counts_its_semantic_head():
    size = {"height": 128, "width": 192}
    panoptic = counted("panoptic/panoptic_fpn_r50_fpn_1x.yaml", **size)
    quarter = 32 * 48
    # p2 one convolution at 1/4; p3 one at 1/8; p4 two, at 1/16 and 1/8; p5 three, up to 1/8
    first, inner = 9 * 256 * 128, 9 * 128 * 128
    p3, p4, p5 = quarter // 4, quarter // 16, quarter // 64
    convs = first * (quarter + p3 + p4 + p5) + inner * (p3 + p4 + p4 + p3 - p4)
    classes = tiny.config("panoptic/panoptic_fpn_r50_fpn_1x.yaml").MODEL.SEM_SEG_HEAD.NUM_CLASSES
    assert panoptic["semantic"].all_macs == convs + 128 * classes * quarter


# ---- sizes and the command -------------------------------------------------------------------
def test_a_width_that_the_backbone_does_not_divide_is_padded():
    cfg = tiny.config("a2fpn/mask_rcnn_a2fpn_instant.yaml")
    assert analyze(cfg, width=100, height=65) == analyze(cfg, width=128, height=128)


def test_command_prints_exact_counts_as_json(capsys):
    config = str(tiny.CONFIGS / "a2fpn/mask_rcnn_a2fpn_instant.yaml")
    assert main(["--config-file", config, "--json", "--size", "128x128"]) == 0
    assert set(json.loads(capsys.readouterr().out)) >= {"backbone", "neck", "total"}


@pytest.mark.parametrize("size", ["1280", "0x832", "axb"])
def test_a_size_that_is_none_is_one_clear_line(size, capsys):
    config = str(tiny.CONFIGS / "a2fpn/mask_rcnn_a2fpn_instant.yaml")
    assert main(["--config-file", config, "--size", size]) == 2
    assert "WIDTHxHEIGHT" in capsys.readouterr().err


def test_models_without_region_heads_are_refused(capsys):
    config = str(tiny.CONFIGS / "a2fpn/mask_rcnn_a2fpn_instant.yaml")
    opts = ["MODEL.META_ARCHITECTURE", "ContextProposalNetwork"]
    assert main(["--config-file", config, *opts]) == 2
    assert "two-stage" in capsys.readouterr().err
