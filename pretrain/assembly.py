"""Model, gradient reduction and optimizer of a recipe on this rank, for training and for benchmarks."""

from __future__ import annotations

import contextlib

import torch

from parallel.compat import DistributedDataParallel, parallel_state
from parallel.optimizer import Optimizer, build_optimizer, wrap_model
from parallel.optional import use_fused_optimizer
from pretrain.graphed import side_stream, uses_graph
from pretrain.model import HSAModel, build_chunks
from pretrain.recipe import Recipe
from pretrain.topology import reach_of


def assemble(
    recipe: Recipe, device: torch.device, *, deterministic: bool
) -> tuple[list[HSAModel], list[DistributedDataParallel], Optimizer]:
    """This rank's model chunks, bare and in Megatron's DDP, and their optimizer; process groups are up."""
    models = build_chunks(
        recipe.model,
        max_length=max(stage.context for stage in recipe.stages),
        seed=recipe.seed,
        parallel=recipe.parallel,
        bf16=recipe.stored_precision == "bf16",
        fp8=recipe.precision == "fp8",
        recompute=recipe.recompute,
        deterministic=deterministic,
        compute=recipe.compute,
        reach=reach_of(recipe),
        device=device,
    )
    # Gradient accumulators run on the stream on which they are made.
    with torch.cuda.stream(side_stream(device)) if uses_graph(recipe, device) else contextlib.nullcontext():
        replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        overlap = device.type == "cuda" and replicas > 1  # on the CPU reduction and backward would share the cores
        chunks = wrap_model(models, recipe.optimizer, overlap=overlap)
    fused = use_fused_optimizer(recipe.compute.fused_optimizer, on_gpu=device.type == "cuda")
    return models, chunks, build_optimizer(recipe.optimizer, chunks, fused=fused)
