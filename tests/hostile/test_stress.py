"""Ten times as many generated inputs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .contract import SCALE


@pytest.mark.stress
@pytest.mark.timeout(1500)
@pytest.mark.skipif(SCALE > 1, reason="this is the run that was asked for")
def test_ten_times_as_many_inputs():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "--tb=short", "-W", "ignore", str(Path(__file__).parent)],
        env={**os.environ, "HOSTILE_SCALE": "10"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:]
