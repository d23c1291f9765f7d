"""Routed experts of one layer as two stacked weights, multiplied in one grouped product each.

The parameters are what Megatron's `SequentialMLP` holds in one module per expert: its checkpoints load here and the
other way round, at any expert-parallel size. Weights (experts of this rank, out, in); tokens come sorted by expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parallel.compat import (
    CPU_SHIM,
    HAVE_TRANSFORMER_ENGINE,
    MegatronModule,
    ModuleSpec,
    ProcessGroupCollection,
    ShardedTensor,
    TransformerConfig,
    transformer_engine_experts,
)
from parallel.errors import OptionalPartError
from parallel.model_config import ModelConfig

# torch's grouped product wants rows that start on this boundary, forward and backward.
_ALIGNMENT = 16


def fits_grouped_product(hidden_size: int, ffn_hidden_size: int, itemsize: int) -> bool:
    """Whether torch can multiply all experts in one call: it is there, and rows are multiples of 16 bytes."""
    aligned = all(size * itemsize % _ALIGNMENT == 0 for size in (hidden_size, ffn_hidden_size))
    return aligned and hasattr(nn.functional, "grouped_mm")


class _StackedLinear(nn.Module):
    """Holder of one stacked weight, so that it is called as in `SequentialMLP`."""

    def __init__(self, experts: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs, dtype=dtype))
        # Gradient norms count it on every tensor-parallel rank: each has the experts of its own expert-parallel group.
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim, self.weight.partition_stride = 0, 1  # type: ignore[attr-defined]


class StackedExperts(MegatronModule):
    """SwiGLU experts without bias; takes the place of `SequentialMLP` in Megatron's `MoELayer`.

    `grouped`: one product over all experts. Off, without any token, or in float64, one product per expert.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        grouped: bool,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        ffn, dtype = config.moe_ffn_hidden_size, config.params_dtype
        self.grouped = grouped
        self.ep_group = pg_collection.ep
        self.dp_group = pg_collection.expt_dp
        self.linear_fc1 = _StackedLinear(num_local_experts, 2 * ffn, config.hidden_size, dtype)
        self.linear_fc2 = _StackedLinear(num_local_experts, config.hidden_size, ffn, dtype)

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """tokens (n, hidden), the first tokens_per_expert[0] of them for expert 0 and so on; probs (n,): their weights.

        Returns (n, hidden) and Megatron's place for a bias.
        """
        if self.grouped and tokens.shape[0] and tokens.dtype != torch.float64:
            ends = tokens_per_expert.to(tokens.device, non_blocking=True).cumsum(0).int()
            gate, up = nn.functional.grouped_mm(tokens, self.linear_fc1.weight.mT, offs=ends).chunk(2, dim=-1)
            hidden = self._weighted(gate, up, probs)
            return nn.functional.grouped_mm(hidden, self.linear_fc2.weight.mT, offs=ends), None
        counts = tokens_per_expert.tolist()
        outputs = []
        for x, p, fc1, fc2 in zip(
            tokens.split(counts), probs.split(counts), self.linear_fc1.weight, self.linear_fc2.weight, strict=True
        ):
            gate, up = nn.functional.linear(x, fc1).chunk(2, dim=-1)
            outputs.append(nn.functional.linear(self._weighted(gate, up, p), fc2))
        return torch.cat(outputs), None

    @staticmethod
    def _weighted(gate: Tensor, up: Tensor, probs: Tensor) -> Tensor:
        """SwiGLU, times the router's weights (fp32), in the dtype of the products."""
        return (nn.functional.silu(gate) * up * probs.unsqueeze(-1)).to(gate.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The stacked weights as parts of (all experts, out, in), under the names `SequentialMLP` stores them by."""
        axis = len(sharded_offsets)
        return {
            f"{prefix}{name}.weight": ShardedTensor.from_rank_offsets(
                f"{prefix}experts.{name}.weight",
                getattr(self, name).weight,
                *sharded_offsets,
                (axis, self.ep_group.rank(), self.ep_group.size()),
                replica_id=(0, 0, self.dp_group.rank()),
                prepend_axis_num=axis,
            )
            for name in ("linear_fc1", "linear_fc2")
        }


def experts_spec(model: ModelConfig, dtype: torch.dtype, choice: str) -> ModuleSpec:
    """The experts of every layer for a recipe's `compute.grouped_experts`: auto | require | off.

    auto: Transformer Engine's grouped product in bf16 on a GPU where it is installed, else torch's where the sizes
    allow it, else one product per expert. require: OptionalPartError instead of the last.
    """
    if choice != "off" and HAVE_TRANSFORMER_ENGINE and not CPU_SHIM and dtype == torch.bfloat16:
        return transformer_engine_experts()
    fits = fits_grouped_product(model.hidden_size, model.expert_ffn_hidden_size, dtype.itemsize)
    if choice == "require" and not fits:
        raise OptionalPartError(
            f"compute.grouped_experts=require: torch's grouped product needs model.hidden_size {model.hidden_size} and "
            f"model.expert_ffn_hidden_size {model.expert_ffn_hidden_size} to be multiples of "
            f"{_ALIGNMENT // dtype.itemsize} in {str(dtype).removeprefix('torch.')}; change them, or set "
            "compute.grouped_experts=auto"
        )
    return ModuleSpec(module=StackedExperts, params={"grouped": choice != "off" and fits})


def stacked_weights(experts: nn.Module) -> tuple[Tensor, Tensor]:
    """All experts' weights of a layer as (experts, 2 * width, hidden) and (experts, hidden, width), without gradient:
    the parameters themselves, copies where Transformer Engine holds them one by one.
    """
    if isinstance(experts, StackedExperts):
        return experts.linear_fc1.weight.detach(), experts.linear_fc2.weight.detach()
    first, second = (
        torch.stack([getattr(getattr(experts, name), f"weight{i}").detach() for i in range(experts.num_local_experts)])
        for name in ("linear_fc1", "linear_fc2")
    )
    return first, second


def describe_experts(chunks: Sequence[nn.Module]) -> str:
    """In a few words, how this rank's routed experts are computed; "" where it has none."""
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, StackedExperts):
            return "in one grouped product (torch)" if module.grouped else "one after the other"
        if type(module).__name__ == "TEGroupedMLP":
            return "in one grouped product (Transformer Engine)"
    return ""


def is_expert_parameter(name: str) -> bool:
    """True for the weights of routed experts, whichever module holds them."""
    return ".experts." in name


def expert_parts(name: str, values: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, values) of each expert in one parameter (or gradient) of this rank, experts numbered on this rank.

    Names are those of one module per expert: `...experts.local_experts.N.linear_fc1.weight`.
    """
    stacked = re.fullmatch(r"(.*\bexperts\.)(linear_fc[12]\.weight)(\d*)", name)
    if stacked is None:
        yield name, values
    elif stacked[3]:  # Transformer Engine: weight0, weight1, ..
        yield f"{stacked[1]}local_experts.{stacked[3]}.{stacked[2]}", values
    else:
        for number, part in enumerate(values):
            yield f"{stacked[1]}local_experts.{number}.{stacked[2]}", part
