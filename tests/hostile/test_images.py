"""Image files of every kind and damage, given to training, to the check and to predictions."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from segtrain.data.datasets.layout import Layout, Sample, all_below, files_below
from segtrain.data.labels import class_set, identity
from segtrain.data.reading import opened, read_image, read_stored, upright_size
from segtrain.data.scan import scan
from segtrain.errors import UserError

from . import images
from .contract import generated, outcome

# Pillow says in passing what it skips.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
INTACT = list(images.intact())
LAYOUT = Layout("folder", Path(), class_set(["a"]), identity(1), lambda root, split: [])


def read(path: Path) -> tuple[np.ndarray | None, str]:
    """Read as training does; the check of the data must say the same."""
    found = outcome(lambda: read_image(path), error=UserError, names=[path], what="images")
    facts = scan(LAYOUT, [Sample(path, None, "a")])[0]
    assert bool(facts.problems) == (found[0] is None), (facts.problems, found[1])
    if found[0] is not None:
        assert found[0].dtype == np.uint8
        assert found[0].shape == (*facts.image_size[::-1], 3)
    return found


# ---- what is welcome -------------------------------------------------------------------------
@pytest.mark.parametrize("case", INTACT, ids=lambda case: case.name)
def test_every_kind_of_eight_bits_reads(place, case):
    found, problem = read(images.put(place / f"a{case.suffix}", case.content))
    assert not problem
    assert found.shape == (images.HEIGHT, images.WIDTH, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_lossless_kinds_keep_their_pixels(place, mode):
    picture = images.picture_of(mode)
    found, _ = read(images.put(place / "a.png", images.encoded(picture, "PNG")))
    expected = {
        "1": lambda: np.repeat(np.asarray(picture)[..., None] * 255, 3, axis=2),
        "L": lambda: np.repeat(np.asarray(picture)[..., None], 3, axis=2),
        "LA": lambda: np.repeat(np.asarray(picture)[..., :1], 3, axis=2),
        "P": lambda: np.reshape(picture.getpalette(), (-1, 3))[np.asarray(picture)],
        "RGB": lambda: np.asarray(picture),
        "RGBA": lambda: np.asarray(picture)[..., :3],
    }[mode]()
    np.testing.assert_array_equal(found, expected)


def test_sixteen_bits_of_colour_are_scaled(place):
    values = np.random.default_rng(0).integers(0, 1 << 16, (4, 3, 3))
    found, _ = read(images.put(place / "a.png", images.png_of_16_bits(values)))
    np.testing.assert_array_equal(found, values >> 8)


@pytest.mark.parametrize(("mode", "kind", "suffix"), images.DEEP)
def test_deep_greys_are_refused_by_name(place, mode, kind, suffix):
    path = images.put(place / f"a{suffix}", images.encoded(images.picture_of(mode), kind))
    _, problem = read(path)
    assert "expected an image of 8 bits per channel, got mode" in problem


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_and_labels_are_turned_alike(place, kind, orientation):
    path = images.put(place / "a.png", images.turned(orientation, kind))
    found, _ = read(path)
    expected = images.as_held(images.pixels(), orientation)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(read_stored(path, colours=True), expected)
    with opened(path) as picture:
        assert upright_size(picture, decode=False) == expected.shape[1::-1]


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_a_senseless_orientation_means_nothing(place, orientation):
    found, _ = read(images.put(place / "a.png", images.turned(orientation, "PNG")))
    np.testing.assert_array_equal(found, images.pixels())


@given(exif=st.binary(max_size=40))
@generated(60)
def test_damaged_exif_does_no_harm(place, exif):
    content = images.encoded(Image.fromarray(images.pixels()), "PNG", exif=b"Exif\0\0" + exif)
    found, problem = read(images.put(place / "a.png", content))
    assert not problem
    assert found.size == images.pixels().size


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 9), (9, 1), (1, 20_000), (20_000, 1), (3, 20_000)]
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_extreme_sizes_read(place, kind, height, width):
    content = images.encoded(Image.fromarray(images.pixels(height, width)), kind)
    found, _ = read(images.put(place / "a.png", content))
    assert found.shape == (height, width, 3)


# ---- what is not -----------------------------------------------------------------------------
@pytest.mark.parametrize("name", images.STRANGE)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp", ".webp"])
def test_what_is_no_picture_is_refused(place, name, suffix):
    found, problem = read(images.put(place / f"a{suffix}", images.STRANGE[name]))
    assert found is None
    assert "copy it again" in problem
    if name == "postscript":  # Pillow would run Ghostscript
        assert "no picture of a known format" in problem


@pytest.mark.parametrize("colours", [0, 2, 3, 6])
@pytest.mark.parametrize(
    "size", [(50_000, 50_000), (2**31 - 1, 1), (1, 2**31 - 1), (2**31 - 1,) * 2]
)
def test_bombs_are_refused_before_they_are_decoded(place, size, colours):
    path = images.put(place / "a.png", images.png(*size, b"\0" * 99, colours=colours))
    assert read(path)[0] is None


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_pictures_without_a_pixel_are_refused(place, size):
    assert read(images.put(place / "a.png", images.png(*size, b"")))[0] is None


@pytest.mark.parametrize("case", INTACT, ids=lambda case: case.name)
def test_what_is_cut_off_is_refused_or_was_not_needed(place, case):
    whole, _ = read(images.put(place / f"a{case.suffix}", case.content))
    step = max(len(case.content) // 24, 1)
    for length in range(0, len(case.content), step):
        found, problem = read(images.put(place / f"a{case.suffix}", case.content[:length]))
        # The ends of some formats hold nothing that is seen.
        assert problem or np.array_equal(found, whole), f"{length} bytes"


@given(
    case=st.sampled_from(INTACT),
    hits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
)
@generated(400)
def test_flipped_bytes_read_or_are_refused(place, case, hits):
    content = bytearray(case.content)
    for where, value in hits:
        content[int(where * (len(content) - 1))] = value
    read(images.put(place / f"a{case.suffix}", bytes(content)))


@given(case=st.sampled_from(INTACT), middle=st.binary(max_size=30), at=st.floats(0, 1))
@generated(150)
def test_inserted_bytes_read_or_are_refused(place, case, middle, at):
    cut = int(at * len(case.content))
    content = case.content[:cut] + middle + case.content[cut:]
    read(images.put(place / f"a{case.suffix}", content))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", images.ODD)
def test_what_is_no_file_is_refused_at_once(tmp_path, name):
    entry = images.odd_entries(tmp_path / "odd")[name]
    _, problem = read(entry)
    assert problem


# ---- folders ---------------------------------------------------------------------------------
NAMES = (
    *(
        "plain",
        "two words",
        " ahead",
        "behind ",
        "Straße",
        "日本語",
        "🚀",
        "a\u0301",
        "a\nb",
        "a\tb",
    ),
    *(
        "a\tb",
        "%s",
        "{0}",
        "-v",
        "$(id)",
        "a;b",
        "a'b",
        'a"b',
        "a\\b",
        "a.b",
        "..a",
        "a=b",
        "x" * 200,
    ),
    b"latin\xe9".decode("utf-8", "surrogateescape"),
)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("suffix", [".png", ".PNG", ".JpG"])
def test_names_are_taken_as_they_are(place, name, suffix):
    folder = place / "names"
    folder.mkdir(exist_ok=True)
    path = images.put(folder / f"{name}{suffix}", images.encoded(Image.new("L", (2, 2)), "PNG"))
    hidden = name.startswith(".")
    assert files_below(folder, (".png", ".jpg")) == ([] if hidden else [path])
    assert read(path)[0].shape == (2, 2, 3)
    path.unlink()


@pytest.mark.timeout(20)
def test_every_file_is_found_once_whatever_links_do(tmp_path):
    for part in ("a", "b/c", "elsewhere"):
        (tmp_path / part).mkdir(parents=True)
        (tmp_path / part / "1.png").touch()
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (root / "real" / "2.png").touch()
    (root / "away").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    (root / "real" / "up").symlink_to(root)
    (root / "gone.png").symlink_to(tmp_path / "missing.png")
    for number in range(12):  # each holds all others: followed blindly, 12! ways
        (root / f"m{number}").mkdir()
        for other in range(12):
            (root / f"m{number}" / f"to{other}").symlink_to(root / f"m{other}")
    found = [path.relative_to(root).as_posix() for path in files_below(root, (".png",))]
    assert found == ["away/1.png", "gone.png", "real/2.png"]
    with pytest.raises(UserError, match="no file .*gone.png"):
        read_image(root / "gone.png")


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("segtrain.data.datasets.layout.os.scandir", refuse)
    with pytest.raises(UserError, match=f"cannot look into {tmp_path}: Permission denied"):
        list(all_below(tmp_path))
