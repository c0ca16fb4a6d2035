"""Settings for every test."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # Tiny tensors gain nothing from threads, and lose much where cores are shared.
    torch.set_num_threads(1)
