"""Where Triton kernels are chosen, and what the user is told where they cannot run."""

import pytest
import torch

from ctxops import reassemble_up
from ctxops.deform_attention import deformable_attention
from ctxops.kernels import probe, reassembly

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, as far as the probe can tell; set the capability."""

    def set_capability(capability):
        monkeypatch.setattr(probe, "_installed", lambda: True)
        monkeypatch.setattr(probe, "_capability", lambda index: capability)

    return set_capability


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)])
def test_auto_takes_the_kernels_where_they_can_be_compiled(gpu, capability):
    gpu(capability)
    assert probe.runs_triton("auto", CUDA, fits=True)
    assert probe.runs_triton("triton", CUDA, fits=True)


def test_auto_never_takes_an_old_device_nor_offsets_that_overflow_nor_the_interpreter(
    gpu, monkeypatch
):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    gpu((7, 5))
    assert not probe.runs_triton("auto", CUDA, fits=True)
    gpu((9, 0))
    assert not probe.runs_triton("auto", CUDA, fits=False)
    assert not probe.runs_triton("auto", CPU, fits=True)
    assert not probe.runs_triton("chunked", CUDA, fits=True)


def test_a_missing_package_is_not_used_by_auto_and_named_otherwise(monkeypatch):
    monkeypatch.setattr(probe, "_installed", lambda: False)
    assert not probe.runs_triton("auto", CUDA, fits=True)
    with pytest.raises(ValueError, match=r"expected the package triton, got none; install it"):
        probe.runs_triton("triton", CUDA, fits=True)


def test_the_device_is_named_where_kernels_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, kernels = torch.zeros(1, 2, 3, 4), torch.zeros(1, 9, 4, 3, 4)
    text = r"impl: 'triton' expected tensors on a CUDA device .* got cpu; .* use 'auto'"
    with pytest.raises(ValueError, match=text):
        reassemble_up(x, kernels, impl="triton")
    locations = torch.zeros(1, 2, 1, 1, 1, 2)
    with pytest.raises(ValueError, match=text):
        deformable_attention(
            torch.zeros(1, 12, 1, 2), [(3, 4)], locations, locations[..., 0], impl="triton"
        )


def test_tensors_beyond_32_bits_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.empty(1, 1, 6000, 6000, device="meta")
    kernels = torch.empty(1, 1, 1, 6000, 6000, device="meta")
    assert not probe.reassembly_fits(x, kernels)
    with pytest.raises(ValueError, match=r"offsets .* below 2\^31, got larger tensors"):
        reassemble_up(x, kernels, impl="triton")


@pytest.mark.parametrize(
    ("x", "kernels", "fits"),
    [
        ((64, 2048, 2000, 2000), (64, 25, 4, 2000, 2000), True),
        ((1, 1, 5800, 5800), (1, 1, 1, 1, 1), False),
        ((1, 1, 3000, 3000), (1, 1, 4, 3000, 3000), False),
        ((1, 1, 2500, 2500), (1, 49, 4, 2500, 2500), False),
    ],
)
def test_limits_of_the_reassembly(x, kernels, fits):
    maps = torch.empty(x, device="meta"), torch.empty(kernels, device="meta")
    assert probe.reassembly_fits(*maps) == fits


@pytest.mark.parametrize(
    ("value", "weights", "fits"),
    [
        ((8, 100_000, 8, 32), (8, 100_000, 8, 3, 16), True),
        ((1, 2**20, 32, 64), (1, 1, 32, 1, 1), False),
        ((1, 1, 32, 64), (1, 2**20, 32, 1, 1), False),
        ((2, 1, 1, 1), (2, 2**29, 1, 1, 1), False),
        ((2**10, 2**18, 2, 1), (2**10, 1, 2, 1, 1), False),
    ],
)
def test_limits_of_deformable_attention(value, weights, fits):
    tensors = torch.empty(value, device="meta"), torch.empty(weights, device="meta")
    assert probe.deformable_fits(*tensors) == fits


def test_no_tile_is_larger_than_the_limits_assume():
    blocks = reassembly.BLOCK_CHANNELS, reassembly.BLOCK_TAPS, reassembly.SUM_WARPS
    assert max(blocks) <= probe.MAX_BLOCK


def test_the_answer_is_a_constant_to_compilers():
    def choose(x):
        return x + 1 if probe.triton_available(x.device) else x - 1

    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == -1
