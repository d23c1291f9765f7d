"""Tensor parallelism of what is ours: heads shared out, gradients summed where every rank holds a part of them.

Megatron's layers split the query heads of sliding windows and the MLPs by themselves. HSA and the context memory follow
one rule: their input comes whole through `whole_sequence`, whose backward sums over the ranks; behind it each rank
works for its own query heads alone, so every gradient there is a partial sum. A weight that is split needs no more than
that. A weight (or gain) that all ranks hold is marked, and its gradient is summed once per step by
`sum_partial_gradients`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parallel.compat import (
    ColumnParallelLinear,
    MegatronModule,
    RowParallelLinear,
    TransformerConfig,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    make_sharded_tensors_for_checkpoint,
    parallel_state,
)

# Gains over single heads: each rank sees its own heads only.
_HEAD_NORMS = (".q_layernorm.", ".k_layernorm.", ".retrieval_layernorm.", ".landmark_layernorm.")


def heads_of_rank(heads: int, group: torch.distributed.ProcessGroup) -> range:
    """The heads that this rank's query heads belong to: its equal share, or one head shared with other ranks."""
    size, rank = group.size(), group.rank()
    if heads % size == 0:
        share = heads // size
        return range(rank * share, (rank + 1) * share)
    if size % heads:
        raise ValueError(f"{heads} heads can be neither split over {size} ranks nor shared by equal numbers of them")
    head = rank * heads // size
    return range(head, head + 1)


def whole_sequence(x: Tensor, config: TransformerConfig, group: torch.distributed.ProcessGroup) -> Tensor:
    """(L or L / tensor, B, hidden) -> (L, B, hidden); its backward sums the ranks' partial gradients."""
    if config.sequence_parallel:
        return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
    return copy_to_tensor_model_parallel_region(x, group=group)


class HeadLinear(MegatronModule):
    """Projection to this rank's heads, without bias: (..., hidden) -> (..., local heads * head size), None.

    The weight (heads * head size, hidden) is split where the number of heads allows it. Where several ranks share a
    head, each holds the whole weight and uses the rows of its own head.
    """

    def __init__(
        self, config: TransformerConfig, heads: int, head_dim: int, group: torch.distributed.ProcessGroup
    ) -> None:
        super().__init__(config=config)
        self.group = group
        self.is_split = heads % group.size() == 0
        local = heads_of_rank(heads, group)
        self.rows = slice(0, len(local) * head_dim)
        if not self.is_split:
            self.rows = slice(local.start * head_dim, local.stop * head_dim)
        held = len(local) if self.is_split else heads
        self.weight = nn.Parameter(torch.empty(held * head_dim, config.hidden_size, dtype=config.params_dtype))
        if self.is_split:
            _mark_split(self.weight, 0, group.size())
        else:
            _mark_partial(self.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """The pair that Megatron's linear layers return: output, bias."""
        return nn.functional.linear(x, self.weight[self.rows]), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As Megatron's layers say how they are stored: split along dimension 0, or a replica."""
        axes = {"weight": 0} if self.is_split else {}
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )


def _mark_split(parameter: nn.Parameter, dim: int, count: int) -> None:
    """What Megatron's initialisation would have noted: optimizers count such a parameter on every rank."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = dim  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]
    parameter.partition_count = count  # type: ignore[attr-defined]


def _mark_partial(parameter: nn.Parameter) -> None:
    parameter.partial_over_tensor = True  # type: ignore[attr-defined]
    parameter.sequence_parallel = False  # type: ignore[attr-defined]  # else Megatron would sum it a second time


def mark_parameters(model: nn.Module) -> None:
    """Note on every parameter how it is split and whether its gradient is a part of a sum."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is None:
            continue
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            _mark_split(weight, 0, module.tp_group.size())
        elif isinstance(module, RowParallelLinear):
            _mark_split(weight, 1, module.tp_group.size())
        elif (mode := getattr(module, "parallel_mode", None)) in ("column", "row"):  # Transformer Engine's
            size = parallel_state.get_tensor_model_parallel_world_size()
            _mark_split(weight, 0 if mode == "column" else 1, size)
    for name, parameter in model.named_parameters():
        if any(part in f".{name}" for part in _HEAD_NORMS):
            _mark_partial(parameter)


def shard_of(values: Tensor, parameter: nn.Parameter, name: str) -> Tensor:
    """This rank's part of a whole parameter's values. A gated fc1 is split in both halves."""
    count = getattr(parameter, "partition_count", 1)
    if count == 1:
        return values
    rank = parallel_state.get_tensor_model_parallel_rank()
    if ".linear_fc1." in name:
        return torch.cat([half.chunk(count)[rank] for half in values.chunk(2)])
    return values.chunk(count, dim=parameter.partition_dim)[rank]  # type: ignore[attr-defined]


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the parameter in the whole model."""
    shape = list(parameter.shape)
    count = getattr(parameter, "partition_count", 1)
    if count > 1:
        shape[parameter.partition_dim] *= count  # type: ignore[attr-defined]
    return torch.Size(shape)


def sum_partial_gradients(chunks: Sequence[nn.Module]) -> None:
    """Sum the marked parameters' gradients over the tensor-parallel ranks: one all-reduce per step, a few kilobytes."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    marked = (p for chunk in chunks for p in chunk.parameters() if getattr(p, "partial_over_tensor", False))
    gradients = [parameter.main_grad for parameter in marked]  # type: ignore[attr-defined]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat, group=group)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))
