"""RMSNorm as a Megatron module spec can build it, on any device and with sequence parallelism."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parallel.compat import TransformerConfig
from parallel.fused import rms_norm


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * gain over the last dimension, in fp32 at least, returned in the dtype of x.

    Megatron's own fallback refuses sequence parallelism, hence this one: the gain is marked so that its gradient is
    summed over the ranks that each hold a part of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        # A gain stays in the parameters' dtype so that distributed optimizers keep one buffer per dtype.
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
