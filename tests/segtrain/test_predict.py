"""`segtrain predict` and its pictures: images, folders, videos."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from segtrain.cli import main
from segtrain.data.labels import class_set
from segtrain.errors import UserError
from segtrain.inference import Inferencer
from segtrain.predict import Predictor, find_images, opened_video
from segtrain.visual import legend, legend_entries, overlay, side_by_side, with_legend
from tests.segtrain.toy_runs import config_of, write_folder, write_run

CLASSES = class_set(["dark", "bright", "never"], [(200, 0, 0), (0, 0, 200), (0, 200, 0)])


class Threshold(nn.Module):
    """Class 1 where the red channel is bright."""

    def forward(self, images):
        red = images[:, :1]
        return {"logits": torch.cat([-red, red, torch.full_like(red, -9)], dim=1)}


def predictor(folder, **changes) -> Predictor:
    tool = Inferencer(Threshold(), num_classes=3, normalisation="vit", mode="whole")
    return Predictor(tool, CLASSES, folder, **changes)


def picture(height=12, width=20) -> np.ndarray:
    image = np.zeros((height, width, 3), np.uint8)
    image[:, width // 2 :] = 255
    return image


# ---- pictures --------------------------------------------------------------------------------
def test_overlay_mixes_and_leaves_void_alone():
    image = np.full((2, 3, 3), 100, np.uint8)
    labels = np.array([[0, 1, 255], [0, 1, 255]], np.uint8)
    mixed = overlay(image, labels, CLASSES, alpha=0.25)
    assert mixed[0].tolist() == [[125, 75, 75], [75, 75, 125], [100, 100, 100]]
    assert (overlay(image, labels, CLASSES, alpha=0.0) == image).all()
    assert (overlay(image, labels, CLASSES, alpha=1.0)[:, :2] == CLASSES.paint(labels)[:, :2]).all()


def test_side_by_side_keeps_every_panel():
    one, two = picture(), 255 - picture()
    row = side_by_side([one, two])
    assert row.shape == (12, 48, 3)
    assert (row[:, :20] == one).all()
    assert (row[:, 28:] == two).all()
    assert (row[:, 20:28] == 255).all()


def test_legend_names_what_is_there_largest_first():
    labels = np.array([[1, 1, 1, 0], [1, 255, 255, 0]], np.uint8)
    assert legend_entries(CLASSES, labels) == [
        ("bright 50.0 %", (0, 0, 200)),
        ("dark 25.0 %", (200, 0, 0)),
    ]
    assert [text for text, _ in legend_entries(CLASSES)] == ["dark", "bright", "never"]


def test_legend_has_its_colours_and_fits_the_width():
    drawn = with_legend(picture(12, 200), CLASSES)
    assert drawn.shape[1:] == (200, 3)
    assert (drawn[:12] == picture(12, 200)).all()
    colours = {tuple(c) for c in drawn[12:].reshape(-1, 3).tolist()}
    assert set(CLASSES.palette) <= colours
    wide, narrow = (legend(w, legend_entries(CLASSES)) for w in (400, 60))
    assert narrow.shape[0] > wide.shape[0]
    assert narrow.shape[1] == 60


# ---- images ----------------------------------------------------------------------------------
def test_an_image_gives_three_pictures(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    assert predictor(tmp_path / "out").run(tmp_path / "a.png") == 1
    labels = np.asarray(Image.open(tmp_path / "out/labels/a.png"))
    assert labels.tolist() == [[0] * 10 + [1] * 10] * 12
    shown = np.asarray(Image.open(tmp_path / "out/overlays/a.png"))
    assert (shown[:12] == overlay(picture(), labels, CLASSES)).all()
    both = np.asarray(Image.open(tmp_path / "out/side_by_side/a.png"))
    assert (both[:12, :20] == picture()).all()
    assert (both[:12, 28:48] == shown[:12]).all()


def test_a_folder_keeps_its_folders(tmp_path):
    (tmp_path / "in" / "b").mkdir(parents=True)
    for name in ("a.jpg", "b/a.jpg", "b/c.PNG"):
        Image.fromarray(picture()).save(tmp_path / "in" / name)
    seen = []
    tool = predictor(tmp_path / "out", kinds=["labels"])
    assert tool.run(tmp_path / "in", lambda *count: seen.append(count)) == 3
    found = sorted(p.relative_to(tmp_path / "out").as_posix() for p in tmp_path.glob("out/**/*.*"))
    assert found == ["labels/a.png", "labels/b/a.png", "labels/b/c.png"]
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_grey_image_is_an_image(tmp_path):
    Image.fromarray(picture()[..., 0]).save(tmp_path / "a.png")
    predictor(tmp_path / "out", kinds=["labels"]).run(tmp_path / "a.png")
    assert np.asarray(Image.open(tmp_path / "out/labels/a.png"))[0].tolist() == [0] * 10 + [1] * 10


def test_nothing_to_predict_is_said(tmp_path):
    with pytest.raises(UserError, match="no file or folder .*absent; name an image"):
        find_images(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no image below .*known endings: \.jpg"):
        find_images(tmp_path)
    for name in ("a.jpg", "a.png"):
        Image.fromarray(picture()).save(tmp_path / name)
    with pytest.raises(UserError, match=r"differ in their ending only \(a\), .*rename them"):
        find_images(tmp_path)
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(UserError, match="cannot read .*b.png"):
        predictor(tmp_path / "out").run(tmp_path / "b.png")


def test_wrong_settings_are_refused(tmp_path):
    with pytest.raises(UserError, match="expected some of labels, overlays, side_by_side, got 'x'"):
        predictor(tmp_path, kinds=["x", "labels"])
    with pytest.raises(UserError, match="alpha must be between 0 and 1, got 2"):
        predictor(tmp_path, alpha=2)


# ---- videos ----------------------------------------------------------------------------------
def write_video(path, frames=5, rate=12.0) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), rate, (40, 24))
    for number in range(frames):
        frame = np.zeros((24, 40, 3), np.uint8)
        frame[:, 4 * number + 8 :, 2] = 255  # red, for OpenCV the last channel
        writer.write(frame)
    writer.release()


def frames_of(path) -> tuple[list[np.ndarray], float]:
    with opened_video(path) as (frames, rate, _):
        return list(frames), rate


def test_a_video_gives_videos_and_a_map_for_each_frame(tmp_path):
    write_video(tmp_path / "drive.avi")
    seen = []
    tool = predictor(tmp_path / "out")
    assert tool.run(tmp_path / "drive.avi", lambda *count: seen.append(count)) == 5
    assert seen[-1] == (5, 5)
    paths = sorted((tmp_path / "out/labels/drive").iterdir())
    assert [p.name for p in paths] == [f"{n:06d}.png" for n in range(5)]
    for number, path in enumerate(paths):
        labels = np.asarray(Image.open(path))
        edge = 4 * number + 8
        # Compression blurs the edge.
        assert (labels[:, : edge - 2] == 0).all()
        assert (labels[:, edge + 2 :] == 1).all()
    for kind in ("overlays", "side_by_side"):
        frames, rate = frames_of(tmp_path / "out" / kind / "drive.mp4")
        assert (len(frames), rate) == (5, 12.0)
    assert frames_of(tmp_path / "out/overlays/drive.mp4")[0][0][:24].shape == (24, 40, 3)
    assert not list(tmp_path.glob("out/**/*partial*"))


def test_a_broken_video_leaves_nothing_half_done(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(UserError, match="cannot read the video .*a.mp4; convert it to mp4"):
        predictor(tmp_path / "out").run(tmp_path / "a.mp4")
    write_video(tmp_path / "b.avi")
    tool = predictor(tmp_path / "out", kinds=["overlays"])

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tool.run(tmp_path / "b.avi", stop)
    assert list((tmp_path / "out" / "overlays").iterdir()) == []


# ---- the command -----------------------------------------------------------------------------
def test_the_command_predicts_with_a_run(tmp_path, capsys):
    root = write_folder(tmp_path / "data")
    run = write_run(tmp_path / "run", config_of(root))
    out = tmp_path / "out"
    images = root / "images" / "val"
    command = ["predict", str(run), str(images), "--out", str(out), "--device", "cpu"]
    assert main([*command, "--kinds", "labels", "overlays"]) == 0
    assert "wrote labels, overlays of 3 pictures" in capsys.readouterr().out
    for path in images.iterdir():
        size = Image.open(path).size
        assert Image.open(out / "labels" / path.name).size == size
        assert Image.open(out / "overlays" / path.name).width == size[0]
    assert not (out / "side_by_side").exists()
    assert main(["predict", str(run), str(tmp_path / "no.jpg"), "--out", str(out)]) == 2
    assert "no file or folder" in capsys.readouterr().err
