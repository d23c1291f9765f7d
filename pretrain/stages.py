"""The stage controller: where training stands in its recipe, when a stage ends, and the learning rate of every step.

Pure bookkeeping on integers and floats, no tensors: what decides a run's course can be read and tested here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from pretrain.recipe import Recipe, StageConfig


@dataclass
class Position:
    """Where training stands after the last finished step. Saved in every checkpoint.

    step, tokens: of the whole run. stage: index of the stage that is going on. stage_step, stage_tokens: within it.
    exits: for every stage left so far, its name, its last step and why it ended. finished: no stage is left.
    """

    step: int = 0
    tokens: int = 0
    stage: int = 0
    stage_step: int = 0
    stage_tokens: int = 0
    finished: bool = False
    exits: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class StageController:
    """Moves a `Position` through the stages of a recipe."""

    def __init__(self, recipe: Recipe, position: Position | None = None) -> None:
        self.recipe = recipe
        self.position = position or Position()

    @property
    def stage(self) -> StageConfig:
        """The stage going on; the last one once finished."""
        return self.recipe.stages[min(self.position.stage, len(self.recipe.stages) - 1)]

    @property
    def stage_steps(self) -> int:
        """Steps the stage going on takes at most."""
        return self.recipe.stage_steps(self.stage)

    def completed(self, name: str) -> bool:
        """True once stage `name` has ended."""
        return any(entry["stage"] == name for entry in self.position.exits)

    def advance(self) -> None:
        """Account for one finished step."""
        tokens = self.recipe.stage_batch(self.stage) * self.stage.context
        self.position.step += 1
        self.position.tokens += tokens
        self.position.stage_step += 1
        self.position.stage_tokens += tokens

    def probe_due(self) -> bool:
        """True when the stage's exit metric is to be measured after the step just finished."""
        until = self.stage.until
        if until.metric is None or self.position.finished:
            return False
        return self.position.stage_step % until.every_steps == 0 or self.position.stage_step >= self.stage_steps

    def exit_reason(self, metric: float | None = None) -> str | None:
        """Why the stage ends now, or None. `metric`: the value of the exit metric, when it was just measured."""
        until, spent = self.stage.until, self.position.stage_step >= self.stage_steps
        if until.metric is None:
            return "its tokens are trained" if spent else None
        assert until.at_least is not None
        if metric is not None and metric >= until.at_least:
            return f"{until.metric} = {metric:.3f} reached {until.at_least:g}"
        if spent:
            shown = "never measured" if metric is None else f"{metric:.3f}"
            return f"max_tokens spent, {until.metric} ({shown}) did NOT reach {until.at_least:g}"
        return None

    def leave_stage(self, reason: str, metric: float | None = None) -> None:
        """Enter the next stage, or finish."""
        position = self.position
        position.exits.append({"stage": self.stage.name, "step": position.step, "reason": reason, "metric": metric})
        position.stage += 1
        position.stage_step = position.stage_tokens = 0
        position.finished = position.stage >= len(self.recipe.stages)

    def learning_rate_factor(self) -> float:
        """Factor of `optimizer.lr` for the step to come: linear warm-up over the run's first steps, then the stage's
        own way.
        """
        warmup = self.recipe.optimizer.warmup_steps
        ramp = min(1.0, (self.position.step + 1) / warmup) if warmup else 1.0
        way = self.stage.learning_rate
        progress = min(1.0, self.position.stage_step / max(1, self.stage_steps - 1))
        if way.schedule == "linear":
            shape = way.start + (way.end - way.start) * progress
        elif way.schedule == "cosine":
            shape = way.end + (way.start - way.end) * 0.5 * (1 + math.cos(math.pi * progress))
        else:
            shape = way.start
        return ramp * shape

    def remaining_tokens(self) -> int:
        """Tokens still to be trained at most, all stages."""
        left = 0
        for index, stage in enumerate(self.recipe.stages):
            if index < self.position.stage:
                continue
            steps = self.recipe.stage_steps(stage) - (self.position.stage_step if index == self.position.stage else 0)
            left += max(0, steps) * self.recipe.stage_batch(stage) * stage.context
        return left

    def plan(self) -> dict[str, Any]:
        """First and last steps of every stage: known for stages left, at most for the others (for RUN/run.json)."""
        stages, first = [], 1
        for index, stage in enumerate(self.recipe.stages):
            if index < len(self.position.exits):
                last = self.position.exits[index]["step"]
            else:
                last = first - 1 + self.recipe.stage_steps(stage)
            stages.append({"name": stage.name, "first_step": first, "last_step": last})
            first = last + 1
        return {"total_steps": first - 1, "stages": stages}
