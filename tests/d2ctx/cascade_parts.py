"""Heads, pyramids and proposals for the tests of cascades."""

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import build_roi_heads
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from tests.d2ctx import tiny

CASCADE, HTC = "a2fpn/cascade_mask_rcnn_a2fpn_instant.yaml", "a2fpn/htc_a2fpn_instant.yaml"
SEMANTIC_OFF = ("MODEL.HTC.SEMANTIC.ENABLED", False)
CHANNELS, HEIGHT, WIDTH = 16, 64, 96
SHAPES = {f"p{i}": ShapeSpec(channels=CHANNELS, stride=2**i) for i in range(2, 7)}


def config(name: str, *opts: object) -> CfgNode:
    """An instant configuration with few RoIs."""
    few = ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16, "MODEL.ROI_HEADS.NUM_CLASSES", 3)
    return tiny.config(name, *few, *opts)


def heads(name: str, *opts: object) -> nn.Module:
    """RoI heads alone, initialised from a fixed seed, with weights large enough to matter."""
    torch.manual_seed(0)
    built = build_roi_heads(config(name, *opts), SHAPES)
    for predictor in built.box_predictor:
        nn.init.normal_(predictor.cls_score.weight, std=0.3)
        nn.init.normal_(predictor.bbox_pred.weight, std=0.3)
    for head in getattr(built, "mask_head", []):
        nn.init.normal_(head.predictor.weight, std=0.3)
    return built


def pyramid(num_images: int = 2) -> dict[str, Tensor]:
    """Random maps for images of HEIGHT x WIDTH."""
    generator = torch.Generator().manual_seed(1)
    sizes = {name: (HEIGHT // s.stride, WIDTH // s.stride) for name, s in SHAPES.items()}
    return {
        name: torch.randn(num_images, CHANNELS, h, w, generator=generator)
        for name, (h, w) in sizes.items()
    }


def boxes(count: int, seed: int) -> Tensor:
    """Random boxes inside the image, corners, at least 4 pixels wide."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([WIDTH - 24.0, HEIGHT - 24.0])
    corner = torch.rand(count, 2, generator=generator) * scale
    return torch.cat([corner, corner + 4 + 20 * torch.rand(count, 2, generator=generator)], dim=1)


def proposals(num_images: int = 2, count: int = 30) -> list[Instances]:
    """Random proposals, a third of them near the ground truth of `targets`."""
    found = []
    for image in range(num_images):
        near = (
            _truth(image)[torch.arange(count // 3) % 2] + torch.linspace(-4, 4, count // 3)[:, None]
        )
        box = torch.cat([near, boxes(count - count // 3, seed=image)])
        logits = torch.linspace(1, 0, count)
        found.append(
            Instances((HEIGHT, WIDTH), proposal_boxes=Boxes(box), objectness_logits=logits)
        )
    return found


def _truth(image: int) -> Tensor:
    return torch.tensor([[8.0, 8, 40, 44], [30, 20, 80, 60]]) + image


def targets(num_images: int = 2, *, empty: tuple[int, ...] = ()) -> list[Instances]:
    """Two objects in every image, none in those of `empty`."""
    found = []
    for image in range(num_images):
        truth = _truth(image)
        masks = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
        for mask, (x, y, right, bottom) in zip(masks, truth.int().tolist(), strict=True):
            mask[y:bottom, x : (x + right) // 2] = True
        instances = Instances(
            (HEIGHT, WIDTH),
            gt_boxes=Boxes(truth),
            gt_classes=torch.tensor([0, 2]),
            gt_masks=BitMasks(masks),
        )
        found.append(instances[:0] if image in empty else instances)
    return found


def losses(built: nn.Module, *more: object, seed: int = 0, truth=None) -> dict[str, Tensor]:
    """Losses of RoI heads on the random inputs above."""
    torch.manual_seed(seed)
    truth = targets() if truth is None else truth
    with EventStorage():
        return built.train()(None, pyramid(), proposals(), truth, *more)[1]


def detections(built: nn.Module, num_images: int = 2) -> list[Instances]:
    """Detections of RoI heads on the random inputs above."""
    with torch.no_grad():
        return built.eval()(None, pyramid(num_images), proposals(num_images))[0]
