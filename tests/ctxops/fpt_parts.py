"""What the tests of FPT's modules share."""

import torch
from torch import nn


def lively(module):
    """Norms and biases that are not at their initial values; float64, evaluation mode."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
        if isinstance(part, nn.Conv2d) and part.bias is not None:
            nn.init.normal_(part.bias)
    return module.double().eval()


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def maps(*sizes, channels=8, batch=1, dtype=torch.float64):
    """Random maps of the given sizes."""
    return [torch.randn(batch, channels, *size, dtype=dtype) for size in sizes]


def gradients(module, *inputs):
    """Largest gradient of every parameter after one step, by name."""
    out = module(*inputs)
    outputs = out if isinstance(out, list) else [out]
    sum((out * torch.randn_like(out)).sum() for out in outputs).backward()
    return {name: p.grad.abs().max().item() for name, p in module.named_parameters()}


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
