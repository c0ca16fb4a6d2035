"""Pictures of a run: what the panels show, which images are drawn, and errors."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from PIL import Image
from pycocotools import mask as coco_mask

from d2ctx.errors import UserError
from d2ctx.evaluation.panoptic_files import write_ids
from d2ctx.evaluation.panoptic_quality import count_image
from d2ctx.picture import CAPTION, GAP, MISSED, OPACITY, RIGHT, WRONG
from d2ctx.visualize import main, write_pictures
from d2ctx.visualize_match import Object, compare_objects, compare_segments
from d2ctx.visualize_panoptic import STRIPE, PanopticPictures

from .toy_coco import ToySet, toy_config, write_toy
from .toy_panoptic import (
    CATEGORIES,
    IDS,
    panoptic_config,
    panoptic_ids,
    segments_of,
    write_panoptic,
)
from .toy_panoptic import HEIGHT as SMALL_HEIGHT
from .toy_panoptic import WIDTH as SMALL_WIDTH

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


def panels(picture: Path, *, count: int = 4) -> list[np.ndarray]:
    """Input, ground truth, detections and differences, without their captions."""
    pixels = np.asarray(Image.open(picture))[CAPTION:]
    width, rest = divmod(pixels.shape[1] - (count - 1) * GAP, count)
    assert rest == 0
    starts = range(0, count * (width + GAP), width + GAP)
    return [pixels[:, start : start + width] for start in starts]


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
    assert Image.open(picture).size == (4 * shown[0] + 3 * GAP, shown[1] + CAPTION)
    assert [panel.shape[1::-1] for panel in panels(picture)] == [shown] * 4


def test_first_panel_is_the_image(tmp_path):
    (picture,) = write_pictures(evaluated_run(data_set(tmp_path)))
    assert (panels(picture)[0] == 127).all()


@pytest.mark.parametrize("segmentation", [polygon(TRUTH), rle(TRUTH)], ids=["polygon", "rle"])
def test_second_panel_shows_the_ground_truth(tmp_path, segmentation):
    run = evaluated_run(data_set(tmp_path, segmentation=segmentation), [detection(0.9)])
    image, truth, _, _ = panels(*write_pictures(run))
    assert drawn_at(truth, TRUTH, of=image)
    assert not drawn_at(truth, FOUND, of=image)


def test_third_panel_shows_the_detections(tmp_path):
    image, _, found, _ = panels(
        *write_pictures(evaluated_run(data_set(tmp_path), [detection(0.9)]))
    )
    assert drawn_at(found, FOUND, of=image)
    assert not drawn_at(found, TRUTH, of=image)


def test_detections_without_masks_are_outlined(tmp_path):
    boxed = detection(0.9)
    del boxed["segmentation"]
    image, _, found, _ = panels(*write_pictures(evaluated_run(data_set(tmp_path), [boxed])))
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
    image, _, found, _ = panels(*write_pictures(run))
    middle = np.s_[hole[1] + 4 : hole[1] + 8, hole[0] + 4 : hole[0] + 28]
    assert (found[middle] == image[middle]).all()
    assert drawn_at(found, (x, y, 24, height), of=image)


def test_detections_below_the_least_score_are_not_drawn(tmp_path):
    run = evaluated_run(data_set(tmp_path), [detection(0.49)])
    image, _, found, _ = panels(*write_pictures(run, min_score=0.5))
    assert (found == image).all()
    image, _, found, _ = panels(*write_pictures(run, min_score=0.49))
    assert drawn_at(found, FOUND, of=image)


def test_no_detection_at_all_leaves_the_third_panel_bare(tmp_path):
    image, _, found, _ = panels(*write_pictures(evaluated_run(data_set(tmp_path))))
    assert (found == image).all()


def test_colours_of_a_data_set_are_used(tmp_path):
    run = evaluated_run(data_set(tmp_path), [detection(0.9)])
    MetadataCatalog.get("toy_val").thing_colors = [(0, 0, 0), (255, 0, 0), (0, 0, 0)]
    _, _, found, _ = panels(*write_pictures(run))
    x, y, _, _ = FOUND
    red, green, blue = found[y + 8, x + 8].astype(int)
    assert red > 200 > green == blue


# ---- what differs ----------------------------------------------------------------------------
def over_grey(color: tuple[int, int, int]) -> np.ndarray:
    return OPACITY * np.array(color) + (1 - OPACITY) * 127


def has_color(panel: np.ndarray, box: tuple[int, int, int, int], color: tuple) -> bool:
    """Whether most of a box is of one colour over grey."""
    x, y, width, height = box
    inside = panel[y + 4 : y + height - 4, x + 4 : x + width - 4]
    return bool((np.abs(inside - over_grey(color)).max(axis=-1) < 8).mean() > 0.5)


def test_fourth_panel_shows_what_is_right_wrong_and_missed(tmp_path):
    found = [detection(0.9), detection(0.8, bbox=list(TRUTH), segmentation=rle(TRUTH))]
    toy = data_set(tmp_path)
    toy.annotations[0]["category_id"] = 2
    toy.save()
    *_, differences = panels(*write_pictures(evaluated_run(toy, found)))
    assert has_color(differences, TRUTH, RIGHT)
    assert has_color(differences, FOUND, WRONG)


def test_an_object_that_was_not_found_is_blue(tmp_path):
    *_, differences = panels(*write_pictures(evaluated_run(data_set(tmp_path))))
    assert has_color(differences, TRUTH, MISSED)


def test_a_data_set_without_annotations_has_two_panels(tmp_path):
    toy = data_set(tmp_path)
    run = evaluated_run(toy, [detection(0.9)])
    del toy.content["annotations"]
    toy.save()
    image, found = panels(*write_pictures(run), count=2)
    assert drawn_at(found, FOUND, of=image)


def objects(*specs: tuple) -> list[Object]:
    """Of (class, x, y, side) and what else an object has."""
    return [
        Object(c, np.array([x, y, x + side, y + side], float), *more)
        for c, x, y, side, *more in specs
    ]


def test_best_scores_choose_first_and_every_object_is_matched_once():
    truth = objects((0, 0, 0, 10))
    found = objects((0, 0, 1, 10, None, 0.5), (0, 0, 2, 10, None, 0.9))
    result = compare_objects(truth, found)
    assert (result.right, result.wrong, result.missed) == ((1,), (0,), ())


def test_the_class_must_be_the_same_and_the_overlap_half():
    truth = objects((0, 0, 0, 10), (1, 50, 0, 10))
    found = objects((1, 0, 0, 10, None, 0.9), (1, 50, 4, 10, None, 0.9))
    result = compare_objects(truth, found)
    assert (result.right, result.wrong, result.missed) == ((), (0, 1), (0, 1))


def test_a_detection_takes_the_object_that_it_overlaps_most():
    truth = objects((0, 0, 3, 10), (0, 0, 0, 10))
    found = objects((0, 0, 1, 10, None, 0.9), (0, 0, 3, 10, None, 0.8))
    assert compare_objects(truth, found).right == (0, 1)
    assert compare_objects(truth, found[:1]).missed == (0,)


def test_detections_on_a_crowd_are_neither_right_nor_wrong():
    truth = objects((0, 0, 0, 100, None, None, True))
    found = objects(
        (0, 40, 40, 10, None, 0.9), (1, 40, 40, 10, None, 0.9), (0, 95, 95, 10, None, 1)
    )
    result = compare_objects(truth, found)
    assert (result.right, result.wrong, result.missed) == ((), (1, 2), ())


def test_masks_decide_where_all_have_one():
    full, half = np.ones((20, 20), np.uint8), np.zeros((20, 20), np.uint8)
    half[:8] = 1
    truth = objects((0, 0, 0, 20, full))
    assert compare_objects(truth, objects((0, 0, 0, 20, half, 0.9))).wrong == (0,)
    assert compare_objects(truth, objects((0, 0, 0, 20, None, 0.9))).right == (0,)


def test_nothing_at_all_is_compared():
    assert compare_objects([], []).missed == ()
    assert compare_objects(objects((0, 0, 0, 9)), []).missed == (0,)
    assert compare_objects([], objects((0, 0, 0, 9, None, 0.9))).wrong == (0,)


# ---- panoptic --------------------------------------------------------------------------------
def random_segments(seed: int) -> tuple[np.ndarray, list[dict]]:
    """Blocks of up to nine ids, void among them, of three categories, some of them crowds."""
    generator = np.random.default_rng(seed)
    ids = np.kron(generator.integers(0, 10, (3, 3)), np.ones((4, 5), np.int64))
    ids[generator.random(ids.shape) < 0.2] = generator.integers(0, 10)
    numbers = [int(i) for i in np.unique(ids) if i]
    segments = [
        {
            "id": i,
            "category_id": i % 3 + 1,
            "area": int((ids == i).sum()),
            "iscrowd": int(generator.random() < 0.2),
        }
        for i in numbers
    ]
    for category in (1, 2, 3):  # of several crowds of a category, the official code counts one
        crowds = [s for s in segments if s["category_id"] == category and s["iscrowd"]]
        for extra in crowds[:-1]:
            extra["iscrowd"] = 0
    return ids, segments


@pytest.mark.parametrize("seed", range(20))
def test_segments_match_as_in_panoptic_quality(seed):
    truth_ids, truth = random_segments(seed)
    ids, predicted = random_segments(100 + seed)
    ids = np.where(np.random.default_rng(seed).random(ids.shape) < 0.7, truth_ids, ids)
    predicted = [{"id": int(i), "category_id": int(i) % 3 + 1} for i in np.unique(ids) if i]
    counts = count_image(
        truth_ids=truth_ids,
        predicted_ids=ids,
        truth=truth,
        predicted=predicted,
        categories=[1, 2, 3],
    ).values()
    matches, result = compare_segments(truth_ids, ids, truth, predicted)
    assert len(matches) == len(result.right) == sum(c.tp for c in counts)
    assert len(result.wrong) == sum(c.fp for c in counts)
    assert len(result.missed) == sum(c.fn for c in counts)


def predicted_ids() -> np.ndarray:
    """Sky, also over the crowd; the star; of the ground too little, the rest taken for sky."""
    ids = panoptic_ids()
    ids[:16] = IDS[4]
    ids[16:, 14:][ids[16:, 14:] == IDS[9]] = 5
    ids[16:, :2] = IDS[9]  # over void
    return ids


def panoptic_run(folder: Path, *, images: int = 1) -> Path:
    """The output folder of a panoptic evaluation."""
    toy = write_panoptic(folder / "data", images=images)
    run = folder / "run"
    cfg = panoptic_config(
        train=[], test=[toy.name], output=run, COCO_PANOPTIC={toy.name: toy.entry()}
    )
    root = run / "inference" / toy.name / "panoptic_predictions"
    root.mkdir(parents=True)
    ids = predicted_ids()
    segments = segments_of(ids, crowd=0)
    segments.append({"id": 5, "category_id": 4, "area": int((ids == 5).sum())})
    listed = []
    for number in range(1, images + 1):
        write_ids(root / f"{number:012d}.png", ids)
        name = f"{number:012d}.png"
        listed.append({"image_id": number, "file_name": name, "segments_info": segments})
    content = {"annotations": listed, "categories": CATEGORIES}
    root.with_suffix(".json").write_text(json.dumps(content))
    (run / "config.yaml").write_text(cfg.dump())
    return run


def test_panoptic_runs_are_drawn_by_themselves(tmp_path):
    run = panoptic_run(tmp_path, images=2)
    paths = write_pictures(run)
    assert [p.relative_to(run / "pictures").as_posix() for p in paths] == [
        "panoptic/toy_panoptic_1.png",
        "panoptic/toy_panoptic_2.png",
    ]
    image, truth, found, differences = panels(paths[0])
    assert image.shape[1] == 400
    for panel in (truth, found, differences):
        assert (panel != image).any()


def over(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return ((1 - OPACITY) * image + OPACITY * np.array(color)).astype(np.uint8)


def test_panoptic_differences_pixel_by_pixel(tmp_path, monkeypatch):
    monkeypatch.setattr("d2ctx.picture.MIN_WIDTH", 1)
    run = panoptic_run(tmp_path)
    (path,) = write_pictures(run)
    image, truth, found, differences = panels(path)
    assert image.shape == (SMALL_HEIGHT, SMALL_WIDTH, 3)
    sky, star = np.s_[1:3, 30:45], np.s_[20:28, 22:38]
    assert (differences[sky] == over(image[sky], RIGHT)).all()
    assert (differences[star] == over(image[star], RIGHT)).all()
    crowd = np.s_[5:10, 10:20]
    assert (differences[crowd] == image[crowd]).all()
    void = np.s_[2:14, 0]
    assert (differences[void] == image[void]).all()
    assert (truth[void] == image[void]).all()
    assert (differences[16:, 0] == image[16:, 0]).all()
    assert (found[31, 0] == over(image[31, 0], (0, 200, 0))).all()  # the last row, below the name


def test_wrong_over_missed_is_striped(tmp_path, monkeypatch):
    monkeypatch.setattr("d2ctx.picture.MIN_WIDTH", 1)
    (path,) = write_pictures(panoptic_run(tmp_path))
    image, *_, differences = panels(path)
    y, columns = 16, range(3, 47)  # of the ground
    line, below = differences[y, 3:47], image[y, 3:47]
    blue = (line == over(below, MISSED)).all(-1)
    orange = (line == over(below, WRONG)).all(-1)
    assert (blue ^ orange).all()
    assert blue.tolist() == [(y + x) // STRIPE % 2 == 0 for x in columns]


def test_panoptic_pictures_name_what_is_absent_or_of_another_size(tmp_path):
    run = panoptic_run(tmp_path)
    pictures = PanopticPictures(
        run / "inference" / "toy_panoptic", MetadataCatalog.get("toy_panoptic")
    )
    image = np.zeros((SMALL_HEIGHT, SMALL_WIDTH, 3), np.uint8)
    with pytest.raises(UserError, match="image 9 has no panoptic prediction; evaluate"):
        pictures.draw(image, 9)
    with pytest.raises(UserError, match=r"prediction of image 1 is 48x32, the image 48x31; write"):
        pictures.draw(image[1:], 1)


def test_panoptic_data_without_annotations_has_two_panels(tmp_path):
    run = panoptic_run(tmp_path)
    metadata = MetadataCatalog.get("toy_panoptic")
    content = json.loads(Path(metadata.panoptic_json).read_text())
    del content["annotations"]
    Path(metadata.panoptic_json).write_text(json.dumps(content))
    pictures = PanopticPictures(run / "inference" / "toy_panoptic", metadata)
    picture = pictures.draw(np.zeros((SMALL_HEIGHT, SMALL_WIDTH, 3), np.uint8), 1)
    assert picture.shape[1] == 2 * 400 + GAP


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
    image, _, found, _ = panels(run / "pictures" / "toy_val_1.png")
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


def not_panoptic(folder: Path) -> list[str]:
    return [str(evaluated_run(data_set(folder))), "--task", "panoptic"]


def no_picture(folder: Path) -> list[str]:
    return [str(evaluated_run(data_set(folder))), "--num", "0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (no_run, "expected a training run's output folder"),
        (not_evaluated, "expected a run evaluated on toy_val"),
        (other_data_set, "expected a run evaluated on toy_train"),
        (no_test_set, "DATASETS.TEST is empty"),
        (not_panoptic, "expected a run with panoptic predictions for toy_val"),
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
