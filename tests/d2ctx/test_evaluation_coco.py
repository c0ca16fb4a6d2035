"""COCO's average precision: two implementations, one number; the evaluator and its files."""

import json
import logging
import sys

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools import mask as coco_mask

from d2ctx import UserError, build_evaluator
from d2ctx.evaluation.coco_scores import (
    STATISTICS,
    average_precision,
    class_names,
    coco_api,
    pycocotools_api,
)
from tests.shared_data import SHARED

from .toy_coco import toy_config, write_toy

pytestmark = pytest.mark.usefixtures("isolated")
DATA = SHARED / "data" / "instances"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="these data are not shipped")


# ---- two implementations ---------------------------------------------------------------------
def moved_truth(truth: dict, seed: int) -> list[dict]:
    """Detections: most objects, somewhat moved, some of another class, with random scores."""
    generator = np.random.default_rng(seed)
    images = {image["id"]: image for image in truth["images"]}
    ids = [category["id"] for category in truth["categories"]]
    detections = []
    for annotation in truth["annotations"]:
        image = images[annotation["image_id"]]
        size = image["height"], image["width"]
        mask = annotation["segmentation"]
        rle = coco_mask.frPyObjects(mask, *size)
        mask = coco_mask.decode(coco_mask.merge(rle) if isinstance(rle, list) else rle)
        for _ in range(generator.integers(0, 4)):
            shift = generator.normal(0, 3, 2).round().astype(int)
            moved = np.asfortranarray(np.roll(mask, shift, (0, 1)))
            if not moved.any():
                continue
            encoded = coco_mask.encode(moved)
            category = annotation["category_id"]
            detections.append(
                {
                    "image_id": image["id"],
                    "category_id": category if generator.random() < 0.9 else generator.choice(ids),
                    "bbox": coco_mask.toBbox(encoded).tolist(),
                    # Coarse scores: equal ones must be ordered alike.
                    "score": float(generator.integers(1, 21) / 20),
                    "segmentation": {**encoded, "counts": encoded["counts"].decode()},
                }
            )
    return detections


@needs_data
@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize(
    "name", ["coco/annotations/instances_val", "fruits_nuts/annotations/instances_val"]
)
def test_both_implementations_agree_on_real_data_with_crowds(name, task):
    truth = json.loads((DATA / f"{name}.json").read_text())
    assert any(a["iscrowd"] for a in truth["annotations"]) == name.startswith("coco")
    detections = moved_truth(truth, seed=0)
    fast, slow = coco_api(), pycocotools_api()
    assert (fast.package, slow.package) == ("faster-coco-eval", "pycocotools")
    mine = average_precision(truth, detections, task=task, api=fast)
    theirs = average_precision(truth, detections, task=task, api=slow)
    assert 5 < theirs.statistics["AP"] < 95
    np.testing.assert_allclose(
        [mine.statistics[s] for s in STATISTICS], [theirs.statistics[s] for s in STATISTICS], 1e-12
    )
    assert list(mine.per_class) == list(theirs.per_class)
    for mine_of, theirs_of in zip(mine.per_class.values(), theirs.per_class.values(), strict=True):
        np.testing.assert_allclose(list(mine_of.values()), list(theirs_of.values()), 1e-12)


def two_classes() -> tuple[dict, dict]:
    """Truth with one object of the first class only, and a perfect detection of it."""
    square = {"image_id": 1, "category_id": 3, "bbox": [0, 0, 8, 8]}
    truth = {
        "images": [{"id": 1, "width": 32, "height": 32, "file_name": "a.png"}],
        "annotations": [{**square, "id": 1, "area": 64, "iscrowd": 0}],
        "categories": [{"id": 5, "name": "b"}, {"id": 3, "name": "a"}],
    }
    return truth, {**square, "score": 0.5}


def test_a_class_without_truth_is_not_a_number_and_no_detection_is_zero():
    truth, detection = two_classes()
    scores = average_precision(truth, [detection], task="bbox")
    assert scores.per_class["a"] == {"AP": 100, "AP50": 100, "AR100": 100}
    assert all(np.isnan(list(scores.per_class["b"].values())))
    assert list(scores.per_class) == ["a", "b"]
    assert average_precision(truth, [], task="bbox").statistics["AP"] == 0
    assert average_precision(truth, [], task="bbox", api=pycocotools_api()).statistics["AP"] == 0


def test_images_may_have_names_for_ids_and_nothing_that_was_given_changes():
    truth, detection = two_classes()
    truth["images"].append({**truth["images"][0], "id": "two"})
    truth["images"][0]["id"] = truth["annotations"][0]["image_id"] = "one"
    detection["image_id"] = "one"
    before = json.dumps([truth, detection])
    assert average_precision(truth, [detection], task="bbox").statistics["AP"] == 100
    detection["image_id"] = "two"
    assert average_precision(truth, [detection], task="bbox").statistics["AP"] == 0
    detection["image_id"] = "one"
    assert json.dumps([truth, detection]) == before


def test_mask_sizes_come_from_masks_not_from_boxes():
    # A diagonal line: its box is of medium size, its mask is small. An unmatched detection
    # counts as wrong only among objects of its own size.
    truth, _ = two_classes()
    truth["images"][0].update(width=64, height=64)
    line = coco_mask.encode(np.asfortranarray(np.eye(64, dtype=np.uint8)))
    block = np.zeros((64, 64), np.uint8, order="F")
    block[:40, :40] = 1
    mask = coco_mask.encode(block)
    truth["annotations"][0].update(segmentation=mask, area=1600, bbox=[0, 0, 40, 40])
    detections = [
        {
            "image_id": 1,
            "category_id": 3,
            "bbox": [0, 0, 64, 64],
            "score": 0.9,
            "segmentation": line,
        },
        {
            "image_id": 1,
            "category_id": 3,
            "bbox": [0, 0, 40, 40],
            "score": 0.5,
            "segmentation": mask,
        },
    ]
    assert average_precision(truth, detections, task="segm").statistics["APm"] == 100


def test_masks_are_compared_as_masks():
    truth, _ = two_classes()
    full = np.ones((32, 32), np.uint8, order="F")
    known = {"segmentation": coco_mask.encode(full), "area": 1024, "bbox": [0, 0, 32, 32]}
    truth["annotations"][0].update(known)
    line = coco_mask.encode(np.asfortranarray(np.eye(32, dtype=np.uint8)))
    found = {"image_id": 1, "category_id": 3, "bbox": [0, 0, 32, 32], "score": 1}
    found["segmentation"] = line  # the same box
    assert average_precision(truth, [found], task="bbox").statistics["AP"] == 100
    assert average_precision(truth, [found], task="segm").statistics["AP"] == 0


def test_without_the_fast_implementation_the_original_is_taken(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert coco_api().package == "pycocotools"


def test_classes_of_one_name_are_kept_apart():
    categories = [{"id": 2, "name": "a"}, {"id": 1, "name": "a"}, {"id": 0, "name": "b"}]
    assert class_names(categories) == ["b", "a (1)", "a (2)"]


# ---- the evaluator ---------------------------------------------------------------------------
@pytest.fixture
def toy(tmp_path):
    return write_toy(tmp_path / "data", "toy_val", images=4)


@pytest.fixture
def cfg(toy, tmp_path):
    return toy_config(train=[], test=[toy], output=tmp_path / "run")


def perfect(record: dict) -> Instances:
    """What a model without error would detect."""
    size = record["height"], record["width"]
    instances = Instances(size)
    (annotation,) = record["annotations"]
    x, y, width, height = map(int, annotation["bbox"])
    instances.pred_boxes = Boxes(torch.tensor([[x, y, x + width, y + height]]))
    instances.pred_classes = torch.tensor([annotation["category_id"]])
    instances.scores = torch.tensor([1.0])
    mask = torch.zeros(1, *size, dtype=torch.bool)
    mask[0, y : y + height, x : x + width] = True
    instances.pred_masks = mask
    return instances


def evaluate(cfg, detect=perfect) -> dict:
    """Results of detections on every image, perfect ones by default."""
    records = DatasetCatalog.get("toy_val")
    evaluator = build_evaluator(cfg, "toy_val")
    evaluator.reset()
    evaluator.process(records, [{"instances": detect(record)} for record in records])
    return evaluator.evaluate()


def written(cfg, name: str):
    with open(f"{cfg.OUTPUT_DIR}/inference/toy_val/{name}") as file:
        return json.load(file)


def test_perfect_detections_get_full_marks(cfg):
    results = evaluate(cfg)
    assert [results[task]["AP"] for task in ("bbox", "segm")] == pytest.approx([100, 100])
    assert results["segm"]["AP-star"] == pytest.approx(100)


def test_the_names_are_those_of_detectron2(cfg, tmp_path):
    theirs = COCOEvaluator("toy_val", output_dir=str(tmp_path / "d2"), use_fast_impl=False)
    records = DatasetCatalog.get("toy_val")
    theirs.reset()
    theirs.process(records, [{"instances": perfect(record)} for record in records])
    expected, found = theirs.evaluate(), evaluate(cfg)
    assert expected.keys() == found.keys()
    for task in found:
        assert dict(expected[task]) == pytest.approx(found[task], nan_ok=True)


def test_a_model_without_masks_is_scored_on_boxes_only(cfg):
    cfg.MODEL.MASK_ON = False
    assert evaluate(cfg).keys() == {"bbox"}


def test_nothing_detected_is_zero_and_says_so(cfg):
    assert evaluate(cfg, lambda record: perfect(record)[:0])["segm"]["AP"] == 0
    assert written(cfg, "coco_instances_results.json") == []
    assert written(cfg, "results.json")["tasks"]["segm"]["notes"] == ["the model detected nothing"]


def test_results_have_the_form_of_cocos_server(cfg, toy):
    for category in toy.content["categories"]:
        category["id"] *= 7
    for annotation in toy.annotations:
        annotation["category_id"] *= 7
    toy.save()
    assert evaluate(cfg)["bbox"]["AP"] == pytest.approx(100)
    detections = written(cfg, "coco_instances_results.json")
    assert [(d["image_id"], d["category_id"]) for d in detections] == [
        (1, 7),
        (2, 14),
        (3, 21),
        (4, 7),
    ]
    assert detections[0]["bbox"] == [4, 4, 16, 16]
    rle = detections[0]["segmentation"]
    assert coco_mask.area({**rle, "counts": rle["counts"].encode()}) == 256


def test_the_report_says_what_was_measured_with_what(cfg, caplog):
    caplog.set_level(logging.INFO)
    evaluate(cfg)
    report = written(cfg, "results.json")
    assert (report["dataset"], report["split"]) == ("toy_val", None)
    task = report["tasks"]["segm"]
    assert (task["evaluator"], task["version"]) == (coco_api().package, coco_api().version)
    assert (task["images"], task["classes"]) == (4, ["disc", "square", "star"])
    assert task["per_class"]["disc"] == pytest.approx({"AP": 100, "AP50": 100, "AR100": 100})
    assert task["values"]["APl"] is None  # no large object: null, not NaN
    assert "| star    | 100.000 |" in caplog.text


def test_a_set_without_annotations_is_written_and_not_scored(cfg, toy, caplog):
    caplog.set_level(logging.INFO)
    DatasetCatalog.get("toy_val")
    detect = {r["image_id"]: perfect(r) for r in DatasetCatalog.get("toy_val")}
    del toy.content["annotations"]
    toy.save()
    assert evaluate(cfg, lambda record: detect[record["image_id"]]) == {}
    assert len(written(cfg, "coco_instances_results.json")) == 4
    assert "No annotations: results are in" in caplog.text


def test_resetting_forgets(cfg):
    records = DatasetCatalog.get("toy_val")
    evaluator = build_evaluator(cfg, "toy_val")
    for _ in range(2):
        evaluator.reset()
        evaluator.process(records, [{"instances": perfect(record)} for record in records])
        evaluator.evaluate()
    assert len(written(cfg, "coco_instances_results.json")) == 4


def test_keypoints_and_proposals_are_left_to_detectron2(cfg):
    cfg.MODEL.META_ARCHITECTURE = "ContextProposalNetwork"
    assert isinstance(build_evaluator(cfg, "toy_val"), COCOEvaluator)


@pytest.mark.parametrize("kind", ["lvis", None])
def test_an_evaluator_that_we_lack_is_named_with_the_fix(cfg, kind):
    DatasetCatalog.register("other", list)
    if kind:
        MetadataCatalog.get("other").evaluator_type = kind
    with pytest.raises(UserError) as caught:
        build_evaluator(cfg, "other")
    assert str(caught.value).startswith(f"data set 'other' asks for evaluator {kind!r}; known: ['")
    assert str(caught.value).endswith(
        "COCO_PANOPTIC or CITYSCAPES, or take it out of DATASETS.TEST"
    )


def test_an_evaluator_of_data_that_were_not_loaded_says_so(cfg):
    evaluator = build_evaluator(cfg, "toy_val")
    with pytest.raises(UserError, match="'toy_val' was not loaded yet"):
        evaluator.process([], [])
