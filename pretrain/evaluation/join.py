"""``hsa eval join``: results of several trainings as one, such as those of the same recipe with three seeds.

Every cell counts all their questions, with the interval of all of them. The table keeps the trainings apart as well:
what a seed makes is often more than what the interval of the questions says. A training's lengths may come in several
files, as they do where the long ones were asked by a command of their own.
"""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pretrain.errors import RecipeError, RunDirError
from pretrain.evaluation.retrieval import Cell, TaskResult
from pretrain.evaluation.shared import together
from pretrain.evaluation.tally import Tally
from pretrain.evaluation.units import format_length
from pretrain.run_dir import read_json

HELP = (
    "Join the results of several trainings, such as three seeds of a recipe, or of several lengths: tables, JSON, one "
    "picture."
)
EXAMPLE = "hsa eval join runs/seed0/eval/niah.json runs/seed1/eval/niah.json runs/seed2/eval/niah.json --out seeds"

_TOGETHER = "together"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``hsa eval join``."""
    parser.add_argument("results", nargs="+", metavar="RESULT", help="JSON of hsa eval niah, or of hsa eval ruler")
    parser.add_argument("--out", metavar="DIR", default=".", help="folder for JSON and picture (default: here)")
    parser.add_argument("--name", metavar="NAME", help="name of the files in it (default niah or ruler)")


@dataclass(frozen=True)
class Saved:
    """What files of ``hsa eval niah`` or ``ruler`` hold, one, or several of one training at different lengths."""

    paths: tuple[Path, ...]
    evaluation: str
    model: Mapping[str, Any]
    tasks: dict[str, TaskResult]  # of several kinds of needles also all together

    @property
    def name(self) -> str:
        """The training's run directory, by its last part; of weights without one the file."""
        run = self.model.get("run_dir")
        return Path(run).name if run else str(self.path)

    @property
    def path(self) -> Path:
        """The file, or the first of several."""
        return self.paths[0]

    @property
    def lengths(self) -> set[int]:
        """Lengths of any task."""
        return {length for task in self.tasks.values() for length in task.lengths}


def read_result(path: Path) -> Saved:
    """The result in ``path``; RunDirError names a file that is none of ``hsa eval niah`` or ``ruler``."""
    value = read_json(path)
    try:
        kind, model = value["evaluation"], value["model"]
        if kind == "niah":
            kinds = {name: _task(one) for name, one in value.get("values", {}).items()}
            return Saved((path,), kind, model, {**kinds, _TOGETHER if kinds else value["task"]: _task(value)})
        if kind == "ruler":
            return Saved((path,), kind, model, {name: _task(one) for name, one in value["tasks"].items()})
    except (KeyError, TypeError, AttributeError) as error:
        raise RunDirError(f"{path} is no result of hsa eval niah or ruler ({error!r}): give such a JSON file") from None
    raise RunDirError(f"{path} is of hsa eval {kind}: only results of hsa eval niah and hsa eval ruler are joined")


def _task(value: Mapping[str, Any]) -> TaskResult:
    cells = [
        Cell(cell["length"], cell["depth"], cell["distance"], Tally(cell["n"], cell["correct"]))
        for cell in value["cells"]
    ]
    return TaskResult(
        value["task"],
        value["templates"],
        value["seed"],
        value["samples_per_cell"],
        cells,
        value["haystack_tokens"],
        {each["length"]: each["seconds"] for each in value["lengths"]},
        value.get("haystacks_per_length"),
    )


def by_training(files: list[Saved]) -> list[Saved]:
    """Results in order, where a file goes on with the one before it if that is the same training's at other lengths.

    RecipeError for fewer than two files, or one that is given twice.
    """
    if len(files) < 2:
        raise RecipeError("hsa eval join: give two results at least")
    results: list[Saved] = []
    seen: set[Path] = set()
    for one in files:
        if one.path.resolve() in seen:
            raise RecipeError(f"{one.path} is given twice: its questions would count twice")
        seen.add(one.path.resolve())
        if results and _goes_on(results[-1], one):
            results[-1] = _one_after_another(results[-1], one)
        else:
            results.append(one)
    return results


def _goes_on(before: Saved, one: Saved) -> bool:
    def asked(saved: Saved) -> tuple[Any, ...]:
        tasks = {name: (task.seed, task.templates, task.samples, task.texts) for name, task in saved.tasks.items()}
        return saved.evaluation, saved.model, tasks

    return asked(one) == asked(before) and not one.lengths & before.lengths


def _one_after_another(before: Saved, one: Saved) -> Saved:
    tasks = {}
    for name, task in before.tasks.items():
        cells = sorted(task.cells + one.tasks[name].cells, key=lambda cell: cell.length)
        tasks[name] = replace(task, cells=cells, seconds={**task.seconds, **one.tasks[name].seconds})
    return replace(before, paths=(*before.paths, *one.paths), tasks=tasks)


def join(results: list[Saved]) -> Saved:
    """All questions of all results; RecipeError where they were not asked alike, so that a mean would say nothing."""
    first = results[0]
    for one in results:
        for what, here, there in (
            ("the evaluation", one.evaluation, first.evaluation),
            ("settings", one.model.get("settings"), first.model.get("settings")),
            ("tasks or values", list(one.tasks), list(first.tasks)),
            ("the grid of lengths and depths", _grid(one), _grid(first)),
            ("the wording", _wording(one), _wording(first)),
        ):
            if here != there:
                raise RecipeError(
                    f"{one.path} and {first.path} differ in {what} ({_short(here)}; {_short(there)}): "
                    "join what was asked alike"
                )
    tasks = {name: together([one.tasks[name] for one in results], task.task) for name, task in first.tasks.items()}
    return Saved(first.paths, first.evaluation, first.model, tasks)


def _grid(one: Saved) -> dict[str, list[tuple[str, float | None, int | None]]]:
    return {
        name: [(format_length(cell.length), cell.depth, cell.distance) for cell in task.cells]
        for name, task in one.tasks.items()
    }


def _wording(one: Saved) -> list[str]:
    return sorted({task.templates for task in one.tasks.values()})


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def names(results: list[Saved]) -> list[str]:
    """What rows are called: run directories by their last part, files where two have the same."""
    short = [one.name for one in results]
    return short if len(set(short)) == len(short) else [str(one.path) for one in results]


def title(results: list[Saved]) -> str:
    """Name, step and stage, as far as they agree, and the number of trainings."""

    def agreed(key: str) -> Any:
        found = {one.model.get(key) for one in results}
        return found.pop() if len(found) == 1 else None

    name, step, stage = agreed("name"), agreed("step"), agreed("stage")
    parts = [str(name)] if name else []
    if step is not None:
        parts.append(f"step {step:,}" + (f" ({stage})" if stage else ""))
    if len(results) > 1:
        parts.append(f"{len(results)} trainings")
    return " · ".join(parts)


def to_json(results: list[Saved], joined: Saved) -> dict[str, Any]:
    """Plain JSON: which files, and per task and length each one's answers and all together."""
    by_name = dict(zip(names(results), results, strict=True))

    def task(name: str) -> dict[str, Any]:
        lengths = []
        for length, tally in joined.tasks[name].by_length().items():
            each = {run: _counts(one.tasks[name].by_length()[length]) for run, one in by_name.items()}
            lengths.append({"length": length, **_counts(tally), "each": each})
        return {"templates": joined.tasks[name].templates, "lengths": lengths}

    return {
        "evaluation": "join",
        "of": joined.evaluation,
        "results": {name: [os.fspath(path) for path in one.paths] for name, one in by_name.items()},
        "models": {name: dict(one.model) for name, one in by_name.items()},
        "tasks": {name: task(name) for name in joined.tasks},
    }


def _counts(tally: Tally) -> dict[str, Any]:
    value = tally.to_json()
    del value["token_accuracy"]  # files keep a share and no counts
    return value


def main(args: argparse.Namespace) -> int:
    """Join; RecipeError and RunDirError for what the user can repair."""
    results = by_training([read_result(Path(path)) for path in args.results])
    joined = join(results)
    from pretrain.evaluation import plots, report

    folder, name = Path(args.out), args.name or joined.evaluation
    contexts = {one.model.get("training_context") for one in results}
    context = contexts.pop() if len(contexts) == 1 else None
    head = title(results)
    picture = folder / f"{name}.png"
    if joined.evaluation == "niah":
        *_, whole = joined.tasks.values()
        plots.needle_map(whole, picture, model=head, training_context=context)
    else:
        plots.accuracy_by_length(joined.tasks, picture, model=head, training_context=context)
    trainings = {name: one.tasks for name, one in zip(names(results), results, strict=True)}
    table = report.joined_table(trainings, joined.tasks)
    path = report.save_json(to_json(results, joined), folder / f"{name}.json")
    print(f"{head}\n{table}\n{path}\n{picture}", flush=True)
    return 0
