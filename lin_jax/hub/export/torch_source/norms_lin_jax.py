"""The norm of LLaMA's and T5's residual streams."""

import torch
from torch import Tensor, nn

from .recurrence_lin_jax import wide


class LinJaxRMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`, in float32 or better."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last axis."""
        normed = wide(x) * (wide(x).square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (normed * self.weight.to(normed.dtype)).to(x.dtype)
