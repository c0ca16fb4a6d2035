"""The benchmark of whole detectors: its systems exist, its rows compare, a step is a step."""

from itertools import pairwise

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import pairwise_iou
from detectron2.utils.events import EventStorage

from benchmarks import models
from benchmarks.measure import Setting
from tests.d2ctx.toy_coco import restored_catalogs

TINY = models.Form(config="a2fpn/mask_rcnn_a2fpn_instant.yaml")


@pytest.fixture(autouse=True)
def _catalogs():
    with restored_catalogs():
        yield


def test_every_system_has_a_resnet_50_and_the_same_region_count():
    loaded = [form.load("cpu", regions=40) for form in models.FORMS.values()]
    assert {cfg.MODEL.RESNETS.DEPTH for cfg in loaded} == {50}
    assert {cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE for cfg in loaded} == {40}
    assert {cfg.MODEL.WEIGHTS for cfg in loaded} == {""}
    assert len({str(cfg.MODEL) for cfg in loaded}) == len(loaded)


def test_half_of_the_proposals_are_near_objects():
    image = models.training_image(200, 320, device="cpu")
    proposals = models.proposals_of(image, count=50)
    overlap = pairwise_iou(image["instances"].gt_boxes, proposals.proposal_boxes)
    best = overlap.max(dim=0).values
    assert len(proposals) == 100
    assert (best[:50] > 0.5).all()
    assert (best[50:] > 0.5).float().mean() < 0.5
    assert proposals.proposal_boxes.nonempty().all()


def test_measuring_gives_times_memory_and_the_regions():
    setting = Setting(device="cpu", seconds=0, threads=1)
    result = models.measure(TINY, 64, 96, setting)
    assert len(result["seconds"]) == models.MIN_ROUNDS
    assert min(result["seconds"]) > 0 <= result["memory"]
    counts = result["regions"]
    assert counts["roi_head/num_fg_samples"] + counts["roi_head/num_bg_samples"] == 32


def test_steps_draw_the_same_regions_and_leave_no_gradient():
    image = models.training_image(64, 96, device="cpu")
    torch.manual_seed(0)
    model = build_model(TINY.load("cpu", regions=32)).train()
    proposals = models.proposals_of(image, count=32)
    model.proposal_generator.predict_proposals = lambda *_: [proposals]
    forward, backward = models.step_of(model, image)
    regions = []
    with EventStorage() as storage:
        for _ in range(2):
            forward()
            regions.append({k: v for k, (v, _) in storage.latest().items() if "num_" in k})
            backward()
    assert all(one == two for one, two in pairwise(regions))
    assert all(p.grad is None for p in model.parameters())


def result(milliseconds: float) -> dict:
    seconds = [milliseconds / 1e3] * 3
    return {"seconds": seconds, "memory": 10.0, "regions": {}}


def test_rows_compare_with_the_baseline_and_judge_the_time():
    sizes = {models.PARAMETERS: 44.0, models.MACS: 100.0, models.FEATURE_MACS: 60.0}
    results = {
        models.BASELINE: models.pooled([result(100), result(100)]) | sizes,
        "Mask R-CNN, A²-FPN": models.pooled([result(140)]) | sizes | {models.PARAMETERS: 66.0},
        "Mask R-CNN, FPN, SR-ResNet": models.pooled([result(104)]) | sizes,
        "Mask R-CNN, FPT": models.pooled([result(1), {"failed": "out of memory"}]) | sizes,
    }
    rows = {(row.name, row.metric): row for n in results for row in models.rows_of(n, results)}
    time = rows["Mask R-CNN, A²-FPN", models.TIME]
    assert (round(time.ratio, 6), time.target, time.met) == (1.4, "ratio <= 1.5", True)
    assert rows["Mask R-CNN, A²-FPN", models.PARAMETERS].ratio == 1.5
    assert rows["Mask R-CNN, FPN, SR-ResNet", models.TIME].met is False
    failed = rows["Mask R-CNN, FPT", models.TIME]
    assert (failed.value, failed.note) == (None, "out of memory")
    assert rows["Mask R-CNN, FPT", models.MACS].value == 100
    assert rows[models.BASELINE, models.TIME].baseline == ""
