"""What the benchmark of whole networks compares differs in what the names say."""

import time

import pytest
import torch
from torch import nn

from benchmarks import realtime
from benchmarks.cases.case import Case
from benchmarks.measure import Setting
from benchmarks.realtime import CASES, added_by_module, fastest, rates


@pytest.mark.parametrize("name", CASES)
def test_forms_take_the_same_image_to_the_same_logits(name):
    for make in CASES[name].forms.values():
        with torch.device("meta"):
            model = make()
            assert model(torch.empty(1, 3, 65, 97)).shape == (1, 19, 65, 97)
        assert not model.training


def test_forms_have_the_papers_parameters():
    counts = {}
    for case in CASES.values():
        for form, make in case.forms.items():
            with torch.device("meta"):
                counts[form] = sum(p.numel() for p in make().parameters())
    assert counts["DF-Seg-v1"] == 9_370_931
    assert counts["DF-Seg-v2"] == 18_825_011
    assert counts["SRNet(DFv2)"] == 18_874_995
    assert counts["SR, GHP"] - counts["bare"] == 395_328
    assert counts["SR, GAP"] - counts["bare"] == 264_256
    assert counts["non-local"] - counts["bare"] == 525_312


def test_the_fastest_of_the_turns_counts_and_a_failure_stays():
    fast, slow = ({"time": {"median_ms": ms}} for ms in (20.0, 30.0))
    assert fastest([slow, fast]) is fast
    failed = {"failed": "out of memory"}
    assert fastest([fast, failed]) is failed
    (row,) = rates(next(iter(CASES.values())), {"a": fast, "b": failed})
    assert row.value == 50.0


class _Slow(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x


def test_what_a_module_adds_is_its_share_of_each_pass(monkeypatch):
    monkeypatch.setattr(realtime, "MODULE_NAME", "1")
    case = Case(
        name="two parts",
        make=lambda: [torch.zeros(1)],
        forms={
            "SR": lambda: nn.Sequential(_Slow(0.03), _Slow(0.03)),
            "bare": lambda: nn.Sequential(_Slow(0.03), nn.Identity()),
        },
        baseline="bare",
    )
    setting = Setting(device="cpu", seconds=0.0, threads=0)
    assert added_by_module(case, "bare", setting) is None
    row = added_by_module(case, "SR", setting)
    # Twice as long with the module; far from met, however loaded the machine is.
    assert row.value > 1.2 * row.baseline_value > 30
    assert row.met is False
