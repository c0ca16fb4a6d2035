"""The tasks by name, and one image of any of them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from segtrain.data.synthetic.tasks.board import UNITS, Board, Streams, streams
from segtrain.data.synthetic.tasks.objects import (
    FAR_REACH,
    FIRST_ANSWER,
    SCENE_REACH,
    draw_far,
    draw_local,
    draw_scene,
)
from segtrain.data.synthetic.tasks.outlines import draw_boundary
from segtrain.data.synthetic.tasks.scales import (
    DETAIL_REACH,
    WHOLE_REACH,
    draw_detail,
    draw_whole,
    engrave,
)

NUM_ANSWERS = 2
MIN_SIDE, MAX_SIDE, SIDE_STEP = 64, 512, 8
_DETAIL = "detail"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of image.

    Args:
        number: part of the seed; never reused.
        about: what decides the class, in one line.
        classes: names, class 0 first.
        reach: units (side / 64 pixels) around the pixels that need the mechanism within which
            nothing depends on the answer; 0 where they tell it themselves.
        draw: from board, streams and answer to the pixels that need the mechanism.
    """

    number: int
    about: str
    classes: tuple[str, ...]
    reach: float
    draw: Callable[[Board, Streams, int], np.ndarray]

    @property
    def scored(self) -> tuple[int, ...]:
        """Classes of the answers; of the object where there is but one class of it."""
        return tuple(range(FIRST_ANSWER, len(self.classes))) or (1,)


TASKS = {
    "far": Task(
        number=1,
        about="plain discs; the colour of one ring in a far corner is their class",
        classes=("ground", "ring", "warm disc", "cold disc"),
        reach=FAR_REACH,
        draw=draw_far,
    ),
    "whole": Task(
        number=2,
        about="plain dots on a plain disc; the direction of broad waves around it is their class",
        classes=("ground", "disc", "dot amid rows", "dot amid columns"),
        reach=WHOLE_REACH,
        draw=draw_whole,
    ),
    _DETAIL: Task(
        number=3,
        about="a large disc; lines of one pixel in its core, which coarse cells average away, "
        "are its class",
        classes=("ground", "core", "disc of rows", "disc of columns"),
        reach=DETAIL_REACH,
        draw=draw_detail,
    ),
    "boundary": Task(
        number=4,
        about="one object with a wavy outline; scored along the outline",
        classes=("ground", "object"),
        reach=0.0,
        draw=draw_boundary,
    ),
    "scene": Task(
        number=5,
        about="plain discs; whether the colours of squares and stars go together is their class",
        classes=("ground", "sign", "disc among pairs", "disc among others"),
        reach=SCENE_REACH,
        draw=draw_scene,
    ),
    "local": Task(
        number=6,
        about="as far, but the discs wear the colour themselves: no context is needed",
        classes=("ground", "ring", "warm disc", "cold disc"),
        reach=0.0,
        draw=draw_local,
    ),
}


@dataclass(frozen=True, kw_only=True)
class TaskImage:
    """An image and its truth; every pixel has a class.

    Args:
        image: [H, W, 3] uint8, RGB.
        semantic: [H, W] uint8, class numbers from 0.
        needs: [H, W] bool, the pixels whose class needs the mechanism.
        answer: what the class of those is, from 0.
    """

    image: np.ndarray
    semantic: np.ndarray
    needs: np.ndarray
    answer: int


def draw_task(
    *, task: str, seed: int, index: int, side: int = UNITS, answer: int | None = None
) -> TaskImage:
    """Draw image number `index` of a seed; it depends on nothing else.

    Args:
        task: a name of `TASKS`.
        seed: seed of the data set, >= 0.
        index: number of the image, >= 0.
        side: pixels, a multiple of 8 from 64 to 512.
        answer: None to draw it, or 0 or 1: the same image with this answer.

    Returns:
        The image.

    Raises:
        ValueError: for an unknown task, or a number out of range.
    """
    _check(task, seed, index, side, answer)
    about = TASKS[task]
    random = streams([seed, index, side, about.number])
    drawn = int(random.answer.integers(NUM_ANSWERS))
    given = drawn if answer is None else answer
    board = Board(side)
    board.ground(random.ground)
    needs = about.draw(board, random, given)
    image = board.photograph(random.camera)
    if task == _DETAIL:
        image = engrave(image, board.labels == 1, given)
    return TaskImage(image=image, semantic=board.labels, needs=needs, answer=given)


def _check(task: str, seed: int, index: int, side: int, answer: int | None) -> None:
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; use one of {', '.join(TASKS)}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be >= 0, got seed {seed}, index {index}; use 0")
    if not MIN_SIDE <= side <= MAX_SIDE or side % SIDE_STEP:
        raise ValueError(
            f"side must be a multiple of {SIDE_STEP} from {MIN_SIDE} to {MAX_SIDE} pixels, got "
            f"{side}; use for example {MIN_SIDE}"
        )
    if answer is not None and answer not in range(NUM_ANSWERS):
        raise ValueError(f"answer must be 0 or 1, got {answer}; use None to draw it")
