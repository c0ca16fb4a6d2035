"""A loss or a gradient that is not finite: nothing is changed, it is explained, and the policy."""

import json
import math

import pytest
import torch
from torch import nn

from segtrain.errors import UserError
from segtrain.train.blackbox import read_box
from segtrain.train.checkpoint import load_checkpoint
from segtrain.train.guard import _whose
from segtrain.train.journal import read_journal
from segtrain.train.start import Parts, resume, train
from tests.segtrain.train_toys import (
    IMAGES,
    ToyImages,
    ToyModel,
    assert_same,
    build,
    config,
    feed,
    weights,
)


class Divides(nn.Module):
    """Passes everything on but what `bad` says, which it divides by zero."""

    def __init__(self, bad):
        super().__init__()
        self.bad, self.calls = bad, 0

    def forward(self, x):
        self.calls += self.training
        return x / (x - x) if self.training and self.bad(self.calls) else x


class FlatGradient(nn.Module):
    """sqrt(x * x) of zeros: the value is finite, the gradient is not."""

    def __init__(self, bad):
        super().__init__()
        self.bad, self.calls = bad, 0

    def forward(self, x):
        self.calls += 1
        return x + torch.sqrt((x * 0) ** 2) if self.bad(self.calls) else x


def with_part(part, **keywords):
    """A toy with something behind its norm; call n is pass n, a second look makes it again."""
    model = ToyModel(**keywords)
    model.norm = nn.Sequential(model.norm, part)
    return model


def trained(run, model=ToyModel, *, images=None):
    """Train what `model()` makes, which is called where the seed was set."""

    def parts(*_):
        return Parts(model=model(), feed=feed(run, images=images), images=IMAGES)

    return train(run, build=parts)


def records(folder, event="nonfinite"):
    return [r for r in read_journal(folder / "log.jsonl") if r["event"] == event]


class Poisoned(ToyImages):
    """Images of these keys are NaN."""

    def __init__(self, *keys):
        self.keys = keys

    def __getitem__(self, key):
        item = super().__getitem__(key)
        if key in self.keys:
            item["image"][:] = torch.nan
        return item


# ---- stop --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("part", "what", "first"),
    [
        (Divides(lambda call: call >= 3), "loss", ("norm.1", "output")),
        (FlatGradient(lambda call: call >= 3), "gradient", ("norm.1", "gradient")),
    ],
    ids=["loss", "gradient"],
)
def test_stop_names_module_box_and_command(tmp_path, part, what, first):
    with pytest.raises(UserError) as caught:
        trained(config(tmp_path, iters=8, log_every=100), lambda: with_part(part))
    said, box = str(caught.value), tmp_path / "nonfinite/step_00000003.pt"
    assert said.startswith(f"the {what} of update 3 is not finite; lower optim.lr, set ")
    assert f"; it starts in {first[0]} ({first[1]}: largest |" in said
    assert said.endswith(f"; see: segtrain replay {box}")
    assert "\n" not in said
    assert part.calls == 4  # a pass more, under the watch
    (record,) = records(tmp_path)
    assert (record["update"], record["done"], record["what"]) == (3, "stop", what)
    assert (record["first"]["module"], record["first"]["kind"]) == first
    assert record["box"] == "nonfinite/step_00000003.pt"
    content = read_box(box)
    assert content["step"] == 3
    shown = json.loads(box.with_suffix(".json").read_text())
    assert shown["values"]["grad_norm"] in ("nan", "inf")
    assert "model" not in shown
    assert shown["config"]["train"]["iters"] == 8


def test_weights_and_statistics_in_the_box_are_those_before_the_update(tmp_path):
    """Two updates, and what the box holds after the third one broke: the same, bit for bit."""
    options = {"ema_decay": 0.5, "schedule": {"name": "constant"}}
    calm = config(tmp_path / "calm", iters=2, **options)
    trained(calm, lambda: with_part(nn.Identity(), norm=True))
    run = config(tmp_path / "bad", iters=8, **options)
    made = []

    def model():
        made.append(with_part(nn.Identity(), norm=True))
        return made[0]

    with pytest.raises(UserError, match="update 3 is not finite"):
        trained(run, model, images=Poisoned((0, 9)))
    box = read_box(tmp_path / "bad/nonfinite/step_00000003.pt")
    before = load_checkpoint(tmp_path / "calm")
    assert_same(box["model"], before["model"])
    assert all(torch.isfinite(value).all() for value in made[0].state_dict().values())
    assert torch.equal(box["generators"]["torch"], before["generators"][0]["torch"])
    (part,) = box["parts"]
    assert torch.isnan(part["image"]).all((1, 2, 3)).tolist() == [False, True, False, False]


def test_passes_of_an_update_are_all_in_the_box(tmp_path):
    run = config(tmp_path, iters=4, micro_batch=1)
    with pytest.raises(UserError, match="update 3"):
        trained(run, images=Poisoned((0, 9)))
    box = read_box(tmp_path / "nonfinite/step_00000003.pt")
    assert [bool(part["image"].isnan().any()) for part in box["parts"]] == [False, True] + [
        False
    ] * 2
    assert [math.isfinite(value) for value in box["losses"]["loss_seg"]] == [
        True,
        False,
        True,
        True,
    ]


def test_half_precision_is_looked_at_as_well(tmp_path):
    part = Divides(lambda call: call >= 2)
    with pytest.raises(UserError, match=r"the loss of update 2 .* it starts in norm.1 \(output"):
        trained(config(tmp_path, precision="bf16"), lambda: with_part(part))


def test_a_box_that_cannot_be_written_does_not_hide_the_reason(tmp_path):
    (tmp_path / "nonfinite").write_text("in the way")
    with pytest.raises(UserError, match="update 2 .* its black box could not be written"):
        trained(config(tmp_path), lambda: with_part(Divides(lambda call: call >= 2)))


# ---- skip --------------------------------------------------------------------------------------
def test_skip_leaves_the_update_out_and_nothing_else(tmp_path):
    """Update 3 is left out: as if its gradient had never been, with the schedule going on."""
    options = {"iters": 6, "ema_decay": 0.5, "schedule": {"name": "poly"}}
    options["optim"] = {"name": "adamw", "lr": 1e-2}
    skipped, manual = tmp_path / "skipped", tmp_path / "manual"
    run = config(skipped, on_nonfinite="skip", **options)
    trained(run, lambda: ToyModel(norm=True, dropout=0.0), images=Poisoned((0, 9)))

    class Hole:
        """The same without update 3, by hand."""

        def __init__(self, state, update):
            self.state, self.update = state, update

        def __call__(self, parts):
            return {} if self.state.step == 2 else self.update(parts)

    from segtrain.train.loop import Run

    class Manual(Run):
        def __init__(self, **keywords):
            super().__init__(**keywords)
            self.update = Hole(self.state, self.update)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("segtrain.train.start.Run", Manual)
        trained(config(manual, **options), lambda: ToyModel(norm=True, dropout=0.0))
    a, b = load_checkpoint(skipped), load_checkpoint(manual)
    assert a["step"] == b["step"] == 6
    assert_same(a["model"], b["model"])
    assert_same(a["average"], b["average"])
    for key, value in a["optimizer"]["state"].items():
        assert_same(value, b["optimizer"]["state"][key])
    rates = [[r["lr"] for r in records(folder, "train")] for folder in (skipped, manual)]
    assert rates[0] == rates[1]


def test_skipped_updates_are_in_the_journal(tmp_path, capsys):
    run = config(tmp_path, iters=6, log_every=3, on_nonfinite="skip")
    trained(run, images=Poisoned((0, 9)))
    (record,) = records(tmp_path)
    assert (record["step"], record["update"], record["done"]) == (3, 3, "skip")
    first, second = records(tmp_path, "train")
    assert [value is None for value in first["updates"]["loss_seg"]] == [False, False, True]
    assert first["loss_seg"] == pytest.approx(sum(first["updates"]["loss_seg"][:2]) / 2)
    assert None not in second["updates"]["loss_seg"]
    said = capsys.readouterr().err
    assert "the loss of update 3 is not finite; it starts in (model) (input" in said
    assert "; skipped; see: segtrain replay" in said


def test_many_in_a_row_end_the_run(tmp_path):
    run = config(tmp_path, iters=40, on_nonfinite="skip", checkpoint_every=2)
    bad = Divides(lambda call: 3 <= call < 21 or call > 25)  # 9 updates with a second look each
    with pytest.raises(UserError, match="update 26 is not finite.*; 10 in a row were skipped"):
        trained(run, lambda: with_part(bad))
    updates = [(r["update"], r["done"]) for r in records(tmp_path)]
    assert updates[:9] == [(k, "skip") for k in range(3, 12)]
    assert updates[9:] == [*((k, "skip") for k in range(17, 26)), (26, "stop")]
    boxes = sorted(p.stem[-2:] for p in (tmp_path / "nonfinite").glob("*.pt"))
    assert boxes == ["03", "04", "05", "26"]  # not one of each


# ---- rewind ------------------------------------------------------------------------------------
def test_rewind_goes_back_and_sees_other_batches(tmp_path):
    """Position 9 is update 3; from update 2 on the order is another one, which leaves it out."""
    run = config(tmp_path, iters=6, on_nonfinite="rewind", checkpoint_every=2, keep=9)
    trained(run, images=Poisoned((0, 9)))
    (record,) = records(tmp_path)
    assert (record["step"], record["update"], record["done"]) == (2, 3, "rewind")
    assert record["rewinds"] == 1
    assert [r["step"] for r in records(tmp_path, "train")] == [1, 2, 3, 4, 5, 6]
    saved = [
        torch.load(tmp_path / "checkpoints" / name, weights_only=True)["rewinds"]
        for name in ("step_00000002.pt", "step_00000004.pt", "last.pt")
    ]
    assert saved == [0, 1, 1]
    calm = config(tmp_path / "calm", iters=6)
    trained(calm)
    losses = [
        [r["loss"] for r in records(folder, "train")] for folder in (tmp_path, tmp_path / "calm")
    ]
    assert losses[0][:2] == losses[1][:2]
    assert not set(losses[0][2:]) & set(losses[1][2:])


def test_a_run_that_went_back_resumes_in_its_new_order(tmp_path):
    straight, halves = (
        config(tmp_path / name, iters=8, on_nonfinite="rewind", checkpoint_every=2, keep=9)
        for name in ("straight", "halves")
    )
    images = Poisoned((0, 9))
    for run in (straight, halves):
        trained(run, images=images)
    for number in (8, 6):  # as if it had ended after update 4
        name = "last" if number == 8 else f"step_{number:08d}"
        for file in (tmp_path / "halves/checkpoints").glob(f"{name}.*"):
            file.unlink()
    resume(
        tmp_path / "halves",
        build=lambda run, *_: Parts(model=ToyModel(), feed=feed(run, images=images), images=IMAGES),
    )
    assert_same(weights(tmp_path / "straight"), weights(tmp_path / "halves"))


def test_rewinds_end(tmp_path):
    run = config(tmp_path, iters=40, on_nonfinite="rewind", checkpoint_every=2)
    with pytest.raises(UserError, match="update 3 is not finite.*; went back 3 times before"):
        trained(run, lambda: with_part(Divides(lambda call: call >= 3)))
    assert [r["done"] for r in records(tmp_path)] == ["rewind"] * 3 + ["stop"]


def test_there_must_be_something_to_go_back_to(tmp_path):
    run = config(tmp_path, on_nonfinite="rewind")
    with pytest.raises(UserError, match="there is no checkpoint yet to go back to"):
        trained(run, lambda: with_part(Divides(lambda call: call >= 3)))


# ---- parts -------------------------------------------------------------------------------------
def test_whose_batch_it_was():
    class Found:
        def __init__(self, kind):
            self.kind = kind

    forward, backward = Found("output"), Found("gradient")
    assert _whose([(True, None), (True, None)]) == 0
    assert _whose([(True, backward), (False, backward), (False, forward)]) == 2
    assert _whose([(True, backward), (False, backward)]) == 1
    assert _whose([(True, None), (True, backward)]) == 1


def test_a_run_where_all_is_finite_leaves_no_box(tmp_path):
    train(config(tmp_path), build=build())
    assert not (tmp_path / "nonfinite").exists()
    assert records(tmp_path) == []
