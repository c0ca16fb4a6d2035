"""Parameter counts, complexity and state-dict keys of the full-size necks, on the meta device."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ctxops import build_a2fpn, build_a2fpn_lite
from tests.ctxops.necks import FPN, PAFPN, RESNET50, pyramid

KEYS = Path(__file__).with_name("a2fpn_state_dict.txt")


def full(**options):
    with torch.device("meta"):
        return build_a2fpn(in_channels=RESNET50, **options)


def lite():
    with torch.device("meta"):
        return build_a2fpn_lite(in_channels=RESNET50)


def count(*modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.mark.parametrize(
    ("neck", "expected"),
    [
        (full(), 16_661_500),
        (lite(), 7_997_757),
        (full(**FPN), 3_344_384),
        (full(**PAFPN), 6_884_864),
    ],
    ids=["full", "lite", "fpn", "pafpn"],
)
def test_totals(neck, expected):
    assert count(neck) == expected


def blocks(neck):
    """Every block of the neck by name."""
    mgc = neck.lateral
    part = {
        name: [module for key, module in mgc.named_modules() if key.endswith(f".{name}")]
        for name in ("psi", "phi", "theta", "xi", "out")
    }
    return {
        "extra_level": [] if neck.extra_level is None else [neck.extra_level],
        **part,
        "reason": [mgc.reason],
        "one_graph": [mgc.reason["all"]],
        "one_top_down": [neck.top_down["p2"]],
        "top_down": [neck.top_down],
        "one_bottom_up": [neck.bottom_up["p3"]],
        "bottom_up": [neck.bottom_up],
        "output_td": [neck.output_td],
        "output_bu": [neck.output_bu],
    }


@pytest.mark.parametrize(
    ("neck", "expected"),
    [
        (
            full(),
            {
                "extra_level": 4_718_848,
                "psi": 426_624,
                "phi": 984_064,
                "theta": 984_064,
                "xi": 984_064,
                "out": 263_168,
                "reason": 493_440,
                "one_graph": 98_688,
                "one_top_down": 259_941,
                "top_down": 1_039_764,
                "one_bottom_up": 216_666,
                "bottom_up": 866_664,
                "output_td": 2_950_400,
                "output_bu": 2_950_400,
            },
        ),
        (
            lite(),
            {
                "extra_level": 0,
                "psi": 213_312,
                "phi": 492_032,
                "theta": 492_032,
                "xi": 984_064,
                "out": 132_096,
                "reason": 123_840,
                "one_graph": 24_768,
                "one_top_down": 259_941,
                "top_down": 779_823,
                "one_bottom_up": 216_666,
                "bottom_up": 649_998,
                "output_td": 2_360_320,
                "output_bu": 1_770_240,
            },
        ),
    ],
    ids=["full", "lite"],
)
def test_blocks(neck, expected):
    assert {name: count(*modules) for name, modules in blocks(neck).items()} == expected


def test_parts_of_blocks():
    neck = full()
    psi = [count(collect.psi) for collect in neck.lateral.collect.values()]
    assert psi == [65_792, 98_496, 131_200, 131_136]
    fusion = neck.top_down["p4"]
    predictor, attention = fusion.resample.predictor, fusion.attention
    layers = [predictor.reduce, predictor.blend, predictor.predict]
    layers += [attention.mask, attention.squeeze, attention.norm, attention.excite]
    assert [count(layer) for layer in layers] == [32_832, 36_928, 57_700, 513, 65_664, 256, 66_048]
    assert count(neck.bottom_up["p4"].resample.predictor.predict) == 14_425


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gcn": False}, 16_661_500 - 493_440),
        ({"out_conv_p2": False}, 16_661_500 - 590_080),
        ({"extra_level": "maxpool"}, 16_661_500 - 4_718_848 - 259_941 - 216_666 - 2 * 590_080),
        ({"bottom_up": "none"}, 16_661_500 - 866_664 - 2_950_400),
        ({"top_down": "carafe"}, 16_661_500 - 4 * (259_941 - 16_448 - 57_700)),
        ({"bottom_up": "cap"}, 16_661_500 - 4 * (216_666 - 16_448 - 14_425)),
    ],
)
def test_switches_cost_what_they_should(options, expected):
    assert count(full(**options)) == expected


@pytest.mark.parametrize(
    ("neck", "expected"),
    [(full(), 152.47), (lite(), 97.00), (full(**FPN), 60.36)],
    ids=["full", "lite", "fpn"],
)
def test_complexity_of_the_modules(neck, expected):
    """Giga multiply-adds at 1280x832, convention of the paper's Table 6: modules only."""
    total = 0

    def add(module, _, out):
        nonlocal total
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            per_output = module.weight[0].numel() + 1
            total += out.numel() * per_output
        elif isinstance(module, nn.Linear):
            total += module.weight.numel()
        elif isinstance(module, nn.ReLU):
            total += out.numel()

    for module in neck.modules():
        module.register_forward_hook(add)
    neck(pyramid((208, 320), channels=RESNET50, device="meta"))
    assert total / 1e9 == pytest.approx(expected, abs=0.006)


def test_state_dict_keys():
    """Checkpoints outlive code: a change here is a change of format."""
    lines = [f"{key} {list(value.shape)}\n" for key, value in full().state_dict().items()]
    assert "".join(lines) == KEYS.read_text()


def test_keys_name_levels_not_positions():
    for options in ({}, FPN, PAFPN, {"top_down": "carafe", "bottom_up": "cap"}):
        parts = [part for key in full(**options).state_dict() for part in key.split(".")]
        assert not any(part.isdigit() for part in parts)
