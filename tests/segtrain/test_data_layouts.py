import csv
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from segtrain.config.data import FolderConfig
from segtrain.data.datasets import DATASETS, cityscapes, context, lip, named_layout
from segtrain.data.labels import (
    ClassSet,
    ColourEncoding,
    class_set,
    distinct_colours,
    from_mapping,
    identity,
    pack,
    ranges,
    reduce_zero,
    unpack,
)
from segtrain.data.reading import read_image, read_labels, read_stored
from segtrain.errors import UserError
from tests.segtrain.data_samples import DATA, folder_set, needs_data, save


def labels_of(dataset, root, split, index=0, options=None):
    layout = named_layout(dataset, root, options)
    sample = layout.samples(split)[index]
    return read_labels(layout, sample), read_stored(sample.label, colours=layout.encoding.colours)


# --- encodings -----------------------------------------------------------------------------------


def test_reduce_zero_of_every_byte():
    stored = np.arange(151, dtype=np.uint8)[None]
    decoded = reduce_zero(150).decode(np.append(stored, [[255]], axis=1).astype(np.uint8))
    assert decoded[0].tolist() == [255, *range(150), 255]
    assert decoded.dtype == np.uint8


def test_all_254_classes_keep_255():
    decoded = reduce_zero(254).decode(np.arange(256, dtype=np.uint8)[None])
    assert decoded[0].tolist() == [255, *range(254), 255]


def test_an_ignored_value_wins_over_a_class():
    assert identity(3, ignore=(1,)).decode(np.array([[0, 1, 2]])).tolist() == [[0, 255, 2]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_unknown_values_are_named_never_clipped(dtype):
    with pytest.raises(UserError, match=r"unknown values 3, 200; known: 0\.\.2, 255"):
        identity(3).decode(np.array([[0, 3, 200]], dtype))


def test_values_outside_a_byte_are_unknown():
    with pytest.raises(UserError, match="unknown value 24001;"):
        identity(3).decode(np.array([[0, 24001]], np.uint16))
    with pytest.raises(UserError, match="unknown value -1;"):
        identity(3).decode(np.array([[0, -1]], np.int32))


def test_many_unknown_values_are_counted():
    with pytest.raises(UserError, match="2, 3, 4, 5, 6, 7, 8, 9 and 245 more"):
        identity(2).decode(np.arange(255, dtype=np.uint8)[None])


def test_colours_are_looked_up_exactly():
    encoding = ColourEncoding((((0, 0, 0), 255), ((255, 1, 2), 1), ((9, 200, 0), 0)))
    picture = np.array([[[9, 200, 0], [255, 1, 2], [0, 0, 0]]], np.uint8)
    assert encoding.decode(picture).tolist() == [[0, 1, 255]]
    picture[0, 1, 2] = 3
    with pytest.raises(UserError, match=r"unknown colour \[255, 1, 3\]; 3 colours are known"):
        encoding.decode(picture)


def test_wrong_number_of_channels():
    with pytest.raises(UserError, match="expected a label map of one channel, got 3 channels"):
        identity(3).decode(np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(UserError, match="expected an RGB picture, got one channel"):
        ColourEncoding((((0, 0, 0), 0),)).decode(np.zeros((2, 2), np.uint8))


def test_packed_colours_come_back():
    colours = np.random.default_rng(0).integers(0, 256, (50, 3))
    assert [list(unpack(n)) for n in pack(colours).tolist()] == colours.tolist()


def test_distinct_colours_are_distinct_and_those_of_voc():
    colours = distinct_colours(256)
    assert len(set(colours)) == 256
    assert colours[:4] == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
    assert colours[255] == (224, 224, 192)


def test_ranges():
    assert ranges([255, 3, 1, 2, 7, 2]) == "1..3, 7, 255"


@pytest.mark.parametrize(
    ("names", "palette", "text"),
    [
        ((), (), "expected 1..255 classes, got 0"),
        (("a", "a"), ((0, 0, 0), (1, 1, 1)), "two classes are named 'a'"),
        (("a", "b"), ((0, 0, 0),), "a colour for each of 2 classes, got 1"),
    ],
)
def test_class_set_refuses(names, palette, text):
    with pytest.raises(UserError, match=text):
        ClassSet(names, palette)


def test_paint_leaves_void_black():
    painted = class_set(["a", "b"], [(1, 2, 3), (4, 5, 6)]).paint(np.array([[0, 1, 255]], np.uint8))
    assert painted.tolist() == [[[1, 2, 3], [4, 5, 6], [0, 0, 0]]]


# --- data sets -----------------------------------------------------------------------------------

COUNTS = {
    "cityscapes": 19,
    "ade20k": 150,
    "context59": 59,
    "context60": 60,
    "voc": 21,
    "lip": 20,
    "camvid": 11,
}


@pytest.mark.parametrize("name", DATASETS)
def test_layouts_have_their_classes_and_travel_to_workers(name, tmp_path):
    layout = named_layout(name, tmp_path)
    assert layout.name == name
    assert len(layout.classes) == COUNTS[name]
    assert len(set(layout.classes.palette)) == COUNTS[name]
    targets = {label for _, label in layout.encoding.classes} - {255}
    assert targets == set(range(COUNTS[name]))
    travelled = pickle.loads(pickle.dumps(layout))
    assert (travelled.encoding, travelled.classes) == (layout.encoding, layout.classes)


def test_cityscapes_ids_agree_with_the_official_table():
    official = pytest.importorskip("cityscapesscripts.helpers.labels")
    table = cityscapes.label_ids_encoding().table()
    for label in official.labels:
        # -1, the licence plate, is 255 in eight bits
        assert table[label.id % 256] == label.trainId % 256, label
        if 0 <= label.trainId < 255:
            assert cityscapes.CLASSES[label.trainId] == (label.name, label.id, label.color)


def test_cityscapes_ids_come_back():
    ids = np.array([cityscapes.LABEL_IDS], np.uint8)
    train_ids = cityscapes.label_ids_encoding().decode(ids)
    assert np.array(cityscapes.LABEL_IDS)[train_ids].tolist() == ids.tolist()


def test_cityscapes_extra_images_have_coarse_labels(tmp_path):
    for folder, end in (("leftImg8bit", "leftImg8bit"), ("gtCoarse", "gtCoarse_labelIds")):
        place = tmp_path / folder / "train_extra/bonn"
        place.mkdir(parents=True)
        save(place / f"bonn_000001_000019_{end}.png", np.full((4, 6), 7))
    decoded, stored = labels_of("cityscapes", tmp_path, "train_extra")
    assert (np.unique(decoded).tolist(), np.unique(stored).tolist()) == ([0], [7])  # road


@needs_data
def test_cityscapes_sample_agrees_with_its_train_ids():
    decoded, stored = labels_of("cityscapes", DATA / "panoptic/cityscapes_sample", "val")
    folder = DATA / "panoptic/cityscapes_sample/gtFine/val/frankfurt"
    official = np.array(Image.open(next(folder.glob("*_labelTrainIds.png"))))
    # Both maps of the sample were shrunk on their own, so that borders differ.
    assert (decoded == official).mean() > 0.95
    assert (stored == official).mean() < 0.05


@needs_data
def test_camvid_splits_and_void():
    layout = named_layout("camvid", DATA / "camvid")
    assert [len(layout.samples(s)) for s in ("train", "val", "test")] == [367, 101, 233]
    assert len(layout.samples("train+val")) == 468
    decoded, stored = labels_of("camvid", DATA / "camvid", "train")
    assert ((decoded == 255) == (stored == 11)).all()
    assert (decoded[stored < 11] == stored[stored < 11]).all()


@needs_data
def test_ade_names_and_numbers():
    root = DATA / "samples/ADEChallengeData2016"
    layout = named_layout("ade20k", root)
    with (root / "objectInfo150.txt").open() as file:
        official = [row["Name"] for row in csv.DictReader(file, delimiter="\t")]
    assert list(layout.classes.names) == [name.split(",")[0].strip() for name in official]
    decoded, stored = labels_of("ade20k", root, "val", 2)
    assert np.unique(stored).tolist() == [0, 1, 2, 3, 5, 7, 12, 21, 44, 81, 88, 97, 103]
    assert np.unique(decoded).tolist() == [0, 1, 2, 4, 6, 11, 20, 43, 80, 87, 96, 102, 255]


@needs_data
def test_voc_palette_pictures_are_read_as_indices(tmp_path):
    source = DATA / "samples/VOC_labelme"
    for folder in ("JPEGImages", "SegmentationClass"):
        shutil.copytree(source / folder, tmp_path / folder)
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("2011_000006\n2011_000003\n")
    (lists / "trainaug.txt").write_text(
        "/JPEGImages/2011_000025.jpg /SegmentationClass/2011_000025.png\n"
    )
    layout = named_layout("voc", tmp_path)
    assert [s.name for s in layout.samples("val")] == ["2011_000006", "2011_000003"]
    decoded, _ = labels_of("voc", tmp_path, "val", 1)
    assert np.unique(decoded).tolist() == [0, 5, 15, 255]
    assert np.unique(labels_of("voc", tmp_path, "trainaug")[0]).tolist() == [0, 6, 7]


def test_voc_aug_lists_take_their_own_folder(tmp_path):
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "trainaug.txt").write_text("x\n")
    (lists / "train.txt").write_text("x\n")
    layout = named_layout("voc", tmp_path)
    assert layout.samples("trainaug")[0].label.parent.name == "SegmentationClassAug"
    assert layout.samples("train")[0].label.parent.name == "SegmentationClass"
    with pytest.raises(UserError, match="no list .*val.txt of split 'val'"):
        layout.samples("val")


@needs_data
def test_lip_grey_image_becomes_rgb():
    layout = named_layout("lip", DATA / "samples/LIP")
    image = read_image(layout.samples("val")[0].image)
    assert image.shape == (377, 130, 3)
    assert (image[..., 0] == image[..., 2]).all()
    assert np.unique(labels_of("lip", DATA / "samples/LIP", "train")[0]).tolist() == [
        0, 2, 5, 13, 14, 15,
    ]  # fmt: skip


def test_lip_pairs_are_left_and_right():
    for left, right in lip.FLIP_PAIRS:
        assert lip.NAMES[left] == lip.NAMES[right].replace("right", "left")


def test_context_with_and_without_background(tmp_path):
    save(tmp_path / "SegmentationClassContext/x.png", [[0, 1, 59, 255]])
    (tmp_path / context.LISTS).mkdir(parents=True)
    (tmp_path / context.LISTS / "val.txt").write_text("x\n")
    assert labels_of("context60", tmp_path, "val")[0].tolist() == [[0, 1, 59, 255]]
    assert labels_of("context59", tmp_path, "val")[0].tolist() == [[255, 0, 58, 255]]
    assert list(context.RAW_NAMES) == sorted(context.RAW_NAMES)
    with pytest.raises(UserError, match="segtrain data prepare context"):
        named_layout("context59", tmp_path).samples("train")


# --- folder --------------------------------------------------------------------------------------

MASK = [[0, 1, 2], [2, 255, 0]]


def test_folder_reads_classes_and_void(tmp_path):
    root = folder_set(tmp_path, [MASK])
    layout = named_layout("folder", root)
    assert layout.classes.names == ("a", "b", "c")
    assert labels_of("folder", root, "train")[0].tolist() == MASK
    assert layout.splits == ("train", "val")


@pytest.mark.parametrize(
    ("options", "stored", "expected"),
    [
        ({"reduce_zero": True}, [[0, 1, 3, 255]], [[255, 0, 2, 255]]),
        ({"ignore": [255, 9]}, [[9, 1, 0]], [[255, 1, 0]]),
        ({"mapping": {7: 2, 8: 0, 9: 255}}, [[7, 8, 9, 255]], [[2, 0, 255, 255]]),
        ({"binary": True, "classes": None}, [[0, 255, 1]], [[0, 1, 1]]),
        ({"classes": ["x", "y"]}, [[0, 1]], [[0, 1]]),
    ],
)
def test_folder_options(tmp_path, options, stored, expected):
    root = folder_set(tmp_path, [stored], classes=() if "binary" in options else "abc")
    config = FolderConfig.model_validate(options)
    assert labels_of("folder", root, "val", options=config)[0].tolist() == expected


def test_folder_palette(tmp_path):
    mask = np.array([[[255, 0, 0], [0, 0, 9], [0, 0, 0]]], np.uint8)
    root = folder_set(tmp_path, [mask], classes=())
    config = FolderConfig.model_validate(
        {"palette": {"red": [255, 0, 0], "ignore": [0, 0, 0], "blue": [0, 0, 9]}}
    )
    assert named_layout("folder", root, config).classes.names == ("red", "blue")
    assert labels_of("folder", root, "val", options=config)[0].tolist() == [[0, 1, 255]]


def test_folder_grey_in_a_binary_mask_is_an_error(tmp_path):
    root = folder_set(tmp_path, [[[0, 128, 255]]], classes=())
    with pytest.raises(UserError, match="unknown value 128"):
        labels_of("folder", root, "val", options=FolderConfig(binary=True))


def test_folder_with_lists_instead_of_folders(tmp_path):
    for name in ("p.q.png", "sub/b.png", "c.png"):
        save(tmp_path / "images" / name, np.zeros((2, 2, 3)))
        save(tmp_path / "masks" / name, np.zeros((2, 2)))
    (tmp_path / "classes.txt").write_text("a\n")
    (tmp_path / "train.txt").write_text("sub/b.png\np.q\n")
    layout = named_layout("folder", tmp_path)
    assert [s.name for s in layout.samples("train")] == ["sub/b", "p.q"]
    assert all(s.image.is_file() and s.label.is_file() for s in layout.samples("train"))
    (tmp_path / "val.txt").write_text("d\n")
    with pytest.raises(UserError, match=r"val.txt names no image of .*images: d"):
        layout.samples("val")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mapping": {0: 5}}, "no class 5, 3 classes are named; use 0..2, or 255"),
        ({"palette": {"a": [0, 0, 0], "bb": [1, 1, 1]}, "classes": ["a", "b"]}, "no class 'bb'"),
        ({"palette": {"a": [0, 0, 0]}, "classes": ["a", "b"]}, "no colour for b; add them"),
        ({"palette": {"a": [0, 0, 0], "b": [0, 0, 0]}}, "two names have one colour"),
        ({"binary": True}, "binary has 2 classes, got 3 names"),
        ({"classes": "names.txt"}, "no class names in .*names.txt; write one class name a line"),
    ],
)
def test_folder_contradictions(tmp_path, options, text):
    root = folder_set(tmp_path, [MASK])
    with pytest.raises(UserError, match=text):
        named_layout("folder", root, FolderConfig.model_validate(options))


def test_two_files_of_one_name(tmp_path):
    root = folder_set(tmp_path, [MASK])
    save(root / "images/train/0.bmp", np.zeros((2, 3, 3)))
    with pytest.raises(UserError, match="two files of one name: 0.bmp, 0.png"):
        named_layout("folder", root).samples("train")


def test_missing_root_split_and_name(tmp_path):
    root = folder_set(tmp_path, [MASK])
    with pytest.raises(UserError, match="did you mean train?"):
        named_layout("folder", root).samples("trian")
    with pytest.raises(UserError, match="names images twice"):
        named_layout("folder", root).samples("train+val")
    with pytest.raises(UserError, match="no folder .*gone; name where camvid lies"):
        named_layout("camvid", tmp_path / "gone").samples("train")
    with pytest.raises(UserError, match="no data set 'cityscape'; did you mean cityscapes"):
        named_layout("cityscape", tmp_path)


# --- files ---------------------------------------------------------------------------------------


def test_reading_names_the_file(tmp_path):
    broken = tmp_path / "broken.png"
    save(broken, np.random.default_rng(0).integers(0, 255, (64, 64, 3)))
    broken.write_bytes(broken.read_bytes()[:2000])
    text = tmp_path / "text.png"
    text.write_text("no picture")
    for path, reason in ((broken, "truncated"), (text, "no picture"), (tmp_path / "x", "no file")):
        with pytest.raises(UserError, match=reason) as caught:
            read_image(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_transparency_and_one_bit(tmp_path):
    path = save(tmp_path / "a.png", np.full((2, 3, 4), 7))
    assert read_image(path).shape == (2, 3, 3)
    with pytest.raises(UserError, match="got mode RGBA"):
        read_stored(path)
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "b.png")
    assert read_stored(tmp_path / "b.png").tolist() == [[1, 0]]


def test_sixteen_bits_stay_sixteen_bits(tmp_path):
    Image.fromarray(np.array([[24001, 7]], np.uint16)).save(tmp_path / "ids.png")
    assert read_stored(tmp_path / "ids.png").tolist() == [[24001, 7]]
    with pytest.raises(UserError, match="expected an image of 8 bits per channel"):
        read_image(tmp_path / "ids.png")


def test_mapping_may_repeat_a_class():
    assert from_mapping({3: 0, 4: 0}).decode(np.array([[3, 4]])).tolist() == [[0, 0]]
