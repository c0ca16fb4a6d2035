"""Archives and folders that are to be sent, and folders to predict: nothing leaves its place."""

import io
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from segtrain.data.labels import class_set
from segtrain.errors import UserError
from segtrain.inference import Inferencer
from segtrain.predict import KINDS, Predictor, left_out
from segtrain.submit import violations

from . import images
from .contract import generated, outcome

KEY = "toy_000000_000019"
SIZES = {KEY: (5, 7)}
GOOD = images.encoded(Image.new("L", (7, 5), 7), "PNG")
NAMES = (
    *(f"{KEY}.png", f"../{KEY}.png", f"/{KEY}.png", f"a/../../{KEY}.png", f"..\\{KEY}.png"),
    *(f"C:\\{KEY}.png", f"C:/{KEY}.png", f"\\\\host\\{KEY}.png", f"{KEY}.PNG", f"{KEY}.png/"),
    *("", ".", "/", f".{KEY}.png", f"{KEY}.png.exe", "a\nb.png", "日本語.png", "x" * 300 + ".png"),
)
LEADS_OUT = ("..", "C:", "\\\\", "/toy")


def judged(path: Path) -> tuple[list[str] | None, str]:
    return outcome(
        lambda: list(violations(path, SIZES)), error=UserError, names=[path], what="submissions"
    )


def archive(files: list[tuple[str, bytes]], *, mode: int = 0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in files:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = mode << 16
            target.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@given(names=st.lists(st.sampled_from(NAMES), max_size=4))
@generated(120)
def test_names_of_archives_do_not_lead_out(place, names):
    path = images.put(place / "send.zip", archive([(name, GOOD) for name in names]))
    lines, problem = judged(path)
    assert not problem
    for name in names:
        if name.startswith(LEADS_OUT) or ".." in name:
            assert any("leads out of the folder" in line for line in lines), name
    files = [name for name in names if not name.endswith("/")]
    seen = [f for f in files if not f.replace("\\", "/").rpartition("/")[2].startswith(".")]
    assert lines or seen == [f"{KEY}.png"]
    assert not lines or names != [f"{KEY}.png"]


@given(
    hits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.floats(0.3, 1),
)
@generated(150)
def test_damaged_archives_are_judged_or_refused(place, hits, cut):
    content = bytearray(archive([(f"{KEY}.png", GOOD)]))
    content = content[: int(cut * len(content))]
    for where, value in hits:
        content[int(where * (len(content) - 1))] = value
    judged(images.put(place / "send.zip", bytes(content)))


@pytest.mark.timeout(20)
def test_a_bomb_is_not_unpacked(place):
    content = archive([(f"{KEY}.png", b"\0" * (100 << 20))])
    lines, _ = judged(images.put(place / "send.zip", content))
    assert "are too many for a PNG" in lines[0]


@pytest.mark.parametrize("content", [b"", b"PK", b"text", images.STRANGE["archive"]], ids=len)
def test_what_is_no_archive_is_refused(place, content):
    _, problem = judged(images.put(place / "send.zip", content))
    assert "neither a folder nor a zip archive" in problem


@pytest.mark.parametrize("name", [*images.STRANGE, "bomb", "colours", "deep", "wide", "link"])
def test_wrong_pictures_are_named(place, name):
    content = {
        "bomb": lambda: images.png(60_000, 60_000, b"", colours=0),
        "colours": lambda: images.encoded(images.picture_of("RGB"), "PNG"),
        "deep": lambda: images.encoded(images.picture_of("I;16"), "PNG"),
        "wide": lambda: images.encoded(Image.new("L", (20_000, 3), 7), "PNG"),
        "link": lambda: b"/etc/hosts",
    }.get(name, lambda: images.STRANGE.get(name))()
    mode = stat.S_IFLNK | 0o777 if name == "link" else 0
    packed = archive([(f"{KEY}.png", content)], mode=mode)
    lines, _ = judged(images.put(place / "send.zip", packed))
    assert lines


@pytest.mark.timeout(20)
def test_folders_with_anything_in_them_are_judged(tmp_path):
    folder = tmp_path / "send"
    images.odd_entries(folder / KEY)
    (folder / "loop").symlink_to(folder)
    images.put(folder / f"{KEY}.png", GOOD)
    assert judged(folder) == ([], "")


# ---- predictions -----------------------------------------------------------------------------
class Threshold(nn.Module):
    """Class 1 where the red channel is bright."""

    def forward(self, pictures):
        red = pictures[:, :1]
        return {"logits": torch.cat([-red, red], dim=1)}


def predictor(folder: Path, kinds=KINDS) -> Predictor:
    tool = Inferencer(Threshold(), num_classes=2, normalisation="vit", mode="whole")
    return Predictor(tool, class_set(["dark", "bright"]), folder, kinds=kinds)


@pytest.mark.parametrize(
    "name",
    [
        *("plain", "two words", "日本語", "a\nb", "a.b", "%s", "-v", "a\\..\\b", "a:b"),
        b"latin\xe9".decode("utf-8", "surrogateescape"),
    ],
    ids=ascii,
)
def test_predictions_stay_in_their_folder(fence, name):
    source = fence / "source" / "deep"
    source.mkdir(parents=True)
    images.put(source / f"{name}.png", images.encoded(Image.fromarray(images.pixels()), "PNG"))
    out = fence / "out"
    done, _ = outcome(
        lambda: predictor(out).run(fence / "source"),
        error=UserError,
        names=[source],
        what="predictions",
    )
    assert done == 1
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert written == {f"{kind}/deep/{name}.png" for kind in KINDS}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_predictions_lie_as_the_image_is_shown(place, orientation):
    path = images.put(place / "a.png", images.turned(orientation, "PNG"))
    labels, _ = outcome(
        lambda: predictor(place / "out", ("labels",)).image(path, "a"),
        error=UserError,
        names=[path],
        what="predictions",
    )
    shown = images.as_held(images.pixels(), orientation)
    np.testing.assert_array_equal(labels, shown[..., 0] > 127)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 20_000), (20_000, 1), (2, 300)])
def test_extreme_sizes_are_predicted(place, height, width):
    content = images.encoded(Image.fromarray(images.pixels(height, width)), "PNG")
    path = images.put(place / "a.png", content)
    labels, _ = outcome(
        lambda: predictor(place / "out", ("labels",)).image(path, "a"),
        error=UserError,
        names=[path],
        what="predictions",
    )
    assert labels.shape == (height, width)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "name", [*images.STRANGE, "nowhere", "itself", "pipe", "no image", "missing"]
)
def test_sources_that_cannot_be_are_refused(tmp_path, name):
    source = tmp_path / "source"
    entries = images.odd_entries(tmp_path / "odd")
    if name != "missing":
        source.mkdir()
    if name in entries:
        (source / "a.png").symlink_to(entries[name])
    elif name == "no image":
        (source / "a.heic").touch()
    elif name in images.STRANGE:
        images.put(source / "a.png", images.STRANGE[name])
    _, problem = outcome(
        lambda: predictor(tmp_path / "out").run(source),
        error=UserError,
        names=[source],
        what="predictions",
    )
    assert problem


def test_what_is_left_out_is_known(tmp_path):
    for name in ("a.png", "b.heic", "c.txt", ".hidden"):
        (tmp_path / name).touch()
    assert [path.name for path in left_out(tmp_path)] == ["b.heic", "c.txt"]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv"])
@pytest.mark.parametrize("name", images.STRANGE)
def test_what_is_no_video_is_refused(place, name, suffix):
    path = images.put(place / f"film{suffix}", images.STRANGE[name])
    _, problem = outcome(
        lambda: predictor(place / "out").run(path), error=UserError, names=[path], what="videos"
    )
    assert problem
