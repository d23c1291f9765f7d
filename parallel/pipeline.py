"""Pipeline parallelism: which layers make a stage, and how the context memory rides with the hidden states.

Megatron's schedules hand one tensor from stage to stage. Past the chunk encoder the memory is needed by every later
stage, so it is laid beside the hidden states along the hidden dimension and taken off again by the next stage's first
layer. The gradient comes back in the same form. Widths differ between stages, so shapes travel first
(variable_seq_lengths).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.model_config import ModelConfig


@dataclass(frozen=True)
class Reach:
    """Tokens that attention reads, for estimates of cost: the window of sliding-window layers, that inside HSA layers,
    the chunks' tokens an HSA layer reads, and the context whose chunks it scores.
    """

    window: int = 512
    hsa_window: int = 512
    chunks: int = 4096
    context: int = 16384


def layer_costs(model: ModelConfig, reach: Reach) -> list[float]:
    """Multiply-adds of one token in each decoder layer, forward; the encoder's are those of the layer that owns it."""
    h, s = model.hidden_size, model.chunk_size
    query = model.num_heads * model.head_dim
    costs = []
    for layer, kind in enumerate(model.layer_kinds()):
        cost = 3.0 * h * model.ffn_hidden_size
        if model.uses_experts(layer):
            active = model.experts_per_token * model.expert_ffn_hidden_size + model.shared_expert_ffn_hidden_size
            cost = 3.0 * h * active
        if "swa" in kind:
            cost += 2 * h * (query + model.swa_kv_heads * model.head_dim)
            cost += 2 * query * (reach.hsa_window if "hsa" in kind else reach.window)
        if "hsa" in kind:
            cost += h * (2 * query + model.retrieval_dim) + 2 * query * reach.chunks
            cost += model.retrieval_dim * reach.context / (2 * s)  # scores of the chunks before a token
        costs.append(cost)
    first = next(i for i, kind in enumerate(model.layer_kinds()) if "hsa" in kind)
    encoder = h * (4 * query + 3 * model.encoder_ffn_hidden_size) + 2 * query * (s + 1)
    memory = h * (2 * model.hsa_kv_heads * model.head_dim + model.retrieval_dim / s)
    costs[first] += model.encoder_layers * encoder * (s + 1) / s + memory
    return costs


def split_layers(model: ModelConfig, stages: int, reach: Reach) -> list[int]:
    """Number of layers of each stage, first to last: at least one each, the dearest stage as cheap as possible.

    The output layer's cost counts as part of the last stage; the embedding is a lookup.
    """
    costs = layer_costs(model, reach)
    costs[-1] += model.vocab_size * model.hidden_size
    layers = len(costs)
    if stages > layers:
        raise ValueError(f"{layers} layers cannot make {stages} stages")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[n][i]: smallest possible cost of the dearest of n stages over the first i layers, and where the last starts.
    best = [[(sums[i], 0) for i in range(layers + 1)]]
    for n in range(1, stages):
        row = [(float("inf"), 0)] * (layers + 1)
        for i in range(n + 1, layers + 1):
            row[i] = min((max(best[-1][j][0], sums[i] - sums[j]), j) for j in range(n, i))
        best.append(row)
    counts, end = [], layers
    for n in reversed(range(stages)):
        start = best[n][end][1]
        counts.append(end - start)
        end = start
    return counts[::-1]


def stage_layout(model: ModelConfig, stages: int, reach: Reach) -> list[list[str]]:
    """The split in the words of Megatron's `pipeline_model_parallel_layout`."""
    layout = [["decoder"] * count for count in split_layers(model, stages, reach)]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def join_payload(hidden_states: Tensor, packed: Tensor) -> Tensor:
    """Hidden states (L, B, hidden) and packed memory (C, B, width) -> (L, B, hidden + more), the end padded with 0."""
    length, batch = hidden_states.shape[:2]
    flat = packed.transpose(0, 1).reshape(batch, -1)
    width = -(-flat.shape[1] // length)
    flat = torch.nn.functional.pad(flat, (0, width * length - flat.shape[1]))
    return torch.cat((hidden_states, flat.view(batch, length, width).transpose(0, 1)), dim=-1)


def split_payload(payload: Tensor, hidden_size: int, chunks: int, width: int) -> tuple[Tensor, Tensor]:
    """The inverse of `join_payload`: hidden states (L, B, hidden) and packed memory (chunks, B, width)."""
    hidden_states, rest = payload.split((hidden_size, payload.shape[-1] - hidden_size), dim=-1)
    flat = rest.transpose(0, 1).reshape(payload.shape[1], -1)[:, : chunks * width]
    return hidden_states.contiguous(), flat.view(-1, chunks, width).transpose(0, 1).contiguous()
