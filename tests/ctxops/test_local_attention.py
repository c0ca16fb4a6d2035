"""Window attention against loops, special cases, its own forms and stored numbers."""

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ctxops import local_tiles
from ctxops.attention import SIMILARITIES, mixture_attention
from ctxops.local_attention import IMPLS, local_mixture_attention
from tests.oracles import mixture as oracle
from tests.shared_data import SHARED, needs_shared

FAST = ["loop", "chunked"]
SIZES = [(5, 7), (1, 1), (2, 13), (9, 1), (4, 8)]


def make(batch=2, size=(5, 7), width=8, values=3, parts=2, dtype=torch.float64):
    """Query, key, value and mixture."""
    maps = [torch.randn(batch, c, *size).to(dtype) for c in (width, width, values)]
    return [*maps, torch.randn(batch, parts).to(dtype).softmax(1)]


def attend(arguments, impl, similarity="euclidean", window=5, scale=0.3, **options):
    return local_mixture_attention(
        *arguments, window=window, similarity=similarity, scale=scale, impl=impl, **options
    )


def with_gradients(arguments, impl, weight, **options):
    """Output and the gradients of all arguments."""
    leaves = [x.detach().requires_grad_() for x in arguments]
    out = attend(leaves, impl, **options)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(("size", "window", "parts"), [*((s, 3, 2) for s in SIZES), ((3, 4), 5, 4)])
def test_equals_the_equation(impl, similarity, size, window, parts):
    arguments = make(1, size, 8, 3, parts)
    how = {"similarity": similarity, "window": window, "scale": 0.3}
    expected = oracle.local_mixture_attention(*arguments, **how)
    torch.testing.assert_close(attend(arguments, impl, **how), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("size", [*SIZES, (9, 19)])
@pytest.mark.parametrize("window", [1, 5, 7])
def test_fast_forms_equal_unfold(impl, similarity, size, window):
    arguments = make(size=size, parts=4)
    weight = torch.randn_like(arguments[2])
    how = {"similarity": similarity, "window": window}
    expected = with_gradients(arguments, "unfold", weight, **how)
    actual = with_gradients(arguments, impl, weight, **how)
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(actual[1:], expected[1:], rtol=0, atol=1e-11)


@pytest.mark.parametrize("impl", ["unfold", *FAST])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_gradcheck(impl, similarity):
    arguments = [x.requires_grad_() for x in make(1, (3, 2), 4, 2)]
    assert torch.autograd.gradcheck(lambda *x: attend(x, impl, similarity, 3), arguments)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 11), st.integers(1, 20)),
    window=st.sampled_from([1, 3, 5]),
    parts=st.sampled_from([1, 2, 4]),
    similarity=st.sampled_from(SIMILARITIES),
    chunk=st.sampled_from([1, 20_000, 60_000, 2**30]),
    tile=st.tuples(st.integers(1, 5), st.integers(1, 9)),
)
def test_chunked_equals_unfold_for_any_size_chunk_and_tile(
    batch, size, window, parts, similarity, chunk, tile
):
    arguments = make(batch, size, 8, 3, parts)
    weight = torch.randn_like(arguments[2])
    how = {"similarity": similarity, "window": window}
    expected = with_gradients(arguments, "unfold", weight, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_tiles, "CHUNK_BYTES_CPU", chunk)
        patch.setattr(local_tiles, "TILE_HEIGHT", tile[0])
        patch.setattr(local_tiles, "TILE_WIDTH", tile[1])
        actual = with_gradients(arguments, "chunked", weight, **how)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (122, 122), (4, 8), (5, 17)])
def test_tiles_cover_a_map_with_little_overhang(size):
    tile = local_tiles.tile_size(*size)
    limits = local_tiles.TILE_HEIGHT, local_tiles.TILE_WIDTH
    for extent, side, limit in zip(size, tile, limits, strict=True):
        number = -(-extent // limit)
        assert side <= limit
        assert 0 <= number * side - extent < number


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_on_one_pixel_the_key_competes_with_zero_keys(impl, similarity):
    query, key, value, mixture = make(size=(1, 1), parts=1)
    out = attend((query, key, value, mixture), impl, similarity)
    if similarity == "dot":
        logit, zero = (query * key).sum(1, True), torch.zeros(2, 1, 1, 1).double()
    else:
        logit, zero = -(query - key).square().sum(1, True), -query.square().sum(1, True)
    real, zeros = (0.3 * logit).exp(), 24 * (0.3 * zero).exp()
    torch.testing.assert_close(out, value * real / (real + zeros), rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_covering_window_is_global_attention_with_zero_keys_added(impl, similarity):
    arguments = make(size=(3, 4), parts=2)
    query, key, value = (x.flatten(2).mT for x in arguments[:3])
    zeros = 7 * 7 - 3 * 4
    key, value = F.pad(key, (0, 0, 0, zeros)), F.pad(value, (0, 0, 0, zeros))
    how = {"similarity": similarity, "scale": 0.3}
    expected = mixture_attention(query, key, value, arguments[3], impl="naive", **how)
    out = attend(arguments, impl, window=7, **how)
    torch.testing.assert_close(out.flatten(2).mT, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("which", [1, 2])
def test_a_coarse_position_reaches_the_queries_around_it_only(impl, which):
    arguments = make(1, (9, 13))
    before = attend(arguments, impl)
    arguments[which][..., 4, 5] += 1
    changed = (attend(arguments, impl) - before).abs().amax((0, 1))
    assert changed[2:7, 3:8].min() > 1e-6
    changed[2:7, 3:8] = 0
    assert changed.max() < 1e-14


@pytest.mark.parametrize("impl", IMPLS)
def test_constant_values_come_back_inside(impl):
    arguments = make(size=(8, 9))
    arguments[2] = torch.full_like(arguments[2], 3.0)
    out = attend(arguments, impl)
    torch.testing.assert_close(out[..., 2:-2, 2:-2], arguments[2][..., 2:-2, 2:-2])
    assert (out[..., 0, :] < 3).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_images_of_a_batch_do_not_mix(impl):
    arguments = make(3)
    alone = [attend([x[i : i + 1] for x in arguments], impl) for i in range(3)]
    torch.testing.assert_close(attend(arguments, impl), torch.cat(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_windows_commute_with_transposition(impl, similarity):
    *maps, mixture = make(size=(6, 11))
    turned = attend([*(x.mT for x in maps), mixture], impl, similarity)
    torch.testing.assert_close(turned.mT, attend([*maps, mixture], impl, similarity))


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed", "expanded"])
def test_memory_layout_does_not_matter(impl, layout):
    *maps, mixture = make(size=(6, 11))
    if layout == "channels_last":
        laid_out = [x.to(memory_format=torch.channels_last) for x in maps]
    elif layout == "sliced":
        laid_out = [F.pad(x, [1, 2, 3, 4])[..., 3:-4, 1:-2] for x in maps]
    elif layout == "transposed":
        laid_out = [x.mT.contiguous().mT for x in maps]
    else:
        maps = [x[..., :1, :1].expand_as(x) for x in maps]
        laid_out = maps
    weight = torch.ones(()).double().expand_as(maps[2])
    expected = with_gradients([*(x.contiguous() for x in maps), mixture], "unfold", weight)
    actual = with_gradients([*laid_out, mixture], impl, weight)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("wanted", range(4))
def test_only_the_gradient_asked_for(similarity, wanted):
    arguments = make()
    expected = with_gradients(arguments, "unfold", 1.0, similarity=similarity)[1 + wanted]
    arguments[wanted].requires_grad_()
    attend(arguments, "chunked", similarity).sum().backward()
    torch.testing.assert_close(arguments[wanted].grad, expected, rtol=0, atol=1e-11)
    assert [x.grad is None for x in arguments].count(True) == 3


def test_chunked_refuses_second_derivatives():
    arguments = make()
    arguments[0].requires_grad_()
    out = attend(arguments, "chunked").square().sum()
    (grad,) = torch.autograd.grad(out, arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_float32_errors_are_those_of_unfold(impl, similarity):
    arguments = make(1, (17, 19), 64, 64, 4, torch.float32)
    weight = torch.randn_like(arguments[2])
    how = {"similarity": similarity, "scale": 1 / 8}
    exact = with_gradients([x.double() for x in arguments], "unfold", weight.double(), **how)
    actual = with_gradients(arguments, impl, weight, **how)
    for got, expected in zip(actual, exact, strict=True):
        # Some tens of roundings of the largest entry; unfold itself has half of that.
        assert (got - expected).abs().max() < 4e-6 * expected.abs().max()


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_stay_finite(impl):
    *maps, mixture = make(dtype=torch.float32)
    for similarity in SIMILARITIES:
        arguments = [*(100 * x for x in maps), mixture]
        results = with_gradients(arguments, impl, 1.0, similarity=similarity)
        assert all(x.isfinite().all() for x in results)


def test_a_non_finite_pixel_stays_near_its_tile():
    arguments = make(1, (20, 60), dtype=torch.float32)
    arguments[2][..., 10, 30] = torch.inf
    spread = attend(arguments, "chunked").isfinite().all(1).logical_not()
    rows, columns = spread[0].nonzero().unbind(1)
    assert (rows - 10).abs().max() <= local_tiles.TILE_HEIGHT + 2
    assert (columns - 30).abs().max() <= local_tiles.TILE_WIDTH + 2


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_is_off_at_zero_and_keeps_the_mean(impl):
    arguments = make(1, (30, 30), dtype=torch.float32)
    arguments[2] = torch.ones_like(arguments[2])
    kept = attend(arguments, impl)
    assert torch.equal(kept, attend(arguments, impl, dropout_p=0.0))
    dropped = attend(arguments, impl, dropout_p=0.5)
    assert (dropped - kept).std() > 0.05
    # 900 x 25 x 2 weights: the mean of the outputs varies by about 0.01.
    assert abs(dropped.mean() - kept.mean()) < 0.05


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_half_precision_under_autocast(impl, similarity):
    arguments = make(1, (5, 9), 16, 8, 2, torch.bfloat16)
    exact = with_gradients([x.double() for x in arguments], "unfold", 1.0, similarity=similarity)
    leaves = [x.requires_grad_() for x in arguments]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(leaves, impl, similarity)
    actual = [out, *torch.autograd.grad(out.sum(), leaves)]
    assert all(x.dtype == torch.bfloat16 for x in actual)
    for got, expected in zip(actual, exact, strict=True):
        # Only the last rounding remains, half a unit in the last place of 8 bits.
        atol = 2**-9 * expected.abs().max().item()
        torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=atol)


@needs_shared
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_stored_numbers(similarity, impl, dtype):
    folder = SHARED / "goldens" / "dev"
    case = {"dot": "mos_local_dot", "euclidean": "mos_local_euclid"}[similarity]
    tensors = load_file(folder / f"{case}.safetensors")
    notes = json.loads((folder / f"{case}.json").read_text())
    leaves = [tensors[f"input.{n}"].to(dtype).requires_grad_() for n in "qkv"]
    pi_logits = tensors["input.pi_logits"].to(dtype).requires_grad_()
    scale = notes["constructor"]["scale"]
    out = attend((*leaves, pi_logits.softmax(1)), impl, similarity, 5, scale)
    (out * tensors["input.grad_output"]).sum().backward()
    actual = {"output": out, "grad_pi_logits": pi_logits.grad}
    actual |= {f"grad_{n}": x.grad for n, x in zip("qkv", leaves, strict=True)}
    suffix = str(dtype).removeprefix("torch.")
    for name, value in actual.items():
        atol = notes["tolerance"][f"output.{name}"][f"suggested_atol_{suffix}"]
        expected = tensors[f"output.{name}"]
        torch.testing.assert_close(value.double(), expected.double(), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"query": torch.zeros(8, 5, 7)}, ValueError, "query: expected a non-empty map"),
        ({"key": torch.zeros(2, 4, 5, 7)}, ValueError, "key: expected 8 channels, got 4"),
        ({"key": torch.zeros(2, 8, 3, 4)}, ValueError, "one batch and map size, .* equal size"),
        ({"value": torch.zeros(1, 3, 5, 7)}, ValueError, "one batch and map size"),
        ({"value": torch.zeros(2, 3, 5, 7).int()}, TypeError, "value: .* got torch.int32"),
        ({"mixture": torch.zeros(2, 3)}, ValueError, "got 3 and 8; use .* instead of 3"),
        ({"window": 4}, ValueError, "window: expected an odd size, got 4; use 3 or 5"),
        ({"window": 3.0}, TypeError, "window: expected an integer"),
        ({"similarity": "cosine"}, ValueError, "'dot', 'euclidean', got 'cosine'"),
        ({"impl": "sdpa"}, ValueError, "impl: expected one of 'auto'.* got 'sdpa'"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p: expected a probability"),
    ],
)
def test_says_what_is_wrong(change, error, text):
    names = ("query", "key", "value", "mixture")
    arguments = dict(zip(names, make(dtype=torch.float32), strict=True))
    how = {"window": 5, "similarity": "dot", "scale": 1.0, **change}
    with pytest.raises(error, match=text):
        local_mixture_attention(**{**arguments, **how})


class Attend(torch.nn.Module):
    def forward(self, query, key, value, mixture):
        return attend((query, key, value, mixture), "auto", window=3)


@pytest.mark.slow
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_compiles_in_one_graph(similarity):
    torch.compiler.reset()
    arguments = make(dtype=torch.float32)
    compiled = torch.compile(attend, fullgraph=True)
    leaves = [x.clone().requires_grad_() for x in arguments]
    out = compiled(leaves, "auto", similarity, 3)
    grads = torch.autograd.grad(out.sum(), leaves)
    expected = with_gradients(arguments, "unfold", 1.0, similarity=similarity, window=3)
    torch.testing.assert_close([out.detach(), *grads], expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_exports():
    arguments = make(dtype=torch.float32)
    program = torch.export.export(Attend(), tuple(arguments))
    expected = attend(arguments, "unfold", window=3)
    torch.testing.assert_close(program.module()(*arguments), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_gpu_equals_cpu(impl, similarity):
    arguments = make(2, (27, 41), 16, 16, 4)
    weight = torch.randn_like(arguments[2])
    expected = with_gradients(arguments, "unfold", weight, similarity=similarity)
    on_gpu = [x.cuda() for x in arguments]
    actual = with_gradients(on_gpu, impl, weight.cuda(), similarity=similarity)
    torch.testing.assert_close([x.cpu() for x in actual], expected, rtol=0, atol=1e-11)
