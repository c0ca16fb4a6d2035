"""What the benchmark of whole networks compares differs in what the names say."""

import pytest
import torch

from benchmarks.realtime import CASES, fastest, rates


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
