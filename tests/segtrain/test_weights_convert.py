"""Checkpoints of the authors and MMSegmentation: both ways, to the stored outputs, refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from segtrain.config.schema import SegmenterConfig
from segtrain.errors import UserError
from segtrain.models import build_model
from segtrain.weights.convert import convert, understand
from segtrain.weights.describe import architecture_of
from segtrain.weights.layouts import (
    MMSEGMENTATION,
    SEGMENTER,
    TIMM,
    from_segmenter,
    layout_of,
    to_segmenter,
)
from segtrain.weights.load import load_weights
from segtrain.weights.official import read_variant
from segtrain.weights.read import read_weights
from tests.segtrain.toy_segmenter import built, randomized, tiny
from tests.shared_data import SHARED, needs_shared

CASES = ["segmenter_linear", "segmenter_mask", "segmenter_mask_distilled"]
GOLDENS = SHARED / "goldens" / "dev"


def golden(case: str):
    """Weights with the classifiers, tensors, and what stands beside them."""
    weights = load_file(GOLDENS / f"{case}.weights.safetensors")
    about = json.loads((GOLDENS / f"{case}.json").read_text())
    return (
        {k: v.float() for k, v in weights.items()},
        load_file(GOLDENS / f"{case}.safetensors"),
        about,
    )


def official_run(folder: Path, case: str) -> Path:
    """A folder as the authors' code writes it."""
    weights, _, about = golden(case)
    state = {"model": weights, "optimizer": {"state": {}}, "n_cls": 7, "epoch": 3}
    state["lr_scheduler"] = {"base_values": [0.001], "param_group_field": "lr"}
    torch.save(state, folder / "checkpoint.pth")
    (folder / "variant.yml").write_text(about["variant_yml"])
    return folder / "checkpoint.pth"


def check_outputs(model, tensors, about):
    for name in ("train_size", "padded", "nonsquare"):
        key = f"output.logits_{name}"
        with torch.no_grad():
            out = model(tensors[f"input.{name}"])["logits"]
        atol = about["tolerance"][key]["suggested_atol_float32"]
        torch.testing.assert_close(out, tensors[key], rtol=0, atol=atol)


@needs_shared
@pytest.mark.parametrize("case", CASES)
def test_checkpoints_of_the_authors_give_the_stored_outputs(case, tmp_path):
    source, target = official_run(tmp_path, case), tmp_path / "new" / "ours.safetensors"
    found = convert(source, target)
    _, tensors, about = golden(case)
    model = built(found.config["model"], num_classes=7, image_size=found.config["data"]["crop"])
    assert load_weights(model, target).complete
    check_outputs(model.eval(), tensors, about)
    expected = {"encoder.head.weight", "encoder.head.bias"}
    if "distilled" in case:
        expected |= {"encoder.head_dist.weight", "encoder.head_dist.bias"}
    assert set(found.left_out) == expected


@needs_shared
@pytest.mark.parametrize("case", ["segmenter_linear", "segmenter_mask"])
def test_the_way_through_mmsegmentation_changes_no_bit(case, tmp_path):
    weights, _, _ = golden(case)
    ours = to_segmenter(weights)
    theirs = from_segmenter(ours, MMSEGMENTATION)
    assert layout_of(theirs) == MMSEGMENTATION
    assert not set(theirs) & set(ours)
    back = to_segmenter(theirs)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


@needs_shared
def test_mmsegmentation_files_give_the_stored_outputs(tmp_path):
    weights, tensors, about = golden("segmenter_mask")
    theirs = from_segmenter(to_segmenter(weights), MMSEGMENTATION)
    torch.save({"state_dict": theirs, "meta": {"mmseg_version": "0.30"}}, tmp_path / "m.pth")
    found = convert(tmp_path / "m.pth", tmp_path / "ours.safetensors")
    fields = dict(found.config["model"])
    assert (fields.pop("layer_norm_eps"), fields.pop("decoder_layer_norm_eps")) == (1e-6, 1e-5)
    assert fields.pop("pos_embed_resize") == "bicubic"
    model = built(fields, num_classes=7, image_size=(64, 64))
    model.load_state_dict(load_file(tmp_path / "ours.safetensors"), strict=True)
    check_outputs(model.eval(), tensors, about)


@needs_shared
def test_a_matrix_that_is_not_turned_would_be_seen(tmp_path):
    weights, tensors, about = golden("segmenter_mask")
    theirs = from_segmenter(to_segmenter(weights), MMSEGMENTATION)
    name = "decode_head.patch_proj.weight"
    theirs[name] = theirs[name].T.contiguous()
    model = built(
        {"embed_dim": 128, "depth": 2, "num_heads": 2}, num_classes=7, image_size=(64, 64)
    )
    model.load_state_dict(to_segmenter(theirs))
    with pytest.raises(AssertionError, match="not close"):
        check_outputs(model.eval(), tensors, about)


# MMSegmentation's names as its published files have them, for one layer of each part.
BLOCK = {
    "ln1.weight": (8,),
    "ln1.bias": (8,),
    "attn.attn.in_proj_weight": (24, 8),
    "attn.attn.in_proj_bias": (24,),
    "attn.attn.out_proj.weight": (8, 8),
    "attn.attn.out_proj.bias": (8,),
    "ln2.weight": (8,),
    "ln2.bias": (8,),
    "ffn.layers.0.0.weight": (32, 8),
    "ffn.layers.0.0.bias": (32,),
    "ffn.layers.1.weight": (8, 32),
    "ffn.layers.1.bias": (8,),
}
BACKBONE = {
    "backbone.cls_token": (1, 1, 8),
    "backbone.pos_embed": (1, 7, 8),
    "backbone.patch_embed.projection.weight": (8, 3, 4, 4),
    "backbone.patch_embed.projection.bias": (8,),
    "backbone.ln1.weight": (8,),
    "backbone.ln1.bias": (8,),
    **{f"backbone.layers.{n}.{name}": shape for n in (0, 1) for name, shape in BLOCK.items()},
}
HEADS = {
    "linear": {"decode_head.conv_seg.weight": (5, 8, 1, 1), "decode_head.conv_seg.bias": (5,)},
    "mask": {
        "decode_head.cls_emb": (1, 5, 8),
        "decode_head.dec_proj.weight": (8, 8),
        "decode_head.dec_proj.bias": (8,),
        "decode_head.patch_proj.weight": (8, 8),
        "decode_head.classes_proj.weight": (8, 8),
        "decode_head.decoder_norm.weight": (8,),
        "decode_head.decoder_norm.bias": (8,),
        "decode_head.mask_norm.weight": (5,),
        "decode_head.mask_norm.bias": (5,),
        **{f"decode_head.layers.0.{name}": shape for name, shape in BLOCK.items()},
    },
}


@pytest.mark.parametrize("decoder", HEADS)
def test_names_of_mmsegmentation_are_names_of_the_model(decoder):
    theirs = {name: torch.randn(shape) for name, shape in (BACKBONE | HEADS[decoder]).items()}
    model = tiny(decoder=decoder)
    model.load_state_dict(to_segmenter(theirs), strict=True)
    back = from_segmenter(model.state_dict(), MMSEGMENTATION)
    assert {n: tuple(v.shape) for n, v in back.items()} == BACKBONE | HEADS[decoder]
    if decoder == "mask":
        name = "decode_head.patch_proj.weight"
        torch.testing.assert_close(model.decoder.proj_patch.detach(), theirs[name].T)


def test_timms_encoder_becomes_the_part_encoder():
    ours = tiny().state_dict()
    timm = from_segmenter(ours, TIMM)
    assert layout_of(timm) == TIMM
    back = to_segmenter(timm | {"head.weight": torch.zeros(10, 8), "head.bias": torch.zeros(10)})
    assert set(back) == {name for name in ours if name.startswith("encoder.")}


@pytest.mark.parametrize("decoder", ["linear", "mask"])
@pytest.mark.parametrize("distilled", [False, True])
def test_sizes_are_read_off_the_tensors(decoder, distilled):
    model = tiny(decoder=decoder, distilled=distilled)
    found = architecture_of(model.state_dict())
    assert (found.embed_dim, found.depth, found.patch_size) == (8, 2, 4)
    assert (found.distilled, found.decoder, found.num_classes) == (distilled, decoder, 5)
    assert found.num_positions == 6
    assert found.decoder_layers == (decoder == "mask")


@pytest.mark.parametrize("decoder", ["linear", "mask"])
def test_the_printed_configuration_is_one(decoder, tmp_path):
    model = built({"variant": "Ti", "decoder": decoder}, num_classes=3, image_size=(32, 32))
    theirs = from_segmenter(model.state_dict(), MMSEGMENTATION)
    save_file(theirs, tmp_path / "m.safetensors")
    text = understand(read_weights(tmp_path / "m.safetensors")).yaml()
    config = SegmenterConfig.model_validate(yaml.safe_load(text)["model"])
    assert (config.variant, config.decoder, config.pos_embed_resize) == ("Ti", decoder, "bicubic")


def test_our_files_carry_grid_and_settings(tmp_path):
    model = randomized(tiny())  # a grid of 2x3
    save_file(from_segmenter(model.state_dict(), MMSEGMENTATION), tmp_path / "m.safetensors")
    convert(tmp_path / "m.safetensors", tmp_path / "a.safetensors")
    wide = tiny(layer_norm_eps=1e-6, decoder_layer_norm_eps=1e-5, pos_embed_resize="bicubic")
    assert load_weights(wide, tmp_path / "a.safetensors").complete
    with pytest.raises(UserError, match="write in model: layer_norm_eps: 1e-06, pos_embed_resize"):
        load_weights(tiny(), tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    again = understand(read_weights(tmp_path / "b.safetensors"))
    assert again.config["model"]["decoder_layer_norm_eps"] == 1e-5


# ---- variant.yml -----------------------------------------------------------------------------
VARIANT = """
net_kwargs:
  backbone: vit_base_patch16_384
  d_model: 768
  n_heads: 12
  n_layers: 12
  patch_size: 16
  image_size: !!python/tuple [512, 512]
  normalization: deit
  dropout: 0.0
  drop_path_rate: 0.1
  n_cls: 150
  decoder: {name: mask_transformer, n_layers: 1, drop_path_rate: 0.0, dropout: 0.1}
inference_kwargs: {im_size: 512, window_size: 512, window_stride: 480}
"""


def test_variant_in_our_words(tmp_path):
    (tmp_path / "variant.yml").write_text(VARIANT)
    said = read_variant(tmp_path / "variant.yml")
    assert (said.num_heads, said.num_classes) == (12, 150)
    assert said.model["decoder"] == "mask"
    assert said.model["decoder_layers"] == 1
    assert said.model["distilled"] is False
    assert said.data == {"crop": [512, 512], "normalisation": "imagenet"}
    assert said.eval == {"window": 512, "stride": 480}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system [echo]", "is no plain YAML"),
        ("a: !!python/name:os.system", "is no plain YAML"),
        ("a: [", "is no plain YAML"),
        ("net_kwargs: {}", "lacks 'decoder'"),
        ("- 1", "lacks"),
        ("", "lacks"),
    ],
)
def test_other_variants_are_refused(text, message, tmp_path):
    (tmp_path / "variant.yml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_variant(tmp_path / "variant.yml")


def test_absent_variant_is_named(tmp_path):
    with pytest.raises(UserError, match="no.yml does not exist"):
        read_variant(tmp_path / "no.yml")


def test_a_variant_of_another_checkpoint_is_refused(tmp_path):
    torch.save({"model": tiny().state_dict()}, tmp_path / "checkpoint.pth")
    (tmp_path / "variant.yml").write_text(VARIANT)
    with pytest.raises(UserError, match="says 150 classes, the tensors have 5"):
        understand(read_weights(tmp_path / "checkpoint.pth"))


# ---- what is refused -------------------------------------------------------------------------
def test_other_networks_are_refused():
    with pytest.raises(UserError, match=r"expected the weights of a Segmenter .* got conv1.weight"):
        layout_of(["conv1.weight"])


def test_other_heads_of_mmsegmentation_are_refused():
    theirs = {name: torch.zeros(shape) for name, shape in BACKBONE.items()}
    with pytest.raises(UserError, match="Segmenter has no counterpart of decode_head.bn.weight"):
        to_segmenter(theirs | {"decode_head.bn.weight": torch.zeros(8)})


def test_mmsegmentation_has_no_distillation_token():
    with pytest.raises(UserError, match="MMSegmentation has no counterpart of encoder.dist_token"):
        from_segmenter(tiny(distilled=True).state_dict(), MMSEGMENTATION)


def test_only_safetensors_are_written(tmp_path):
    with pytest.raises(UserError, match=r"OUT must end in .safetensors.*name it x.safetensors"):
        convert(tmp_path / "a.pth", tmp_path / "x.pth")


def test_all_layouts_have_a_way_there_and_back():
    ours = tiny().state_dict()
    for layout in (SEGMENTER, MMSEGMENTATION):
        assert set(to_segmenter(from_segmenter(ours, layout))) == set(ours)


def test_build_model_is_strict_about_its_keywords():
    with pytest.raises(TypeError, match="image_size"):
        build_model(SegmenterConfig(name="segmenter", variant="Ti"), 3)


@pytest.mark.parametrize("text", ["{", "[1]", '{"model": 3}', "model:\n  name: segmenter"])
def test_settings_that_nobody_can_read_are_refused(text, tmp_path):
    save_file(tiny().state_dict(), tmp_path / "w.safetensors", metadata={"config": text})
    with pytest.raises(UserError, match="its text field config is no JSON of sections"):
        understand(read_weights(tmp_path / "w.safetensors"))


def test_a_setting_that_is_left_to_another_is_no_contradiction(tmp_path):
    text = json.dumps({"model": {"layer_norm_eps": 1e-5, "decoder_layer_norm_eps": None}})
    save_file(tiny().state_dict(), tmp_path / "w.safetensors", metadata={"config": text})
    assert load_weights(tiny(), tmp_path / "w.safetensors").complete


def test_what_no_tensor_of_the_authors_tells(tmp_path):
    """Of the authors' and timm's files the grid is known, of others only where they say it."""
    state = tiny(image_size=(16, 16)).state_dict()
    for layout, grid in ((TIMM, (4, 4)), (MMSEGMENTATION, None), (SEGMENTER, None)):
        tensors = {k: v.contiguous() for k, v in from_segmenter(state, layout).items()}
        save_file(tensors, tmp_path / "w.safetensors")
        assert understand(read_weights(tmp_path / "w.safetensors")).grid == grid
    torch.save({"model": state}, tmp_path / "checkpoint.pth")
    said = VARIANT.replace("n_cls: 150", "n_cls: 5").replace("n_heads: 12", "n_heads: 2")
    (tmp_path / "variant.yml").write_text(said)
    found = understand(read_weights(tmp_path / "checkpoint.pth"))
    assert found.grid == (4, 4)
    assert found.config["model"]["layer_norm_eps"] == 1e-5
