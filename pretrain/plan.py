"""`hsa plan`: what a recipe is and costs, before any GPU: parameters, tokens, steps, FLOPs, memory per GPU, time.

Everything here is arithmetic on the recipe. No weights are allocated.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from parallel.model_config import ModelConfig, ParameterCount, count_parameters
from parallel.optional import describe
from pretrain.memory_plan import memory_per_gpu
from pretrain.recipe import Recipe, StageConfig, load_recipe
from pretrain.topology import check_stage

EXAMPLE = "hsa plan 8b-a1b --gpus 256"


def flops_per_token(model: ModelConfig, *, context: int, window: int, hsa_window: int, top_k: int | None) -> float:
    """Training FLOPs of one token, forward and backward (three times forward), without recomputation.

    Two FLOPs per multiply-add. Matrix products of all weights a token uses; windows and chunk reads at their mean over
    the context; retrieval scores against the mean number of visible chunks.
    """
    counts = count_parameters(model)
    weights = counts.active - model.vocab_size * model.hidden_size * (0 if model.tied_embeddings else 1)
    query = model.num_heads * model.head_dim

    def mean_reach(reach: int) -> float:
        """Mean over positions of min(position, reach)."""
        return context / 2 if reach >= context else reach * (1 - reach / (2 * context))

    chunks = context / model.chunk_size
    read = mean_reach(context if top_k is None else min(context, top_k * model.chunk_size))
    forward = 2.0 * weights
    for kind in model.layer_kinds():
        if "swa" in kind:
            forward += 4 * query * mean_reach(hsa_window if "hsa" in kind else window)
        if "hsa" in kind:
            forward += 4 * query * read + 2 * model.retrieval_dim * chunks / 2
    if model.ablations.hsa:
        forward += model.encoder_layers * 4 * query * (model.chunk_size + 1)
    return 3 * forward


def stage_flops_per_token(model: ModelConfig, stage: StageConfig) -> float:
    """`flops_per_token` of a stage."""
    return flops_per_token(
        model, context=stage.context, window=stage.window, hsa_window=stage.hsa_window, top_k=stage.top_k
    )


def plan(recipe: Recipe, *, gpus: int, mfu: float, peak_tflops: float) -> dict[str, Any]:
    """The whole plan as plain data; starts with the parameter counts, embeddings included."""
    counts: ParameterCount = count_parameters(recipe.model)
    stages = []
    for stage in recipe.stages:
        steps, batch = recipe.stage_steps(stage), recipe.stage_batch(stage)
        tokens = steps * batch * stage.context
        flops = stage_flops_per_token(recipe.model, stage)
        stages.append(
            {
                "name": stage.name,
                "context": stage.context,
                "window": stage.window,
                "top_k": stage.top_k,
                "steps": steps,
                "tokens": tokens,
                "tokens_per_step": batch * stage.context,
                "flops_per_token": flops,
                "days": tokens * flops / (gpus * peak_tflops * 1e12 * mfu) / 86400,
                "memory_bytes": memory_per_gpu(recipe, stage, gpus),
            }
        )
    weights = 2 if recipe.stored_precision == "bf16" else 4
    return {
        "parameters": {"total": counts.total, "active": counts.active},
        "parameters_without_embedding": {
            "total": counts.total - counts.embedding,
            "active": counts.active_without_embedding,
        },
        "name": recipe.name,
        "preset": recipe.model.preset,
        "gpus": gpus,
        "mfu": mfu,
        "peak_tflops": peak_tflops,
        # weights in the run's precision, fp32 master copies in a bf16 run, two moments in fp32
        "checkpoint_bytes": counts.total * (weights + (4 if weights == 2 else 0) + 8),
        "stages": stages,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hsa plan`."""
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides")
    parser.add_argument("--gpus", type=int, default=None, help="ranks to plan for (default: what slurm asks for)")
    parser.add_argument("--mfu", type=float, default=0.35, help="utilisation that the time assumes (default 0.35)")
    parser.add_argument("--peak-tflops", type=float, default=989.4, help="peak of one GPU (default: H100, bf16)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    """Run `hsa plan`."""
    loaded = load_recipe(args.recipe, args.overrides, clashes_are_errors=False)
    recipe = loaded.recipe
    gpus = args.gpus or recipe.slurm.world_size
    for stage in recipe.stages:
        check_stage(recipe, stage, gpus)
    for warning in loaded.warnings:
        print(f"hsa: warning: {warning}", file=sys.stderr)
    planned = plan(recipe, gpus=gpus, mfu=args.mfu, peak_tflops=args.peak_tflops)
    if args.json:
        print(json.dumps(planned, indent=2))
    else:
        print(as_text(planned))
        print("\n".join(describe()))
    return 0


def as_text(planned: dict[str, Any]) -> str:
    """The plan for people."""

    def count(value: float) -> str:
        for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
            if value >= size:
                return f"{value / size:.2f}{unit}"
        return f"{value:.0f}"

    def bytes_(value: float) -> str:
        return f"{value / 2**30:.2f} GiB" if value >= 2**29 else f"{value / 2**20:.1f} MiB"

    total, active = planned["parameters"]["total"], planned["parameters"]["active"]
    without = planned["parameters_without_embedding"]
    lines = [
        f"{planned['name']} (preset {planned['preset']})",
        f"parameters      {count(total)} total ({total:,}), {count(active)} active per token ({active:,})",
        f"  no embeddings {count(without['total'])} total, {count(without['active'])} active",
        f"checkpoint      {bytes_(planned['checkpoint_bytes'])}",
        f"time            on {planned['gpus']} GPUs of {planned['peak_tflops']:g} TFLOP/s at MFU {planned['mfu']:g}",
        "",
        f"{'stage':<10}{'context':>9}{'window':>8}{'top-k':>7}{'tokens':>10}{'steps':>12}{'FLOPs/token':>13}{'days':>10}",
    ]
    for stage in planned["stages"]:
        lines.append(
            f"{stage['name']:<10}{stage['context']:>9}{stage['window']:>8}{stage['top_k'] or 'full':>7}"
            f"{count(stage['tokens']):>10}{stage['steps']:>12,}{count(stage['flops_per_token']):>13}{stage['days']:>10.3g}"
        )
    lines += ["", "memory per GPU, of the pipeline rank that needs most"]
    parts = list(planned["stages"][0]["memory_bytes"])
    widths = [max(12, len(part) + 2) for part in parts]
    titles = "".join(f"{part:>{width}}" for part, width in zip(parts, widths, strict=True))
    lines.append(f"{'stage':<10}{titles}{'sum':>12}")
    for stage in planned["stages"]:
        values = stage["memory_bytes"]
        lines.append(
            f"{stage['name']:<10}"
            + "".join(f"{bytes_(values[part]):>{width}}" for part, width in zip(parts, widths, strict=True))
            + f"{bytes_(sum(values.values())):>12}"
        )
    return "\n".join(lines)
