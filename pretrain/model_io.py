"""A trained model back from its checkpoint, for evaluation and generation."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from pretrain.errors import RecipeError, RunDirError
from pretrain.inference import InferenceEngine
from pretrain.model import HSAModel
from pretrain.recipe import Recipe, StageConfig, apply_override, recipe_from_container
from pretrain.run_dir import RunDir


@dataclass
class LoadedModel:
    """A model with what is needed to use it. engine_factory(**settings) makes an InferenceEngine with the stage's
    settings.
    """

    model: HSAModel
    tokenizer: Tokenizer
    recipe: Recipe
    engine_factory: Callable[..., InferenceEngine]
    step: int
    stage: StageConfig


def locate(checkpoint: Path) -> tuple[RunDir, Path]:
    """The run directory and the step directory meant by a run directory (its latest) or a step directory."""
    from parallel.checkpoint import find_latest

    checkpoint = checkpoint.resolve()
    if re.fullmatch(r"step_\d+", checkpoint.name):
        return RunDir(checkpoint.parent.parent), checkpoint
    run_dir = RunDir(checkpoint)
    if not run_dir.exists():
        raise RunDirError(
            f"{checkpoint} is neither a run directory (no run.json) nor one of its checkpoints (step_...)"
        )
    latest = find_latest(run_dir.checkpoints)
    if latest is None:
        raise RunDirError(f"{run_dir.checkpoints} holds no checkpoint yet")
    return run_dir, latest


def load_for_inference(checkpoint: str | Path, *, device: str = "auto", overrides: Sequence[str] = ()) -> LoadedModel:
    """Build the model of a checkpoint and load its weights. `overrides` change the frozen recipe (data.*, precision,
    ...).
    """
    from parallel import mesh
    from parallel.checkpoint import load_checkpoint
    from pretrain.model import build_model

    run_dir, step_dir = locate(Path(checkpoint))
    raw: dict[str, Any] = run_dir.read_recipe()
    for override in overrides:
        if override.startswith(("model.", "stages")):
            raise RecipeError(
                f"override {override!r}: the model and its stages are what was trained, they cannot be changed here"
            )
        apply_override(raw, override)
    recipe = recipe_from_container(raw, where=str(run_dir.recipe_path)).recipe
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    resolved = mesh.initialize(None, device, seed=recipe.seed)
    model = build_model(
        recipe.model,
        max_length=max(stage.context for stage in recipe.stages),
        seed=recipe.seed,
        bf16=recipe.stored_precision == "bf16",
        device=resolved,
    )
    extra = load_checkpoint(step_dir, [model], None)
    model.eval()
    position = extra["position"]
    # Between stages the position already names the next stage, whose settings the weights have not seen.
    index = position["stage"] if position["stage_step"] else position["stage"] - 1
    stage = recipe.stages[max(0, min(index, len(recipe.stages) - 1))]

    def engine_factory(**settings: Any) -> InferenceEngine:
        defaults = {"window": stage.window, "hsa_window": stage.hsa_window, "top_k": stage.top_k, "frozen": True}
        return InferenceEngine(model, **{**defaults, **settings})

    return LoadedModel(model, tokenizer, recipe, engine_factory, position["step"], stage)
