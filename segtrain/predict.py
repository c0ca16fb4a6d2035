"""Predictions of images, folders and videos as files: class numbers, overlays, side by side."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import cv2
import numpy as np

from segtrain.data.datasets.layout import IMAGE_SUFFIXES, all_below, files_below, repeated
from segtrain.data.labels import ClassSet, Labels
from segtrain.data.reading import read_image
from segtrain.errors import UserError
from segtrain.files import write_bytes
from segtrain.inference import Inferencer
from segtrain.submit import png_bytes
from segtrain.visual import Picture, overlay, side_by_side, with_legend
from segtrain.wording import first_of

KINDS = ("labels", "overlays", "side_by_side")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".webm")
Progress = Callable[[int, int | None], None]


class Predictor:
    """Writes what is asked for.

    Args:
        inferencer: What predicts.
        classes: Names and colours.
        folder: Where to: `labels/NAME.png` (class numbers), `overlays/NAME.png` (colours over the
            image, with a legend), `side_by_side/NAME.png`; of videos `overlays/NAME.mp4` and so on.
        kinds: Some of `KINDS`.
        alpha: Share of the colours in overlays, 0 to 1.

    Raises:
        UserError: If a kind is unknown, or `alpha` is no share.
    """

    def __init__(
        self,
        inferencer: Inferencer,
        classes: ClassSet,
        folder: Path,
        *,
        kinds: Sequence[str] = KINDS,
        alpha: float = 0.6,
    ) -> None:
        unknown = sorted(set(kinds) - set(KINDS))
        if unknown or not kinds:
            raise UserError(f"expected some of {', '.join(KINDS)}, got {', '.join(unknown)!r}")
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha must be between 0 and 1, got {alpha:g}")
        self.inferencer, self.classes, self.folder = inferencer, classes, folder
        self.kinds, self.alpha = tuple(kinds), alpha

    def run(self, source: Path, progress: Progress | None = None) -> int:
        """Predict an image, every image below a folder, or a video.

        Args:
            source: The file or the folder.
            progress: Called with the pictures done and, where it is known, their number.

        Returns:
            How many images or frames.

        Raises:
            UserError: If there is nothing that can be read.
        """
        progress = progress or (lambda done, total: None)
        if source.suffix.lower() in VIDEO_SUFFIXES and source.is_file():
            return self.video(source, progress)
        images = find_images(source)
        for done, (name, path) in enumerate(images.items(), start=1):
            self.image(path, name)
            progress(done, len(images))
        return len(images)

    def image(self, path: Path, name: str) -> Labels:
        """Predict one image.

        Args:
            path: The file.
            name: Name of the results, without an ending.

        Returns:
            uint8 [H, W].

        Raises:
            UserError: If the file cannot be read.
        """
        image = read_image(path)
        labels = self.inferencer.labels(image)
        for kind in self.kinds:
            target = self.folder / kind / f"{name}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(target, png_bytes(self.picture(kind, image, labels, shown=labels)))
        return labels

    def picture(
        self, kind: str, image: Picture, labels: Labels, *, shown: Labels | None
    ) -> Picture | Labels:
        """What is written of one image.

        Args:
            kind: One of `KINDS`.
            image: [H, W, 3].
            labels: [H, W].
            shown: The map whose classes the legend names; None names all.

        Returns:
            The labels, or RGB.
        """
        if kind == "labels":
            return labels
        mixed = overlay(image, labels, self.classes, alpha=self.alpha)
        if kind == "side_by_side":
            mixed = side_by_side([image, mixed])
        return with_legend(mixed, self.classes, shown)

    def video(self, path: Path, progress: Progress) -> int:
        """Predict every frame of a video; class numbers go to `labels/NAME/000000.png`.

        Args:
            path: The file.
            progress: As in `run`.

        Returns:
            How many frames.

        Raises:
            UserError: If it cannot be read or written.
        """
        with ExitStack() as stack:
            frames, rate, total = stack.enter_context(opened_video(path))
            films = {
                kind: stack.enter_context(Film(self._place(kind) / f"{path.stem}.mp4", rate))
                for kind in self.kinds
                if kind != "labels"
            }
            done = 0
            for done, frame in enumerate(frames, start=1):
                labels = self.inferencer.labels(frame)
                if "labels" in self.kinds:
                    target = self._place(f"labels/{path.stem}") / f"{done - 1:06d}.png"
                    write_bytes(target, png_bytes(labels))
                for kind, film in films.items():
                    film.add(self.picture(kind, frame, labels, shown=None))
                progress(done, total)
            if not done:
                raise UserError(f"{path} has no frame that can be read; convert it to mp4")
        return done

    def _place(self, below: str) -> Path:
        place = self.folder / below
        place.mkdir(parents=True, exist_ok=True)
        return place


def find_images(source: Path) -> dict[str, Path]:
    """Images to predict.

    Args:
        source: An image, or a folder that is searched at any depth.

    Returns:
        Name of the results, which may hold folders -> file.

    Raises:
        UserError: If there are none, or two would get the same name.
    """
    if source.is_file():
        return {source.stem: source}
    if not source.is_dir():
        raise UserError(f"no file or folder {source}; name an image, a folder or a video")
    paths = files_below(source, IMAGE_SUFFIXES)
    if not paths:
        raise UserError(f"no image below {source}; known endings: {', '.join(IMAGE_SUFFIXES)}")
    names = [path.relative_to(source).with_suffix("").as_posix() for path in paths]
    if twice := repeated(names):
        raise UserError(
            f"{source} has images that differ in their ending only ({first_of(twice)}), their "
            "results would get the same name; rename them"
        )
    return dict(zip(names, paths, strict=True))


def left_out(source: Path) -> list[Path]:
    """Files below a folder that `find_images` does not take for images.

    Args:
        source: As in `find_images`.

    Returns:
        The files, none of a single image; hidden ones are not counted.

    Raises:
        UserError: If a folder cannot be listed.
    """
    files = all_below(source) if source.is_dir() else ()
    return sorted(path for path in files if not path.name.lower().endswith(IMAGE_SUFFIXES))


@contextmanager
def opened_video(path: Path) -> Iterator[tuple[Iterator[Picture], float, int | None]]:
    """Open a video for reading.

    Args:
        path: The file.

    Yields:
        RGB frames [H, W, 3], frames per second, and the number of frames where the file says it.

    Raises:
        UserError: If it cannot be read.
    """
    capture = cv2.VideoCapture(os.fspath(path))
    try:
        if not capture.isOpened():
            raise UserError(f"cannot read the video {path}; convert it to mp4")
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        yield _frames(capture), capture.get(cv2.CAP_PROP_FPS) or 25.0, total if total > 0 else None
    finally:
        capture.release()


def _frames(capture: cv2.VideoCapture) -> Iterator[Picture]:
    while True:
        there, frame = capture.read()
        if not there:
            return
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


class Film:
    """A video that is written frame by frame, and is not there before its last one.

    Args:
        path: The file.
        rate: Frames per second.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self.rate = path, rate
        self._unfinished = path.with_name(f"{path.stem}.{os.getpid()}.partial{path.suffix}")
        self._writer: cv2.VideoWriter | None = None

    def __enter__(self) -> "Film":
        return self

    def add(self, frame: Picture) -> None:
        """Write a frame.

        Args:
            frame: RGB [H, W, 3], always of the same size; odd sides get a line more.

        Raises:
            UserError: If this OpenCV cannot write videos.
        """
        height, width = frame.shape[:2]
        # Codecs take even sides only.
        even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._writer is None:
            size = (even.shape[1], even.shape[0])
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(os.fspath(self._unfinished), codec, self.rate, size)
            if not self._writer.isOpened():
                raise UserError(
                    f"this OpenCV cannot write {self.path.suffix} videos; write labels only"
                )
        self._writer.write(cv2.cvtColor(even, cv2.COLOR_RGB2BGR))

    def __exit__(self, kind: object, *_: object) -> None:
        if self._writer is None:
            return
        self._writer.release()
        if kind is None:
            os.replace(self._unfinished, self.path)
            return
        with suppress(FileNotFoundError):
            self._unfinished.unlink()
