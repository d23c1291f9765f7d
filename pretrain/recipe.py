"""The recipe: one typed container for a run, read from YAML, changed by `key=value` overrides, checked as a whole.

Reading goes: YAML file -> overrides -> unknown keys refused (with the nearest known one) -> preset filled in -> types
by OmegaConf -> sizes like "16k" made integers -> rules that join several fields (`check`). Everything wrong is a
`RecipeError` that names the key; nothing here touches a GPU, the data or the network.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipeline.config import DataConfig
from parallel.mesh import ParallelConfig
from parallel.model_config import ModelConfig
from parallel.optimizer import OptimizerSettings
from parallel.optional import ComputeConfig
from pretrain.errors import RecipeError
from pretrain.evaluation.units import parse_metric
from pretrain.tracking import TrackingConfig
from recipes import PRESETS_DIR, RECIPES_DIR
from slurm.config import SlurmConfig


@dataclass
class Until:
    """When a stage ends: after `tokens` of this stage, or once `metric` has reached `at_least` (then at `max_tokens` at
    the latest).

    metric: `niah.<task>@<length>`, the exact-match accuracy of the model's own greedy answers, measured every
    `every_steps` steps on `samples` samples of held-out text. task: single | multikey | multiquery | variable_tracking.
    """

    tokens: Any = None
    metric: str | None = None
    at_least: float | None = None
    max_tokens: Any = None
    every_steps: int = 50
    samples: int = 32


@dataclass
class StageLearningRate:
    """The learning rate's way through one stage, as factors of `optimizer.lr`: from `start` to `end`."""

    schedule: str = "constant"  # constant | linear | cosine
    start: float = 1.0
    end: float = 1.0


@dataclass
class StageData:
    """What a stage changes about the data: a mix by its name in `data.mixes`, and fields of `data.synthetic`."""

    mix: str | None = None
    synthetic: dict[str, Any] = field(default_factory=dict)


@dataclass
class StageConfig:
    """One stage. context, window, hsa_window in tokens; top_k in chunks, or "full" for every visible chunk."""

    name: str = "???"
    context: Any = "???"
    window: Any = "???"
    hsa_window: Any = None  # inside HSA layers; null: like window
    top_k: Any = "full"
    batch: int | None = None  # sequences per step, over all ranks
    micro_batch: int | None = None  # sequences per forward pass and rank
    learning_rate: StageLearningRate = field(default_factory=StageLearningRate)
    data: StageData = field(default_factory=StageData)
    until: Until = field(default_factory=Until)
    slurm: dict[str, Any] = field(default_factory=dict)


@dataclass
class CheckpointConfig:
    """When to save and what to keep. A checkpoint is always written at the end of a stage and when stopped."""

    every_steps: int | None = None
    every_minutes: float | None = 20.0
    keep_last: int = 3
    keep_every_tokens: Any = None  # one checkpoint per so many tokens is never deleted
    # Written `async` in YAML, a word that Python keeps for itself: training goes on while a copy in host memory is
    # written. Whatever ends a run, or starts the next save, waits for it.
    async_save: bool = False


@dataclass
class Recipe:
    """A run."""

    name: str = "???"
    seed: int = 0
    precision: str = "bf16"  # bf16 | fp32 | fp8 (bf16 but for the decoder's products: Transformer Engine)
    device: str = "auto"  # auto | cpu | cuda
    deterministic: bool | None = None  # null: on CPU
    max_steps: int | None = None
    batch: int = 8
    micro_batch: int | None = None  # null: the rank's whole share of the batch
    recompute: str = "none"  # activation checkpointing: none | selective | full
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    stages: list[StageConfig] = field(default_factory=list)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    @property
    def stored_precision(self) -> str:
        """What parameters and activations are held in: bf16 | fp32."""
        return "bf16" if self.precision == "fp8" else self.precision

    def stage_batch(self, stage: StageConfig) -> int:
        """Sequences per step of this stage, over all ranks."""
        return stage.batch or self.batch

    def stage_steps(self, stage: StageConfig) -> int:
        """Steps of this stage, at most (an exit by metric may come earlier)."""
        tokens = stage.until.tokens or stage.until.max_tokens
        return max(1, math.ceil(tokens / (self.stage_batch(stage) * stage.context)))


@dataclass
class LoadedRecipe:
    """A checked recipe, what was said about it, and the plain container that is frozen in the run directory."""

    recipe: Recipe
    warnings: list[str]
    frozen: dict[str, Any]


# ------------------------------------------------------------------------------------------------------------------
# reading


def find_recipe(recipe: str) -> Path:
    """The file of a recipe given by path, or by its name among the shipped ones."""
    path = Path(recipe)
    if path.is_file():
        return path
    shipped = sorted(p.stem for p in RECIPES_DIR.glob("*.yaml"))
    if recipe in shipped:
        return RECIPES_DIR / f"{recipe}.yaml"
    raise RecipeError(f"no recipe {recipe!r}: there is no such file, and the recipes shipped are {', '.join(shipped)}")


def load_recipe(recipe: str, overrides: typing.Sequence[str] = (), *, clashes_are_errors: bool = True) -> LoadedRecipe:
    """Read, override and check a recipe (path or shipped name).

    When an override exchanged the model preset, values of the stages that do not fit the new preset are errors if
    `clashes_are_errors`, else warnings (`hsa plan` wants to count such a model all the same).
    """
    path = find_recipe(recipe)
    try:
        raw = plain(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        raise RecipeError(f"{path}: not a readable YAML recipe: {error}") from None
    except TypeError:
        raise RecipeError(f"{path}: a recipe is a mapping of keys, this file holds something else") from None
    preset = (raw.get("model") or {}).get("preset")
    for override in overrides:
        apply_override(raw, override)
    loaded = recipe_from_container(raw, where=str(path))
    exchanged = preset is not None and loaded.recipe.model.preset != preset
    errors, clashes = check(loaded.recipe)
    if exchanged and not clashes_are_errors:
        loaded.warnings += [f"{clash} (the recipe was written for preset {preset})" for clash in clashes]
    else:
        errors += clashes
    if errors:
        raise RecipeError(f"{path}: " + "; ".join(errors))
    return loaded


def recipe_from_container(raw: dict[str, Any], *, where: str) -> LoadedRecipe:
    """Typed recipe from a plain container (recipe file or RUN/recipe.yaml); unknown keys, wrong types are errors."""
    raw = plain(OmegaConf.create(raw))
    if isinstance(raw.get("checkpoint"), dict) and "async" in raw["checkpoint"]:
        raw["checkpoint"]["async_save"] = raw["checkpoint"].pop("async")
    refuse_unknown_keys(raw, Recipe, "", where)
    raw["model"] = fill_preset(raw.get("model") or {}, where)
    try:
        config = OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.create(raw))
        tasks = ((raw.get("data") or {}).get("synthetic") or {}).get("tasks")
        if tasks is not None:  # a choice of tasks replaces the default one, it is not added to it
            config.data.synthetic.tasks = tasks
        OmegaConf.resolve(config)
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise RecipeError(f"{where}: required and not set: {', '.join(missing)}")
        recipe = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        raise RecipeError(f"{where}: {key}: {str(error).splitlines()[0]}") from None
    assert isinstance(recipe, Recipe)
    normalise(recipe, where)
    return LoadedRecipe(recipe, [], plain(OmegaConf.structured(recipe)))


def plain(config: Any) -> dict[str, Any]:
    """An OmegaConf mapping as a plain dict, interpolations as written. TypeError for anything but a mapping."""
    container = OmegaConf.to_container(config)
    if not isinstance(container, dict):
        raise TypeError(type(container).__name__)
    return {str(key): value for key, value in container.items()}


def fill_preset(model: dict[str, Any], where: str) -> dict[str, Any]:
    """The preset's fields, then those set beside it."""
    name = model.get("preset", "demo")
    known = sorted(p.stem for p in PRESETS_DIR.glob("*.yaml"))
    if name not in known:
        raise RecipeError(
            f"{where}: model.preset: no preset {name!r}{nearest(str(name), known)}; there are {', '.join(known)}"
        )
    return {**plain(OmegaConf.load(PRESETS_DIR / f"{name}.yaml")), **model, "preset": name}


def nearest(key: str, known: typing.Iterable[str]) -> str:
    """`, did you mean 'x'?` or nothing."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def refuse_unknown_keys(raw: Any, schema: Any, prefix: str, where: str) -> None:
    """Walk a container beside its dataclasses and stop at the first key that no dataclass has."""
    origin, arguments = typing.get_origin(schema), typing.get_args(schema)
    if origin in (typing.Union, getattr(__import__("types"), "UnionType", None)):
        inner = [a for a in arguments if a is not type(None)]
        return refuse_unknown_keys(raw, inner[0], prefix, where) if len(inner) == 1 else None
    if origin is list and isinstance(raw, list):
        for index, item in enumerate(raw):
            refuse_unknown_keys(item, arguments[0], f"{prefix}[{index}]", where)
    elif origin is dict and isinstance(raw, dict) and len(arguments) == 2:
        for key, item in raw.items():
            refuse_unknown_keys(item, arguments[1], f"{prefix}.{key}", where)
    elif dataclasses.is_dataclass(schema) and isinstance(raw, dict):
        hints = typing.get_type_hints(schema)
        for key, item in raw.items():
            full = f"{prefix}.{key}" if prefix else str(key)
            if key not in hints:
                hint = nearest(str(key), hints) or f"; known here: {', '.join(hints)}"
                raise RecipeError(f"{where}: unknown key {full!r}{hint}")
            refuse_unknown_keys(item, hints[key], full, where)
    return None


_STEP = re.compile(r"[^.\[\]]+|\[\d+\]")


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted key of a plain container: `optimizer.lr=1e-3`, `stages[0].window=32`, `stages.warmup.window=9`."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise RecipeError(f"override {override!r}: write key=value, for example optimizer.lr=1e-3")
    value = OmegaConf.to_container(OmegaConf.create(f"value: {text}" if text.strip() else "value: ''"))["value"]  # type: ignore[index,call-overload]
    steps = _STEP.findall(key)
    target: Any = raw
    for position, step in enumerate(steps):
        last = position == len(steps) - 1
        if isinstance(target, list):
            index = _list_index(target, step, override)
            if last:
                target[index] = value
            target = target[index]
        else:
            if not isinstance(target, dict) or step.startswith("["):
                raise RecipeError(
                    f"override {override!r}: {'.'.join(steps[:position])} is not something with a field {step!r}"
                )
            if last:
                target[step] = value
            elif target.get(step) is None:
                target[step] = {}
            target = target[step]


def _list_index(items: list[Any], step: str, override: str) -> int:
    """Index in a list from `[2]`, `2` or the `name` of an entry."""
    text = step.strip("[]")
    if text.isdigit() and int(text) < len(items):
        return int(text)
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if text in names:
        return names.index(text)
    raise RecipeError(f"override {override!r}: no entry {text!r}; there are {len(items)}: {', '.join(map(str, names))}")


# -----------------------------------------------------------------------------------------------------------------
# checking

_SUFFIX = {"k": 1 << 10, "m": 1 << 20}


def parse_size(value: Any) -> int:
    """An integer from 512, "16k", "4m" (binary: 16k = 16384) or 8e12. Raises ValueError."""
    if isinstance(value, str):
        text = value.strip().lower()
        factor = _SUFFIX.get(text[-1:], 1)
        value = float(text[:-1] if factor > 1 else text) * factor
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        raise ValueError(value)
    return int(value)


def normalise(recipe: Recipe, where: str) -> None:
    """Turn sizes into integers, in place."""

    def size(owner: Any, name: str, label: str) -> None:
        value = getattr(owner, name)
        if value is None:
            return
        try:
            setattr(owner, name, parse_size(value))
        except (ValueError, TypeError):
            raise RecipeError(
                f"{where}: {label}.{name}: {value!r} is not a whole number like 512, 16k or 8e12"
            ) from None

    for stage in recipe.stages:
        label = f"stages.{stage.name}"
        if stage.hsa_window is None:
            stage.hsa_window = stage.window
        for name in ("context", "window", "hsa_window"):
            size(stage, name, label)
        if stage.top_k == "full":
            stage.top_k = None
        size(stage, "top_k", label)
        for name in ("tokens", "max_tokens"):
            size(stage.until, name, f"{label}.until")
    size(recipe.checkpoint, "keep_every_tokens", "checkpoint")


def check(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Rules that join several fields. Returns what is wrong whatever the model, and what clashes with the model's
    preset.
    """
    errors: list[str] = recipe.model.problems() + recipe.optimizer.problems() + recipe.compute.problems()
    clashes: list[str] = []

    def one_of(label: str, value: Any, choices: tuple[str, ...]) -> None:
        if value not in choices:
            errors.append(f"{label}: {value!r} is none of {', '.join(choices)}")

    one_of("precision", recipe.precision, ("bf16", "fp32", "fp8"))
    if recipe.precision == "fp8":  # both run MLPs outside of Megatron's FP8 context, or its scales would be frozen
        for key, off in (("tiled_mlp", 1), ("cuda_graph", False)):
            if getattr(recipe.compute, key) != off:
                errors.append(f"compute.{key}: cannot be used with precision: fp8, leave it out or use bf16")
    one_of("device", recipe.device, ("auto", "cpu", "cuda"))
    one_of("recompute", recipe.recompute, ("none", "selective", "full"))
    if recipe.max_steps is not None and recipe.max_steps < 0:
        errors.append(f"max_steps: must not be negative, is {recipe.max_steps}")
    if not recipe.stages:
        errors.append("stages: there is none")
    names = [stage.name for stage in recipe.stages]
    errors += [f"stages: two are called {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
    options = recipe.model.ablations.experiments()
    if options and recipe.parallel.model_ranks > 1:
        errors.append(
            f"model.ablations.{options[0]}: an experiment that runs with data parallelism only, parallel asks for "
            f"{recipe.parallel.model_ranks} ranks per copy of the model"
        )
    if recipe.checkpoint.keep_last < 1:
        errors.append(f"checkpoint.keep_last: at least 1 must be kept, is {recipe.checkpoint.keep_last}")
    if recipe.checkpoint.every_steps is not None and recipe.checkpoint.every_steps < 1:
        errors.append(f"checkpoint.every_steps: must be positive or null, is {recipe.checkpoint.every_steps}")
    for stage in recipe.stages:
        stage_errors, stage_clashes = check_stage(recipe, stage)
        errors += stage_errors
        clashes += stage_clashes
    return errors, clashes


def check_stage(recipe: Recipe, stage: StageConfig) -> tuple[list[str], list[str]]:
    """As `check`, for one stage."""
    errors: list[str] = []
    clashes: list[str] = []
    label = f"stages.{stage.name}"
    chunk = recipe.model.chunk_size
    names = ["context", "window"] + (["hsa_window"] if stage.hsa_window != stage.window else [])
    for name in names:
        value = getattr(stage, name)
        if value <= 0:
            errors.append(f"{label}.{name}: must be positive, is {value}")
        elif chunk > 0 and value % chunk:
            near = " or ".join(str(n) for n in (value // chunk * chunk, (value // chunk + 1) * chunk) if n)
            clashes.append(f"{label}.{name}: {value} is no multiple of the chunk size {chunk}, take {near}")
    if stage.top_k is not None and stage.top_k < 1:
        errors.append(f'{label}.top_k: must be positive or "full", is {stage.top_k}')
    if stage.learning_rate.schedule not in ("constant", "linear", "cosine"):
        errors.append(
            f"{label}.learning_rate.schedule: {stage.learning_rate.schedule!r} is none of constant, linear, cosine"
        )
    if stage.data.mix is not None and stage.data.mix not in recipe.data.mixes:
        there = ", ".join(recipe.data.mixes) or "none"
        errors.append(f"{label}.data.mix: no mix {stage.data.mix!r} in data.mixes (there: {there})")
    batch, lanes = recipe.stage_batch(stage), recipe.data.lanes
    if lanes < 1 or batch < 1 or batch % lanes:
        good = max(1, round(batch / max(lanes, 1))) * max(lanes, 1)
        errors.append(
            f"{label}.batch: {batch} sequences cannot be shared by data.lanes {lanes}, a multiple such as {good} can"
        )
    until = stage.until
    if (until.tokens is None) == (until.metric is None):
        errors.append(f"{label}.until: give either tokens, or metric with at_least and max_tokens")
    elif until.metric is not None:
        try:
            parse_metric(until.metric)
        except RecipeError as error:
            errors.append(f"{label}.until.metric: {error}")
        if until.at_least is None or until.max_tokens is None:
            errors.append(f"{label}.until: a metric needs at_least and max_tokens")
        if until.every_steps < 1 or until.samples < 1:
            errors.append(f"{label}.until: every_steps and samples must be positive")
    if (until.tokens or until.max_tokens or 1) <= 0:
        errors.append(f"{label}.until: tokens must be positive")
    return errors, clashes


def effective_micro_batch(recipe: Recipe, stage: StageConfig, data_parallel: int) -> int:
    """Sequences per forward pass; RecipeError unless batch = data_parallel x micro-batch x whole number of
    accumulations.
    """
    batch, lanes = recipe.stage_batch(stage), recipe.data.lanes
    if lanes % data_parallel:
        works = ", ".join(str(n) for n in range(1, lanes + 1) if lanes % n == 0)
        raise RecipeError(
            f"data.lanes: {data_parallel} data-parallel ranks cannot share {lanes} lanes; sizes that work: {works}"
        )
    share = batch // data_parallel
    micro = stage.micro_batch or recipe.micro_batch or share
    if micro < 1 or share % micro:
        works = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        raise RecipeError(
            f"stages.{stage.name}.micro_batch: {micro} does not divide the {share} sequences of each of the "
            f"{data_parallel} data-parallel ranks; sizes that work: {works}"
        )
    return micro
