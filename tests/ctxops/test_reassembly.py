"""The reassembly operators against loops, special cases, each other and stored numbers."""

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ctxops import banded, normalize_kernels, reassemble_down, reassemble_up
from ctxops.reassembly_op import reassemble, reassemble_backward
from tests.oracles import reassembly as oracle
from tests.shared_data import SHARED, needs_shared

EAGER = ["loop", "chunked", "auto"]
SIZES = [(5, 7), (1, 1), (2, 13), (3, 29), (6, 4)]


def make(batch, channels, height, width, *, kernel_size=5, scale=1, stride=1, dtype=torch.float64):
    """A map and kernels that fit it."""
    x = torch.randn(batch, channels, height, width, dtype=dtype)
    windows = -(-height // stride), -(-width // stride)
    logits = torch.randn(batch, kernel_size**2 * scale**2, *windows, dtype=dtype)
    return x, normalize_kernels(logits, kernel_size=kernel_size, scale=scale)


def apply(x, kernels, stride, impl):
    if stride == 1:
        return reassemble_up(x, kernels, impl=impl)
    return reassemble_down(x, kernels, stride=stride, impl=impl)


def gradients(x, kernels, stride, impl, weight):
    x, kernels = x.detach().requires_grad_(), kernels.detach().requires_grad_()
    (apply(x, kernels, stride, impl) * weight).sum().backward()
    return x.grad, kernels.grad


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kernel_size", "scale"), [(5, 2), (3, 3), (1, 2), (7, 1)])
def test_up_equals_the_equation(impl, size, kernel_size, scale):
    x, kernels = make(2, 3, *size, kernel_size=kernel_size, scale=scale)
    full_size = F.pixel_shuffle(kernels.flatten(1, 2), scale)
    expected = oracle.reassemble(x, full_size, scale=scale)
    torch.testing.assert_close(reassemble_up(x, kernels, impl=impl), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kernel_size", "stride"), [(5, 2), (3, 3), (1, 2), (3, 1)])
def test_down_equals_the_equation(impl, size, kernel_size, stride):
    x, kernels = make(2, 3, *size, kernel_size=kernel_size, stride=stride)
    expected = oracle.reassemble(x, kernels.squeeze(2), stride=stride)
    actual = reassemble_down(x, kernels, stride=stride, impl=impl)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["loop", "chunked"])
@pytest.mark.parametrize(
    ("scale", "stride", "size"), [(2, 1, (3, 4)), (1, 2, (4, 5)), (1, 3, (4, 5))]
)
def test_gradcheck(impl, scale, stride, size):
    x, kernels = make(2, 2, *size, kernel_size=3, scale=scale, stride=stride)
    inputs = x.requires_grad_(), kernels.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: apply(a, b, stride, impl), inputs)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    kernel_size=st.sampled_from([1, 3, 5]),
    factor=st.integers(1, 3),
    up=st.booleans(),
    chunk=st.sampled_from([1, 20_000, 2**30]),
)
def test_chunked_equals_loop_for_any_size_and_chunk(batch, size, kernel_size, factor, up, chunk):
    scale, stride = (factor, 1) if up else (1, factor)
    x, kernels = make(batch, 2, *size, kernel_size=kernel_size, scale=scale, stride=stride)
    expected = apply(x, kernels, stride, "loop")
    weight = torch.randn_like(expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(banded, "CHUNK_BYTES_CPU", chunk)
        actual = apply(x, kernels, stride, "chunked")
        actual_gradients = gradients(x, kernels, stride, "chunked", weight)
    expected_gradients = gradients(x, kernels, stride, "loop", weight)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(actual_gradients, expected_gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed", "expanded"])
def test_memory_layout_does_not_matter(layout, stride):
    x, kernels = make(2, 4, 8, 14, scale=2 if stride == 1 else 1, stride=stride)
    if layout == "channels_last":
        laid_out = x.to(memory_format=torch.channels_last), kernels
    elif layout == "sliced":
        laid_out = F.pad(x, [1, 2, 3, 4])[..., 3:-4, 1:-2], F.pad(kernels, [2, 1])[..., 2:-1]
    elif layout == "transposed":
        laid_out = tuple(t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (x, kernels))
    else:
        kernels = kernels[..., :1, :1].expand_as(kernels)
        laid_out = x, kernels
    expected = apply(x.contiguous(), kernels.contiguous(), stride, "loop")
    weight = torch.ones(()).double().expand_as(expected)
    actual_gradients = gradients(*laid_out, stride, "chunked", weight)
    expected_gradients = gradients(x.contiguous(), kernels.contiguous(), stride, "loop", weight)
    torch.testing.assert_close(apply(*laid_out, stride, "chunked"), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(actual_gradients, expected_gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("wanted", ["x", "kernels"])
def test_chunked_computes_only_the_gradient_asked_for(wanted, stride):
    x, kernels = make(1, 3, 6, 5, stride=stride)
    arguments = {"x": x, "kernels": kernels}
    arguments[wanted] = arguments[wanted].detach().requires_grad_()
    out = apply(arguments["x"], arguments["kernels"], stride, "chunked")
    out.sum().backward()
    both = dict(zip(arguments, gradients(x, kernels, stride, "loop", 1.0), strict=True))
    torch.testing.assert_close(arguments[wanted].grad, both[wanted], rtol=0, atol=1e-12)
    (other,) = set(arguments) - {wanted}
    assert arguments[other].grad is None


def test_chunked_refuses_second_derivatives():
    x, kernels = make(1, 1, 2, 2, scale=2)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(
        reassemble_up(x, kernels, impl="chunked").square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="reassemble_backward"):
        grad.sum().backward()


def test_up_equals_nearest_then_dilated_unfold():
    x, kernels = make(2, 3, 5, 6, scale=2)
    enlarged = F.interpolate(x, scale_factor=2, mode="nearest")
    windows = F.unfold(enlarged, 5, dilation=2, padding=4).view(2, 3, 25, 10, 12)
    expected = (windows * F.pixel_shuffle(kernels.flatten(1, 2), 2)[:, None]).sum(2)
    torch.testing.assert_close(reassemble_up(x, kernels), expected, rtol=0, atol=1e-12)


def test_down_equals_strided_unfold():
    x, kernels = make(2, 3, 7, 8, stride=2)
    windows = F.unfold(x, 5, stride=2, padding=2).view(2, 3, 25, 4, 4)
    expected = (windows * kernels.squeeze(2)[:, None]).sum(2)
    torch.testing.assert_close(reassemble_down(x, kernels, stride=2), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", EAGER)
def test_constant_kernels_filter_with_a_box_and_zero_padding(impl):
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    kernels = torch.full((1, 25, 4, 5, 6), 1 / 25, dtype=torch.float64)
    box = F.avg_pool2d(x, 5, stride=1, padding=2, count_include_pad=True)
    expected = F.interpolate(box, scale_factor=2, mode="nearest")
    torch.testing.assert_close(reassemble_up(x, kernels, impl=impl), expected)


@pytest.mark.parametrize("impl", EAGER)
def test_one_hot_centre_copies_pixels(impl):
    x = torch.randn(1, 2, 5, 6)
    up, down = torch.zeros(1, 25, 4, 5, 6), torch.zeros(1, 25, 1, 3, 3)
    up[:, 12], down[:, 12] = 1, 1
    nearest = F.interpolate(x, scale_factor=2, mode="nearest")
    assert torch.equal(reassemble_up(x, up, impl=impl), nearest)
    assert torch.equal(reassemble_down(x, down, stride=2, impl=impl), x[..., ::2, ::2])


@pytest.mark.parametrize("impl", EAGER)
def test_one_tap_and_subpixel_selects_exactly_that_pixel(impl):
    """Channel = tap * 4 + sub-pixel: tap (0, 3) is two up and one right, sub-pixel 2 is (1, 0)."""
    logits = torch.zeros(1, 100, 4, 5)
    logits[:, 3 * 4 + 2] = 100.0
    kernels = normalize_kernels(logits, kernel_size=5, scale=2)
    x = torch.randn(1, 1, 4, 5)
    out = reassemble_up(x, kernels, impl=impl)
    shifted = F.pad(x, [0, 1, 2, 0])[..., :4, 1:]
    torch.testing.assert_close(out[..., 1::2, 0::2], shifted)
    box = F.avg_pool2d(x, 5, stride=1, padding=2)
    torch.testing.assert_close(out[..., 0::2, 1::2], box)


def test_kernels_sum_to_one_and_match_pixel_shuffle():
    logits = torch.randn(2, 9 * 4, 3, 4, dtype=torch.float64)
    kernels = normalize_kernels(logits, kernel_size=3, scale=2)
    torch.testing.assert_close(kernels.sum(1), torch.ones(2, 4, 3, 4, dtype=torch.float64))
    expected = oracle.to_subpixels(oracle.softmax_over_taps(logits, 3, 2), 2)
    torch.testing.assert_close(kernels, expected)


def test_images_of_a_batch_do_not_mix():
    x, kernels = make(3, 2, 4, 11, scale=2)
    alone = torch.cat([reassemble_up(x[i : i + 1], kernels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(reassemble_up(x, kernels), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", EAGER)
def test_a_pixel_reaches_its_window_only(impl):
    x, kernels = make(1, 1, 9, 9, kernel_size=3, scale=2)
    moved = x.clone()
    moved[..., 4, 4] += 1
    difference = reassemble_up(moved, kernels, impl=impl) - reassemble_up(x, kernels, impl=impl)
    assert difference[..., 6:12, 6:12].abs().min() > 1e-6
    difference[..., 6:12, 6:12] = 0
    assert difference.abs().max() == 0


def test_a_non_finite_pixel_stays_near_its_tile():
    x, kernels = make(1, 1, 20, 60)
    x[..., 10, 30] = torch.inf
    spread = reassemble_down(x, kernels, stride=1, impl="chunked").isfinite().logical_not()
    rows, columns = spread[0, 0].nonzero().unbind(1)
    assert (rows - 10).abs().max() <= 4
    assert (columns - 30).abs().max() <= 16


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stride", [1, 2])
def test_half_precision_accumulates_in_float32(impl, dtype, stride):
    scale = 2 if stride == 1 else 1
    x, kernels = make(1, 8, 6, 7, scale=scale, stride=stride, dtype=torch.float32)
    low = x.to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        out = apply(low, kernels, stride, impl)
    assert out.dtype == dtype
    expected = apply(low.double(), kernels.double(), stride, "loop")
    # Only the last rounding remains: half a unit in the last place.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=eps / 2, atol=1e-6)


def test_half_precision_gradients_have_the_dtypes_of_the_arguments():
    x, kernels = make(1, 4, 5, 6, scale=2, dtype=torch.float32)
    low = x.bfloat16(), kernels
    weight = torch.randn(1, 4, 10, 12)
    grad_x, grad_kernels = gradients(*low, 1, "chunked", weight)
    expected = gradients(x.bfloat16().double(), kernels.double(), 1, "loop", weight.double())
    assert (grad_x.dtype, grad_kernels.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(grad_x.double(), expected[0], rtol=0.02, atol=0.02)
    torch.testing.assert_close(grad_kernels.double(), expected[1], rtol=0.02, atol=0.05)


def test_softmax_of_half_precision_logits_is_in_float32():
    logits = 8 * torch.randn(1, 25, 2, 2).bfloat16()
    expected = logits.float().softmax(1).bfloat16()
    assert torch.equal(normalize_kernels(logits, kernel_size=5).squeeze(2), expected)


@needs_shared
@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("case", "scale"), [("carafe_up", 2), ("carafe_down", 1)])
def test_stored_numbers(case, scale, impl, dtype):
    folder = SHARED / "goldens" / "dev"
    tensors = load_file(folder / f"{case}.safetensors")
    tolerance = json.loads((folder / f"{case}.json").read_text())["tolerance"]
    x = tensors["input.features"].to(dtype).requires_grad_()
    logits = tensors["input.kernel_logits"].to(dtype).requires_grad_()
    kernels = normalize_kernels(logits, kernel_size=5, scale=scale)
    kernels.retain_grad()
    out = apply(x, kernels, 1 if scale == 2 else 2, impl)
    (out * tensors["input.grad_output"]).sum().backward()
    actual = {
        "output.output": out,
        "output.grad_features": x.grad,
        "output.grad_kernels": F.pixel_shuffle(kernels.grad.flatten(1, 2), scale),
        "output.grad_kernel_logits": logits.grad,
    }
    suffix = str(dtype).removeprefix("torch.")
    for name, value in actual.items():
        atol = tolerance[name][f"suggested_atol_{suffix}"]
        torch.testing.assert_close(value.double(), tensors[name].double(), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"x": torch.zeros(3, 4, 5)},
            ValueError,
            r"expected a non-empty map .* got shape \(3, 4, 5\)",
        ),
        (
            {"x": torch.zeros(1, 3, 4, 5, dtype=torch.int64)},
            TypeError,
            "got torch.int64; call .float",
        ),
        ({"kernels": torch.zeros(1, 9, 4, 5)}, ValueError, "use normalize_kernels"),
        ({"kernels": torch.zeros(1, 9, 4, 4, 5).int()}, TypeError, "got torch.int32"),
        (
            {"kernels": torch.zeros(1, 16, 4, 4, 5)},
            ValueError,
            "odd square number of taps .* 16 and 4",
        ),
        (
            {"kernels": torch.zeros(1, 9, 3, 4, 5)},
            ValueError,
            "square number of sub-pixels, .* and 3",
        ),
        ({"kernels": torch.zeros(2, 9, 4, 4, 5)}, ValueError, r"batch and size \(1, 4, 5\)"),
        (
            {"kernels": torch.zeros(1, 9, 4, 5, 4)},
            ValueError,
            r"got \(1, 5, 4\); predict one kernel",
        ),
        ({"impl": "fast"}, ValueError, "'auto', 'loop', 'chunked', 'triton', got 'fast'"),
    ],
)
def test_up_says_what_is_wrong(change, error, text):
    arguments = {"x": torch.zeros(1, 3, 4, 5), "kernels": torch.zeros(1, 9, 4, 4, 5), **change}
    with pytest.raises(error, match=text):
        reassemble_up(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"kernels": torch.zeros(1, 9, 4, 2, 3)},
            ValueError,
            "sub-pixels exist in up-sampling only",
        ),
        (
            {"kernels": torch.zeros(1, 9, 1, 2, 2)},
            ValueError,
            r"\(1, 2, 3\) .* stride 2, got \(1, 2, 2\)",
        ),
        ({"stride": 0}, ValueError, "stride: expected at least 1, got 0"),
        ({"stride": 2.0}, TypeError, "stride: expected an integer, got 2.0"),
    ],
)
def test_down_says_what_is_wrong(change, error, text):
    arguments = {"kernels": torch.zeros(1, 9, 1, 2, 3), "stride": 2, **change}
    with pytest.raises(error, match=text):
        reassemble_down(torch.zeros(1, 3, 4, 5), **arguments)


def test_normalize_kernels_says_what_is_wrong():
    with pytest.raises(ValueError, match="logits: expected 36 channels, got 35"):
        normalize_kernels(torch.zeros(1, 35, 2, 2), kernel_size=3, scale=2)


@pytest.mark.parametrize("wanted", ["x", "kernels", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_the_rules_of_operators(wanted, dtype):
    """Schema, shapes and strides told to compilers, and gradients when traced with symbols."""
    for scale, stride in [(2, 1), (1, 2)]:
        x, kernels = make(2, 3, 5, 6, scale=scale, stride=stride, dtype=dtype)
        x.requires_grad_(wanted != "kernels")
        kernels = kernels.detach().requires_grad_(wanted != "x")
        torch.library.opcheck(reassemble, (x, kernels, stride, "chunked"))


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_operator_returns_what_it_tells_compilers(wanted, dtype):
    for scale, stride in [(2, 1), (1, 2)]:
        x, kernels = make(2, 3, 5, 6, scale=scale, stride=stride, dtype=torch.float32)
        x = x.to(dtype)
        grad_out = torch.randn_like(reassemble(x, kernels, stride, "chunked"))
        arguments = grad_out, x, kernels, stride, "chunked", *wanted
        found = reassemble_backward(*arguments)
        expected = [t for t, asked in zip((x, kernels), wanted, strict=True) if asked]
        assert [(g.shape, g.dtype) for g in found] == [(t.shape, t.dtype) for t in expected]
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(reassemble_backward, arguments, test_utils=checks)


def test_shapes_alone_are_enough():
    x, kernels = make(2, 3, 5, 6, scale=2)
    out = reassemble_up(x.to("meta"), kernels.to("meta"))
    assert (out.shape, out.device.type) == ((2, 3, 10, 12), "meta")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stride", "impl", "dynamic"),
    [(1, "auto", False), (2, "auto", False), (1, "auto", True), (2, "loop", False)],
)
def test_compile_gives_the_same_numbers(stride, impl, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(apply, fullgraph=True, dynamic=dynamic)
    for size in [(6, 7), (5, 9)] if dynamic else [(6, 7)]:
        x, kernels = make(2, 3, *size, scale=2 if stride == 1 else 1, stride=stride)
        x, kernels = x.requires_grad_(), kernels.detach().requires_grad_()
        actual = compiled(x, kernels, stride, impl)
        expected = apply(x, kernels, stride, "loop")
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
        weight = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, (x, kernels), weight),
            torch.autograd.grad(expected, (x, kernels), weight),
            rtol=0,
            atol=1e-12,
        )


@pytest.mark.slow
def test_compile_under_autocast_gives_the_same_numbers():
    torch.compiler.reset()
    x, kernels = make(2, 8, 6, 7, scale=2, dtype=torch.float32)
    x, kernels = x.bfloat16().requires_grad_(), kernels.detach().requires_grad_()
    found = []
    for function in (apply, torch.compile(apply, fullgraph=True)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = function(x, kernels, 1, "auto")
        found.append((out, *torch.autograd.grad(out.float().square().sum(), (x, kernels))))
    for actual, expected in zip(found[1], found[0], strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_holds_standard_operators_only(strict):
    class Up(torch.nn.Module):
        def forward(self, x, kernels):
            return reassemble_up(x, kernels)

    x, kernels = make(1, 2, 4, 5, scale=2)
    program = torch.export.export(Up(), (x, kernels), strict=strict)
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert called
    assert all(name.startswith("aten.") for name in called)
    actual = program.module()(x, kernels)
    torch.testing.assert_close(actual, reassemble_up(x, kernels), rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("stride", [1, 2])
def test_gpu_equals_cpu(impl, stride):
    x, kernels = make(2, 16, 27, 41, scale=2 if stride == 1 else 1, stride=stride)
    expected = apply(x, kernels, stride, "loop")
    weight = torch.randn_like(expected)
    out = apply(x.cuda(), kernels.cuda(), stride, impl).cpu()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    actual = gradients(x.cuda(), kernels.cuda(), stride, impl, weight.cuda())
    for gpu, cpu in zip(actual, gradients(x, kernels, stride, "loop", weight), strict=True):
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=0, atol=1e-12)
