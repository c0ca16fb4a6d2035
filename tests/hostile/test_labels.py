"""Label maps of every mode, size and value, and folders of them, against an oracle."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from segtrain.cli import main
from segtrain.config.data import FolderConfig
from segtrain.data.check import check_layout
from segtrain.data.dataset import SegDataset
from segtrain.data.datasets import folder
from segtrain.data.datasets.layout import Layout, Sample
from segtrain.data.reading import read_labels
from segtrain.errors import UserError

from . import images
from .contract import CASES, generated, outcome

NAMES = ("road", "sky", "tree")
COLOURS = {"road": (128, 64, 128), "sky": (70, 130, 180), "tree": (0, 0, 0), "ignore": (9, 9, 9)}
# How masks may be read -> value or colour on disk -> class or 255, written out.
READINGS = {
    "plain": ({}, {0: 0, 1: 1, 2: 2, 255: 255}),
    "shifted": ({"reduce_zero": True}, {0: 255, 1: 0, 2: 1, 3: 2, 255: 255}),
    "ignoring": ({"ignore": [1, 300]}, {0: 0, 1: 255, 2: 2, 300: 255}),
    "mapped": ({"mapping": {7: 0, 24001: 2}}, {7: 0, 24001: 2, 255: 255}),
    "coloured": (
        {"palette": COLOURS},
        {c: NAMES.index(n) if n in NAMES else 255 for n, c in COLOURS.items()},
    ),
}


def layout(root: Path, reading: str) -> Layout:
    config = {"classes": list(NAMES), **READINGS[reading][0]}
    return folder.layout(root, FolderConfig.model_validate(config))


def decoded(path: Path, reading: str) -> tuple[np.ndarray | None, str]:
    sample = Sample(path, path, "a")
    found = layout(path.parent, reading)
    names = [path]
    return outcome(lambda: read_labels(found, sample), error=UserError, names=names, what="labels")


# ---- values ----------------------------------------------------------------------------------
@st.composite
def stored_maps(draw):
    """(reading, values on disk, mode); some values are foreign."""
    reading = draw(st.sampled_from([name for name in READINGS if name != "coloured"]))
    known = st.sampled_from(sorted(READINGS[reading][1]))
    values = draw(st.lists(known | st.integers(0, 65535), min_size=1, max_size=2))
    height, width = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    cells = st.lists(st.sampled_from(values), min_size=height * width, max_size=height * width)
    array = np.reshape(draw(cells), (height, width))
    modes = ["I;16", "I"] + ["L"] * 4 * int(array.max() < 256)
    return reading, array, draw(st.sampled_from(modes))


@given(case=stored_maps())
@generated(250)
def test_values_are_decoded_or_named(place, case):
    reading, array, mode = case
    types = {"L": np.uint8, "I;16": np.uint16, "I": np.int32}
    kind = "TIFF" if mode == "I" else "PNG"
    picture = Image.fromarray(array.astype(types[mode]))
    path = images.put(place / "label.png", images.encoded(picture, kind))
    found, problem = decoded(path, reading)
    table = READINGS[reading][1]
    foreign = sorted(set(array.ravel().tolist()) - set(table))
    if foreign:
        assert f"unknown value{'s' * (len(foreign) > 1)} {foreign[0]}" in problem
    else:
        np.testing.assert_array_equal(found, np.vectorize(table.get)(array))


@given(
    colours=st.lists(
        st.sampled_from(list(COLOURS.values())) | st.tuples(*[st.integers(0, 255)] * 3),
        min_size=6,
        max_size=6,
    ),
    mode=st.sampled_from(["RGB", "RGBA", "P"]),
)
@generated(120)
def test_colours_are_decoded_or_named(place, colours, mode):
    array = np.reshape(np.array(colours, np.uint8), (2, 3, 3))
    picture = Image.fromarray(array)
    if mode == "P":
        picture = picture.quantize(dither=Image.Dither.NONE)
        array = np.asarray(picture.convert("RGB"))
    elif mode == "RGBA":
        picture.putalpha(7)
    path = images.put(place / "label.png", images.encoded(picture, "PNG"))
    found, problem = decoded(path, "coloured")
    table = READINGS["coloured"][1]
    seen = [tuple(colour) for colour in array.reshape(-1, 3).tolist()]
    if foreign := sorted(set(seen) - set(table)):
        assert str(list(foreign[0])) in problem
    else:
        assert found.ravel().tolist() == [table[colour] for colour in seen]


@pytest.mark.parametrize(("mode", "kind"), [("F", "TIFF"), ("LA", "PNG"), ("CMYK", "TIFF")])
@pytest.mark.parametrize("reading", READINGS)
def test_other_modes_are_never_taken_for_numbers(place, mode, kind, reading):
    content = images.encoded(images.picture_of(mode), kind)
    found, problem = decoded(images.put(place / "label.png", content), reading)
    assert found is None
    assert problem


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_greys_are_no_colours(place, mode):
    content = images.encoded(images.picture_of(mode), "TIFF")
    _, problem = decoded(images.put(place / "label.png", content), "coloured")
    assert "8 bits" in problem


@pytest.mark.parametrize(
    "content",
    [
        {"mapping": {70_000: 1}},
        {"mapping": {-1: 1}},
        {"mapping": {0: 3}},
        {"mapping": {0: 256}},
        {"ignore": [1 << 40]},
        {"palette": {"road": [0, 0, 256]}},
        {"palette": {}},
        {"palette": {"road": [0, 0, 0], "sky": [0, 0, 0], "tree": [1, 1, 1]}},
        {"classes": []},
        {"classes": [f"c{k}" for k in range(256)]},
        {"classes": ["a", "a"]},
        {"binary": True},
        {"classes": "../../etc/nothing"},
    ],
    ids=str,
)
def test_readings_that_cannot_be_are_refused(place, content):
    def build():
        config = FolderConfig.model_validate({"classes": list(NAMES), **content})
        return folder.layout(place, config)

    CASES["labels"] += 1
    with pytest.raises(ValueError, match=r"\w{3}"):  # pydantic's, which `load_config` words
        build()


# ---- whole data sets -------------------------------------------------------------------------
IMAGE_FAULTS = ("truncated", "empty", "text", "deep", "bomb", "odd mode", "nowhere")
LABEL_FAULTS = (*IMAGE_FAULTS, "size", "foreign", "colours", "missing", "float", "turned")


def good(path: Path, *, label: bool) -> bytes:
    if label:
        return images.encoded(Image.fromarray(np.ones((5, 7), np.uint8)), "PNG")
    return images.encoded(Image.fromarray(images.pixels()), "PNG")


def damage(path: Path, fault: str, *, label: bool) -> None:
    """Put something wrong in place of a good file."""
    path.unlink()
    if fault == "missing":
        return
    if fault == "nowhere":
        path.symlink_to(path.with_name("gone"))
        return
    alpha = Image.fromarray(np.zeros((5, 7), np.uint8))
    path.write_bytes(
        {
            "truncated": lambda: good(path, label=label)[:50],
            "empty": lambda: b"",
            "text": lambda: b"road",
            "deep": lambda: images.encoded(images.picture_of("I;16"), "PNG"),
            "bomb": lambda: images.png(60_000, 60_000, b"", colours=0 if label else 2),
            "odd mode": lambda: images.encoded(images.picture_of("F"), "TIFF"),
            "size": lambda: images.encoded(Image.fromarray(np.ones((7, 5), np.uint8)), "PNG"),
            "foreign": lambda: images.encoded(Image.fromarray(np.full((5, 7), 9, np.uint8)), "PNG"),
            "colours": lambda: good(path, label=False),
            "float": lambda: images.encoded(images.picture_of("F"), "TIFF"),
            "turned": lambda: images.encoded(alpha, "PNG", exif=_lying()),
        }[fault]()
    )


def _lying() -> Image.Exif:
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    return exif


def fresh_set(root: Path, name: str = "a") -> tuple[Path, Path]:
    """One image and its mask, in both splits."""
    for split in ("train", "val"):
        for part in ("images", "masks"):
            path = root / part / split / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(good(path, label=part == "masks"))
    return root / "images" / "train" / f"{name}.png", root / "masks" / "train" / f"{name}.png"


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize(
    ("part", "fault"),
    [("image", fault) for fault in IMAGE_FAULTS] + [("label", fault) for fault in LABEL_FAULTS],
)
def test_what_the_check_passes_training_can_read(tmp_path, part, fault, decode):
    image, label = fresh_set(tmp_path)
    damage(image if part == "image" else label, fault, label=part == "label")
    found = layout(tmp_path, "plain")
    report = check_layout(found, ["train"], decode=decode)[0]
    dataset = SegDataset(found, "train", None)
    _, problem = outcome(
        lambda: dataset[0], error=UserError, names=[image, label], what="data sets"
    )
    assert problem, "every one of these is a fault"
    if decode or fault not in ("truncated", "foreign", "deep"):
        assert report.errors, "the check must say so first"
        assert any("a.png" in error.text for error in report.errors)


def test_images_and_labels_that_lie_alike_agree(tmp_path):
    image, label = fresh_set(tmp_path)
    image.write_bytes(images.turned(6, "JPEG"))
    label.write_bytes(
        images.encoded(Image.fromarray(np.eye(5, 7, dtype=np.uint8)), "PNG", exif=_lying())
    )
    found = layout(tmp_path, "plain")
    sample = SegDataset(found, "train", None)[0]
    assert sample["image"].shape == (3, 7, 5)
    np.testing.assert_array_equal(sample["label"], images.as_held(np.eye(5, 7), 6))
    assert not check_layout(found, ["train"])[0].errors


@pytest.mark.parametrize("part", ["image", "label"])
@pytest.mark.parametrize("fault", ["truncated", "text", "bomb", "nowhere"])
def test_the_command_ends_in_one_message(tmp_path, capsys, part, fault):
    image, label = fresh_set(tmp_path, "an image")
    path = image if part == "image" else label
    damage(path, fault, label=part == "label")
    CASES["commands"] += 1
    assert main(["data", "check", "--dataset", "folder", "--root", str(tmp_path), CLASSES]) == 2
    said = capsys.readouterr()
    assert "an image.png" in said.out
    assert "Traceback" not in said.out + said.err
    stats = ["data", "stats", "--dataset", "folder", "--root", str(tmp_path), CLASSES]
    assert main(stats) == 2
    said = capsys.readouterr()
    assert said.err.startswith("segtrain: error: data, train: ")
    assert said.err.count("\n") == 1


CLASSES = "data.folder.classes=[road, sky, tree]"


def test_names_that_are_no_unicode_can_be_said(tmp_path, monkeypatch):
    name = b"stra\xdfe".decode("utf-8", "surrogateescape")
    image, _ = fresh_set(tmp_path, name)
    image.write_bytes(b"")
    CASES["commands"] += 1
    # What a terminal of UTF-8 is to Python.
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["data", "check", "--dataset", "folder", "--root", str(tmp_path), CLASSES]) == 2
    assert "stra\\udcdfe.png" in terminal.buffer.getvalue().decode()


def test_files_that_nobody_looks_at_are_named(tmp_path):
    fresh_set(tmp_path)
    for name in ("b.heic", "c.npy", "notes.txt"):
        (tmp_path / "images" / "train" / name).write_bytes(b"x")
    (tmp_path / "masks" / "train" / "d.png").write_bytes(good(tmp_path, label=True))
    (report,) = check_layout(layout(tmp_path, "plain"), ["train"])
    assert "3 files of no known ending among the images, not used" in report.notes[0]
    assert "b.heic" in report.notes[0]
    assert [error.kind for error in report.errors] == ["unpaired"]


# ---- lists -----------------------------------------------------------------------------------
@given(
    lines=st.lists(
        st.sampled_from(
            ["a", "a.png", "b", "../a", "/etc/passwd", "..", "", "a/b", "\0", "a\u2028"]
        )
        | st.text(max_size=12),
        max_size=5,
    )
)
@generated(150)
def test_lists_name_images_below_their_folder_or_nothing(place, lines):
    root = place / "listed"
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True, exist_ok=True)
        (root / part / "a.png").write_bytes(good(root, label=part == "masks"))
    (root / "train.txt").write_text("\n".join(lines), encoding="utf-8", errors="replace")
    found = layout(root, "plain")
    samples, problem = outcome(
        lambda: found.samples("train"), error=UserError, names=[root, "'train'"], what="lists"
    )
    if not problem:
        assert [sample.image for sample in samples] == [root / "images" / "a.png"]


def test_a_list_of_one_name_many_times_is_refused_at_once(place):
    root = place / "listed"
    (root / "train.txt").write_text("a\n" * 50_000)
    found = layout(root, "plain")
    _, problem = outcome(
        lambda: found.samples("train"), error=UserError, names=["'train'"], what="lists"
    )
    assert "names images twice: a" in problem
