"""Procedural scenes with exact semantic, instance and panoptic ground truth."""

from segtrain.data.synthetic.categories import CATEGORIES, STUFF, THINGS, Category
from segtrain.data.synthetic.scene import Scene, SceneObject, generate_scene
from segtrain.data.synthetic.tasks import TASKS, Task, TaskImage, draw_task, write_task
from segtrain.data.synthetic.writers import FORMATS, write_dataset

__all__ = [
    "CATEGORIES",
    "FORMATS",
    "STUFF",
    "TASKS",
    "THINGS",
    "Category",
    "Scene",
    "SceneObject",
    "Task",
    "TaskImage",
    "draw_task",
    "generate_scene",
    "write_dataset",
    "write_task",
]
