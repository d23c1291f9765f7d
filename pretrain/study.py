"""`hsa study`: variants of one recipe, each trained and evaluated in a run directory of its own, and one table of them.

A study file names a base recipe, overrides of all variants, evaluations as command lines of ``hsa eval``, and the
variants (docs/study.md). Training and evaluation are ``hsa train`` and ``hsa eval`` in processes of their own, so a
variant that fails takes none of the others with it. What is finished is not done again.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain import metrics_log, study_losses
from pretrain.errors import RecipeError
from pretrain.evaluation.units import format_length
from pretrain.recipe import load_recipe, plain, refuse_unknown_keys
from pretrain.run_dir import RunDir, read_json, write_json
from pretrain.side_by_side import run_all, visible_gpus
from pretrain.signals import STOPPED
from recipes import RECIPES_DIR


@dataclass
class Variant:
    """One row of the table. overrides: of the base recipe. of: instead of training, evaluate what that variant has
    trained. evaluate: options added to every evaluation's command line.
    """

    name: str = "???"
    about: str = ""
    overrides: list[str] = field(default_factory=list)
    of: str | None = None
    evaluate: str = ""


@dataclass
class Study:
    """A study file. evaluations: by name, the words after ``hsa eval`` with {run} where the checkpoint belongs."""

    name: str = "???"
    base: str = "???"
    overrides: list[str] = field(default_factory=list)
    evaluations: dict[str, str] = field(default_factory=dict)
    variants: list[Variant] = field(default_factory=list)

    def variant(self, name: str) -> Variant:
        """The variant of that name; RecipeError names those there are."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        there = ", ".join(variant.name for variant in self.variants)
        raise RecipeError(f"no variant {name!r} in study {self.name}: there are {there}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hsa study`."""
    parser.add_argument("study", help="a study file, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe values to change in all variants")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of all runs (default: runs/study-NAME)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these variants: one GPU's or one job's share")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="variants at a time, spread over the GPUs")
    parser.add_argument("--table", action="store_true", help="only collect what is there into study.json and study.md")


def main(args: argparse.Namespace) -> int:
    """Run `hsa study`; RecipeError for a study that cannot work, before anything starts."""
    study = load_study(args.study, args.overrides)
    folder = args.out or Path("runs") / f"study-{study.name}"
    chosen = [study.variant(name) for name in args.only] if args.only else study.variants
    names = [variant.name for variant in chosen]
    if args.jobs < 1:
        raise RecipeError(f"--jobs must be at least 1, not {args.jobs}")
    statuses = dict.fromkeys(names, 0) if args.table else _run(study, chosen, folder, args.jobs)
    left = [name for name in names if statuses.get(name, STOPPED) == STOPPED]  # in part, or not begun
    if left:
        print(
            f"hsa: study {study.name} stopped before the end of {', '.join(left)}; the same command goes on", flush=True
        )
        return STOPPED
    failed = [name for name, status in statuses.items() if status]
    rows = collect(study, folder)
    folder.mkdir(parents=True, exist_ok=True)
    losses = study_losses.compare(_logs(study, folder))
    value = {"study": study.name, "base": study.base, "variants": rows, "training_losses": losses}
    write_json(folder / "study.json", value)
    text = table(rows, list(study.evaluations))
    (folder / "study.md").write_text(text + "\n")
    (folder / "losses.md").write_text(study_losses.table(losses) + "\n")
    print(f"{text}\n{folder / 'study.json'}", flush=True)
    if failed:
        print(f"hsa: {len(failed)} of {len(chosen)} variants failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


# ------------------------------------------------------------------------------------------------------------------
# reading


def load_study(where: str, overrides: Sequence[str] = ()) -> Study:
    """Read and check a study file, every variant's recipe included. overrides come before those of the variants."""
    path = Path(where)
    if not path.is_file():
        path = RECIPES_DIR / "study" / f"{where}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in (RECIPES_DIR / "study").glob("*.yaml")))
        raise RecipeError(f"no study {where!r}: there is no such file, and the studies shipped are {shipped}")
    try:
        raw = plain(OmegaConf.load(path))
        refuse_unknown_keys(raw, Study, "", str(path))
        study = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Study), raw))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, TypeError) as error:
        raise RecipeError(f"{path}: not a readable study: {str(error).splitlines()[0]}") from None
    assert isinstance(study, Study)
    study.overrides += overrides
    names = [variant.name for variant in study.variants]
    if not names or len(set(names)) < len(names):
        raise RecipeError(f"{path}: variants: each needs a name of its own, and there must be one at least")
    for variant in study.variants:
        try:
            if variant.of is not None and (study.variant(variant.of).of is not None or variant.overrides):
                raise RecipeError("`of` names a variant that is trained, and goes without overrides")
            load_recipe(study.base, [*study.overrides, *variant.overrides])
        except RecipeError as error:
            raise RecipeError(f"{path}: variant {variant.name}: {error}") from None
    return study


# -----------------------------------------------------------------------------------------------------------------
# running


def _log(folder: Path, variant: Variant) -> Path:
    return folder / "logs" / f"{variant.name}.log"


def _run(study: Study, chosen: Sequence[Variant], folder: Path, jobs: int) -> dict[str, int]:
    """Run variants, ``jobs`` at a time; exit statuses by name. One at a time has all GPUs to itself."""

    def run(name: str, gpu: str | None) -> int:
        return run_variant(study, study.variant(name), folder, gpu)

    after = {variant.name: variant.of for variant in chosen if variant.of}
    gpus = visible_gpus() if jobs > 1 else []
    return run_all([variant.name for variant in chosen], run, jobs=jobs, gpus=gpus, after=after)


def run_variant(study: Study, variant: Variant, folder: Path, gpu: str | None = None) -> int:
    """Train and evaluate what is not done yet, on ``gpu`` alone if one is named; the exit status of the first command
    that failed, else 0."""
    run = folder / (variant.of or variant.name)
    _log(folder, variant).parent.mkdir(parents=True, exist_ok=True)
    if not _finished(run):
        if variant.of is not None:
            print(f"{variant.name}: {variant.of} is not trained yet: run that variant first", flush=True)
            return 1
        training = ["train", study.base, *study.overrides, *variant.overrides, "--run-dir", run]
        if status := _hsa(training, folder, variant, gpu):
            return status
    for name, words in study.evaluations.items():
        if not (folder / variant.name / "eval" / f"{name}.json").is_file():
            command = [word.format(run=run) for word in shlex.split(words)] + shlex.split(variant.evaluate)
            target = ["--out", folder / variant.name / "eval", "--name", name]
            if status := _hsa(["eval", *command, *target], folder, variant, gpu):
                return status
    return 0


def _logs(study: Study, folder: Path) -> dict[str, Path]:
    """The step logs of the variants that were trained, to the end or in part."""
    paths = {v.name: RunDir(folder / v.name).metrics_path for v in study.variants if v.of is None}
    return {name: path for name, path in paths.items() if path.is_file()}


def _finished(run: Path) -> bool:
    directory = RunDir(run)
    return directory.exists() and bool(directory.read_run().get("finished"))


def _hsa(words: Sequence[object], folder: Path, variant: Variant, gpu: str | None) -> int:
    """One `hsa` command, its output at the end of the variant's log; its exit status."""
    command = [sys.executable, "-m", "pretrain", *map(str, words)]
    print(f"{variant.name}: hsa {shlex.join(command[3:])}" + (f" (GPU {gpu})" if gpu else ""), flush=True)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu} if gpu else None
    with _log(folder, variant).open("a") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    if status not in (0, STOPPED):
        print(f"{variant.name}: failed with status {status}, see {_log(folder, variant)}", flush=True)
    return status


# ------------------------------------------------------------------------------------------------------------------
# collecting


def collect(study: Study, folder: Path) -> list[dict[str, Any]]:
    """What is finished of every variant: training speed, accuracy by evaluation and length, held-out loss."""
    rows = []
    for variant in study.variants:
        row: dict[str, Any] = {"name": variant.name, "about": variant.about, "overrides": variant.overrides}
        run = folder / (variant.of or variant.name)
        row["trained"] = _finished(run)
        if row["trained"]:
            row["tokens"], row["tokens_per_second"] = _speed(run)
        for name in study.evaluations:
            path = folder / variant.name / "eval" / f"{name}.json"
            if path.is_file():
                row[name] = _result(read_json(path))
        rows.append(row)
    return rows


def _speed(run: Path) -> tuple[int, float]:
    """Tokens trained on, and tokens per second of the whole training without its pauses."""
    records = list(metrics_log.read(RunDir(run).metrics_path))
    return records[-1]["tokens"], records[-1]["tokens"] / sum(record["step_seconds"] for record in records)


def _result(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one evaluation that the table shows, by task and length; of ``ppl`` nats per token by context."""
    if result["evaluation"] == "ppl":
        return {"loss": {str(c["context"]): {k: c[k] for k in ("nll", "low", "high")} for c in result["contexts"]}}
    tasks = result.get("tasks") or {result["task"]: result}
    keys = ("n", "correct", "accuracy", "low", "high")
    return {
        task: {str(cell["length"]): {k: cell[k] for k in keys} for cell in value["lengths"]}
        for task, value in tasks.items()
    }


def table(rows: list[dict[str, Any]], evaluations: Sequence[str]) -> str:
    """Markdown: a row per variant, a column per task and length (exact answers in %, 95 % interval) or context."""
    columns: dict[tuple[str, str, str], None] = {}
    for name in evaluations:
        for row in rows:
            for task, cells in row.get(name, {}).items():
                columns.update(dict.fromkeys((name, task, length) for length in cells))
    head = [
        "variant",
        "what",
        *(f"{name} {task} {format_length(int(length))}" for name, task, length in columns),
        "tokens/s",
    ]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [_cell(row.get(name, {}).get(task, {}).get(length)) for name, task, length in columns]
        speed = row.get("tokens_per_second")
        lines.append([row["name"], row["about"], *cells, f"{speed:,.0f}" if speed else ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(cell: dict[str, float] | None) -> str:
    if cell is None:
        return ""
    if "nll" in cell:
        return f"{cell['nll']:.3f} ± {(cell['high'] - cell['low']) / 2:.3f}"
    return f"{100 * cell['accuracy']:.0f} [{100 * cell['low']:.0f}-{100 * cell['high']:.0f}]"
