"""FP8: which products it covers, what it needs of the machine, and which sizes it can multiply.

Parameters, activations between layers, gradients and optimizer are those of bf16. The decoder's attention projections,
MLPs and routed experts are Transformer Engine's layers, which convert what they multiply to FP8 inside Megatron's FP8
context. Encoder, HSA's projections, router, embedding and output layer stay in bf16.
"""

from __future__ import annotations

from typing import Any

import torch

from parallel.errors import OptionalPartError, TopologyError
from parallel.mesh import ParallelConfig
from parallel.model_config import ModelConfig
from parallel.optional import ComputeConfig, find_transformer_engine

_MULTIPLE = 16  # of both dimensions of both factors
_TENSORWISE_FROM = (2, 2)  # version of Transformer Engine
_HOPPER = (9, 0)  # compute capability


def fp8_settings(compute: ComputeConfig) -> dict[str, Any]:
    """Megatron's configuration of FP8. Delayed scaling looks back as far as Transformer Engine does by default."""
    history = {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"} if compute.fp8_scaling == "delayed" else {}
    return {"fp8": compute.fp8_format, "fp8_recipe": compute.fp8_scaling, **history}


def check_fp8(compute: ComputeConfig, device: torch.device) -> None:
    """OptionalPartError where this machine cannot train in FP8; starts no GPU work."""
    engine = find_transformer_engine()
    if not engine.usable:
        raise OptionalPartError(
            "precision: fp8 needs Transformer Engine, which is not installed: pip install "
            "'transformer-engine[pytorch]', or use bf16"
        )
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _HOPPER:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        raise OptionalPartError(f"precision: fp8 needs a Hopper GPU or a newer one, this is {where}; use bf16")
    version = tuple(int(part) for part in engine.version.split(".")[:2] if part.isdigit())
    if compute.fp8_scaling == "tensorwise" and version < _TENSORWISE_FROM:
        raise OptionalPartError(
            f"compute.fp8_scaling=tensorwise needs Transformer Engine 2.2, found {engine.version}; update it, or set "
            "compute.fp8_scaling=delayed"
        )


def check_fp8_sizes(model: ModelConfig, parallel: ParallelConfig, *, context: int, micro_batch: int) -> None:
    """TopologyError naming every size of a rank's products that FP8 cannot multiply, in a stage of this context and
    micro-batch.
    """
    query, tensor = model.num_heads * model.head_dim, parallel.tensor
    qkv = query + 2 * model.swa_kv_heads * model.head_dim
    shared = f" / tensor {tensor}" if tensor > 1 else ""
    sizes = {
        "model.hidden_size": model.hidden_size,
        f"attention heads x model.head_dim{shared}": query // tensor,
        f"queries, keys and values{shared}": qkv // tensor,
        f"model.ffn_hidden_size{shared}": model.ffn_hidden_size // tensor,
        "model.chunk_size": model.chunk_size,  # probes read texts of whole chunks
    }
    if model.num_experts:
        sizes["model.expert_ffn_hidden_size"] = model.expert_ffn_hidden_size
        sizes[f"model.shared_expert_ffn_hidden_size{shared}"] = model.shared_expert_ffn_hidden_size // tensor
    slices = f" / context {parallel.context}" if parallel.context > 1 else ""
    tokens = micro_batch * context // parallel.context
    sizes[f"tokens of a rank (micro-batch {micro_batch} x {context}{slices})"] = tokens
    wrong = [f"{name} = {size}" for name, size in sizes.items() if size % _MULTIPLE]
    if wrong:
        raise TopologyError(
            f"precision: fp8 multiplies sizes that are multiples of {_MULTIPLE}, these are not: {'; '.join(wrong)}; "
            "change them, or use bf16"
        )
