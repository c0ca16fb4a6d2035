"""Scores of semantic segmentation: counted in integers, exact over images and processes."""
