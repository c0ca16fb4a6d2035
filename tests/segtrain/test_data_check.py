import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from segtrain.config.data import DataConfig, FolderConfig
from segtrain.data.check import check_config, check_layout, raise_errors
from segtrain.data.datasets import cityscapes, named_layout
from segtrain.errors import UserError
from tests.segtrain.data_samples import DATA, folder_set, needs_data, save

RNG = np.random.default_rng(0)


def checked(root, *, dataset="folder", splits=("train", "val"), decode=True, **options):
    layout = named_layout(dataset, root, FolderConfig.model_validate(options))
    return check_layout(layout, splits, decode=decode)


def kinds(report):
    return [error.kind for error in report.errors]


def mended(report, root, number=0):
    """Takes the proposed YAML at its word, and checks again."""
    proposal = yaml.safe_load(report.guesses[number].yaml)["data"]
    options = proposal.get("folder", {})
    return checked(root, dataset=proposal.get("dataset", "folder"), **options)


def test_a_sound_set_has_nothing_to_mend(tmp_path):
    seen = []
    layout = named_layout("folder", folder_set(tmp_path, [[[0, 1, 2, 255]]] * 3))
    reports = check_layout(layout, ["train"], progress=lambda *count: seen.append(count))
    assert [(r.split, r.errors, r.notes, r.guesses) for r in reports] == [("train", [], [], [])]
    assert (reports[0].pixels, reports[0].presence, reports[0].ignored) == ([3] * 3, [3] * 3, 3)
    assert seen == [(1, 3), (2, 3), (3, 3)]


@needs_data
@pytest.mark.parametrize(
    ("dataset", "root", "split"),
    [
        ("camvid", "camvid", "val"),
        ("ade20k", "samples/ADEChallengeData2016", "val"),
        ("lip", "samples/LIP", "train"),
        ("cityscapes", "panoptic/cityscapes_sample", "val"),
    ],
)
def test_real_samples_are_sound_under_their_own_convention(dataset, root, split):
    (report,) = checked(DATA / root, dataset=dataset, splits=[split])
    assert (report.errors, report.guesses) == ([], [])
    assert sum(report.pixels) > 0


# --- conventions ---------------------------------------------------------------------------------


def real(tmp_path, images, labels, classes):
    """Real samples copied into the folder layout, both splits alike but for the images' names."""
    for split in ("train", "val"):
        for k, (image, label) in enumerate(zip(images, labels, strict=True)):
            for kind, path in (("images", image), ("masks", label)):
                target = tmp_path / kind / split / f"{k}{path.suffix}"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
    (tmp_path / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    return tmp_path


def camvid_files(count=6):
    names = sorted((DATA / "camvid/trainannot").iterdir())[:count]
    return [DATA / "camvid/train" / f"{p.stem}.jpg" for p in names], names


@needs_data
def test_camvid_as_a_folder_lacks_its_void(tmp_path):
    classes = named_layout("camvid", tmp_path).classes.names
    root = real(tmp_path, *camvid_files(), classes)
    report = checked(root)[0]
    assert kinds(report) == ["values"]
    assert "unknown value 11 in 6 of 6 label maps" in report.errors[0].text
    assert len(report.errors[0].files) == 6
    assert any("as 11 does in CamVid" in guess.text for guess in report.guesses)
    number = next(k for k, g in enumerate(report.guesses) if "CamVid" in g.text)
    assert mended(report, root, number)[0].errors == []


@needs_data
def test_ade_as_a_folder_counts_from_one(tmp_path):
    base = DATA / "samples/ADEChallengeData2016"
    images, labels = (
        sorted((base / kind / "validation").iterdir()) for kind in ("images", "annotations")
    )
    # Their largest value is 103; with 103 names, the file that holds it betrays the shift.
    root = real(tmp_path, images, labels, [f"c{k}" for k in range(103)])
    report = checked(root)[0]
    assert "unknown value 103 in 1 of 3 label maps" in report.errors[0].text
    assert "counted from 1, 0 is other" in report.guesses[0].text
    assert mended(report, root)[0].errors == []


@needs_data
def test_cityscapes_label_ids_in_a_folder(tmp_path):
    base = DATA / "panoptic/cityscapes_sample"
    images = [next(base.rglob("*_leftImg8bit.png"))]
    labels = [next(base.rglob("*_labelIds.png"))]
    root = real(tmp_path, images, labels, [name for name, _, _ in cityscapes.CLASSES])
    report = checked(root)[0]
    assert "unknown values 20, 21, 23, 24, 26" in report.errors[0].text
    assert "look like Cityscapes labelIds, not trainIds" in report.guesses[0].text
    assert report.guesses[0].yaml == "data:\n  dataset: cityscapes"
    assert mended(report, root, 1)[0].errors == []


@needs_data
def test_cityscapes_instance_ids(tmp_path):
    base = DATA / "panoptic/cityscapes_sample"
    images = [next(base.rglob("*_leftImg8bit.png"))]
    labels = [next(base.rglob("*_instanceIds.png"))]
    report = checked(real(tmp_path, images, labels, "abc"))[0]
    assert "unknown values 3, 4, 7" in report.errors[0].text
    assert "instance ids (class * 1000 + n)" in report.guesses[0].text


@needs_data
def test_train_ids_under_the_name_of_label_ids(tmp_path):
    base = DATA / "panoptic/cityscapes_sample"
    image, label = next(base.rglob("*_leftImg8bit.png")), next(base.rglob("*_labelTrainIds.png"))
    (tmp_path / "leftImg8bit/val/a").mkdir(parents=True)
    (tmp_path / "gtFine/val/a").mkdir(parents=True)
    shutil.copy(image, tmp_path / "leftImg8bit/val/a/a_leftImg8bit.png")
    shutil.copy(label, tmp_path / "gtFine/val/a/a_gtFine_labelIds.png")
    (report,) = checked(tmp_path, dataset="cityscapes", splits=["val"])
    assert kinds(report) == ["suspicious"]
    assert "look like Cityscapes train ids" in report.errors[0].text


@needs_data
def test_voc_palette_saved_as_colours(tmp_path):
    base = DATA / "samples/VOC_labelme"
    labels = sorted((base / "SegmentationClass").iterdir())
    images = [base / "JPEGImages" / f"{p.stem}.jpg" for p in labels]
    classes = (base / "class_names.txt").read_text().split("\n")[:21]
    root = real(tmp_path, images, labels, classes)
    assert checked(root)[0].errors == []  # as indices they are fine
    for path in (root / "masks").rglob("*.png"):
        Image.open(path).convert("RGB").save(path)
    report = checked(root)[0]
    assert kinds(report) == ["channels"]
    assert "of mode RGB, expected one channel of class numbers" in report.errors[0].text
    assert "PASCAL VOC's palette" in report.guesses[0].text
    again = mended(report, root)[0]
    assert again.errors == []
    assert again.presence[0] == 3


@needs_data
def test_camvid_in_its_colours(tmp_path):
    layout = named_layout("camvid", DATA / "camvid")
    root = real(tmp_path, *camvid_files(2), layout.classes.names)
    for path in (root / "masks").rglob("*.png"):
        labels = layout.decode(np.array(Image.open(path)))
        Image.fromarray(layout.classes.paint(labels)).save(path)
    report = checked(root)[0]
    assert "the colours of CamVid" in [g.text for g in report.guesses][0]
    again = mended(report, root)[0]
    assert again.errors == []
    own = checked(DATA / "camvid", dataset="camvid", splits=["train"])[0]
    assert [k for k, n in enumerate(again.presence) if n and not own.presence[k]] == []


def test_cityscapes_colours(tmp_path):
    colours = np.array([c for _, _, c in cityscapes.CLASSES] + [(0, 0, 0)], np.uint8)
    root = folder_set(tmp_path, [colours[RNG.integers(0, 20, (8, 9))]])
    report = checked(root)[0]
    assert "the colours of Cityscapes" in report.guesses[0].text
    again = mended(report, root)
    assert all(r.errors == [] for r in again)
    assert len(again[0].pixels) == 19


@pytest.mark.parametrize(
    ("mask", "classes", "text"),
    [
        ([[0, 255]], ("a", "b"), "0 and 255 only: a binary mask"),
        ([[1, 2, 3]], ("a", "b", "c"), "counted from 1, 0 does not occur"),
        ([[0, 80, 160]], ("a", "b", "c"), "classes spread over the greys"),
        ([[3, 7, 9]], ("a", "b", "c"), "as many values as classes, 3, 7, 9"),
        ([[0, 1, 255]], ("a", "b"), "255 is usual for pixels without a label"),
    ],
)
def test_guesses_mend_what_they_explain(tmp_path, mask, classes, text):
    root = folder_set(tmp_path, [mask], classes=classes)
    report = checked(root, ignore=[])[0]
    assert kinds(report) == ["values"]
    assert text in report.guesses[0].text
    again = mended(report, root)[0]
    assert again.errors == []
    assert again.presence == [1] * len(classes)


@pytest.mark.parametrize(
    ("mask", "classes", "text"),
    [
        (np.arange(0, 256, 5)[None], ("a", "b"), "a binary mask with smooth edges"),
        ([[0, 1, 7]], ("a", "b"), "values up to 7 need 8 classes, 2 are named"),
        (RNG.integers(0, 256, (40, 40, 3)), ("a", "b"), "hundreds of colours: photographs"),
    ],
)
def test_guesses_where_files_or_names_must_change(tmp_path, mask, classes, text):
    report = checked(folder_set(tmp_path, [mask], classes=classes))[0]
    assert report.errors
    assert text in report.guesses[0].text


def test_grey_saved_as_rgb(tmp_path):
    mask = np.repeat(np.array([[0, 1, 2]])[..., None], 3, -1)
    root = folder_set(tmp_path, [mask])
    report = checked(root)[0]
    assert "grey saved as RGB" in report.guesses[-1].text
    number = len(report.guesses) - 1
    assert mended(report, root, number)[0].pixels == [1, 1, 1]


def test_lossy_masks(tmp_path):
    root = folder_set(tmp_path, [RNG.integers(0, 3, (16, 16))], suffix=".jpg")
    report = checked(root)[0]
    lossy = next(error for error in report.errors if error.kind == "lossy")
    assert "1 label map saved as JPEG, which changes values" in lossy.text
    assert lossy.text.endswith("write them again as PNG")


def test_numbers_where_colours_were_expected(tmp_path):
    report = checked(folder_set(tmp_path, [[[0, 1]]]), palette={"a": [0, 0, 0]}, classes=["a"])[0]
    assert "of mode L, expected colours, as palette says" in report.errors[0].text


def test_numbering_from_one_is_noted_where_every_value_is_known(tmp_path):
    root = folder_set(tmp_path, [[[1, 2, 3]]], classes=("a", "b", "c"))
    report = checked(root, ignore=[3, 255])[0]
    assert report.errors == []
    assert any("numbered from 1" in note for note in report.notes)


# --- files ---------------------------------------------------------------------------------------


def test_everything_wrong_with_files_is_listed(tmp_path):
    root = folder_set(tmp_path, [np.zeros((8, 8))] * 5)
    noise = save(root / "images/train/0.png", RNG.integers(0, 255, (64, 64, 3)))
    noise.write_bytes(noise.read_bytes()[:3000])  # the header is whole, the pixels are not
    (root / "masks/train/1.png").unlink()
    save(root / "masks/train/2.png", np.zeros((4, 8)))
    (root / "masks/train/3.png").write_text("no picture")
    (root / "README.txt").write_bytes(b"\xff notes")
    save(root / "masks/train/extra.png", np.zeros((8, 8)))
    report = checked(root)[0]
    assert kinds(report) == ["unreadable", "size", "unpaired"]
    text = report.errors[0].text
    assert text.startswith("3 files missing or unreadable")
    assert "truncated" in text
    assert f"no file {root / 'masks/train/1.png'}" in text
    assert len(report.errors[0].files) == 3
    sizes = next(e for e in report.errors if e.kind == "size")
    assert sizes.text.startswith("1 label map of another size than the image: ")
    assert "2.png: 8x4 for 8x8; write them at the image's size" in sizes.text
    assert report.errors[-1].files == (str(root / "masks/train/extra.png"),)
    assert checked(root)[1].errors == []


def test_files_that_training_could_not_read_are_found_before(tmp_path):
    root = folder_set(tmp_path, [np.zeros((2, 3))] * 2)
    Image.fromarray(np.zeros((2, 3), np.uint16)).save(root / "images/train/0.png")
    (root / "masks/train/1.png").unlink()
    Image.fromarray(np.zeros((2, 3), np.float32)).save(root / "masks/train/1.tif")
    for decode in (True, False):
        (error,) = checked(root, decode=decode)[0].errors
        assert "expected an image of 8 bits per channel, got mode I;16" in error.text
        assert "1.tif: expected whole numbers, got mode F" in error.text


def test_headers_see_sizes_but_not_values(tmp_path):
    root = folder_set(tmp_path, [[[0, 77]]])
    save(root / "masks/val/0.png", np.zeros((3, 3)))
    train, val = checked(root, decode=False)
    assert (train.errors, train.pixels) == ([], [])
    assert kinds(val) == ["size"]


def test_absent_classes_and_empty_maps_are_noted(tmp_path):
    report = checked(folder_set(tmp_path, [[[0, 1]], [[255, 255]]]))[0]
    assert report.notes[0] == "1 class without a pixel: c"
    assert "1 label map with nothing but ignored pixels" in report.notes[1]
    assert report.errors == []


def test_an_image_of_both_splits(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / f"images/{name}.png", np.zeros((2, 2, 3)))
        save(tmp_path / f"masks/{name}.png", np.zeros((2, 2)))
    (tmp_path / "train.txt").write_text("a\nb\n")
    (tmp_path / "val.txt").write_text("b\n")
    save(tmp_path / "masks/unlisted.png", np.zeros((2, 2)))  # lists may leave out what they like
    train, val = checked(tmp_path, classes=["only"])
    assert train.errors == []
    assert kinds(val) == ["overlap"]
    assert "1 image in train as well" in val.errors[0].text


# --- before training -----------------------------------------------------------------------------


def config(root, **keys):
    return DataConfig(dataset="folder", root=str(root), crop=(8, 8), base_size=(8, 8), **keys)


def test_one_problem_is_one_line_that_names_the_likely_cause(tmp_path):
    root = folder_set(tmp_path, [[[0, 255]]], classes=("a", "b"))
    folder = FolderConfig(ignore=())
    with pytest.raises(UserError) as caught:
        raise_errors(checked(root, ignore=[])[:1])
    assert str(caught.value).count("\n") == 0
    assert "data, train: unknown value 255 in 1 of 1 label map" in str(caught.value)
    assert "likely: 0 and 255 only: a binary mask" in str(caught.value)
    with pytest.raises(UserError, match="2 things to mend in the data") as caught:
        check_config(config(root, folder=folder))
    assert str(caught.value).count("\n") == 2
    assert check_config(config(root, folder=folder, check="off")) == []
    assert len(check_config(config(root, folder=folder, check="headers"))) == 2
