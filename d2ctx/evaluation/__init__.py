"""Evaluation and export: COCO average precision, panoptic quality, Cityscapes.

`build` chooses by a data set's metadata. `panoptic_quality`, `panoptic_files`, `validate` and
`cityscapes_official` know nothing of Detectron2 and can be used without it.
"""
