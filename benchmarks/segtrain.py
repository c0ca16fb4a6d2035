"""The semantic trainer: Segmenter's steps, loading of images, evaluation; a table, a result file.

`python -m benchmarks.segtrain [--only TEXT] [--device cuda] [--threads N]`
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import command
from benchmarks.cases.case import MEMORY, TIME, Case
from benchmarks.cases.unept import CASES as UNEPT
from benchmarks.common import synchronize
from benchmarks.measure import SEED, Setting, in_own_process
from benchmarks.ops import rows_of
from benchmarks.rows import Row, Target, compare, print_table
from ctxops.tokens import SelfAttention
from ctxops.vit import build_vit
from segtrain.config.schema import DataConfig, SegmenterConfig
from segtrain.data.dataset import SegDataset, build_train_transform
from segtrain.data.datasets import build_layout
from segtrain.data.synthetic.writers import write_dataset
from segtrain.evaluation.confusion import ConfusionMatrix
from segtrain.inference import Inferencer
from segtrain.models import build_model

SIDE = 512
FASTER = {TIME: Target(of="ratio", limit=0.75), MEMORY: Target(of="ratio", limit=0.6)}
CITYSCAPES = {"num_classes": 19, "window": 768, "stride": 736, "size": (1024, 2048)}


class Materialised(SelfAttention):
    """The same parameters; all weights [B, h, N, N] exist, as in the released code."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, d] -> [B, N, d]."""
        query, key, value = self._heads(x)
        weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
        weights = nn.functional.dropout(weights, self.dropout, self.training)
        out = (weights @ value).transpose(1, 2).flatten(2)  # [B, N, d]
        return nn.functional.dropout(self.proj(out), self.dropout, self.training)


class Logits(nn.Module):
    """A model whose output is one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, K, H, W]."""
        return self.model(image)["logits"]


def segmenter(
    variant: str,
    decoder: str,
    *,
    num_classes: int = 150,
    side: int = SIDE,
    training: bool = False,
    materialised: bool = False,
) -> nn.Module:
    """A Segmenter of the paper with random weights."""
    config = SegmenterConfig(name="segmenter", variant=variant, decoder=decoder)
    model = build_model(config, num_classes, image_size=(side, side))
    if materialised:
        for module in model.modules():
            if isinstance(module, SelfAttention):
                module.__class__ = Materialised
    return Logits(model).train(training)


def our_encoder() -> nn.Module:
    """ViT-S/16, evaluation mode."""
    return build_vit(variant="S", image_size=(SIDE, SIDE)).eval()


def timm_encoder() -> nn.Module:
    """Timm's ViT-S/16, evaluation mode: tokens behind the last norm."""
    import timm

    model = timm.create_model("vit_small_patch16_384", img_size=SIDE, num_classes=0)
    model.forward = model.forward_features
    return model.eval()


def image() -> Sequence[Tensor]:
    """One image."""
    return [torch.randn(1, 3, SIDE, SIDE)]


def _case(variant: str, decoder: str, *, training: bool) -> Case:
    make = partial(segmenter, variant, decoder, training=training)
    what = "training step" if training else "inference"
    return Case(
        name=f"{variant}{'-Mask' if decoder == 'mask' else ''}/16, {what}, {SIDE}x{SIDE}",
        make=image,
        forms={"materialised": partial(make, materialised=True), "ours": make},
        baseline="materialised",
        backward=training,
        targets={"ours": FASTER} if training else {},
    )


CASES = {
    case.name: case
    for case in [
        *(
            _case(variant, decoder, training=training)
            for variant, decoder in (("S", "linear"), ("B", "mask"))
            for training in (True, False)
        ),
        Case(
            name=f"ViT-S/16 encoder, {SIDE}x{SIDE}",
            make=image,
            forms={"timm": timm_encoder, "ours": our_encoder},
            baseline="timm",
            backward=False,
        ),
        *UNEPT,
    ]
}


# ---- data and evaluation ---------------------------------------------------------------------
def loading(seconds: float) -> list[Row]:
    """Images per second of one worker: decode, augment, normalise."""
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(out=folder, fmt="folder", num=16, size=(SIDE, SIDE), val_fraction=0.25)
        config = DataConfig(
            dataset="folder", root=folder, crop=(SIDE, SIDE), base_size=(4 * SIDE, SIDE)
        )
        layout = build_layout(config)
        dataset = SegDataset(layout, "train", build_train_transform(config, layout), seed=SEED)
        for index in range(len(dataset)):
            dataset[0, index]
        count, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            dataset[1 + count // len(dataset), count % len(dataset)]
            count += 1
        rate = count / (time.perf_counter() - begin)
    name = f"data loading, {SIDE}x{SIDE} image, full augmentation"
    return [compare(name, "rate of one worker", "img/s", rate)]


class Timed(nn.Module):
    """A model that adds up the time it takes."""

    def __init__(self, model: nn.Module, device: str) -> None:
        super().__init__()
        self.model, self.device, self.seconds = model, device, 0.0

    def forward(self, images: Tensor) -> Any:
        """What the model returns."""
        synchronize(self.device)
        begin = time.perf_counter()
        out = self.model(images)
        synchronize(self.device)
        self.seconds += time.perf_counter() - begin
        return out


def evaluation(device: str) -> list[Row]:
    """One image of Cityscapes' size in windows, counted: how much is not the model."""
    classes, window = CITYSCAPES["num_classes"], CITYSCAPES["window"]
    torch.manual_seed(SEED)
    model = segmenter("S", "mask", num_classes=classes, side=window).model
    timed = Timed(model.to(device), device)
    inferencer = Inferencer(
        timed,
        num_classes=classes,
        normalisation="vit",
        device=device,
        window=window,
        stride=CITYSCAPES["stride"],
    )
    draw = np.random.default_rng(SEED)
    picture = draw.integers(0, 256, (*CITYSCAPES["size"], 3), dtype=np.uint8)
    label = draw.integers(0, classes, CITYSCAPES["size"], dtype=np.uint8)
    matrix = ConfusionMatrix(classes)
    if device == "cuda":
        inferencer.labels(picture)  # warm-up
        timed.seconds = 0.0
    begin = time.perf_counter()
    matrix.update(inferencer.labels(picture), label)
    total = time.perf_counter() - begin
    name = "evaluation of a 1024x2048 image, S-Mask/16, windows of 768"
    spent = 1e3 * (total - timed.seconds)
    return [
        compare(name, "time", "ms", 1e3 * total),
        compare(
            f"{name}: all but the model",
            "time",
            "ms",
            spent,
            baseline="model",
            baseline_value=1e3 * timed.seconds,
            target=Target(of="ratio", limit=0.05),
        ),
    ]


# ---- command ---------------------------------------------------------------------------------
def _models(only: str, setting: Setting) -> tuple[list[Row], dict[str, Any]]:
    rows: list[Row] = []
    details: dict[str, Any] = {}
    for case in CASES.values():
        if only in case.name:
            details[case.name] = {
                form: in_own_process("benchmarks.segtrain", case.name, form, setting)
                for form in case.forms
            }
            rows += (new := rows_of(case, details[case.name]))
            print_table(new)
    return rows, details


def main() -> None:
    """Measure every case, print the table, write the results."""
    options = command.parser(__doc__).parse_args()
    setting = command.start(options, CASES)
    if setting is None:
        return
    rows, details = _models(options.only, setting)
    others: dict[str, Callable[[], list[Row]]] = {
        "data loading": partial(loading, options.seconds),
        "evaluation": partial(evaluation, options.device),
    }
    for name, rows_from in others.items():
        if options.only in name:
            rows += (new := rows_from())
            print_table(new)
    command.finish("segtrain", rows, details, options, known=[*CASES, *others])


if __name__ == "__main__":
    main()
