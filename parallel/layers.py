"""Decoder layers as a Megatron TransformerBlock builds them: sliding-window, HSA, or both, each with a dense MLP or
experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from parallel.attention import (
    AttentionSchedule,
    HierarchicalSparseAttention,
    NoCoreAttention,
    SlidingWindowSelfAttention,
)
from parallel.compat import (
    MLP,
    ColumnParallelLinear,
    IdentityOp,
    MLPSubmodules,
    ModuleSpec,
    MoELayer,
    MoESubmodules,
    ProcessGroupCollection,
    RowParallelLinear,
    SelfAttentionSubmodules,
    SharedExpertMLP,
    TransformerBlockSubmodules,
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
    transformer_engine_linears,
)
from parallel.context import keep_in_graph, start_gather
from parallel.encoder import ChunkEncoder
from parallel.memory import ContextMemory
from parallel.model_config import ModelConfig
from parallel.norm import RMSNorm
from parallel.pipeline import join_payload, split_payload
from parallel.router import Router
from parallel.shared_memory import SharedMemory
from parallel.tensor import heads_of_rank
from parallel.tiling import TiledMLP

KeysAndValues = tuple[Tensor, Tensor]


class DecoderLayer(TransformerLayer):
    """One layer: x -> r = x + SWA(norm x); h = HSA(norm r); out = r + MLP(norm(r + h)).

    The HSA output feeds the MLP and stays out of the residual stream ("bypass", arXiv 2510.17196). `kind` is "swa" (no
    h), "hsa" (r = x) or "swa+hsa". The first HSA layer of a model also owns the chunk encoder: it turns its own input,
    the lower decoder's output, into the context memory and hands that on as Megatron's `context`. Between pipeline
    stages the memory rides beside the hidden states: takes_memory and gives_memory say where.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *,
        model: ModelConfig,
        schedule: AttentionSchedule,
        kind: str,
        owns_encoder: bool,
        takes_memory: bool = False,
        gives_memory: bool = False,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(config=config, submodules=submodules, pg_collection=pg_collection, **kwargs)
        self.model = model
        self.schedule = schedule
        self.has_window = "swa" in kind
        self.has_hsa = "hsa" in kind
        self.takes_memory = takes_memory
        self.gives_memory = gives_memory
        self.kv_heads = len(heads_of_rank(model.hsa_kv_heads, self.pg_collection.tp))
        self.retrieval_heads = len(heads_of_rank(model.retrieval_heads, self.pg_collection.tp))
        if self.has_hsa:
            self.hsa_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
            self.hsa_attention = HierarchicalSparseAttention(config, model, schedule, self.pg_collection)
        self.encoder = ChunkEncoder(config, model, self.pg_collection) if owns_encoder else None

    @property
    def window(self) -> int:
        """Tokens this layer's sliding window holds now, the token itself included."""
        return self.schedule.hsa_window if self.has_hsa else self.schedule.window

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (L, B, hidden) of this rank's tokens. `attention_mask` carries the document ids (B, length)
        int32 of the whole sequence or None; `context` the packed memory of the whole sequence; `context_mask` where
        this rank's tokens (B, tokens, places) find their answers, or None.
        """
        documents, evidence = attention_mask, context_mask
        slices = self.pg_collection.cp
        shared = self.pg_collection.tp.size() if self.config.sequence_parallel else 1
        if self.takes_memory:
            chunks = hidden_states.shape[0] * shared * slices.size() // self.model.chunk_size
            hidden_states, context = split_payload(hidden_states, self.config.hidden_size, chunks, self.memory_width)
        memory: ContextMemory | Callable[[], ContextMemory] | None = None
        if self.encoder is not None:
            own: ContextMemory = self.encoder(hidden_states)
            gather = start_gather(own.pack(), slices)  # under way while this layer's window is computed
            memory = own
            if slices.size() > 1:
                memory = functools.partial(self._unpack, gather)
        elif self.has_hsa:
            memory = ContextMemory.unpack(context, self.model, self.retrieval_heads)
        offset = slices.rank() * hidden_states.shape[0] * shared
        output, _kv = self.mix(
            hidden_states,
            rotary_pos_emb,
            memory=memory,
            documents=documents,
            evidence=evidence,
            query_offset=offset,
        )
        if self.encoder is not None:
            context = gather()
            if slices.size() > 1:
                output = keep_in_graph(output, context)
        if self.gives_memory:
            output = join_payload(output, context)
        return output, context

    def _unpack(self, gather: Callable[[], Tensor]) -> ContextMemory:
        return ContextMemory.unpack(gather(), self.model, self.retrieval_heads)

    @property
    def memory_width(self) -> int:
        """Numbers per chunk in this rank's packed memory."""
        retrieval_size = self.model.retrieval_dim // self.model.retrieval_heads
        keys = self.kv_heads * self.model.head_dim * self.model.chunk_size
        return 2 * keys + self.retrieval_heads * retrieval_size

    def mix(
        self,
        hidden_states: Tensor,
        rotary_pos_emb: Tensor,
        *,
        memory: ContextMemory | SharedMemory | Callable[[], ContextMemory] | None = None,
        documents: Tensor | None = None,
        evidence: Tensor | None = None,
        halo: KeysAndValues | None = None,
        query_offset: int = 0,
    ) -> tuple[Tensor, KeysAndValues | None]:
        """The layer on tokens query_offset .. of a sequence whose left neighbours are in `halo` and in `memory`.

        Returns the output (L, B, hidden) and the window's keys and values, the halo's in front where the tokens are
        fewer than the window (None without a window).
        """
        keys_values = None
        if self.has_window:
            attended, keys_values = self.self_attention(
                self.input_layernorm(hidden_states), rotary_pos_emb, window=self.window, documents=documents, halo=halo
            )
            hidden_states = hidden_states + attended
        mlp_input = hidden_states
        if self.has_hsa and memory is not None:  # None: no chunk is complete yet, HSA contributes 0
            mlp_input = hidden_states + self.hsa_attention(
                self.hsa_layernorm(hidden_states),
                memory,
                documents=documents,
                evidence=evidence,
                query_offset=query_offset,
            )
            if not self.model.ablations.bypass:
                hidden_states = mlp_input
        return hidden_states + self.mlp(self.pre_mlp_layernorm(mlp_input))[0], keys_values


def next_halo(keys_values: KeysAndValues, window: int) -> KeysAndValues:
    """The last `window` - 1 of a layer's keys and values (n, B, Hkv, D), which the tokens behind them see; all where
    there are fewer. Copied: a view would keep those of all the tokens alive.
    """
    k, v = (x[max(0, x.shape[0] - window + 1) :].clone() for x in keys_values)
    return k, v


def mlp_spec(experts: ModuleSpec | None, tiles: int, column: type, row: type) -> ModuleSpec:
    """A dense SwiGLU MLP, in `tiles` parts of the sequence, or Megatron's mixture of `experts` with a shared one.
    column, row: the parallel linear layers.
    """
    linears = MLPSubmodules(linear_fc1=column, linear_fc2=row)
    if experts is None:
        if tiles == 1:
            return ModuleSpec(module=MLP, submodules=linears)
        return ModuleSpec(module=TiledMLP, submodules=linears, params={"tiles": tiles})
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=experts,
            router=Router,
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=linears),
        ),
    )


def decoder_specs(
    model: ModelConfig,
    schedule: AttentionSchedule,
    *,
    experts: ModuleSpec,
    tiles: int = 1,
    fp8: bool = False,
    first: int = 0,
    count: int | None = None,
) -> TransformerBlockSubmodules:
    """Specs of the `count` decoder layers from `first` on (all of them), for the TransformerBlock of one stage.

    experts: the routed experts where a layer has them; tiles: parts of the sequence in which dense MLPs run; fp8: take
    Transformer Engine's linear layers, which multiply in FP8 where Megatron says so.
    """
    column, row = transformer_engine_linears() if fp8 else (ColumnParallelLinear, RowParallelLinear)
    attention = ModuleSpec(
        module=SlidingWindowSelfAttention,
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=NoCoreAttention,
            linear_proj=row,
            q_layernorm=RMSNorm,
            k_layernorm=RMSNorm,
        ),
    )
    kinds = model.layer_kinds()
    first_hsa = model.first_hsa_layer
    end = len(kinds) if count is None else first + count
    layers = []
    for index, kind in list(enumerate(kinds))[first:end]:
        has_window = "swa" in kind
        submodules = TransformerLayerSubmodules(
            input_layernorm=RMSNorm if has_window else IdentityOp,
            self_attention=attention if has_window else IdentityOp,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp_spec(experts if model.uses_experts(index) else None, tiles, column, row),
        )
        params = {
            "model": model,
            "schedule": schedule,
            "kind": kind,
            "owns_encoder": index == first_hsa,
            "takes_memory": index == first and index > first_hsa,
            "gives_memory": index == end - 1 < len(kinds) - 1 and index >= first_hsa,
        }
        layers.append(ModuleSpec(module=DecoderLayer, submodules=submodules, params=params))
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
