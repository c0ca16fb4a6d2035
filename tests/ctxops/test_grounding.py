"""Self-, Grounding and locality-constrained Grounding Transformer against the equations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn

from ctxops.grounding import GroundingTransformer, LocalGroundingTransformer, SelfTransformer
from ctxops.local_attention import local_mixture_attention
from ctxops.mixture import MixtureWeights, pool_keys
from tests.ctxops.fpt_parts import close, count, gradients, lively, maps
from tests.oracles import fpt as oracle

CLASSES = {"st": SelfTransformer, "gt": GroundingTransformer, "lgt": LocalGroundingTransformer}
# A fine and a coarse map; ST takes the first, LGT needs one size.
SIZES = {"st": [(5, 4)], "gt": [(5, 4), (3, 2)], "lgt": [(5, 4), (5, 4)]}


def tiny(kind, **changes):
    return CLASSES[kind](**{"channels": 8, "norm": "BN", **changes})


def inputs(kind, **options):
    return maps(*SIZES[kind], **options)


class Named(nn.Module):
    """A module whose state dict has the prefix the oracle asks for."""

    def __init__(self, module):
        super().__init__()
        self.m = module


def compare(kind, module, features, **options):
    weights = Named(lively(module)).state_dict()
    window = {"window": module.window} if kind == "lgt" else {}
    function = oracle.self_transformer if kind == "st" else oracle.grounding_transformer
    for index, actual in enumerate(module(*features)):
        image = [x[index] for x in features]
        close(actual, function(*image, weights, "m", **window, **options))


@pytest.mark.parametrize("norm", ["BN", ""])
@pytest.mark.parametrize("kind", CLASSES)
def test_equals_the_equations(kind, norm):
    compare(kind, tiny(kind, norm=norm), inputs(kind, batch=2))


@pytest.mark.parametrize("kind", CLASSES)
def test_equals_the_equations_with_group_norm(kind):
    features = [x[..., :3, :2] for x in inputs(kind, channels=64)]
    compare(kind, tiny(kind, channels=64, norm="GN"), features)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"parts": 1}, {}),
        ({"parts": 8}, {}),
        ({"inner_channels": 12}, {}),
        ({"similarity": "dot"}, {"similarity": "dot"}),
        ({"similarity": "euclidean"}, {"similarity": "euclidean"}),
        ({"scale": "none"}, {"scale": 1.0}),
        ({"scale": 0.2}, {"scale": 0.2}),
        ({"pi_from": "query"}, {"pi_from": "query"}),
    ],
)
@pytest.mark.parametrize("kind", CLASSES)
def test_options_equal_the_equations(kind, changes, options):
    compare(kind, tiny(kind, **changes), inputs(kind), **options)


@pytest.mark.parametrize("size", [(7, 5), (1, 1), (1, 6), (4, 4)])
@pytest.mark.parametrize("kv_pool", [1, 2, 3])
def test_st_pools_keys_and_values(kv_pool, size):
    compare("st", tiny("st", kv_pool=kv_pool), maps(size), kv_pool=kv_pool)
    assert pool_keys(maps(size)[0], stride=2).shape[2:] == tuple((n + 1) // 2 for n in size)


def test_st_shares_the_projection_of_queries_and_keys():
    module = tiny("st", share_qk=True)
    assert not any(key.startswith("key") for key in module.state_dict())
    compare("st", module, maps((4, 3)))


@pytest.mark.parametrize("window", [1, 3, 7])
def test_lgt_window(window):
    compare("lgt", tiny("lgt", window=window), inputs("lgt"))


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (6, 3)])
@pytest.mark.parametrize("kind", CLASSES)
def test_thin_maps(kind, size):
    compare(kind, tiny(kind), maps(*[size] * len(SIZES[kind])))


@pytest.mark.parametrize("kind", CLASSES)
def test_implementations_agree(kind):
    impls = ["loop", "unfold", "chunked"] if kind == "lgt" else ["naive", "sdpa", "chunked"]
    reference, features = lively(tiny(kind)), inputs(kind, batch=2)
    for impl in impls:
        module = tiny(kind, impl=impl).double().eval()
        module.load_state_dict(reference.state_dict())
        close(module(*features), reference(*features))


@pytest.mark.parametrize("kind", CLASSES)
def test_gradcheck(kind):
    module = lively(tiny(kind, channels=4, norm=""))
    features = [x[..., :3, :2].clone().requires_grad_() for x in inputs(kind, channels=4)]
    assert torch.autograd.gradcheck(module, features)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("parts", [2, 4])
def test_weights_of_the_parts(kind, parts):
    module = tiny(kind, parts=parts, norm="")
    pi = module.mixture(maps((3, 4), batch=3, dtype=torch.float32)[0])
    close(pi.sum(1), torch.ones(3), atol=1e-6)
    assert pi.shape == (3, parts)
    assert pi.std(1).min() > 1e-4
    assert gradients(module, *inputs(kind, dtype=torch.float32))["mixture.weight"] > 1e-7


def test_initial_weights_of_the_parts():
    weight = MixtureWeights(channels=4096, parts=4).weight
    assert weight.abs().max() <= 0.5
    assert weight.abs().max() > 0.499
    assert weight.var().item() == pytest.approx(1 / 12, rel=0.05)
    assert dict(MixtureWeights(channels=6, parts=1).named_parameters()) == {}


@pytest.mark.parametrize("kind", CLASSES)
def test_initial_convolutions(kind):
    module = tiny(kind, channels=256, norm="")
    for conv in (module.query, module.key, module.value, module.output.conv):
        assert conv.weight.var().item() == pytest.approx(1 / 256, rel=0.05)
        assert conv.weight.abs().max() <= (3 / 256) ** 0.5
        assert conv.bias is None or conv.bias.abs().max() == 0


@settings(max_examples=15, deadline=None)
@given(height=some.integers(1, 5), width=some.integers(1, 5), seed=some.integers(0, 99))
def test_st_is_equivariant_to_permuting_positions(height, width, seed):
    module, (x,) = lively(tiny("st")), maps((height, width))
    order = torch.randperm(height * width, generator=torch.Generator().manual_seed(seed))

    def permuted(y):
        return y.flatten(2)[..., order].unflatten(2, (height, width))

    close(module(permuted(x)), permuted(module(x)))


@settings(max_examples=15, deadline=None)
@given(height=some.integers(1, 4), width=some.integers(1, 5), seed=some.integers(0, 99))
def test_gt_is_invariant_to_permuting_coarse_positions(height, width, seed):
    module, (fine, coarse) = lively(tiny("gt")), maps((5, 3), (height, width))
    order = torch.randperm(height * width, generator=torch.Generator().manual_seed(seed))
    permuted = coarse.flatten(2)[..., order].unflatten(2, (height, width))
    close(module(fine, permuted), module(fine, coarse))


@pytest.mark.parametrize("kind", ["st", "gt"])
def test_values_are_averaged_with_weights_that_sum_to_one(kind):
    """Equal values give that value, whatever the queries and keys are."""
    module = lively(tiny(kind, norm=""))
    nn.init.zeros_(module.value.weight)
    features = inputs(kind)
    constant = module.output.conv(module.value.bias[None, :, None, None])
    out = module(*features) - (features[0] if kind == "st" else 0)
    close(out, constant.expand_as(out))


def test_gt_sees_distances_only():
    """One vector added to all queries and keys changes nothing while pi stays."""
    module, features = lively(tiny("gt", parts=1)), inputs("gt")
    before = module(*features)
    with torch.no_grad():
        module.query.bias += 1.5
        module.key.bias += 1.5
    close(module(*features), before)


def test_lgt_outside_of_a_single_pixel_competes():
    """1x1 map, window 5: 24 zero keys share the softmax with the one real key."""
    module = lively(tiny("lgt", parts=1, norm=""))
    fine, coarse = maps((1, 1), (1, 1))
    query, key = module.query(fine), module.key(coarse)
    real = (-module.scale * (query - key).square().sum()).exp()
    zero = (-module.scale * query.square().sum()).exp()
    share = real / (real + 24 * zero)
    close(module(fine, coarse), module.output(share * module.value(coarse)))


def test_lgt_of_a_covering_window_is_gt_with_zero_keys():
    size = 3, 2
    features = maps(size, size)
    local = lively(tiny("lgt", window=7, parts=4, norm=""))
    query, key, value, pi = local.project(*features)
    zeros = 49 - 6
    padded = [torch.cat([y.flatten(2), y.new_zeros(1, 8, zeros)], 2)[0].T for y in (key, value)]
    pixels = query.flatten(2)[0].T
    out = [oracle.mos_pixel(q, *padded, pi[0], "euclidean", local.scale) for q in pixels]
    expected = torch.stack(out, 1).unflatten(1, size)[None]
    close(local(*features), local.output(expected))


def test_lgt_reaches_its_window_only():
    query, key, value = maps((9, 9), (9, 9), (9, 9))
    pi = torch.full((1, 4), 0.25).double()

    def attention(key, value):
        return local_mixture_attention(
            query, key, value, pi, window=5, similarity="euclidean", scale=0.3
        )

    moved = [y.clone() for y in (key, value)]
    for y in moved:
        y[..., 4, 4] += 1
    difference = (attention(*moved) - attention(key, value)).abs().amax(1)[0]
    assert difference[2:7, 2:7].min() > 1e-9
    difference[2:7, 2:7] = 0
    assert difference.max() == 0


@pytest.mark.parametrize("kind", CLASSES)
def test_images_of_a_batch_do_not_mix(kind):
    module = lively(tiny(kind, channels=32, norm="GN"))
    features = inputs(kind, channels=32, batch=3)
    close(module(*features)[1:2], module(*[x[1:2] for x in features]))


@pytest.mark.parametrize("kind", CLASSES)
def test_memory_layout_does_not_matter(kind):
    module, features = lively(tiny(kind)), inputs(kind, batch=2)
    before = module(*features)
    close(module(*[x.to(memory_format=torch.channels_last) for x in features]), before)
    close(module(*[x.mT.contiguous().mT for x in features]), before)


@pytest.mark.parametrize("kind", CLASSES)
def test_bfloat16_autocast(kind):
    module = tiny(kind, channels=32, norm="GN")
    features = inputs(kind, channels=32, dtype=torch.float32)
    high = module(*features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = module(*features)
        largest = gradients(module, *features)
    assert (low - high).abs().max() < 0.06 * high.abs().max()
    assert all(0 < value < float("inf") for value in largest.values())


@pytest.mark.parametrize(
    ("kind", "changes", "dead"),
    [
        ("st", {"norm": ""}, set()),
        ("st", {"norm": "GN"}, set()),
        ("st", {"norm": "GN", "kv_pool": 2}, set()),
        ("st", {"norm": "GN", "share_qk": True}, set()),
        ("st", {"norm": "GN", "parts": 1}, {"key.bias"}),
        ("st", {"norm": "GN", "pi_from": "query"}, {"key.bias"}),
        ("st", {"norm": "BN"}, {"value.bias"}),
        ("st", {"norm": "SyncBN"}, {"value.bias"}),
        ("st", {"norm": "BN", "parts": 1}, {"key.bias", "value.bias"}),
        ("st", {"norm": "GN", "similarity": "euclidean", "parts": 1}, set()),
        ("gt", {"norm": ""}, set()),
        ("gt", {"norm": "GN"}, set()),
        ("gt", {"norm": "GN", "parts": 1}, set()),
        ("gt", {"norm": "BN"}, {"value.bias"}),
        ("gt", {"norm": "SyncBN"}, {"value.bias"}),
        ("gt", {"norm": "GN", "similarity": "dot", "pi_from": "query"}, {"key.bias"}),
        ("lgt", {"norm": ""}, set()),
        ("lgt", {"norm": "GN"}, set()),
        ("lgt", {"norm": "BN"}, set()),
    ],
)
def test_exactly_these_parameters_get_no_gradient(kind, changes, dead):
    """A shift of all logits cancels in the softmax, one of a whole channel in batch norm."""
    module = tiny(kind, channels=64, **changes).double()
    largest = gradients(module, *inputs(kind, channels=64, batch=2))
    assert {name for name, value in largest.items() if value < 1e-9} == dead


@pytest.mark.parametrize("kind", ["gt", "lgt"])
def test_zero_gamma_starts_with_zeros(kind):
    module = tiny(kind, channels=32, norm="GN", zero_gamma=True)
    features = inputs(kind, channels=32, dtype=torch.float32)
    assert module(*features).abs().max() == 0
    assert gradients(module, *features)["output.norm.weight"] > 1e-3
    assert tiny(kind, channels=32, norm="GN")(*features).abs().max() > 0.1


@pytest.mark.parametrize("kind", CLASSES)
def test_dropout_in_training_only(kind):
    module, features = lively(tiny(kind, attn_dropout=0.5)), inputs(kind)
    plain = tiny(kind).double().eval()
    plain.load_state_dict(module.state_dict())
    close(module(*features), plain(*features))
    for part in (module, plain):
        part.train()
        part.output.eval()
    close(plain(*features), plain(*features))
    assert (module(*features) - module(*features)).abs().max() > 1e-3
    mean = torch.stack([module(*features) for _ in range(300)]).mean(0)
    spread = plain(*features).std()
    assert (mean - plain(*features)).abs().max() < 0.5 * spread


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("st", {}, 263_936),
        ("st", {"kv_pool": 2}, 263_936),
        ("st", {"share_qk": True}, 263_936 - 65_792),
        ("st", {"parts": 1}, 263_936 - 512),
        ("gt", {}, 264_448),
        ("gt", {"inner_channels": 128}, 3 * 32_896 + 32_768 + 512 + 4 * 128),
        ("lgt", {}, 263_680),
    ],
)
def test_number_of_parameters(kind, changes, expected):
    with torch.device("meta"):
        assert count(tiny(kind, channels=256, norm="GN", **changes)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSES)
def test_compile_and_export_give_the_same_numbers(kind):
    module, features = lively(tiny(kind)), tuple(inputs(kind))
    torch.compiler.reset()
    close(torch.compile(module, fullgraph=True)(*features), module(*features))
    close(torch.export.export(module, features).module()(*features), module(*features))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CLASSES)
def test_gpu_equals_cpu(kind):
    module, features = lively(tiny(kind)), inputs(kind, batch=2)
    before = module(*features)
    close(module.cuda()(*[x.cuda() for x in features]).cpu(), before)


@pytest.mark.parametrize(
    ("kind", "changes", "error", "text"),
    [
        ("st", {"parts": 3}, ValueError, "parts and inner_channels: .* got 3 and 8; use"),
        ("st", {"parts": 0}, ValueError, "parts: expected at least 1, got 0"),
        ("st", {"kv_pool": 0}, ValueError, "kv_pool: expected at least 1, got 0"),
        ("st", {"kv_pool": 2.0}, TypeError, "kv_pool: expected an integer, got 2.0"),
        ("st", {"similarity": "cosine"}, ValueError, "'dot', 'euclidean', got 'cosine'"),
        ("st", {"pi_from": "value"}, ValueError, "pi_from: expected one of 'key', 'query'"),
        ("st", {"scale": "sqr"}, ValueError, "scale: expected one of 'sqrt', 'none', got 'sqr'"),
        ("st", {"scale": None}, TypeError, "scale: expected 'sqrt', 'none' or a number, got None"),
        ("gt", {"scale": 0.0}, ValueError, "scale: expected a positive number, got 0.0"),
        ("gt", {"attn_dropout": 1.0}, ValueError, r"attn_dropout: expected a probability in \[0"),
        ("gt", {"impl": "loop"}, ValueError, "impl: expected one of 'auto', 'sdpa'.* got 'loop'"),
        ("gt", {"norm": "", "zero_gamma": True}, ValueError, "zero_gamma: .* got norm=''; use"),
        ("gt", {"inner_channels": 0}, ValueError, "inner_channels: expected at least 1"),
        ("gt", {"norm": "LN"}, ValueError, "norm: expected one of"),
        ("lgt", {"window": 4}, ValueError, "window: expected an odd size, got 4; use 3 or 5"),
        ("lgt", {"impl": "sdpa"}, ValueError, "impl: expected one of .*'loop'.* got 'sdpa'"),
    ],
)
def test_constructor_says_what_is_wrong(kind, changes, error, text):
    with pytest.raises(error, match=text):
        tiny(kind, **changes)


def test_forward_says_what_is_wrong():
    x, small, other = maps((4, 4), (2, 2), (4, 4))
    with pytest.raises(ValueError, match="x: expected 8 channels, got 6"):
        tiny("st")(x[:, :6])
    with pytest.raises(TypeError, match=r"fine: .* got torch.int64; call .float"):
        tiny("gt")(x.long(), small)
    for kind in ("gt", "lgt"):
        with pytest.raises(ValueError, match="expected one batch size, got 1 and 2; pass two"):
            tiny(kind)(x, other.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match=r"of one size, got \(4, 4\) and \(2, 2\); use Ground"):
        tiny("lgt")(x, small)
