"""The Squeeze Reasoning module: equations, stored numbers, parameters, costs, properties."""

import json

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file
from torch import nn

from ctxops.sr import SqueezeReasoning, SqueezeReasoningGate, convert_released_state
from tests.ctxops.test_squeeze import count, randomized
from tests.oracles import squeeze as oracle
from tests.shared_data import SHARED, needs_shared

EXACT = {"rtol": 0, "atol": 1e-11}
SMALL = {"in_channels": 32, "nodes": 4}  # p = 16, d = 4
VARIANTS = {
    "default": {},
    "plain_norms": {"norm": "BN"},
    "gap": {"squeeze": "gap"},
    "sum": {"pool": "sum"},
    "sa": {"reason": "sa"},
    "sa_literal": {"reason": "sa", "sa_softmax": False},
    "fc": {"reason": "fc"},
    "no_reason": {"reason": "none"},
    "released_adj": {"adj": "released"},
    "full": {"wr": "full"},
    "full_gap": {"wr": "full", "squeeze": "gap"},
    "full_gn": {"wr": "full", "norm": "GN"},
    "no_norms": {"norm": "", "node_norm": ""},
    "layer_norm": {"node_norm": "LN"},
}


def build(**options):
    return SqueezeReasoning(**{**SMALL, **options})


def expected_output(module, x, **options):
    state = module.state_dict()
    inner = {k.removeprefix("reason."): v for k, v in state.items() if k.startswith("reason.")}
    kinds = {
        "gcn": lambda g: oracle.graph(g, inner, adj=options.get("adj", "paper")),
        "sa": lambda g: oracle.attention(g, inner, softmax=options.get("sa_softmax", True)),
        "fc": lambda g: oracle.fully_connected(g, inner),
        "none": lambda g: g,
    }
    images = [
        oracle.squeeze_reasoning(
            image,
            state,
            kinds[options.get("reason", "gcn")],
            nodes=module.nodes,
            pool=options.get("pool", "mean"),
            norm_groups=32 if options.get("norm") == "GN" else None,
        )
        for image in x
    ]
    return torch.stack(images)


# ---- equations ---------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(3, 4), (1, 1), (5, 1)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_equations(variant, size):
    options = VARIANTS[variant]
    module = randomized(build(**options))
    x = torch.randn(2, 32, *size, dtype=torch.float64)
    expected = expected_output(module, x, **options)
    # A group of one value at 1x1 has variance 0: rounding is magnified by 1 / sqrt(1e-5).
    atol = 1e-8 if options.get("norm") == "GN" else 1e-11
    torch.testing.assert_close(module(x), expected, rtol=1e-11, atol=atol)


@pytest.mark.parametrize("reduction", [1, 4])
def test_other_reductions_equal_the_equations(reduction):
    module = randomized(build(reduction=reduction))
    x = torch.randn(1, 32, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(module(x), expected_output(module, x), rtol=1e-11, atol=1e-11)


def test_group_norm_with_grouped_expansion_equals_the_equations():
    module = randomized(build(in_channels=128, norm="GN"))
    x = torch.randn(1, 128, 2, 3, dtype=torch.float64)
    expected = expected_output(module, x, norm="GN")
    torch.testing.assert_close(module(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant):
    module = randomized(build(**VARIANTS[variant]))
    x = torch.randn(1, 32, 2, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 32, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: (module(x) * weight).sum(), x)


# ---- stored numbers of the released module -----------------------------------------------------
def stored(case, dtype=torch.float64):
    """Reference arguments, weights and outputs of a case, and its tolerances."""
    folder = SHARED / "goldens" / "dev"
    about = json.loads((folder / f"{case}.json").read_text())
    weights = load_file(folder / f"{case}.weights.safetensors")
    weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
    tensors = load_file(folder / f"{case}.safetensors")
    return about["constructor"], weights, tensors, about["tolerance"]


def assert_stored(actual, tensors, tolerance, dtype):
    """Compare with the stored run of the same precision where there is one, else float32's."""
    suffix = str(dtype).removeprefix("torch.")
    for name, value in actual.items():
        wide = dtype == torch.float64 and f"output_f64.{name}" in tensors
        limits = tolerance[f"output.{name}"]
        atol = limits[f"suggested_atol_{suffix}" if wide else "suggested_atol_float32"]
        reference = tensors[f"output_f64.{name}" if wide else f"output.{name}"]
        torch.testing.assert_close(value.double(), reference.double(), rtol=0, atol=atol, msg=name)


CASES = ["sr_module", "sr_module_nodes8", "sr_module_large_vector"]
GRADIENTS = {"grad_conv_adj": "conv_adj.weight", "grad_conv_wg": "conv_wg.weight"}


@needs_shared
@pytest.mark.parametrize("case", CASES)
def test_oracle_gives_the_stored_numbers(case):
    constructor, weights, tensors, tolerance = stored(case)
    nodes = constructor["node_num"]
    for name in GRADIENTS.values():
        weights[name].requires_grad_()
    x = tensors["input.x"].double().requires_grad_()
    out, inner = oracle.released(x, weights, nodes=nodes)
    (out * tensors["input.grad_output"]).sum().backward()
    actual = {"output": out, "nodes": inner["nodes"], "vector": inner["vector"]}
    gradients = {"grad_x": x.grad, **{k: weights[v].grad for k, v in GRADIENTS.items()}}
    actual |= {k: v for k, v in gradients.items() if f"output.{k}" in tensors}
    train, buffers = oracle.released(x, weights, nodes=nodes, training=True)
    buffers.pop("nodes"), buffers.pop("vector")
    assert_stored({**actual, "output_train": train, **buffers}, tensors, tolerance, torch.float64)


@needs_shared
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_released_preset_gives_the_stored_numbers(case, dtype):
    constructor, weights, tensors, tolerance = stored(case, dtype)
    channels, planes = constructor["inplanes"], constructor["planes"]
    module = SqueezeReasoning.released(
        in_channels=channels, reduction=channels // planes, nodes=constructor["node_num"]
    )
    module.to(dtype).eval().load_state_dict(convert_released_state(weights))
    seen = {}
    module.reason.register_forward_hook(
        lambda _, i, o: seen.update(nodes=i[0], vector=o.flatten(1))
    )
    x = tensors["input.x"].to(dtype).requires_grad_()
    out = module(x)
    (out * tensors["input.grad_output"]).sum().backward()
    actual = {"output": out, **seen}
    reason = module.reason
    gradients = {
        "grad_x": x.grad,
        "grad_conv_adj": reason.adjacency.weight.grad,
        "grad_conv_wg": reason.transform.weight.grad,
    }
    actual |= {k: v for k, v in gradients.items() if f"output.{k}" in tensors}
    actual["output_train"] = module.train()(x)
    for norm, name in [(reason.adjacency_norm, "bn_adj"), (reason.transform_norm, "bn_wg")]:
        actual[f"{name}_running_mean_after"] = norm.running_mean
        actual[f"{name}_running_var_after"] = norm.running_var
    assert_stored(actual, tensors, tolerance, dtype)


@pytest.mark.parametrize("training", [False, True])
def test_released_preset_equals_its_definition(training):
    module = randomized(SqueezeReasoning.released(in_channels=32, nodes=4)).train(training)
    names = {v: k for k, v in zip("t p g z gn conv_adj bn_adj conv_wg bn_wg".split(),
             "project squeeze_b squeeze_c expand norm reason.adjacency reason.adjacency_norm "
             "reason.transform reason.transform_norm".split(), strict=True)}  # fmt: skip
    state = {
        f"{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v.clone()
        for k, v in module.state_dict().items()
    }
    x = torch.randn(3, 32, 5, 3, dtype=torch.float64)
    expected, _ = oracle.released(x, state, nodes=4, training=training)
    torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)
    assert set(convert_released_state(state)) == set(module.state_dict())


# ---- parameters and costs ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 395_328),
        ({"squeeze": "gap"}, 264_256),
        ({"nodes": 32}, 395_920),
        ({"wr": "full"}, 394_816),
        ({"wr": "full", "squeeze": "gap"}, 263_744),
        ({"node_norm": "LN"}, 395_328),
        ({"in_channels": 2048}, 6_302_112),
        ({"in_channels": 2048, "squeeze": "gap"}, 4_204_960),
        ({"in_channels": 2048, "reduction": 64}, 203_048),
    ],
)
def test_parameters(options, expected):
    assert count(SqueezeReasoning(**options)) == expected


def test_parameters_of_the_released_preset():
    assert count(SqueezeReasoning.released()) == 395_920


@pytest.mark.parametrize(
    ("graph_only", "node_norm", "expected"),
    [(True, "", 25_635_624), (False, "", 25_639_720), (False, "BN", 25_642_120)],
)
def test_parameters_of_sr_resnet_50(graph_only, node_norm, expected):
    with torch.device("meta"):
        resnet = torchvision.models.resnet50()
        blocks = [m for m in resnet.modules() if type(m).__name__ == "Bottleneck"]
        gates = [
            SqueezeReasoningGate(in_channels=b.conv3.out_channels, node_norm=node_norm)
            for b in blocks
        ]
    assert len(gates) == 16
    adjacencies = sum(count(g.reason.adjacency) for g in gates)
    total = count(resnet) + sum(map(count, gates)) - (adjacencies if graph_only else 0)
    assert total == expected


def module_costs(module, x):
    """The counter of the paper: convolutions, 2 per element of a batch norm, 1 per pooled input.

    Conv1d, products of maps and sums are not counted. The pooling of GAP is a function here, its
    input is what `squeeze_b` returns.
    """
    macs = 0

    def add(part, inputs, out):
        nonlocal macs
        if isinstance(part, nn.Conv2d):
            macs += out.numel() * (part.weight[0].numel() + (part.bias is not None))
        elif isinstance(part, nn.SyncBatchNorm | nn.BatchNorm2d | nn.BatchNorm1d):
            macs += 2 * out.numel()

    hooks = [part.register_forward_hook(add) for part in module.modules()]
    module(x)
    for hook in hooks:
        hook.remove()
    return macs


@pytest.mark.parametrize(
    ("options", "printed", "expected"),
    [({}, 3.64, 3.6380), ({"squeeze": "gap"}, 2.43, 2.4324), ({"wr": "full"}, 3.63, 3.6333)],
)
def test_cost_at_96x96(options, printed, expected):
    module = SqueezeReasoning(**options).to("meta").eval()
    x = torch.zeros(1, 512, 96, 96, device="meta")
    macs = module_costs(module, x) + (256 * 96 * 96 if options.get("squeeze") == "gap" else 0)
    assert macs / 1e9 == pytest.approx(expected, abs=5e-5)
    assert round(macs / 1e9, 2) == printed


# ---- properties --------------------------------------------------------------------------------
def seen_by_reason(module, x):
    """What enters and what leaves the reasoning."""
    seen = []
    hook = module.reason.register_forward_hook(lambda _, inputs, out: seen.extend([inputs[0], out]))
    module(x)
    hook.remove()
    return seen


@pytest.mark.parametrize("squeeze", ["ghp", "gap"])
def test_tiling_the_map_leaves_the_vector_unchanged(squeeze):
    module = randomized(build(squeeze=squeeze))
    x = torch.randn(2, 32, 3, 5, dtype=torch.float64)
    once, tiled = seen_by_reason(module, x), seen_by_reason(module, x.repeat(1, 1, 2, 2))
    torch.testing.assert_close(tiled, once, **EXACT)
    out = module(x.repeat(1, 1, 2, 2))
    torch.testing.assert_close(out, module(x).repeat(1, 1, 2, 2), **EXACT)


def test_tiling_the_map_multiplies_a_sum_by_four():
    module = randomized(build(pool="sum"))
    x = torch.randn(2, 32, 3, 5, dtype=torch.float64)
    once, tiled = seen_by_reason(module, x), seen_by_reason(module, x.repeat(1, 1, 2, 2))
    torch.testing.assert_close(tiled[0], 4 * once[0], **EXACT)


class Given(nn.Module):
    """A reasoning that always says the same."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, nodes):
        return self.answer.to(nodes.dtype).view(1, *nodes.shape[1:]).expand_as(nodes)


def difference_of_two_answers(module):
    """Relative difference of the branch for two unrelated positive vectors."""
    x = torch.randn(2, module.in_channels, 7, 9)
    branches = []
    for _ in range(2):
        module.reason = Given(torch.rand(module.in_channels // 2) + 0.1)
        with torch.no_grad():
            branches.append(module.eval()(x) - x)
    return ((branches[0] - branches[1]).norm() / branches[0].norm()).item()


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "GN", ""])
def test_two_answers_give_two_outputs(norm):
    assert difference_of_two_answers(SqueezeReasoning(norm=norm)) > 0.3


def test_two_answers_give_one_output_in_the_released_module():
    assert difference_of_two_answers(SqueezeReasoning.released()) < 0.05


@pytest.mark.parametrize("norm", ["BN", "SyncBN", ""])
def test_zero_init_is_the_identity(norm):
    x = torch.randn(2, 32, 3, 4)
    assert torch.equal(build(norm=norm, zero_init=True)(x), x)
    assert not torch.equal(build(norm=norm)(x), x)


def test_squared_scale_reaches_the_vector():
    """v is of second order in X: twice the map, four times the vector (one order for GAP)."""
    x = torch.randn(1, 32, 3, 4, dtype=torch.float64)
    for squeeze, factor in (("ghp", 4), ("gap", 2)):
        module = randomized(build(squeeze=squeeze))
        one, two = seen_by_reason(module, x)[0], seen_by_reason(module, 2 * x)[0]
        torch.testing.assert_close(two, factor * one, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_maps_stay_finite_in_half_precision(dtype):
    module = build().eval()
    x = 4 * torch.randn(1, 32, 128, 256)
    x += 8 * torch.randn(1, 32, 1, 1)
    squeezed = []
    module.reason.register_forward_pre_hook(lambda _, inputs: squeezed.append(inputs[0]))
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        out = module(x.to(dtype))
    limit = torch.finfo(torch.float16).max
    assert squeezed[0].dtype == torch.float32
    assert squeezed[0].abs().max() < limit / 10
    assert squeezed[0].abs().max() * 128 * 256 > limit, "a sum would not have fitted"
    assert out.dtype == dtype
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_module_in_half_precision_runs_in_it(dtype):
    module = build(norm="BN").eval()
    x = torch.randn(2, 32, 5, 6).to(dtype)
    expected = module(x.float())
    out = module.to(dtype)(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_training_step_with_one_image_reaches_every_parameter(variant):
    # Wide enough that not all hidden numbers of `fc` are cut off by their ReLU.
    module = build(in_channels=256, **VARIANTS[variant])
    module(torch.randn(1, 256, 4, 5)).square().sum().backward()
    idle = [k for k, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("channel", [0, 5, 15])
def test_a_number_of_the_vector_meets_its_own_channel(channel):
    """With A_g = 0 and W_g = I the vector comes back as it went in, up to the ReLU."""
    module = randomized(build(norm="", node_norm=""))
    x = torch.randn(1, 32, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        module.reason.adjacency.weight.zero_()
        module.reason.transform.weight.copy_(torch.eye(4)[..., None])
        module.squeeze_c.weight.copy_(module.squeeze_b.weight)  # a square: nothing is cut off
        before = module(x)
        module.squeeze_c.weight[channel] *= 2
        changed = (module(x) - before).abs().amax((0, 2, 3)) > 1e-9
    assert changed.nonzero().flatten().tolist() == [2 * channel, 2 * channel + 1]


def test_images_of_a_batch_do_not_mix():
    module = randomized(build())
    x = torch.randn(3, 32, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(module(x), torch.cat([module(i[None]) for i in x]), **EXACT)


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
@pytest.mark.parametrize("variant", ["default", "full_gap"])
def test_memory_layout_does_not_matter(variant, layout):
    module = randomized(build(**VARIANTS[variant]))
    x = torch.randn(2, 32, 4, 6, dtype=torch.float64)
    last = x.to(memory_format=torch.channels_last)
    laid_out = last if layout == "channels_last" else F.pad(x, [1, 2, 3, 4])[..., 3:-4, 1:-2]
    torch.testing.assert_close(module(laid_out), module(x), **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_trains_and_reasons_in_float32(variant):
    module = build(**VARIANTS[variant])
    x = torch.randn(2, 32, 5, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nodes, reasoned = seen_by_reason(module, x)
        out = module(x)
    assert nodes.dtype == reasoned.dtype == out.dtype == torch.float32
    out.square().sum().backward()
    assert x.grad.isfinite().all()
    # In eval mode nothing is divided by the small spread of two vectors.
    module.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = module(x)
    branch = module(x) - x
    assert (low - module(x)).norm() < 0.03 * branch.norm() + 0.01


def test_synchronised_norms_come_together():
    kinds = {
        ("SyncBN", "BN"): nn.SyncBatchNorm,
        ("BN", "BN"): nn.BatchNorm1d,
        ("SyncBN", "LN"): nn.GroupNorm,
        ("SyncBN", ""): nn.Identity,
    }
    for (norm, node_norm), kind in kinds.items():
        reason = build(norm=norm, node_norm=node_norm).reason
        assert type(reason.adjacency_norm) is type(reason.transform_norm) is kind


def test_initial_weights():
    module = SqueezeReasoning()
    for conv, fan_in in [(module.squeeze_b, 512), (module.project, 512), (module.expand, 1)]:
        assert conv.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)


def test_names_in_the_state():
    kinds = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    parts = ["norm", "reason.adjacency_norm", "reason.transform_norm"]
    norms = [f"{part}.{kind}" for part in parts for kind in kinds]
    convs = ["squeeze_b", "squeeze_c", "project", "expand", "reason.adjacency", "reason.transform"]
    assert set(build().state_dict()) == {f"{c}.weight" for c in convs} | set(norms)
    inner = {"sa": ["query", "key", "value"], "fc": ["reduce", "expand"], "none": []}
    for reason, expected in inner.items():
        names = [k for k in build(reason=reason).state_dict() if k.startswith("reason")]
        assert names == [f"reason.{name}.weight" for name in expected]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"nodes": 5}, ValueError, "nodes and reduced channels: .* got 5 and 16; use 4 instead"),
        ({"reduction": 3}, ValueError, "reduction and in_channels: .* got 3 and 32; use"),
        ({"reduction": 2.0}, TypeError, "reduction: expected an integer, got 2.0"),
        ({"in_channels": 0}, ValueError, "in_channels: expected at least 1, got 0"),
        ({"squeeze": "max"}, ValueError, "squeeze: expected one of 'ghp', 'gap', got 'max'"),
        ({"reason": "rnn"}, ValueError, "reason: expected one of 'gcn', 'sa', 'fc', 'none'"),
        ({"adj": "plus"}, ValueError, "adj: expected one of 'paper', 'released', got 'plus'"),
        ({"wr": "dense"}, ValueError, "wr: expected one of 'grouped', 'full', got 'dense'"),
        ({"pool": "max"}, ValueError, "pool: expected one of 'mean', 'sum', got 'max'"),
        ({"pool": "sum", "squeeze": "gap"}, ValueError, "use squeeze='ghp' for the sum"),
        ({"norm": "LN"}, ValueError, "norm: expected one of '', 'BN', 'SyncBN', 'GN', got 'LN'"),
        ({"norm": "GN"}, ValueError, "got 32 groups for 16 channels: .* use 'BN' or 'SyncBN'"),
        ({"norm": "GN", "in_channels": 64}, ValueError, "got 32 groups for 32 channels"),
        ({"node_norm": "GN"}, ValueError, "node_norm: expected one of .* got 'GN'"),
        ({"reason": "fc", "reduction": 4}, ValueError, "reduction of 'fc' .* got 16 and 8"),
    ],
)
def test_says_what_is_wrong_with_the_options(options, error, text):
    with pytest.raises(error, match=text):
        build(**options)


@pytest.mark.parametrize("make", [build, lambda: SqueezeReasoningGate(in_channels=32)])
def test_says_what_is_wrong_with_the_map(make):
    module = make()
    with pytest.raises(ValueError, match="x: expected 32 channels, got 31"):
        module(torch.zeros(1, 31, 4, 4))
    with pytest.raises(ValueError, match="a single image needs a batch axis"):
        module(torch.zeros(32, 4, 4))
    with pytest.raises(TypeError, match="x: expected a floating point map, got torch.int64"):
        module(torch.zeros(1, 32, 4, 4).long())


def test_says_what_is_wrong_with_a_released_state():
    with pytest.raises(ValueError, match="names beginning with t, p, g, .* got 'module.t.weight'"):
        convert_released_state({"module.t.weight": torch.zeros(1)})


# ---- the gate of SR-ResNet ---------------------------------------------------------------------
@pytest.mark.parametrize("node_norm", ["BN", "LN", ""])
@pytest.mark.parametrize("size", [(3, 5), (1, 1)])
def test_gate_equals_its_definition(size, node_norm):
    gate = randomized(SqueezeReasoningGate(in_channels=12, nodes=4, node_norm=node_norm))
    state = {k.removeprefix("reason."): v for k, v in gate.state_dict().items()}
    x = torch.randn(2, 12, *size, dtype=torch.float64)
    for image, out in zip(x, gate(x), strict=True):
        nodes = image.mean((1, 2)).view(4, 3)
        scale = oracle.graph(nodes, state, last=torch.sigmoid).reshape(12, 1, 1)
        torch.testing.assert_close(out, image * scale, **EXACT)


def test_gate_trains_under_autocast():
    gate = SqueezeReasoningGate(in_channels=32)
    x = torch.randn(2, 32, 4, 3).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gate(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.any() for p in gate.parameters())


def test_gate_says_what_is_wrong():
    with pytest.raises(ValueError, match="nodes and reduced channels: .* got 16 and 40; use"):
        SqueezeReasoningGate(in_channels=40)


# ---- compilers ---------------------------------------------------------------------------------
def compiler_cases():
    yield from (build(**VARIANTS[v]) for v in ("default", "sa", "full_gap", "layer_norm"))
    yield SqueezeReasoning.released(in_channels=32, nodes=4)
    yield SqueezeReasoningGate(in_channels=32)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(6))
def test_compile_and_export_give_the_same_numbers(index):
    torch.compiler.reset()
    module = list(compiler_cases())[index].eval()
    x = torch.randn(2, 32, 5, 6)
    expected = module(x)
    exported = torch.export.export(module, (x,)).module()(x)
    torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(module, fullgraph=True)(x)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
    torch.compile(module.train(), fullgraph=True)(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_gpu_equals_cpu(variant):
    module = randomized(build(**VARIANTS[variant]))
    x = torch.randn(2, 32, 13, 9, dtype=torch.float64)
    expected = module(x)
    torch.testing.assert_close(module.cuda()(x.cuda()).cpu(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_gpu_survives_float16_at_128x256(norm):
    module = SqueezeReasoning(norm=norm).cuda().train()
    x = (10 * torch.randn(1, 512, 128, 256, device="cuda")).half().requires_grad_()
    with torch.autocast("cuda", dtype=torch.float16):
        out = module(x)
    assert out.dtype == torch.float16
    assert out.isfinite().all()
    out.float().square().mean().backward()
    assert x.grad.isfinite().all()
