"""Many tensors in a few launches, with the arguments of apex's multi-tensor kernels: what Megatron takes in their place
(`compat`) where neither apex nor Transformer Engine is installed.
"""

from __future__ import annotations

from typing import Any

import torch


def l2_norm(_: int, __: Any, lists: list[list[torch.Tensor]], *___: Any) -> tuple[torch.Tensor, None]:
    """Norm of all tensors together, (1,) float32."""
    norms = torch._foreach_norm([tensor for tensors in lists for tensor in tensors])
    return torch.linalg.vector_norm(torch.stack(list(norms))).float().reshape(1), None


def scale(_: int, __: Any, lists: list[list[torch.Tensor]], factor: float) -> None:
    """Tensors of the second list = factor * those of the first, which may be the same."""
    sources, targets = lists
    if not sources:
        return
    if all(a is b for a, b in zip(sources, targets, strict=True)):
        torch._foreach_mul_(targets, factor)
    else:
        torch._foreach_copy_(targets, sources if factor == 1.0 else list(torch._foreach_mul(sources, factor)))
