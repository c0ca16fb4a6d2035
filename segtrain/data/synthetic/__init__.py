"""Procedural scenes with exact semantic, instance and panoptic ground truth."""

from segtrain.data.synthetic.categories import CATEGORIES, STUFF, THINGS, Category
from segtrain.data.synthetic.scene import Scene, SceneObject, generate_scene
from segtrain.data.synthetic.writers import FORMATS, write_dataset

__all__ = [
    "CATEGORIES",
    "FORMATS",
    "STUFF",
    "THINGS",
    "Category",
    "Scene",
    "SceneObject",
    "generate_scene",
    "write_dataset",
]
