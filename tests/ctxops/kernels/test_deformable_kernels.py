"""The kernels of deformable attention against grid_sample in float64, on tiny maps."""

import pytest
import torch

from ctxops.deform_attention import deformable_attention
from ctxops.kernels.deformable import BLOCK_QUERIES, BLOCK_SAMPLES
from tests.ctxops.kernels.tolerance import last_rounding
from tests.oracles import deformable as oracle

# (B, Q, M, D), level shapes, N
CASES = [
    ((2, 3, 2, 4), [(2, 3), (1, 2)], 2),
    ((1, 5, 1, 3), [(5, 4)], 3),
    ((1, BLOCK_QUERIES + 1, 1, 5), [(2, 3)], 2),
    ((1, 1, 1, 1), [(1, 1)], 1),
    ((1, 2, 2, 3), [(1, 4), (3, 1), (2, 2)], 1),
    # More samples in a cell than one step takes.
    ((1, 2 * BLOCK_SAMPLES + 3, 1, 2), [(1, 1)], 2),
]
USUAL, SINGLE, SMALL = CASES[0], CASES[3], CASES[4]


def make(device, sizes, level_shapes, points, *, dtype=torch.float64):
    """Values, and locations and weights in at least float32; a third of them outside the map."""
    batch, queries, heads, width = sizes
    tokens = sum(rows * columns for rows, columns in level_shapes)
    wide = torch.promote_types(dtype, torch.float32)
    samples = batch, queries, heads, len(level_shapes), points
    value = torch.randn(batch, tokens, heads, width, dtype=dtype)
    locations = 1.6 * torch.rand(*samples, 2, dtype=wide) - 0.3
    weights = torch.randn(samples, dtype=wide)
    return value.to(device), level_shapes, locations.to(device), weights.to(device)


def run(arguments, impl, grad_out):
    """Output and the gradients of value, locations and weights."""
    value, level_shapes, locations, weights = arguments
    leaves = [x.detach().requires_grad_() for x in (value, locations, weights)]
    out = deformable_attention(leaves[0], level_shapes, *leaves[1:], impl=impl)
    return out, *torch.autograd.grad(out, leaves, grad_out)


def random_gradient(arguments):
    value, _, _, weights = arguments
    shape = *weights.shape[:2], value.shape[2] * value.shape[3]
    return torch.randn(shape, dtype=value.dtype).to(value.device)


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_grid_sample(device, case):
    arguments = make(device, *case)
    grad_out = random_gradient(arguments)
    torch.testing.assert_close(
        run(arguments, "triton", grad_out),
        run(arguments, "grid_sample", grad_out),
        rtol=0,
        atol=1e-12,
    )


def test_kernels_equal_the_equation(device):
    value, level_shapes, locations, weights = make(device, *USUAL)
    out = deformable_attention(value, level_shapes, locations, weights, impl="triton")
    expected = oracle.attend(value.cpu(), level_shapes, locations.cpu(), weights.cpu())
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_are_in_float32_whatever_the_dtype(device, dtype):
    arguments = make(device, *USUAL, dtype=dtype)
    grad_out = random_gradient(arguments)
    value, level_shapes, locations, weights = arguments
    wide = value.double(), level_shapes, locations.double(), weights.double()
    found = run(arguments, "triton", grad_out)
    for low, high in zip(found, run(wide, "grid_sample", grad_out.double()), strict=True):
        rtol = last_rounding(low.dtype) if low.dtype == dtype else 1e-5
        torch.testing.assert_close(low.double(), high, rtol=rtol, atol=2e-5)
    assert [x.dtype for x in found] == [dtype, dtype, locations.dtype, weights.dtype]


def test_locations_in_half_precision_are_computed_with_in_float32(device):
    value, level_shapes, locations, weights = make(device, *USUAL, dtype=torch.float32)
    arguments = value, level_shapes, locations.bfloat16(), weights.bfloat16()
    grad_out = random_gradient(arguments)
    wide = value.double(), level_shapes, arguments[2].double(), arguments[3].double()
    found = run(arguments, "triton", grad_out)
    for low, high in zip(found, run(wide, "grid_sample", grad_out.double()), strict=True):
        rtol = max(last_rounding(low.dtype), 1e-5)
        torch.testing.assert_close(low.double(), high, rtol=rtol, atol=2e-5)


def test_samples_on_the_centres_of_pixels_and_beyond_the_map(device):
    """Integer coordinates have one pixel; -1, the size and all farther ones none."""
    value = torch.randn(1, 4, 1, 3, dtype=torch.float64, device=device)
    places = torch.tensor([0.0, 3.0, -1.0, 4.0, -1e30, 1e30, torch.inf, 1.0], dtype=torch.float64)
    locations = torch.full((1, 8, 1, 1, 1, 2), 0.5, dtype=torch.float64, device=device)
    locations[..., 0] = ((places + 0.5) / 4).to(device).view(1, 8, 1, 1, 1)
    weights = torch.ones(1, 8, 1, 1, 1, dtype=torch.float64, device=device)
    grad_out = torch.ones(1, 8, 3, dtype=torch.float64, device=device)
    arguments = value, [(1, 4)], locations, weights
    out, grad_value, grad_locations, _ = run(arguments, "triton", grad_out)
    expected = torch.zeros_like(out)
    expected[0, [0, 1, 7]] = value[0, [0, 3, 1], 0]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    counts = torch.tensor([1.0, 1, 0, 1], dtype=torch.float64, device=device)
    torch.testing.assert_close(grad_value[0, :, 0, 0], counts, rtol=0, atol=1e-12)
    assert grad_locations.isfinite().all()


def test_images_do_not_mix_and_a_second_run_gives_the_same_bits(device):
    value, level_shapes, locations, weights = make(device, *USUAL, dtype=torch.float32)
    grad_out = random_gradient((value, level_shapes, locations, weights))
    first = run((value, level_shapes, locations, weights), "triton", grad_out)
    second = run((value, level_shapes, locations, weights), "triton", grad_out)
    image = value[1:], level_shapes, locations[1:], weights[1:]
    alone = run(image, "triton", grad_out[1:])
    for one, two, part in zip(first, second, alone, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one[1:], part)


def test_memory_layout_does_not_matter(device):
    value, level_shapes, locations, weights = make(device, *USUAL)
    laid_out = (
        value.transpose(1, 3).contiguous().transpose(1, 3),
        level_shapes,
        locations.transpose(1, 2).contiguous().transpose(1, 2),
        weights[:, :, :1, :, :1].expand_as(weights),
    )
    grad_out = torch.ones((), dtype=value.dtype, device=device).expand(2, 3, 8)
    torch.testing.assert_close(
        run(laid_out, "triton", grad_out),
        run(laid_out, "grid_sample", grad_out),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_the_gradient_asked_for(device, wanted):
    arguments = make(device, *SMALL)
    grad_out = random_gradient(arguments)
    expected = run(arguments, "grid_sample", grad_out)[1 + wanted]
    leaves = [arguments[i].detach() for i in (0, 2, 3)]
    leaves[wanted].requires_grad_()
    out = deformable_attention(leaves[0], arguments[1], *leaves[1:], impl="triton")
    out.backward(grad_out)
    torch.testing.assert_close(leaves[wanted].grad, expected, rtol=0, atol=1e-12)
    assert sum(leaf.grad is not None for leaf in leaves) == 1


def test_second_derivatives_are_refused(device):
    value, level_shapes, locations, weights = make(device, *SINGLE)
    value.requires_grad_()
    out = deformable_attention(value, level_shapes, locations, weights, impl="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="deformable_triton_backward"):
        grad.sum().backward()


def test_the_operator_keeps_the_rules_of_operators(device):
    value, level_shapes, locations, weights = make(device, *SMALL, dtype=torch.float32)
    leaves = [x.detach().requires_grad_() for x in (value, locations, weights)]
    sides = [side for shape in level_shapes for side in shape]
    operator = torch.ops.ctxops.deformable_triton.default
    torch.library.opcheck(operator, (leaves[0], sides, *leaves[1:]))


def test_autocast_leaves_the_precision_alone(device):
    arguments = make(device, *SMALL, dtype=torch.float32)
    expected = deformable_attention(*arguments, impl="triton")
    with torch.autocast(device, dtype=torch.bfloat16):
        out = deformable_attention(*arguments, impl="triton")
    assert torch.equal(out, expected)


def test_an_exported_program_holds_standard_operators_only(device):
    value, level_shapes, locations, weights = make(device, *SMALL)

    class Attend(torch.nn.Module):
        def forward(self, value, locations, weights):
            return deformable_attention(value, level_shapes, locations, weights, impl="triton")

    program = torch.export.export(Attend(), (value, locations, weights))
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert called
    assert not any("ctxops" in name for name in called)


@pytest.mark.slow
def test_compile_gives_the_same_numbers(device):
    torch.compiler.reset()
    arguments = make(device, *USUAL)
    grad_out = random_gradient(arguments)
    compiled = torch.compile(deformable_attention, fullgraph=True)
    leaves = [arguments[i].detach().requires_grad_() for i in (0, 2, 3)]
    out = compiled(leaves[0], arguments[1], *leaves[1:], impl="triton")
    actual = out, *torch.autograd.grad(out, leaves, grad_out)
    expected = run(arguments, "grid_sample", grad_out)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.gpu
def test_auto_takes_the_kernels_on_a_gpu_and_agrees_at_full_size():
    shapes = [(30, 30)] * 3
    arguments = make("cuda", (2, 900, 8, 32), shapes, 16, dtype=torch.float32)
    out = deformable_attention(*arguments)
    assert torch.equal(out, deformable_attention(*arguments, impl="triton"))
    grad_out = random_gradient(arguments)
    # Sums over 48 points, or of some hundred samples per pixel, in float32.
    torch.testing.assert_close(
        run(arguments, "auto", grad_out),
        run(arguments, "grid_sample", grad_out),
        rtol=1e-3,
        atol=5e-3,
    )
