"""Rotary angles of absolute positions, exact at any length: for an HSA with positions, which is an experiment."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from parallel.model_config import ModelConfig


def absolute_angles(positions: Tensor, model: ModelConfig, dtype: torch.dtype) -> Tensor:
    """positions (n, m) -> angles (n, m, 1, D) in [0, 2 pi), both halves equal, fp32 or wider if `dtype` is.

    Computed in fp64: fp32 has no digits left for the angles of 16M tokens.
    """
    half = torch.arange(0, model.head_dim, 2, dtype=torch.float64, device=positions.device) / model.head_dim
    angles = torch.remainder(positions[..., None].double() * model.rope_base**-half, 2 * math.pi)
    return torch.cat((angles, angles), dim=-1)[:, :, None].to(torch.promote_types(dtype, torch.float32))
