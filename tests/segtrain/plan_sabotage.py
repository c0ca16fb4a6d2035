"""Good runs made bad, and what `segtrain plan` must say of each."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from segtrain.data.reading import read_stored
from segtrain.models import build_model
from tests.segtrain.toy_network import CONTEXT, RESNET, section
from tests.segtrain.toy_sr import DF2
from tests.segtrain.toy_unept import SMALL_HEAD

SEGMENTER = {
    **{"name": "segmenter", "embed_dim": 8, "depth": 1, "num_heads": 2, "patch_size": 4},
    "decoder_layers": 1,
}
SR = {"name": "network", "backbone": RESNET, "head": CONTEXT, "aux": {"channels": 8}}
UNEPT = {"name": "network", "backbone": RESNET, "head": SMALL_HEAD}


@dataclass
class Sabotage:
    """What is done to a good run, and what must come of it.

    Attributes:
        overrides: `key=value`.
        reasons: (step, part of its problem), all of them in order.
        harm: Changes files.
        model: The section `model`.
        skipped: Steps that cannot be tried.
    """

    overrides: tuple[str, ...] = ()
    reasons: tuple[tuple[str, str], ...] = ()
    harm: Callable[[Path], object] | None = None
    model: dict | None = None
    skipped: tuple[str, ...] = ()


def label(folder: Path, split: str = "train", number: int = 0) -> Path:
    return folder / f"cityscapes/gtFine/{split}/toy/toy_{number:06d}_000019_gtFine_labelIds.png"


def image(folder: Path, split: str = "train", number: int = 0) -> Path:
    return folder / f"cityscapes/leftImg8bit/{split}/toy/toy_{number:06d}_000019_leftImg8bit.png"


def foreign_values(folder):
    for split in ("train", "val"):
        for number in (0, 1):
            path = label(folder, split, number)
            values = read_stored(path).copy()
            values[values == values[0, 0]] = 200
            Image.fromarray(values).save(path)


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:600])


def void_validation(folder):
    for number in (0, 1):
        Image.fromarray(np.zeros((32, 64), np.uint8)).save(label(folder, "val", number))


def wrong_size(folder):
    for number in (0, 1):
        Image.fromarray(np.full((32, 60), 7, np.uint8)).save(label(folder, "train", number))


def another_name(folder):
    for path, end in ((image(folder, "val"), "leftImg8bit"), (label(folder, "val"), "labelIds")):
        middle = "" if end == "leftImg8bit" else "gtFine_"
        path.rename(path.with_name(f"a_street_{middle}{end}.png"))


def other_network(folder):
    model = build_model(section(head=CONTEXT | {"channels": 8}), 19, image_size=(32, 48))
    torch.save(model.state_dict(), folder / "other.pth")


def a_run(folder):
    (folder / "run/checkpoints").mkdir(parents=True)
    (folder / "run/checkpoints/last.pt").touch()


AFTER_BATCHES = ("training", "evaluation", "checkpoint")
AFTER_DATA = ("labels", "batches", *AFTER_BATCHES)
SABOTAGES = {
    "unknown key": Sabotage(("optim.rate=1",), (("configuration", "optim.rate"),)),
    "window below a patch": Sabotage(
        ("eval.window=2", "eval.stride=1"),
        (("configuration", "eval.window 2 must be at least 4"),),
    ),
    "loss.boundary missing": Sabotage(
        (), (("configuration", "write loss.boundary: {}"),), model=UNEPT
    ),
    "micro batch": Sabotage(("train.micro_batch=3",), (("configuration", "write micro_batch: 2"),)),
    "warm-up longer than the run": Sabotage(
        ("schedule.warmup_iters=9",), (("configuration", "must be below train.iters"),)
    ),
    "output holds a run": Sabotage((), (("output", "already holds a run"),), a_run),
    "output below a file": Sabotage(
        ("output=FOLDER/tiny.yaml/run",), (("output", "write output=ANOTHER_FOLDER"),)
    ),
    "no data": Sabotage(
        ("data.root=FOLDER/none",), (("data set", "no folder"),), skipped=AFTER_DATA
    ),
    "no such split": Sabotage(
        ("data.val_split=vall",), (("data set", "did you mean val?"),), skipped=AFTER_DATA
    ),
    "another convention": Sabotage(
        (),
        (
            ("labels", "see: segtrain data check"),
            ("training", "toy_00000"),
            ("evaluation", "toy_000000"),
            ("submission", "200"),
        ),
        foreign_values,
    ),
    "label missing": Sabotage(
        (),
        (("labels", "1 file missing or unreadable: no file"), ("training", "no file")),
        lambda folder: label(folder).unlink(),
    ),
    "image truncated": Sabotage(
        (),
        (("labels", "missing or unreadable: cannot read"), ("training", "copy it again")),
        lambda folder: truncate(image(folder)),
    ),
    "image truncated, check off": Sabotage(
        ("data.check=off",),
        (("labels", "missing or unreadable: cannot read"), ("training", "copy it again")),
        lambda folder: truncate(image(folder)),
    ),
    "image truncated in the end of val": Sabotage(
        (),
        (("labels", "missing or unreadable: cannot read"),),
        lambda folder: truncate(image(folder, "val", 1)),
    ),
    "labels of another size": Sabotage(
        (),
        (("labels", "2 label maps of another size"), ("training", "write it at the image's size")),
        wrong_size,
    ),
    "nothing to score": Sabotage(
        (), (("labels", "data, val: no pixel has a class, nothing can be scored"),), void_validation
    ),
    "weights of another network": Sabotage(
        ("init=FOLDER/other.pth",), (("weights", "does not fit the model"),), other_network, SR
    ),
    "no weights": Sabotage(("init=FOLDER/none.pth",), (("weights", "none.pth"),)),
    "too many images": Sabotage(
        ("data.train_images=9",),
        (("batches", "write data.train_images: null"),),
        skipped=AFTER_BATCHES,
    ),
    "fp16 on a CPU": Sabotage(
        ("train.precision=fp16",),
        (("batches", "write train.precision: bf16"),),
        skipped=AFTER_BATCHES,
    ),
    "learning rate": Sabotage(
        ("optim.lr=1e30",),
        (("training", "the loss of update 2 is not finite; lower optim.lr"),),
        model=SR,
    ),
    "crop too small for batch norms": Sabotage(
        ("data.crop=[8,8]", "train.global_batch=1", "eval.window=8", "eval.stride=8"),
        (("training", "1 of 8x8; write train.micro_batch: 2"),),
        model=SR | {"backbone": RESNET | {"output_stride": 32}},
    ),
    "one image for a norm of the whole image": Sabotage(
        ("train.global_batch=1",),
        (("training", "take a head that does not pool whole images"),),
        model=SR | {"backbone": DF2, "head": {"name": "df", "channels": 16}, "aux": None},
    ),
    "a name the server does not know": Sabotage(
        (), (("submission", "keep that of the download"),), another_name
    ),
}
