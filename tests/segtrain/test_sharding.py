"""Two processes that share one model: the updates of DDP, checkpoints of whole models."""

import os
import signal

import pytest
import torch
from pydantic import ValidationError

from segtrain.errors import UserError
from segtrain.train.journal import read_journal
from segtrain.train.start import resume, train
from tests.segtrain.toy_segmenter import tiny
from tests.segtrain.train_toys import CLASSES, SIDE, assert_close, build, config, weights
from tests.segtrain.two_processes import launched

OPTIONS = {"iters": 4, "micro_batch": 1, "eval_every": 2}
OPTIMS = {
    "sgd": {"lr": 0.1, "clip_norm": 0.5, "backbone_lr_factor": 0.5},
    "adamw": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1, "clip_norm": 0.05},
}


def segmenter(dropout=0.0):
    """A tiny Segmenter, built the same everywhere."""
    torch.manual_seed(3)
    return tiny(
        num_classes=CLASSES, image_size=(SIDE, SIDE), drop_path_rate=0.0, decoder_dropout=dropout
    )


def parts(*, stop_before=None, **keywords):
    """What `train` takes as `build`; `stop_before`: the forward pass at which a signal comes."""

    def built(run, device, restoring):
        made = build()(run, device, restoring)
        model = segmenter(**keywords)
        if stop_before is not None:
            model.register_forward_pre_hook(Signal(stop_before))
        return type(made)(model=model, feed=made.feed, images=made.images)

    return built


class Signal:
    """Sends SIGTERM to its process at a forward pass."""

    def __init__(self, call):
        self.call, self.calls = call, 0

    def __call__(self, *_):
        self.calls += 1
        if self.calls == self.call:
            os.kill(os.getpid(), signal.SIGTERM)


SCRIPT = """
import sys
from pathlib import Path
import torch
from segtrain import dist
from segtrain.errors import Interrupted
from segtrain.train.start import resume, train
from tests.segtrain.test_sharding import OPTIMS, OPTIONS, parts
from tests.segtrain.train_toys import config
torch.set_num_threads(1)
torch.cuda.is_available = lambda: False
folder = Path(sys.argv[1])

def run(name, parallel, optim, **options):
    options = {**OPTIONS, "parallel": parallel, **options}
    return config(folder / name, optim=OPTIMS[optim], **options)

with dist.process_group():
    for optim in OPTIMS:
        for parallel in ("ddp", "fsdp"):
            train(run(f"{optim}_{parallel}", parallel, optim), build=parts())
        try:
            # The fourth pass is the second of update 2; no evaluation is before.
            train(run(f"{optim}_halves", "fsdp", optim), build=parts(stop_before=4))
        except Interrupted as stop:
            assert "saved after update 2" in str(stop), stop
        if dist.is_main():
            saved = folder / f"{optim}_halves/checkpoints/last.pt"
            (folder / f"{optim}_half.pt").write_bytes(saved.read_bytes())
        dist.barrier()
        resume(folder / f"{optim}_halves", build=parts())
    train(run("bf16_ddp", "ddp", "sgd", precision="bf16"), build=parts())
    train(run("bf16_fsdp", "fsdp", "sgd", precision="bf16"), build=parts())
print("done")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All runs, of one launch because it takes seconds."""
    folder = tmp_path_factory.mktemp("shards")
    said, errors = launched(SCRIPT, folder, timeout=250)
    assert [out.split() for out in said] == [["done"]] * 2, errors[0] + errors[1]
    return folder


def losses(folder):
    return [r["loss"] for r in read_journal(folder / "log.jsonl") if r["event"] == "train"]


def state(folder):
    return torch.load(folder / "checkpoints/last.pt", weights_only=True)


@pytest.mark.parametrize("optim", OPTIMS)
def test_updates_are_those_of_ddp(folder, optim):
    sharded, whole = folder / f"{optim}_fsdp", folder / f"{optim}_ddp"
    assert len(losses(sharded)) == 4
    assert losses(sharded) == pytest.approx(losses(whole), abs=1e-5)
    assert losses(whole)[0] != pytest.approx(losses(whole)[3], abs=1e-2)
    # Adam divides by the root of tiny gradients, in which rounding is not small.
    assert_close(weights(sharded), weights(whole), rtol=0, atol=1e-5 if optim == "sgd" else 2e-3)
    assert_close(weights(sharded, "best"), weights(whole, "best"), rtol=0, atol=2e-3)


@pytest.mark.parametrize("optim", OPTIMS)
def test_checkpoints_are_those_of_ddp(folder, optim):
    """Names, order and shapes, of weights and of the optimizer."""
    sharded, whole = (state(folder / f"{optim}_{kind}") for kind in ("fsdp", "ddp"))

    def shapes(tree):
        if isinstance(tree, dict):
            return {key: shapes(value) for key, value in tree.items()}
        return tuple(tree.shape) if isinstance(tree, torch.Tensor) else tree

    assert shapes(sharded["model"]) == shapes(whole["model"])
    assert list(sharded["model"]) == list(whole["model"])
    assert shapes(sharded["optimizer"]["state"]) == shapes(whole["optimizer"]["state"])
    groups = ("params", "lr", "weight_decay", "lr_factor")
    for ours, theirs in zip(
        sharded["optimizer"]["param_groups"], whole["optimizer"]["param_groups"], strict=True
    ):
        assert [ours[key] for key in groups] == [theirs[key] for key in groups]


@pytest.mark.parametrize("optim", OPTIMS)
def test_resuming_is_exact(folder, optim):
    halves, straight = folder / f"{optim}_halves", folder / f"{optim}_fsdp"
    events = [r["event"] for r in read_journal(halves / "log.jsonl")]
    assert events.count("stop") == events.count("resume") == 1
    assert losses(halves) == losses(straight)
    for name, value in state(straight)["model"].items():
        assert torch.equal(value, state(halves)["model"][name]), name


@pytest.mark.parametrize("optim", OPTIMS)
def test_one_process_goes_on_with_what_two_have_shared(folder, optim, tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    text = (folder / f"{optim}_halves/config.yaml").read_text()
    text = text.replace("parallel: fsdp", "parallel: ddp")
    (tmp_path / "run/config.yaml").write_text(text)
    half = folder / f"{optim}_half.pt"
    (tmp_path / "run/checkpoints/last.pt").write_bytes(half.read_bytes())
    assert torch.load(half, weights_only=True)["step"] == 2
    resume(tmp_path / "run", build=parts())
    atol = 1e-5 if optim == "sgd" else 2e-3
    assert_close(weights(tmp_path / "run"), weights(folder / f"{optim}_ddp"), rtol=0, atol=atol)


def test_half_precision(folder):
    sharded, whole = (losses(folder / f"bf16_{kind}") for kind in ("fsdp", "ddp"))
    assert sharded == pytest.approx(whole, abs=0.02)
    assert sharded != losses(folder / "sgd_fsdp")


def test_one_process_has_nobody_to_share_with(tmp_path):
    text = "train.parallel fsdp needs several processes, .*; start them with torchrun .*: ddp"
    with pytest.raises(UserError, match=text):
        train(config(tmp_path, parallel="fsdp"), build=parts())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ema_decay": 0.5}, "ema_decay 0.5; write ema_decay: 0"),
        ({"compile": True}, "compile true; write compile: false"),
        ({"channels_last": True}, "channels_last true; write channels_last: false"),
        ({"precision": "fp16"}, "precision fp16; write precision: bf16"),
    ],
)
def test_what_does_not_go_together(tmp_path, options, text):
    with pytest.raises(ValidationError, match=f"parallel fsdp does not go with {text}"):
        config(tmp_path, parallel="fsdp", **options)
    config(tmp_path, parallel="ddp", **options)
