import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from segtrain.data.synthetic import CATEGORIES, FORMATS, THINGS, generate_scene, write_dataset
from segtrain.data.synthetic import writers as writers_module
from segtrain.data.synthetic.annotations import run_lengths
from segtrain.data.synthetic.writers import split_of

SIZE = (72, 48)
# pycocotools decodes through an __array__ that numpy 2 finds old-fashioned
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def tree(root):
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


def read(path):
    return np.asarray(Image.open(path))


def load(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def panoptic(tmp_path_factory):
    out = tmp_path_factory.mktemp("panoptic") / "deep" / "set"
    return write_dataset(out=out, fmt="coco-panoptic", num=9, seed=3, size=SIZE)


@pytest.fixture(scope="module")
def truth():
    return [generate_scene(seed=3, index=k, size=SIZE) for k in range(9)]


@pytest.mark.parametrize("fmt", FORMATS)
def test_bytes_do_not_depend_on_repetition_or_total(tmp_path, fmt):
    request = {"fmt": fmt, "seed": 1, "size": (40, 56)}
    first = tree(write_dataset(out=tmp_path / "a", num=5, **request))
    assert tree(write_dataset(out=tmp_path / "b", num=5, **request)) == first
    larger = tree(write_dataset(out=tmp_path / "c", num=7, **request))
    images = [name for name in first if name.endswith(".png")]
    assert images
    assert all(larger[name] == first[name] for name in images)


def test_bytes_do_not_depend_on_workers(tmp_path):
    request = {"fmt": "coco-panoptic", "num": 6, "seed": 1, "size": (40, 56)}
    alone = write_dataset(out=tmp_path / "alone", workers=0, **request)
    shared = write_dataset(out=tmp_path / "shared", workers=2, **request)
    assert tree(alone) == tree(shared)


def test_annotations_of_an_image_do_not_depend_on_the_total(tmp_path):
    few = write_dataset(out=tmp_path / "few", num=3, size=(40, 40))
    many = write_dataset(out=tmp_path / "many", num=6, size=(40, 40))
    few, many = (load(p / "annotations/instances_train.json") for p in (few, many))
    wanted = {image["id"] for image in few["images"]}
    assert few["annotations"] == [a for a in many["annotations"] if a["image_id"] in wanted]


def test_coco_masks_areas_and_boxes_equal_the_instance_map(panoptic, truth, capsys):
    num_seen = 0
    for split in ("train", "val"):
        coco = COCO(str(panoptic / f"annotations/instances_{split}.json"))
        for image_id, image in coco.imgs.items():
            scene = truth[image_id - 1]
            assert np.array_equal(read(panoptic / "images" / image["file_name"]), scene.image)
            decoded = np.zeros(scene.instance.shape, dtype=int)
            for number, entry in enumerate(coco.imgToAnns[image_id], start=1):
                mask = coco.annToMask(entry)
                rle = coco.annToRLE(entry)
                assert entry["area"] == mask.sum() == mask_api.area(rle)
                assert entry["bbox"] == mask_api.toBbox(rle).tolist()
                assert entry["iscrowd"] == 0
                assert not decoded[mask > 0].any()
                decoded[mask > 0] = number
            assert np.array_equal(decoded, scene.instance)
            num_seen += 1
    assert num_seen == len(truth)


def test_coco_categories_and_ids(panoptic):
    documents = [load(panoptic / f"annotations/instances_{s}.json") for s in ("train", "val")]
    for document in documents:
        names = [(c["id"], c["name"]) for c in document["categories"]]
        assert names == [(c.id, c.name) for c in THINGS]
        assert {"info", "licenses"} <= set(document)
    ids = [a["id"] for document in documents for a in document["annotations"]]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("split", ["train", "val"])
def test_panoptic_png_json_and_semantic_agree(panoptic, truth, split):
    document = load(panoptic / f"annotations/panoptic_{split}.json")
    categories = {c["id"]: c for c in document["categories"]}
    assert [c["isthing"] for c in categories.values()] == [int(c.isthing) for c in CATEGORIES]
    assert len(document["annotations"]) == len(document["images"])
    for entry in document["annotations"]:
        scene = truth[entry["image_id"] - 1]
        rgb = read(panoptic / f"annotations/panoptic_{split}" / entry["file_name"]).astype(int)
        ids = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
        semantic = read(panoptic / f"semantic_{split}" / entry["file_name"])
        assert np.array_equal(semantic, scene.semantic)
        segments = {s["id"]: s for s in entry["segments_info"]}
        assert set(np.unique(ids)) == set(segments)
        for number, segment in segments.items():
            mask = ids == number
            rows, columns = np.nonzero(mask)
            x, y = columns.min(), rows.min()
            assert segment["area"] == mask.sum()
            assert segment["bbox"] == [x, y, columns.max() - x + 1, rows.max() - y + 1]
            assert np.all(semantic[mask] == segment["category_id"])
            if categories[segment["category_id"]]["isthing"]:
                assert len(np.unique(scene.instance[mask])) == 1
            else:
                assert not scene.instance[mask].any()
        assert sum(s["area"] for s in segments.values()) == ids.size


def test_folder_layout(tmp_path, truth):
    out = write_dataset(out=tmp_path / "set", fmt="folder", num=4, seed=3, size=SIZE)
    assert set(tree(out)) == {
        *(f"{kind}/train/{k:06d}.png" for kind in ("images", "masks") for k in range(3)),
        *(f"{kind}/val/000003.png" for kind in ("images", "masks")),
        "classes.txt",
        "synth.json",
    }
    names = (out / "classes.txt").read_text().split()
    assert names == [c.name for c in CATEGORIES]
    mask = read(out / "masks/val/000003.png")
    assert mask.dtype == np.uint8
    assert np.array_equal(mask + 1, truth[3].semantic)
    assert mask.max() < len(names)


def test_synth_json_records_the_request(panoptic):
    assert load(panoptic / "synth.json") == {
        "generator": "segtrain data synth",
        "version": 1,
        "format": "coco-panoptic",
        "num": 9,
        "seed": 3,
        "size": [72, 48],
        "val_fraction": 0.25,
    }


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(0.25, [3, 7, 11]), (0.5, [1, 3, 5, 7, 9, 11]), (1 / 3, [2, 5, 8, 11]), (0.0, [])],
)
def test_split_takes_every_kth(fraction, expected):
    found = [k for k in range(12) if split_of(index=k, val_fraction=fraction) == "val"]
    assert found == expected


def test_split_in_the_files(panoptic):
    val = load(panoptic / "annotations/instances_val.json")["images"]
    train = load(panoptic / "annotations/instances_train.json")["images"]
    assert [i["id"] for i in val] == [4, 8]
    assert [i["id"] for i in train] == [1, 2, 3, 5, 6, 7, 9]


@settings(max_examples=60, deadline=None)
@given(mask=hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=7)))
def test_run_lengths_decode_to_the_mask(mask):
    counts = run_lengths(mask)
    rle = mask_api.frPyObjects({"counts": counts, "size": list(mask.shape)}, *mask.shape)
    assert np.array_equal(mask_api.decode(rle).astype(bool), mask)
    assert all(c > 0 for c in counts[1:])


# The directory


def test_same_request_again_rewrites_nothing(tmp_path):
    request = {"out": tmp_path / "set", "num": 2, "size": (32, 32)}
    out = write_dataset(**request)
    marker = out / "images/000000.png"
    before = marker.stat().st_mtime_ns
    assert write_dataset(**request) == out
    assert marker.stat().st_mtime_ns == before


def test_another_request_needs_overwrite(tmp_path):
    request = {"out": tmp_path / "set", "size": (32, 32)}
    write_dataset(num=2, **request)
    with pytest.raises(ValueError, match=r"another synthetic data set \(different: num, seed\)"):
        write_dataset(num=3, seed=1, **request)
    out = write_dataset(num=3, seed=1, overwrite=True, **request)
    assert load(out / "synth.json")["num"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_files_are_never_touched(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no synthetic data set"):
        write_dataset(out=tmp_path, num=1, size=(32, 32), overwrite=overwrite)
    assert tree(tmp_path).keys() == {"thesis.tex"}


def test_an_empty_directory_is_fine(tmp_path):
    target = tmp_path / "empty"
    target.mkdir()
    assert (write_dataset(out=target, num=1, size=(32, 32)) / "synth.json").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failure_leaves_nothing_behind(tmp_path, workers):
    def fail(done, total):
        raise KeyboardInterrupt

    target = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        write_dataset(out=target, num=2, size=(32, 32), workers=workers, progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_keeps_the_old_data(tmp_path, monkeypatch):
    out = write_dataset(out=tmp_path / "set", num=1, size=(32, 32))
    before = tree(out)
    monkeypatch.setattr(writers_module, "_write_annotations", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_dataset(out=out, num=2, size=(32, 32), overwrite=True)
    assert tree(tmp_path / "set") == before
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_unwritable_places_are_one_clear_error(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="is a file; choose another directory"):
        write_dataset(out=file, num=1, size=(32, 32))
    with pytest.raises(ValueError, match="cannot write .*; choose another directory"):
        write_dataset(out=file / "below", num=1, size=(32, 32))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"fmt": "voc"}, "unknown format 'voc'; use one of coco, coco-panoptic, folder"),
        ({"num": 0}, "num must be 1..1000000, got 0; use for example 200"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"size": (8, 8)}, "got 8x8; use for example 256x256"),
        ({"val_fraction": 1.0}, "at least 0 and below 1, got 1.0; use for example 0.25"),
        ({"val_fraction": float("nan")}, "got nan"),
        ({"workers": -1}, "workers must be >= 0, got -1; use 0"),
    ],
)
def test_bad_arguments_say_what_to_do(tmp_path, change, text):
    with pytest.raises(ValueError, match=text):
        write_dataset(**{"out": tmp_path / "set", "num": 1, "size": (32, 32)} | change)
    assert list(tmp_path.iterdir()) == []
