"""What is special about single heads."""

import pytest
import torch
from torch import nn

from ctxops.heads.apnb import AsymmetricNonLocal, PyramidSample
from ctxops.heads.aspp import ASPP
from ctxops.heads.compact_non_local import CompactNonLocal
from ctxops.heads.criss_cross import RecurrentCrissCross, criss_cross_attention
from ctxops.heads.double_attention import double_attention
from ctxops.heads.em_attention import EMAttention
from ctxops.heads.non_local import NonLocal, attend_positions
from ctxops.heads.object_context import ObjectContext
from ctxops.heads.pyramid_pooling import PyramidPooling, check_batch_statistics
from tests.ctxops.heads.test_heads import moderate
from tests.oracles import heads as oracle

EXACT = {"rtol": 0, "atol": 1e-12}


def largest_kept(module, x):
    """Numbers in the largest tensor that autograd keeps for the backward pass."""
    sizes = []

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        module(x)
    return max(sizes)


# ---- non-local ---------------------------------------------------------------------------------
@pytest.mark.parametrize("norm", ["BN", ""])
def test_non_local_starts_as_the_identity(norm):
    x = torch.randn(2, 8, 3, 4)
    assert torch.equal(NonLocal(in_channels=8, norm=norm)(x), x)


def test_non_local_keeps_no_affinity():
    x = torch.randn(1, 8, 32, 32)
    assert largest_kept(NonLocal(in_channels=8), x) <= x.numel() < 1024**2


def test_non_local_is_equivariant_to_a_permutation_of_positions():
    module = moderate(NonLocal(in_channels=8))
    x, order = torch.randn(1, 8, 3, 4, dtype=torch.float64), torch.randperm(12)
    shuffled = x.flatten(2)[..., order].view_as(x)
    expected = module(x).flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(module(shuffled), expected, **EXACT)


def test_attention_of_half_precision_is_in_float32():
    query = 3 * torch.randn(1, 16, 2, 3).bfloat16()
    key, value = (3 * torch.randn(2, 1, 16, 7)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend_positions(query, key, value, scale=0.25)
    wide = attend_positions(query.double(), key.double(), value.double(), scale=0.25)
    # Only the last rounding remains: half a unit in the last place.
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(out.double(), wide, rtol=eps / 2, atol=1e-5)


# ---- double attention --------------------------------------------------------------------------
def test_uniform_logits_give_the_mean_everywhere():
    features = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    uniform, other = torch.zeros(2, 3, 3, 5).double(), torch.randn(2, 3, 3, 5).double()
    mean = features.mean((2, 3), keepdim=True).expand_as(features)
    torch.testing.assert_close(double_attention(features, uniform, other), mean, **EXACT)


def test_constant_features_stay_constant():
    """Both softmaxes sum to one, each over its own axis."""
    features = torch.randn(2, 4, 1, 1, dtype=torch.float64).expand(2, 4, 3, 5)
    gather, distribute = torch.randn(2, 2, 3, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(double_attention(features, gather, distribute), features, **EXACT)


# ---- compact generalised non-local -------------------------------------------------------------
def test_groups_do_not_mix():
    module = moderate(CompactNonLocal(in_channels=8, groups=2))
    x = torch.randn(1, 8, 3, 4, dtype=torch.float64)
    before = module(x)
    with torch.no_grad():
        module.phi.weight[0] *= -3
    changed = (module(x) - before).abs().amax((0, 2, 3)) > 1e-9
    assert changed.tolist() == [True] * 4 + [False] * 4


def test_compact_non_local_survives_float16():
    module = CompactNonLocal(in_channels=16).eval()
    x = 30 * torch.randn(1, 16, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        out = module(x.half())
    assert out.isfinite().all()
    branch = module(x) - x
    assert (out.float() - x - branch).norm() < 0.05 * branch.norm() + 0.05 * x.norm()


# ---- expectation maximisation ------------------------------------------------------------------
def em_unit():
    return moderate(EMAttention(in_channels=4, num_bases=3))


def test_em_bases_are_found_and_have_length_one():
    module = em_unit().train()
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    module(x)
    state = module.state_dict()
    found = [oracle.em_attention(image, state, iterations=3)[1][1] for image in x]
    for bases in found:
        torch.testing.assert_close(bases.norm(dim=0), torch.ones(3).double(), **EXACT)
    start = module.bases.clone()
    module.update_bases()
    expected = 0.9 * start + 0.1 * torch.stack(found).mean(0)
    torch.testing.assert_close(module.bases, expected, rtol=0, atol=1e-10)


def test_em_gradient_treats_the_bases_as_constants():
    module = em_unit()
    x = torch.randn(1, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    _, found = oracle.em_attention(x[0], state, iterations=3)
    expected, _ = oracle.em_attention(x[0], state, iterations=3, frozen=found)
    weight = torch.randn_like(x)
    wanted = [x, module.inner.weight, module.out.weight]
    expected_gradients = torch.autograd.grad((expected * weight[0]).sum(), wanted)
    gradients = torch.autograd.grad((module(x) * weight).sum(), wanted)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-9)
    assert gradients[1].abs().max() > 1e-6


def test_forward_leaves_the_bases_alone():
    module = em_unit()
    start = module.bases.clone()
    for training in (True, False):
        module.train(training)(torch.randn(2, 4, 3, 5, dtype=torch.float64))
    assert torch.equal(module.bases, start)


def test_bases_are_updated_once_per_training_step():
    module = em_unit()
    module(torch.randn(1, 4, 3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="update_bases: expected a forward pass in training mode"):
        module.update_bases()
    module.train()(torch.randn(1, 4, 3, 3, dtype=torch.float64))
    module.update_bases()
    with pytest.raises(ValueError, match="call it once per step"):
        module.update_bases()


def test_bases_are_averaged_over_processes(monkeypatch):
    module, alone = em_unit().train(), em_unit().train()
    alone.load_state_dict(module.state_dict())
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    module(x), alone(x)
    alone.update_bases()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    # The other two processes found nothing: a third of the estimate is left.
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    start = module.bases.clone()
    module.update_bases()
    step = (alone.bases - 0.9 * start) / 3
    torch.testing.assert_close(module.bases, 0.9 * start + step, **EXACT)


def test_start_of_the_bases_is_a_buffer_in_the_state():
    module = EMAttention(in_channels=512)
    assert module.bases.numel() == 32_768
    assert not module.bases.requires_grad
    torch.testing.assert_close(module.bases.norm(dim=0), torch.ones(64), rtol=0, atol=1e-5)


# ---- criss-cross -------------------------------------------------------------------------------
@pytest.mark.parametrize("recurrences", [1, 2])
def test_reach_of_a_pixel(recurrences):
    module = moderate(RecurrentCrissCross(in_channels=8, num_recurrences=recurrences))
    x = torch.randn(1, 8, 5, 6, dtype=torch.float64)
    moved = x.clone()
    moved[..., 2, 3] += 1
    changed = (module(moved) - module(x)).abs().amax((0, 1)) > 1e-12
    cross = torch.zeros(5, 6, dtype=torch.bool)
    cross[2], cross[:, 3] = True, True
    assert torch.equal(changed, cross if recurrences == 1 else torch.ones_like(cross))


def test_the_centre_counts_once():
    value = torch.randn(1, 2, 4, 5, dtype=torch.float64)
    nothing = torch.zeros(1, 3, 4, 5, dtype=torch.float64)
    rows, columns = value.sum(3, keepdim=True), value.sum(2, keepdim=True)
    expected = (rows + columns - value) / (4 + 5 - 1)
    torch.testing.assert_close(criss_cross_attention(nothing, nothing, value), expected, **EXACT)


def test_criss_cross_starts_as_the_identity():
    x = torch.randn(1, 8, 3, 4)
    assert torch.equal(RecurrentCrissCross(in_channels=8)(x), x)


def test_criss_cross_keeps_one_row_and_column_per_position():
    x = torch.randn(1, 8, 24, 40)
    kept = largest_kept(RecurrentCrissCross(in_channels=8), x)
    assert kept <= 24 * 40 * (24 + 40) < (24 * 40) ** 2


# ---- object context and its asymmetric relative ------------------------------------------------
def test_attention_starts_silent():
    x = torch.randn(2, 8, 3, 4)
    assert torch.equal(AsymmetricNonLocal(in_channels=8)(x), x)
    module = ObjectContext(in_channels=8).eval()
    alone = module.fuse(torch.cat([torch.zeros_like(x), x], 1))
    assert torch.equal(module(x), alone)


def test_pyramid_has_110_cells():
    x = torch.randn(2, 3, 24, 48, dtype=torch.float64)
    sampled = PyramidSample()(x)
    assert sampled.shape == (2, 3, 110)
    torch.testing.assert_close(sampled[..., 0], x.mean((2, 3)), **EXACT)
    torch.testing.assert_close(sampled[..., 1], x[..., :8, :16].mean((2, 3)), **EXACT)
    torch.testing.assert_close(sampled[..., 109], x[..., 21:, 42:].mean((2, 3)), **EXACT)


def test_asymmetric_attention_keeps_nothing_quadratic():
    x = torch.randn(1, 8, 32, 32)
    assert largest_kept(AsymmetricNonLocal(in_channels=8), x) <= 110 * 1024 < 1024**2


def test_channel_dropout_only_in_training():
    module = ObjectContext(in_channels=8, dropout=0.9)
    x = torch.randn(2, 8, 3, 4)
    assert (module(x).flatten(2).abs().sum(2) == 0).float().mean() > 0.5
    module.eval()
    assert torch.equal(module(x), module(x))


# ---- pyramids ----------------------------------------------------------------------------------
@pytest.mark.parametrize("align_corners", [False, True])
def test_pyramid_pooling_of_a_constant_map_is_constant_inside(align_corners):
    module = moderate(
        PyramidPooling(in_channels=8, out_channels=4, kernel_size=1, align_corners=align_corners)
    )
    out = module(torch.randn(1, 8, 1, 1, dtype=torch.float64).expand(1, 8, 7, 9))
    torch.testing.assert_close(out, out[..., :1, :1].expand_as(out), **EXACT)


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
@pytest.mark.parametrize("head", [PyramidPooling, ASPP])
def test_a_single_image_cannot_train_a_batch_norm(head, norm):
    module = head(in_channels=8, out_channels=4, norm=norm)
    x = torch.randn(1, 8, 5, 6)
    with pytest.raises(ValueError, match="expected at least 2 images in training, .* norm='GN'"):
        module.train()(x)
    assert module.eval()(x).shape == (1, 4, 5, 6)


def test_a_synchronised_norm_may_see_images_of_other_processes(monkeypatch):
    """Whatever the norm was called when the module was built: trainers convert it."""
    x = torch.randn(1, 8, 5, 6)
    plain = ASPP(in_channels=8, out_channels=4, norm="BN").image.norm
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(plain))[0]
    with pytest.raises(ValueError, match="at least 2 images"):
        check_batch_statistics(x, cells=1, norm=synced)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    check_batch_statistics(x, cells=1, norm=synced)
    with pytest.raises(ValueError, match="at least 2 images"):
        check_batch_statistics(x, cells=1, norm=plain)


def test_a_single_image_trains_a_group_norm():
    for module in (
        PyramidPooling(in_channels=32, out_channels=64, bin_channels=64, norm="GN"),
        ASPP(in_channels=32, out_channels=64, norm="GN"),
    ):
        module(torch.randn(1, 32, 5, 6)).sum().backward()


def test_a_single_image_trains_without_the_image_wide_bin():
    module = PyramidPooling(in_channels=8, out_channels=4, bins=(2, 3))
    module(torch.randn(1, 8, 5, 6)).sum().backward()


def test_aspp_sees_only_its_taps_and_the_mean():
    """A moved pair of pixels with the old mean reaches the centre and the taps alone."""
    module = moderate(ASPP(in_channels=8, out_channels=4, dilations=(3,)))
    x = torch.randn(1, 8, 13, 13, dtype=torch.float64)
    moved = x.clone()
    moved[..., 6, 6] += 1
    moved[..., 12, 12] -= 1
    changed = (module(moved) - module(x)).abs().amax((0, 1)) > 1e-12
    expected = torch.zeros(13, 13, dtype=torch.bool)
    for y in (3, 6, 9):
        expected[y, [3, 6, 9]] = True
    expected[[9, 9, 12, 12], [9, 12, 9, 12]] = True
    assert not (changed & ~expected).any()
    assert changed[6, 6]
    assert changed[3, 9]
