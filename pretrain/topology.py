"""Whether a recipe can run on a number of ranks: one check for `hsa plan`, `hsa submit` and `hsa train`; and what its
pipeline stages are cut by.
"""

from __future__ import annotations

from parallel.mesh import check_micro_batches, check_topology, resolve_device
from parallel.optional import check_compute
from parallel.pipeline import Reach
from parallel.precision import check_fp8, check_fp8_sizes
from pretrain.recipe import Recipe, StageConfig, effective_micro_batch


def check_stage(recipe: Recipe, stage: StageConfig, world_size: int, where: str | None = None) -> None:
    """Refuse sizes that cannot be: TopologyError or RecipeError (both ValueError, exit status 2) that names the stage,
    the numbers that clash and the nearest that work. `where`: the ranks in the caller's words.
    """
    model, batch = recipe.model, recipe.stage_batch(stage)
    try:
        data_parallel = check_topology(
            recipe.parallel,
            world_size,
            num_layers=model.num_layers,
            num_heads=model.num_heads,
            num_experts=model.num_experts,
            key_value_heads=model.shared_heads(),
            widths=model.split_widths(),
            context_length=stage.context,
            chunk_size=model.chunk_size,
            lanes=recipe.data.lanes,
            batch=batch,
        )
        micro_batch = effective_micro_batch(recipe, stage, data_parallel)
        check_micro_batches(recipe.parallel, batch // data_parallel // micro_batch)
        if recipe.precision == "fp8":
            check_fp8_sizes(model, recipe.parallel, context=stage.context, micro_batch=micro_batch)
    except ValueError as error:
        where = where or f"{world_size} rank{'s' if world_size > 1 else ''}"
        raise type(error)(f'stage "{stage.name}" on {where}: {error}') from error


def check_machine(recipe: Recipe) -> None:
    """Refuse what this machine's packages or GPU cannot do: OptionalPartError; TopologyError where there is no such
    GPU. Nothing is started.
    """
    device = resolve_device(recipe.device)
    check_compute(recipe.compute, on_gpu=device.type == "cuda")
    if recipe.precision == "fp8":
        check_fp8(recipe.compute, device)


def reach_of(recipe: Recipe) -> Reach:
    """What attention reads in the stage that trains on most tokens: pipeline stages are cut for it, once per start."""
    stage = max(recipe.stages, key=lambda s: recipe.stage_steps(s) * recipe.stage_batch(s) * s.context)
    context = stage.context
    return Reach(
        window=min(stage.window, context),
        hsa_window=min(stage.hsa_window, context),
        chunks=min(context, stage.top_k * recipe.model.chunk_size if stage.top_k else context),
        context=context,
    )
