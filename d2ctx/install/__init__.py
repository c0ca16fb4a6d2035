"""Install Detectron2 where there is none: `python -m d2ctx.install`.

Detectron2 has no release on the package index. Its version 0.5 is there under another name, but
without the C++ sources that its build script wants. This package downloads that archive, checks it,
makes a pure-Python wheel that runs on current PyTorch, NumPy and Pillow, and installs it. A
Detectron2 that the environment already has is never touched.
"""
