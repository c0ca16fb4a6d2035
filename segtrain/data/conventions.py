"""The label-map detective: which convention a set of values looks like, and the YAML for it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from segtrain.data.datasets import Layout, camvid, cityscapes
from segtrain.data.labels import Colour, ValueEncoding, distinct_colours, ranges, unpack

_MANY = 256  # a label map with more values is a photograph, depth or instance map
_VOC_VALUES = 255


@dataclass(frozen=True)
class Evidence:
    """Everything that was seen in the label maps of a split.

    Attributes:
        values: Value, or packed colour, -> number of files that hold it.
        colours: Whether the values are packed colours.
        num_classes: K of the configuration.
        names: Names of the classes.
    """

    values: Mapping[int, int]
    colours: bool
    num_classes: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Guess:
    """A convention that explains all values.

    Attributes:
        text: What it looks like, one line.
        yaml: Lines to put into the configuration; "" where the files must change.
    """

    text: str
    yaml: str = ""


def guesses(evidence: Evidence) -> list[Guess]:
    """Conventions that explain the values, the likeliest first.

    Args:
        evidence: What was seen.

    Returns:
        At most three; none where nothing fits.
    """
    rules = _COLOUR_RULES if evidence.colours else _VALUE_RULES
    found = [guess for rule in rules for guess in rule(evidence)]
    if not evidence.values:
        return []
    return found[:3]


def suspicions(layout: Layout, values: Mapping[int, int]) -> list[Guess]:
    """Conventions that the values fit better, although the encoding knows every one of them.

    Args:
        layout: The data set as configured.
        values: Value -> number of files.

    Returns:
        Guesses; none where nothing looks odd.
    """
    encoding = layout.encoding
    if not isinstance(encoding, ValueEncoding) or not values:
        return []
    found: list[Guess] = []
    seen = set(values) - {255}
    table = dict(encoding.classes)
    if layout.name == "cityscapes" and seen <= set(range(19)) and 255 in values:
        text = "values 0..18 and 255 look like Cityscapes train ids, but label ids are expected"
        found.append(Guess(text, _folder_yaml("mapping", _same(19), names=layout.classes.names)))
    shifted = seen and 0 not in seen and max(seen) == len(layout.classes) and layout.name != "lip"
    if shifted and all(table.get(v) == v for v in seen - {max(seen)}):
        text = "value 0 never occurs and the largest is the number of classes: numbered from 1"
        found.append(Guess(text, _folder_yaml("reduce_zero")))
    return found


def _photograph(e: Evidence) -> Iterator[Guess]:
    if len(e.values) > _MANY:
        yield Guess("hundreds of colours: photographs, or masks that were resized smoothly")


def _cityscapes_colours(e: Evidence) -> Iterator[Guess]:
    palette = {colour: name for name, _, colour in cityscapes.CLASSES}
    yield from _named_palette(e, palette, "the colours of Cityscapes (_gtFine_color.png)")


def _camvid_colours(e: Evidence) -> Iterator[Guess]:
    yield from _named_palette(e, {c: n for n, c in camvid.CLASSES}, "the colours of CamVid")


def _voc_colours(e: Evidence) -> Iterator[Guess]:
    colours = distinct_colours(_VOC_VALUES + 1)
    numbers = [colours.index(c) for c in map(unpack, e.values) if c in colours]
    if len(numbers) < len(e.values):
        return
    top = max((n for n in numbers if n < _VOC_VALUES), default=0)
    names = e.names if len(e.names) > top else tuple(f"class{k}" for k in range(top + 1))
    palette = dict(zip(names, colours, strict=False))
    void = {"ignore": colours[_VOC_VALUES]} if _VOC_VALUES in numbers else {}
    yield Guess("the colours of PASCAL VOC's palette", _folder_yaml("palette", palette | void))


def _named_palette(e: Evidence, palette: Mapping[Colour, str], text: str) -> Iterator[Guess]:
    seen = {unpack(value) for value in e.values}
    known = seen & set(palette)
    # Black and a few more are what these data sets leave unlabelled.
    if len(known) >= 2 and 2 * len(known) > len(seen - {(0, 0, 0)}):
        lines: dict[str, Colour] = {name: colour for colour, name in palette.items()}
        lines |= {"ignore": (0, 0, 0)} if (0, 0, 0) not in palette else {}
        yield Guess(text, _folder_yaml("palette", lines))


def _any_colours(e: Evidence) -> Iterator[Guess]:
    if len(e.values) > _MANY:
        return
    colours = [unpack(value) for value in e.values]
    if all(red == green == blue for red, green, blue in colours):
        grey = sorted(red for red, _, _ in colours)
        text = f"three equal channels of the values {ranges(grey)}: grey saved as RGB"
        names = e.names if len(e.names) == len(grey) else tuple(f"class{v}" for v in grey)
        palette = {n: (v, v, v) for n, v in zip(names, grey, strict=True)}
        yield Guess(
            f"{text}; save one channel, or read them as colours", _folder_yaml("palette", palette)
        )
        return
    names = e.names if len(e.names) == len(colours) else _numbered(len(colours))
    lines = dict(zip(names, colours, strict=True))
    yield Guess(f"an RGB picture of {len(colours)} colours", _folder_yaml("palette", lines))


def _binary(e: Evidence) -> Iterator[Guess]:
    if set(e.values) in ({0, 255}, {255}) and e.num_classes <= 2:
        yield Guess("0 and 255 only: a binary mask", _folder_yaml("binary"))


def _anti_aliased(e: Evidence) -> Iterator[Guess]:
    values = set(e.values)
    if {0, 255} <= values and len(values) > 8 and e.num_classes <= 2:
        yield Guess(
            "0, 255 and greys between: a binary mask with smooth edges; write it again without "
            "smoothing, for example (mask > 127) * 255"
        )


def _cityscapes_ids(e: Evidence) -> Iterator[Guess]:
    values = set(e.values) - {255}
    ids = set(cityscapes.LABEL_IDS)
    if values <= set(range(34)) and len(values & ids) >= 3 and max(values) > 18:
        mapping = {v: k for v, k in cityscapes.label_ids_encoding().classes}
        text = f"values {ranges(sorted(values))} look like Cityscapes labelIds, not trainIds"
        yield Guess(text, "data:\n  dataset: cityscapes")
        yield Guess("or labelIds in a folder of your own", _folder_yaml("mapping", mapping))


def _instance_ids(e: Evidence) -> Iterator[Guess]:
    if any(value > 255 for value in e.values):
        text = "values above 255: instance ids (class * 1000 + n) or depth, not a label map"
        yield Guess(f"{text}; take the files of the class numbers (_labelIds.png)")


def _from_one(e: Evidence) -> Iterator[Guess]:
    values = set(e.values) - {255}
    if values and values <= set(range(e.num_classes + 1)) and e.num_classes in values:
        zero = "0 is other" if 0 in values else "0 does not occur"
        text = f"values up to {e.num_classes} for {e.num_classes} classes: counted from 1, {zero}"
        yield Guess(text, _folder_yaml("reduce_zero"))
        if 0 in values:
            extra = f"data:\n  folder:\n    classes: [background, ...]  # {e.num_classes + 1} names"
            yield Guess("or 0 is a class of its own, which has no name yet", extra)


def _last_is_void(e: Evidence) -> Iterator[Guess]:
    values = set(e.values) - {255}
    if values and max(values) == e.num_classes and 0 in values:
        ignore = [e.num_classes, 255]
        text = f"value {e.num_classes} may mean unlabelled, as 11 does in CamVid"
        yield Guess(text, f"data:\n  folder:\n    ignore: {ignore}")


def _spread(e: Evidence) -> Iterator[Guess]:
    values = sorted(set(e.values))
    steps = {b - a for a, b in zip(values, values[1:], strict=False)}
    if 2 <= len(values) <= e.num_classes and len(steps) == 1 and steps != {1} and values[0] == 0:
        mapping = {v: k for k, v in enumerate(values)}
        text = f"values {', '.join(map(str, values))}: classes spread over the greys to be visible"
        yield Guess(text, _folder_yaml("mapping", mapping))


def _sparse(e: Evidence) -> Iterator[Guess]:
    values = sorted(set(e.values) - {255})
    if len(values) == e.num_classes and values != list(range(e.num_classes)):
        mapping = {v: k for k, v in enumerate(values)}
        text = f"as many values as classes, {ranges(values)}: sparse numbers; check the order"
        yield Guess(text, _folder_yaml("mapping", mapping))


def _too_few_names(e: Evidence) -> Iterator[Guess]:
    values = sorted(set(e.values) - {255})
    if values and e.num_classes < max(values) < _VOC_VALUES:
        text = (
            f"values up to {max(values)} need {max(values) + 1} classes, {e.num_classes} are named"
        )
        yield Guess(text, f"data:\n  folder:\n    classes: [...]  # {max(values) + 1} names")


def _void_is_255(e: Evidence) -> Iterator[Guess]:
    foreign = sorted(v for v in e.values if v >= e.num_classes)
    if foreign == [_VOC_VALUES]:
        text = "255 is usual for pixels without a label"
        yield Guess(text, "data:\n  folder:\n    ignore: [255]")


Rule = Callable[[Evidence], Iterator[Guess]]
_COLOUR_RULES: Sequence[Rule] = (
    _photograph,
    _cityscapes_colours,
    _camvid_colours,
    _voc_colours,
    _any_colours,
)
_VALUE_RULES: Sequence[Rule] = (
    _instance_ids,
    _binary,
    _anti_aliased,
    _cityscapes_ids,
    _void_is_255,
    _spread,
    _from_one,
    _last_is_void,
    _sparse,
    _too_few_names,
)


def _folder_yaml(key: str, value: object = True, *, names: Sequence[str] = ()) -> str:
    """Lines of a folder data set: `key: true`, or a table with a line per entry."""
    lines = ["data:", "  dataset: folder", "  folder:"]
    if names:
        lines.append(f"    classes: [{', '.join(names)}]")
    if not isinstance(value, Mapping):
        return "\n".join([*lines, f"    {key}: {str(value).lower()}"])
    lines.append(f"    {key}:")
    for name, entry in value.items():
        shown = list(entry) if isinstance(entry, tuple) else entry
        lines.append(f"      {name}: {shown}")
    return "\n".join(lines)


def _same(count: int) -> dict[int, int]:
    return {k: k for k in range(count)}


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"class{k}" for k in range(count))
