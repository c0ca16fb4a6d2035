"""Cityscapes: its own layout from YAML, its official evaluators, its submission files."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from d2ctx import UserError, build_evaluator
from d2ctx.cityscapes_data import cityscapes_definition, parse_cityscapes
from d2ctx.evaluation import cityscapes_official
from d2ctx.evaluation.panoptic_files import panoptic_quality, read_json, write_ids
from d2ctx.preflight import check_run
from d2ctx.train_net import run
from tests.shared_data import SHARED

from .toy_coco import refusal
from .toy_panoptic import HEIGHT, panoptic_config, write_cityscapes

pytestmark = pytest.mark.usefixtures("isolated")
SAMPLE = SHARED / "data" / "panoptic" / "cityscapes_sample"
needs_data = pytest.mark.skipif(not SAMPLE.is_dir(), reason="these data are not shipped")


def make_config(root: Path, tmp_path: Path, *, train=(), test=("city_val",), **entries):
    known = {"city_val": {"ROOT": str(root), "SPLIT": "val"}} | entries
    return panoptic_config(
        train=list(train),
        test=list(test),
        output=tmp_path / "run",
        things=8,
        stuff=11,
        CITYSCAPES=known,
    )


@pytest.fixture
def root(tmp_path):
    write_cityscapes(tmp_path / "cityscapes", images=2)
    return tmp_path / "cityscapes"


@pytest.fixture
def cfg(root, tmp_path):
    return make_config(root, tmp_path)


# ---- data ------------------------------------------------------------------------------------
def test_records_have_instances_and_stuff_maps(cfg):
    records = DatasetCatalog.get("city_val")
    assert [r["image_id"] for r in records] == ["toy_000000_000019", "toy_000001_000019"]
    found = [(a["category_id"], a["iscrowd"], a["bbox"]) for a in records[0]["annotations"]]
    # Cars that nobody told apart are one crowd.
    assert sorted(found) == [
        (0, 0, [4, 10, 10, 16]),
        (2, 0, [18, 10, 16, 16]),
        (2, 1, [36, 10, 10, 16]),
    ]
    labels = np.asarray(Image.open(records[0]["sem_seg_file_name"]))
    # Sky is the last of eleven stuff classes, road the first; column 0 is unlabelled.
    assert [labels[0, 5], labels[30, 5], labels[12, 5], labels[12, 40], labels[0, 0]] == [
        11,
        1,
        0,
        0,
        255,
    ]
    assert DatasetMapper(cfg, is_train=False)(records[0])["image"].shape[0] == 3


def test_classes_are_those_of_the_official_list(cfg):
    DatasetCatalog.get("city_val")
    meta = MetadataCatalog.get("city_val")
    assert meta.thing_classes[:3] == ["person", "rider", "car"]
    assert meta.stuff_classes[:3] == ["things", "road", "sidewalk"]
    assert list(meta.thing_dataset_id_to_contiguous_id) == [24, 25, 26, 27, 28, 31, 32, 33]


@needs_data
def test_the_real_frame_is_read_whole(tmp_path):
    make_config(SAMPLE, tmp_path)
    (record,) = DatasetCatalog.get("city_val")
    assert record["file_name"] == str(
        SAMPLE / "leftImg8bit/val/frankfurt/frankfurt_000000_000294_leftImg8bit.png"
    )
    classes = [a["category_id"] for a in record["annotations"] if not a["iscrowd"]]
    assert classes == [0] * 4 + [2] * 3
    # The sample's labelTrainIds were reduced on their own and differ in 77 pixels.
    truth = SAMPLE / "gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelIds.png"
    label_ids = np.asarray(Image.open(truth))
    expected = np.full_like(label_ids, 255)
    expected[np.isin(label_ids, [24, 25, 26, 27, 28, 31, 32, 33])] = 0
    for label, label_id in enumerate([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23], start=1):
        expected[label_ids == label_id] = label
    assert (np.asarray(Image.open(record["sem_seg_file_name"])) == expected).all()


def test_the_ground_truth_is_converted_once_and_again_when_it_changes(root, tmp_path, monkeypatch):
    make_config(root, tmp_path)
    made = []
    real = cityscapes_official.convert_panoptic
    monkeypatch.setattr(
        "d2ctx.cityscapes_data.convert_panoptic", lambda *a, **k: made.append(1) or real(*a, **k)
    )
    before = sorted(root.rglob("*"))
    assert len(DatasetCatalog.get("city_val")) == len(DatasetCatalog.get("city_val")) == 2
    assert len(made) == 1
    assert sorted(root.rglob("*")) == before
    write_cityscapes(root, images=3)
    assert len(DatasetCatalog.get("city_val")) == 3
    assert len(made) == 2
    folder = cityscapes_definition("city_val").folder
    assert not list(folder.parent.glob("*partial*"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("here", "mine must be a section such as"),
        ({"ROOT": "a"}, "mine must be a section such as"),
        ({"ROOT": 3, "SPLIT": "val"}, "mine.ROOT must be a path, got 3"),
        ({"ROOT": "a", "SPLIT": "vall"}, "mine.SPLIT is 'vall'; did you mean val?"),
    ],
)
def test_wrong_definitions_say_what_to_write(entry, message):
    with pytest.raises(UserError) as caught:
        parse_cityscapes("mine", entry)
    assert str(caught.value).startswith(f"DATASETS.CITYSCAPES.{message}")


def test_missing_folders_and_files_are_told_before_a_run(root, tmp_path):
    cfg = make_config(
        root, tmp_path, train=["no_train"], no_train={"ROOT": str(tmp_path), "SPLIT": "train"}
    )
    assert "correct DATASETS.CITYSCAPES.no_train.ROOT" in refusal(cfg)
    (root / "leftImg8bit/val/toy/toy_000001_000019_leftImg8bit.png").unlink()
    cfg = make_config(root, tmp_path, train=["city_val"])
    assert "1 of 2 image files absent below" in refusal(cfg)  # converted when all were there
    (root / "gtFine/val/toy/toy_000000_000019_gtFine_instanceIds.png").touch()
    assert "1 image of 2 absent below" in refusal(cfg)
    for path in (root / "gtFine" / "val" / "toy").iterdir():
        path.unlink()
    assert "holds no <city>/*_gtFine_instanceIds.png; unpack gtFine_trainvaltest.zip" in refusal(
        cfg
    )


# ---- evaluation ------------------------------------------------------------------------------
def perfect(record: dict, truth_ids: np.ndarray, classes: list[int], labels: dict) -> dict:
    """What a model without error would predict; `labels` is segment id -> (thing, class)."""
    size = truth_ids.shape
    things = [a for a in record["annotations"] if not a["iscrowd"]]
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.zeros(len(things), 4))
    instances.pred_classes = torch.tensor([a["category_id"] for a in things])
    instances.scores = torch.linspace(0.9, 0.5, len(things))
    numbers = [i for i in sorted(labels) if labels[i][0]]
    instances.pred_masks = torch.stack([torch.from_numpy(truth_ids == i) for i in numbers])
    segments = [{"id": n, "isthing": thing, "category_id": k} for n, (thing, k) in labels.items()]
    return {"instances": instances, "panoptic_seg": (torch.from_numpy(truth_ids), segments)}


# Of the toy frames: contiguous classes, stuff from 1.
TOY_LABELS = {7: (False, 1), 23: (False, 11), 24000: (True, 0), 26000: (True, 2)}


def evaluate(cfg, change=lambda output: output) -> dict:
    records = DatasetCatalog.get("city_val")
    evaluator = build_evaluator(cfg, "city_val")
    evaluator.reset()
    for record in records:
        path = cityscapes_definition("city_val").truths()[record["image_id"]]
        ids = np.asarray(Image.open(path)).astype(np.int32)
        ids = np.where(np.isin(ids, list(TOY_LABELS)), ids, 0).astype(np.int32)
        evaluator.process([record], [change(perfect(record, ids, [], TOY_LABELS))])
    return evaluator.evaluate()


def test_perfect_predictions_get_full_marks_from_the_official_code(cfg, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    results = evaluate(cfg)
    assert results["segm"]["AP"] == results["segm"]["AP50"] == pytest.approx(100)
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100)
    assert np.isnan(results["segm"]["AP-train"])
    assert np.isnan(results["panoptic_seg"]["PQ-train"])
    assert os.listdir() == []
    report = read_json(tmp_path / "run" / "inference" / "city_val" / "results.json")
    for task in ("segm", "panoptic_seg"):
        assert report["tasks"][task]["evaluator"] == "cityscapesscripts"
        assert report["tasks"][task]["version"] == cityscapes_official.version()
    assert (report["split"], report["tasks"]["segm"]["images"]) == ("val", 2)


def test_imperfect_predictions_lose_what_they_should(cfg):
    def without_person(output):
        output["instances"] = output["instances"][1:]
        ids, segments = output["panoptic_seg"]
        ids[ids == 24000] = 0
        output["panoptic_seg"] = ids, [s for s in segments if s["id"] != 24000]
        return output

    results = evaluate(cfg, without_person)
    assert results["segm"]["AP-person"] == 0
    assert results["segm"]["AP"] == pytest.approx(50)
    assert results["panoptic_seg"]["PQ_th"] == pytest.approx(50)
    assert results["panoptic_seg"]["PQ_st"] == pytest.approx(100)


def test_files_are_those_that_the_server_takes(cfg, tmp_path):
    evaluate(cfg)
    folder = tmp_path / "run" / "inference" / "city_val"
    instances = folder / "cityscapes_instances"
    (line, second) = (instances / "toy_000000_000019_pred.txt").read_text().splitlines()
    mask, label, score = line.split(" ")
    assert (mask, label, float(score)) == ("toy_000000_000019_0000.png", "24", pytest.approx(0.9))
    assert second.split(" ")[1] == "26"
    pixels = np.asarray(Image.open(instances / mask))
    assert (pixels.dtype, set(np.unique(pixels))) == (np.uint8, {0, 255})
    predicted = read_json(folder / "panoptic_predictions.json")
    assert {s["category_id"] for s in predicted["annotations"][0]["segments_info"]} == {
        7,
        23,
        24,
        26,
    }
    assert predicted["annotations"][0]["image_id"] == "toy_000000_000019"
    assert (folder / "panoptic_predictions" / predicted["annotations"][0]["file_name"]).is_file()


def test_an_image_without_instances_has_an_empty_file(cfg, tmp_path):
    def nothing(output):
        return {**output, "instances": output["instances"][:0]}

    assert evaluate(cfg, nothing)["segm"]["AP"] == 0
    folder = tmp_path / "run" / "inference" / "city_val" / "cityscapes_instances"
    assert [p.read_text() for p in sorted(folder.iterdir())] == ["", ""]


def test_a_missing_prediction_is_named(cfg):
    evaluator = build_evaluator(cfg, "city_val")
    DatasetCatalog.get("city_val")
    evaluator.reset()
    with pytest.raises(UserError, match="2 images of 2 have no prediction"):
        evaluator.evaluate()


def test_detectors_are_scored_on_instances_and_boxes_by_cocos_rules(cfg, root, tmp_path):
    cfg.MODEL.META_ARCHITECTURE = "ContextRCNN"
    assert build_evaluator(cfg, "city_val")._evaluators[0].__class__.__name__.startswith("City")
    cfg.MODEL.MASK_ON = False
    assert build_evaluator(cfg, "city_val")._evaluators[0].tasks == ("bbox",)


def test_a_run_trains_and_evaluates(root, tmp_path):
    cfg = make_config(root, tmp_path, train=["city_val"])
    assert "city_val: 2 images, 6 instances (2 crowd), 8 classes" in check_run(cfg, eval_only=False)
    assert run(cfg).keys() == {"segm", "panoptic_seg"}


# ---- the official code -----------------------------------------------------------------------
def test_all_three_official_evaluators_run_and_touch_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def installed() -> dict[str, int]:
        return {n: id(m) for n, m in sys.modules.items() if n.endswith("SemanticLabeling")}

    before = set(vars(np)), dict(os.environ), installed()
    assert cityscapes_official.rehearse() == []
    assert (set(vars(np)), dict(os.environ), installed()) == before
    assert os.listdir() == []


def test_an_evaluator_that_fails_is_told_before_the_training(cfg, monkeypatch):
    def broken(*_, **__):
        raise AttributeError("no in1d")

    monkeypatch.setattr(cityscapes_official, "instance_ap", broken)
    assert refusal(cfg, eval_only=True) == (
        "cityscapesScripts' instance evaluator fails (AttributeError: no in1d); install the tested "
        "version: pip install cityscapesscripts==2.3.0"
    )


def test_an_evaluator_that_gives_a_wrong_number_is_told(monkeypatch):
    monkeypatch.setattr(cityscapes_official, "instance_ap", lambda *_, **__: {"allAp": 0.5})
    (line,) = cityscapes_official.rehearse()
    assert "instance evaluator gives 0.5 for a perfect prediction" in line


def test_without_cityscapesscripts_the_fix_is_named(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(UserError, match=r"install it with: pip install 'ctxseg\[d2\]'"):
        cityscapes_official.official(cityscapes_official.INSTANCE)


def test_what_the_scripts_print_before_they_exit_is_the_error(tmp_path):
    names = write_cityscapes(tmp_path)
    text = tmp_path / f"{names[0]}_pred.txt"
    text.write_text("mask with spaces.png 24 0.5\n")
    truth = tmp_path / f"gtFine/val/toy/{names[0]}_gtFine_instanceIds.png"
    with pytest.raises(UserError, match="cityscapesScripts: Invalid prediction file"):
        cityscapes_official.instance_ap({truth: text}, predictions_root=tmp_path)


def as_installed(name: str):
    spec = importlib.util.find_spec(f"cityscapesscripts.{name}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(hasattr(np, "in1d"), reason="this numpy still has in1d")
@pytest.mark.parametrize("with_in1d", [False, True])
def test_upstream_still_needs_the_stand_ins(tmp_path, monkeypatch, with_in1d):
    """Fails when cityscapesScripts repairs itself: then `official` becomes a plain import."""
    monkeypatch.chdir(tmp_path)
    module = as_installed(cityscapes_official.INSTANCE)
    if with_in1d:
        module.np = cityscapes_official._NumpyWithIn1d()
    monkeypatch.setattr(cityscapes_official, "official", lambda _: module)
    names = write_cityscapes(tmp_path)
    mask = np.zeros((HEIGHT, 48), np.uint8)
    mask[10:26, 4:14] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    text = tmp_path / f"{names[0]}_pred.txt"
    text.write_text("mask.png 24 0.5\n")
    truth = tmp_path / f"gtFine/val/toy/{names[0]}_gtFine_instanceIds.png"
    expected = "numpy.int64|__dict__" if with_in1d else "in1d"
    with pytest.raises(AttributeError, match=expected):
        cityscapes_official.instance_ap({truth: text}, predictions_root=tmp_path)


def test_official_quality_in_threads_is_ours(tmp_path):
    generator = np.random.default_rng(0)
    categories = [{"id": 7, "name": "road", "isthing": 0}, {"id": 24, "name": "a", "isthing": 1}]
    sides = {}
    for side in ("truth", "predicted"):
        (tmp_path / side).mkdir()
        annotations = []
        for number in range(5):
            ids = generator.integers(0, 4, (4, 3)).repeat(4, 0).repeat(4, 1)
            write_ids(tmp_path / side / f"{number}.png", ids)
            segments = [
                {
                    "id": int(i),
                    "category_id": 7 if i == 1 else 24,
                    "iscrowd": int(i == 3),
                    "area": int(n),
                }
                for i, n in zip(*np.unique(ids[ids > 0], return_counts=True), strict=True)
            ]
            annotations.append(
                {"image_id": number, "file_name": f"{number}.png", "segments_info": segments}
            )
        sides[side] = {"annotations": annotations, "categories": categories}
    given = {**sides, "truth_root": tmp_path / "truth", "predicted_root": tmp_path / "predicted"}
    copy = json.dumps(sides)
    mine, theirs = panoptic_quality(**given), cityscapes_official.panoptic_quality(**given)
    for kind in ("All", "Things", "Stuff"):
        assert mine[kind] == pytest.approx(theirs[kind], abs=1e-12)
    assert json.dumps(sides) == copy
