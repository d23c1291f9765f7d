"""Elementwise parts of a layer as one kernel each on CUDA, by torch.compile; plain torch elsewhere.

Eager torch reads and writes the activations once per operation, which in a model of small matrices costs as much as the
matrices. Leading sizes are compiled as unknowns, so a new stage's shapes cost no compilation.
TORCH_COMPILE_DISABLE=1 (torch's own switch) runs the same functions uncompiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_SMALL = 1 << 18  # elements; below, a launch costs more than the memory traffic, and a compiled call more than a launch


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, in fp32 at least, in the dtype of x."""
    if x.is_cuda and x.numel() < _SMALL and x.dtype == weight.dtype:  # torch's one kernel, in fp32 inside
        return nn.functional.rms_norm(x, weight.shape, weight, eps)
    if not x.is_cuda or x.numel() < _SMALL:
        return _rms_norm(x, weight, eps)
    rows = x.reshape(-1, x.shape[-1])
    return _call(_rms_norm, rows, weight, eps).view(x.shape)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions: x (L, B, H, D), angles (L, 1, 1, D) whose halves are equal; in the dtype of x."""
    if not x.is_cuda or x.numel() < _SMALL:
        return _rotate(x, angles)
    return _call(_rotate, x, angles)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Losses like labels, float32, of logits (..., vocabulary) of any dtype; computed in float32."""
    if not logits.is_cuda:
        return _cross_entropy(logits.flatten(0, -2), labels.flatten()).view(labels.shape)
    rows, targets = logits.flatten(0, -2), labels.flatten()
    torch._dynamo.maybe_mark_dynamic(targets, 0)
    return _call(_cross_entropy, rows, targets).view(labels.shape)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return nn.functional.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).type_as(x)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def _call(function: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
    """The compiled form, its first dimensions unknown, its last one a constant."""
    for dim in range(x.dim() - 2 if x.dim() > 2 else 1):
        torch._dynamo.maybe_mark_dynamic(x, dim)
    torch._dynamo.mark_static(x, x.dim() - 1)
    with torch._dynamo.config.patch(recompile_limit=64):
        return _compiled(function)(x, *others)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function)
