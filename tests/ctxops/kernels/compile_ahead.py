"""Compile every kernel for a device that need not be there.

`python -m tests.ctxops.kernels.compile_ahead CAPABILITY DTYPE...`, as in `90 fp32 bf16`, prints a
line per kernel: name, dtype, registers, bytes of stack (spilled registers) and, in the inner loop,
exchanges between threads through shared memory.
"""

import os
import re
import subprocess
import sys
import tempfile

os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ctxops.kernels import deformable, reassembly
from ctxops.kernels.deformable_jit import forward_kernel as deformable_forward
from ctxops.kernels.deformable_jit import grad_samples_kernel, grad_value_kernel
from ctxops.kernels.reassembly_jit import forward_kernel, grad_kernels_kernel, grad_map_kernel

SUMS = {"fp16": tl.float32, "bf16": tl.float32, "fp32": tl.float32, "fp64": tl.float64}
WIDE = {"fp16": "fp32", "bf16": "fp32", "fp32": "fp32", "fp64": "fp64"}
# Pointers that have a dtype of their own; all others point to what is asked for.
INDICES = {"order": "i32", "starts": "i32"}
POINTERS = """x kernels out grad_out grad_x grad_kernels value grad_value locations weights
grad_locations grad_weights order starts""".split()
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


def reassembly_cases(dtype, scale, stride):
    """(kernel, constants, warps) of 5 x 5 windows, as the launchers call them."""
    subs, channels = scale**2, reassembly.BLOCK_CHANNELS
    shared = {"SIZE": 5, "SCALE": scale, "STRIDE": stride, "SUM": SUMS[dtype]}
    yield forward_kernel, {**shared, "SUBS": subs, "BLOCK_C": channels, "BLOCK_P": 32}, 8
    taps = {"TAPS": -(-5 // stride), "SUB_COLUMNS": scale, "BLOCK_R": reassembly.BLOCK_ROWS}
    tile = {**taps, "BLOCK_C": channels, "BLOCK_P": 32 // scale}
    yield grad_map_kernel, {**shared, **tile}, reassembly.WARPS
    tile = {"SUBS": subs, "BLOCK_T": reassembly.BLOCK_TAPS, "BLOCK_C": 4, "BLOCK_P": 32}
    yield grad_kernels_kernel, {**shared, **tile}, reassembly.SUM_WARPS


def deformable_cases(dtype):
    """(kernel, constants, warps) of heads of width 32."""
    shared = {"BLOCK_D": 32, "SUM": SUMS[dtype]}
    queries = {**shared, "BLOCK_Q": deformable.BLOCK_QUERIES}
    for first in (True, False):
        yield deformable_forward, {**queries, "FIRST": first}, deformable.WARPS
    yield grad_samples_kernel, queries, deformable.WARPS
    yield grad_value_kernel, {**shared, "BLOCK_E": deformable.BLOCK_SAMPLES}, 1


def pointer(kernel, name, dtype):
    """Type of an argument that is a pointer."""
    wide = name in ("locations", "weights", "grad_locations", "grad_weights")
    # The forward pass of deformable attention adds up its levels in the dtype of the sums.
    wide = wide or (kernel is deformable_forward and name == "out")
    return "*" + INDICES.get(name, WIDE[dtype] if wide else dtype)


def compiled(kernel, dtype, constants, warps, capability):
    """A line of what the compiler made of it."""
    signature = {name: "i32" for name in kernel.arg_names}
    signature |= {n: pointer(kernel, n, dtype) for n in kernel.arg_names if n in POINTERS}
    signature |= {name: "constexpr" for name in constants}
    binary = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": True},
    )
    layouts = binary.asm["ttgir"]
    inner = layouts[layouts.rfind("scf.for") : layouts.find("scf.yield")]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = USAGE.search(usage).groups()
    return f"{kernel.__name__} {dtype} {registers} {stack} {inner.count('convert_layout')}"


def main():
    capability, *dtypes = sys.argv[1:]
    for dtype in dtypes:
        cases = [*reassembly_cases(dtype, 2, 1), *reassembly_cases(dtype, 1, 2)]
        for case in [*cases, *deformable_cases(dtype)]:
            print(compiled(case[0], dtype, *case[1:], int(capability)), flush=True)


if __name__ == "__main__":
    main()
