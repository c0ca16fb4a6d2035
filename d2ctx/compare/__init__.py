"""Is one run really better than the other, or were these images kind to it?

`python -m d2ctx.compare`; nothing here needs Detectron2.
"""
