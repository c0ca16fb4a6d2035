"""Deformable attention against a loop, its two implementations, identities and stored numbers."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ctxops import sampled_sum
from ctxops.deform_attention import DeformableAttention, deformable_attention
from ctxops.position import cell_centres
from tests.oracles import deformable as oracle
from tests.shared_data import SHARED, needs_shared

IMPLS = ["grid_sample", "chunked"]
PYRAMIDS = [[(4, 5)], [(3, 5), (2, 1)], [(1, 1), (1, 4), (3, 2)], [(5, 1), (1, 1)]]
GOLDENS = SHARED / "goldens" / "dev"


def make(level_shapes, *, batch=2, queries=3, heads=2, points=2, width=3, dtype=torch.float64):
    """Arguments with about a third of the points outside the maps."""
    tokens, levels = sum(h * w for h, w in level_shapes), len(level_shapes)
    value = torch.randn(batch, tokens, heads, width, dtype=dtype)
    locations = torch.rand(batch, queries, heads, levels, points, 2, dtype=dtype) * 1.6 - 0.3
    weights = torch.randn(batch, queries, heads, levels, points, dtype=dtype)
    return value, level_shapes, locations, weights


def gradients(value, level_shapes, locations, weights, impl, grad_out):
    """Output and gradients with respect to the three tensors."""
    leaves = [x.detach().requires_grad_() for x in (value, locations, weights)]
    out = deformable_attention(leaves[0], level_shapes, *leaves[1:], impl=impl)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))


def assert_equal_to_reference(arguments, atol=1e-11):
    grad_out = torch.randn_like(deformable_attention(*arguments, impl="grid_sample"))
    expected = gradients(*arguments, "grid_sample", grad_out)
    torch.testing.assert_close(
        gradients(*arguments, "chunked", grad_out), expected, rtol=0, atol=atol
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("level_shapes", PYRAMIDS, ids=str)
def test_equals_the_equation(level_shapes, impl):
    arguments = make(level_shapes)
    out = deformable_attention(*arguments, impl=impl)
    torch.testing.assert_close(out, oracle.attend(*arguments), rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("level_shapes", [[(4, 5)], [(3, 4), (1, 2)]], ids=str)
def test_gradcheck(level_shapes, impl):
    value, _, locations, weights = make(level_shapes, batch=1, queries=2, width=2)
    # Away from the kinks at pixel centres, which finite differences must not cross.
    for level, (height, width) in enumerate(level_shapes):
        size = torch.tensor([width, height], dtype=torch.float64)
        pixels = locations[..., level, :, :] * size - 0.5
        pixels = pixels.floor() + (pixels - pixels.floor()).clamp(0.1, 0.9)
        locations[..., level, :, :] = (pixels + 0.5) / size
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    assert torch.autograd.gradcheck(
        lambda v, x, w: deformable_attention(v, level_shapes, x, w, impl=impl), inputs
    )


@settings(max_examples=40, deadline=None)
@given(
    level_shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3),
    batch=st.integers(1, 2),
    queries=st.integers(1, 9),
    points=st.integers(1, 16),
    chunk=st.sampled_from([1, 7, 2**20]),
)
def test_chunked_equals_grid_sample_for_any_size_and_chunk(
    level_shapes, batch, queries, points, chunk
):
    arguments = make(level_shapes, batch=batch, queries=queries, points=points)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampled_sum, "FORWARD_POINTS", chunk)
        patch.setattr(sampled_sum, "BACKWARD_POINTS", chunk)
        assert_equal_to_reference(arguments)


@pytest.mark.parametrize("level_shapes", [[(4, 8)], [(1, 1), (2, 4)], [(8, 1)]], ids=str)
def test_gradients_on_pixel_centres_and_borders_are_those_of_grid_sample(level_shapes):
    """Sides are powers of two, so that both implementations hit the kinks exactly."""
    steps = torch.arange(-48, 81, dtype=torch.float64) / 16  # half pixels and finer, far outside
    x, y = torch.meshgrid(steps[::4], steps, indexing="ij")
    queries = torch.stack([x.flatten(), y.flatten()], dim=-1)
    locations = queries[None, :, None, None, None].expand(1, -1, 1, len(level_shapes), 1, 2)
    value, _, _, _ = make(level_shapes, batch=1, heads=1)
    weights = torch.randn(locations.shape[:-1], dtype=torch.float64)
    assert_equal_to_reference((value, level_shapes, locations.contiguous(), weights))


@pytest.mark.parametrize("location", [-1e30, 1e30, math.inf, -math.inf])
def test_points_far_outside_give_zero_and_no_gradient(location):
    value, shapes, locations, weights = make([(3, 4)], batch=1)
    locations[:, 1] = location
    out, by_value, by_location, by_weight = gradients(
        value, shapes, locations, weights, "chunked", torch.ones(1, 3, 6).double()
    )
    assert out[:, 1].abs().max() == 0
    assert by_location[:, 1].abs().max() == 0
    assert by_weight[:, 1].abs().max() == 0
    assert by_value.isfinite().all()


def test_a_location_that_is_not_a_number_spoils_its_query_only():
    value, shapes, locations, weights = make([(3, 4), (2, 2)], batch=1)
    locations[0, 1, 0, 1, 0, 0] = math.nan
    out = deformable_attention(value, shapes, locations, weights, impl="chunked")
    assert out[0, 1, :3].isnan().all()
    out[0, 1, :3] = 0
    assert out.isfinite().all()


def test_a_value_that_is_not_finite_reaches_only_the_points_near_it():
    value, shapes, locations, weights = make([(1, 8)], batch=1, heads=1, queries=40)
    value[0, 2] = math.inf
    out = deformable_attention(value, shapes, locations, weights, impl="chunked")
    expected = deformable_attention(value, shapes, locations, weights, impl="grid_sample")
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert 0 < out.isfinite().sum() < out.numel()


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_memory_layout_does_not_matter(layout):
    value, shapes, locations, weights = make([(3, 4), (2, 2)])
    if layout == "sliced":
        value = F.pad(value, [1, 2])[..., 1:-2]
        locations, weights = F.pad(locations, [0, 1])[..., :2], F.pad(weights, [2, 0])[..., 2:]
    elif layout == "transposed":
        value = value.transpose(1, 2).contiguous().transpose(1, 2)
        locations = locations.transpose(-1, -2).contiguous().transpose(-1, -2)
        weights = weights.transpose(1, 4).contiguous().transpose(1, 4)
    else:
        locations, weights = locations[:1, :, :1], weights[:, :1]
        locations, weights = (
            locations.expand(2, -1, 2, -1, -1, -1),
            weights.expand(-1, 3, *[-1] * 3),
        )
    assert not locations.is_contiguous()
    assert_equal_to_reference((value, shapes, locations, weights))


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_chunked_computes_only_the_gradient_asked_for(wanted):
    value, shapes, locations, weights = make([(3, 4)])
    tensors = [value, locations, weights]
    expected = gradients(value, shapes, locations, weights, "grid_sample", torch.ones(2, 3, 6))
    leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(tensors)]
    deformable_attention(leaves[0], shapes, *leaves[1:], impl="chunked").sum().backward()
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i == wanted)
    torch.testing.assert_close(leaves[wanted].grad, expected[1 + wanted], rtol=0, atol=1e-12)


def test_chunked_refuses_second_derivatives():
    value, shapes, locations, weights = make([(3, 4)])
    value.requires_grad_()
    out = deformable_attention(value, shapes, locations, weights, impl="chunked").square().sum()
    (grad,) = torch.autograd.grad(out, value, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(("queries", "chunked"), [(511, False), (512, True)])
def test_auto_is_chunked_where_there_are_many_points(monkeypatch, queries, chunked):
    calls = []
    apply = sampled_sum.SampledSum.apply
    monkeypatch.setattr(
        sampled_sum.SampledSum, "apply", lambda *args: calls.append(1) or apply(*args)
    )
    arguments = make([(3, 4), (2, 2)], batch=1, queries=queries, points=4)
    out = deformable_attention(*arguments)
    assert bool(calls) == chunked
    expected = deformable_attention(*arguments, impl="grid_sample")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_chunked_keeps_nothing_but_its_arguments():
    value, shapes, locations, weights = make([(3, 4)])
    tensors = [x.requires_grad_() for x in (value, locations, weights)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        deformable_attention(value, shapes, locations, weights, impl="chunked")
    assert sorted(x.data_ptr() for x in kept) == sorted(x.data_ptr() for x in tensors)


def test_chunked_is_the_same_bit_for_bit_with_more_threads(monkeypatch):
    # Few points per chunk, so that many are made.
    monkeypatch.setattr(sampled_sum, "BACKWARD_POINTS", 2**10)
    arguments = make([(9, 11), (5, 6)], queries=400, dtype=torch.float32)
    grad_out = torch.randn(2, 400, 6)
    alone = gradients(*arguments, "chunked", grad_out)
    torch.set_num_threads(3)
    try:
        together = gradients(*arguments, "chunked", grad_out)
    finally:
        torch.set_num_threads(1)
    for one, three in zip(alone, together, strict=True):
        assert torch.equal(one, three)


class _Names(TorchDispatchMode):
    """The operators that are called."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called = [*getattr(self, "called", []), func.name()]
        return func(*args, **(kwargs or {}))


def test_chunked_is_one_operator_to_whoever_follows_shapes():
    """With steps of their own, the analysis of a network would take a minute."""
    with FakeTensorMode(), _Names() as seen:
        value, level_shapes, locations, weights = make([(50, 60), (25, 30)], queries=3750)
        seen.called = []
        out = deformable_attention(
            value.requires_grad_(), level_shapes, locations, weights, impl="chunked"
        )
    assert out.shape == (2, 3750, 2 * 3)
    assert "ctxops::sampled_sums" in seen.called
    assert len(seen.called) < 20


def test_chunked_runs_where_only_deterministic_operators_are_allowed():
    arguments = make([(3, 4)])
    torch.use_deterministic_algorithms(True)
    try:
        gradients(*arguments, "chunked", torch.ones(2, 3, 6))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("impl", IMPLS)
def test_images_queries_and_points_are_independent(impl):
    value, shapes, locations, weights = make([(3, 4), (2, 2)], batch=3, points=4)
    out = deformable_attention(value, shapes, locations, weights, impl=impl)
    alone = [
        deformable_attention(
            value[i, None], shapes, locations[i, None], weights[i, None], impl=impl
        )
        for i in range(3)
    ]
    torch.testing.assert_close(out, torch.cat(alone), rtol=0, atol=1e-12)
    moved = locations.clone()
    moved[:, 1] += 0.1
    difference = deformable_attention(value, shapes, moved, weights, impl=impl) - out
    assert (difference.abs().amax(dim=(0, 2)) > 1e-6).tolist() == [False, True, False]
    order = torch.tensor([2, 0, 3, 1])
    permuted = deformable_attention(
        value, shapes, locations[..., order, :], weights[..., order], impl=impl
    )
    torch.testing.assert_close(permuted, out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_hot_weights_select_a_bilinear_sample(impl):
    """Level 1, point 2 only; at a pixel's centre that is the pixel, half a pixel on the mean."""
    value, shapes, _, _ = make([(2, 2), (4, 8)], batch=1, heads=1)
    image = value[0, 4:, 0].view(4, 8, 3)
    weights = torch.zeros(1, 32, 1, 2, 3, dtype=torch.float64)
    weights[..., 1, 2] = 1
    locations = torch.rand(1, 32, 1, 2, 3, 2, dtype=torch.float64)
    centres = cell_centres((4, 8), dtype=torch.float64)
    locations[0, :, 0, 1, 2] = centres
    out = deformable_attention(value, shapes, locations, weights, impl=impl)
    assert torch.equal(out[0].view(4, 8, 3), image)
    locations[0, :, 0, 1, 2, 0] += 0.5 / 8
    shifted = deformable_attention(value, shapes, locations, weights, impl=impl)
    expected = (image + F.pad(image, [0, 0, 0, 1])[:, 1:]) / 2
    torch.testing.assert_close(shifted[0].view(4, 8, 3), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_are_summed_in_float32(impl, dtype):
    value, shapes, locations, weights = make([(5, 6), (3, 3)], points=8, dtype=torch.float32)
    low = value.to(dtype)
    grad_out = torch.randn(2, 3, 6).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        actual = gradients(low, shapes, locations, weights, impl, grad_out)
    assert [x.dtype for x in actual] == [dtype, dtype, torch.float32, torch.float32]
    wide = low.double(), shapes, locations.double(), weights.double()
    expected = gradients(*wide, "grid_sample", grad_out.double())
    # One rounding of the result, half a unit in the last place, on top of float32.
    eps = torch.finfo(dtype).eps
    for i, (low_x, wide_x) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(
            low_x.double(), wide_x, rtol=eps / 2 if i < 2 else 1e-5, atol=1e-5
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_arguments_all_in_half_precision_are_computed_in_float32(impl):
    value, shapes, locations, weights = make([(5, 6)], points=8, dtype=torch.bfloat16)
    grad_out = torch.randn(2, 3, 6).bfloat16()
    actual = gradients(value, shapes, locations, weights, impl, grad_out)
    wide = value.double(), shapes, locations.double(), weights.double()
    expected = gradients(*wide, "grid_sample", grad_out.double())
    for low_x, wide_x in zip(actual, expected, strict=True):
        assert low_x.dtype == torch.bfloat16
        # Half a unit in the last place: nothing but the result is rounded.
        torch.testing.assert_close(low_x.double(), wide_x, rtol=2**-8, atol=1e-5)


@needs_shared
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["unept_ms_deform_attn", "unept_ms_deform_attn_small"])
def test_stored_numbers(case, dtype, impl):
    tensors = load_file(GOLDENS / f"{case}.safetensors")
    tolerance = json.loads((GOLDENS / f"{case}.json").read_text())["tolerance"]
    actual = gradients(
        tensors["input.value"].to(dtype),
        [tuple(shape) for shape in tensors["input.spatial_shapes"].tolist()],
        tensors["input.sampling_locations"].to(dtype),
        tensors["input.attention_weights"].to(dtype),
        impl,
        tensors["input.grad_output"],
    )
    names = ["output", "grad_value", "grad_sampling_locations", "grad_attention_weights"]
    prefix, suffix = ("output_f64", "float64") if dtype == torch.float64 else ("output", "float32")
    for name, x in zip(names, actual, strict=True):
        atol = tolerance[f"output.{name}"][f"suggested_atol_{suffix}"]
        torch.testing.assert_close(x, tensors[f"{prefix}.{name}"], rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"value": torch.zeros(1, 12, 2, 3).int()}, TypeError, "value: .* got torch.int32; call"),
        ({"value": torch.zeros(1, 12, 6)}, ValueError, r"value: .*\(1, 12, 6\); tokens become"),
        (
            {"level_shapes": [(3, 5)]},
            ValueError,
            r"sizes \(H, W\) of 12 tokens .* got \[\(3, 5\)\]",
        ),
        ({"level_shapes": []}, ValueError, "level_shapes: expected sizes"),
        ({"level_shapes": [(-3, -4)]}, ValueError, "level_shapes: expected at least 1, got -3"),
        ({"weights": torch.zeros(1, 5, 1, 1, 2)}, ValueError, r"weights: expected \[1, Q, 2, 1, N"),
        ({"weights": torch.zeros(1, 5, 2, 2)}, ValueError, r"weights: .* got \(1, 5, 2, 2\)"),
        ({"locations": torch.zeros(1, 5, 2, 1, 1, 2)}, ValueError, "expand what is shared"),
        ({"impl": "fast"}, ValueError, "impl: expected one of 'auto', 'chunked', 'grid_sample'"),
    ],
)
def test_function_says_what_is_wrong(change, error, text):
    arguments = {
        "value": torch.zeros(1, 12, 2, 3),
        "level_shapes": [(3, 4)],
        "locations": torch.zeros(1, 5, 2, 1, 2, 2),
        "weights": torch.zeros(1, 5, 2, 1, 2),
        **change,
    }
    with pytest.raises(error, match=text):
        deformable_attention(**arguments)


def test_chunked_is_refused_elsewhere_than_on_a_cpu():
    value, shapes, locations, weights = make([(3, 4)])
    tensors = value.to("meta"), shapes, locations.to("meta"), weights.to("meta")
    with pytest.raises(
        ValueError, match="'chunked' runs on a CPU, got tensors on meta; use 'auto'"
    ):
        deformable_attention(*tensors, impl="chunked")
    assert deformable_attention(*tensors).shape == (2, 3, 6)


# The module.


def randomised(module, scale=0.3):
    """The module with every parameter random, so that nothing sits at an identity."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return module


def attention(**changes):
    arguments = {"embed_dim": 8, "num_heads": 2, "num_levels": 2, "num_points": 3, **changes}
    return DeformableAttention(**arguments)


def module_inputs(dtype=torch.float64):
    query = torch.randn(2, 6, 8, dtype=dtype)
    references = torch.rand(2, 6, 2, 2, dtype=dtype)
    value = torch.randn(2, 3 * 4 + 2, 8, dtype=dtype)
    return query, references, value, [(3, 4), (1, 2)]


@pytest.mark.parametrize("impl", IMPLS)
def test_module_equals_the_equation(impl):
    module = randomised(attention(impl=impl)).double()
    inputs = module_inputs()
    expected = oracle.module(module.state_dict(), *inputs, heads=2, points=3)
    torch.testing.assert_close(module(*inputs), expected, rtol=0, atol=1e-12)


def test_module_counts_are_those_of_the_paper():
    def count(levels):
        module = DeformableAttention(embed_dim=256, num_heads=8, num_levels=levels, num_points=16)
        return sum(p.numel() for p in module.parameters())

    assert (count(3), count(1)) == (427_648, 230_272)


def test_module_keys_are_those_of_the_published_weights():
    parts = ["sampling_offsets", "attention_weights", "value_proj", "output_proj"]
    expected = [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    assert list(attention().state_dict()) == expected


def test_initial_offsets_are_n_pixels_in_the_direction_of_the_head_with_equal_weights():
    module = attention(embed_dim=16, num_heads=8)
    out = module.sampling_offsets(torch.randn(1, 1, 16)).view(8, 2, 3, 2)
    r = 1.0
    directions = [(r, 0), (r, r), (0, r), (-r, r), (-r, 0), (-r, -r), (0, -r), (r, -r)]
    expected = torch.tensor(directions)[:, None, None] * torch.tensor([1.0, 2, 3])[:, None]
    torch.testing.assert_close(out, expected.expand(8, 2, 3, 2), rtol=0, atol=1e-5)
    logits = module.attention_weights(torch.randn(1, 1, 16))
    assert torch.equal(logits, torch.zeros(1, 1, 8 * 2 * 3))
    for layer in (module.value_proj, module.output_proj):
        assert layer.bias.abs().max() == 0
        bound = math.sqrt(6 / 32)
        assert 0.8 * bound < layer.weight.abs().max() <= bound


def test_zero_offsets_on_the_own_grid_are_two_projections_whatever_the_weights():
    module = randomised(attention(num_levels=1)).double()
    torch.nn.init.zeros_(module.sampling_offsets.weight)
    torch.nn.init.zeros_(module.sampling_offsets.bias)
    tokens = torch.randn(2, 12, 8, dtype=torch.float64)
    centres = cell_centres((3, 4), dtype=torch.float64)[None, :, None]
    out = module(tokens, centres, tokens, [(3, 4)])
    torch.testing.assert_close(out, module.output_proj(module.value_proj(tokens)))


def test_offsets_are_in_pixels_of_their_level():
    """One cell right everywhere: the value map moved left, zeros entering at the border."""
    module = randomised(attention(num_levels=1)).double()
    torch.nn.init.zeros_(module.sampling_offsets.weight)
    with torch.no_grad():
        module.sampling_offsets.bias.copy_(torch.tensor([1.0, 0.0]).repeat(6))
    tokens = torch.randn(1, 12, 8, dtype=torch.float64)
    centres = cell_centres((3, 4), dtype=torch.float64)[None, :, None]
    values = module.value_proj(tokens).view(1, 3, 4, 8)
    moved = F.pad(values, [0, 0, 0, 1])[:, :, 1:].flatten(1, 2)
    out = module(tokens, centres, tokens, [(3, 4)])
    torch.testing.assert_close(out, module.output_proj(moved))


def test_reference_points_of_one_image_serve_a_batch():
    module = randomised(attention())
    query, references, value, shapes = module_inputs(torch.float32)
    once = module(query, references[:1], value, shapes)
    assert torch.equal(once, module(query, references[:1].expand(2, -1, -1, -1), value, shapes))


def test_every_parameter_gets_a_gradient():
    module = randomised(attention())
    query, references, value, shapes = module_inputs(torch.float32)
    module(query, references, value, shapes).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in module.parameters())


def test_locations_and_softmax_are_in_float32_under_autocast(monkeypatch):
    seen = []
    from ctxops import deform_attention as module_file

    def spy(value, level_shapes, locations, weights, *, impl):
        seen.extend([value, locations, weights])
        return deformable_attention(value, level_shapes, locations, weights, impl=impl)

    monkeypatch.setattr(module_file, "deformable_attention", spy)
    module = randomised(attention())
    query, references, value, shapes = module_inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(query, references, value, shapes)
    out.float().square().sum().backward()
    assert [x.dtype for x in seen] == [torch.bfloat16, torch.float32, torch.float32]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        offsets = module.sampling_offsets(query).view(2, 6, 2, 2, 3, 2).float()
    sizes = torch.tensor([[4.0, 3.0], [2.0, 1.0]])[:, None]
    assert torch.equal(seen[1], references[:, :, None, :, None] + offsets / sizes)
    assert out.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in module.parameters())
    expected = module(query, references, value, shapes)
    assert F.cosine_similarity(out.float().flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"level_shapes": [(3, 4)]}, "level_shapes: expected 2 levels, got 1"),
        ({"level_shapes": [(3, 4), (2, 2)]}, "of 14 tokens together"),
        ({"reference_points": torch.zeros(3, 6, 2, 2)}, r"\[2 or 1, 6, 2, 2\], got \(3, 6, 2, 2\)"),
        ({"reference_points": torch.zeros(1, 6, 1, 2)}, "use cell_centres"),
        ({"query": torch.zeros(2, 6, 7)}, "query: expected 8 channels, got 7"),
        ({"value": torch.zeros(2, 14, 9)}, "value: expected 8 channels, got 9"),
    ],
)
def test_module_says_what_is_wrong(change, text):
    names = ["query", "reference_points", "value", "level_shapes"]
    arguments = dict(zip(names, module_inputs(torch.float32), strict=True)) | change
    with pytest.raises(ValueError, match=text):
        attention()(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"num_heads": 3}, ValueError, "num_heads and embed_dim: .* got 3 and 8"),
        ({"num_points": 0}, ValueError, "num_points: expected at least 1"),
        ({"num_levels": 1.5}, TypeError, "num_levels: expected an integer"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of"),
    ],
)
def test_constructor_says_what_is_wrong(change, error, text):
    with pytest.raises(error, match=text):
        attention(**change)


def test_module_shows_its_sizes():
    assert "num_levels=2, num_points=3, impl='auto'" in repr(attention())


@pytest.mark.slow
def test_module_compiles_in_one_graph():
    module = randomised(attention())
    query, references, value, shapes = module_inputs(torch.float32)
    compiled = torch.compile(module, fullgraph=True)
    expected = module(query, references, value, shapes)
    torch.testing.assert_close(
        compiled(query, references, value, shapes), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
def test_module_exports_with_standard_operators():
    module = randomised(attention())
    inputs = module_inputs(torch.float32)
    exported = torch.export.export(module, inputs)
    graphs = [m.graph for m in exported.graph_module.modules()]
    names = {str(node.target) for graph in graphs for node in graph.nodes}
    assert "aten.grid_sampler.default" in names
    assert not any("SampledSum" in name or "embedding_bag" in name for name in names)
    torch.testing.assert_close(exported.module()(*inputs), module(*inputs), rtol=1e-5, atol=1e-5)
