"""UN-EPT's released names, and files of networks in general, through the real commands."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from segtrain.cli import main
from segtrain.config.load import dump_yaml
from segtrain.config.schema import NetworkConfig
from segtrain.errors import UserError
from segtrain.models import build_model
from segtrain.train.checkpoint import weight_text
from segtrain.weights.load import initial_weights, load_weights
from segtrain.weights.network import is_network, understand_network
from segtrain.weights.read import WeightFile, read_weights
from segtrain.weights.unept import from_released, section_of
from tests.segtrain.test_models_unept import GOLDENS, R50
from tests.segtrain.toy_network import RESNET
from tests.segtrain.toy_unept import RELEASED, VIT, section, stirred, unept
from tests.segtrain.train_toys import config as run_config
from tests.shared_data import needs_shared

# Ours -> theirs, for names of the head; its backbones differ in the stem alone.
THEIRS = {
    "head.classifier.": "cls.",
    "head.projections.": "layers.",
    "head.context.": "context_branch.",
    "head.query_embed.": "query_embed.",
    "head.boundary.0.conv.": "mask_head.0.",
    "head.boundary.0.norm.": "mask_head.1.",
    "head.boundary.1.": "mask_head.3.",
    "head.direction.0.conv.": "dir_head.0.",
    "head.direction.0.norm.": "dir_head.1.",
    "head.direction.1.": "dir_head.3.",
    **{
        f"head.spatial.block{n}.{ours}.": f"spatial_branch.convblock{n}.{theirs}."
        for n in (1, 2, 3)
        for ours, theirs in (("conv", "conv1"), ("norm", "bn"))
    },
}
# timm's deep stem -> MMSegmentation's ResNetV1c.
STEM = {f"backbone.conv1.{n}.": f"backbone.stem.{n}." for n in (0, 1, 3, 4, 6)}
STEM["backbone.bn1."] = "backbone.stem.7."


def released_names(state: dict, *, resnet: bool = False) -> dict:
    """Our tensors under the names of the released code."""
    table, renamed = THEIRS | (STEM if resnet else {}), {}
    for name, value in state.items():
        start = next((s for s in table if name.startswith(s)), None)
        assert start or name.startswith("backbone."), name
        renamed[name.replace(start, table[start], 1) if start else name] = value
    assert len(renamed) == len(state)
    return renamed


@pytest.mark.parametrize("backbone", ["resnet", "vit"])
def test_names_there_and_back(backbone):
    model = unept(backbone=RESNET if backbone == "resnet" else VIT, **RELEASED)
    state = model.state_dict()
    theirs = released_names(state, resnet=backbone == "resnet")
    assert not any(name.startswith("head.") for name in theirs)
    assert is_network(theirs)
    back = from_released(theirs)
    assert back.keys() == state.keys()
    assert all(back[name] is value for name, value in state.items())


@needs_shared
def test_stored_names_are_all_known():
    stored = load_file(GOLDENS / "unept_model.weights.safetensors")
    found = understand_network(WeightFile(path=GOLDENS, tensors=stored))
    assert (found.layout, found.num_classes) == ("unept", 7)
    assert released_names(found.tensors).keys() == stored.keys()
    assert found.grids == {"backbone.pos_embed": (6, 6), "head.query_embed.weight": (12, 12)}
    head = found.config["model"]["head"]
    assert (head["points"], head["ffn_dim"], head["encoder_layers"]) == (4, 64, 1)
    fields = found.config["model"]["backbone"]
    assert (fields["embed_dim"], fields["depth"], fields["blocks"]) == (36, 12, [4, 8, 12])


@pytest.mark.parametrize("kind", ["resnet", "deit"])
def test_tensors_tell_the_section_of_the_released_model(kind):
    deit = {"name": "vit", "variant": "B", "distilled": True, "drop_path_rate": 0.0}
    backbone = R50 if kind == "resnet" else deit
    content = {"name": "network", "backbone": backbone, "head": {"name": "unept", **RELEASED}}
    expected = NetworkConfig.model_validate(content)
    with torch.device("meta"):
        model = build_model(expected, 9, image_size=(96, 96))
    assert NetworkConfig.model_validate(section_of(model.state_dict())) == expected


def checkpoint(tmp_path, model) -> str:
    """As the released code writes it."""
    path = tmp_path / "iter_160000.pth"
    content = {"meta": {"epoch": 1}, "state_dict": released_names(model.state_dict())}
    torch.save(content | {"optimizer": {"state": {}}}, path)
    return str(path)


def test_released_checkpoints_are_converted_and_loaded(tmp_path, capsys):
    keys = {"backbone": VIT | {"distilled": True}, **RELEASED}
    sizes = {"num_heads": 8, "channels": 32}
    old = stirred(unept(num_classes=3, image_size=(48, 48), **keys, **sizes)).eval()
    source, target = checkpoint(tmp_path, old), tmp_path / "ours.safetensors"
    assert main(["weights", "convert", source, str(target)]) == 0
    said = capsys.readouterr().out
    assert "unept: backbone and head, 3 classes" in said
    assert "self_attention: released" in said
    assert f"init: {target}" in said
    assert read_weights(target).tensors.keys() == old.state_dict().keys()
    image = torch.randn(1, 3, 48, 48)
    for path in (source, target):
        new = unept(num_classes=3, image_size=(48, 48), **keys, **sizes).eval()
        assert load_weights(new, path).complete
        assert torch.equal(new(image)["logits"], old(image)["logits"])
    # Their tables are squares.
    other = unept(num_classes=3, image_size=(32, 64), **keys, **sizes)
    assert load_weights(other, source).notes() == [
        "position table resized from 3x3 to 2x4",
        "query table resized from 6x6 to 4x8",
    ]


def test_unknown_names_are_said(tmp_path):
    theirs = released_names(unept(**RELEASED).state_dict(), resnet=True)
    with pytest.raises(UserError, match="UN-EPT has no counterpart of ema.x"):
        from_released(theirs | {"ema.x": torch.zeros(1)})
    with pytest.raises(UserError, match=r"expected a tensor 'head\.context\.level_embed'"):
        section_of({f"backbone.layer3.{n}.x": torch.zeros(1) for n in range(6)})
    with pytest.raises(UserError, match="expected a ResNet-50 or 101, got 2 blocks"):
        section_of({f"backbone.layer3.{n}.x": torch.zeros(1) for n in range(2)})


# ---- networks in general ---------------------------------------------------------------------
def written(tmp_path, model, section_of_model) -> tuple[str, str]:
    """A weight file of ours and a configuration that it fits."""
    run = run_config(tmp_path / "run").model_copy(
        update={"model": section_of_model, "loss": run_config(tmp_path).loss}
    )
    path = tmp_path / "w.safetensors"
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, path, metadata=weight_text(model, run, 1))
    (tmp_path / "c.yaml").write_text(dump_yaml(run).replace("boundary: null", "boundary: {}"))
    return str(path), str(tmp_path / "c.yaml")


def test_a_network_is_shown_with_parts_and_shapes(tmp_path, capsys):
    model = unept(image_size=(16, 16))
    path, yaml_file = written(tmp_path, model, section())
    assert main(["weights", "inspect", path, "--config", yaml_file]) == 0
    said = capsys.readouterr().out
    assert "layout: network" in said
    assert "model: backbone and head, 5 classes" in said
    assert "head.classifier" in said
    assert "bias [5], weight [5, 16, 1, 1]" in said
    assert "name: unept" in said
    assert "fits the model of" in said
    assert "does not fit" not in said
    assert main(["weights", "inspect", path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parts"].splitlines()[0].split() == ["backbone.bn1", "513", "5", "tensors"]


def test_another_network_does_not_fit(tmp_path, capsys):
    model = unept(points=3, image_size=(16, 16))
    path, yaml_file = written(tmp_path, model, section())
    assert main(["weights", "inspect", path, "--config", yaml_file]) == 0
    said = capsys.readouterr().out
    assert "does not fit the model of" in said
    assert "sampling_offsets" in said


def test_layouts_of_a_segmenter_are_not_for_networks(tmp_path, capsys):
    path, _ = written(tmp_path, unept(image_size=(16, 16)), section())
    target = str(tmp_path / "o.safetensors")
    assert main(["weights", "convert", path, target, "--to", "timm"]) == 2
    assert "holds a network; --to and --variant are for a Segmenter" in capsys.readouterr().err
    assert main(["weights", "convert", path, target]) == 0
    assert read_weights(target).metadata["grids"] == "{}"


def test_pretrained_transformers_are_strict_but_for_norm_and_head(tmp_path):
    import timm

    sizes = {"embed_dim": 12, "depth": 3, "num_heads": 3, "img_size": 48}
    theirs = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7, **sizes)
    torch.save(theirs.state_dict(), tmp_path / "deit.pth")
    backbone = VIT | {"distilled": True, "pretrained": str(tmp_path / "deit.pth")}
    model = unept(backbone=backbone, image_size=(32, 64))
    run = run_config(tmp_path).model_copy(update={"model": section(backbone=backbone)})
    lines = initial_weights(model, run)
    count = len(model.backbone.state_dict())
    assert lines == [
        f"backbone of {tmp_path / 'deit.pth'}: {count} tensors",
        "position table resized from 3x3 to 2x4",
    ]
    assert torch.equal(model.backbone.blocks[2].mlp.fc1.weight, theirs.blocks[2].mlp.fc1.weight)
    plain = unept(backbone=VIT | {"distilled": False}, image_size=(32, 64))
    with pytest.raises(UserError, match="does not fit the model|position table has"):
        initial_weights(plain, run)
