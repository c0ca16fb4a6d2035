"""Tiny models and inputs for the plug-in's tests."""

from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import BitMasks, Boxes, Instances

from d2ctx import add_d2ctx_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "d2"


def config(name: str = "a2fpn/mask_rcnn_a2fpn_instant.yaml", *opts: object) -> CfgNode:
    """One of our configurations, on the CPU, without weights, with KEY VALUE pairs merged last."""
    cfg = get_cfg()
    add_d2ctx_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *opts])
    return cfg


def batch(*, height: int = 96, width: int = 128, num_images: int = 2) -> list[dict]:
    """Training inputs with two boxes, masks and a semantic map each, drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for _ in range(num_images):
        truth = Instances((height, width))
        truth.gt_boxes = Boxes(torch.tensor([[8.0, 8, 56, 60], [40, 20, 90, 80]]))
        truth.gt_classes = torch.tensor([0, 1])
        masks = torch.zeros(2, height, width, dtype=torch.bool)
        masks[0, 8:60, 8:56] = True
        masks[1, 20:80, 40:90] = True
        truth.gt_masks = BitMasks(masks)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        semantic = masks[0].long()
        inputs.append({"image": image, "instances": truth, "sem_seg": semantic})
    return inputs
