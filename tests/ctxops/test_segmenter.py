"""Segmenter against loops, stored numbers of the official model, its counts, and its rules."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ctxops.segmenter import LinearDecoder, MaskTransformer, Segmenter, tokens_to_map
from ctxops.vit import VARIANTS, VisionTransformer, build_vit
from tests.oracles import segmenter as oracle
from tests.shared_data import SHARED, needs_shared

CASES = ["segmenter_linear", "segmenter_mask", "segmenter_mask_distilled"]


def mask_decoder(*, num_classes=5, **keywords):
    return MaskTransformer(
        in_channels=6, num_classes=num_classes, embed_dim=8, num_heads=2, **keywords
    )


def tiny(decoder="mask", *, image_size=(8, 12), num_classes=5, **keywords):
    """Patches of 4 pixels, width 8, two layers each."""
    encoder = VisionTransformer(
        image_size=image_size, patch_size=4, embed_dim=8, num_layers=2, num_heads=2, **keywords
    )
    if decoder == "linear":
        return Segmenter(
            encoder=encoder, decoder=LinearDecoder(in_channels=8, num_classes=num_classes)
        )
    return Segmenter(
        encoder=encoder,
        decoder=MaskTransformer(
            in_channels=8, num_classes=num_classes, embed_dim=8, num_heads=2, num_layers=2
        ),
    )


def randomized(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


def named(variant, decoder, size, *, num_classes=150, patch_size=16, layers=2, distilled=False):
    """A model of the paper on the meta device."""
    d, _, heads = VARIANTS[variant]
    with torch.device("meta"):
        encoder = build_vit(
            variant=variant, image_size=(size, size), patch_size=patch_size, distilled=distilled
        )
        if decoder == "linear":
            head = LinearDecoder(in_channels=d, num_classes=num_classes)
        else:
            head = MaskTransformer(
                in_channels=d,
                num_classes=num_classes,
                embed_dim=d,
                num_heads=heads,
                num_layers=layers,
            )
        return Segmenter(encoder=encoder, decoder=head)


@pytest.mark.parametrize("normalize_classes", [True, False])
def test_mask_transformer_equals_the_equations(normalize_classes):
    decoder = randomized(mask_decoder(layer_norm_eps=1e-3, normalize_classes=normalize_classes))
    tokens = torch.randn(2, 6, 6, dtype=torch.float64)
    options = {"num_layers": 2, "num_heads": 2, "eps": 1e-3, "normalize_classes": normalize_classes}
    expected = [oracle.mask_scores(one, decoder.state_dict(), **options) for one in tokens]
    scores = torch.stack([pair[0] for pair in expected])
    torch.testing.assert_close(decoder.scores(tokens), scores)
    normed = torch.stack([pair[1] for pair in expected]).transpose(1, 2).reshape(2, 5, 2, 3)
    torch.testing.assert_close(decoder(tokens, (2, 3)), normed)


def test_linear_decoder_scores_every_patch_on_its_own():
    decoder = randomized(LinearDecoder(in_channels=6, num_classes=3))
    tokens = torch.randn(2, 4, 6, dtype=torch.float64)
    out = decoder(tokens, (2, 2))
    for t in range(4):
        expected = tokens[:, t] @ decoder.head.weight.T + decoder.head.bias
        torch.testing.assert_close(out[..., t // 2, t % 2], expected)


@pytest.mark.parametrize("decoder", ["linear", "mask"])
@pytest.mark.parametrize("size", [(8, 12), (7, 10), (1, 1), (1, 13), (4, 3)])
def test_model_is_pad_encode_decode_resize_crop(decoder, size):
    model = randomized(tiny(decoder))
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    height, width = (-(-side // 4) * 4 for side in size)
    padded = torch.zeros(2, 3, height, width, dtype=torch.float64)
    padded[..., : size[0], : size[1]] = image
    scores = model.decoder(model.encoder(padded), (height // 4, width // 4))
    full = F.interpolate(scores, (height, width), mode="bilinear", align_corners=False)
    out = model(image)
    assert out.shape == (2, 5, *size)
    torch.testing.assert_close(out, full[..., : size[0], : size[1]])


def load(case, dtype):
    folder = SHARED / "goldens" / "dev"
    about = json.loads((folder / f"{case}.json").read_text())
    arguments = about["constructor"]
    encoder = VisionTransformer(
        image_size=tuple(arguments["image_size"]),
        patch_size=arguments["patch_size"],
        embed_dim=arguments["d_model"],
        num_layers=arguments["n_layers"],
        num_heads=arguments["n_heads"],
        distilled=arguments.get("distilled", False),
    )
    if arguments["decoder"]["name"] == "linear":
        decoder = LinearDecoder(in_channels=128, num_classes=7)
    else:
        decoder = MaskTransformer(in_channels=128, num_classes=7, embed_dim=128, num_heads=2)
    model = Segmenter(encoder=encoder, decoder=decoder).to(dtype).eval()
    weights = load_file(folder / f"{case}.weights.safetensors")
    # The unused ImageNet classifiers are all that the official file has and this model has not.
    kept = {k: v for k, v in weights.items() if not k.startswith(("encoder.head",))}
    model.load_state_dict(kept, strict=True)
    return model, load_file(folder / f"{case}.safetensors"), about["tolerance"]


@needs_shared
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_stored_numbers(case, dtype):
    model, tensors, tolerance = load(case, dtype)
    for name in ("train_size", "padded", "nonsquare"):
        key = f"output.logits_{name}"
        with torch.no_grad():
            out = model(tensors[f"input.{name}"].to(dtype))
        atol = tolerance[key]["suggested_atol_float32"]
        torch.testing.assert_close(out.float(), tensors[key], rtol=0, atol=atol)


@needs_shared
@pytest.mark.parametrize("name", ["proj_patch", "proj_classes"])
def test_stored_numbers_see_a_transposed_projection(name):
    model, tensors, _ = load("segmenter_mask", torch.float32)
    with torch.no_grad():
        getattr(model.decoder, name).copy_(getattr(model.decoder, name).T.clone())
        out = model(tensors["input.train_size"])
    assert (out - tensors["output.logits_train_size"]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("variant", "size", "options", "linear", "mask"),
    [
        ("Ti", 512, {}, 5_712_342, 6_713_388),
        ("S", 512, {}, 22_041_366, 26_033_964),
        ("S", 512, {"patch_size": 32}, 22_631_190, 26_623_788),
        ("B", 512, {}, 86_549_910, 102_497_580),
        ("B", 512, {"distilled": True}, 86_551_446, 102_499_116),
        ("B", 512, {"patch_size": 32}, 87_729_558, 103_677_228),
        ("B", 512, {"patch_size": 8}, 88_466_838, 104_414_508),
        ("L", 512, {}, 304_303_254, 332_644_652),
        ("L", 640, {}, 304_893_078, 333_234_476),
        ("L", 480, {"num_classes": 60}, 304_084_028, 332_425_336),
        ("L", 768, {"num_classes": 19, "layers": 1}, 305_479_699, 321_224_742),
    ],
)
def test_parameter_count(variant, size, options, linear, mask):
    for decoder, expected in (("linear", linear), ("mask", mask)):
        model = named(variant, decoder, size, **options)
        assert sum(p.numel() for p in model.parameters()) == expected, decoder


@pytest.mark.parametrize(
    ("variant", "linear", "mask"),
    [
        ("Ti", 28_950, 1_029_996),
        ("S", 57_750, 4_050_348),
        ("B", 115_350, 16_063_020),
        ("L", 153_750, 28_495_148),
    ],
)
def test_parameter_count_of_the_decoders(variant, linear, mask):
    for decoder, expected in (("linear", linear), ("mask", mask)):
        model = named(variant, decoder, 512)
        assert sum(p.numel() for p in model.decoder.parameters()) == expected


@pytest.mark.parametrize(
    ("variant", "size", "linear", "mask"),
    [("Ti", 512, 10.5, 12.6), ("S", 480, 26.9, 32.6), ("B", 512, 107.1, 129.3)],
)
def test_macs(variant, size, linear, mask):
    """Multiply-adds of all products, attention included, against the closed form."""
    d, layers, _ = VARIANTS[variant]
    tokens = (size // 16) ** 2
    n, m, k = tokens + 1, tokens + 150, 150
    encoder = 3 * tokens * 256 * d + layers * (12 * d**2 * n + 2 * n**2 * d)
    heads = {
        "linear": tokens * d * k,
        "mask": tokens * d**2 + 2 * (12 * d**2 * m + 2 * m**2 * d) + m * d**2 + tokens * k * d,
    }
    for decoder, giga in (("linear", linear), ("mask", mask)):
        model = named(variant, decoder, size)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size, device="meta"))
        assert counter.get_total_flops() / 2 == encoder + heads[decoder]
        assert counter.get_total_flops() / 2e9 == pytest.approx(giga, abs=0.1)


def test_names_of_the_parameters():
    keys = set(tiny().state_dict())
    own = {key for key in keys if ".blocks." not in key}
    assert own == {
        "encoder.cls_token",
        "encoder.pos_embed",
        "encoder.patch_embed.proj.weight",
        "encoder.patch_embed.proj.bias",
        "encoder.norm.weight",
        "encoder.norm.bias",
        "decoder.cls_emb",
        "decoder.proj_dec.weight",
        "decoder.proj_dec.bias",
        "decoder.decoder_norm.weight",
        "decoder.decoder_norm.bias",
        "decoder.proj_patch",
        "decoder.proj_classes",
        "decoder.mask_norm.weight",
        "decoder.mask_norm.bias",
    }
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    assert keys - own == {
        f"{part}.blocks.{number}.{layer}.{kind}"
        for part in ("encoder", "decoder")
        for number in range(2)
        for layer in layers
        for kind in ("weight", "bias")
    }
    linear = {key for key in tiny("linear").state_dict() if key.startswith("decoder.")}
    assert linear == {"decoder.head.weight", "decoder.head.bias"}


def test_fresh_mask_scores_have_mean_zero_and_known_variance():
    decoder = MaskTransformer(in_channels=64, num_classes=9, embed_dim=64, num_heads=1)
    decoder = decoder.double().eval()
    tokens = torch.randn(2, 12, 64, dtype=torch.float64)
    before = decoder.scores(tokens).var(-1, unbiased=False)
    after = decoder(tokens, (3, 4)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(after.mean(-1), torch.zeros_like(before), rtol=0, atol=1e-12)
    torch.testing.assert_close(after.var(-1, unbiased=False), before / (before + 1e-5))


def test_scores_are_cosines():
    scores = randomized(mask_decoder()).scores(torch.randn(2, 7, 6, dtype=torch.float64))
    assert scores.abs().max() <= 1 + 1e-12
    free = randomized(mask_decoder(normalize_classes=False))
    assert free.scores(torch.randn(2, 7, 6, dtype=torch.float64)).abs().max() > 1


def test_permuted_classes_permute_the_scores():
    decoder = randomized(mask_decoder())
    tokens = torch.randn(2, 7, 6, dtype=torch.float64)
    before = decoder.scores(tokens)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        decoder.cls_emb.copy_(decoder.cls_emb[:, order].clone())
    torch.testing.assert_close(decoder.scores(tokens), before[..., order])


def test_a_zero_token_gives_finite_scores():
    decoder = randomized(mask_decoder())
    with torch.no_grad():
        decoder.proj_patch.zero_()
    assert (decoder.scores(torch.randn(1, 3, 6, dtype=torch.float64)) == 0).all()


@pytest.mark.parametrize("decoder", ["linear", "mask"])
def test_every_parameter_gets_a_gradient(decoder):
    model = tiny(decoder, distilled=True)
    logits = model(torch.randn(2, 3, 8, 12))
    F.cross_entropy(logits, torch.randint(0, 5, (2, 8, 12))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_gradcheck():
    model = randomized(tiny(image_size=(4, 4), num_classes=2))
    image = torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (image,))


@pytest.mark.parametrize("decoder", ["linear", "mask"])
def test_images_of_a_batch_do_not_mix(decoder):
    model = randomized(tiny(decoder))
    image = torch.randn(3, 3, 6, 9, dtype=torch.float64)
    torch.testing.assert_close(model(image), torch.cat([model(one[None]) for one in image]))


def test_memory_layout_does_not_matter():
    model = randomized(tiny())
    image = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    expected = model(image)
    channels_last = image.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(channels_last), expected)
    torch.testing.assert_close(model(F.pad(image, [1, 2, 3, 4])[..., 3:-4, 1:-2]), expected)


@pytest.mark.parametrize("decoder", ["linear", "mask"])
def test_bfloat16_autocast_forward_and_backward(decoder):
    model = tiny(decoder).eval()
    image = torch.randn(2, 3, 7, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(image)
        F.cross_entropy(out.float(), torch.randint(0, 5, (2, 7, 12))).backward()
    # LN over the classes magnifies cosines that are nearly equal: 5% of the largest logit.
    torch.testing.assert_close(out.float(), model(image), rtol=0, atol=0.1)
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_weights_in_bfloat16_work_too():
    model = tiny().eval()
    image = torch.randn(2, 3, 8, 12)
    low = tiny().eval().bfloat16()
    low.load_state_dict(model.state_dict())
    out = low(image.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), model(image), rtol=0, atol=0.15)


def test_decoder_drops_in_training_by_default_and_the_encoder_does_not():
    model = tiny(drop_path_rate=0.0)
    image = torch.randn(1, 3, 8, 12)
    model.train()
    assert torch.equal(model.encoder(image), model.encoder(image))
    assert not torch.equal(model(image), model(image))
    model.eval()
    assert torch.equal(model(image), model(image))


def test_attention_maps_of_both_parts():
    model = randomized(tiny(distilled=True))
    image = torch.randn(2, 3, 7, 12, dtype=torch.float64)  # 2 x 3 patches once padded
    encoder = model.attention_map(image, layer=0)
    assert encoder.shape == (2, 2, 2 + 6, 2 + 6)
    assert torch.equal(encoder, model.encoder.attention_map(F.pad(image, [0, 0, 0, 1]), layer=0))
    decoder = model.attention_map(image, part="decoder")
    assert decoder.shape == (2, 2, 6 + 5, 6 + 5)
    for maps in (encoder, decoder):
        torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))


def test_attention_map_of_the_decoder_equals_the_equation():
    decoder = randomized(mask_decoder())
    tokens = torch.randn(1, 4, 6, dtype=torch.float64)
    state = decoder.state_dict()
    x = tokens[0] @ state["proj_dec.weight"].T + state["proj_dec.bias"]
    x = torch.cat([x, state["cls_emb"][0]])
    _, expected = oracle.block(x, oracle.part(state, "blocks.0."), 2, 1e-5)
    torch.testing.assert_close(decoder.attention_map(tokens, layer=0)[0], expected)


def test_parameters_without_weight_decay():
    assert tiny(distilled=True).no_weight_decay() == {
        "encoder.pos_embed",
        "encoder.cls_token",
        "encoder.dist_token",
        "decoder.cls_emb",
    }


def test_decoders_start_as_specified():
    d = 96
    decoder = MaskTransformer(in_channels=d, num_classes=50, embed_dim=d, num_heads=2)
    assert decoder.cls_emb.std().item() == pytest.approx(0.02, rel=0.1)
    assert decoder.proj_dec.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for parameter in (decoder.proj_patch, decoder.proj_classes):
        assert parameter.std().item() == pytest.approx(d**-0.5, rel=0.1)
    linear = LinearDecoder(in_channels=d, num_classes=50)
    assert linear.head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert linear.head.bias.abs().max() == 0


def test_stochastic_depth_of_the_decoder():
    rates = [b.drop_path.drop_path_rate for b in mask_decoder(drop_path_rate=0.1).blocks]
    assert rates == [0, 0.1]
    assert [b.drop_path.drop_path_rate for b in mask_decoder().blocks] == [0, 0]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: mask_decoder(num_classes=0), ValueError, "num_classes: expected at least 1"),
        (lambda: LinearDecoder(in_channels=8, num_classes=1.5), TypeError, "num_classes: expected"),
        (
            lambda: mask_decoder()(torch.zeros(1, 4, 7), (2, 2)),
            ValueError,
            "tokens: expected 6 channels, got 7",
        ),
        (
            lambda: mask_decoder()(torch.zeros(1, 5, 6), (2, 2)),
            ValueError,
            r"tokens: expected 2 \* 2 of them for the grid \(2, 2\), got 5; pass patch tokens only",
        ),
        (
            lambda: tokens_to_map(torch.zeros(5, 6), (1, 5)),
            ValueError,
            r"expected non-empty tokens \[B, N, C\]",
        ),
        (lambda: tiny()(torch.zeros(3, 8, 8)), ValueError, "image: expected a non-empty map"),
        (lambda: tiny()(torch.zeros(1, 3, 8, 8).long()), TypeError, "got torch.int64; call .float"),
        (
            lambda: tiny().attention_map(torch.zeros(1, 3, 8, 8), part="neck"),
            ValueError,
            "part: expected one of 'encoder', 'decoder', got 'neck'",
        ),
        (
            lambda: tiny("linear").attention_map(torch.zeros(1, 3, 8, 8), part="decoder"),
            ValueError,
            "got LinearDecoder; use part='encoder'",
        ),
    ],
)
def test_says_what_is_wrong(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["linear", "mask"])
def test_compiled_and_exported_equal_eager(decoder):
    """The second size makes the compiler switch to sizes that vary."""
    model = tiny(decoder).eval()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for size in ((8, 12), (7, 18), (9, 9)):
            image = torch.randn(2, 3, *size)
            expected = model(image)
            torch.testing.assert_close(compiled(image), expected, rtol=0, atol=1e-5)
        exported = torch.export.export(model, (image,)).module()(image)
    torch.testing.assert_close(exported, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_exported_for_any_multiple_of_the_patch():
    model = tiny().eval()
    sides = {2: 4 * torch.export.Dim("h", max=64), 3: 4 * torch.export.Dim("w", max=64)}
    image = torch.randn(2, 3, 16, 20)
    exported = torch.export.export(model, (image,), dynamic_shapes=(sides,)).module()
    for size in ((16, 20), (24, 12), (12, 40)):
        image = torch.randn(2, 3, *size)
        torch.testing.assert_close(exported(image), model(image), rtol=0, atol=1e-5)
