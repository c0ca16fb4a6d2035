"""Small images whose answer needs one mechanism: context from afar, another scale, fine borders.

In an image of an ambiguous task, everything within `Task.reach` of the pixels that need the
mechanism is drawn from random streams that do not know the answer: the same seed and index with
another answer give the same pixels there, bit by bit. So no local patch tells the answer, and the
best guess from one is right as often as chance.
"""

from segtrain.data.synthetic.tasks.draw import (
    MAX_SIDE,
    MIN_SIDE,
    NUM_ANSWERS,
    TASKS,
    Task,
    TaskImage,
    draw_task,
)
from segtrain.data.synthetic.tasks.writer import write_task

__all__ = [
    "MAX_SIDE",
    "MIN_SIDE",
    "NUM_ANSWERS",
    "TASKS",
    "Task",
    "TaskImage",
    "draw_task",
    "write_task",
]
