"""Label maps of the semantic branch: named in YAML, checked before a run, read into a batch."""

import json

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from PIL import Image

from d2ctx import UserError, register_coco_format
from d2ctx.datasets import parse_definition
from d2ctx.preflight import check_run
from tests.d2ctx.cascade_parts import SEMANTIC_OFF, config
from tests.d2ctx.tiny import CONFIGS
from tests.d2ctx.toy_coco import CLASSES, ToySet, definition, refusal, write_toy

HTC = "a2fpn/htc_a2fpn_instant.yaml"


@pytest.fixture
def toy(tmp_path, isolated):
    return write_toy(tmp_path, images=3)


@pytest.fixture
def maps(toy):
    """A map for every image: class 12 above, 0 below, unknown at the left."""
    folder = toy.image_root.parent / "maps"
    folder.mkdir()
    values = np.zeros((32, 32), dtype=np.uint8)
    values[:16], values[:, :4] = 12, 255
    for image in toy.images:
        Image.fromarray(values).save(folder / image["file_name"].replace(".jpg", ".png"))
    return folder


def run(toy: ToySet, maps: object, *opts: object) -> CfgNode:
    cfg = config(HTC, "OUTPUT_DIR", str(toy.image_root.parent / "run"), *opts)
    cfg.DATASETS.COCO_FORMAT[toy.name] = definition(toy)
    if maps:
        cfg.DATASETS.COCO_FORMAT[toy.name].SEM_SEG = str(maps)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (toy.name,), ()
    register_coco_format(cfg)
    return cfg


def test_maps_reach_the_batch(toy, maps):
    cfg = run(toy, maps)
    assert check_run(cfg, eval_only=False)[0] == "toy_train: 3 images, 3 instances, 3 classes"
    records = DatasetCatalog.get(toy.name)
    assert records[1]["sem_seg_file_name"] == str(maps / "toy_train_2.png")
    assert MetadataCatalog.get(toy.name).thing_classes == list(CLASSES)
    batch = DatasetMapper(cfg, is_train=True)(records[0])
    assert batch["sem_seg"].shape == batch["image"].shape[1:]
    assert set(batch["sem_seg"].unique().tolist()) == {0, 12, 255}


def test_registering_twice_is_harmless_but_other_maps_are_another_data_set(toy, maps):
    cfg = run(toy, maps)
    register_coco_format(cfg)
    del cfg.DATASETS.COCO_FORMAT[toy.name]["SEM_SEG"]
    with pytest.raises(UserError, match="the name is taken"):
        register_coco_format(cfg)


def test_names_below_folders_keep_them(tmp_path, isolated):
    toy = write_toy(tmp_path, images=1)
    (toy.image_root / "a").mkdir()
    (toy.image_root / "toy_train_1.jpg").rename(toy.image_root / "a" / "b.jpg")
    toy.images[0]["file_name"] = "a/b.jpg"
    toy.save()
    run(toy, tmp_path / "maps")
    (record,) = DatasetCatalog.get(toy.name)
    assert record["sem_seg_file_name"] == str(tmp_path / "maps" / "a" / "b.png")


def test_a_training_set_without_maps(toy):
    message = refusal(run(toy, None))
    assert message.startswith("toy_train has no stuff-thing maps, which the semantic branch learns")
    assert "DATASETS.COCO_FORMAT.<data set>.SEM_SEG, or set MODEL.HTC.SEMANTIC.ENABLED False" in (
        message
    )


@pytest.mark.parametrize("check", ["headers", "off"])
def test_it_is_told_at_every_level(toy, check):
    assert "no stuff-thing maps" in refusal(run(toy, None, "DATASETS.CHECK", check))


def test_without_the_branch_and_in_evaluation_no_maps_are_wanted(toy):
    check_run(run(toy, None, *SEMANTIC_OFF), eval_only=False)
    cfg = run(toy, None)
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    check_run(cfg, eval_only=True)


def test_absent_folder(toy, tmp_path):
    message = refusal(run(toy, tmp_path / "none"))
    assert f"sem_seg_root {tmp_path / 'none'} does not exist; correct DATASETS.COCO_FORMAT" in (
        message
    )
    assert "toy_train.SEM_SEG" in message


def grey(value: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.fromarray(np.full(size[::-1], value, dtype=np.uint8))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (None, "absent (toy_train_2.jpg); copy them, or set MODEL.HTC.SEMANTIC.ENABLED False"),
        ("text", "unreadable (toy_train_2.jpg: cannot identify"),
        (grey(1, (32, 16)), "of another size than the image (toy_train_2.jpg: (32, 16) instead"),
        (grey(1).convert("P"), "of another kind (toy_train_2.jpg: mode P); write PNG files of one"),
        (grey(1).convert("RGB"), "of another kind (toy_train_2.jpg: mode RGB)"),
        (grey(13), "with unknown labels (toy_train_2.jpg: 13 of 13 classes); set MODEL.HTC"),
    ],
)
def test_broken_maps(toy, maps, picture, message):
    file = maps / "toy_train_2.png"
    file.unlink()
    if picture == "text":
        file.write_text("no picture")
    elif picture:
        picture.save(file)
    start = f"toy_train: 1 of 3 label maps below {maps} "
    assert refusal(run(toy, maps)).startswith(start + message)


def test_an_empty_path_is_no_path():
    entry = {"JSON": "a.json", "IMAGES": "b", "SEM_SEG": ""}
    with pytest.raises(UserError, match=r"COCO_FORMAT\.mine\.SEM_SEG must be a path, got ''"):
        parse_definition("mine", entry)


def as_htc(launch, **train: str) -> None:
    """Turn a launch into Hybrid Task Cascade, with more keys for its training set."""
    content = json.loads(launch.config.read_text())
    content["_BASE_"] = str(CONFIGS / HTC)
    content["DATASETS"]["COCO_FORMAT"][launch.train.name].update(train)
    launch.config.write_text(json.dumps(content))


def test_the_command_line_refuses_before_training(launch, capsys):
    as_htc(launch)
    assert launch.main() == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: toy_train has no stuff-thing maps")
    assert "Traceback" not in printed
    assert not launch.output.exists()


def test_a_run_from_the_command_line(launch, tmp_path):
    folder = tmp_path / "maps"
    folder.mkdir()
    for image in launch.train.images:
        grey(3).save(folder / image["file_name"].replace(".jpg", ".png"))
    as_htc(launch, SEM_SEG=str(folder))
    assert launch.main() == 0
    lines = (launch.output / "metrics.json").read_text()
    assert "loss_semantic" in lines
    assert (launch.output / "model_final.pth").is_file()
    assert launch.results()
