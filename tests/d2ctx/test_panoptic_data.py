"""Panoptic data sets from YAML: stuff maps, instances, classes, and what is wrong with files."""

import json
import os

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from PIL import Image
from pycocotools import mask as coco_mask

from d2ctx import UserError
from d2ctx.evaluation.panoptic_files import write_ids
from d2ctx.panoptic_convert import Classes, PanopticDefinition, convert
from d2ctx.panoptic_data import parse_panoptic
from d2ctx.preflight import check_run
from d2ctx.train_net import run
from d2ctx.trainer import Trainer
from tests.shared_data import SHARED

from .toy_coco import definition, refusal, write_toy
from .toy_panoptic import (
    CATEGORIES,
    HEIGHT,
    IDS,
    WIDTH,
    panoptic_config,
    panoptic_ids,
    segments_of,
    write_panoptic,
)

pytestmark = pytest.mark.usefixtures("isolated")
PANOPTIC = SHARED / "data" / "panoptic"
needs_data = pytest.mark.skipif(not PANOPTIC.is_dir(), reason="these data are not shipped")


@pytest.fixture
def toy(tmp_path):
    return write_panoptic(tmp_path / "data")


def make_config(toy, tmp_path, *, train=True, test=False, entry=None, **options):
    return panoptic_config(
        train=[toy.name] if train else [],
        test=[toy.name] if test else [],
        output=tmp_path / "run",
        COCO_PANOPTIC={toy.name: entry or toy.entry()},
        **options,
    )


def of(toy) -> PanopticDefinition:
    return PanopticDefinition(*map(str, (toy.json_file, toy.png_root, toy.image_root)))


# ---- what a model gets -----------------------------------------------------------------------
def test_stuff_maps_hold_zero_for_things_and_void_is_ignored(toy, tmp_path):
    cfg = make_config(toy, tmp_path)
    record = DatasetCatalog.get(toy.name)[0]
    labels = np.asarray(Image.open(record["sem_seg_file_name"]))
    ids = panoptic_ids()
    for segment_id, label in {0: 255, IDS[4]: 1, IDS[9]: 2, IDS[7]: 0, IDS[12]: 0}.items():
        assert (labels[ids == segment_id] == label).all()
    item = DatasetMapper(cfg, is_train=True)(record)
    assert item["sem_seg"].shape == item["image"].shape[1:]
    assert set(item["sem_seg"].unique().tolist()) == {0, 1, 2, 255}
    assert item["instances"].gt_classes.tolist() == [1]  # the disc is a crowd


def test_instances_are_the_thing_segments(toy, tmp_path):
    make_config(toy, tmp_path)
    disc, star = DatasetCatalog.get(toy.name)[1]["annotations"]
    assert [(a["category_id"], a["iscrowd"], a["bbox"]) for a in (disc, star)] == [
        (0, 1, [8, 4, 16, 8]),
        (1, 0, [20, 18, 20, 12]),
    ]
    # COCO's evaluation takes id 0 for "not found".
    content = json.loads(open(of(toy).things_json).read())
    assert [a["id"] for a in content["annotations"]] == [1, 2, 3, 4]
    mask = coco_mask.decode(star["segmentation"]).astype(bool)
    assert (mask == (panoptic_ids() == IDS[12])).all()


def test_classes_are_known_before_the_data_are_loaded(toy, tmp_path):
    make_config(toy, tmp_path)
    meta = MetadataCatalog.get(toy.name)
    assert meta.thing_classes == ["disc", "star"]
    assert meta.stuff_classes == ["things", "sky", "ground"]
    assert meta.thing_dataset_id_to_contiguous_id == {7: 0, 12: 1}
    assert meta.stuff_dataset_id_to_contiguous_id == {4: 1, 9: 2}
    assert meta.stuff_colors == [[0, 0, 0], [0, 0, 200], [0, 200, 0]]
    DatasetCatalog.get(toy.name)  # sets the same again


def test_numbers_follow_ids_not_the_order_of_the_list():
    classes = Classes.of(CATEGORIES[::-1])
    assert (classes.things, classes.stuff) == ([7, 12], [4, 9])
    assert classes.label_of() == {7: 0, 12: 0, 4: 1, 9: 2}


@needs_data
@pytest.mark.parametrize("name", ["coco_samples", "camvid_derived"])
def test_instances_of_real_data_are_those_that_came_with_it(name):
    if name == "coco_samples":
        root = PANOPTIC / name / "annotations"
        known = [PANOPTIC / name / "images", root / "panoptic_val", root / "instances_val.json"]
    else:
        root = PANOPTIC / name
        known = [SHARED / "data" / "camvid", root / "panoptic_val", root / "instances_val.json"]
    images, pngs, instances = known
    data = PanopticDefinition(str(root / "panoptic_val.json"), str(pngs), str(images))
    convert(data)
    mine, theirs = (json.loads(open(p).read()) for p in (data.things_json, instances))
    assert [c["id"] for c in mine["categories"]] == [c["id"] for c in theirs["categories"]]
    # Image 39769 has instances of another source, which sees a couch less and a bed more.
    counted = [
        sorted(
            (a["image_id"], a["category_id"], a["area"], *a["bbox"])
            for a in content["annotations"]
            if a["image_id"] != 39769
        )
        for content in (mine, theirs)
    ]
    assert counted[0] == counted[1]
    assert len(counted[0]) == {"coco_samples": 43, "camvid_derived": 580}[name]


# ---- the conversion --------------------------------------------------------------------------
def test_nothing_is_written_into_the_data_set_and_nothing_twice(toy):
    before = sorted(toy.json_file.parent.rglob("*"))
    convert(of(toy))
    first = of(toy).stuff_map(1).stat().st_mtime_ns
    convert(of(toy))
    assert of(toy).stuff_map(1).stat().st_mtime_ns == first
    assert sorted(toy.json_file.parent.rglob("*")) == before


def touch(path) -> None:
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 10**9))


def test_what_has_changed_is_converted_again(toy):
    convert(of(toy))
    ids = panoptic_ids()
    ids[0, 2] = 0
    write_ids(toy.png(1), ids)
    touch(toy.png(1))
    toy.content["annotations"][0]["segments_info"] = segments_of(ids)
    toy.save()
    convert(of(toy))
    assert np.asarray(Image.open(of(toy).stuff_map(1)))[0, 2] == 255


def test_a_changed_png_alone_is_noticed(toy):
    convert(of(toy))
    ids = panoptic_ids()
    ids[0, 2] = 0
    write_ids(toy.png(1), ids)
    touch(toy.png(1))
    with pytest.raises(UserError, match="another area than the json says"):
        convert(of(toy))


def test_a_changed_json_alone_is_noticed(toy):
    convert(of(toy))
    toy.content["categories"][0]["isthing"] = 1  # the sky
    toy.save()
    touch(toy.json_file)
    convert(of(toy))
    assert np.asarray(Image.open(of(toy).stuff_map(1)))[0, 5] == 0


def test_a_name_cannot_lead_out_of_the_cache(toy):
    path = of(toy).stuff_map("../../x")
    assert path.parent == of(toy).stuff_root


def test_a_cache_that_cannot_be_written_is_told(toy, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set the environment variable XDG_CACHE_HOME"):
        convert(of(toy))


# ---- a run -----------------------------------------------------------------------------------
def test_a_run_trains_and_evaluates(toy, tmp_path):
    cfg = make_config(toy, tmp_path, test=True)
    assert f"{toy.name}: 2 images, 4 instances (2 crowd), 2 classes" in check_run(
        cfg, eval_only=False
    )
    assert {"bbox", "segm", "panoptic_seg"} <= run(cfg).keys()
    report = json.loads((tmp_path / "run" / "inference" / toy.name / "results.json").read_text())
    assert report["tasks"]["panoptic_seg"]["classes"] == ["sky", "disc", "ground", "star"]


def test_one_thing_and_no_stuff_is_enough(toy, tmp_path):
    keep = toy.content["categories"][1]
    toy.content["categories"] = [keep]
    for number, annotation in enumerate(toy.content["annotations"], start=1):
        ids = np.where(panoptic_ids() == IDS[7], IDS[7], 0)
        write_ids(toy.png(number), ids)
        annotation["segments_info"] = segments_of(ids, crowd=0)
    toy.save()
    cfg = make_config(toy, tmp_path, test=True, things=1, stuff=0)
    check_run(cfg, eval_only=False)
    results = run(cfg)["panoptic_seg"]
    assert np.isnan(results["PQ_st"])
    assert results["PQ"] == results["PQ_th"]


def test_a_detector_uses_the_instances_of_a_panoptic_set(toy, tmp_path):
    cfg = make_config(toy, tmp_path, test=True)
    cfg.MODEL.META_ARCHITECTURE = "ContextRCNN"
    check_run(cfg, eval_only=False)
    assert Trainer.test(cfg, Trainer.build_model(cfg)).keys() == {"bbox", "segm"}


# ---- what is wrong ---------------------------------------------------------------------------
def spoil_png_extra(toy):
    ids = panoptic_ids()
    ids[0, 0] = 77
    write_ids(toy.png(2), ids)


def spoil_png_missing_segment(toy):
    write_ids(toy.png(2), np.where(panoptic_ids() == IDS[12], IDS[9], panoptic_ids()))


def spoil_png_absent(toy):
    toy.png(1).unlink()


def spoil_png_mode(toy):
    Image.fromarray(panoptic_ids().astype(np.uint8)).save(toy.png(1))


def spoil_png_size(toy):
    write_ids(toy.png(1), panoptic_ids()[:-2])


def spoil_area(toy):
    toy.content["annotations"][0]["segments_info"][0]["area"] += 1


def spoil_same_id(toy):
    toy.content["categories"][2]["id"] = 4


def spoil_thing_and_stuff(toy):
    toy.content["categories"][1]["id"] = 4


def spoil_no_things(toy):
    for category in toy.content["categories"]:
        category["isthing"] = 0


def spoil_isthing(toy):
    del toy.content["categories"][0]["isthing"]


def spoil_unknown_category(toy):
    toy.content["annotations"][1]["segments_info"][0]["category_id"] = 99


def spoil_unannotated_image(toy):
    toy.content["annotations"].pop()


def spoil_strange_image(toy):
    toy.content["images"].pop()


def spoil_no_annotations(toy):
    del toy.content["annotations"]


def spoil_size_entry(toy):
    toy.content["images"][0]["width"] = 0


def spoil_segment(toy):
    del toy.content["annotations"][0]["segments_info"][0]["area"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            spoil_png_extra,
            "toy_panoptic: {pngs}: 1 of 2 of the PNGs disagree with the json (toy_panoptic_2.png: "
            "the PNG holds segment 77, which the json does not list); write the json and the PNGs "
            "from the same segments",
        ),
        (
            spoil_png_missing_segment,
            "(toy_panoptic_2.png: the json lists segment 9000000, which the PNG does not hold)",
        ),
        (spoil_png_absent, "1 of 2 of the PNGs cannot be used (toy_panoptic_1.png: does not exist"),
        (spoil_png_mode, "has mode L, expected RGB with id = R + 256 G + 65536 B); write them as"),
        (spoil_png_size, "have another size than the image (toy_panoptic_1.png: 48x30, not 48x32)"),
        (spoil_area, "another area than the json says (toy_panoptic_1.png: segment 300: "),
        (
            spoil_same_id,
            "toy_panoptic: {json}: category id 4 stands more than once (stuff 'sky', stuff "
            "'ground'); give each its own",
        ),
        (spoil_thing_and_stuff, "category id 4 stands more than once (stuff 'sky', thing 'disc')"),
        (spoil_no_things, "no category is a thing (isthing 1); name at least one thing"),
        (spoil_isthing, "needs an id, a name and isthing 0 or 1; use COCO's panoptic format"),
        (spoil_unknown_category, "toy_panoptic_2.png: segment 300 has the unknown category 99"),
        (spoil_unannotated_image, "1 image of 2 have no panoptic annotation, hence no stuff map"),
        (spoil_strange_image, "1 annotation belong to an image that is not listed (2); list it"),
        (spoil_no_annotations, 'the list "annotations" is missing; use COCO\'s panoptic format'),
        (spoil_size_entry, "needs an id, a file_name, a width and a height"),
        (spoil_segment, "a segment of image 1 has no whole number as id, category_id or area"),
    ],
)
def test_broken_data_are_refused_in_one_line(toy, tmp_path, spoil, message):
    spoil(toy)
    toy.save()
    found = refusal(make_config(toy, tmp_path))
    assert message.format(pngs=toy.png_root, json=toy.json_file) in found
    assert "\n" not in found


def test_absent_paths_name_the_key_to_correct(toy, tmp_path):
    entry = toy.entry(PNGS=str(tmp_path / "no"), INSTANCES_JSON=str(tmp_path / "no.json"))
    found = refusal(make_config(toy, tmp_path, entry=entry))
    assert f"panoptic_root {tmp_path}/no does not exist; correct DATASETS.COCO_PANOPTIC." in found
    assert f"{toy.name}.PNGS, or set the environment variable DETECTRON2_DATASETS" in found
    assert f"{toy.name}.INSTANCES_JSON, or" in found


def test_class_counts_of_both_heads_are_checked(toy, tmp_path):
    found = refusal(make_config(toy, tmp_path, things=3, stuff=4))
    assert "MODEL.ROI_HEADS.NUM_CLASSES is 3, but toy_panoptic has 2 classes" in found
    assert (
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES is 5, but toy_panoptic has 2 stuff classes and one label "
        "for all things; write MODEL: {SEM_SEG_HEAD: {NUM_CLASSES: 3}} in the YAML, or add "
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES 3 to the command"
    ) in found


def test_void_must_be_ignored(toy, tmp_path):
    cfg = make_config(toy, tmp_path)
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 0
    assert "MODEL.SEM_SEG_HEAD.IGNORE_VALUE is 0, but stuff maps say 255" in refusal(cfg)


def test_sets_must_have_the_same_stuff(toy, tmp_path):
    other = write_panoptic(tmp_path / "other", "other")
    other.content["categories"][0]["name"] = "cloud"
    other.save()
    cfg = panoptic_config(
        train=[toy.name, other.name],
        test=[],
        output=tmp_path / "run",
        COCO_PANOPTIC={t.name: t.entry() for t in (toy, other)},
    )
    assert "toy_panoptic and other list different stuff categories" in refusal(cfg)


def test_panoptic_fpn_wants_stuff_maps(tmp_path):
    toy = write_toy(tmp_path / "data")
    cfg = panoptic_config(
        train=[toy.name],
        test=[],
        output=tmp_path / "run",
        things=3,
        COCO_FORMAT={toy.name: definition(toy)},
    )
    assert refusal(cfg) == (
        "MODEL.META_ARCHITECTURE ContextPanopticFPN learns stuff, but toy_train has no stuff maps; "
        "define it under DATASETS.COCO_PANOPTIC or DATASETS.CITYSCAPES, or set "
        "MODEL.META_ARCHITECTURE ContextRCNN"
    )


def test_a_set_that_is_only_evaluated_needs_no_stuff(toy, tmp_path):
    other = write_toy(tmp_path / "other")
    for category, new in zip(other.content["categories"], ("disc", "star"), strict=False):
        category["name"] = new
    other.content["categories"].pop()
    other.content["annotations"] = [a for a in other.annotations if a["category_id"] < 3]
    other.save()
    cfg = panoptic_config(
        train=[toy.name],
        test=[other.name],
        output=tmp_path / "run",
        COCO_PANOPTIC={toy.name: toy.entry()},
        COCO_FORMAT={other.name: definition(other)},
    )
    assert len(check_run(cfg, eval_only=False)) >= 2


def test_masks_of_pngs_need_bitmasks(toy, tmp_path):
    cfg = make_config(toy, tmp_path)
    cfg.INPUT.MASK_FORMAT = "polygon"
    assert 'set INPUT.MASK_FORMAT "bitmask"' in refusal(cfg)


def test_images_of_another_size_than_the_json_says(toy, tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT + 2)).save(toy.image_root / "toy_panoptic_1.jpg")
    found = refusal(make_config(toy, tmp_path))
    assert "toy_panoptic_1.jpg is 48x32 in the json, 48x34 in the file" in found


def test_a_test_set_without_annotations_is_only_predicted(toy, tmp_path):
    other = write_panoptic(tmp_path / "other", "other")
    del other.content["annotations"]
    other.save()
    cfg = panoptic_config(
        train=[toy.name],
        test=[other.name],
        output=tmp_path / "run",
        COCO_PANOPTIC={t.name: t.entry() for t in (toy, other)},
    )
    lines = check_run(cfg, eval_only=False)
    (note,) = [line for line in lines if "other" in line and "note" in line]
    assert note.endswith("has no annotations: its results are written, not scored")
    assert Trainer.test(cfg, Trainer.build_model(cfg)) == {}
    predicted = tmp_path / "run" / "inference" / "other" / "panoptic_predictions.json"
    assert len(json.loads(predicted.read_text())["annotations"]) == 2


# ---- instances of another file ---------------------------------------------------------------
@pytest.fixture
def instances(toy, tmp_path):
    """The toy's things as one polygon per image, all stars."""
    polygon = [20, 18, 40, 18, 40, 30, 20, 30]
    things = {"bbox": [20, 18, 20, 12], "area": 240, "iscrowd": 0, "segmentation": [polygon]}
    content = {
        "images": toy.content["images"],
        "categories": [c for c in CATEGORIES if c["isthing"]],
        "annotations": [{"id": i, "image_id": i, "category_id": 12, **things} for i in (1, 2)],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return path, content


def test_instances_may_come_from_another_file(toy, tmp_path, instances):
    entry = toy.entry(INSTANCES_JSON=str(instances[0]))
    cfg = make_config(toy, tmp_path, entry=entry)
    cfg.INPUT.MASK_FORMAT = "polygon"
    assert "toy_panoptic: 2 images, 2 instances, 2 classes" in check_run(cfg, eval_only=False)
    record = DatasetCatalog.get(toy.name)[0]
    assert [a["category_id"] for a in record["annotations"]] == [1]
    assert record["sem_seg_file_name"]


def test_those_instances_must_be_of_the_same_things_and_images(toy, tmp_path, instances):
    path, content = instances
    entry = toy.entry(INSTANCES_JSON=str(path))
    content["images"] = [*content["images"], {**content["images"][0], "id": 5}]
    path.write_text(json.dumps(content))
    cfg = make_config(toy, tmp_path, entry=entry)
    assert "1 image of 3 in" in (found := refusal(cfg))
    assert "have no stuff map, because" in found
    content["categories"].pop()
    path.write_text(json.dumps(content))
    assert "list different things (category 12 stands in one only); list the same" in refusal(cfg)


# ---- definitions -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("train.json", "mine must be a section such as"),
        ({"JSON": "a.json", "IMAGES": "b"}, "mine.PNGS is missing; write mine: "),
        ({"JSON": "a", "PNG": "b"}, "mine.PNG is not known; did you mean PNGS?"),
        ({"JSON": 3, "PNGS": "a", "IMAGES": "b"}, "mine.JSON must be a path, got 3"),
    ],
)
def test_wrong_definitions_say_what_to_write(entry, message):
    with pytest.raises(UserError) as caught:
        parse_panoptic("mine", entry)
    assert str(caught.value).startswith(f"DATASETS.COCO_PANOPTIC.{message}")


def test_registering_twice_is_harmless_and_a_taken_name_is_refused(toy, tmp_path):
    make_config(toy, tmp_path)
    make_config(toy, tmp_path)
    with pytest.raises(UserError, match="toy_panoptic: the name is taken by another data set"):
        make_config(toy, tmp_path, entry=toy.entry(PNGS="elsewhere"))
