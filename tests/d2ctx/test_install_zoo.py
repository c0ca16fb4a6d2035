"""Zoo models on the installed Detectron2: train, evaluate, resume and draw on made-up data."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2")

from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets import load_coco_json
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators, SemSegEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import ColorMode, Visualizer

pytestmark = pytest.mark.filterwarnings("ignore")

NAME = "install_zoo_toy"
HEIGHT, WIDTH, NUM_THINGS = 60, 80, 3

TINY = {
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 4,
    "MODEL.ROI_HEADS.NUM_CLASSES": NUM_THINGS,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TEST": 64,
    "DATASETS.TRAIN": (NAME,),
    "DATASETS.TEST": (NAME,),
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.BASE_LR": 1e-4,
    "TEST.DETECTIONS_PER_IMAGE": 5,
}


class Trainer(DefaultTrainer):
    """The default trainer, evaluated as Detectron2's own training script does."""

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluators:
        folder = cfg.OUTPUT_DIR
        evaluators = [COCOEvaluator(dataset_name, output_dir=folder)]
        if cfg.MODEL.META_ARCHITECTURE == "PanopticFPN":
            evaluators.append(SemSegEvaluator(dataset_name, output_dir=folder))
        return DatasetEvaluators(evaluators)


def write_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(2):
        pixels = rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        labels = rng.integers(0, 4, (HEIGHT, WIDTH), dtype=np.uint8)
        Image.fromarray(labels).save(folder / f"{index}_labels.png")
        size = {"height": HEIGHT, "width": WIDTH}
        images.append({"id": index, "file_name": f"{index}.png", **size})
        for category in range(1, NUM_THINGS + 1):
            x, y = 10 * category, 5 * category
            polygon = [x, y, x + 30, y, x + 30, y + 20, x, y + 20]
            entry = {"id": len(annotations) + 1, "image_id": index, "category_id": category}
            entry |= {"bbox": [x, y, 30, 20], "area": 600, "iscrowd": 0, "segmentation": [polygon]}
            annotations.append(entry)
    categories = [{"id": number, "name": f"thing{number}"} for number in range(1, NUM_THINGS + 1)]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (folder / "toy.json").write_text(json.dumps(content))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep these tiny layers on one thread: waiting for others costs more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("toy")
    write_images(folder)

    def load() -> list[dict[str, Any]]:
        records = load_coco_json(str(folder / "toy.json"), str(folder), NAME)
        for record in records:
            record["sem_seg_file_name"] = record["file_name"].replace(".png", "_labels.png")
        return records

    DatasetCatalog.register(NAME, load)
    stuff = ["things", "sky", "road", "wall"]
    MetadataCatalog.get(NAME).set(
        json_file=str(folder / "toy.json"), stuff_classes=stuff, ignore_label=255
    )
    MetadataCatalog.get(NAME).set(stuff_colors=[[9 * i, 0, 0] for i in range(4)])
    load()
    yield NAME
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def tiny_config(zoo_name: str, *, output: Path) -> CfgNode:
    cfg = model_zoo.get_config(zoo_name)
    cfg.merge_from_list([item for pair in TINY.items() for item in pair])
    cfg.OUTPUT_DIR = str(output)
    return cfg


def trained(zoo_name: str, *, output: Path, workers: int = 0) -> Trainer:
    """Train one step, write a checkpoint, evaluate; return the trainer."""
    cfg = tiny_config(zoo_name, output=output)
    cfg.DATALOADER.NUM_WORKERS = workers
    trainer = Trainer(cfg)
    trainer.train()
    losses = {k: v for k, v in trainer.storage.histories().items() if k.startswith("loss")}
    assert all(np.isfinite(history.latest()) for history in losses.values())
    return trainer


@pytest.mark.parametrize(
    ("zoo_name", "losses", "results"),
    [
        (
            "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
            {"loss_mask", "loss_cls_stage0", "loss_cls_stage2"},
            {"bbox", "segm"},
        ),
        (
            "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
            {"loss_mask", "loss_sem_seg"},
            {"bbox", "segm", "sem_seg"},
        ),
    ],
)
def test_a_zoo_model_trains_and_evaluates(
    toy: str, tmp_path: Path, zoo_name: str, losses: set[str], results: set[str]
) -> None:
    trainer = trained(zoo_name, output=tmp_path)
    assert losses <= set(trainer.storage.histories())
    assert set(trainer._last_eval_results) == results


def test_mask_rcnn_trains_with_workers_and_resumes(toy: str, tmp_path: Path) -> None:
    zoo_name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
    trainer = trained(zoo_name, output=tmp_path, workers=1)
    assert "loss_mask" in trainer.storage.histories()
    assert list(tmp_path.glob("events.out.tfevents.*"))

    resumed = Trainer(trainer.cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 1
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_the_predictor_gives_a_panoptic_map(toy: str, tmp_path: Path) -> None:
    cfg = tiny_config("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", output=tmp_path)
    predicted = DefaultPredictor(cfg)(np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    assert predicted["panoptic_seg"][0].shape == (HEIGHT, WIDTH)
    assert predicted["sem_seg"].shape == (4, HEIGHT, WIDTH)


@pytest.mark.parametrize("mode", list(ColorMode))
def test_predictions_are_drawn(toy: str, mode: ColorMode) -> None:
    image = np.full((HEIGHT, WIDTH, 3), 120, np.uint8)
    masks = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
    masks[:, 5:40, 5:40] = True
    masks[:, 15:25, 15:25] = False  # a hole
    instances = Instances((HEIGHT, WIDTH), pred_masks=masks, scores=torch.tensor([0.9]))
    instances.pred_boxes = Boxes(torch.tensor([[5.0, 5.0, 40.0, 40.0]]))
    instances.pred_classes = torch.tensor([1])
    metadata = MetadataCatalog.get(toy)
    drawn = Visualizer(image, metadata, instance_mode=mode).draw_instance_predictions(instances)
    assert drawn.get_image().shape == image.shape
    assert (drawn.get_image() != image).any()

    segments = masks[0].to(torch.int32) + 2 * torch.eye(HEIGHT, WIDTH, dtype=torch.int32)
    segments.clamp_(max=2)
    info = [
        {"id": 1, "category_id": 0, "isthing": True, "score": 0.9},
        {"id": 2, "category_id": 1, "isthing": False},
    ]
    panoptic = Visualizer(image, metadata, instance_mode=mode)
    drawn = panoptic.draw_panoptic_seg_predictions(segments, info)
    assert (drawn.get_image() != image).any()


@pytest.mark.parametrize(
    "augmentation",
    [
        T.ResizeShortestEdge(40, 80),
        T.RandomRotation([-30, 30]),
        T.RandomCrop("relative_range", (0.5, 0.5)),
        T.RandomCrop_CategoryAreaConstraint("absolute", (20, 20)),
        T.RandomExtent((0.5, 1.5), (0.2, 0.2)),
        T.RandomFlip(prob=1.0),
    ],
    ids=lambda augmentation: type(augmentation).__name__,
)
def test_geometry_keeps_image_and_labels_together(augmentation: T.Augmentation) -> None:
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[:, WIDTH // 2 :] = 200
    labels = (image[:, :, 0] > 0).astype(np.uint8)
    inputs = T.AugInput(image, boxes=np.array([[3.0, 4.0, 30.0, 40.0]]), sem_seg=labels)
    augmentation(inputs)
    assert inputs.image.shape[:2] == inputs.sem_seg.shape
    assert inputs.boxes.shape == (1, 4)
    agree = (inputs.image[:, :, 0] > 100) == (inputs.sem_seg > 0)
    assert agree.mean() > 0.95
