"""How many inputs were tried; runs behind all others."""

from pathlib import Path

import pytest

from .contract import CASES

LEAST = 2000


def test_enough_cases_were_tried(request):
    mine = {path.name for path in Path(__file__).parent.glob("test_*.py")}
    ran = {
        item.path.name
        for item in request.session.items
        if item.path.parent == Path(__file__).parent
    }
    chosen = request.config.option.keyword or any("::" in arg for arg in request.config.args)
    # The one of stress is not collected by default.
    if chosen or mine - {"test_stress.py"} - ran:
        pytest.skip("only some of the files are run")
    assert sum(CASES.values()) >= LEAST, dict(CASES)
