"""A small semantic segmentation trainer that stands alone: it never imports Detectron2."""

__version__ = "0.1.0"

__all__ = ["__version__"]
