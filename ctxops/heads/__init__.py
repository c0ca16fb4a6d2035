"""Context heads that Squeeze Reasoning is compared with, one file each.

All of them are modules [B, C, H, W] -> [B, C', H, W] of the same size with keyword-only
constructors; `norm` is an argument where the head has a norm to choose.
"""
