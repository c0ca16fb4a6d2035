"""The ViT encoder against loops, timm, counts, and the rules of its position table."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ctxops.vit import VARIANTS, VisionTransformer, build_vit
from tests.oracles import segmenter as oracle


def tiny(*, image_size=(8, 12), num_layers=2, **keywords):
    return VisionTransformer(
        image_size=image_size,
        patch_size=4,
        embed_dim=8,
        num_layers=num_layers,
        num_heads=2,
        **keywords,
    )


def randomized(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


def images(height, width, batch=2):
    return torch.randn(batch, 3, height, width, dtype=torch.float64)


@pytest.mark.parametrize("distilled", [False, True])
def test_equals_the_equations(distilled):
    encoder = randomized(tiny(distilled=distilled, layer_norm_eps=1e-3))
    image = images(8, 12)
    options = {"patch_size": 4, "num_layers": 2, "num_heads": 2, "eps": 1e-3}
    expected = [oracle.encoder(one, encoder.state_dict(), **options) for one in image]
    torch.testing.assert_close(encoder(image), torch.stack(expected))


def timm_model(name, **keywords):
    timm = pytest.importorskip("timm", reason="compares with timm, which is not installed")
    return timm.create_model(name, pretrained=False, num_classes=0, **keywords).eval()


@pytest.mark.parametrize(
    ("name", "variant", "patch_size", "distilled"),
    [
        ("vit_tiny_patch16_384", "Ti", 16, False),
        ("vit_small_patch32_384", "S", 32, False),
        ("vit_base_patch8_224", "B", 8, False),
        ("vit_large_patch16_384", "L", 16, False),
        ("deit_base_distilled_patch16_384", "B", 16, True),
    ],
)
def test_names_and_shapes_are_those_of_timm(name, variant, patch_size, distilled):
    with torch.device("meta"):
        theirs = timm_model(name, img_size=96)
        ours = build_vit(
            variant=variant, image_size=(96, 96), patch_size=patch_size, distilled=distilled
        )

    def shapes(model):
        return {key: tuple(value.shape) for key, value in model.state_dict().items()}

    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize(
    ("name", "distilled"),
    [("vit_tiny_patch16_384", False), ("deit_tiny_distilled_patch16_224", True)],
)
def test_features_are_those_of_timm(name, distilled):
    theirs = timm_model(name, img_size=64)
    ours = build_vit(
        variant="Ti", image_size=(64, 64), distilled=distilled, layer_norm_eps=1e-6
    ).eval()
    for parameter in theirs.parameters():  # zero biases and unit norms would hide mistakes
        nn.init.normal_(parameter, std=0.05)
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.forward_features(image)[:, theirs.num_prefix_tokens :]
        torch.testing.assert_close(ours(image), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("image_size", "grid"), [((8, 12), (2, 3)), ((7, 9), (2, 3)), ((1, 4), (1, 1))]
)
def test_table_is_made_for_the_padded_crop(image_size, grid):
    encoder = tiny(image_size=image_size, distilled=True)
    assert encoder.grid == grid
    assert encoder.pos_embed.shape == (1, 2 + grid[0] * grid[1], 8)


def test_grid_of_training_takes_the_parameter_untouched():
    encoder = tiny()
    assert encoder.position((2, 3)) is encoder.pos_embed


def test_grids_of_as_many_patches_get_different_tables():
    encoder = tiny(image_size=(16, 16), distilled=True)
    square, wide = encoder.position((4, 4)), encoder.position((2, 8))
    assert square.shape == wide.shape
    assert (square - wide).abs().max() > 1e-3
    assert torch.equal(square[:, :2], wide[:, :2])
    assert encoder(torch.randn(1, 3, 8, 32)).shape == (1, 16, 8)


def test_table_is_resized_as_asked():
    bilinear, bicubic = tiny(), tiny(pos_embed_resize="bicubic")
    bicubic.load_state_dict(bilinear.state_dict())
    assert (bilinear.position((4, 5)) - bicubic.position((4, 5))).abs().max() > 1e-3
    table = bilinear.pos_embed.detach()[:, 1:].reshape(1, 2, 3, 8).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(table, (4, 5), mode="bilinear", align_corners=False)
    expected = resized.flatten(2).transpose(1, 2)
    torch.testing.assert_close(bilinear.position((4, 5))[:, 1:], expected)


def test_position_of_a_patch_is_its_own():
    """A table that is zero but for one patch moves the embedding of that patch only."""
    encoder = tiny().eval()
    image = torch.randn(1, 3, 8, 12)
    before = encoder.embed(image)
    with torch.no_grad():
        encoder.pos_embed[:, 1 + 4] += 1
    changed = (encoder.embed(image) - before).abs().sum(-1)[0].nonzero().flatten()
    assert changed.tolist() == [5]


def test_maps_after_layers():
    encoder = randomized(tiny(num_layers=3, distilled=True))
    image = images(8, 12)
    first, last = encoder.intermediate_maps(image, after=(1, 3))
    assert first.shape == last.shape == (2, 8, 2, 3)
    tokens = encoder.norm(last.flatten(2).transpose(1, 2))
    torch.testing.assert_close(tokens, encoder(image))
    expected = encoder.blocks[0](encoder.embed(image))[:, 2:]
    torch.testing.assert_close(first, expected.transpose(1, 2).reshape(2, 8, 2, 3))


def test_without_the_last_norm_nothing_of_it_is_left():
    encoder = randomized(tiny(final_norm=False))
    assert not any(key.startswith("norm.") for key in encoder.state_dict())
    image = images(8, 12)
    (last,) = encoder.intermediate_maps(image, after=(2,))
    torch.testing.assert_close(encoder(image), last.flatten(2).transpose(1, 2))


def test_layers_behind_the_last_map_do_not_run():
    encoder = tiny(num_layers=3)
    encoder.blocks[2].register_forward_hook(lambda *_: pytest.fail("ran"))
    encoder.intermediate_maps(torch.randn(1, 3, 8, 12), after=(1, 2))


def test_attention_map_of_the_first_layer():
    encoder = randomized(tiny(distilled=True))
    image = images(8, 12)
    state = oracle.part(encoder.state_dict(), "blocks.0.")
    _, expected = oracle.block(encoder.embed(image)[0], state, 2, 1e-5)
    actual = encoder.attention_map(image, layer=0)
    assert actual.shape == (2, 2, 8, 8)
    torch.testing.assert_close(actual[0], expected)


def test_images_of_a_batch_do_not_mix():
    encoder = randomized(tiny())
    image = images(4, 20, batch=3)
    torch.testing.assert_close(encoder(image), torch.cat([encoder(one[None]) for one in image]))


@pytest.mark.parametrize("distilled", [False, True])
def test_every_parameter_gets_a_gradient(distilled):
    encoder = tiny(distilled=distilled)
    out = encoder(torch.randn(2, 3, 8, 12))
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_tables_and_tokens_start_as_specified():
    encoder = build_vit(variant="Ti", image_size=(128, 128), distilled=True)
    for parameter in (encoder.pos_embed, encoder.cls_token, encoder.dist_token):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.2)
    # PyTorch's own default: uniform within 1 / sqrt(fan-in).
    assert encoder.patch_embed.proj.weight.abs().max().item() == pytest.approx(768**-0.5, rel=1e-2)


def test_embeddings_drop_in_training():
    encoder = tiny(dropout=0.5, num_layers=1)
    with torch.no_grad():
        encoder.pos_embed.fill_(10.0)
    dropped = encoder.embed(torch.zeros(1, 3, 8, 12)) == 0
    assert 0 < dropped.sum() < dropped.numel()


@pytest.mark.parametrize(
    ("variant", "patch_size", "size", "distilled"),
    [("Ti", 16, 512, False), ("S", 32, 512, False), ("B", 16, 512, True), ("L", 16, 640, False)],
)
def test_parameter_count(variant, patch_size, size, distilled):
    with torch.device("meta"):
        encoder = build_vit(
            variant=variant, image_size=(size, size), patch_size=patch_size, distilled=distilled
        )
    d, layers, _ = VARIANTS[variant]
    prefix, tokens = 1 + distilled, (size // patch_size) ** 2
    expected = (3 * patch_size**2 * d + d) + prefix * d + (tokens + prefix) * d
    expected += layers * (12 * d**2 + 13 * d) + 2 * d
    assert sum(p.numel() for p in encoder.parameters()) == expected


def test_heads_of_the_named_sizes_are_64_wide():
    assert all(width == 64 * heads for width, _, heads in VARIANTS.values())


def test_unept_backbone_has_no_norm_and_no_head():
    with torch.device("meta"):
        encoder = build_vit(variant="B", image_size=(480, 480), distilled=True, final_norm=False)
    assert sum(p.numel() for p in encoder.parameters()) == 86_339_328


def test_macs():
    with torch.device("meta"):
        encoder = build_vit(variant="Ti", image_size=(512, 512))
        image = torch.empty(1, 3, 512, 512)
    with FlopCounterMode(display=False) as counter:
        encoder(image)
    n, d = 1025, 192
    expected = 3 * 1024 * 16**2 * d + 12 * (12 * d**2 * n + 2 * n**2 * d)
    assert counter.get_total_flops() / 2 == expected


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: build_vit(variant="H", image_size=(64, 64)),
            ValueError,
            "variant: expected one of 'Ti', 'S', 'B', 'L', got 'H'",
        ),
        (lambda: tiny(image_size=(8, 0)), ValueError, "image_size: expected at least 1, got 0"),
        (lambda: tiny(image_size=(8, 8.0)), TypeError, "image_size: expected an integer, got 8.0"),
        (lambda: tiny(pos_embed_resize="nearest"), ValueError, "pos_embed_resize: .* 'bicubic'"),
        (lambda: tiny(dropout=2.0), ValueError, "dropout: expected a probability"),
        (lambda: tiny(drop_path_rate=1.0), ValueError, "drop_path_rate: expected a probability"),
        (lambda: tiny()(torch.zeros(1, 3, 9, 12)), ValueError, "image: .* multiples of 4"),
        (
            lambda: tiny().intermediate_maps(torch.zeros(1, 3, 8, 8), after=(2, 1)),
            ValueError,
            r"after: expected rising numbers of layers from 1 to 2, got \[2, 1\]",
        ),
        (
            lambda: tiny().intermediate_maps(torch.zeros(1, 3, 8, 8), after=(0,)),
            ValueError,
            r"got \[0\]; \(2,\) is after the last layer only",
        ),
        (
            lambda: tiny().intermediate_maps(torch.zeros(1, 3, 8, 8), after=()),
            ValueError,
            "after: expected",
        ),
        (
            lambda: tiny().attention_map(torch.zeros(1, 3, 8, 8), layer=-3),
            ValueError,
            "layer: expected an index of 2 layers, got -3",
        ),
    ],
)
def test_says_what_is_wrong(call, error, text):
    with pytest.raises(error, match=text):
        call()
