"""Reading, fitting and loading weights: what is taken, resized, started anew, and refused."""

import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from ctxops.position import resize_position_embedding
from segtrain.config.schema import RunConfig
from segtrain.errors import UserError
from segtrain.weights.fit import load_into
from segtrain.weights.layouts import TIMM, from_segmenter
from segtrain.weights.load import initial_weights, load_encoder, load_weights
from segtrain.weights.read import read_weights
from tests.segtrain.toy_segmenter import built, randomized, tiny

TI16 = "vit_tiny_patch16_384.augreg_in21k_ft_in1k"
MASK_CLASSES = ("decoder.cls_emb", "decoder.mask_norm.weight", "decoder.mask_norm.bias")
LINEAR_CLASSES = ("decoder.head.weight", "decoder.head.bias")


def saved(model, folder, name="w.safetensors"):
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / name)
    return folder / name


def run_config(model: dict, **more) -> RunConfig:
    content = {
        "data": {"dataset": "folder", "root": "r", "crop": [32, 48], "base_size": [96, 32]},
        "model": {"name": "segmenter", **model},
        "optim": {"lr": 0.1},
        "train": {"iters": 2, "global_batch": 1},
    }
    return RunConfig.model_validate(content | more)


# ---- whole models ----------------------------------------------------------------------------
def test_a_saved_model_is_loaded_bit_for_bit(tmp_path):
    model, other = randomized(tiny()), tiny()
    fit = load_weights(other, saved(model, tmp_path))
    assert fit.complete
    assert set(fit.matched) == set(model.state_dict())
    image = torch.randn(1, 3, 9, 13)
    assert torch.equal(model.eval()(image)["logits"], other.eval()(image)["logits"])


@pytest.mark.parametrize(
    ("decoder", "expected"), [("mask", MASK_CLASSES), ("linear", LINEAR_CLASSES)]
)
def test_other_classes_start_anew_and_nothing_else_does(decoder, expected, tmp_path):
    old, new = randomized(tiny(decoder=decoder)), tiny(decoder=decoder, num_classes=3)
    before = {k: v.clone() for k, v in new.state_dict().items()}
    fit = load_weights(new, saved(old, tmp_path), new_classes=True)
    assert set(fit.reinitialised) == set(expected)
    for name, value in new.state_dict().items():
        wanted = before if name in expected else old.state_dict()
        assert torch.equal(value, wanted[name]), name
    assert fit.notes() == [f"other classes, so these start anew: {', '.join(fit.reinitialised)}"]


def test_other_classes_are_an_error_where_none_is_to_change(tmp_path):
    new = tiny(num_classes=3)
    before = {k: v.clone() for k, v in new.state_dict().items()}
    with pytest.raises(UserError, match=r"does not fit the model:\n(.*\n)+wrong shape: .*cls_emb"):
        load_weights(new, saved(tiny(), tmp_path))
    assert all(torch.equal(v, before[k]) for k, v in new.state_dict().items())


def test_positions_are_resized_by_grid(tmp_path):
    old, new = randomized(tiny(image_size=(16, 16))), tiny(image_size=(8, 12))
    fit = load_weights(new, saved(old, tmp_path))
    assert fit.resized == {"encoder.pos_embed": ("position table", (4, 4), (2, 3))}
    expected = resize_position_embedding(
        old.encoder.pos_embed, old_grid=(4, 4), new_grid=(2, 3), num_prefix=1
    )
    assert torch.equal(new.encoder.pos_embed, expected)
    assert fit.notes() == ["position table resized from 4x4 to 2x3"]


def test_as_many_positions_on_another_grid_are_resized():
    """4x4 has as many cells as 2x8: grids are compared, where the file's is known."""
    old, new = randomized(tiny(image_size=(16, 16))), tiny(image_size=(8, 32))
    fit = load_into(new, old.state_dict(), source="file", grids={"encoder.pos_embed": (4, 4)})
    assert fit.resized == {"encoder.pos_embed": ("position table", (4, 4), (2, 8))}
    assert not torch.equal(new.encoder.pos_embed, old.encoder.pos_embed)
    assert load_into(new, old.state_dict(), source="file").resized == {}


def test_a_grid_that_nobody_knows_is_an_error():
    with pytest.raises(UserError, match=r"position table has 7 rows, expected 1 and a square grid"):
        load_into(tiny(image_size=(8, 8)), tiny().state_dict(), source="file")


def test_the_table_names_what_does_not_fit(tmp_path):
    state = tiny().state_dict()
    del state["encoder.norm.weight"]
    state["encoder.extra"] = torch.zeros(1)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError) as error:
        load_weights(tiny(), tmp_path / "w.safetensors")
    lines = str(error.value).splitlines()
    assert lines[1].split() == ["part", "matched", "missing", "wrong", "shape", "unexpected"]
    assert "missing: encoder.norm.weight" in lines
    assert "unexpected: encoder.extra" in lines
    encoder = next(line for line in lines if line.startswith("encoder "))
    assert encoder.split() == ["encoder", "5", "1", "0", "1"]


def test_an_encoder_is_no_whole_model(tmp_path):
    save_file(from_segmenter(tiny().state_dict(), TIMM), tmp_path / "e.safetensors")
    with pytest.raises(UserError, match="holds an encoder alone"):
        load_weights(tiny(), tmp_path / "e.safetensors")


# ---- where training starts -------------------------------------------------------------------
SMALL = {"embed_dim": 8, "depth": 2, "num_heads": 2, "patch_size": 4, "decoder_layers": 1}


def test_training_starts_from_a_whole_model(tmp_path):
    old = randomized(tiny())
    config = run_config(SMALL, init=str(saved(old, tmp_path)))
    new = tiny(num_classes=2)
    lines = initial_weights(new, config)
    assert lines[0].startswith(f"weights of {tmp_path}")
    assert "start anew" in lines[1]
    assert torch.equal(new.encoder.pos_embed, old.encoder.pos_embed)


def test_training_starts_from_an_encoder_in_a_file(tmp_path):
    old = randomized(tiny(image_size=(16, 16)))
    timm = from_segmenter(old.state_dict(), TIMM)
    torch.save({"model": timm | {"head.weight": torch.zeros(9, 8)}}, tmp_path / "e.pth")
    new = tiny()
    decoder = {k: v.clone() for k, v in new.decoder.state_dict().items()}
    lines = initial_weights(new, run_config(SMALL | {"pretrained": str(tmp_path / "e.pth")}))
    assert lines[1] == "position table resized from 4x4 to 2x3"
    name = "encoder.blocks.1.mlp.fc1.weight"
    assert torch.equal(new.state_dict()[name], old.state_dict()[name])
    assert all(torch.equal(v, decoder[k]) for k, v in new.decoder.state_dict().items())


def test_training_starts_at_random_where_nothing_is_named():
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert initial_weights(model, run_config(SMALL)) == [
        "random weights: init and model.pretrained are null"
    ]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def fake_timm(monkeypatch, create):
    fake = SimpleNamespace(is_model=lambda name: name == "vit_tiny_patch16_384")
    fake.create_model = create
    monkeypatch.setitem(sys.modules, "timm", fake)


def test_weights_of_timm_are_taken_from_timm(monkeypatch):
    source = randomized(built({"variant": "Ti"}, num_classes=2, image_size=(48, 48)))
    state = from_segmenter(source.state_dict(), TIMM)
    asked = []

    def create(name, **keywords):
        asked.append((name, keywords))
        return SimpleNamespace(state_dict=lambda: state)

    fake_timm(monkeypatch, create)
    model = built({"variant": "Ti", "pretrained": TI16}, num_classes=2, image_size=(32, 32))
    config = run_config({"variant": "Ti", "pretrained": TI16})
    lines = load_encoder(model, config.model)
    assert asked == [(TI16, {"pretrained": True, "num_classes": 0})]
    assert lines == [f"encoder of {TI16}: 150 tensors", "position table resized from 3x3 to 2x2"]
    assert torch.equal(model.encoder.norm.weight, source.encoder.norm.weight)


def test_without_network_the_file_to_fetch_is_named(monkeypatch):
    def create(name, **keywords):
        raise OSError("We couldn't connect to the hub\nmany more lines")

    fake_timm(monkeypatch, create)
    config = run_config({"variant": "Ti", "pretrained": TI16}).model
    with pytest.raises(UserError) as error:
        load_encoder(tiny(), config)
    text = str(error.value)
    assert f"https://huggingface.co/timm/{TI16}" in text
    assert "write pretrained: PATH/model.safetensors" in text
    assert "couldn't connect" in text
    assert "\n" not in text


def test_names_that_nobody_knows(monkeypatch):
    fake_timm(monkeypatch, None)
    config = run_config({"variant": "Ti", "pretrained": "vit_tinyy"}).model
    with pytest.raises(UserError, match="neither a file nor a model of timm"):
        load_encoder(tiny(), config)


def test_without_timm_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="needs timm; run pip install timm, or name a file"):
        load_encoder(tiny(), run_config({"variant": "Ti", "pretrained": TI16}).model)


# ---- reading ---------------------------------------------------------------------------------
class Evil:
    """Would run on unpickling."""

    def __reduce__(self):
        return (print, ("executed",))


def test_files_that_name_code_are_refused(tmp_path, capsys):
    torch.save({"model": {"a": torch.zeros(1)}, "more": Evil()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"names \S*print, which could run code"):
        read_weights(tmp_path / "w.pth")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 20, 400])
def test_broken_files_are_refused(suffix, keep, tmp_path):
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save({"model": tiny().state_dict()}, path)
    else:
        saved(tiny(), tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="is no readable weight file, or not a whole one"):
        read_weights(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "must hold tensors by name, got list"),
        ({}, "holds no tensors"),
        ({"model": {}}, "holds no tensors"),
        ({"a": 1}, "a must be a tensor, got int"),
    ],
)
def test_files_without_tensors_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "w.pth")


def test_absent_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="do not exist"):
        read_weights(tmp_path / "w.pth")
    (tmp_path / "w.npz").write_bytes(b"")
    with pytest.raises(UserError, match="expected one of .safetensors"):
        read_weights(tmp_path / "w.npz")


@pytest.mark.parametrize("nest", ["model", "state_dict", "model_state_dict"])
def test_nests_and_prefixes_are_unwrapped(nest, tmp_path):
    torch.save({nest: {"module.a": torch.ones(2)}, "epoch": 3}, tmp_path / "w.pth")
    file = read_weights(tmp_path / "w.pth")
    assert list(file.tensors) == ["a"]
    assert file.extra == {"epoch": 3}
