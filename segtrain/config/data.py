"""Configuration of the data: which set, where it lies, how images are cut and changed."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from segtrain.config.base import (
    Byte,
    Count,
    CountOrZero,
    FromList,
    LabelValue,
    Positive,
    PositiveShare,
    Section,
    Share,
    Size,
    Text,
)

Colour = Annotated[tuple[Byte, Byte, Byte], FromList]


class FolderConfig(Section):
    """Data set of your own: `ROOT/images/SPLIT/*`, `ROOT/masks/SPLIT/*` with equal names."""

    classes: Annotated[tuple[Text, ...], FromList] | str | None = None
    """Names of the classes in the order of their numbers, or a text file with one name a line,
    relative to the root; null reads `classes.txt`."""

    images: Text = "images"
    """Folder of the images, relative to the root."""

    masks: Text = "masks"
    """Folder of the masks, relative to the root."""

    ignore: Annotated[tuple[LabelValue, ...], FromList] = (255,)
    """Values of the masks that count neither in training nor in evaluation."""

    reduce_zero: bool = False
    """Value 0 is ignored, and value k is class k - 1."""

    mapping: dict[LabelValue, Byte] | None = None
    """Value of the masks -> class, or 255 for ignored; a value that is not listed is an error."""

    binary: bool = False
    """Two classes: 0 is class 0, 1 or 255 is class 1; greys between them are refused."""

    palette: dict[Text, Colour] | None = None
    """Class name -> colour, for masks that are RGB pictures."""

    def problems(self) -> Iterator[str]:
        """What is wrong between the keys of this section, each text with its fix."""
        readings = {
            "reduce_zero": self.reduce_zero,
            "mapping": self.mapping is not None,
            "binary": self.binary,
            "palette": self.palette is not None,
        }
        named = [name for name, used in readings.items() if used]
        if len(named) > 1:
            yield f"{' and '.join(named)} contradict each other; keep one of them"
        if isinstance(self.classes, tuple) and len(set(self.classes)) < len(self.classes):
            twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
            yield f"classes names {', '.join(twice)} twice; give every class a name of its own"


class DataConfig(Section):
    """Images and labels, and how training changes them."""

    dataset: Literal[
        "cityscapes", "ade20k", "context59", "context60", "voc", "lip", "camvid", "folder"
    ]
    """Which data set; `folder` is one of your own."""

    root: Text
    """Folder of the data set; a relative one starts at the working directory."""

    train_split: Text = "train"
    """Split to train on."""

    train_images: Count | None = None
    """How many images of `train_split` to train on, drawn by `train.seed`; fewer are always some of
    the more. null takes all."""

    val_split: Text = "val"
    """Split to evaluate on."""

    folder: FolderConfig | None = None
    """How to read the data set `folder`; null takes the defaults."""

    crop: Size
    """Height and width of a training crop, in pixels."""

    base_size: Size
    """Images are resized, ratio kept, until the long side has the first or the short side the
    second number of pixels, whichever comes first; `scale` multiplies both."""

    scale: Annotated[tuple[Positive, Positive], FromList] = (0.5, 2.0)
    """Range of the random scale of training."""

    short_sides: Annotated[tuple[Count, ...], Field(min_length=1), FromList] | None = None
    """Short sides that training draws from instead of `scale`; the long side of `base_size` stays
    the longest."""

    cat_max_ratio: PositiveShare = 0.75
    """A crop is drawn again (up to ten times) while one class covers this share of its pixels."""

    flip: Share = 0.5
    """Probability of a horizontal flip."""

    photometric: bool = True
    """Random brightness, contrast, saturation and hue."""

    normalisation: Literal["auto", "imagenet", "vit"] = "auto"
    """Mean and deviation of the pixels; `auto` takes those of the encoder's weights."""

    workers: CountOrZero = 2
    """Processes that load images, for each training process; 0 loads in the training process."""

    check: Literal["full", "headers", "off"] = "full"
    """What is looked at before training: every label, sizes only, or nothing."""

    def problems(self) -> Iterator[str]:
        """What is wrong between the keys of this section, each text with its fix."""
        if self.folder is not None and self.dataset != "folder":
            yield (
                f"the section folder has no effect on {self.dataset}; write dataset: folder or "
                "remove the section"
            )
        low, high = self.scale
        if low > high:
            yield f"scale must be [lowest, highest], got [{low:g}, {high:g}]; swap the two"
        longest, shortest = self.base_size
        if longest < shortest:
            yield (
                f"base_size must be [long side, short side], got [{longest}, {shortest}]; "
                "swap the two"
            )
