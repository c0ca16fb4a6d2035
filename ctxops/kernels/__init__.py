"""Fused kernels in Triton for CUDA devices; optional, loaded on first use, never by `ctxops`."""
