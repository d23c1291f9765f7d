"""Bytes of one GPU by part, by arithmetic: what `hsa plan` prints about memory.

Weights, gradients and optimizer state are exact. Activations count what the layers keep for their backward pass on a
GPU, where attention, norms and rotary positions are kernels of their own that keep their inputs and outputs only.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.mesh import ParallelConfig
from parallel.model_config import ModelConfig
from parallel.pipeline import Reach, split_layers
from pretrain.recipe import Recipe, StageConfig
from pretrain.topology import reach_of


@dataclass
class Held:
    """Numbers of parameters that one rank holds: matrices that Muon would take, everything else, and routed experts'
    (Muon's as well).
    """

    matrices: int = 0
    others: int = 0
    experts: int = 0

    @property
    def total(self) -> int:
        return self.matrices + self.others + self.experts


def layers_of_ranks(model: ModelConfig, parallel: ParallelConfig, reach: Reach) -> list[list[int]]:
    """Decoder layers of each pipeline rank; an interleaved rank has every `pipeline`-th stage."""
    stages = parallel.pipeline * parallel.virtual_pipeline
    counts = split_layers(model, stages, reach) if stages > 1 else [model.num_layers]
    ranks: list[list[int]] = [[] for _ in range(parallel.pipeline)]
    first = 0
    for stage, count in enumerate(counts):
        ranks[stage % parallel.pipeline] += range(first, first + count)
        first += count
    return ranks


def held_parameters(model: ModelConfig, parallel: ParallelConfig, rank: int, reach: Reach | None = None) -> Held:
    """Parameters of a rank at pipeline position `rank`; exact, as Megatron and our layers split them. reach: what
    attention reads, which decides where stages are cut.
    """
    h, d, tensor = model.hidden_size, model.head_dim, parallel.tensor
    query, kinds = model.num_heads * d, model.layer_kinds()
    first_hsa = model.first_hsa_layer
    held = Held()

    def shared_out(heads: int, size: int) -> int:
        """A projection to heads, which is split only where there are enough of them."""
        return size // tensor if heads % tensor == 0 else size

    retrieval_size = model.retrieval_dim // model.retrieval_heads
    retrieval = shared_out(model.retrieval_heads, h * model.retrieval_dim)
    for layer in layers_of_ranks(model, parallel, reach or Reach())[rank]:
        kind = kinds[layer]
        if "swa" in kind:
            held.matrices += h * (2 * query + 2 * model.swa_kv_heads * d) // tensor
            held.others += 2 * d + h
        if "hsa" in kind:
            held.matrices += 2 * h * query // tensor + retrieval
            held.others += d + retrieval_size + h
        held.others += h
        if model.uses_experts(layer):
            held.others += h * model.num_experts  # the router
            held.experts += model.num_experts // parallel.expert * 3 * h * model.expert_ffn_hidden_size
            held.matrices += 3 * h * model.shared_expert_ffn_hidden_size // tensor
        else:
            held.matrices += 3 * h * model.ffn_hidden_size // tensor
        if layer == first_hsa:
            encoder = 4 * h * query + 3 * h * model.encoder_ffn_hidden_size
            held.matrices += model.encoder_layers * encoder // tensor + retrieval
            held.matrices += 2 * shared_out(model.hsa_kv_heads, h * model.hsa_kv_heads * d)
            held.others += model.encoder_layers * (2 * d + 2 * h) + 2 * h + d + retrieval_size
    vocabulary = model.vocab_size * h // tensor
    last = rank == parallel.pipeline - 1
    held.others += vocabulary if rank == 0 else 0
    if last:
        held.others += h  # final norm
        # Tied weights exist once on a rank; the last of several stages has a copy of its own.
        held.others += vocabulary if not model.tied_embeddings or parallel.pipeline > 1 else 0
    return held


def state_bytes(held: Held, recipe: Recipe, gpus: int) -> dict[str, int]:
    """Weights, gradients, optimizer state of a rank in bytes. Buffers' padding (kilobytes) is left out."""
    parallel, optimizer = recipe.parallel, recipe.optimizer
    bf16 = recipe.stored_precision == "bf16"
    master = 4 if bf16 else 0
    data = max(1, gpus // (parallel.tensor * parallel.pipeline))  # context ranks hold the same parameters
    expert_data = max(1, gpus // (parallel.expert * parallel.pipeline))
    if optimizer.shares_state:
        dense = (held.matrices + held.others) * (master + 8)
        if parallel.expert * parallel.tensor == 1:
            state = -(-(dense + held.experts * (master + 8)) // data)
        else:
            state = -(-dense // data) - (-held.experts * (master + 8) // expert_data)
    elif optimizer.name == "muon":
        # Whole parameters have owners; the plan takes them as evenly spread.
        dense = held.matrices * (master + 4) + held.others * (master + 8)
        data, expert_data = (data, expert_data) if optimizer.has_owners else (1, 1)
        state = -(-dense // data) - (-held.experts * (master + 4) // expert_data)
    else:
        state = held.total * (master + 8)
    return {"weights": held.total * (2 if bf16 else 4), "gradients": held.total * 4, "optimizer": state}


@dataclass
class Shape:
    """What the activations of one forward pass of a rank depend on. tokens: of one micro-batch on this rank, before
    tensor-parallel ranks share them out; top_k, chunks: per sequence; width: bytes of a number.
    """

    tokens: int
    width: int
    tensor: int = 1
    sequence: bool = False
    top_k: int = 1
    halo: int = 0
    halo_hsa: int = 0
    fused_swiglu: bool = False

    @property
    def spread(self) -> int:
        """Tensor-parallel ranks over which norms and residuals are shared out."""
        return self.tensor if self.sequence else 1

    @property
    def swiglu(self) -> int:
        """Widths that a SwiGLU keeps: gate, up, the result; in single operations also silu(gate) and a copy of up."""
        return 3 if self.fused_swiglu else 5


def attention_bytes(model: ModelConfig, shape: Shape, kind: str, recompute: str) -> float:
    """What windows and HSA of one layer keep, the layer's input included."""
    h, d, n, w = model.hidden_size, model.head_dim, shape.tokens, shape.width
    query, kv = model.num_heads * d / shape.tensor, max(1.0, model.swa_kv_heads / shape.tensor) * d
    kept = 0.0
    if "swa" in kind:
        reach = shape.halo_hsa if "hsa" in kind else shape.halo
        kept += 2 * h * w * n / shape.spread  # input, normed input
        # Projections; rotated query and key; output. Recomputed attention keeps unrotated ones instead.
        kept += (3 * query + 3 * kv) * w * n + 2 * kv * w * reach
        kept += 4 * model.num_heads / shape.tensor * n if recompute != "selective" else 0  # log-sum-exp
    if "hsa" in kind:
        heads = max(1.0, model.hsa_kv_heads / shape.tensor)
        own_retrieval = max(1.0, model.retrieval_heads / shape.tensor) * model.retrieval_dim / model.retrieval_heads
        kept += h * w * n / shape.spread + h * w * n  # input, normed input of the whole sequence
        kept += (3 * query + own_retrieval) * w * n + (8 if w == 2 else 4) * own_retrieval * n
        if recompute != "selective":
            # Scores and weights (fp32), chunk ids (int32, int64 in the gather of scores), log-sum-exp.
            kept += n * heads * shape.top_k * (4 + 4 + 4) + 4 * model.num_heads / shape.tensor * n
    return kept


def mlp_bytes(model: ModelConfig, shape: Shape, experts: bool) -> float:
    """What the MLP of one layer keeps, its input (the residual with HSA's part) included."""
    h, n, w = model.hidden_size, shape.tokens, shape.width
    kept = 2 * h * w * n / shape.spread
    if not experts:
        return kept + shape.swiglu * model.ffn_hidden_size / shape.tensor * w * n
    own = n / shape.spread  # tokens that this rank routes; with balanced experts it gets as many
    routed = model.experts_per_token * (2 * h + 5 * model.expert_ffn_hidden_size) * w + model.num_experts * 4 * 4
    return kept + routed * own + shape.swiglu * model.shared_expert_ffn_hidden_size / shape.tensor * w * n


def encoder_bytes(model: ModelConfig, shape: Shape) -> float:
    """What the chunk encoder keeps; its tokens are the chunks' and one more for each."""
    h, d, w = model.hidden_size, model.head_dim, shape.width
    n = shape.tokens * (model.chunk_size + 1) / model.chunk_size
    query, ffn = model.num_heads * d / shape.tensor, model.encoder_ffn_hidden_size / shape.tensor
    layer = (4 * h + 8 * query + shape.swiglu * ffn) * w * n + 4 * model.num_heads / shape.tensor * n
    heads = max(1.0, model.hsa_kv_heads / shape.tensor)
    return model.encoder_layers * layer + (3 * h + 2 * heads * d) * w * n


def memory_bytes(model: ModelConfig, shape: Shape, tokens: int) -> float:
    """The context memory of `tokens` tokens (whole sequences): keys, values, landmarks."""
    heads = max(1.0, model.hsa_kv_heads / shape.tensor)
    landmarks = max(1.0, model.retrieval_heads / shape.tensor) * model.retrieval_dim / model.retrieval_heads
    return shape.width * tokens * (2 * heads * model.head_dim + landmarks / model.chunk_size)


def layer_bytes(model: ModelConfig, shape: Shape, layer: int, recompute: str) -> float:
    """What one decoder layer keeps between its forward and its backward pass, the encoder's apart."""
    if recompute == "full":
        return model.hidden_size * shape.width * shape.tokens / shape.spread
    kind = model.layer_kinds()[layer]
    return attention_bytes(model, shape, kind, recompute) + mlp_bytes(model, shape, model.uses_experts(layer))


def activation_bytes(model: ModelConfig, shape: Shape, layers: list[int], recompute: str) -> float:
    """What one micro-batch leaves on a rank with these layers, from its forward to its backward pass."""
    first_hsa = model.first_hsa_layer
    kept = sum(layer_bytes(model, shape, layer, recompute) for layer in layers)
    if first_hsa in layers and recompute != "full":
        kept += encoder_bytes(model, shape)
    return kept


def in_flight(parallel: ParallelConfig, rank: int, micro_batches: int) -> float:
    """Micro-batches whose activations a pipeline rank holds at once, in units of all its layers."""
    if parallel.pipeline == 1:
        return 1
    if parallel.virtual_pipeline == 1:
        return min(parallel.pipeline - rank, micro_batches)
    chunks = 2 * (parallel.pipeline - rank - 1) + (parallel.virtual_pipeline - 1) * parallel.pipeline + 1
    return min(chunks, micro_batches * parallel.virtual_pipeline) / parallel.virtual_pipeline


def logit_bytes(recipe: Recipe, shape: Shape) -> float:
    """Logits in the run's precision and in fp32 (where their gradient goes, too); in part only where computed so."""
    each = 4 if shape.width == 4 else 6
    tokens = float(shape.tokens)
    if recipe.compute.loss == "chunked":
        tokens, each = min(tokens, recipe.compute.loss_chunk), each + 8
    elif recipe.compute.loss == "deepspeed":  # its blocks have the size of the hidden states
        return 2 * 4 * tokens * recipe.model.hidden_size
    return each * tokens * recipe.model.vocab_size / shape.tensor


def memory_per_gpu(recipe: Recipe, stage: StageConfig, gpus: int) -> dict[str, float]:
    """Bytes by part of the pipeline rank that needs most. "working" is what one layer needs while it is computed again
    under full recomputation; "buffers" are the exchanged copies of context and pipeline parallelism.
    """
    model, parallel = recipe.model, recipe.parallel
    data = max(1, gpus // parallel.model_ranks)
    share = max(1, recipe.stage_batch(stage) // data)
    micro = stage.micro_batch or recipe.micro_batch or share
    local = stage.context // parallel.context
    chunks = stage.context // model.chunk_size
    away = parallel.context > 1
    shape = Shape(
        tokens=micro * local,
        width=2 if recipe.stored_precision == "bf16" else 4,
        tensor=parallel.tensor,
        sequence=parallel.uses_sequence,
        top_k=min(chunks, stage.top_k or chunks),
        halo=micro * (stage.window - 1) if away else 0,
        halo_hsa=micro * (stage.hsa_window - 1) if away else 0,
        fused_swiglu=not model.num_experts,  # as the model is built on a GPU
    )
    first_hsa = model.first_hsa_layer
    worst: dict[str, float] = {}
    for rank, layers in enumerate(layers_of_ranks(model, parallel, reach_of(recipe))):
        last = rank == parallel.pipeline - 1
        flying = in_flight(parallel, rank, max(1, share // micro))
        whole = memory_bytes(model, shape, micro * stage.context)
        parts: dict[str, float] = {
            **state_bytes(held_parameters(model, parallel, rank, reach_of(recipe)), recipe, gpus)
        }
        parts["activations"] = flying * activation_bytes(model, shape, layers, recipe.recompute)
        parts["working"] = 0.0
        if recipe.recompute == "full":
            parts["working"] = max(layer_bytes(model, shape, layer, "none") for layer in layers)
            if first_hsa in layers:
                parts["working"] = max(
                    parts["working"], layer_bytes(model, shape, first_hsa, "none") + encoder_bytes(model, shape)
                )
        # The memory and its gradient, in every micro-batch on its way.
        parts["memory K/V, landmarks"] = (flying + 1) * whole if max(layers) >= first_hsa else 0.0
        exchanged = memory_bytes(model, shape, micro * local) if away else 0.0
        payload = model.hidden_size * shape.width * shape.tokens / shape.spread
        if parallel.pipeline > 1:
            exchanged += 2 * (payload + (whole if max(layers) >= first_hsa else 0.0))
        parts["buffers"] = exchanged
        parts["logits"] = logit_bytes(recipe, shape) + 3 * payload if last else 0.0
        if recipe.optimizer.offload:  # on the device during the update only, when there are no activations
            passing = sum(parts[name] for name in ("activations", "working", "memory K/V, landmarks", "logits"))
            parts["optimizer"] = max(0.0, parts["optimizer"] - passing)
        if sum(parts.values()) > sum(worst.values()):
            worst = parts
    return worst
