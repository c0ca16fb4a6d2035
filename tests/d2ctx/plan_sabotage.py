"""Good runs made bad, and what `python -m d2ctx.plan` must say of each."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .launch import Launch, write_launch
from .tiny import CONFIGS
from .toy_panoptic import ToyPanoptic, write_panoptic


@dataclass
class Runway:
    """A good run.

    Attributes:
        folder: Holds all of it.
        config: The YAML file.
        launch: Of detection; None of panoptic segmentation.
        panoptic: Training set and test set of panoptic segmentation.
    """

    folder: Path
    config: Path
    launch: Launch | None = None
    panoptic: tuple[ToyPanoptic, ...] = ()


def detection(folder: Path) -> Runway:
    launch = write_launch(folder)
    return Runway(folder, launch.config, launch=launch)


def panoptic(folder: Path) -> Runway:
    sets = tuple(write_panoptic(folder / name, f"toy_{name}") for name in ("train", "val"))
    config = {
        "_BASE_": str(CONFIGS / "panoptic" / "panoptic_fpn_a2fpn_lite_instant.yaml"),
        "MODEL": {
            "RPN": {"POST_NMS_TOPK_TRAIN": 20, "POST_NMS_TOPK_TEST": 20},
            "ROI_HEADS": {"NUM_CLASSES": 2, "BATCH_SIZE_PER_IMAGE": 16},
            "SEM_SEG_HEAD": {"NUM_CLASSES": 3},
        },
        "INPUT": {"MIN_SIZE_TRAIN": [64], "MIN_SIZE_TEST": 64},
        "DATASETS": {
            "COCO_PANOPTIC": {toy.name: toy.entry() for toy in sets},
            "TRAIN": [sets[0].name],
            "TEST": [sets[1].name],
        },
        "DATALOADER": {"NUM_WORKERS": 0},
        "OUTPUT_DIR": str(folder / "run"),
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(config))
    return Runway(folder, path, panoptic=sets)


@dataclass
class Sabotage:
    """What is done to a good run, and what must come of it.

    Attributes:
        reasons: (step, part of its problem), all of them in order.
        opts: KEY VALUE pairs; FOLDER stands for the run's.
        harm: Changes files.
        make: The good run.
        tried: Whether training could be tried.
        slow: Whether another one is much the same.
    """

    reasons: tuple[tuple[str, str], ...]
    opts: tuple[str, ...] = ()
    harm: Callable[[Runway], object] | None = None
    make: Callable[[Path], Runway] = detection
    tried: bool = False
    slow: bool = False


# ---- files -----------------------------------------------------------------------------------
def no_image(runway):
    toy = runway.launch.train
    (toy.image_root / toy.images[0]["file_name"]).unlink()


def half_an_image(runway):
    toy = runway.launch.val
    path = toy.image_root / toy.images[1]["file_name"]
    path.write_bytes(path.read_bytes()[:300])


def odd_polygon(runway):
    runway.launch.train.annotations[1]["segmentation"] = [[4, 4, 20, 4, 20]]
    runway.launch.train.save()


def unlisted_category(runway):
    runway.launch.train.annotations[0]["category_id"] = 9
    runway.launch.train.save()


def other_categories(runway):
    runway.launch.val.content["categories"][1]["name"] = "ball"
    runway.launch.val.save()


def empty_test_set(runway):
    runway.launch.val.content |= {"images": [], "annotations": []}
    runway.launch.val.save()


def no_area(runway):
    del runway.launch.val.annotations[0]["area"]
    runway.launch.val.save()


def broken_json(runway):
    path = runway.launch.val.json_file
    path.write_text(path.read_text()[:-20])


def noise(runway):
    (runway.folder / "w.pth").write_bytes(b"no weights " * 50)


def other_weights(runway):
    torch.save({f"layer{i}.weight": torch.zeros(2) for i in range(9)}, runway.folder / "w.pth")


class Code:
    def __reduce__(self):
        return print, ("code ran",)


def code(runway):
    torch.save({"model": Code()}, runway.folder / "w.pth")


def no_segments(runway):
    for annotation in runway.panoptic[1].content["annotations"]:
        del annotation["segments_info"]
    runway.panoptic[1].save()


def no_png(runway):
    runway.panoptic[0].png(1).unlink()


WEIGHTS = ("MODEL.WEIGHTS", "FOLDER/w.pth")
CROP = ("INPUT.CROP.ENABLED", "True", "INPUT.CROP.SIZE", "[1.5,1.5]")
SABOTAGES = {
    "unknown key": Sabotage(
        (("configuration", "unknown key SOLVER.MAX_ITR; did you mean SOLVER.MAX_ITER?"),),
        ("SOLVER.MAX_ITR", "3"),
    ),
    "number of classes": Sabotage(
        (("checks", "MODEL.ROI_HEADS.NUM_CLASSES is 80, but toy_train has 3 classes"),),
        ("MODEL.ROI_HEADS.NUM_CLASSES", "80"),
    ),
    "image missing": Sabotage((("checks", "1 of 4 image files absent below"),), harm=no_image),
    "image truncated": Sabotage((("checks", "cannot be decoded (toy_val_2"),), harm=half_an_image),
    "image truncated, check off": Sabotage(
        (("checks", "cannot be decoded (toy_val_2"),), ("DATASETS.CHECK", "off"), half_an_image
    ),
    "broken annotation": Sabotage(
        (("checks", "have a polygon with an odd count of numbers"),), harm=odd_polygon
    ),
    "category that is not listed": Sabotage(
        (("checks", "have a category that the file does not list (id 1); add the category"),),
        harm=unlisted_category,
    ),
    "other categories in the test set": Sabotage(
        (("checks", "list different categories: 'square' against 'ball'"),), harm=other_categories
    ),
    "test set empty": Sabotage((("checks", "lists no image; correct"),), harm=empty_test_set),
    "annotations that cannot be scored": Sabotage(
        (("checks", "have no area or iscrowd, which the evaluation needs (id 1); write both"),),
        harm=no_area,
    ),
    "broken json": Sabotage((("checks", "is no valid json"),), harm=broken_json),
    "evaluator without metadata": Sabotage(
        (
            ("checks", "asks for evaluator 'lvis'"),
            ("checks", "lvis_v0.5_val: json_file"),
            ("checks", "lvis_v0.5_val: image_root"),
        ),
        ("DATASETS.TEST", "('lvis_v0.5_val',)"),
    ),
    "no such data set": Sabotage(
        (("checks", "DATASETS.TEST: no data set is called toy_vall; did you mean toy_val?"),),
        ("DATASETS.TEST", "('toy_vall',)"),
    ),
    "batch that cannot be shared": Sabotage(
        (("checks", "SOLVER.IMS_PER_BATCH must be a positive multiple of 3"),),
        ("SOLVER.REFERENCE_WORLD_SIZE", "3"),
    ),
    "no such device": Sabotage(
        (("checks", "no CUDA device is available here; add MODEL.DEVICE cpu"),),
        ("MODEL.DEVICE", "cuda"),
    ),
    "mixed precision on a CPU": Sabotage(
        (("checks", "set SOLVER.AMP.ENABLED False"),), ("SOLVER.AMP.ENABLED", "True")
    ),
    "output below a file": Sabotage(
        (("checks", "run.yaml is a file; set OUTPUT_DIR to a folder"),),
        ("OUTPUT_DIR", "FOLDER/run.yaml/run"),
    ),
    "no weights": Sabotage((("checks", "MODEL.WEIGHTS FOLDER/w.pth does not exist"),), WEIGHTS),
    "two at once": Sabotage(
        (("checks", "set SOLVER.AMP.ENABLED False"), ("weights", "is no readable weight file")),
        ("SOLVER.AMP.ENABLED", "True", *WEIGHTS),
        noise,
    ),
    "unreadable weights": Sabotage(
        (("weights", "is no readable weight file"),), WEIGHTS, noise, tried=True
    ),
    "weights of another architecture": Sabotage(
        (("weights", "w.pth does not fit the model: 0% of its tensors have a place"),),
        WEIGHTS,
        other_weights,
        tried=True,
        slow=True,
    ),
    "weights with code": Sabotage(
        (("weights", "names print, which could run code"),), WEIGHTS, code, tried=True, slow=True
    ),
    "anchors for fewer levels": Sabotage(
        (("model", "SIZES has 2 lists, but MODEL.RPN.IN_FEATURES names 5 maps"),),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[12],[24]]"),
    ),
    "no such level": Sabotage(
        (("model", "MODEL.RPN.IN_FEATURES names ['p7'], but"),),
        ("MODEL.RPN.IN_FEATURES", "['p7']"),
    ),
    "unknown lateral": Sabotage(
        (("model", "MODEL.A2FPN: lateral"),), ("MODEL.A2FPN.LATERAL", "mcg")
    ),
    "learning rate": Sabotage(
        (("training", "a loss or gradient of update 2 is not finite; lower SOLVER.BASE_LR"),),
        ("SOLVER.BASE_LR", "1e30", "SOLVER.OPTIMIZER", "SGD"),
        tried=True,
    ),
    "crop larger than the image": Sabotage(
        (("training", "the crop is larger than the image; set INPUT.CROP.SIZE"),),
        (*CROP, "DATALOADER.NUM_WORKERS", "0"),
        tried=True,
    ),
    "crop larger than the image, in a worker": Sabotage(
        (("training", "the crop is larger than the image; set INPUT.CROP.SIZE"),),
        (*CROP, "DATALOADER.NUM_WORKERS", "1"),
        tried=True,
        slow=True,
    ),
    "panoptic json without segments": Sabotage(
        (("checks", "segments_info"),), harm=no_segments, make=panoptic
    ),
    "panoptic PNG missing": Sabotage((("checks", "toy_train: "),), harm=no_png, make=panoptic),
    "number of stuff classes": Sabotage(
        (("checks", "MODEL.SEM_SEG_HEAD.NUM_CLASSES is 54, but toy_train has 2 stuff classes"),),
        ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "54"),
        make=panoptic,
    ),
}
