"""Numeric fixtures computed with reference implementations, where they lie beside the checkout."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"

needs_shared = pytest.mark.skipif(
    not (SHARED / "goldens").is_dir(),
    reason="these numeric fixtures are not shipped with the repository",
)
