"""ADE20K scene parsing (Zhou et al., 2017): 150 classes; 0 on disk is "other" and ignored.

ROOT/images/{training,validation}/*.jpg
ROOT/annotations/{training,validation}/*.png
ROOT/images/test/*.jpg
"""

from pathlib import Path

from segtrain.data.datasets.layout import Layout, by_folders
from segtrain.data.labels import class_set, reduce_zero

# The first of each class's names, in the order of the values 1..150.
_NAMES = """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
    person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa,
    shelf, house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp,
    bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter, sand,
    sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool
    table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet,
    flower, book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair,
    boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning,
    streetlight, booth, television, airplane, dirt track, apparel, pole, land, bannister,
    escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt,
    canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag,
    minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle,
    lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
    ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass,
    clock, flag
"""
NAMES = tuple(" ".join(name.split()) for name in _NAMES.split(","))
FOLDERS = {"train": "training", "val": "validation"}


def layout(root: Path) -> Layout:
    """ADE20K.

    Args:
        root: Folder ADEChallengeData2016.

    Returns:
        The layout.
    """
    return Layout(
        name="ade20k",
        root=root,
        classes=class_set(NAMES),
        encoding=reduce_zero(len(NAMES)),
        list_split=by_folders(
            images={k: f"images/{v}" for k, v in FOLDERS.items()} | {"test": "images/test"},
            labels={k: f"annotations/{v}" for k, v in FOLDERS.items()} | {"test": None},
        ),
        one_to_one=True,
    )
