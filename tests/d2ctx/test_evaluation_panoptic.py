"""The panoptic evaluator: what it writes while it runs, and that its numbers are official ones."""

import contextlib
import io
import json

import cityscapesscripts.evaluation.evalPanopticSemanticLabeling as official  # noqa: N813
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

from d2ctx import UserError, build_evaluator
from d2ctx.evaluation.panoptic import PanopticEvaluator, png_name
from d2ctx.evaluation.panoptic_files import read_ids, read_json
from tests.shared_data import SHARED

from .toy_panoptic import IDS, panoptic_config, panoptic_ids, write_panoptic

pytestmark = pytest.mark.usefixtures("isolated")
SAMPLES = SHARED / "data" / "panoptic" / "coco_samples"
needs_data = pytest.mark.skipif(not SAMPLES.is_dir(), reason="these data are not shipped")


@pytest.fixture
def toy(tmp_path):
    toy = write_panoptic(tmp_path / "data", images=3)
    cfg = panoptic_config(
        train=[], test=[toy.name], output=tmp_path / "run", COCO_PANOPTIC={toy.name: toy.entry()}
    )
    DatasetCatalog.get(toy.name)
    toy.cfg = cfg
    toy.folder = tmp_path / "run" / "inference" / toy.name
    return toy


SEGMENTS = [
    {"id": IDS[4], "isthing": False, "category_id": 1},
    {"id": IDS[9], "isthing": False, "category_id": 2},
    {"id": IDS[12], "isthing": True, "category_id": 1, "score": 0.9, "instance_id": 0},
]


def perfect() -> tuple[torch.Tensor, list[dict]]:
    """What a model without error says; the crowd is nothing that it must find."""
    ids = np.where(panoptic_ids() == IDS[7], 0, panoptic_ids())
    return torch.from_numpy(ids.astype(np.int32)), [dict(s) for s in SEGMENTS]


def process(toy, evaluator, change=lambda number, output: output):
    evaluator.reset()
    for number in (1, 2, 3):
        evaluator.process([{"image_id": number}], [{"panoptic_seg": change(number, perfect())}])
    return evaluator


def evaluator_of(toy) -> PanopticEvaluator:
    return PanopticEvaluator(toy.name, folder=toy.folder)


def test_perfect_predictions_have_full_quality(toy):
    results = process(toy, evaluator_of(toy)).evaluate()["panoptic_seg"]
    assert [results[k] for k in ("PQ", "SQ", "RQ", "PQ_th", "PQ_st", "PQ-star")] == [100.0] * 6
    assert np.isnan(results["PQ-disc"])  # a crowd only


def test_quality_drops_as_it_must(toy):
    def without_star(number, output):
        ids, segments = output
        if number == 1:
            ids[ids == IDS[12]] = 0
            segments = segments[:2]
        return ids, segments

    results = process(toy, evaluator_of(toy), without_star).evaluate()["panoptic_seg"]
    assert results["PQ_st"] == 100
    assert results["PQ_th"] == results["RQ_th"] == pytest.approx(100 * 2 / 2.5)
    assert results["SQ_th"] == 100


def test_files_are_cocos_and_hold_plain_numbers(toy):
    process(toy, evaluator_of(toy)).evaluate()
    content = read_json(toy.folder / "panoptic_predictions.json")
    annotation = content["annotations"][1]
    assert (annotation["image_id"], annotation["file_name"]) == (2, "000000000002.png")
    star = annotation["segments_info"][2]
    assert star == {"id": IDS[12], "category_id": 12, "area": 240}
    ids = read_ids(toy.folder / "panoptic_predictions" / annotation["file_name"])
    assert (ids == perfect()[0].numpy()).all()
    assert [c["id"] for c in content["categories"]] == [4, 7, 9, 12]


def test_each_image_is_on_disk_before_the_next(toy):
    evaluator = evaluator_of(toy)
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"panoptic_seg": perfect()}])
    folder = toy.folder / "panoptic_predictions"
    assert [path.name for path in folder.iterdir()] == ["000000000001.png"]
    assert not (toy.folder / "panoptic_predictions.json").exists()


def test_resetting_takes_earlier_predictions_away(toy):
    evaluator = process(toy, evaluator_of(toy))
    evaluator.evaluate()
    evaluator.reset()
    assert list(toy.folder.rglob("*.*")) == []
    assert evaluator.annotations == []


def test_segments_without_pixels_are_not_written(toy):
    extra = {"id": 99, "isthing": True, "category_id": 0}
    evaluator = process(toy, evaluator_of(toy), lambda _, out: (out[0], [*out[1], extra]))
    assert evaluator.evaluate()["panoptic_seg"]["PQ"] == 100


def test_predictions_of_all_processes_count(toy, monkeypatch):
    first, second = process(toy, evaluator_of(toy)).annotations[:1], []
    evaluator = process(toy, evaluator_of(toy))
    second = evaluator.annotations[1:]
    evaluator.annotations = first
    monkeypatch.setattr(comm, "gather", lambda mine: [mine, second])
    assert evaluator.evaluate()["panoptic_seg"]["PQ"] == 100


def test_other_processes_return_nothing(toy, monkeypatch):
    evaluator = process(toy, evaluator_of(toy))
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert evaluator.evaluate() == {}


def test_a_missing_image_or_file_is_named(toy):
    evaluator = process(toy, evaluator_of(toy))
    (toy.folder / "panoptic_predictions" / "000000000003.png").unlink()
    with pytest.raises(UserError, match="1 of 3 predictions are not in .*all machines share"):
        evaluator.evaluate()
    evaluator = process(toy, evaluator_of(toy))
    evaluator.annotations.pop()
    with pytest.raises(UserError, match=r"1 image of 3 have no prediction \(3\)"):
        evaluator.evaluate()


def test_a_segment_that_the_model_does_not_list_is_named(toy):
    evaluator = process(toy, evaluator_of(toy), lambda _, out: (out[0], out[1][1:]))
    with pytest.raises(
        UserError, match=r"image 1 \(000000000001.png\), prediction: .* segment 300"
    ):
        evaluator.evaluate()


def test_the_report_explains_averages_that_do_not_exist(toy):
    for annotation in toy.content["annotations"]:
        for segment in annotation["segments_info"]:
            segment["iscrowd"] = int(segment["category_id"] in (7, 12))
    toy.save()
    evaluator = build_evaluator(toy.cfg, toy.name)
    evaluator.reset()

    def nothing(number):
        instances = Instances((32, 48))
        instances.pred_boxes, instances.scores = Boxes(torch.zeros(0, 4)), torch.zeros(0)
        instances.pred_classes, instances.pred_masks = torch.zeros(0).long(), torch.zeros(0, 32, 48)
        return {"panoptic_seg": perfect(), "instances": instances}

    for number in (1, 2, 3):
        evaluator.process([{"image_id": number}], [nothing(number)])
    evaluator.evaluate()
    task = read_json(toy.folder / "results.json")["tasks"]["panoptic_seg"]
    assert task["notes"] == [
        "no things in the ground truth or the predictions: their averages do not exist"
    ]
    assert task["values"]["PQ_th"] is None
    assert task["per_class"]["sky"] == {
        **{"PQ": 100.0, "SQ": 100.0, "RQ": 100.0},
        **{"TP": 3, "FP": 0, "FN": 0},
    }
    assert task["evaluator"] == "d2ctx"


@needs_data
def test_real_predictions_get_the_official_number_from_the_files(tmp_path):
    root = SAMPLES / "annotations"
    entry = {"JSON": root / "panoptic_val.json", "PNGS": root / "panoptic_val", "IMAGES": SAMPLES}
    entry = {key: str(path) for key, path in entry.items()} | {"IMAGES": str(SAMPLES / "images")}
    panoptic_config(train=[], test=["coco"], output=tmp_path, COCO_PANOPTIC={"coco": entry})
    meta = MetadataCatalog.get("coco")
    truth = read_json(root / "panoptic_val.json")
    evaluator = PanopticEvaluator("coco", folder=tmp_path)
    evaluator.reset()
    for annotation in truth["annotations"]:  # the truth, moved by eight pixels
        ids = np.roll(read_ids(root / "panoptic_val" / annotation["file_name"]), 8, axis=1)
        thing, stuff = (
            meta.thing_dataset_id_to_contiguous_id,
            meta.stuff_dataset_id_to_contiguous_id,
        )
        segments = [
            {
                "id": s["id"],
                "isthing": s["category_id"] in thing,
                "category_id": {**thing, **stuff}[s["category_id"]],
            }
            for s in annotation["segments_info"]
        ]
        output = {"panoptic_seg": (torch.from_numpy(ids), segments)}
        evaluator.process([{"image_id": annotation["image_id"]}], [output])
    mine = evaluator.evaluate()["panoptic_seg"]
    predictions = tmp_path / "panoptic_predictions"
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = official.evaluatePanoptic(
            root / "panoptic_val.json",
            root / "panoptic_val",
            predictions.with_suffix(".json"),
            predictions,
            tmp_path / "official.json",
        )
    assert 10 < mine["PQ"] < 95
    for kind, suffix in {"All": "", "Things": "_th", "Stuff": "_st"}.items():
        for key in ("pq", "sq", "rq"):
            expected = 100 * theirs[kind][key]
            assert mine[f"{key.upper()}{suffix}"] == pytest.approx(expected, abs=1e-10)


def test_names_of_pngs_stay_in_their_folder():
    assert png_name(7) == "000000000007.png"
    assert png_name("../a b") == "..%2Fa%20b.png"
    assert json.dumps(png_name("aachen_000000_000019")) == '"aachen_000000_000019.png"'
