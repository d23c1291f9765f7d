"""The same weights under two sets of names: ours (Megatron's, fused) and those of the exported folder (unfused)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from parallel.experts import expert_parts
from parallel.model_config import ModelConfig

_PARTS = {
    "embedding.word_embeddings.weight": "embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "norm.weight",
}
_IN_LAYER = {
    "input_layernorm.weight": "input_norm.weight",
    "pre_mlp_layernorm.weight": "mlp_norm.weight",
    "hsa_layernorm.weight": "hsa_norm.weight",
    "self_attention.linear_proj.weight": "attention.o_proj.weight",
    "self_attention.q_layernorm.weight": "attention.q_norm.weight",
    "self_attention.k_layernorm.weight": "attention.k_norm.weight",
    "hsa_attention.linear_q.weight": "hsa.q_proj.weight",
    "hsa_attention.linear_retrieval.weight": "hsa.retrieval_proj.weight",
    "hsa_attention.linear_proj.weight": "hsa.o_proj.weight",
    "hsa_attention.q_layernorm.weight": "hsa.q_norm.weight",
    "hsa_attention.retrieval_layernorm.weight": "hsa.retrieval_norm.weight",
    "mlp.router.weight": "mlp.router.weight",
    "mlp.router.expert_bias": "mlp.expert_bias",
}
_IN_ENCODER = {
    "cls": "cls",
    "final_layernorm.weight": "final_norm.weight",
    "linear_k.weight": "k_proj.weight",
    "linear_v.weight": "v_proj.weight",
    "linear_landmark.weight": "landmark_proj.weight",
    "k_layernorm.weight": "k_norm.weight",
    "landmark_layernorm.weight": "landmark_norm.weight",
}


def our_tensors(state: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """The tensors of a model's state dictionary that are weights."""
    return {name: x for name, x in state.items() if x is not None and not name.endswith("_extra_state")}


def to_exported(name: str, x: Tensor, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Names and values in the folder of one of our tensors."""
    if name in _PARTS:
        yield _PARTS[name], x
        return
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match is None:
        raise KeyError(name)
    layer, rest = match.groups()
    encoder = re.fullmatch(r"encoder\.(.*)", rest)
    if encoder is not None:
        rest = encoder[1]
        if rest in _IN_ENCODER:
            yield f"encoder.{_IN_ENCODER[rest]}", x
            return
        match = re.fullmatch(r"layers\.(\d+)\.(.*)", rest)
        if match is None:
            raise KeyError(name)
        # A chunk's layer has its attention in place, without a name of its own.
        for inner, value in _in_layer(match[2], x, model.num_heads, model):
            yield f"encoder.layers.{match[1]}.{inner.removeprefix('attention.')}", value
        return
    for inner, value in _in_layer(rest, x, model.swa_kv_heads, model):
        yield f"layers.{layer}.{inner}", value


def _in_layer(rest: str, x: Tensor, kv_heads: int, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    if rest in _IN_LAYER:
        yield _IN_LAYER[rest], x
    elif rest == "self_attention.linear_qkv.weight":
        yield from zip([f"attention.{part}_proj.weight" for part in "qkv"], split_qkv(x, kv_heads, model), strict=True)
    elif rest.startswith("mlp.experts.linear_fc"):
        for expert, values in expert_parts(rest, x):
            yield from _in_layer(expert, values, kv_heads, model)
    elif match := re.fullmatch(
        r"mlp\.(?:experts\.local_experts\.(\d+)\.|(shared_experts)\.)?linear_fc([12])\.weight", rest
    ):
        owner = f"mlp.experts.{match[1]}." if match[1] else "mlp.shared_expert." if match[2] else "mlp."
        if match[3] == "2":
            yield f"{owner}down_proj.weight", x
        else:
            gate, up = x.chunk(2)
            yield from ((f"{owner}gate_proj.weight", gate), (f"{owner}up_proj.weight", up))
    else:
        raise KeyError(rest)


def split_qkv(x: Tensor, kv_heads: int, model: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron keeps, for every key/value head, its query heads, its key and its value together."""
    ratio = model.num_heads // kv_heads
    grouped = x.view(kv_heads, (ratio + 2) * model.head_dim, -1)
    parts = grouped.split([ratio * model.head_dim, model.head_dim, model.head_dim], dim=1)
    q, k, v = (part.reshape(-1, x.shape[1]) for part in parts)
    return q, k, v


def join_qkv(q: Tensor, k: Tensor, v: Tensor, kv_heads: int) -> Tensor:
    """The inverse of `split_qkv`."""
    return torch.cat([part.view(kv_heads, -1, part.shape[1]) for part in (q, k, v)], dim=1).flatten(0, 1)


def from_exported(name: str, ours: Tensor, model: ModelConfig, folder: Mapping[str, Tensor]) -> Tensor:
    """The value of our tensor `name` (shaped like `ours`) out of a folder's tensors. KeyError names a missing one."""
    names = [exported for exported, _ in to_exported(name, ours, model)]
    parts = [folder[exported] for exported in names]
    if name.endswith("linear_qkv.weight"):
        heads = model.num_heads if ".encoder." in name else model.swa_kv_heads
        return join_qkv(parts[0], parts[1], parts[2], heads)
    if ours.dim() == 3:  # gate and up, or down, of every expert
        width = len(parts) // ours.shape[0]
        return torch.stack([torch.cat(parts[i : i + width]) for i in range(0, len(parts), width)])
    return torch.cat(parts) if len(parts) == 2 else parts[0]
