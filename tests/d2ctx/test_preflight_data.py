"""What the check of a run says about the inside of a json and about image files."""

import os

import numpy as np
import pytest
from PIL import Image

from d2ctx.preflight import check_run, images

from .toy_coco import refusal, toy_config, write_toy

pytestmark = pytest.mark.usefixtures("isolated")


@pytest.fixture
def toy(tmp_path):
    return write_toy(tmp_path / "data")


@pytest.fixture
def cfg(tmp_path, toy):
    return toy_config(train=[toy], test=[], output=tmp_path / "out")


def notes(cfg) -> list[str]:
    lines = check_run(cfg, eval_only=False)
    return [line for line in lines if line.startswith("note: toy")]


# ---- the json --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"images": [],\n "annotations" []}', "is no valid json: line 2, column 16"),
        (b'{"images": ["\xff"]}', "is no text"),
        (b"[]", "expected an object with images, annotations and categories, got a list"),
        (b'{"annotations": [], "categories": [1]}', 'the list "images" is missing'),
        (b'{"images": [], "categories": [1]}', 'the list "annotations" is missing'),
        (b'{"images": [], "annotations": []}', 'the list "categories" is missing'),
        (b'{"images": {}, "annotations": [], "categories": [1]}', '"images" must be a list, got a'),
        (b'{"images": [], "annotations": [], "categories": []}', '"categories" is empty'),
        (
            b'{"images": [1], "annotations": [], "categories": [{"id": 1, "name": "a"}]}',
            '"images" must list objects',
        ),
    ],
)
def test_broken_json(cfg, toy, text, message):
    toy.json_file.write_bytes(text)
    answer = refusal(cfg)
    assert answer.startswith(f"toy_train: {toy.json_file}")
    assert message in answer


@pytest.mark.parametrize(
    ("kind", "field", "value", "message"),
    [
        ("images", "file_name", None, '1 of 8 images have no valid "file_name" (number 2 has None'),
        ("images", "height", 0, '1 of 8 images have no valid "height" (number 2 has 0)'),
        ("images", "id", 1, "1 id in images stand more than once (1); give each entry its own"),
        ("annotations", "id", 1, "1 id in annotations stand more than once (1)"),
        ("annotations", "image_id", [2], '1 of 8 annotations have no valid "image_id"'),
        ("categories", "name", 5, '1 of 3 categories have no valid "name" (number 2 has 5)'),
        ("categories", "id", 1, "1 id in categories stand more than once (1)"),
    ],
)
def test_broken_entries(cfg, toy, kind, field, value, message):
    toy.content[kind][2][field] = value
    toy.save()
    assert message in refusal(cfg)


def test_no_images(cfg, toy):
    toy.content.update(images=[], annotations=[])
    toy.save()
    assert "lists no image; correct DATASETS.COCO_FORMAT.toy_train.JSON" in refusal(cfg)


def test_nothing_left_to_train_on(cfg, toy):
    for annotation in toy.annotations[2:]:
        annotation["iscrowd"] = 1
    toy.save()
    assert notes(cfg) == [
        "note: toy_train: 6 of 8 images have no object and are not trained on "
        "(DATALOADER.FILTER_EMPTY_ANNOTATIONS)"
    ]
    for annotation in toy.annotations:
        annotation["iscrowd"] = 1
    toy.save()
    assert "nothing is left to train on; annotate some, or set DATALOADER.FILTER" in refusal(cfg)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert notes(cfg) == []


def test_a_test_set_needs_no_annotations(cfg, tmp_path, toy):
    val = write_toy(tmp_path / "data", "toy_val", images=2)
    del val.content["annotations"]
    val.save()
    cfg = toy_config(train=[toy], test=[val], output=tmp_path / "out")
    assert "toy_val: 2 images, 0 instances, 3 classes" in check_run(cfg, eval_only=False)


# ---- annotations -----------------------------------------------------------------------------
RLE = {"size": [32, 32], "counts": [0, 32 * 32]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image_id": 99},
            "1 of 8 annotations point to an image that the file does not list (id 4)",
        ),
        ({"category_id": 9}, "have a category that the file does not list (id 4)"),
        ({"ignore": 1}, 'carry "ignore": 1, which Detectron2 refuses (id 4); write "iscrowd": 1'),
        ({"bbox": []}, "have no bbox of four finite numbers below 2^31 (id 4); write bbox as"),
        ({"bbox": [1, 2, 3, "4"]}, "have no bbox of four finite numbers"),
        ({"bbox": [1, 2, 3, float("nan")]}, "have no bbox of four finite numbers"),
        ({"bbox": [1, 2, 3, 2**63]}, "have no bbox of four finite numbers below 2^31"),
        ({"segmentation": []}, "have no segmentation (id 4); add masks, or set MODEL.MASK_ON Fal"),
        ({"segmentation": [1, 2, 3, 4, 5, 6]}, "neither polygons nor a run-length mask (id 4)"),
        ({"segmentation": "RLE"}, "neither polygons nor a run-length mask (id 4)"),
        ({"segmentation": {"size": [32, 32]}}, "neither polygons nor a run-length mask (id 4)"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "an odd count of numbers"),
        ({"segmentation": [[1, 2, 3, 4, 5, "6"]]}, "something else than numbers (id 4)"),
        ({"segmentation": [[1, 2, 3, 4]]}, "have no polygon of three points (six numbers) or mo"),
        ({"segmentation": RLE}, "INPUT.MASK_FORMAT polygon cannot hold (id 4); set INPUT.MASK_FO"),
        (
            {"segmentation": {**RLE, "size": [31, 32]}, "iscrowd": 1},
            "have a run-length mask of another size than the image (id 4)",
        ),
        (
            {"segmentation": {**RLE, "counts": [5]}, "iscrowd": 1},
            "whose counts do not decode to the size of the image (id 4)",
        ),
    ],
)
def test_broken_annotations(cfg, toy, change, message):
    toy.annotations[3].update(change)
    toy.save()
    answer = refusal(cfg)
    assert answer.startswith("toy_train: 1 of 8 annotations ")
    assert message in answer


def test_many_are_counted_and_three_are_named(cfg, toy):
    for annotation in toy.annotations[2:]:
        annotation["category_id"] = 9
    toy.save()
    assert "6 of 8 annotations have a category" in refusal(cfg)
    assert "(id 3, 4, 5 and 3 more)" in refusal(cfg)


def test_what_detectron2_drops_is_a_note(cfg, toy):
    toy.annotations[0]["bbox"] = [4, 4, 0, 5]
    toy.annotations[1]["bbox"] = [40, 4, 5, 5]
    toy.annotations[2]["segmentation"].append([1, 2, 3, 4])
    toy.save()
    assert notes(cfg) == [
        "note: toy_train: 2 of 8 annotations have an empty box, or one outside the image; "
        "Detectron2 skips them (id 1, 2)",
        "note: toy_train: 1 of 8 annotations lose a polygon of fewer than three points (id 3)",
    ]


def test_run_length_masks_are_welcome_as_bitmaps_and_as_crowds(cfg, toy):
    toy.annotations[0].update(segmentation=RLE, iscrowd=1)
    toy.save()
    check_run(cfg, eval_only=False)
    toy.annotations[1]["segmentation"] = RLE
    toy.save()
    cfg.INPUT.MASK_FORMAT = "bitmask"
    check_run(cfg, eval_only=False)


def test_masks_do_not_matter_without_a_mask_head(cfg, toy):
    for annotation in toy.annotations:
        del annotation["segmentation"]
    toy.save()
    assert "8 of 8 annotations have no segmentation" in refusal(cfg)
    cfg.MODEL.MASK_ON = False
    check_run(cfg, eval_only=False)


def test_what_the_evaluation_needs(tmp_path, toy):
    val = write_toy(tmp_path / "data", "toy_val", images=2)
    del val.annotations[0]["area"]
    val.annotations[1]["id"] = 0
    val.save()
    cfg = toy_config(train=[toy], test=[val], output=tmp_path / "out")
    assert "toy_val: 1 of 2 annotations have no area or iscrowd, which the evalu" in refusal(cfg)
    val.annotations[0]["area"] = 1
    val.save()
    assert (
        "note: toy_val: 1 of 2 annotations have the id 0, which COCO's evaluation" in notes(cfg)[0]
    )


# ---- image files -----------------------------------------------------------------------------
def path_of(toy, number: int):
    return toy.image_root / toy.images[number]["file_name"]


def test_absent_images_are_counted_and_named(cfg, toy):
    for number in range(5):
        path_of(toy, number).unlink()
    assert refusal(cfg).startswith(
        f"toy_train: 5 of 8 image files absent below {toy.image_root} (toy_train_1.jpg, "
        "toy_train_2.jpg, toy_train_3.jpg and 2 more); correct DATASETS.COCO_FORMAT.toy_train.IM"
    )


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_truncated_images_are_found(tmp_path, suffix):
    toy = write_toy(tmp_path / "data", size=64, suffix=suffix)
    path = path_of(toy, 5)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    cfg = toy_config(train=[toy], test=[], output=tmp_path / "out")
    message = refusal(cfg)
    assert "1 image file below" in message
    assert f"cannot be decoded (toy_train_6{suffix}: " in message
    assert "copy them again, or take them out of the json" in message
    cfg.DATASETS.CHECK = "headers"
    check_run(cfg, eval_only=False)


@pytest.mark.parametrize("level", ["full", "headers"])
def test_files_that_are_no_images(cfg, toy, level):
    cfg.DATASETS.CHECK = level
    path_of(toy, 0).write_text("<html>not found</html>")
    path_of(toy, 1).write_bytes(b"")
    message = refusal(cfg)
    assert "2 image files below" in message
    assert "(toy_train_1.jpg: no known image format, toy_train_2.jpg: no known" in message


@pytest.mark.parametrize("level", ["full", "headers"])
def test_sizes_that_disagree(cfg, toy, level):
    cfg.DATASETS.CHECK = level
    toy.images[2]["height"] = 33
    toy.save()
    assert (
        "toy_train: the size of 1 image differs: toy_train_3.jpg is 32x33 in the json, 32x32 in "
        "the file; correct width and height in the json"
    ) in refusal(cfg)


def test_sizes_are_taken_after_the_exif_rotation(cfg, toy):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((16, 32, 3), np.uint8)).save(path_of(toy, 0), exif=exif)
    toy.images[0].update(width=32, height=16)
    toy.annotations[0]["bbox"] = [1, 1, 9, 9]
    toy.save()
    message = refusal(cfg)
    assert "toy_train_1.jpg is 32x16 in the json, 16x32 in the file (after EXIF rot" in message
    toy.images[0].update(width=16, height=32)
    toy.save()
    check_run(cfg, eval_only=False)


def test_off_opens_nothing(cfg, toy):
    cfg.DATASETS.CHECK = "off"
    toy.json_file.write_text("no json")
    assert check_run(cfg, eval_only=False)[0] == "toy_train: not checked (DATASETS.CHECK off)"


# ---- the memory of good files ----------------------------------------------------------------
@pytest.fixture
def reads(monkeypatch):
    names = []
    original = images.read_size

    def counted(path, *, decode):
        names.append(os.path.basename(path))
        return original(path, decode=decode)

    monkeypatch.setattr(images, "read_size", counted)
    return names


def test_a_second_start_reads_no_image(cfg, toy, reads):
    check_run(cfg, eval_only=False)
    assert len(reads) == 8
    check_run(cfg, eval_only=False)
    assert len(reads) == 8


def test_a_file_that_was_written_again_is_read_again(cfg, toy, reads):
    check_run(cfg, eval_only=False)
    Image.new("RGB", (32, 32)).save(path_of(toy, 3))
    check_run(cfg, eval_only=False)
    assert reads[8:] == ["toy_train_4.jpg"]


def test_sizes_alone_do_not_count_as_decoded(cfg, reads):
    cfg.DATASETS.CHECK = "headers"
    check_run(cfg, eval_only=False)
    cfg.DATASETS.CHECK = "full"
    check_run(cfg, eval_only=False)
    assert len(reads) == 16
    cfg.DATASETS.CHECK = "headers"
    check_run(cfg, eval_only=False)
    assert len(reads) == 16


def test_bad_files_are_not_remembered_as_good(cfg, toy):
    path_of(toy, 0).write_bytes(b"")
    for _ in range(2):
        assert "cannot be decoded" in refusal(cfg)


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_or_unwritable_memory_is_no_error(cfg, tmp_path, reads, content):
    check_run(cfg, eval_only=False)
    (memory,) = (tmp_path / "cache" / "d2ctx").iterdir()
    memory.write_text(content)
    check_run(cfg, eval_only=False)
    assert len(reads) == 16


def test_without_a_cache_folder_everything_is_read_again(cfg, tmp_path, reads):
    (tmp_path / "cache").write_text("a file in the way")
    for _ in range(2):
        check_run(cfg, eval_only=False)
    assert len(reads) == 16
