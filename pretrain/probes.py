"""Retrieval measured during training, on the model as it stands: what a stage's exit rule asks for."""

from __future__ import annotations

from typing import Any

from data_pipeline.tokenizer import load_tokenizer
from pretrain.evaluation.heldout import load_held_out
from pretrain.evaluation.niah import needle_accuracy
from pretrain.inference import InferenceEngine
from pretrain.model import HSAModel
from pretrain.recipe import Recipe, StageConfig


def measure(
    model: HSAModel, recipe: Recipe, stage: StageConfig, metric: str, *, samples: int
) -> tuple[float, dict[str, Any]]:
    """Value of `metric` (such as `niah.single@16k`) with the stage's window and top-k, and a record for the log.

    The questions depend on the recipe's seed only, so a curve over training compares like with like.
    """
    engine = InferenceEngine(model, window=stage.window, hsa_window=stage.hsa_window, top_k=stage.top_k)
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    tally = needle_accuracy(
        engine,
        tokenizer,
        load_held_out(recipe.data.held_out, tokenizer),
        metric,
        samples=samples,
        seed=recipe.seed,
        chunk_size=recipe.model.chunk_size,
        options={"digits": recipe.data.synthetic.digits},
    )
    return tally.accuracy, {"accuracy": tally.accuracy, "samples": tally.n}
