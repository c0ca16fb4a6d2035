"""Counting and measuring: the closed form of MACs, memory that PyTorch really keeps, commands."""

import argparse
import json

import pytest
import torch
from safetensors.torch import save_file

from segtrain.analyze import Cost, analyze, num_classes_of, optimizer_bytes, table
from segtrain.bench import bench
from segtrain.config.schema import RunConfig
from segtrain.errors import UserError
from segtrain.models import build_model
from segtrain.weights.commands import add_commands
from segtrain.weights.layouts import MMSEGMENTATION, from_segmenter

SMALL = {"embed_dim": 8, "depth": 2, "num_heads": 2, "patch_size": 4, "decoder_layers": 1}
# variant, decoder, side -> GMACs of the specification (Segmenter at K = 150).
GMACS = [
    ("Ti", "linear", 480, 8.7),
    ("Ti", "mask", 512, 12.6),
    ("S", "linear", 640, 58.2),
    ("S", "mask", 512, 38.4),
    ("B", "linear", 512, 107.1),
    ("B", "mask", 768, 351.4),
    ("L", "linear", 512, 362.1),
    ("L", "mask", 640, 671.1),
]


def config(model: dict, *, crop=(32, 48), **sections) -> RunConfig:
    content = {
        "data": {"dataset": "ade20k", "root": "r", "crop": list(crop), "base_size": [2048, 32]},
        "model": {"name": "segmenter", **model},
        "optim": {"lr": 0.1},
        "train": {"iters": 2, "global_batch": 1},
    }
    for name, section in sections.items():
        content[name] = content.get(name, {}) | section
    return RunConfig.model_validate(content)


def closed_form(run: RunConfig, size, classes: int) -> int:
    """Sec. 4.2 of the specification."""
    model = run.model
    d, layers, _ = model.widths
    patch = model.patch_size
    patches = -(-size[0] // patch) * -(-size[1] // patch)
    n, m = patches + 1 + model.distilled, patches + classes
    total = 3 * patches * patch**2 * d + layers * (12 * d**2 * n + 2 * n**2 * d)
    if model.decoder == "linear":
        return total + patches * d * classes
    block = 12 * d**2 * m + 2 * m**2 * d
    mask = patches * d**2 + model.decoder_layers * block + m * d**2 + patches * classes * d
    return total + mask


@pytest.mark.parametrize(("variant", "decoder", "side", "giga"), GMACS)
def test_macs_of_the_paper_sized_models(variant, decoder, side, giga):
    run = config({"variant": variant, "decoder": decoder}, crop=(side, side))
    total = analyze(run, num_classes=150, size=(side, side))["total"].macs
    assert total == closed_form(run, (side, side), 150)
    assert total / 1e9 == pytest.approx(giga, abs=0.1)


@pytest.mark.parametrize("decoder", ["linear", "mask"])
@pytest.mark.parametrize("size", [(32, 48), (30, 45), (4, 4), (64, 12)])
def test_parts_sum_to_the_model(decoder, size):
    run = config(SMALL | {"decoder": decoder, "distilled": True})
    costs = analyze(run, num_classes=5, size=size)
    model = build_model(run.model, 5, image_size=run.data.crop)
    assert costs["total"].parameters == sum(p.numel() for p in model.parameters())
    assert costs["total"].macs == closed_form(run, size, 5)
    assert costs["total"] == sum((c for p, c in costs.items() if p != "total"), Cost())
    assert costs["encoder.blocks"].macs > costs["encoder.patch_embed"].macs > 0


def kept_bytes(run: RunConfig, size) -> int:
    """What a real training step keeps: storages of saved tensors that are no parameters."""
    model = build_model(run.model, 5, image_size=run.data.crop).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(torch.randn(2, 3, *size))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("decoder", ["linear", "mask"])
def test_kept_memory_is_what_pytorch_keeps(decoder):
    run = config(SMALL | {"decoder": decoder, "decoder_dropout": 0.0, "drop_path_rate": 0.0})
    predicted = analyze(run, num_classes=5, size=(32, 48), batch=2)["total"].kept
    # A few seeds of random generators and statistics of norms may be placed otherwise.
    assert predicted == pytest.approx(kept_bytes(run, (32, 48)), rel=0.02)


def test_memory_of_weights_and_optimizer():
    base = config(SMALL)
    assert optimizer_bytes(base, 10) == 3 * 4 * 10
    adam = config(SMALL, optim={"name": "adamw"}, train={"ema_decay": 0.9})
    assert optimizer_bytes(adam, 10) == 5 * 4 * 10
    text = table(analyze(base, num_classes=5, size=(32, 48)), base)
    assert text.splitlines()[0].split()[:2] == ["part", "parameters"]
    assert "weights, gradients and sgd" in text


def test_half_precision_keeps_less():
    runs = [config(SMALL, train={"precision": p}) for p in ("fp32", "bf16")]
    wide, low = (analyze(r, num_classes=5, size=(32, 48))["total"] for r in runs)
    assert low.kept < wide.kept
    assert low.macs == wide.macs


def test_number_of_classes():
    assert num_classes_of(config(SMALL)) == 150
    assert num_classes_of(config(SMALL), 7) == 7
    own = {"dataset": "folder", "folder": {"classes": ["a", "b"]}}
    assert num_classes_of(config(SMALL, data=own)) == 2
    with pytest.raises(UserError, match="add --classes N"):
        num_classes_of(config(SMALL, data={"dataset": "folder"}))
    with pytest.raises(UserError, match="at least 1, got 0"):
        num_classes_of(config(SMALL), 0)


def test_speed_is_measured():
    inference, training = bench(
        config(SMALL), num_classes=5, size=(32, 32), batch=2, device="cpu", seconds=0.0
    )
    assert (inference.what, training.what) == ("inference", "training step")
    for speed in (inference, training):
        assert speed.images_per_second == pytest.approx(2e3 / speed.median_ms)
        assert speed.rounds == 3
        assert speed.peak_mib is None
    assert str(training).startswith("training step")


def test_speed_of_what_a_machine_cannot_do():
    low = config(SMALL, train={"precision": "fp16"})
    options = {"num_classes": 5, "size": (32, 32), "batch": 1, "seconds": 0.0}
    with pytest.raises(UserError, match="fp16 needs a GPU; write train.precision=bf16"):
        bench(low, device="cpu", **options)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="there is no GPU"):
            bench(low, device="cuda", **options)


# ---- commands --------------------------------------------------------------------------------
def command(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(required=True))
    args = parser.parse_args([str(a) for a in arguments])
    return args.run(args)


@pytest.fixture
def yaml_file(tmp_path):
    content = json.loads(config(SMALL).model_dump_json())
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(content))
    return path


def test_command_analyze(yaml_file, capsys):
    assert command("analyze", "--config", yaml_file, "--size", "16x32", "--classes", 3) == 0
    assert "1 x 16x32, 3 classes" in capsys.readouterr().out
    command("analyze", "--config", yaml_file, "--json", "model.decoder=linear")
    costs = json.loads(capsys.readouterr().out)
    linear = config(SMALL | {"decoder": "linear"})
    assert costs["total"]["macs"] == closed_form(linear, (32, 48), 150)


def test_command_bench(yaml_file, capsys):
    command("bench", "--config", yaml_file, "--seconds", 0, "--size", 16, "--json")
    assert [row["what"] for row in json.loads(capsys.readouterr().out)] == [
        "inference",
        "training step",
    ]
    command("bench", "--config", yaml_file, "--seconds", 0, "--size", 16, "--json", "--inference")
    assert [row["what"] for row in json.loads(capsys.readouterr().out)] == ["inference"]


def test_command_weights(yaml_file, tmp_path, capsys):
    run = config(SMALL)
    state = build_model(run.model, 150, image_size=run.data.crop).state_dict()
    theirs = {k: v.contiguous() for k, v in from_segmenter(state, MMSEGMENTATION).items()}
    save_file(theirs, tmp_path / "m.safetensors")
    ours = tmp_path / "ours.safetensors"
    command("weights", "convert", tmp_path / "m.safetensors", ours)
    text = capsys.readouterr().out
    assert "mmsegmentation: encoder (width 8, 2 layers, patches of 4)" in text
    assert f"init: {ours} and\nmodel:\n  name: segmenter" in text
    command("weights", "inspect", ours, "--config", yaml_file)
    text = capsys.readouterr().out
    assert f"fits the model of {yaml_file}" in text
    assert "150 classes" in text
    command("weights", "inspect", ours, "--json")
    assert json.loads(capsys.readouterr().out)["layout"] == "segmenter"
    wrong = yaml_file.with_name("wrong.yaml")
    wrong.write_text(yaml_file.read_text().replace('"decoder_layers": 1', '"decoder_layers": 2'))
    command("weights", "inspect", ours, "--config", wrong)
    assert f"does not fit the model of {wrong}" in capsys.readouterr().out


@pytest.mark.parametrize("bad", ["0", "3x", "axb", "1x2x3", "-4"])
def test_sizes_that_are_none(bad, yaml_file, capsys):
    with pytest.raises(SystemExit):
        command("analyze", "--config", yaml_file, f"--size={bad}")
    assert "expected SIDE or HxW" in capsys.readouterr().err
