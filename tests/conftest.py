"""Settings for every test."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's interpreter runs the kernels on a CPU. It is asked for before Triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # Tiny tensors gain nothing from threads, and lose much where cores are shared.
    torch.set_num_threads(1)
