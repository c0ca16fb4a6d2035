"""The reassembly kernels against the loop in float64; sizes are small, interpreting is slow."""

import pytest
import torch
import torch.nn.functional as F

from ctxops.kernels.reassembly import BLOCK_CHANNELS, BLOCK_ROWS, LANES
from ctxops.reassembly_op import reassemble
from tests.ctxops.kernels.tolerance import last_rounding
from tests.ctxops.test_reassembly import apply, gradients, make

# (channels, height, width), window, scale, stride
CASES = [
    ((3, 5, 7), 3, 2, 1),
    ((2, 2, 3), 5, 2, 1),
    ((2, 2, 3), 3, 3, 1),
    ((1, 2, 5), 7, 1, 1),
    ((2, 6, 4), 1, 2, 1),
    ((2, 5, 7), 5, 1, 2),
    ((2, 7, 8), 3, 1, 3),
    ((2, 5, 6), 3, 1, 4),
    ((2, 1, 1), 3, 2, 1),
    ((2, 1, 9), 3, 1, 2),
    ((2, 5, 1), 3, 2, 1),
]
# More than one block along each axis of the launch.
MANY_BLOCKS = [
    ((BLOCK_CHANNELS + 3, 2, 3), 3, 2, 1),
    ((2, 2 * BLOCK_ROWS + 1, LANES - 3), 3, 1, 1),
    ((1, 3, 2 * LANES + 5), 1, 1, 2),
]


def on(device, shape, kernel_size, scale, stride, *, batch=1, dtype=torch.float64):
    sizes = {"kernel_size": kernel_size, "scale": scale, "stride": stride, "dtype": dtype}
    x, kernels = make(batch, *shape, **sizes)
    return x.to(device), kernels.to(device)


@pytest.mark.parametrize("case", CASES + MANY_BLOCKS)
def test_kernels_equal_the_loop(device, case):
    x, kernels = on(device, *case)
    expected = apply(x, kernels, case[3], "loop")
    torch.testing.assert_close(apply(x, kernels, case[3], "triton"), expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(
        gradients(x, kernels, case[3], "triton", weight),
        gradients(x, kernels, case[3], "loop", weight),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_are_in_float32_whatever_the_dtype(device, dtype, stride):
    case = (10, 3, 4), 3, 2 if stride == 1 else 1, stride
    x, kernels = on(device, *case, dtype=dtype)
    out = apply(x, kernels, stride, "triton")
    weight = torch.randn_like(out)
    actual = out, *gradients(x, kernels, stride, "triton", weight)
    wide = x.double(), kernels.double()
    expected = (
        apply(*wide, stride, "loop"),
        *gradients(*wide, stride, "loop", weight.double()),
    )
    # In float32 it is the rounding of the sums, of 10 channels or 36 products of size up to 4.
    for low, high in zip(actual, expected, strict=True):
        assert low.dtype == dtype
        torch.testing.assert_close(low.double(), high, rtol=last_rounding(dtype), atol=1e-5)


def test_arguments_of_two_dtypes(device):
    x, kernels = on(device, (3, 3, 4), 3, 2, 1, dtype=torch.float32)
    x = x.bfloat16()
    weight = torch.randn(1, 3, 6, 8, device=device).bfloat16()
    grad_x, grad_kernels = gradients(x, kernels, 1, "triton", weight)
    assert (grad_x.dtype, grad_kernels.dtype) == (torch.bfloat16, torch.float32)
    expected = gradients(x.double(), kernels.double(), 1, "loop", weight.double())
    rtol = last_rounding(torch.bfloat16)
    torch.testing.assert_close(grad_x.double(), expected[0], rtol=rtol, atol=1e-5)
    torch.testing.assert_close(grad_kernels.double(), expected[1], rtol=0, atol=1e-5)


def test_autocast_does_not_change_the_precision(device):
    x, kernels = on(device, (3, 3, 4), 3, 2, 1, dtype=torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = apply(x, kernels, 1, "triton")
    assert out.dtype == torch.float32
    expected = apply(x.double(), kernels.double(), 1, "loop")
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_memory_layout_does_not_matter(device, layout):
    x, kernels = on(device, (4, 3, 5), 3, 2, 1)
    if layout == "channels_last":
        laid_out = x.to(memory_format=torch.channels_last), kernels
    elif layout == "sliced":
        laid_out = F.pad(x, [1, 2, 3, 4])[..., 3:-4, 1:-2], F.pad(kernels, [2, 1])[..., 2:-1]
    else:
        kernels = kernels[..., :1, :1].expand_as(kernels)
        laid_out = x, kernels
    weight = torch.ones((), dtype=x.dtype, device=device).expand(1, 4, 6, 10)
    torch.testing.assert_close(
        gradients(*laid_out, 1, "triton", weight),
        gradients(x.contiguous(), kernels.contiguous(), 1, "loop", weight),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("wanted", ["x", "kernels"])
def test_only_the_gradient_asked_for(device, wanted):
    arguments = dict(zip(("x", "kernels"), on(device, (2, 3, 4), 3, 1, 2), strict=True))
    arguments = {name: value.detach() for name, value in arguments.items()}
    both = dict(zip(arguments, gradients(*arguments.values(), 2, "loop", 1.0), strict=True))
    arguments[wanted].requires_grad_()
    apply(*arguments.values(), 2, "triton").sum().backward()
    torch.testing.assert_close(arguments[wanted].grad, both[wanted], rtol=0, atol=1e-12)
    (other,) = set(arguments) - {wanted}
    assert arguments[other].grad is None


def test_images_of_a_batch_do_not_mix_and_a_second_run_gives_the_same_bits(device):
    x, kernels = on(device, (3, 2, 3), 3, 1, 1, batch=2, dtype=torch.float32)
    weight = torch.randn(2, 3, 2, 3, device=device)
    runs = [gradients(x, kernels, 1, "triton", weight) for _ in range(2)]
    alone = [
        gradients(x[i : i + 1], kernels[i : i + 1], 1, "triton", weight[i : i + 1])
        for i in range(2)
    ]
    for first, second, parts in zip(*runs, zip(*alone, strict=True), strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, torch.cat(parts))


def test_a_non_finite_pixel_reaches_its_windows_only(device):
    x, kernels = on(device, (1, 6, 6), 3, 2, 1, batch=1)
    x[..., 2, 3] = torch.inf
    touched = apply(x, kernels, 1, "triton").isfinite().logical_not()
    expected = torch.zeros_like(touched)
    expected[..., 2:8, 4:10] = True
    assert torch.equal(touched, expected)


def test_second_derivatives_are_refused(device):
    x, kernels = on(device, (1, 2, 2), 1, 2, 1)
    x.requires_grad_()
    squares = apply(x, kernels, 1, "triton").square().sum()
    (grad,) = torch.autograd.grad(squares, x, create_graph=True)
    with pytest.raises(RuntimeError, match="reassemble_backward"):
        grad.sum().backward()


@pytest.mark.parametrize("stride", [1, 2])
def test_the_operator_keeps_the_rules_of_operators(device, stride):
    x, kernels = on(device, (2, 3, 4), 1, 3 - stride, stride, dtype=torch.float32)
    x, kernels = x.requires_grad_(), kernels.detach().requires_grad_()
    torch.library.opcheck(reassemble, (x, kernels, stride, "triton"))


@pytest.mark.slow
def test_compile_gives_the_same_numbers(device):
    torch.compiler.reset()
    x, kernels = on(device, (2, 3, 4), 3, 2, 1)
    x, kernels = x.requires_grad_(), kernels.detach().requires_grad_()
    actual = torch.compile(apply, fullgraph=True)(x, kernels, 1, "triton")
    expected = apply(x, kernels, 1, "loop")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, (x, kernels), weight),
        torch.autograd.grad(expected, (x, kernels), weight),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.gpu
def test_auto_takes_the_kernels_on_a_gpu_and_agrees_at_full_size():
    for scale, stride in [(2, 1), (1, 2)]:
        case = (256, 104, 161), 5, scale, stride
        x, kernels = on("cuda", *case, dtype=torch.float32)
        out = apply(x, kernels, stride, "auto")
        assert torch.equal(out, apply(x, kernels, stride, "triton"))
        weight = torch.randn_like(out)
        actual = out, *gradients(x, kernels, stride, "auto", weight)
        expected = (
            apply(x, kernels, stride, "chunked"),
            *gradients(x, kernels, stride, "chunked", weight),
        )
        # Sums of 100 products, or over 256 channels, in float32.
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-4)
