import json

import pytest
import torch
from torch import nn

from segtrain.errors import UserError
from segtrain.train.journal import read_journal
from segtrain.train.start import Parts, train
from tests.segtrain.train_toys import (
    IMAGES,
    ToyImages,
    ToyModel,
    assert_close,
    assert_same,
    build,
    config,
    feed,
    trained,
    weights,
)


def records(folder, event):
    return [r for r in read_journal(folder / "log.jsonl") if r["event"] == event]


def losses(folder):
    return [record["loss"] for record in records(folder, "train")]


@pytest.mark.parametrize("optim", [{"name": "sgd"}, {"name": "adamw", "lr": 5e-2}])
def test_training_lowers_the_loss_and_writes_what_it_says(tmp_path, optim, capsys):
    results = train(
        config(tmp_path, optim=optim, iters=30, eval_every=10, keep=2, checkpoint_every=20),
        build=build(dropout=0.0),
    )
    assert losses(tmp_path)[-1] < 0.6 * losses(tmp_path)[0]
    assert results["miou"] > 0.7
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert [r["step"] for r in records(tmp_path, "evaluate")] == [10, 20, 30]
    assert results["best"]["miou"] == max(r["miou"] for r in records(tmp_path, "evaluate"))
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {
        *("last.pt", "last.safetensors", "best.safetensors"),
        *("step_00000020.pt", "step_00000020.safetensors"),
    }
    for name in ("config.yaml", "environment.txt"):
        assert (tmp_path / name).stat().st_size
    said = capsys.readouterr().err
    assert "step 30/30" in said
    assert "batch 4 = 1 process x 1 pass x 4 images; 30 updates = 10.0 epochs of 12 images" in said


def test_one_update_is_the_equation(tmp_path):
    """w - lr (g + decay w), g of the mean over valid pixels of all 4 images, weighted heads."""
    run = config(
        tmp_path, iters=1, optim={"momentum": 0.0, "nesterov": False, "norm_weight_decay": 0.0}
    )
    model = ToyModel(dropout=0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    oracle = ToyModel(dropout=0.0).double()
    oracle.load_state_dict(before)
    train(run, build=lambda *_: Parts(model=model, feed=feed(run), images=IMAGES))
    batch = [ToyImages()[0, k] for k in range(4)]
    image = torch.stack([b["image"] for b in batch]).double()
    label = torch.stack([b["label"] for b in batch])
    outputs = oracle(image)
    loss = nn.functional.cross_entropy(outputs["logits"], label, ignore_index=255)
    aux = nn.functional.cross_entropy(outputs["aux"][0], label, ignore_index=255)
    (loss + 0.4 * aux).backward()
    for name, value in oracle.named_parameters():
        decay = 1e-4 if value.ndim > 1 else 0.0
        expected = value - 0.1 * (value.grad + decay * value)
        torch.testing.assert_close(weights(tmp_path)[name].double(), expected, rtol=0, atol=1e-6)
    (record,) = records(tmp_path, "train")
    assert record["loss_seg"] == pytest.approx(loss.item(), abs=1e-5)
    assert record["loss_aux"] == pytest.approx(0.4 * aux.item(), abs=1e-5)
    assert record["loss"] == pytest.approx(record["loss_seg"] + record["loss_aux"])


@pytest.mark.parametrize("optim", [{}, {"name": "adamw", "lr": 1e-3}, {"clip_norm": 0.05}])
def test_accumulation_does_not_change_the_update(tmp_path, optim):
    whole = trained(tmp_path / "whole", optim=optim)
    for micro in (2, 1):
        parts = trained(tmp_path / str(micro), micro_batch=micro, optim=optim)
        # AdamW divides tiny gradients by their own size, which magnifies rounding.
        assert_close(parts, whole, rtol=1e-4, atol=2e-5 if "name" in optim else 1e-6)
        first, second = losses(tmp_path / "whole"), losses(tmp_path / str(micro))
        assert second == pytest.approx(first, rel=1e-5)


def test_clipping_bounds_the_update(tmp_path):
    optim = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "clip_norm": 1e-3, "lr": 1.0}
    model = ToyModel(dropout=0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = config(tmp_path, iters=1, optim=optim)
    train(run, build=lambda *_: Parts(model=model, feed=feed(run), images=IMAGES))
    moved = sum(((weights(tmp_path)[n] - before[n]) ** 2).sum() for n in before)
    assert moved.sqrt().item() == pytest.approx(1e-3, rel=1e-3)


def test_average_of_the_weights_is_what_is_evaluated_and_exported(tmp_path):
    run = config(tmp_path, iters=3, ema_decay=0.5, keep=9, checkpoint_every=1)
    train(run, build=build(norm=True))
    saved = [
        torch.load(tmp_path / "checkpoints" / name, weights_only=True)["model"]
        for name in ("step_00000001.pt", "step_00000002.pt", "last.pt")
    ]
    expected = {
        name: 0.25 * saved[0][name] + 0.25 * saved[1][name] + 0.5 * saved[2][name]
        for name in saved[0]
        if saved[0][name].is_floating_point()
    }
    exported = weights(tmp_path, "best")
    for name, value in expected.items():
        torch.testing.assert_close(exported[name], value)
    model = ToyModel(norm=True)
    model.load_state_dict(exported)
    score = feed(run).evaluate(model.eval())
    assert json.loads((tmp_path / "results.json").read_text())["miou"] == score["miou"]


def test_evaluation_does_not_change_training(tmp_path):
    assert_same(
        trained(tmp_path / "a", dropout=0.3, eval_every=1), trained(tmp_path / "b", dropout=0.3)
    )


def test_seed_decides(tmp_path):
    first, again, other = (
        trained(tmp_path / str(k), dropout=0.3, seed=seed) for k, seed in enumerate((1, 1, 2))
    )
    assert_same(first, again)
    assert not torch.equal(first["stem.weight"], other["stem.weight"])


def test_half_precision_trains(tmp_path):
    trained(tmp_path, precision="bf16", iters=20)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


def test_half_precision_reaches_the_model(tmp_path):
    seen = []

    class Model(ToyModel):
        def forward(self, image):
            outputs = super().forward(image)
            seen.append(outputs["logits"].dtype)
            return outputs

    run = config(tmp_path, iters=1, precision="bf16")
    train(run, build=lambda *_: Parts(model=Model(), feed=feed(run), images=IMAGES))
    assert seen[0] == torch.bfloat16
    assert all(value.dtype == torch.float32 for value in weights(tmp_path).values())


def test_channels_last_is_the_same_training(tmp_path):
    seen = []

    class Model(ToyModel):
        def forward(self, image):
            if self.training:
                seen.append(image.is_contiguous(memory_format=torch.channels_last))
            return super().forward(image)

    run = config(tmp_path / "last", channels_last=True)
    train(run, build=lambda *_: Parts(model=Model(dropout=0.0), feed=feed(run), images=IMAGES))
    assert all(seen)
    assert_close(weights(tmp_path / "last"), trained(tmp_path / "first"), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_compiled_is_the_same_training(tmp_path):
    compiled = trained(tmp_path / "compiled", compile=True)
    assert_close(compiled, trained(tmp_path / "plain"), rtol=1e-4, atol=1e-6)


def test_hard_pixels_only(tmp_path):
    easy = trained(tmp_path / "a", loss={"kind": "ohem", "ohem_min_kept": 1, "ohem_threshold": 0.3})
    plain = trained(tmp_path / "b")
    assert not torch.allclose(easy["stem.weight"], plain["stem.weight"])
    every = trained(tmp_path / "c", loss={"kind": "ohem", "ohem_min_kept": 4 * 64})
    assert_close(every, plain, rtol=1e-4, atol=1e-6)


def test_every_parameter_learns(tmp_path):
    model = ToyModel(dropout=0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = config(tmp_path, iters=1)
    train(run, build=lambda *_: Parts(model=model, feed=feed(run), images=IMAGES))
    after = weights(tmp_path)
    assert not [name for name in before if torch.equal(before[name], after[name])]


class Poisoned(ToyImages):
    def __getitem__(self, key):
        item = super().__getitem__(key)
        if key == (0, 9):  # in update 3 of a batch of 4
            item["image"][:] = torch.nan
        return item


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_no_number_stops_naming_its_update(tmp_path, log_every):
    run = config(tmp_path, iters=8, log_every=log_every, checkpoint_every=2)
    images = Poisoned()
    parts = Parts(model=ToyModel(), feed=feed(run, images=images), images=IMAGES)
    with pytest.raises(UserError, match="the loss of update 3 is not finite; its images hold NaN"):
        train(run, build=lambda *_: parts)
    saved = torch.load(tmp_path / "checkpoints/last.pt", weights_only=True)
    assert saved["step"] == 2
    assert all(torch.isfinite(value).all() for value in saved["model"].values())


def test_an_update_without_valid_pixels_is_harmless(tmp_path):
    class Void(ToyImages):
        def __getitem__(self, key):
            item = super().__getitem__(key)
            return {**item, "label": torch.full_like(item["label"], 255)}

    run = config(tmp_path, optim={"weight_decay": 0.0})
    model = ToyModel()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(run, build=lambda *_: Parts(model=model, feed=feed(run, images=Void()), images=IMAGES))
    assert_same(weights(tmp_path), before)
    assert losses(tmp_path) == [0.0] * 4


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"precision": "fp16"}, "train.precision fp16 needs a GPU, this process has cpu; .*bf16"),
        ({"global_batch": 4, "micro_batch": 3}, "write micro_batch: 2"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_impossible_options_are_refused(tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        train(config(tmp_path, **options), build=build())
    assert not (tmp_path / "config.yaml").exists()


def test_batch_norms_that_see_parts_of_the_batch_are_mentioned(tmp_path, capsys):
    train(config(tmp_path / "a", iters=1, micro_batch=2), build=build(norm=True))
    assert "batch norms see 2 of the 4 images of an update" in capsys.readouterr().err
    train(config(tmp_path / "b", iters=1), build=build(norm=True))
    assert "batch norms" not in capsys.readouterr().err


def test_weight_files_say_what_they_are(tmp_path):
    from safetensors import safe_open

    trained(tmp_path)
    with safe_open(tmp_path / "checkpoints/last.safetensors", framework="pt") as file:
        text = file.metadata()
    assert text["step"] == "4"
    assert json.loads(text["config"])["model"]["variant"] == "Ti"
    assert_same(weights(tmp_path, "last"), weights(tmp_path))
