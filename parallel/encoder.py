"""Chunk encoder: turns the lower decoder's hidden states into the context memory, once, for all HSA layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from parallel.compat import (
    MLP,
    ColumnParallelLinear,
    MegatronModule,
    MLPSubmodules,
    ModuleSpec,
    ProcessGroupCollection,
    RowParallelLinear,
    SelfAttention,
    SelfAttentionSubmodules,
    TransformerConfig,
    build_module,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    sharded_state_dict_default,
)
from parallel.fused import rotate
from parallel.memory import ContextMemory
from parallel.model_config import ModelConfig
from parallel.norm import RMSNorm
from parallel.positions import absolute_angles
from parallel.tensor import HeadLinear


class BidirectionalCoreAttention(nn.Module):
    """Full attention inside one chunk, no mask and no positional encoding: the slot Megatron's SelfAttention leaves
    open.
    """

    def __init__(self, config: TransformerConfig, **_: object) -> None:
        super().__init__()
        self.scale = config.kv_channels**-0.5

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query, key, value (S + 1, chunks, heads, D) -> (S + 1, chunks, heads * D)."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return out.permute(2, 0, 1, 3).flatten(2)


class ChunkSelfAttention(SelfAttention):
    """Megatron's projections and QK-norm around `BidirectionalCoreAttention`."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        return self.linear_proj(self.core_attention(*self.get_query_key_value_tensors(hidden_states)))[0]


class EncoderLayer(MegatronModule):
    """Pre-norm bidirectional layer with a dense SwiGLU MLP; hidden states (S + 1, chunks, hidden)."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection, layer_number: int) -> None:
        super().__init__(config=config)
        norm = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        attention = ModuleSpec(
            module=ChunkSelfAttention,
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear,
                core_attention=BidirectionalCoreAttention,
                linear_proj=RowParallelLinear,
                q_layernorm=RMSNorm,
                k_layernorm=RMSNorm,
            ),
        )
        self.input_layernorm = RMSNorm(**norm)
        self.self_attention = build_module(
            attention, config=config, layer_number=layer_number, pg_collection=pg_collection
        )
        self.pre_mlp_layernorm = RMSNorm(**norm)
        self.mlp = MLP(
            config,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            tp_group=pg_collection.tp,
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.self_attention(self.input_layernorm(hidden_states))
        return hidden_states + self.mlp(self.pre_mlp_layernorm(hidden_states))[0]


def encoder_config(config: TransformerConfig, model: ModelConfig) -> TransformerConfig:
    """The decoder's configuration with the encoder's own sizes: dense, all heads with keys and values of their own.

    Without sequence parallelism: a chunk is encoded as a whole, and tokens of all chunks are in one batch dimension.
    """
    config = copy.copy(config)
    config.sequence_parallel = False
    config.num_moe_experts = None
    config.num_query_groups = model.num_heads
    config.ffn_hidden_size = model.encoder_ffn_hidden_size
    return config


class ChunkEncoder(MegatronModule):
    """[CLS] + S tokens of each chunk -> bidirectional layers -> keys, values (from the tokens) and landmark (from
    [CLS]).
    """

    def __init__(self, config: TransformerConfig, model: ModelConfig, pg_collection: ProcessGroupCollection) -> None:
        self.gathers_input = config.sequence_parallel
        config = encoder_config(config, model)
        super().__init__(config=config)
        self.model = model
        self.tp_group = pg_collection.tp
        self.cls = nn.Parameter(torch.empty(config.hidden_size, dtype=config.params_dtype))
        config.init_method(self.cls)
        self.layers = nn.ModuleList(EncoderLayer(config, pg_collection, i + 1) for i in range(model.encoder_layers))
        self.final_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        retrieval_size = model.retrieval_dim // model.retrieval_heads
        self.linear_k = HeadLinear(config, model.hsa_kv_heads, model.head_dim, self.tp_group)
        self.linear_v = HeadLinear(config, model.hsa_kv_heads, model.head_dim, self.tp_group)
        self.linear_landmark = HeadLinear(config, model.retrieval_heads, retrieval_size, self.tp_group)
        self.k_layernorm = RMSNorm(config, model.head_dim, config.layernorm_epsilon)
        self.landmark_layernorm = RMSNorm(config, retrieval_size, config.layernorm_epsilon)

    def forward(self, hidden_states: Tensor, numbers: Tensor | None = None) -> ContextMemory:
        """hidden_states (C * S, B, hidden), whole chunks only (this rank's part of them under sequence parallelism).
        numbers (1 or B, C): which chunks of their texts they are, where HSA has positions; None: 0 .. C - 1.

        Each chunk is encoded by itself. The memory holds the heads that this rank's query heads read.
        """
        model = self.model
        if self.gathers_input:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.tp_group
            )
        length, batch, hidden = hidden_states.shape
        if length % model.chunk_size:
            raise ValueError(f"the chunk encoder takes whole chunks of {model.chunk_size} tokens, got {length} tokens")
        chunks = length // model.chunk_size
        x = (
            hidden_states.view(chunks, model.chunk_size, batch, hidden)
            .transpose(0, 1)
            .reshape(model.chunk_size, -1, hidden)
        )
        x = torch.cat((self.cls.to(x.dtype).expand(1, x.shape[1], hidden), x))
        for layer in self.layers:
            x = layer(x)
        x = copy_to_tensor_model_parallel_region(self.final_layernorm(x), group=self.tp_group)

        tokens = x[1:].view(model.chunk_size, chunks, batch, hidden).permute(2, 1, 0, 3).reshape(batch, length, hidden)
        landmarks = self.linear_landmark(x[0].view(chunks, batch, hidden).transpose(0, 1))[0]
        retrieval_size = model.retrieval_dim // model.retrieval_heads
        k = self.k_layernorm(self.linear_k(tokens)[0].unflatten(-1, (-1, model.head_dim)))
        if model.ablations.hsa_rope:
            if numbers is None:
                numbers = torch.arange(chunks, device=k.device)[None]
            inside = torch.arange(model.chunk_size, device=k.device)
            positions = (numbers[..., None] * model.chunk_size + inside).flatten(1)
            k = rotate(k, absolute_angles(positions, model, k.dtype))
        return ContextMemory(
            k=k,
            v=self.linear_v(tokens)[0].unflatten(-1, (-1, model.head_dim)),
            landmarks=self.landmark_layernorm(landmarks.unflatten(-1, (-1, retrieval_size))),
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As Megatron's, which takes the layers of a ModuleList for replicas, split or not."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for index, layer in enumerate(self.layers):
            state.update(
                sharded_state_dict_default(
                    layer, f"{prefix}layers.{index}.", sharded_offsets, metadata, tp_group=self.tp_group
                )
            )
        return state
