"""`segtrain replay FILE`: the module that makes NaN, from the black box alone."""

import json
import os

import pytest
import torch
import yaml
from torch import nn

from segtrain.cli import main
from segtrain.errors import UserError
from segtrain.train.blackbox import read_box
from segtrain.train.passes import Passes
from segtrain.train.replay import replay
from segtrain.train.start import Parts
from tests.segtrain.test_nonfinite import Divides, FlatGradient, Poisoned, trained, with_part
from tests.segtrain.train_toys import IMAGES, ToyModel, config, feed
from tests.segtrain.two_processes import launched

BOX = "nonfinite/step_00000003.pt"


class Large(nn.Module):
    """NaN where an activation is too large, for a reason that is in the batch."""

    def forward(self, x):
        return torch.log(10 - x.detach().abs().max()) * 0 + x


class Marked(Poisoned):
    """Images of these keys are very bright, not NaN."""

    def __getitem__(self, key):
        item = super().__getitem__(key)
        item["image"].nan_to_num_(nan=100.0)
        return item


def broken(folder, model, **options):
    """Train until update 3, which breaks; the black box."""
    images = options.pop("images", None)
    with pytest.raises(UserError, match="update 3 is not finite"):
        trained(config(folder, iters=8, **options), model, images=images)
    return folder / BOX


def parts(model, run=None):
    """What `replay` takes as `build`."""

    def build(config, device, restoring):
        assert restoring
        return Parts(model=model(), feed=feed(config), images=IMAGES)

    return build


def marked():
    model = ToyModel(norm=True)
    model.norm = nn.Sequential(model.norm, nn.Identity())
    model.stem = nn.Sequential(model.stem, Large())
    return model


@pytest.mark.parametrize("options", [{}, {"micro_batch": 1}, {"precision": "bf16"}])
def test_a_batch_that_breaks_the_model_breaks_it_again(tmp_path, options):
    """Weights, statistics, batch and dropout are those of the update: the numbers are the same."""
    path = broken(tmp_path, marked, images=Marked((0, 9)), **options)
    found = replay(path, build=parts(marked))
    assert found.reproduced
    assert (found.first.module, found.first.kind) == ("stem.1", "output")
    assert (found.step, found.what, found.process, found.processes) == (3, "loss", 0, 1)
    assert str(dict(found.before)) == str(dict(found.values))
    names = [row.module for row in found.seen]
    assert names == ["stem.0", "stem.1", "stem", "norm.0"]
    text = found.text()
    assert "it starts in stem.1: output\n  largest |output| nan, largest |input| " in text
    assert "\n> stem.1 " in text
    assert "\n  stem.0 " in text


def test_finite_losses_of_the_passes_are_the_same_bit_for_bit(tmp_path):
    """The gradient breaks, the losses do not: dropout and statistics must be those of then."""

    def model():
        return with_part(FlatGradient(lambda call: call >= 3), norm=True, dropout=0.5)

    path = broken(tmp_path, model)
    found = replay(
        path, build=parts(lambda: with_part(FlatGradient(lambda _: True), norm=True, dropout=0.5))
    )
    assert found.what == "gradient"
    assert found.before["loss_seg"] == found.values["loss_seg"]
    assert read_box(path)["losses"]["loss_seg"] == [found.before["loss_seg"]]  # the second look
    assert (found.first.module, found.first.kind) == ("norm.1", "gradient")


def test_a_run_and_its_replay_that_differ_are_told(tmp_path):
    path = broken(tmp_path, lambda: with_part(Divides(lambda call: call >= 3)))
    found = replay(path, build=parts(lambda: with_part(nn.Identity())))
    assert not found.reproduced
    assert "all is finite this time; the run was on cpu, this is cpu" in found.text()
    assert found.seen == []


def test_images_that_are_not_finite_are_named(tmp_path):
    path = broken(tmp_path, ToyModel, images=Poisoned((0, 9), (0, 11)))
    found = replay(path, build=parts(ToyModel))
    assert found.first.kind == "input"
    assert "images that are not finite: image 1 of its batch, image 3 of its batch" in found.text()


def test_a_loss_of_its_own_making(tmp_path, monkeypatch):
    """The outputs of the model are finite, what is behind them is not."""
    terms = Passes.terms

    def divided(passes, *arguments):
        return {name: value / 0 for name, value in terms(passes, *arguments).items()}

    path = broken(tmp_path, lambda: with_part(Divides(lambda call: call >= 3)))
    monkeypatch.setattr(Passes, "terms", divided)
    found = replay(path, build=parts(lambda: with_part(nn.Identity())))
    assert found.reproduced
    assert "all outputs of the model are finite: the loss makes it" in found.text()


def test_the_box_alone_is_enough(tmp_path):
    path = broken(tmp_path / "run", marked, images=Marked((0, 9)))
    moved = tmp_path / "elsewhere/box.pt"
    moved.parent.mkdir()
    moved.write_bytes(path.read_bytes())
    assert replay(moved, build=parts(marked)).reproduced


def test_where_the_data_are_may_change_but_not_the_model(tmp_path):
    path = broken(tmp_path, marked, images=Marked((0, 9)))
    content = yaml.safe_load((tmp_path / "config.yaml").read_text())
    content["data"]["root"] = "moved"
    content["train"]["on_nonfinite"] = "skip"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    seen = []

    def build(run, device, restoring):
        seen.append(run.data.root)
        return parts(marked)(run, device, restoring)

    assert replay(path, build=build).reproduced
    assert seen == ["moved"]
    content["optim"]["lr"] = 0.7
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="was changed since"):
        replay(path, build=build)


def test_files_that_are_no_black_box(tmp_path):
    with pytest.raises(UserError, match="is no file; name one of RUN/nonfinite/"):
        read_box(tmp_path / "nothing.pt")
    path = tmp_path / "x.pt"
    path.write_bytes(b"no")
    with pytest.raises(UserError, match=r"x.pt cannot be read \("):
        read_box(path)
    torch.save({"version": 1, "evil": os.system}, path)
    with pytest.raises(UserError, match=r"x.pt cannot be read \("):
        read_box(path)
    torch.save({"version": 1}, path)
    with pytest.raises(UserError, match="x.pt is no black box"):
        read_box(path)
    torch.save([1], path)
    with pytest.raises(UserError, match="x.pt is no black box"):
        read_box(path)
    box = broken(tmp_path / "run", lambda: with_part(Divides(lambda call: call >= 3)))
    torch.save({**torch.load(box, weights_only=True), "version": 9}, path)
    with pytest.raises(UserError, match="x.pt is of version 9, this program reads 1"):
        read_box(path)


def test_command_line(tmp_path, capsys, monkeypatch):
    path = broken(tmp_path, marked, images=Marked((0, 9)))
    monkeypatch.setattr("segtrain.train.parts.build_parts", parts(marked))
    assert main(["replay", str(path)]) == 0
    assert "it starts in stem.1: output" in capsys.readouterr().out
    assert main(["replay", str(path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["reproduced"] is True
    assert said["first"]["module"] == "stem.1"
    monkeypatch.setattr("segtrain.train.parts.build_parts", parts(lambda: with_part(nn.Identity())))
    assert main(["replay", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


SCRIPT = """
import sys
from pathlib import Path
import torch
from segtrain import dist
from segtrain.errors import UserError
from segtrain.train.prove import prove
from segtrain.train.start import Parts, train
from tests.segtrain.test_nonfinite import Poisoned
from tests.segtrain.train_toys import IMAGES, ToyModel, config, feed
torch.set_num_threads(1)
torch.cuda.is_available = lambda: False
folder = Path(sys.argv[1])

def parts(run, images):
    return lambda *_: Parts(model=ToyModel(norm=True), feed=feed(run, images=images), images=IMAGES)

def all_three():
    # Position 9, in update 3, is of process 1.
    stops = config(folder / "stop", iters=6, micro_batch=1)
    try:
        train(stops, build=parts(stops, Poisoned((0, 9))))
    except UserError as error:
        print(error)
    for policy in ("skip", "rewind"):
        run = config(folder / policy, iters=6, micro_batch=1, checkpoint_every=2, keep=9,
                     on_nonfinite=policy, ema_decay=0.5)
        build = parts(run, Poisoned((0, 9)))
        train(run, build=build)
        print(prove(folder / policy, 4, build=build).differs)

with dist.process_group():  # once: the port is not free again at once
    all_three()
"""


def test_two_processes_decide_together(tmp_path):
    said, errors = launched(SCRIPT, tmp_path, timeout=600)
    assert [len(text.splitlines()) for text in said] == [3, 3], errors
    for text in said:
        stop, skip, rewind = text.splitlines()
        assert stop.startswith("the loss of update 3 is not finite; its images hold NaN")
        assert (skip, rewind) == ("None", "None")
    box = read_box(tmp_path / "stop" / BOX)
    assert (box["process"], box["processes"]) == (1, 2)
    assert [bool(part["image"].isnan().any()) for part in box["parts"]] == [True, False]
    found = replay(tmp_path / "stop" / BOX, build=parts(lambda: ToyModel(norm=True)))
    assert found.reproduced
    assert "batch of process 1 of 2" in found.text()
    for policy in ("skip", "rewind"):
        state = torch.load(tmp_path / policy / "checkpoints/last.pt", weights_only=True)
        assert all(torch.isfinite(value).all() for value in state["model"].values())
        assert state["rewinds"] == (policy == "rewind")
