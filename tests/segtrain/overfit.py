"""Can a network learn four images by heart? If not, something does not reach the loss."""

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from segtrain.config.schema import LossConfig
from segtrain.criterion import build_criterion, count_pixels
from segtrain.data.datasets.camvid import layout
from segtrain.data.reading import read_image, read_labels
from segtrain.data.synthetic.scene import generate_scene
from segtrain.data.transforms import normalise
from segtrain.normalisation import NORMALISATIONS
from tests.segtrain.data_samples import DATA

NUM_CLASSES = 12


def camvid_images(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Four images of CamVid's training split, small: [4, 3, H, W] and labels [4, H, W]."""
    found = layout(DATA / "camvid")
    samples = found.samples("train")[::90][:4]
    images, labels = [], []
    for sample in samples:
        image = torch.from_numpy(read_image(sample.image)).permute(2, 0, 1)
        label = torch.from_numpy(read_labels(found, sample))[None]
        images.append(F.resize(image, [height, width], antialias=True))
        labels.append(F.resize(label, [height, width], F.InterpolationMode.NEAREST_EXACT))
    return _prepared(images), torch.cat(labels).long()


def synthetic_images(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Four synthetic scenes and their classes."""
    scenes = [generate_scene(seed=0, index=k, size=(width, height)) for k in range(4)]
    images = [torch.from_numpy(scene.image).permute(2, 0, 1) for scene in scenes]
    labels = [torch.from_numpy(scene.semantic).long() - 1 for scene in scenes]
    return _prepared(images), torch.stack(labels)


def _prepared(images: list[Tensor]) -> Tensor:
    return torch.stack([normalise(image, *NORMALISATIONS["imagenet"]) for image in images])


def learned(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    lr: float,
    loss: LossConfig | None = None,
    **more: Tensor,
) -> float:
    """Train on one batch; the share of pixels that are then right in evaluation mode."""
    criterion = build_criterion(loss or LossConfig())
    truth = {"label": labels, **more}
    counts = count_pixels([truth])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for _ in range(steps):
        terms = criterion(model(images), truth, counts)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        right = model.eval()(images)["logits"].argmax(1) == labels
    return right[labels != 255].float().mean().item()
