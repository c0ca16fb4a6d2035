"""COCO-format data sets from YAML alone."""

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ctx import UserError, add_d2ctx_config, register_coco_format
from d2ctx.datasets import parse_definition, resolve_path

from .toy_coco import CLASSES, definition, restored_catalogs, toy_config, write_toy


@pytest.fixture(autouse=True)
def _catalogs():
    with restored_catalogs():
        yield


def test_yaml_alone_makes_a_data_set_that_loads(tmp_path, monkeypatch):
    toy = write_toy(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    yaml = tmp_path / "run.yaml"
    yaml.write_text(
        "DATASETS:\n"
        "  COCO_FORMAT:\n"
        "    mine: {JSON: toy_train.json, IMAGES: images}\n"
        '  TRAIN: ("mine",)\n'
    )
    cfg = get_cfg()
    add_d2ctx_config(cfg)
    cfg.merge_from_file(str(yaml))
    cfg.freeze()
    register_coco_format(cfg)
    records = DatasetCatalog.get("mine")
    assert len(records) == len(toy.images)
    assert records[0]["file_name"] == str(tmp_path / "images" / "toy_train_1.jpg")
    assert [r["annotations"][0]["category_id"] for r in records[:4]] == [0, 1, 2, 0]


def test_class_names_are_known_before_the_data_are_loaded(tmp_path):
    toy = write_toy(tmp_path)
    toy.content["categories"].reverse()
    toy.save()
    toy_config(train=[toy], test=[], output=tmp_path)
    meta = MetadataCatalog.get(toy.name)
    assert meta.thing_classes == list(CLASSES)
    assert meta.evaluator_type == "coco"
    DatasetCatalog.get(toy.name)  # sets the same names again


def test_registering_twice_is_harmless(tmp_path):
    cfg = toy_config(train=[write_toy(tmp_path)], test=[], output=tmp_path)
    register_coco_format(cfg)


def test_absent_files_are_left_to_the_preflight():
    cfg = get_cfg()
    add_d2ctx_config(cfg)
    cfg.DATASETS.COCO_FORMAT.mine = CfgNode({"JSON": "no.json", "IMAGES": "no"})
    register_coco_format(cfg)
    assert MetadataCatalog.get("mine").get("thing_classes") is None


@pytest.mark.parametrize("name", ["toy_train", "coco_2017_train"])
def test_a_taken_name_is_refused(tmp_path, name):
    toy_config(train=[write_toy(tmp_path / "a")], test=[], output=tmp_path)
    cfg = get_cfg()
    add_d2ctx_config(cfg)
    cfg.DATASETS.COCO_FORMAT[name] = definition(write_toy(tmp_path / "b"))
    with pytest.raises(UserError, match=f"{name}: the name is taken .*choose another"):
        register_coco_format(cfg)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("train.json", "mine must be a section such as"),
        ({"JSON": "a.json"}, "mine.IMAGES is missing; write mine: "),
        ({"JSON": "a.json", "IMAGE": "b"}, "mine.IMAGE is not known; did you mean IMAGES?"),
        ({"JSON": 3, "IMAGES": "b"}, "mine.JSON must be a path, got 3"),
        ({"JSON": "", "IMAGES": "b"}, "mine.JSON must be a path, got ''"),
    ],
)
def test_wrong_definitions_say_what_to_write(entry, message):
    with pytest.raises(UserError) as caught:
        parse_definition("mine", entry)
    assert message in str(caught.value)


def test_relative_paths_start_at_detectron2s_root(monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert resolve_path("a/b.json") == "datasets/a/b.json"
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/sets")
    monkeypatch.setenv("HOME", "/home/me")
    assert resolve_path("a/b.json") == "/home/me/sets/a/b.json"
    assert resolve_path("~/c.json") == "/home/me/c.json"
    assert resolve_path("/c.json") == "/c.json"
    assert resolve_path("https://host/c.json") == "https://host/c.json"
