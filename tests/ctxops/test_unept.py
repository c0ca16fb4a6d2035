"""UN-EPT's layers and branches: stored numbers, counts, independence, sizes, precision."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from ctxops.deform_attention import DeformableAttention
from ctxops.deform_layers import DeformableDecoderLayer, DeformableEncoderLayer
from ctxops.position import GridEmbedding, cell_centres, pyramid_position
from ctxops.self_attention import FullAttention, ReleasedAttention
from ctxops.unept import SpatialBranch, build_context_branch
from tests.shared_data import SHARED, needs_shared

GOLDENS = SHARED / "goldens" / "dev"
SMALL = {"embed_dim": 64, "num_heads": 4, "num_levels": 3, "num_points": 4}
TINY = {"embed_dim": 16, "num_heads": 2, "num_levels": 2, "num_points": 2, "ffn_dim": 24}
KINDS = ["deformable", "full", "released"]


def count(module):
    return sum(p.numel() for p in module.parameters())


def randomised(module):
    """The module with every parameter random, so that nothing sits at an identity."""
    for name, parameter in module.named_parameters():
        # Norms keep their scale, or the last one would hide everything before it.
        nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
    return module


def tiny_branch(**changes):
    return randomised(
        build_context_branch(**{**TINY, "dropout": 0.0, "impl": "chunked", **changes})
    )


def tiny_inputs(batch=2, dtype=torch.float32):
    """Two maps of different, odd sizes and queries of a third."""
    sizes = (5, 3), (1, 4), (4, 7)
    first, second, queries = (torch.randn(batch, 16, h, w, dtype=dtype) for h, w in sizes)
    return [first, second], queries


class Golden:
    """One stored case, its tensors and weights in a dtype."""

    def __init__(self, case, dtype):
        self.dtype = dtype
        self.tensors = load_file(GOLDENS / f"{case}.safetensors")
        self.tolerance = json.loads((GOLDENS / f"{case}.json").read_text())["tolerance"]
        stored = load_file(GOLDENS / f"{case}.weights.safetensors")
        self.weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in stored.items()}

    def input(self, name):
        x = self.tensors[f"input.{name}"]
        return x.to(self.dtype) if x.is_floating_point() else x

    def shapes(self):
        return [tuple(shape) for shape in self.tensors["input.spatial_shapes"].tolist()]

    def part(self, prefix):
        """Weights below a name, with that name taken off."""
        return {k[len(prefix) :]: v for k, v in self.weights.items() if k.startswith(prefix)}

    def check(self, name, actual):
        wide = self.dtype == torch.float64 and f"output_f64.{name}" in self.tensors
        expected = self.tensors[f"output_f64.{name}" if wide else f"output.{name}"]
        # Where only float32 was stored its rounding remains.
        suffix = "float64" if wide else "float32"
        atol = self.tolerance[f"output.{name}"][f"suggested_atol_{suffix}"]
        torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=0, atol=atol)


@needs_shared
@pytest.mark.parametrize("impl", ["chunked", "grid_sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stored_encoder_layer(dtype, impl):
    golden = Golden("unept_encoder_layer", dtype)
    layer = DeformableEncoderLayer(**SMALL, ffn_dim=96, impl=impl).to(dtype).eval()
    layer.load_state_dict(golden.weights)
    seen = {}
    for name in ("self_attn", "norm1"):
        layer.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: seen.update({name: out})
        )
    x, position = (golden.input(name).requires_grad_() for name in ("src", "pos"))
    out = layer(x, position, golden.input("reference_points"), golden.shapes())
    (out * golden.input("grad_output")).sum().backward()
    seen |= {"output": out, "grad_src": x.grad, "grad_pos": position.grad}
    seen["grad_sampling_offsets_weight"] = layer.self_attn.sampling_offsets.weight.grad
    for name, value in seen.items():
        golden.check(name, value)


@needs_shared
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stored_decoder_layer(dtype):
    golden = Golden("unept_decoder_layer", dtype)
    self_attn = ReleasedAttention(embed_dim=64, num_heads=4)
    layer = DeformableDecoderLayer(self_attn=self_attn, **SMALL, ffn_dim=96).to(dtype).eval()
    layer.load_state_dict(golden.weights)
    seen = {}
    for name in ("self_attn", "norm2", "cross_attn", "norm1"):
        layer.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: seen.update({name: out.transpose(0, 1)})
        )
    query, memory = golden.input("tgt").requires_grad_(), golden.input("src").requires_grad_()
    out = layer(query.transpose(0, 1), (5, 8), memory, golden.shapes()).transpose(0, 1)
    (out * golden.input("grad_output")).sum().backward()
    seen |= {"output": out, "grad_tgt": query.grad, "grad_src": memory.grad}
    for name, value in seen.items():
        golden.check(name, value)


@needs_shared
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stored_context_branch(dtype):
    golden = Golden("unept_context_branch", dtype)
    branch = build_context_branch(**SMALL, ffn_dim=96, self_attention="released").to(dtype).eval()
    branch.load_state_dict(golden.weights)
    seen = {}
    branch.encoder.register_forward_hook(lambda _, __, out: seen.update(memory=out))
    features = [golden.input(f"feature{level}") for level in range(3)]
    table = GridEmbedding(grid=(9, 9), channels=64)
    table.load_state_dict({"weight": golden.input("query_embed")})
    query = golden.input("context").transpose(0, 1) + table((9, 9))  # [1, Q, d]
    out = branch(features, query.transpose(1, 2).unflatten(2, (9, 9)).to(dtype))
    golden.check("pos", pyramid_position([(6, 6)] * 3, branch.level_embed)[None])
    golden.check("memory", seen["memory"])
    golden.check("output", out.flatten(2).permute(2, 0, 1))


def spatial_weights(golden):
    """Released names to ours: `convblock1.conv1` is `block1.conv`, `bn` is `norm`."""
    renamed = {}
    for key, value in golden.part("spatial_branch.").items():
        for old, new in (("convblock", "block"), ("conv1", "conv"), ("bn", "norm")):
            key = key.replace(old, new, 1)
        renamed[key] = value
    return renamed


@needs_shared
def test_stored_model_from_the_maps_of_its_backbone():
    golden = Golden("unept_model", torch.float32)
    spatial = SpatialBranch(last_relu=False).eval()
    spatial.load_state_dict(spatial_weights(golden))
    branch = build_context_branch(
        num_points=4,
        num_encoder_layers=1,
        num_decoder_layers=1,
        ffn_dim=64,
        self_attention="released",
    ).eval()
    branch.load_state_dict(golden.part("context_branch."))
    table = GridEmbedding(grid=(12, 12), channels=256)
    table.load_state_dict(golden.part("query_embed."))
    with torch.no_grad():
        queries = spatial(golden.input("image"))
        golden.check("spatial", queries)
        features = [
            F.conv2d(
                golden.tensors[f"output.backbone{level}"],
                golden.weights[f"layers.{level}.weight"],
                golden.weights[f"layers.{level}.bias"],
            )
            for level in range(3)
        ]
        queries = queries + table((12, 12)).transpose(1, 2).unflatten(2, (12, 12))
        out = branch(features, queries)
        logits = F.conv2d(out, golden.weights["cls.weight"], golden.weights["cls.bias"])
    golden.check("logits_low", logits)


def test_counts_are_those_of_the_paper():
    self_attn = ReleasedAttention(embed_dim=256, num_heads=8)
    own = DeformableAttention(embed_dim=256, num_heads=8, num_levels=1, num_points=16)
    assert count(DeformableEncoderLayer()) == 1_479_552
    assert count(DeformableDecoderLayer(self_attn=self_attn)) == 1_743_232
    assert count(DeformableDecoderLayer(self_attn=own)) == 1_743_232 - 263_168 + 230_272
    assert count(self_attn) == 263_168
    assert count(build_context_branch()) == 6_380_544
    assert count(build_context_branch(self_attention="full")) == 6_446_336
    assert count(build_context_branch(self_attention="released")) == 6_446_336
    assert count(SpatialBranch()) == 371_264
    assert count(GridEmbedding(grid=(60, 60), channels=256)) == 921_600


def test_keys_of_the_default_branch():
    attention = ["sampling_offsets", "attention_weights", "value_proj", "output_proj"]
    encoder = [f"self_attn.{part}" for part in attention] + ["norm1", "norm2"]
    decoder = [f"{kind}_attn.{part}" for kind in ("self", "cross") for part in attention]
    decoder += ["norm1", "norm2", "norm3"]
    expected = {"level_embed"}
    for side, parts in (("encoder", encoder), ("decoder", decoder)):
        for part in [*parts, "linear1", "linear2"]:
            for layer in range(2):
                expected |= {f"{side}.layers.{layer}.{part}.{kind}" for kind in ("weight", "bias")}
    assert set(tiny_branch().state_dict()) == expected


def test_initial_values_of_the_branch():
    branch = build_context_branch()
    layer = branch.decoder.layers[0]
    for attention in (layer.self_attn, layer.cross_attn, branch.encoder.layers[1].self_attn):
        assert attention.sampling_offsets.weight.abs().max() == 0
        assert attention.sampling_offsets.bias[: 2 * 16].view(16, 2)[:, 0].tolist() == [
            float(n) for n in range(1, 17)
        ]
    bound = (6 / (256 + 2048)) ** 0.5
    for linear in (layer.linear1, layer.linear2):
        assert 0.99 * bound < linear.weight.abs().max() <= bound
        assert linear.bias.abs().max() > 0
    assert 0.9 < branch.level_embed.std() < 1.1
    released = build_context_branch(self_attention="released").decoder.layers[0].self_attn
    bound = (6 / (256 + 768)) ** 0.5
    assert 0.99 * bound < released.in_proj_weight.abs().max() <= bound
    assert released.in_proj_bias.abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_images_of_a_batch_do_not_mix(kind, training):
    branch = tiny_branch(self_attention=kind).train(training)
    features, queries = tiny_inputs(batch=3)
    together = branch(features, queries)
    alone = branch([x[:1] for x in features], queries[:1])
    if kind == "released" and training:
        # As published: image 0 changes with the others.
        assert (together[:1] - alone).abs().max() > 0.01
    else:
        torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_any_grid_of_maps_and_queries(kind):
    branch = tiny_branch(self_attention=kind)
    maps = [torch.randn(1, 16, 1, 1), torch.randn(1, 16, 6, 1)]
    for grid in [(1, 1), (1, 5), (7, 2)]:
        out = branch(maps, torch.randn(1, 16, *grid))
        assert out.shape == (1, 16, *grid)
        assert out.isfinite().all()


def turned(tokens, shapes):
    """Tokens of every level after transposing its map."""
    levels = zip(tokens.split([h * w for h, w in shapes], dim=-2), shapes, strict=True)
    maps = [x.unflatten(-2, shape).transpose(-3, -2).flatten(-3, -2) for x, shape in levels]
    return torch.cat(maps, dim=-2)


def test_transposed_maps_give_transposed_results_if_the_offsets_are_transposed():
    layer = randomised(DeformableEncoderLayer(**TINY, dropout=0.0))
    shapes, shapes_turned = [(5, 3), (1, 4)], [(3, 5), (4, 1)]
    x, position = torch.randn(1, 19, 16), torch.randn(19, 16)
    centres, centres_turned = (
        torch.cat([cell_centres(s) for s in sizes])[None, :, None].expand(1, -1, 2, -1)
        for sizes in (shapes, shapes_turned)
    )
    expected = layer(x, position, centres, shapes)
    with torch.no_grad():
        for parameter in layer.self_attn.sampling_offsets.parameters():
            parameter.copy_(parameter.unflatten(0, (-1, 2)).flip(1).flatten(0, 1))
    out = layer(turned(x, shapes), turned(position, shapes), centres_turned, shapes_turned)
    torch.testing.assert_close(out, turned(expected, shapes), rtol=0, atol=1e-5)


def test_only_the_queries_of_the_encoder_see_the_position():
    """With offsets and weights that ignore the query, the position changes nothing."""
    layer = randomised(DeformableEncoderLayer(**TINY, dropout=0.0))
    x, position = torch.randn(1, 12, 16), torch.randn(12, 16)
    references = torch.rand(1, 12, 2, 2)
    shapes = [(2, 4), (4, 1)]
    assert (
        layer(x, position, references, shapes) - layer(x, 0 * position, references, shapes)
    ).any()
    for part in (layer.self_attn.sampling_offsets, layer.self_attn.attention_weights):
        nn.init.zeros_(part.weight)
    torch.testing.assert_close(
        layer(x, position, references, shapes), layer(x, 0 * position, references, shapes)
    )


@pytest.mark.parametrize("batch", [1, 3])
def test_released_attention_in_training_is_attention_over_the_batch(batch):
    ours = ReleasedAttention(embed_dim=16, num_heads=4).train()
    theirs = nn.MultiheadAttention(16, 4).train()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(batch, 5, 16)
    # Sequence first: what is fed as the sequence is the batch.
    expected, _ = theirs(x, x, x, need_weights=False)
    torch.testing.assert_close(ours(x, None, x, []), expected, rtol=0, atol=1e-6)
    if batch == 1:
        torch.testing.assert_close(ours.eval()(x, None, x, []), expected, rtol=0, atol=1e-6)


def test_full_attention_equals_pytorch_and_permutes_with_the_queries():
    ours = FullAttention(embed_dim=16, num_heads=4)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    query, value = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    out = ours(query, None, value, [])
    expected, _ = theirs(query, value, value, need_weights=False)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    order = torch.randperm(5)
    torch.testing.assert_close(ours(query[:, order], None, value, []), out[:, order])


def test_dropout_acts_in_training_only():
    branch = randomised(build_context_branch(**TINY, dropout=0.5, self_attention="full"))
    features, queries = tiny_inputs()
    assert not torch.equal(branch(features, queries), branch(features, queries))
    branch.eval()
    assert torch.equal(branch(features, queries), branch(features, queries))
    attention = branch.decoder.layers[0].self_attn
    x = torch.randn(1, 9, 16)
    assert torch.equal(attention(x, None, x, []), attention(x, None, x, []))
    attention.train()
    assert not torch.equal(attention(x, None, x, []), attention(x, None, x, []))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_dropout_takes_whole_branches_and_the_hidden_layer(kind):
    """With (almost) every element dropped only the norms are left."""
    dropout = 1 - 1e-9
    x, shapes = torch.randn(1, 8, 16), [(2, 2), (1, 4)]
    if kind == "encoder":
        layer = randomised(DeformableEncoderLayer(**TINY, dropout=dropout))
        out = layer(x, torch.randn(8, 16), torch.rand(1, 8, 2, 2), shapes)
        expected = layer.norm2(layer.norm1(x))
    else:
        attention = FullAttention(embed_dim=16, num_heads=2)
        layer = randomised(DeformableDecoderLayer(self_attn=attention, **TINY, dropout=dropout))
        out = layer(x, (2, 4), torch.randn(1, 8, 16), shapes)
        expected = layer.norm3(layer.norm1(layer.norm2(x)))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(layer.feed_forward(x), layer.linear2.bias.expand(1, 8, 16))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind):
    branch = tiny_branch(self_attention=kind)
    features, queries = tiny_inputs()
    branch(features, queries.requires_grad_()).square().mul(
        torch.rand(2, 16, 4, 7)
    ).sum().backward()
    missing = [n for n, p in branch.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []
    assert queries.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_forward_and_backward(kind):
    branch = tiny_branch(self_attention=kind)
    features, queries = tiny_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = branch(features, queries)
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in branch.parameters())
    expected = branch(features, queries)
    assert F.cosine_similarity(out.float().flatten(), expected.flatten(), dim=0) > 0.99


def test_half_precision_module():
    branch = tiny_branch().bfloat16()
    features, queries = tiny_inputs(dtype=torch.bfloat16)
    out = branch(features, queries)
    assert out.dtype == torch.bfloat16
    expected = branch.float()([x.float() for x in features], queries.float())
    assert F.cosine_similarity(out.float().flatten(), expected.flatten(), dim=0) > 0.99


def test_channels_last_maps_give_the_same():
    branch = tiny_branch()
    features, queries = tiny_inputs()
    expected = branch(features, queries)
    laid_out = [x.to(memory_format=torch.channels_last) for x in [*features, queries]]
    torch.testing.assert_close(branch(laid_out[:2], laid_out[2]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(96, 128), (33, 47), (8, 8), (1, 1)])
def test_spatial_branch_is_at_an_eighth(size):
    branch = SpatialBranch(channels=(4, 6, 8)).eval()
    out = branch(torch.randn(1, 3, *size))
    assert out.shape == (1, 8, -(-size[0] // 8), -(-size[1] // 8))


def test_the_last_relu_is_optional():
    image = torch.randn(2, 3, 32, 40)
    rectified = SpatialBranch(channels=(4, 6, 8))
    released = SpatialBranch(channels=(4, 6, 8), last_relu=False)
    released.load_state_dict(rectified.state_dict())
    signed = released(image)
    assert signed.min() < 0
    assert torch.equal(rectified(image), signed.relu())


def test_spatial_branch_learns_with_other_norms():
    branch = SpatialBranch(channels=(32, 32, 64), norm="GN")
    branch(torch.randn(1, 3, 16, 24)).square().sum().backward()
    assert all(p.grad.any() for p in branch.parameters())


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: tiny_branch(self_attention="none"),
            ValueError,
            "'deformable', 'full', 'released'",
        ),
        (lambda: tiny_branch(num_decoder_layers=0), ValueError, "num_decoder_layers: expected at"),
        (lambda: tiny_branch(dropout=1.0), ValueError, "dropout: expected a probability"),
        (lambda: tiny_branch(num_heads=3), ValueError, "num_heads and embed_dim: .* got 3 and 16"),
        (lambda: FullAttention(embed_dim=8, num_heads=3), ValueError, "use 2 instead of 3"),
        (
            lambda: tiny_branch()(tiny_inputs()[0][:1], tiny_inputs()[1]),
            ValueError,
            "features: expected 2 maps, got 1",
        ),
        (
            lambda: tiny_branch()(tiny_inputs()[0], tiny_inputs(batch=1)[1]),
            ValueError,
            r"features\[0\]: expected the batch size of the queries, 1, got 2",
        ),
        (
            lambda: tiny_branch()(tiny_inputs()[0], torch.zeros(2, 8, 3, 3)),
            ValueError,
            "queries: expected 16 channels, got 8",
        ),
        (
            lambda: tiny_branch()(tiny_inputs()[0], torch.zeros(2, 16, 3, 3).int()),
            TypeError,
            "queries: expected a floating point map, got torch.int32",
        ),
        (lambda: SpatialBranch(norm="LN"), ValueError, "norm: expected one of"),
        (
            lambda: SpatialBranch()(torch.zeros(3, 16, 16)),
            ValueError,
            r"got shape \(3, 16, 16\)",
        ),
    ],
)
def test_says_what_is_wrong(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_branch_compiles_in_one_graph(kind):
    branch = tiny_branch(self_attention=kind, num_encoder_layers=1, num_decoder_layers=1)
    features, queries = tiny_inputs()
    compiled = torch.compile(branch, fullgraph=True)
    expected = branch(features, queries)
    torch.testing.assert_close(compiled(features, queries), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_branch_exports_for_maps_of_any_size():
    branch = tiny_branch().eval()
    features, queries = tiny_inputs()
    sizes = [{2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO} for _ in range(3)]
    features[1] = torch.randn(2, 16, 2, 4)  # An extent of 1 would be taken as fixed.
    exported = torch.export.export(
        branch, (features, queries), dynamic_shapes=(sizes[:2], sizes[2])
    ).module()
    for seed in range(2):
        torch.manual_seed(seed)
        others = [torch.randn(2, 16, 3 + seed, 6), torch.randn(2, 16, 5, 2 + seed)]
        target = torch.randn(2, 16, 6, 3 + seed)
        torch.testing.assert_close(
            exported(others, target), branch(others, target), rtol=1e-5, atol=1e-5
        )


@pytest.mark.slow
def test_branch_becomes_onnx(tmp_path):
    pytest.importorskip("onnxscript", reason="PyTorch's exporter needs it")
    runtime = pytest.importorskip("onnxruntime", reason="runs the exported file")
    branch = tiny_branch().eval()
    features, queries = tiny_inputs()
    features[1] = torch.randn(2, 16, 2, 4)
    sizes = [{2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO} for _ in range(3)]
    path = tmp_path / "branch.onnx"
    torch.onnx.export(
        branch,
        (features, queries),
        path,
        dynamo=True,
        external_data=False,
        dynamic_shapes=(sizes[:2], sizes[2]),
    )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    for grid in [(5, 3), (4, 6)]:
        inputs = [
            torch.randn(2, 16, *grid),
            torch.randn(2, 16, *grid),
            torch.randn(2, 16, 3, *grid[1:]),
        ]
        (out,) = session.run(None, dict(zip(names, [x.numpy() for x in inputs], strict=True)))
        expected = branch(inputs[:2], inputs[2]).detach()
        torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-5, atol=1e-5)
