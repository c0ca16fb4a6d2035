"""Panoptic data, label maps and images of Detectron2's runs, and what is sent to their servers."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from d2ctx.errors import UserError
from d2ctx.evaluation.panoptic_files import BROKEN_IMAGE, read_ids
from d2ctx.evaluation.validate import main as validate
from d2ctx.evaluation.violations import cityscapes_violations, panoptic_violations
from d2ctx.panoptic_convert import PanopticDefinition, convert
from d2ctx.panoptic_data import set_classes
from d2ctx.preflight.images import read_size
from d2ctx.preflight.label_maps import _problem
from tests.d2ctx.toy_coco import restored_catalogs
from tests.d2ctx.toy_panoptic import ToyPanoptic, write_cityscapes, write_panoptic

from . import images
from .contract import CASES, generated, outcome
from .strategies import DEEP, JSON, LONG_NUMBER

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
BROKEN = {
    **images.STRANGE,
    "bomb": images.png(60_000, 60_000, b""),
    "cut": images.encoded(Image.fromarray(images.pixels()), "PNG")[:60],
    "deep": images.encoded(images.picture_of("I;16"), "PNG"),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("panoptic")
    with pytest.MonkeyPatch.context() as patch, restored_catalogs():
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield write_panoptic(folder)


def converted(toy: ToyPanoptic, written: bytes) -> str:
    """The refusal of a json; one that passes makes sound maps and classes."""
    toy.json_file.write_bytes(written)
    definition = PanopticDefinition(str(toy.json_file), str(toy.png_root), str(toy.image_root))

    def make():
        manifest = convert(definition)
        set_classes("hostile_panoptic", manifest["categories"])
        return json.loads(Path(definition.things_json).read_text())

    names = [toy.json_file, toy.png_root]
    with restored_catalogs():
        return outcome(make, error=UserError, names=names, what="panoptic")[1]


# ---- the json --------------------------------------------------------------------------------
FIELDS = [
    *(("categories", name) for name in ("id", "name", "isthing", "color")),
    *(("images", name) for name in ("id", "file_name", "width", "height")),
    *(("annotations", name) for name in ("image_id", "file_name", "segments_info")),
    *(("segments", name) for name in ("id", "category_id", "area", "iscrowd")),
]
SPECIAL = (
    *(0, 1, 2, 4, -1, 256, 2**24, 2**63, 10**400, True, None, 1.0, "1", "", "..", "../x.png"),
    *("/etc/hosts", "\0", "a/b", [1], [300, 0, 0], [1, 2], {"a": 1}, "x" * 300),
)


NO_JSON = (b"", b"null", b"{", b"\xff\xfe", b"\0" * 50, DEEP, LONG_NUMBER, b"[]")


def changed(toy: ToyPanoptic, place: tuple[str, str], value) -> bytes:
    content = copy.deepcopy(toy.content)
    kind, field = place
    entries = content["annotations"][0]["segments_info"] if kind == "segments" else content[kind]
    entries[1][field] = value
    return json.dumps(content).encode()


def test_the_set_itself_is_sound(toy):
    assert not converted(toy, json.dumps(toy.content).encode())


@pytest.mark.parametrize("place", FIELDS, ids=".".join)
def test_every_field_with_wrong_values(toy, place):
    for value in SPECIAL:
        converted(toy, changed(toy, place, value))


@given(place=st.sampled_from(FIELDS), value=JSON)
@generated(120)
def test_every_field_with_anything(toy, place, value):
    converted(toy, changed(toy, place, value))


@given(content=JSON, key=st.sampled_from([None, "images", "annotations", "categories"]))
@generated(60)
def test_json_of_any_form(toy, content, key):
    written = content if key is None else {**toy.content, key: content}
    assert converted(toy, json.dumps(written).encode())


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "written", [b"", b"null", b"{", b"\xff", DEEP, LONG_NUMBER, b"[]"], ids=len
)
def test_files_that_are_no_json(toy, written):
    assert converted(toy, written)


def test_a_number_and_a_text_are_one_name(toy):
    content = copy.deepcopy(toy.content)
    content["images"][1]["id"] = content["annotations"][1]["image_id"] = "1"
    assert "stand more than once (1)" in converted(toy, json.dumps(content).encode())


# ---- pictures --------------------------------------------------------------------------------
def size_of(path: Path, *, decode: bool):
    """What the preflight reads; Detectron2 must see the same."""
    try:
        return read_size(str(path), decode=decode)
    except FileNotFoundError:
        return None
    except BROKEN_IMAGE:
        return None


@given(
    case=st.sampled_from(list(images.intact())),
    hits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
)
@generated(150)
def test_images_are_what_detectron2_sees(place, case, hits):
    CASES["images of detectron2"] += 1
    content = bytearray(case.content)
    for where, value in hits:
        content[int(where * (len(content) - 1))] = value
    path = images.put(place / f"a{case.suffix}", bytes(content))
    found = size_of(path, decode=True)
    if found and case.suffix not in (".tif", ".tiff"):
        assert read_image(str(path), format="RGB").shape[:2] == found[::-1]


@pytest.mark.parametrize("orientation", range(10))
def test_sizes_are_those_behind_the_rotation(place, orientation):
    CASES["images of detectron2"] += 1
    path = images.put(place / "a.png", images.turned(orientation, "PNG"))
    shape = read_image(str(path), format="RGB").shape
    assert size_of(path, decode=True) == size_of(path, decode=False) == shape[1::-1]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("name", [*BROKEN, *images.ODD])
def test_what_is_no_picture_is_refused(tmp_path, name, decode):
    entries = images.odd_entries(tmp_path / "odd")
    path = entries.get(name) or images.put(tmp_path / "a.png", BROKEN[name])
    CASES["images of detectron2"] += 1
    if decode or name != "cut":
        assert size_of(path, decode=decode) is None
    if name != "deep":
        outcome(lambda: read_ids(path), error=UserError, names=[path], what="panoptic PNGs")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "F", "CMYK"])
def test_ids_are_read_from_rgb_only(place, mode):
    kind = "TIFF" if mode in ("F", "CMYK") else "PNG"
    path = images.put(place / "ids.png", images.encoded(images.picture_of(mode), kind))
    _, problem = outcome(
        lambda: read_ids(path), error=UserError, names=[path], what="panoptic PNGs"
    )
    assert f"has mode {mode}, expected RGB" in problem


NODE = CfgNode({"NUM_CLASSES": 3, "IGNORE_VALUE": 255})


def map_problem(folder: Path, *, width: int = images.WIDTH, height: int = images.HEIGHT):
    CASES["label maps of detectron2"] += 1
    image = {"file_name": "a.jpg", "width": width, "height": height}
    return _problem(image, True, root=str(folder), node=NODE)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "name", [*BROKEN, "nowhere", "itself", "pipe", "folder", "colours", "foreign"]
)
def test_wrong_label_maps_are_named(tmp_path, name):
    folder = tmp_path / "maps"
    entries = images.odd_entries(tmp_path / "odd")
    folder.mkdir()
    if name in entries:
        entries[name].rename(folder / "a.png") if name == "folder" else (
            (folder / "a.png").symlink_to(entries[name])
        )
    elif name == "colours":
        images.put(folder / "a.png", images.encoded(images.picture_of("RGB"), "PNG"))
    elif name == "foreign":
        images.put(folder / "a.png", images.encoded(Image.new("L", (7, 5), 3), "PNG"))
    else:
        images.put(folder / "a.png", BROKEN[name])
    assert map_problem(folder)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_label_maps_are_turned_like_images(place, orientation):
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    content = images.encoded(Image.new("L", (7, 5), 1), "PNG", exif=exif)
    images.put(place / "a.png", content)
    height, width = read_image(str(place / "a.png"), format="L").shape[:2]
    assert map_problem(place, width=width, height=height) is None


# ---- what is sent ----------------------------------------------------------------------------
@given(
    field=st.sampled_from([None, "image_id", "file_name", "segments_info"]),
    value=JSON | st.sampled_from(SPECIAL),
)
@generated(120)
def test_panoptic_results_of_any_form_are_judged(toy, field, value):
    results = copy.deepcopy(toy.content)
    if field is None:
        results["annotations"] = value
    else:
        results["annotations"][0][field] = value
    lines, _ = outcome(
        lambda: list(panoptic_violations(results, toy.png_root, toy.content, workers=1)),
        error=UserError,
        names=["json"],
        what="results",
    )
    assert all(len(line) < 900 for line in lines)
    same = results == toy.content
    assert same or lines


@pytest.mark.parametrize(
    "name", ["../outside.png", "{folder}/../outside.png", "/etc/hosts", "up/x.png"]
)
def test_panoptic_results_lie_in_their_folder(tmp_path, name):
    toy = write_panoptic(tmp_path / "set")
    outside = toy.png_root.parent / "outside.png"
    outside.write_bytes(toy.png(1).read_bytes())
    (toy.png_root / "up").symlink_to(toy.png_root.parent)
    (toy.png_root.parent / "x.png").write_bytes(toy.png(1).read_bytes())
    results = copy.deepcopy(toy.content)
    results["annotations"][0]["file_name"] = name.format(folder=toy.png_root)
    CASES["results"] += 1
    lines = list(panoptic_violations(results, toy.png_root, toy.content, workers=1))
    assert any("does not lie in" in line for line in lines)


LINES = (
    *("mask.png 24 0.5", "mask.png 24", "mask.png 24 0.5 1", "", " ", "mask.png 7 0.5"),
    *("mask.png ² 0.5", "mask.png ٢٤ 0.5", "mask.png 24 nan", "mask.png 24 high", "\0 24 0.5"),
    *("../../secret.png 24 0.5", "/etc/hosts 24 0.5", "loop.png 24 0.5", "pipe.png 24 0.5"),
    *("gone.png 24 0.5", "broken.png 24 0.5", "bomb.png 24 0.5", "away.png 24 0.5", ". 24 0.5"),
)


@given(lines=st.lists(st.sampled_from(LINES) | st.text(max_size=20), max_size=4))
@generated(120)
def test_cityscapes_lines_are_judged(cityscapes, lines):
    folder, frames = cityscapes
    text = folder / "toy_000000_000019_pred.txt"
    text.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    found, _ = outcome(
        lambda: list(cityscapes_violations(folder, frames)),
        error=UserError,
        names=[text],
        what="results",
    )
    wrong = [line for line in text.read_text().splitlines() if line != LINES[0]]
    assert not wrong or found


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("cityscapes")
    (name,) = write_cityscapes(root)
    frames = {name: root / f"leftImg8bit/val/toy/{name}_leftImg8bit.png"}
    folder = root / "send"
    entries = images.odd_entries(folder / "odd")
    mask = images.encoded(Image.new("L", (48, 32)), "PNG")
    for file in ("mask.png", "../secret.png"):
        images.put(folder / file, mask)
    images.put(folder / "broken.png", mask[:40])
    images.put(folder / "bomb.png", BROKEN["bomb"])
    for link, target in (("loop", entries["itself"]), ("pipe", entries["pipe"])):
        (folder / f"{link}.png").symlink_to(target)
    (folder / "away.png").symlink_to(folder.parent / "secret.png")
    return folder, frames


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"\0" * 50, DEEP, LONG_NUMBER, b"", b"[]", b"null"], ids=len
)
@pytest.mark.parametrize("kind", ["coco", "panoptic", "cityscapes"])
def test_commands_end_without_a_traceback(tmp_path, capsys, cityscapes, kind, content):
    CASES["commands"] += 1
    results = tmp_path / "results.json"
    (tmp_path / "results").mkdir()
    results.write_bytes(content)
    truth = tmp_path / "truth.json"
    truth.write_text('{"images": [], "categories": []}')
    arguments = ["--truth", str(truth), str(results)]
    if kind == "cityscapes":
        (tmp_path / "results" / "toy_000000_000019_a.txt").write_bytes(content)
        root = cityscapes[0].parent
        arguments = ["--root", str(root), "--split", "val", str(tmp_path / "results")]
    empty = kind == "cityscapes" and content == b""
    code = validate([kind, *arguments])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert code in ((0,) if empty or (kind, content) == ("coco", b"[]") else (1, 2))
    assert (code == 2) == said.err.startswith("error: ")


@given(content=JSON, key=st.sampled_from([None, "images", "categories"]))
@generated(60)
def test_the_truth_may_be_anything(tmp_path, content, key):
    whole = {"images": [{"id": 1, "width": 2, "height": 2}], "categories": [{"id": 1}]}
    truth, results = tmp_path / "truth.json", tmp_path / "results.json"
    truth.write_text(json.dumps(content if key is None else {**whole, key: content}))
    results.write_text("[]")
    CASES["commands"] += 1
    assert validate(["coco", "--truth", str(truth), str(results)]) in (0, 2)


def test_noise_is_read_as_it_was_written(place):
    CASES["panoptic PNGs"] += 1
    noise = images.pixels()
    path = images.put(place / "ids.png", images.encoded(Image.fromarray(noise), "PNG"))
    np.testing.assert_array_equal(read_ids(path), noise.astype(int) @ [1, 256, 65536])
