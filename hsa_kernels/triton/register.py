"""The kernels as torch custom operators, with shapes for tracing (torch.compile, fake tensors) and gradients.

`torch.use_deterministic_algorithms(True)` chooses the forms without atomic adds: equal bits in every run.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from hsa_kernels import select as selection
from hsa_kernels.reference import log_distance
from hsa_kernels.triton import attention


@library.custom_op("hsa_kernels::attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, indices: Tensor, chunk_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """hsa_attention by kernels, shapes in `reference.hsa_attention`, indices int32; and work lists for backward."""
    return attention.forward(q, k, v, weights, indices.contiguous(), chunk_size, scale)


@attention_op.register_fake
def _(q, k, v, weights, indices, chunk_size, scale):
    size = attention.lists_size(q, k, indices, chunk_size)
    return torch.empty_like(q, memory_format=torch.contiguous_format), indices.new_empty(size)


@library.custom_op("hsa_kernels::attention_backward", mutates_args=())
def attention_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    indices: Tensor,
    grad: Tensor,
    lists: Tensor,
    chunk_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, weights."""
    return attention.backward(q, k, v, weights, indices.contiguous(), grad, lists, chunk_size, scale)


@attention_backward_op.register_fake
def _(q, k, v, weights, indices, grad, lists, chunk_size, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, weights))


def _save_attention(ctx, inputs, output):
    q, k, v, weights, indices, ctx.chunk_size, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, weights, indices, output[1])


def _attention_gradient(ctx, grad, _):
    q, k, v, weights, indices, lists = ctx.saved_tensors
    grads = attention_backward_op(q, k, v, weights, indices, grad, lists, ctx.chunk_size, ctx.scale)
    return (*grads, None, None, None)


attention_op.register_autograd(_attention_gradient, setup_context=_save_attention)


@library.custom_op("hsa_kernels::select", mutates_args=())
def select_op(
    q: Tensor,
    landmarks: Tensor,
    documents: Tensor | None,
    noise: Tensor | None,
    decay: Tensor | None,
    top_k: int,
    chunk_size: int,
    query_offset: int,
    exclude_window: int,
    reach: float,
) -> tuple[Tensor, Tensor]:
    """select_chunks by kernels; shapes in `reference.select_chunks`."""
    return selection.select(
        q,
        landmarks,
        documents,
        noise,
        decay,
        top_k=top_k,
        chunk_size=chunk_size,
        query_offset=query_offset,
        exclude_window=exclude_window,
        reach=reach,
    )


@select_op.register_fake
def _(q, landmarks, documents, noise, decay, top_k, chunk_size, query_offset, exclude_window, reach):
    shape = (*q.shape[:3], top_k)
    return q.new_empty(shape, dtype=torch.int32), q.new_empty(shape, dtype=torch.float32)


@library.custom_op("hsa_kernels::select_backward", mutates_args=())
def select_backward_op(
    q: Tensor, landmarks: Tensor, indices: Tensor, grad: Tensor, chunk_size: int, query_offset: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the selected scores in q and landmarks."""
    return selection.select_backward(q, landmarks, indices, grad, chunk_size=chunk_size, query_offset=query_offset)


@select_backward_op.register_fake
def _(q, landmarks, indices, grad, chunk_size, query_offset):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, landmarks))


def _save_select(ctx, inputs, output):
    q, landmarks, _, _, decay, _, ctx.chunk_size, ctx.query_offset, _, ctx.reach = inputs
    ctx.save_for_backward(q, landmarks, output[0])
    ctx.decay_dtype = None if decay is None else decay.dtype
    ctx.mark_non_differentiable(output[0])


def _select_gradient(ctx, _, grad):
    q, landmarks, ids = ctx.saved_tensors
    dq, dlm = select_backward_op(q, landmarks, ids, grad, ctx.chunk_size, ctx.query_offset)
    ddecay = None
    if ctx.decay_dtype is not None and ctx.needs_input_grad[4]:
        position = torch.arange(q.shape[1], device=q.device)[:, None, None] + ctx.query_offset
        far = log_distance(position, ids, ctx.chunk_size, ctx.reach)
        ddecay = -(far * grad).masked_fill(ids < 0, 0.0).sum(-1).to(ctx.decay_dtype)
    return dq, dlm, None, None, ddecay, None, None, None, None, None


select_op.register_autograd(_select_gradient, setup_context=_save_select)
