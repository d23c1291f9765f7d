"""Muon: momentum whose update is made orthogonal, for the weight matrices of the decoder.

Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024): Nesterov momentum in the form
of an exponential average, five steps of a quintic Newton-Schulz iteration, and a step scaled by sqrt(max(1,
rows/columns)). With that scale one learning rate (0.01 to 0.02) serves all widths. ``torch.optim.Muon`` computes the
same one matrix at a time; here equal shapes go through one batched iteration, which is what makes many small matrices
cheap, and a leading expert dimension is allowed.

Who keeps which matrix is `optimizer.py`'s: with owners a rank orthogonalises its share of the matrices alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Coefficients a, b, c of X <- aX + b(XX')X + c(XX')^2 X, chosen there to pull small singular values up fastest.
_QUINTIC = (3.4445, -4.7750, 2.0315)
# Elements orthogonalised in one batch; bounds the temporary memory to a few times this.
_BATCH_ELEMENTS = 1 << 26


def orthogonalize(matrices: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Matrices (..., rows, columns) with the same singular vectors and singular values near 1 (0.7 to 1.2).

    Computes in the dtype of ``matrices``; bfloat16 is enough. Rows and columns are swapped while rows > columns, so the
    small Gram matrix is formed. A zero matrix stays zero.
    """
    a, b, c = _QUINTIC
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(eps)
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    for _ in range(steps):  # one launch per product: many small matrices are bound by the number of launches
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.view(shape)
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


def update_scale(shape: torch.Size | tuple[int, ...]) -> float:
    """Factor of the learning rate for a matrix (..., rows, columns)."""
    return max(1.0, shape[-2] / shape[-1]) ** 0.5


def _split_dimension(parameter: Tensor, group: torch.distributed.ProcessGroup | None) -> int | None:
    """-2 or -1 where tensor-parallel ranks hold rows or columns of the matrix, None where each holds it whole."""
    if group is None or group.size() == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return None
    return parameter.partition_dim - parameter.dim()  # type: ignore[attr-defined]


class Muon(torch.optim.Optimizer):
    """Muon for parameters of two or more dimensions; the last two are the matrix, those before are independent
    matrices.

    lr, momentum, ns_steps and the decoupled weight_decay are per group, and Megatron's scheduler may change lr and
    weight_decay between steps. tensor_group: the tensor-parallel ranks, over which Megatron's marks on a parameter say
    it is split. State per parameter: ``momentum_buffer``, of its shape and dtype.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        momentum: float = 0.95,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
        tensor_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        self.tensor_group = tensor_group
        super().__init__(params, dict(lr=lr, momentum=momentum, ns_steps=ns_steps, weight_decay=weight_decay))
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() < 2:
                    raise ValueError(f"Muon needs matrices, got a parameter of shape {tuple(parameter.shape)}")

    def init_state(self) -> None:
        """Give every parameter its (zero) momentum, so that a checkpoint has something to write or to load into."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        self.init_state()
        for group in self.param_groups:
            by_shape: dict[tuple[torch.Size, int | None], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    split = None if group.get("is_expert_parallel") else _split_dimension(parameter, self.tensor_group)
                    by_shape.setdefault((parameter.shape, split), []).append(parameter)
            for (shape, split), parameters in by_shape.items():
                size = max(1, _BATCH_ELEMENTS // shape.numel())
                for start in range(0, len(parameters), size):
                    self._update(parameters[start : start + size], group, split)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any], split: int | None) -> None:
        """Update parameters of one shape together. `split`: the dimension of which this rank holds a part."""
        momentum, lr = group["momentum"], group["lr"]
        # bfloat16 matmuls are fast and exact enough on a GPU; a CPU gains nothing from them.
        dtype = torch.bfloat16 if parameters[0].is_cuda else torch.float32
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        stacked = torch.stack(torch._foreach_lerp(grads, buffers, momentum)).to(dtype)
        if split is not None:
            # A matrix is made orthogonal as a whole. In which order the ranks' rows or columns come does not matter.
            assert self.tensor_group is not None
            parts = [torch.empty_like(stacked) for _ in range(self.tensor_group.size())]
            torch.distributed.all_gather(parts, stacked, group=self.tensor_group)
            stacked = torch.cat(parts, dim=split)
        updates = orthogonalize(stacked, group["ns_steps"])
        scale = lr * update_scale(updates.shape)
        if split is not None:
            assert self.tensor_group is not None
            updates = updates.chunk(self.tensor_group.size(), dim=split)[self.tensor_group.rank()]
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, list(updates.to(parameters[0].dtype).unbind()), alpha=-scale)
