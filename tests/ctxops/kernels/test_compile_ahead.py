"""The kernels compile for devices that this machine need not have, without spilling registers."""

import os
import subprocess
import sys

import pytest

from tests.contracts.source_tree import ROOT


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's assembler comes with Triton on Linux")
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability, tmp_path):
    # A process of its own: in this one Triton interprets. A cache of its own: compile, not look up.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    dtypes = ["fp32", "bf16", "fp16", "fp64"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.ctxops.kernels.compile_ahead", str(capability), *dtypes],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == len(dtypes) * 10
    for name, dtype, registers, stack, exchanges in rows:
        # Sums in float64 take twice the registers; they are for checks, and may spill a few.
        assert int(stack) <= 32 * (dtype == "fp64"), (name, dtype, registers)
        # Only what is one number per query may change hands.
        assert int(exchanges) <= 3 * (name == "grad_samples_kernel"), (name, dtype)
