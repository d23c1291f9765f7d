"""Cross entropy of logits, and of hidden states and an output weight without all logits at once: ours in chunks, and
DeepSpeed's, both exact, for a vocabulary that tensor-parallel ranks may share out, computing logits again in backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel import fused
from parallel.compat import vocab_parallel_cross_entropy


def token_losses(logits: Tensor, labels: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Losses (L, B) float32 of this tensor-parallel rank's logits (L, B, its part of the vocabulary)."""
    if group.size() == 1 and logits.is_cuda:  # Megatron's reads and writes all fp32 logits about ten times
        return fused.cross_entropy(logits, labels)
    return vocab_parallel_cross_entropy(logits.float(), labels)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, rows: int) -> Tensor:
        losses = [
            vocab_parallel_cross_entropy(torch.nn.functional.linear(h, weight).float(), target)
            for h, target in zip(hidden.split(rows), labels.split(rows), strict=True)
        ]
        ctx.save_for_backward(hidden, weight, labels)
        ctx.rows = rows
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, labels = ctx.saved_tensors
        # One bf16 sum over all chunks would lose what the late ones add.
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight_gradient = torch.zeros_like(weight, dtype=wide)
        hidden_gradient = torch.empty_like(hidden)
        for h, target, g, out in zip(
            hidden.split(ctx.rows),
            labels.split(ctx.rows),
            gradient.split(ctx.rows),
            hidden_gradient.split(ctx.rows),
            strict=True,
        ):
            with torch.enable_grad():
                logits = torch.nn.functional.linear(h, weight).detach().float().requires_grad_()
                # The loss overwrites what it is given, so it gets a tensor of its own.
                (of_logits,) = torch.autograd.grad(vocab_parallel_cross_entropy(logits * 1.0, target), logits, g)
            of_logits = of_logits.to(h.dtype)
            out.copy_(of_logits @ weight)
            weight_gradient += of_logits.flatten(0, -2).T @ h.flatten(0, -2)
        return hidden_gradient, weight_gradient.to(weight.dtype), None, None


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, tokens: int) -> Tensor:
    """Losses (L, B) float32 of hidden (L, B, hidden) @ weight.T, logits of about `tokens` tokens at a time.

    weight: this tensor-parallel rank's rows of the vocabulary; hidden and labels (L, B) are the same on all of them.
    Hidden's gradient is this rank's part of a sum over them (`whole_sequence` sums it).
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, max(1, tokens // labels.shape[1]))


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, group: torch.distributed.ProcessGroup
) -> Tensor:
    """Losses like labels, float32, of hidden (..., hidden) @ weight.T by DeepSpeed's operator, which is slow to import.

    hidden and labels are the same on all ranks of `group`, which share the vocabulary out in equal parts; hidden's
    gradient comes out summed over them.
    """
    import deepspeed.comm
    from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy

    parallel = group.size() > 1
    if parallel and not deepspeed.comm.is_initialized():
        deepspeed.comm.init_distributed(verbose=False)  # takes over torch's process groups
    return vocab_parallel_linear_cross_entropy(
        hidden, weight, labels, tp_group=group if parallel else None, ignore_index=-100, reduction="none"
    )
