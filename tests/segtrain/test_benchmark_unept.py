"""The benchmark of UN-EPT compares networks that differ in what the names say."""

import pytest

from benchmarks.cases.unept import CASES, FULL, SIDE
from ctxops.deform_attention import DeformableAttention
from ctxops.self_attention import FullAttention


@pytest.mark.parametrize(
    ("form", "count", "kind"),
    [(FULL, 31_436_086, FullAttention), ("deformable", 31_370_294, DeformableAttention)],
)
def test_forms_differ_in_the_attention_among_queries(form, count, kind):
    step = CASES[1].forms[form]()
    assert sum(p.numel() for p in step.parameters()) == count
    assert step.training
    layers = step.model.head.context.decoder.layers
    assert all(type(layer.self_attn) is kind for layer in layers)
    assert step.label.shape == step.boundary.shape == (1, SIDE, SIDE)
    assert 0 < (step.boundary == 1).float().mean() < 0.5
    assert set(step.direction.unique().tolist()) <= {*range(8), 255}
