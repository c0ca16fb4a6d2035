"""Direction bins, flips, masks and refinement against loops, stored numbers and grid_sample."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ctxops.boundary import (
    bin_of_angle,
    boundary_mask,
    direction_vectors,
    flip_bins,
    refine_logits,
    refinement_offsets,
    shift_map,
)
from tests.oracles import boundary as oracle
from tests.shared_data import SHARED, needs_shared

SIZES = [(5, 7), (1, 1), (1, 6), (4, 1), (3, 2)]


def heads(height, width, *, batch=2, channels=1, dtype=torch.float64):
    """Class, boundary and direction logits."""
    return (
        torch.randn(batch, 3, height, width, dtype=dtype),
        torch.randn(batch, channels, height, width, dtype=dtype),
        torch.randn(batch, 8, height, width, dtype=dtype),
    )


def test_vectors_are_those_of_the_table():
    assert [tuple(v) for v in direction_vectors().tolist()] == list(oracle.STEPS.values())


def test_bin_of_every_vector_is_its_own():
    dh, dw = direction_vectors().double().unbind(1)
    assert bin_of_angle(torch.atan2(dh, dw).rad2deg()).tolist() == list(range(8))


@given(st.floats(-180, 180))
def test_bin_of_any_angle(angle):
    assert bin_of_angle(torch.tensor(angle, dtype=torch.float64)) == oracle.bin_of(angle)


@pytest.mark.parametrize("index", range(8))
def test_upper_edge_belongs_to_the_bin(index):
    edge = (-180 + 45 * index + 22.5 + 180) % 360 - 180
    assert bin_of_angle(torch.tensor([edge, edge + 0.01])).tolist() == [index, (index + 1) % 8]


@needs_shared
def test_stored_angles():
    tensors = load_file(SHARED / "goldens" / "dev" / "unept_angle_table.safetensors")
    bins = bin_of_angle(tensors["input.angle"])
    assert torch.equal(bins, tensors["output.bin"])
    assert torch.equal(direction_vectors()[bins], tensors["output.offset"])
    assert torch.equal(direction_vectors(), tensors["output.bin_to_offset"])


@pytest.mark.parametrize(("axis", "sign"), [("horizontal", (1, -1)), ("vertical", (-1, 1))])
def test_flipped_bins_point_the_mirrored_way(axis, sign):
    bins = torch.arange(8)
    mirrored = direction_vectors() * torch.tensor(sign)
    assert torch.equal(direction_vectors()[flip_bins(bins, axis)], mirrored)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("axis", ["horizontal", "vertical"])
def test_flips_undo_themselves_and_leave_void_alone(axis, dtype):
    bins = torch.tensor([0, 1, 2, 3, 255, 4, 5, 6, 7], dtype=dtype)
    once = flip_bins(bins, axis)
    assert once.dtype == dtype
    assert once[4] == 255
    assert not torch.equal(once, bins)
    assert torch.equal(flip_bins(once, axis), bins)


def test_mask_of_one_channel_is_a_probability_above_a_half():
    logits = torch.tensor([-1.0, 0.0, 1e-3, 0.5, 0.6]).view(1, 1, 1, 5)
    assert boundary_mask(logits).tolist() == [[[False, False, True, True, True]]]
    assert torch.equal(boundary_mask(logits), logits[:, 0].sigmoid() > 0.5)
    assert boundary_mask(logits, rule="logit").tolist() == [[[False, False, False, False, True]]]


def test_mask_of_two_channels_is_a_softmax_above_a_half():
    logits = torch.randn(2, 2, 5, 6)
    assert torch.equal(boundary_mask(logits), logits.softmax(1)[:, 1] > 0.5)
    assert torch.equal(boundary_mask(logits, rule="logit"), logits[:, 1] > 0.5)


@pytest.mark.parametrize("scale", [1, 2, 9])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_refinement_equals_the_loop(size, channels, scale):
    logits, boundary, direction = heads(*size, channels=channels)
    mask, bins = boundary_mask(boundary), direction.argmax(1)
    expected = [oracle.refine(logits[b], mask[b], bins[b], scale) for b in range(2)]
    actual = refine_logits(logits, boundary, direction, offset_scale=scale)
    assert torch.equal(actual, torch.stack(expected))


def test_refinement_equals_grid_sample_at_whole_pixels():
    logits, boundary, direction = heads(6, 9)
    offsets = refinement_offsets(direction, boundary_mask(boundary))
    y, x = torch.meshgrid(torch.arange(6.0).double(), torch.arange(9.0).double(), indexing="ij")
    x, y = 2 * (x + offsets[:, 1]) / 8 - 1, 2 * (y + offsets[:, 0]) / 5 - 1
    sampled = F.grid_sample(
        logits, torch.stack([x, y], -1), padding_mode="border", align_corners=True
    )
    torch.testing.assert_close(refine_logits(logits, boundary, direction), sampled)


def test_nothing_moves_without_a_boundary():
    logits, boundary, direction = heads(5, 7)
    assert torch.equal(refine_logits(logits, -boundary.abs(), direction), logits)
    offsets = refinement_offsets(direction, torch.zeros(2, 5, 7, dtype=torch.bool))
    assert offsets.abs().max() == 0


def test_a_boundary_pixel_takes_its_right_neighbour():
    logits = torch.arange(12.0).view(1, 1, 3, 4)
    boundary = torch.full((1, 1, 3, 4), -1.0)
    boundary[..., 1, 2] = 1.0
    direction = F.one_hot(torch.full((1, 3, 4), 4), 8).permute(0, 3, 1, 2).float()
    expected = logits.clone()
    expected[..., 1, 2] = 7
    assert torch.equal(refine_logits(logits, boundary, direction), expected)


@pytest.mark.parametrize("size", [(4, 5), (1, 3)])
def test_gradcheck(size):
    logits, boundary, direction = heads(*size)
    assert torch.autograd.gradcheck(
        lambda x: refine_logits(x, boundary, direction), (logits.requires_grad_(),)
    )


def test_gradient_reaches_the_class_logits_only():
    logits, boundary, direction = (t.requires_grad_() for t in heads(5, 7))
    refine_logits(logits, boundary, direction).square().sum().backward()
    assert logits.grad.abs().max() > 0
    assert boundary.grad is None
    assert direction.grad is None


@needs_shared
@pytest.mark.parametrize("channels", [1, 2])
def test_stored_refinement(channels):
    """The released rule looks at the raw logit of the boundary, so one channel does as well."""
    tensors = load_file(SHARED / "goldens" / "dev" / "unept_refine.safetensors")
    logits = tensors["input.logits"].requires_grad_()
    boundary = tensors["input.boundary"][:, -channels:]
    direction = tensors["input.direction"]
    offsets = refinement_offsets(direction, boundary_mask(boundary, rule="logit"))
    assert torch.equal(offsets, tensors["output.offset"].long())
    refined = refine_logits(logits, boundary, direction, mask_rule="logit")
    assert torch.equal(refined, tensors["output.refined_exact"])
    # What grid_sample in float32 makes of whole pixels.
    torch.testing.assert_close(refined, tensors["output.refined"], rtol=0, atol=1.16e-4)
    refined.backward(tensors["input.grad_output"])
    torch.testing.assert_close(logits.grad, tensors["output.grad_logits"], rtol=0, atol=1e-4)


def test_images_of_a_batch_do_not_mix():
    inputs = heads(5, 7, batch=3)
    alone = [refine_logits(*(t[b : b + 1] for t in inputs)) for b in range(3)]
    assert torch.equal(refine_logits(*inputs), torch.cat(alone))


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_memory_layout_does_not_matter(layout):
    inputs = heads(5, 7)
    if layout == "channels_last":
        laid_out = [t.to(memory_format=torch.channels_last) for t in inputs]
    else:
        laid_out = [F.pad(t, [1, 2, 3, 4])[..., 3:-4, 1:-2] for t in inputs]
    assert torch.equal(refine_logits(*laid_out), refine_logits(*inputs))


def test_bfloat16_autocast_copies_exactly():
    logits, boundary, direction = heads(5, 7, dtype=torch.float32)
    logits = logits.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = refine_logits(logits, boundary.bfloat16(), direction.bfloat16())
        out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert set(out.flatten().tolist()) <= set(logits.flatten().tolist())
    assert logits.grad.sum() == logits.numel()


def test_refining_directions_of_a_flipped_image_flips_the_result():
    """Bins and pixels flipped together: refinement and flip commute."""
    logits, boundary, direction = heads(5, 7)
    order = torch.tensor([flip_bins(torch.tensor(i), "horizontal") for i in range(8)])
    flipped = refine_logits(logits.flip(-1), boundary.flip(-1), direction[:, order].flip(-1))
    assert torch.equal(flipped, refine_logits(logits, boundary, direction).flip(-1))


MAP, MASK = torch.zeros(1, 8, 4, 5), torch.zeros(1, 4, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: flip_bins(MAP.long(), "diagonal"), ValueError, "axis: expected one of 'horizon"),
        (lambda: boundary_mask(MAP), ValueError, "expected 1 or 2 channels .* got 8"),
        (lambda: boundary_mask(MAP[:, :1], rule="p"), ValueError, "rule: expected one of 'proba"),
        (lambda: boundary_mask(MAP[:, :1].long()), TypeError, "logits: expected a floating point"),
        (lambda: refinement_offsets(MAP[:, :7], MASK), ValueError, "expected 8 channels, got 7"),
        (lambda: refinement_offsets(MAP, MASK.float()), TypeError, "mask: expected bool, got torc"),
        (
            lambda: refinement_offsets(MAP, MASK[:, :2]),
            ValueError,
            r"mask: expected \(1, 4, 5\) .* got \(1, 2, 5\); resize both heads",
        ),
        (lambda: refinement_offsets(MAP, MASK, scale=0), ValueError, "scale: expected at least 1"),
        (
            lambda: shift_map(MAP, torch.zeros(1, 2, 4, 5)),
            TypeError,
            "offsets: expected integers, got torch.float32",
        ),
        (
            lambda: shift_map(MAP, torch.zeros(1, 2, 8, 8).long()),
            ValueError,
            r"offsets: expected \(1, 2, 4, 5\) for a map \(1, 8, 4, 5\), got \(1, 2, 8, 8\)",
        ),
    ],
)
def test_says_what_is_wrong(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.slow
def test_compiled_and_exported_equal_eager():
    class Refine(torch.nn.Module):
        def forward(self, logits, boundary, direction):
            return refine_logits(logits, boundary, direction)

    inputs = heads(5, 7)
    expected = refine_logits(*inputs)
    assert torch.equal(torch.compile(refine_logits, fullgraph=True)(*inputs), expected)
    assert torch.equal(torch.export.export(Refine(), inputs).module()(*inputs), expected)


def test_angle_of_the_picture_is_measured_with_y_down():
    assert bin_of_angle(torch.tensor(math.degrees(math.atan2(1, 0)))) == 6  # down


def test_second_derivatives_of_a_shift():
    x, offsets = torch.randn(1, 2, 3, 4, dtype=torch.float64), torch.randint(-2, 3, (1, 2, 3, 4))
    assert torch.autograd.gradgradcheck(
        lambda x: shift_map(x, offsets).square(), (x.requires_grad_(),)
    )


def test_a_shift_keeps_its_indices_and_not_the_map():
    logits, boundary, direction = heads(6, 5, channels=1)
    logits = (1 * logits.requires_grad_()).exp()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        refine_logits(logits, boundary, direction)
    assert [(x.dtype, x.untyped_storage().nbytes()) for x in kept] == [(torch.int64, 8 * 2 * 6 * 5)]
