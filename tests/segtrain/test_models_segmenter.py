"""Segmenter from its configuration: counts of the paper, every field, pixels, gradients."""

import pytest
import torch
import torch.nn.functional as F

from ctxops.drop import DropPath
from ctxops.segmenter import LinearDecoder, MaskTransformer, Segmenter
from ctxops.vit import VisionTransformer
from segtrain.config.schema import SEGMENTER_VARIANTS, SegmenterConfig
from segtrain.errors import UserError
from segtrain.models import MODELS
from segtrain.models.pretrained import BACKBONES, backbone_of, normalisation_of
from segtrain.normalisation import NORMALISATIONS
from tests.segtrain.toy_segmenter import built, randomized, tiny

# variant, patch, distilled, side, classes, decoder layers -> linear, mask (specified counts).
COUNTS = [
    ("Ti", 16, False, 512, 150, 2, 5_712_342, 6_713_388),
    ("S", 16, False, 512, 150, 2, 22_041_366, 26_033_964),
    ("S", 32, False, 512, 150, 2, 22_631_190, 26_623_788),
    ("B", 16, False, 512, 150, 2, 86_549_910, 102_497_580),
    ("B", 16, True, 512, 150, 2, 86_551_446, 102_499_116),
    ("B", 32, False, 512, 150, 2, 87_729_558, 103_677_228),
    ("B", 8, False, 512, 150, 2, 88_466_838, 104_414_508),
    ("L", 16, False, 512, 150, 2, 304_303_254, 332_644_652),
    ("L", 16, False, 640, 150, 2, 304_893_078, 333_234_476),
    ("L", 16, False, 480, 60, 2, 304_084_028, 332_425_336),
    ("L", 16, False, 768, 19, 1, 305_479_699, 321_224_742),
]


def config(**fields) -> SegmenterConfig:
    return SegmenterConfig.model_validate({"name": "segmenter", **fields})


@pytest.mark.parametrize(
    ("variant", "patch", "distilled", "side", "classes", "layers", "linear", "mask"), COUNTS
)
def test_parameters(variant, patch, distilled, side, classes, layers, linear, mask):
    fields = {"variant": variant, "patch_size": patch, "distilled": distilled}
    for decoder, expected in (("linear", linear), ("mask", mask)):
        with torch.device("meta"):
            model = built(
                fields | {"decoder": decoder, "decoder_layers": layers},
                num_classes=classes,
                image_size=(side, side),
            )
        assert sum(p.numel() for p in model.parameters()) == expected


def test_every_field_arrives():
    model = tiny(
        decoder_layers=3,
        distilled=True,
        dropout=0.25,
        drop_path_rate=0.5,
        decoder_dropout=0.375,
        decoder_drop_path=0.75,
        layer_norm_eps=1e-4,
        decoder_layer_norm_eps=1e-3,
        pos_embed_resize="bicubic",
        normalize_classes=False,
    )
    encoder, decoder = model.encoder, model.decoder
    assert encoder.num_prefix == 2
    assert (encoder.pos_embed_resize, decoder.normalize_classes) == ("bicubic", False)
    assert (len(encoder.blocks), len(decoder.blocks)) == (2, 3)
    assert (encoder.blocks[0].attn.dropout, decoder.blocks[0].attn.dropout) == (0.25, 0.375)
    assert (encoder.norm.eps, decoder.mask_norm.eps, decoder.decoder_norm.eps) == (1e-4, 1e-3, 1e-3)
    rates = [
        max(m.drop_path_rate for m in part.modules() if isinstance(m, DropPath))
        for part in (encoder, decoder)
    ]
    assert rates == [0.5, 0.75]
    assert tiny(layer_norm_eps=1e-4).decoder.mask_norm.eps == 1e-4


@pytest.mark.parametrize("decoder", ["linear", "mask"])
def test_built_from_keys_equals_built_by_hand(decoder):
    model = randomized(tiny(decoder=decoder)).eval()
    encoder = VisionTransformer(
        image_size=(8, 12), patch_size=4, embed_dim=8, num_layers=2, num_heads=2
    )
    head = LinearDecoder(in_channels=8, num_classes=5)
    if decoder == "mask":
        head = MaskTransformer(in_channels=8, num_classes=5, embed_dim=8, num_heads=2, num_layers=1)
    by_hand = Segmenter(encoder=encoder, decoder=head).eval()
    by_hand.load_state_dict(model.state_dict(), strict=True)
    image = torch.randn(2, 3, 7, 13)
    assert torch.equal(model(image)["logits"], by_hand(image))


@pytest.mark.parametrize("decoder", ["linear", "mask"])
@pytest.mark.parametrize("distilled", [False, True])
def test_one_step_reaches_every_parameter(decoder, distilled):
    torch.manual_seed(0)
    model = randomized(tiny(decoder=decoder, distilled=distilled)).train()
    labels = torch.randint(0, 5, (2, 9, 13))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(2, 3, 9, 13))["logits"]
    F.cross_entropy(logits.float(), labels).backward()
    assert logits.isfinite().all()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


def test_groups_of_the_optimizer():
    model = tiny(distilled=True)
    assert model.backbone_parameters() == ("encoder.",)
    assert model.no_weight_decay() == {
        "encoder.pos_embed",
        "encoder.cls_token",
        "encoder.dist_token",
        "decoder.cls_emb",
    }


def test_class_parameters_are_those_whose_shape_depends_on_the_classes():
    for decoder in ("linear", "mask"):
        a, b = tiny(decoder=decoder).state_dict(), tiny(decoder=decoder, num_classes=9).state_dict()
        differ = {name for name in a if a[name].shape != b[name].shape}
        assert differ == set(tiny(decoder=decoder).class_parameters())


def test_sizes_are_those_of_the_op_library():
    from ctxops.vit import VARIANTS

    assert VARIANTS == SEGMENTER_VARIANTS
    assert set(MODELS) == {"network", "segmenter"}


# ---- pretrained encoders ---------------------------------------------------------------------
def test_pixels_belong_to_the_weights():
    assert normalisation_of(config(variant="Ti")) == "vit"
    deit = "deit_base_distilled_patch16_384.fb_in1k"
    assert normalisation_of(config(variant="B", distilled=True, pretrained=deit)) == "imagenet"
    assert normalisation_of(config(variant="B", distilled=True)) == "imagenet"
    assert tiny().normalisation == "vit"
    assert NORMALISATIONS["vit"] == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("name", BACKBONES)
def test_every_entry_fits_the_model_it_names(name):
    entry = BACKBONES[name]
    fields = {k: getattr(entry, k) for k in ("variant", "patch_size", "distilled")}
    assert backbone_of(config(**fields, pretrained=name)) == entry


@pytest.mark.parametrize("name", BACKBONES)
def test_the_table_agrees_with_timm(name):
    timm = pytest.importorskip("timm")
    entry, about = BACKBONES[name], timm.get_pretrained_cfg(name)
    assert about is not None
    assert about.tag == name.partition(".")[2]
    assert about.input_size == (3, entry.image_size, entry.image_size)
    assert (about.mean, about.std) == NORMALISATIONS[entry.normalisation]


def test_names_without_a_tag_are_refused():
    with pytest.raises(UserError, match="several weights; write pretrained: vit_base"):
        backbone_of(config(variant="B", pretrained="vit_base_patch16_384"))


def test_weights_of_another_size_are_refused():
    name = "vit_base_patch32_384.augreg_in21k_ft_in1k"
    with pytest.raises(
        UserError, match=r"write patch_size: 32, or take pretrained: vit_base_p\S+16"
    ):
        built({"variant": "B", "pretrained": name}, num_classes=2, image_size=(32, 32))
    deit = "deit_base_distilled_patch16_384.fb_in1k"
    with pytest.raises(UserError, match="distilled: true"):
        built({"variant": "B", "pretrained": deit}, num_classes=2, image_size=(32, 32))
