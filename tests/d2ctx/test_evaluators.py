"""Evaluators chosen by a data set's metadata."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from d2ctx import UserError, build_evaluator, evaluators

from .toy_coco import toy_config, write_toy

pytestmark = pytest.mark.usefixtures("isolated")


@pytest.fixture
def cfg(tmp_path):
    toy = write_toy(tmp_path / "data", "toy_val", images=4)
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


def evaluate(cfg) -> dict:
    """Results of perfect detections on every image."""
    records = DatasetCatalog.get("toy_val")
    evaluator = build_evaluator(cfg, "toy_val")
    evaluator.reset()
    evaluator.process(records, [{"instances": perfect(record)} for record in records])
    return evaluator.evaluate()


def test_coco_gives_perfect_detections_full_marks(cfg):
    results = evaluate(cfg)
    assert [results[task]["AP"] for task in ("bbox", "segm")] == pytest.approx([100, 100])


def test_detections_are_kept_below_the_output_folder_with_the_data_sets_ids(cfg, tmp_path):
    evaluate(cfg)
    path = tmp_path / "run" / "inference" / "toy_val" / "coco_instances_results.json"
    detections = json.loads(path.read_text())
    assert [(d["image_id"], d["category_id"]) for d in detections] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 1),
    ]
    np.testing.assert_allclose(detections[0]["bbox"], [4, 4, 16, 16])


def test_the_evaluation_without_compiled_code_is_asked_for(cfg, monkeypatch):
    # A Detectron2 without its extension ignores the flag, one with it does not.
    asked = {}
    monkeypatch.setattr(evaluators, "COCOEvaluator", lambda _, **keys: asked.update(keys))
    build_evaluator(cfg, "toy_val")
    assert asked["use_fast_impl"] is False


@pytest.mark.parametrize("kind", ["lvis", None])
def test_an_evaluator_that_we_lack_is_named_with_the_fix(cfg, kind):
    DatasetCatalog.register("other", list)
    if kind:
        MetadataCatalog.get("other").evaluator_type = kind
    with pytest.raises(UserError) as caught:
        build_evaluator(cfg, "other")
    assert str(caught.value) == (
        f"data set 'other' asks for evaluator {kind!r}; known: ['coco']; "
        "register it under DATASETS.COCO_FORMAT, or take it out of DATASETS.TEST"
    )
