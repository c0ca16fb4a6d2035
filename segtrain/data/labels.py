"""Classes, and how a label map on disk becomes class numbers.

Behind an encoding, labels are uint8: 0..K-1 a class, 255 ignored. A value that the encoding does
not list is an error that names it; nothing is ever clipped or ignored silently.

Letters: H W map, K classes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segtrain.errors import UserError

IGNORE_INDEX = 255
Colour = tuple[int, int, int]
Labels = NDArray[np.uint8]

_SHOWN = 8  # how many foreign values an error names


@dataclass(frozen=True)
class ClassSet:
    """Names and colours of the classes; class k is entry k.

    Attributes:
        names: One name per class, all different.
        palette: One RGB colour per class, to draw with.
    """

    names: tuple[str, ...]
    palette: tuple[Colour, ...]

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
            UserError: If there are none, more than 255, two of one name, or not a colour each.
        """
        if not 1 <= len(self.names) <= IGNORE_INDEX:
            raise UserError(f"expected 1..255 classes, got {len(self.names)}; 255 means ignored")
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise UserError(f"two classes are named {twice[0]!r}; give each a name of its own")
        if len(self.palette) != len(self.names):
            raise UserError(
                f"expected a colour for each of {len(self.names)} classes, got {len(self.palette)}"
            )

    def __len__(self) -> int:
        return len(self.names)

    def paint(self, labels: Labels) -> NDArray[np.uint8]:
        """Draw class numbers in colours.

        Args:
            labels: uint8 [H, W].

        Returns:
            RGB, uint8 [H, W, 3]; what is ignored is black.
        """
        table = np.zeros((256, 3), np.uint8)
        table[: len(self.palette)] = self.palette
        return table[labels]


def class_set(names: Sequence[str], palette: Sequence[Colour] | None = None) -> ClassSet:
    """Make a class set, with distinct colours where none are given.

    Args:
        names: One name per class.
        palette: One RGB colour per class; None takes `distinct_colours`.

    Returns:
        The class set.

    Raises:
        UserError: As `ClassSet`.
    """
    return ClassSet(tuple(names), tuple(palette or distinct_colours(len(names), start=1)))


def distinct_colours(count: int, *, start: int = 0) -> list[Colour]:
    """The colour map of PASCAL VOC: the bits of a number, dealt to red, green and blue.

    Args:
        count: How many colours.
        start: Number of the first; number 0 is black.

    Returns:
        RGB colours, all different for numbers below 256.
    """
    return [_bits_to_colour(number) for number in range(start, start + count)]


def _bits_to_colour(number: int) -> Colour:
    red = green = blue = 0
    for place in range(8):
        red |= (number >> (3 * place) & 1) << (7 - place)
        green |= (number >> (3 * place + 1) & 1) << (7 - place)
        blue |= (number >> (3 * place + 2) & 1) << (7 - place)
    return red, green, blue


@dataclass(frozen=True)
class ValueEncoding:
    """Label maps of one channel whose values stand for classes.

    Attributes:
        classes: (value on disk, class number or 255), each value once.
    """

    classes: tuple[tuple[int, int], ...]
    colours = False

    def decode(self, stored: NDArray[np.integer]) -> Labels:
        """Class numbers of a label map.

        Args:
            stored: Integers [H, W] as on disk.

        Returns:
            uint8 [H, W]: 0..K-1, or 255.

        Raises:
            UserError: If the map has another shape, or a value that the encoding does not list.
        """
        if stored.ndim != 2:
            raise UserError(f"expected a label map of one channel, got {_kind(stored)}")
        labels, known = self._arrays()
        inside = stored.dtype == np.uint8 or (stored.min() >= 0 and stored.max() < len(known))
        if not inside or not known[stored].all():
            raise UserError(f"{self.foreign_text(np.unique(stored).tolist())}; {self._expected()}")
        return labels[stored]

    def table(self) -> dict[int, int]:
        """Value on disk -> class number or 255."""
        return dict(self.classes)

    def foreign_text(self, values: Iterable[int]) -> str:
        """Name the values that the encoding does not list.

        Args:
            values: Values.

        Returns:
            "unknown values 12, 13".
        """
        return _unknown("value", [str(value) for value in _foreign(values, self.table())])

    def _expected(self) -> str:
        return f"known: {ranges([value for value, _ in self.classes])}"

    def _arrays(self) -> tuple[Labels, NDArray[np.bool_]]:
        # A byte has its place whether it is listed or not; wider values as far as they are listed.
        places = max(256, *(value + 1 for value, _ in self.classes))
        labels = np.full(places, IGNORE_INDEX, np.uint8)
        known = np.zeros(places, bool)
        for value, label in self.classes:
            labels[value], known[value] = label, True
        return labels, known


@dataclass(frozen=True)
class ColourEncoding:
    """Label maps that are RGB pictures, one colour a class.

    Attributes:
        classes: (colour on disk, class number or 255), each colour once.
    """

    classes: tuple[tuple[Colour, int], ...]
    colours = True

    def decode(self, stored: NDArray[np.integer]) -> Labels:
        """Class numbers of a picture.

        Args:
            stored: uint8 RGB [H, W, 3].

        Returns:
            uint8 [H, W]: 0..K-1, or 255.

        Raises:
            UserError: If the picture has another shape, or a colour that the encoding lacks.
        """
        if stored.ndim != 3 or stored.shape[2] != 3:
            raise UserError(f"expected an RGB picture, got {_kind(stored)}; remove palette")
        packed = pack(stored)
        keys, labels = (np.array(part) for part in zip(*sorted(self.table().items()), strict=True))
        place = np.searchsorted(keys, packed).clip(max=len(keys) - 1)
        if (keys[place] != packed).any():
            raise UserError(f"{self.foreign_text(np.unique(packed).tolist())}; {self._expected()}")
        return labels.astype(np.uint8)[place]

    def table(self) -> dict[int, int]:
        """Packed colour on disk -> class number or 255."""
        return {pack(np.array(colour)).item(): label for colour, label in self.classes}

    def foreign_text(self, values: Iterable[int]) -> str:
        """Name the packed colours that the encoding does not list.

        Args:
            values: Packed colours, see `pack`.

        Returns:
            "unknown colours [1, 2, 3], [4, 5, 6]".
        """
        foreign = _foreign(values, self.table())
        return _unknown("colour", [str(list(unpack(value))) for value in foreign])

    def _expected(self) -> str:
        return f"{len(self.classes)} colours are known; add them to palette"


Encoding = ValueEncoding | ColourEncoding


def pack(colours: NDArray[np.integer]) -> NDArray[np.int64]:
    """One number per colour: red * 65536 + green * 256 + blue.

    Args:
        colours: RGB [..., 3].

    Returns:
        [...].
    """
    return colours.astype(np.int64) @ np.array([65536, 256, 1])


def unpack(number: int) -> Colour:
    """The colour of a packed number.

    Args:
        number: See `pack`.

    Returns:
        Red, green, blue.
    """
    return number >> 16, number >> 8 & 255, number & 255


def identity(num_classes: int, *, ignore: Sequence[int] = (IGNORE_INDEX,)) -> ValueEncoding:
    """Value k is class k.

    Args:
        num_classes: K.
        ignore: Values that are ignored.

    Returns:
        The encoding; an ignored value wins over the class of that number.
    """
    return from_mapping({k: k for k in range(num_classes)}, ignore=ignore)


def reduce_zero(num_classes: int, *, ignore: Sequence[int] = (IGNORE_INDEX,)) -> ValueEncoding:
    """Value 0 is ignored, value k is class k - 1; 255 stays 255 (ADE20K, PASCAL Context 59).

    Args:
        num_classes: K.
        ignore: More values that are ignored.

    Returns:
        The encoding.
    """
    return from_mapping({k + 1: k for k in range(num_classes)}, ignore=(0, *ignore))


def from_mapping(
    mapping: Mapping[int, int], *, ignore: Sequence[int] = (IGNORE_INDEX,)
) -> ValueEncoding:
    """An encoding that lists every value.

    Args:
        mapping: Value on disk -> class number or 255.
        ignore: Values that become 255 whatever the mapping says.

    Returns:
        The encoding.
    """
    table = {**mapping, **dict.fromkeys(ignore, IGNORE_INDEX)}
    return ValueEncoding(tuple(sorted(table.items())))


def ranges(numbers: Sequence[int]) -> str:
    """Numbers as ranges.

    Args:
        numbers: Any order.

    Returns:
        "0..10, 255".
    """
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)


def _foreign(values: Iterable[int], table: Mapping[int, int]) -> list[int]:
    return sorted(value for value in values if value not in table)


def _unknown(thing: str, foreign: Sequence[str]) -> str:
    more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
    ending = "" if len(foreign) == 1 else "s"
    return f"unknown {thing}{ending} {', '.join(foreign[:_SHOWN])}{more}"


def _kind(stored: NDArray[np.integer]) -> str:
    if stored.ndim == 3:
        return f"{stored.shape[2]} channels"
    return f"{stored.ndim} axes" if stored.ndim != 2 else "one channel"
