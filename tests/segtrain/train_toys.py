"""A tiny model and a data set out of thin air, put together as the trainer does it."""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from segtrain import dist
from segtrain.config.schema import RunConfig
from segtrain.train.feed import Feed
from segtrain.train.start import Parts, train
from segtrain.train.state import micro_batch

CLASSES, SIDE, IMAGES = 3, 8, 12


def config(folder, *, optim=None, loss=None, schedule=None, workers=0, **options) -> RunConfig:
    """A configuration; keywords of `train` beside the sections."""
    options = {"iters": 4, "global_batch": 4, "log_every": 1, "checkpoint_every": 100, **options}
    return RunConfig.model_validate(
        {
            "data": {
                **{"dataset": "folder", "root": "none", "workers": workers},
                **{"crop": [16, 16], "base_size": [16, 16]},
            },
            "model": {"name": "segmenter", "variant": "Ti"},
            "optim": {"lr": 0.1, "weight_decay": 1e-4, **(optim or {})},
            "loss": loss or {},
            "schedule": schedule or {},
            "train": options,
            "output": str(folder),
        }
    )


class ToyModel(nn.Module):
    """Two convolutions, dropout and an auxiliary head."""

    def __init__(self, *, dropout: float = 0.2, norm: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm else nn.GroupNorm(2, 6)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(6, CLASSES, 1)
        self.coarse = nn.Conv2d(6, CLASSES, 2, stride=2)

    def forward(self, image):
        x = self.dropout(F.relu(self.norm(self.stem(image))))
        outputs = {"logits": self.head(x)}
        if self.training:
            outputs["aux"] = [F.interpolate(self.coarse(x), x.shape[2:], mode="bilinear")]
        return outputs

    def backbone_parameters(self):
        return ("stem",)


class ToyImages(torch.utils.data.Dataset):
    """Noise whose class is in its channels; every image has another number of valid pixels."""

    def __getitem__(self, key):
        epoch, index = key
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        image = torch.randn(3, SIDE, SIDE, generator=generator)
        label = image.argmax(0)
        label[: index % SIDE] = 255
        return {"image": image, "label": label}

    def __len__(self):
        return IMAGES


def feed(run: RunConfig, *, images=None) -> Feed:
    """Batches by position alone, and a score."""
    images = images or ToyImages()
    options = run.train
    micro = micro_batch(options)

    def keys(step, rewinds):
        while True:
            start = step * options.global_batch + 5 * rewinds
            own = range(start + dist.rank(), start + options.global_batch, dist.world_size())
            for first in range(0, len(own), micro):
                yield [(p // IMAGES, p % IMAGES) for p in own[first : first + micro]]
            step += 1

    def batches(step, rewinds):
        workers = run.data.workers
        return iter(
            torch.utils.data.DataLoader(
                images, batch_sampler=keys(step, rewinds), num_workers=workers
            )
        )

    def evaluate(model):
        torch.rand(3)  # whatever it draws must not change training
        batch = torch.stack([images[0, k]["image"] for k in range(IMAGES)])
        label = torch.stack([images[0, k]["label"] for k in range(IMAGES)])
        with torch.no_grad():
            right = (model(batch)["logits"].argmax(1) == label)[label != 255]
        return {"miou": right.float().mean().item()}

    return Feed(batches=batches, evaluate=evaluate)


def build(**keywords):
    """What `train` takes as `build`."""

    def parts(run, device, restoring):
        return Parts(model=ToyModel(**keywords), feed=feed(run), images=IMAGES)

    return parts


def weights(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    """The whole state of the newest checkpoint, or the weights of a file."""
    if name == "last":
        return torch.load(folder / "checkpoints/last.pt", weights_only=True)["model"]
    from safetensors.torch import load_file

    return load_file(folder / f"checkpoints/{name}.safetensors")


def trained(folder: Path, *, dropout: float = 0.0, norm: bool = False, **keywords):
    """Train a toy; its weights."""
    train(config(folder, **keywords), build=build(dropout=dropout, norm=norm))
    return weights(folder)


def assert_close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        named = partial("{}: {}".format, name)
        torch.testing.assert_close(a[name], b[name], msg=named, **tolerance)


def assert_same(a, b):
    """Bit for bit."""
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]
