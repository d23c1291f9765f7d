"""Retrieval measured during training, on the model as it stands: what a stage's exit rule asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_pipeline.tokenizer import load_tokenizer
from pretrain.evaluation.commands import task_options
from pretrain.evaluation.heldout import load_held_out
from pretrain.evaluation.niah import needle_accuracy
from pretrain.inference import InferenceEngine
from pretrain.layout_forward import LayoutEngine
from pretrain.model import HSAModel
from pretrain.recipe import Recipe, StageConfig


class Probe:
    """Asks a model for needles in held-out text. The text is read and tokenized once.

    models: this rank's model chunks. A model spread over ranks answers by whole forward passes, all ranks together.
    """

    def __init__(self, models: Sequence[HSAModel], recipe: Recipe) -> None:
        self.models = models
        self.recipe = recipe
        self.tokenizer = load_tokenizer(recipe.data.tokenizer)
        self.held_out = load_held_out(recipe.data.held_out, self.tokenizer)

    def measure(self, stage: StageConfig, metric: str, *, samples: int) -> tuple[float, dict[str, Any]]:
        """Value of `metric` (such as `niah.single@16k`) with the stage's window and top-k, and a record for the log.

        The questions depend on the recipe's seed only, so a curve over training compares like with like.
        """
        engine: InferenceEngine | LayoutEngine
        if self.recipe.parallel.model_ranks > 1:
            engine = LayoutEngine(self.models)
        else:
            engine = InferenceEngine(
                self.models[0], window=stage.window, hsa_window=stage.hsa_window, top_k=stage.top_k
            )
        tally = needle_accuracy(
            engine,
            self.tokenizer,
            self.held_out,
            metric,
            samples=samples,
            seed=self.recipe.seed,
            chunk_size=self.recipe.model.chunk_size,
            templates=self.recipe.data.synthetic.templates,
            options=task_options(self.recipe.data),
        )
        return tally.accuracy, {"accuracy": tally.accuracy, "samples": tally.n}
