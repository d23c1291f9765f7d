"""Megatron's router with a z-loss of our own scale, and what it counts for the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parallel.compat import TopKRouter, TransformerConfig, parallel_state


class _Attach(torch.autograd.Function):
    """`x`, whose backward also goes into a loss of its own with gradient 1."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.like = loss
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        return gradient, torch.ones_like(ctx.like)


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """`x` as it is; its backward also goes into `loss`, a scalar, as if that were added to the objective.

    Like every loss here it must be a plain sum, divided with all gradients by the step's global sum of loss weights; so
    it depends on neither the layout nor the number of micro-batches.
    """
    return _Attach.apply(x, loss)


class Router(TopKRouter):
    """Megatron's TopKRouter. z-loss (arXiv 2202.08906): coefficient x sum over tokens of logsumexp(logits)^2.

    A plain sum (`attach_loss`), unlike Megatron's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("z_sum", torch.zeros((), dtype=torch.float32), persistent=False)

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """logits (tokens, experts); counts the tokens' squares, once also where layers are computed again."""
        coefficient = self.config.moe_z_loss_coeff
        if not coefficient or not self.training or not torch.is_grad_enabled():
            return logits
        squares = logits.float().logsumexp(dim=-1).square().sum()
        self.z_sum += squares.detach()
        return attach_loss(logits, coefficient * squares)


class LoadStatistics:
    """Loads of all mixture-of-experts layers of one step: collected on the device, summed with the step's other sums.

    A layer's row: tokens per expert, then its biases before this step's update, then the sum of its z-losses.
    """

    def __init__(self, chunks: Sequence[nn.Module], config: TransformerConfig) -> None:
        self.routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]
        self.layers = [layer for layer, has_experts in enumerate(config.moe_layer_freq) if has_experts]
        self.experts, self.top_k = config.num_moe_experts, config.moe_router_topk
        self.z_coefficient = config.moe_z_loss_coeff
        self.shape = (config.num_layers, 2 * self.experts + 1)

    def local(self, device: torch.device) -> Tensor:
        """This rank's part (layers * numbers,) float64; all ranks' sum is the whole. Call before biases move."""
        state = parallel_state
        # Every rank of a stage has the same bias; those of all but one would be added to it.
        first = state.get_tensor_model_parallel_rank() == 0 and (
            state.get_data_parallel_rank(with_context_parallel=True) == 0
        )
        rows = torch.zeros(self.shape, dtype=torch.float64, device=device)
        for router in self.routers:
            row = rows[router.layer_number - 1]
            row[: self.experts] = router.local_tokens_per_expert
            if first:
                row[self.experts : -1] = router.expert_bias
            row[-1] = router.z_sum
            router.z_sum.zero_()
        return rows.flatten()

    def summary(self, total: Tensor) -> Tensor:
        """(layers, 4): largest load by mean load, share of idle experts, spread of biases, mean z-loss per token."""
        rows = total.view(self.shape)
        loads, biases, z = rows.split([self.experts, self.experts, 1], dim=1)
        mean = loads.mean(1).clamp_min(1e-9)
        tokens = loads.sum(1).clamp_min(1.0)
        return torch.stack(
            (
                loads.amax(1) / mean,
                (loads == 0).double().mean(1),
                biases.amax(1) - biases.amin(1),
                z[:, 0] * self.top_k / tokens,
            ),
            dim=1,
        )

    def metrics(self, values: list[list[float]]) -> dict[str, float]:
        """`summary` by name, layers numbered from 0; the z-loss as the mean over layers, where it is trained."""
        named: dict[str, float] = {}
        for layer in self.layers:
            largest, idle, spread, _ = values[layer]
            named[f"moe/layer{layer}/max_load"] = largest
            named[f"moe/layer{layer}/idle_experts"] = idle
            named[f"moe/layer{layer}/bias_spread"] = spread
        if self.z_coefficient:
            named["moe/z_loss"] = sum(values[layer][3] for layer in self.layers) / len(self.layers)
        return named
