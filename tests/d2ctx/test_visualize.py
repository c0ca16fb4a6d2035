"""Pictures of a run: what the three panels show, which images are drawn, and errors."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from PIL import Image
from pycocotools import mask as coco_mask

from d2ctx.visualize import GAP, main, write_pictures

from .toy_coco import ToySet, toy_config, write_toy

pytestmark = pytest.mark.usefixtures("isolated")
WIDTH, HEIGHT = 480, 320  # wide enough to be drawn pixel by pixel
TRUTH, FOUND = (16, 16, 96, 64), (320, 192, 96, 64)  # x, y, width, height, far from each other


def polygon(box: tuple[int, int, int, int]) -> list[list[int]]:
    x, y, width, height = box
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def rle(box: tuple[int, int, int, int]) -> dict:
    encoded = coco_mask.frPyObjects(polygon(box), HEIGHT, WIDTH)[0]
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def data_set(folder: Path, *, images: int = 1, segmentation: object = None) -> ToySet:
    """Grey images with one object each, at TRUTH."""
    toy = write_toy(folder / "data", "toy_val", images=images)
    for image in toy.images:
        image.update(width=WIDTH, height=HEIGHT)
        pixels = np.full((HEIGHT, WIDTH, 3), 127, np.uint8)
        Image.fromarray(pixels).save(toy.image_root / image["file_name"])
    for annotation in toy.annotations:
        annotation.update(bbox=list(TRUTH), segmentation=segmentation or polygon(TRUTH))
    toy.save()
    return toy


def evaluated_run(toy: ToySet, detections: Sequence[dict] = ()) -> Path:
    """The output folder of an evaluation that found `detections`."""
    run = toy.json_file.parent.parent / "run"
    folder = run / "inference" / toy.name
    folder.mkdir(parents=True)
    (folder / "coco_instances_results.json").write_text(json.dumps(detections))
    (run / "config.yaml").write_text(toy_config(train=[], test=[toy], output=run).dump())
    return run


def detection(score: float, **changes: object) -> dict:
    """An object of the first image, at FOUND."""
    found = {"image_id": 1, "category_id": 2, "bbox": list(FOUND), "segmentation": rle(FOUND)}
    return {**found, "score": score, **changes}


def panels(picture: Path) -> list[np.ndarray]:
    """Input, ground truth and detections."""
    pixels = np.asarray(Image.open(picture))
    width, rest = divmod(pixels.shape[1] - 2 * GAP, 3)
    assert rest == 0
    return [pixels[:, start : start + width] for start in range(0, 3 * width, width + GAP)]


def drawn_at(panel: np.ndarray, box: tuple[int, int, int, int], *, of: np.ndarray) -> bool:
    """Whether every pixel inside `box` differs from the input."""
    x, y, width, height = box
    inside = np.s_[y + 4 : y + height - 4, x + 4 : x + width - 4]
    return bool((panel[inside] != of[inside]).any(axis=-1).all())


# ---- panels ----------------------------------------------------------------------------------
@pytest.mark.parametrize(("size", "shown"), [((32, 24), (400, 300)), ((480, 40), (480, 40))])
def test_panels_have_one_size_and_narrow_images_are_enlarged(tmp_path, size, shown):
    toy = write_toy(tmp_path / "data", "toy_val", images=1)
    Image.new("RGB", size).save(toy.image_root / toy.images[0]["file_name"])
    toy.images[0].update(width=size[0], height=size[1])
    toy.save()
    (picture,) = write_pictures(evaluated_run(toy))
    assert Image.open(picture).size == (3 * shown[0] + 2 * GAP, shown[1])
    assert [panel.shape[1::-1] for panel in panels(picture)] == [shown] * 3


def test_first_panel_is_the_image(tmp_path):
    (picture,) = write_pictures(evaluated_run(data_set(tmp_path)))
    assert (panels(picture)[0] == 127).all()


@pytest.mark.parametrize("segmentation", [polygon(TRUTH), rle(TRUTH)], ids=["polygon", "rle"])
def test_second_panel_shows_the_ground_truth(tmp_path, segmentation):
    run = evaluated_run(data_set(tmp_path, segmentation=segmentation), [detection(0.9)])
    image, truth, _ = panels(*write_pictures(run))
    assert drawn_at(truth, TRUTH, of=image)
    assert not drawn_at(truth, FOUND, of=image)


def test_third_panel_shows_the_detections(tmp_path):
    image, _, found = panels(*write_pictures(evaluated_run(data_set(tmp_path), [detection(0.9)])))
    assert drawn_at(found, FOUND, of=image)
    assert not drawn_at(found, TRUTH, of=image)


def test_detections_without_masks_are_outlined(tmp_path):
    boxed = detection(0.9)
    del boxed["segmentation"]
    image, _, found = panels(*write_pictures(evaluated_run(data_set(tmp_path), [boxed])))
    x, y, width, height = FOUND
    edge = np.s_[y + height // 2, x - 2 : x + 3]
    assert (found[edge] != image[edge]).any()
    assert not drawn_at(found, FOUND, of=image)


def test_holes_of_a_mask_stay_open(tmp_path):
    x, y, width, height = FOUND
    hole = (x + 32, y + 16, 32, 32)
    mask = coco_mask.decode(rle(FOUND)) - coco_mask.decode(rle(hole))
    encoded = coco_mask.encode(np.asfortranarray(mask))
    ring = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    run = evaluated_run(data_set(tmp_path), [detection(0.9, segmentation=ring)])
    image, _, found = panels(*write_pictures(run))
    middle = np.s_[hole[1] + 4 : hole[1] + 8, hole[0] + 4 : hole[0] + 28]
    assert (found[middle] == image[middle]).all()
    assert drawn_at(found, (x, y, 24, height), of=image)


def test_detections_below_the_least_score_are_not_drawn(tmp_path):
    run = evaluated_run(data_set(tmp_path), [detection(0.49)])
    image, _, found = panels(*write_pictures(run, min_score=0.5))
    assert (found == image).all()
    image, _, found = panels(*write_pictures(run, min_score=0.49))
    assert drawn_at(found, FOUND, of=image)


def test_no_detection_at_all_leaves_the_third_panel_bare(tmp_path):
    image, _, found = panels(*write_pictures(evaluated_run(data_set(tmp_path))))
    assert (found == image).all()


def test_colours_of_a_data_set_are_used(tmp_path):
    run = evaluated_run(data_set(tmp_path), [detection(0.9)])
    MetadataCatalog.get("toy_val").thing_colors = [(0, 0, 0), (255, 0, 0), (0, 0, 0)]
    _, _, found = panels(*write_pictures(run))
    x, y, _, _ = FOUND
    red, green, blue = found[y + 8, x + 8].astype(int)
    assert red > 200 > green == blue


# ---- which images ----------------------------------------------------------------------------
def test_more_pictures_than_images_gives_every_image_once(tmp_path):
    pictures = write_pictures(evaluated_run(data_set(tmp_path, images=3)), num=9)
    assert [path.name for path in pictures] == [f"toy_val_{i}.png" for i in (1, 2, 3)]
    assert all(path.is_file() for path in pictures)


def test_fewer_pictures_are_spread_over_the_set(tmp_path):
    pictures = write_pictures(evaluated_run(data_set(tmp_path, images=5)), num=3)
    assert [path.name for path in pictures] == [f"toy_val_{i}.png" for i in (1, 3, 5)]


def test_images_of_equal_name_in_two_folders_give_two_pictures(tmp_path):
    toy = data_set(tmp_path, images=2)
    for folder, image in zip(("a", "b"), toy.images, strict=True):
        (toy.image_root / folder).mkdir()
        (toy.image_root / image["file_name"]).rename(toy.image_root / folder / "1.jpg")
        image["file_name"] = f"{folder}/1.jpg"
    toy.save()
    pictures = write_pictures(evaluated_run(toy))
    assert sorted(path.name for path in pictures) == ["a_1.png", "b_1.png"]


# ---- command line ----------------------------------------------------------------------------
def test_command_draws_a_trained_run(finished, tmp_path, capsys):
    run = shutil.copytree(finished.output, tmp_path / "run")
    assert main([str(run), "--num", "1", "--min-score", "0"]) == 0
    image, _, found = panels(run / "pictures" / "toy_val_1.png")
    assert (found != image).any()
    assert "wrote 1 picture" in capsys.readouterr().out


def no_run(folder: Path) -> list[str]:
    return [str(folder / "none")]


def not_evaluated(folder: Path) -> list[str]:
    run = evaluated_run(data_set(folder))
    (run / "inference" / "toy_val" / "coco_instances_results.json").unlink()
    return [str(run)]


def other_data_set(folder: Path) -> list[str]:
    return [str(evaluated_run(data_set(folder))), "--dataset", "toy_train"]


def no_test_set(folder: Path) -> list[str]:
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(toy_config(train=[], test=[], output=run).dump())
    return [str(run)]


def no_picture(folder: Path) -> list[str]:
    return [str(evaluated_run(data_set(folder))), "--num", "0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (no_run, "expected a training run's output folder"),
        (not_evaluated, "expected a run evaluated on toy_val"),
        (other_data_set, "expected a run evaluated on toy_train"),
        (no_test_set, "DATASETS.TEST is empty"),
        (no_picture, "--num must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path, capsys, arguments, message):
    assert main(arguments(tmp_path)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
