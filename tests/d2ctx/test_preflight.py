"""What the check of a run says about settings, folders and whole data sets."""

import errno
import shutil

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from d2ctx.datasets import register_coco_format
from d2ctx.preflight import check_run
from tests.shared_data import SHARED, needs_shared

from .toy_coco import refusal, toy_config, write_toy

pytestmark = pytest.mark.usefixtures("isolated")

RANDOM = "note: MODEL.WEIGHTS is empty: training starts from random weights"


@pytest.fixture
def toy(tmp_path):
    return write_toy(tmp_path / "data")


@pytest.fixture
def cfg(tmp_path, toy):
    val = write_toy(tmp_path / "data", "toy_val", images=2)
    return toy_config(train=[toy], test=[val], output=tmp_path / "out")


def test_a_good_run_prints_its_data_sets(cfg):
    assert check_run(cfg, eval_only=False) == [
        "toy_train: 8 images, 8 instances, 3 classes",
        "toy_val: 2 images, 2 instances, 3 classes",
        RANDOM,
    ]


def test_nothing_is_written_but_the_cache(cfg, tmp_path):
    check_run(cfg, eval_only=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "data"]


def test_evaluation_looks_at_the_test_sets_only(cfg):
    cfg.DATASETS.TRAIN = ("no_such_set",)
    lines = check_run(cfg, eval_only=True)
    assert lines[0] == "toy_val: 2 images, 2 instances, 3 classes"
    assert "evaluation starts from random weights" in lines[1]


def test_several_errors_are_told_together(cfg):
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    cfg.SOLVER.IMS_PER_BATCH = 0
    message = refusal(cfg)
    assert message.startswith("2 things to mend before this can run:\n  ")
    assert "IMS_PER_BATCH" in message
    assert "NUM_CLASSES" in message


# ---- settings --------------------------------------------------------------------------------
def test_cuda_asked_for_but_absent(cfg, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg.MODEL.DEVICE = "cuda"
    assert refusal(cfg) == (
        "MODEL.DEVICE is cuda, but no CUDA device is available here; "
        "add MODEL.DEVICE cpu to the command"
    )


def test_more_gpus_than_present(cfg, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cfg.MODEL.DEVICE = "cuda"
    assert "--num-gpus 4 is more than the 2 present; set --num-gpus 2" in refusal(cfg, num_gpus=4)
    cfg.MODEL.DEVICE = "cuda:2"
    assert "the last device here is cuda:1; set MODEL.DEVICE cuda" in refusal(cfg)


def test_gpus_asked_for_on_the_cpu(cfg):
    assert "--num-gpus 2 needs GPUs, but MODEL.DEVICE is cpu" in refusal(cfg, num_gpus=2)


def test_batch_that_does_not_divide(cfg, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    cfg.MODEL.DEVICE, cfg.SOLVER.IMS_PER_BATCH = "cuda", 16
    check_run(cfg, eval_only=False, num_gpus=8)
    check_run(cfg, eval_only=True, num_gpus=3)
    message = refusal(cfg, num_gpus=3, num_machines=2)
    assert "must be a positive multiple of 6 (GPUs), got 16; set SOLVER.IMS_PER_BATCH 18" in message
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 5
    assert "multiple of 5 (SOLVER.REFERENCE_WORLD_SIZE), got 16" in refusal(cfg, num_gpus=8)


def test_mixed_precision_needs_a_gpu(cfg):
    cfg.SOLVER.AMP.ENABLED = True
    assert refusal(cfg) == (
        "SOLVER.AMP.ENABLED needs a CUDA device, but MODEL.DEVICE is cpu; "
        "set SOLVER.AMP.ENABLED False"
    )
    check_run(cfg, eval_only=True)


def test_optimizer_and_clip_type_are_known_ones(cfg):
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "fullmodel"
    check_run(cfg, eval_only=False)
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.OPTIMIZER = "LAMB"
    message = refusal(cfg)
    assert "SOLVER.OPTIMIZER: there is no 'LAMB'; known: AdamW, SGD" in message
    assert "CLIP_GRADIENTS.CLIP_TYPE: there is no 'fullmodel'; did you mean full_model?" in message


def test_output_folder_below_a_file(cfg, tmp_path):
    (tmp_path / "file").write_text("")
    cfg.OUTPUT_DIR = str(tmp_path / "file" / "run")
    assert "file is a file; set OUTPUT_DIR to a folder that you may write to" in refusal(cfg)


def test_output_folder_on_a_read_only_file_system(cfg, tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    cfg.OUTPUT_DIR = str(tmp_path / "new" / "run")
    monkeypatch.setattr("tempfile._os.mkdir", read_only)
    message = refusal(cfg)
    assert f"{tmp_path} is not writable (Read-only file system); set OUTPUT_DIR" in message


def test_trying_the_output_folder_leaves_nothing(cfg, tmp_path):
    cfg.OUTPUT_DIR = str(tmp_path / "new" / "run")
    before = sorted(tmp_path.iterdir())
    check_run(cfg, eval_only=True)
    assert {p.name for p in tmp_path.iterdir()} - {p.name for p in before} <= {"cache"}


def test_weights(cfg, tmp_path):
    cfg.MODEL.WEIGHTS = str(tmp_path / "none.pth")
    assert "none.pth does not exist; set MODEL.WEIGHTS to an existing file" in refusal(cfg)
    (tmp_path / "none.pth").write_text("")
    assert len(check_run(cfg, eval_only=False)) == 2
    for address in ("detectron2://ImageNetPretrained/MSRA/R-50.pkl", "https://host/a.pth"):
        cfg.MODEL.WEIGHTS = address
        assert len(check_run(cfg, eval_only=False)) == 2


def test_resume(cfg, tmp_path):
    assert "holds no checkpoint yet" in check_run(cfg, eval_only=False, resume=True)[2]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "last_checkpoint").write_text("model_0000009.pth")
    message = refusal(cfg, resume=True)
    assert "names model_0000009.pth, which is not there; delete last_checkpoint" in message
    (tmp_path / "out" / "model_0000009.pth").write_text("")
    cfg.MODEL.WEIGHTS = "not_needed.pth"
    assert len(check_run(cfg, eval_only=False, resume=True)) == 2


def test_check_level_is_one_of_three(cfg):
    cfg.DATASETS.CHECK = "ful"
    assert "DATASETS.CHECK must be one of full, headers, off, got 'ful'" in refusal(cfg)


# ---- which data sets -------------------------------------------------------------------------
def test_names_that_are_not_registered(cfg):
    cfg.DATASETS.TRAIN = ("toy_trian", "coco_2017_trian")
    message = refusal(cfg)
    assert "DATASETS.TRAIN: no data set is called toy_trian; did you mean toy_train?" in message
    assert "did you mean coco_2017_train?" in message


def test_no_data_set_at_all(cfg):
    cfg.DATASETS.TRAIN = ()
    assert "DATASETS.TRAIN is empty; name a data set" in refusal(cfg)
    cfg.DATASETS.TEST = ()
    assert "DATASETS.TEST is empty" in refusal(cfg, eval_only=True)


def test_missing_json_and_images(cfg, toy):
    toy.json_file.unlink()
    message = refusal(cfg)
    assert f"toy_train: json_file {toy.json_file} does not exist" in message
    assert "correct DATASETS.COCO_FORMAT.toy_train.JSON, or set the environment" in message
    toy.save()
    shutil.move(toy.image_root, toy.image_root.with_name("elsewhere"))
    assert "correct DATASETS.COCO_FORMAT.toy_train.IMAGES" in refusal(cfg)


def test_missing_data_root(cfg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    cfg.DATASETS.COCO_FORMAT.relative = CfgNode({"JSON": "a/train.json", "IMAGES": "a/i"})
    cfg.DATASETS.TRAIN = ("relative",)
    register_coco_format(cfg)
    assert refusal(cfg) == (
        "the data-set root datasets does not exist (DETECTRON2_DATASETS is not set), expected "
        "datasets/a/train.json; set the environment variable DETECTRON2_DATASETS to the folder "
        "of your data sets"
    )


def test_data_sets_of_detectron2_are_checked_where_they_lie(cfg, toy, tmp_path):
    meta = MetadataCatalog.get("builtin_like")
    meta.set(json_file=str(toy.json_file), image_root=str(toy.image_root), evaluator_type="coco")
    meta.set(thing_classes=["person", "bicycle", "car"])
    MetadataCatalog["coco_2017_train"], original = meta, MetadataCatalog.get("coco_2017_train")
    try:
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("coco_2017_train",), ()
        message = refusal(cfg)
    finally:
        MetadataCatalog["coco_2017_train"] = original
    assert "coco_2017_train is registered with 3 classes, but its json differs" in message
    assert "'person' against 'disc'" in message
    assert "under another name in DATASETS.COCO_FORMAT" in message


def test_other_formats_are_checked_for_presence(cfg, tmp_path):
    cfg.DATASETS.TRAIN += ("cityscapes_fine_instance_seg_val",)
    meta = MetadataCatalog.get("cityscapes_fine_instance_seg_val")
    folders = {key: tmp_path / key for key in ("image_dir", "gt_dir")}
    saved = dict(vars(meta))
    vars(meta).update({key: str(folder) for key, folder in folders.items()})
    try:
        message = refusal(cfg)
        assert f"cityscapes_fine_instance_seg_val: gt_dir {folders['gt_dir']} does not" in message
        for folder in folders.values():
            folder.mkdir()
        line = check_run(cfg, eval_only=False)[2]
    finally:
        vars(meta).update(saved)
    assert line == (
        "cityscapes_fine_instance_seg_val: not in COCO's instance format, files not checked"
    )


def test_a_test_set_without_evaluator_is_told_before_the_training(cfg):
    cfg.DATASETS.TEST = ("lvis_v1_val",)
    assert "data set 'lvis_v1_val' asks for evaluator 'lvis'; known: ['city" in refusal(cfg)


# ---- classes ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("architecture", "key"), [("ContextRCNN", "ROI_HEADS"), ("RetinaNet", "RETINANET")]
)
def test_class_count(cfg, architecture, key):
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL[key].NUM_CLASSES = 80
    assert refusal(cfg) == (
        f"MODEL.{key}.NUM_CLASSES is 80, but toy_train has 3 classes (disc, square, star); write "
        f"MODEL: {{{key}: {{NUM_CLASSES: 3}}}} in the YAML, or add MODEL.{key}.NUM_CLASSES 3 to "
        "the command"
    )


def test_models_without_things_have_no_class_count(cfg):
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    check_run(cfg, eval_only=False)


@pytest.mark.parametrize(
    ("names", "difference"),
    [(["disc", "star", "square"], "'square' against 'star'"), (["disc"], "3 and 1 of them")],
)
def test_train_and_val_with_different_categories(tmp_path, toy, names, difference):
    val = write_toy(tmp_path / "data", "toy_val", images=1)
    val.content["categories"] = [{"id": i, "name": n} for i, n in enumerate(names, start=1)]
    val.save()
    message = refusal(toy_config(train=[toy], test=[val], output=tmp_path / "out"))
    assert f"toy_train and toy_val list different categories: {difference}" in message
    assert "write the same list, with the same ids, into both files" in message


# ---- the shared data sets --------------------------------------------------------------------
@needs_shared
@pytest.mark.parametrize(
    ("name", "classes", "train"),
    [
        ("coco", 80, "96 images, 716 instances (10 crowd), 80 classes"),
        ("fruits_nuts", 3, "14 images, 127 instances, 3 classes"),
    ],
)
def test_real_data_sets_pass(tmp_path, monkeypatch, cfg, name, classes, train):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(SHARED / "data" / "instances"))
    for split in ("train", "val"):
        json_file = f"{name}/annotations/instances_{split}.json"
        cfg.DATASETS.COCO_FORMAT[f"real_{split}"] = CfgNode(
            {"JSON": json_file, "IMAGES": f"{name}/images"}
        )
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("real_train",), ("real_val",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
    register_coco_format(cfg)
    lines = check_run(cfg, eval_only=False)
    assert lines[0] == f"real_train: {train}"
    assert lines[2:] == [RANDOM]
