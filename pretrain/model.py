"""Assembly of one HSA-UltraLong model from Megatron-core parts."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from parallel.attention import AttentionSchedule
from parallel.compat import (
    ColumnParallelLinear,
    LanguageModelEmbedding,
    LanguageModule,
    ModelType,
    ProcessGroupCollection,
    RotaryEmbedding,
    TransformerBlock,
    TransformerConfig,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    get_num_layers_to_build,
    get_transformer_layer_offset,
    parallel_state,
)
from parallel.experts import expert_parts, experts_spec, is_expert_parameter
from parallel.layers import decoder_specs
from parallel.losses import chunked_cross_entropy, linear_cross_entropy, token_losses
from parallel.mesh import ParallelConfig
from parallel.model_config import ModelConfig
from parallel.optional import ComputeConfig, use_fused_gradients
from parallel.pipeline import Reach, stage_layout
from parallel.precision import fp8_settings
from parallel.tensor import mark_parameters, shard_of, whole_sequence, whole_shape


def transformer_config(
    model: ModelConfig,
    *,
    parallel: ParallelConfig | None = None,
    bf16: bool = False,
    fp8: bool = False,
    recompute: str = "none",
    deterministic: bool = False,
    compute: ComputeConfig | None = None,
    reach: Reach | None = None,
) -> TransformerConfig:
    """Megatron's configuration for `model`. fp8: the decoder's products, in a bf16 model. recompute: none | selective
    (attention only) | full (whole layers); reach: what pipeline stages are cut by.
    """
    parallel = parallel or ParallelConfig()
    compute = compute or ComputeConfig()
    dtype = torch.bfloat16 if bf16 else torch.float32
    moe: dict[str, object] = {}
    if model.num_experts:
        moe = dict(
            num_moe_experts=model.num_experts,
            moe_router_topk=model.experts_per_token,
            moe_ffn_hidden_size=model.expert_ffn_hidden_size,
            moe_shared_expert_intermediate_size=model.shared_expert_ffn_hidden_size,
            moe_layer_freq=[int(model.uses_experts(layer)) for layer in range(model.num_layers)],
            # Ling-2.0: sigmoid scores, no auxiliary loss; a bias per expert, moved against its load, balances.
            moe_router_score_function="sigmoid",
            moe_router_load_balancing_type="none",
            moe_router_enable_expert_bias=True,
            moe_router_bias_update_rate=model.expert_bias_update_rate,
            moe_router_dtype="fp32",
            moe_z_loss_coeff=model.router_z_loss or None,
            moe_token_dispatcher_type="alltoall" if parallel.expert > 1 else "allgather",
        )
    stages: dict[str, object] = {}
    if parallel.pipeline > 1:
        interleaved = parallel.virtual_pipeline > 1
        stages = dict(
            pipeline_model_parallel_layout=stage_layout(
                model, parallel.pipeline * parallel.virtual_pipeline, reach or Reach()
            ),
            variable_seq_lengths=True,  # the memory widens what later stages hand on
            moe_token_dispatcher_type="alltoall",  # Megatron asks for it with variable lengths, dense models included
            overlap_p2p_comm=interleaved,  # interleaved without overlap gives wrong numbers in Megatron 0.16
            batch_p2p_comm=not interleaved,
        )
    checkpointing: dict[str, object] = {}
    if recompute == "full":
        checkpointing = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif recompute == "selective":
        checkpointing = dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.swa_kv_heads,
        kv_channels=model.head_dim,
        layernorm_epsilon=model.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=torch.cuda.is_available() and not model.num_experts,  # compiled by Megatron
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        use_cpu_initialization=True,  # the seed alone fixes the weights, see initialize_weights
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=bf16,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=use_fused_gradients(
            compute.gradient_accumulation_fusion, on_gpu=torch.cuda.is_available()
        ),
        persist_layer_norm=False,
        calculate_per_token_loss=True,
        deterministic_mode=deterministic,
        hetereogenous_dist_checkpoint=True,  # layers differ, each is stored under its own name
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        sequence_parallel=parallel.uses_sequence,
        **{**moe, **stages},
        **checkpointing,
        **(fp8_settings(compute) if fp8 else {}),
    )


class HSAModel(LanguageModule):
    """Embedding, decoder and output layer, or the part of them that one pipeline stage holds.

    tokens, labels (B, L) int64: this rank's slice of the sequences; documents (B, L * context-parallel size) int32 of
    the whole sequences, or None (one document per row); evidence (B, L, P) int32, see `PackedBatch`, or None. L is a
    multiple of the chunk size. vp_stage: which of this rank's model chunks this is, in an interleaved pipeline.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        max_length: int,
        vp_stage: int | None = None,
        compute: ComputeConfig | None = None,
    ) -> None:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        super().__init__(config=config, pg_collection=groups)
        self.model = model
        self.compute = compute or ComputeConfig()
        self.model_type = ModelType.encoder_or_decoder  # asked for by Megatron's schedules
        self.vp_stage = vp_stage
        self.schedule = AttentionSchedule()
        self.first_layer, layers = 0, model.num_layers
        if config.pipeline_model_parallel_size > 1:
            self.first_layer = get_transformer_layer_offset(config, vp_stage, groups.pp.rank())
            layers = get_num_layers_to_build(config, vp_stage, groups.pp.rank())
        self.pre_process = self.first_layer == 0
        self.post_process = self.first_layer + layers == model.num_layers
        self.share_embeddings_and_output_weights = model.tied_embeddings
        if self.pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=model.vocab_size,
                max_sequence_length=max_length,
                position_embedding_type="rope",
                tp_group=groups.tp,
            )
        self.rotary_pos_emb = RotaryEmbedding(
            kv_channels=model.head_dim, rotary_percent=1.0, rotary_base=model.rope_base, cp_group=groups.cp
        )
        # Layers with norms of queries and keys may only be built with this on (Megatron 0.19). Left on, Megatron would
        # sum the gradients of these gains over tensor-parallel ranks a second time.
        config.qk_layernorm = True
        self.decoder = TransformerBlock(
            config=config,
            spec=decoder_specs(
                model,
                self.schedule,
                experts=experts_spec(model, config.params_dtype, self.compute.grouped_experts),
                tiles=self.compute.tiled_mlp,
                fp8=bool(config.fp8),
                first=self.first_layer,
                count=layers,
            ),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        config.qk_layernorm = False
        if self.post_process:
            self.output_layer = ColumnParallelLinear(
                model.hidden_size,
                model.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                # Tied weights exist once on a rank; the last of several stages has a copy of its own.
                skip_weight_param_allocation=model.tied_embeddings and self.pre_process,
                tp_group=groups.tp,
            )
        self.setup_embeddings_and_output_layer()

    def set_schedule(
        self,
        *,
        window: int,
        hsa_window: int,
        top_k: int | None,
        neighbours: int = 0,
        retrieval_temperature: float = 1.0,
        distance_decay: float = 0.0,
        decay_from: int = 0,
    ) -> None:
        """What a stage sets: window sizes in tokens, and chunks read by HSA (None: all visible); and what only a reader
        does, how many of the best chunks bring the chunks beside them, the temperature of their weights, and how scores
        fall with a distance of more than decay_from tokens.
        """
        self.schedule.window, self.schedule.hsa_window, self.schedule.top_k = window, hsa_window, top_k
        self.schedule.neighbours, self.schedule.retrieval_temperature = neighbours, retrieval_temperature
        self.schedule.distance_decay, self.schedule.decay_from = distance_decay, decay_from

    def set_input_tensor(self, input_tensor: Tensor) -> None:
        """Called by Megatron's schedules: what the stage before has sent."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, L) -> (L, B, hidden)."""
        return self.embedding(input_ids=tokens, position_ids=None)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (L, B, hidden), after the final norm -> (L, B, vocabulary)."""
        return gather_from_tensor_model_parallel_region(self._output(hidden_states), group=self.pg_collection.tp)

    def _output(self, hidden_states: Tensor) -> Tensor:
        """Logits of this rank's part of the vocabulary."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden_states, weight=weight)[0]

    def _angles(self, length: int) -> Tensor:
        """Rotary angles for `length` tokens of this rank and the longest halo it can get."""
        slices = self.pg_collection.cp
        if slices.size() == 1:
            return self.rotary_pos_emb(length)
        halo = min(max(self.schedule.window, self.schedule.hsa_window) - 1, slices.rank() * length)
        return self.rotary_pos_emb.get_emb(length + halo)  # a call would cut it as Megatron cuts contexts

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        documents: Tensor | None = None,
        evidence: Tensor | None = None,
    ) -> Tensor:
        """Loss of every token (B, L) float32 when labels are given, else logits (B, L, vocabulary).

        A stage before the last returns what the next one takes.
        """
        hidden_states = self.decoder(
            hidden_states=self.embed(tokens) if self.pre_process else None,
            attention_mask=documents,
            context_mask=evidence,
            rotary_pos_emb=self._angles(tokens.shape[1]),
        )
        if not self.post_process:
            return hidden_states
        if labels is None:
            return self.logits(hidden_states).transpose(0, 1)
        return self._losses(hidden_states, labels)

    def _losses(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """hidden_states (L, B, hidden), after the final norm; labels (B, L) -> losses (B, L) float32."""
        labels = labels.transpose(0, 1).contiguous()
        group = self.pg_collection.tp
        if self.compute.loss == "full":
            return token_losses(self._output(hidden_states), labels, group).transpose(0, 1)
        weight = self.shared_embedding_or_output_weight()
        if self.compute.loss == "chunked":
            hidden_states = whole_sequence(hidden_states, self.config, group)
            return chunked_cross_entropy(hidden_states, weight, labels, self.compute.loss_chunk).transpose(0, 1)
        if self.config.sequence_parallel:  # DeepSpeed's operator sums hidden's gradient itself
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=group
            )
        return linear_cross_entropy(hidden_states, weight, labels, group).transpose(0, 1)


def build_model(
    model: ModelConfig,
    *,
    max_length: int,
    seed: int,
    parallel: ParallelConfig | None = None,
    bf16: bool = False,
    recompute: str = "none",
    deterministic: bool = False,
    compute: ComputeConfig | None = None,
    device: torch.device | str = "cpu",
) -> HSAModel:
    """Build a model and set its weights from the seed. device "meta" allocates nothing and initialises nothing.

    Under pipeline parallelism this is the rank's stage; an interleaved rank has several, see `build_chunks`.
    """
    config = transformer_config(
        model, parallel=parallel, bf16=bf16, recompute=recompute, deterministic=deterministic, compute=compute
    )
    if str(device) == "meta":
        with torch.device("meta"):
            return HSAModel(config, model, max_length, compute=compute)
    return _build_chunk(config, model, max_length, seed, device, compute=compute)


def build_chunks(
    model: ModelConfig,
    *,
    max_length: int,
    seed: int,
    parallel: ParallelConfig,
    bf16: bool = False,
    fp8: bool = False,
    recompute: str = "none",
    deterministic: bool = False,
    compute: ComputeConfig | None = None,
    reach: Reach | None = None,
    device: torch.device | str = "cpu",
) -> list[HSAModel]:
    """All of this rank's model chunks: one, or as many as an interleaved pipeline has virtual stages. reach: what its
    stages are cut by.
    """
    config = transformer_config(
        model,
        parallel=parallel,
        bf16=bf16,
        fp8=fp8,
        recompute=recompute,
        deterministic=deterministic,
        compute=compute,
        reach=reach,
    )
    stages = range(parallel.virtual_pipeline) if parallel.virtual_pipeline > 1 else [None]
    chunks = [_build_chunk(config, model, max_length, seed, device, stage, compute) for stage in stages]
    for chunk in chunks:
        chunk.schedule.balance_selection = parallel.balance_selection
    return chunks


def _build_chunk(
    config: TransformerConfig,
    model: ModelConfig,
    max_length: int,
    seed: int,
    device: torch.device | str,
    vp_stage: int | None = None,
    compute: ComputeConfig | None = None,
) -> HSAModel:
    built = HSAModel(config, model, max_length, vp_stage, compute)
    mark_parameters(built)
    for name, parameter in built.named_parameters():
        if is_expert_parameter(name):
            # Megatron reduces experts' gradients over the ranks that hold the same expert only. Tensor-parallel ranks
            # hold the same experts but send them other tokens.
            parameter.allreduce = config.expert_model_parallel_size * config.tensor_model_parallel_size == 1
    initialize_weights(built, seed)
    return built.to(device)


def global_name(name: str, built: HSAModel) -> str:
    """The name in the whole model of a parameter, or of one expert's part of it: layers are numbered over all pipeline
    stages, experts over all expert-parallel ranks; the last stage's copy of tied embeddings is called like them.
    """
    if name == "output_layer.weight" and built.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    name = re.sub(r"^decoder\.layers\.(\d+)", lambda m: f"decoder.layers.{int(m[1]) + built.first_layer}", name)
    match = re.search(r"\.local_experts\.(\d+)\.", name)
    if match is None:
        return name
    local = built.config.num_moe_experts // built.config.expert_model_parallel_size
    number = parallel_state.get_expert_model_parallel_rank() * local + int(match[1])
    return f"{name[: match.start(1)]}{number}{name[match.end(1) :]}"


def global_parts(name: str, values: Tensor, built: HSAModel) -> Iterator[tuple[str, Tensor]]:
    """(global name, values) of everything in one parameter or its gradient: the experts of a stack one by one."""
    for part, part_values in expert_parts(name, values):
        yield global_name(part, built), part_values


def initialize_weights(built: HSAModel, seed: int) -> None:
    """Set every weight from the seed and the parameter's own name, so that it does not depend on building order or
    layout: a rank draws the whole parameter and keeps its part.

    Normal with `init_std`; projections that write into the residual stream are scaled by 1 / sqrt(2 * layers) as in
    Megatron. Gains stay 1.
    """
    std = built.model.init_std
    residual_std = std / math.sqrt(2 * built.model.num_layers)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() == 1 and not name.endswith("encoder.cls"):
                parameter.fill_(1.0)
                continue
            for part, held in global_parts(name, parameter, built):
                digest = hashlib.sha256(f"{seed}/{part}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
                shape = whole_shape(parameter) if held is parameter else held.shape
                values = torch.empty(shape, dtype=torch.float32)
                writes_residual = part.endswith(("linear_proj.weight", "linear_fc2.weight"))
                values.normal_(0.0, residual_std if writes_residual else std, generator=generator)
                held.copy_(shard_of(values, parameter, name))
