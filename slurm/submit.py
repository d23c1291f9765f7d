"""`hsa submit`: render one batch script per stage and submit them as a chain."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from slurm.config import SlurmConfig, stage_slurm
from slurm.errors import SlurmError
from slurm.jobs import Job, active_jobs, record_chain
from slurm.render import StageJob, render, sbatch_command

EXAMPLE = """\
examples:
  hsa submit 8b-a1b --dry-run
  hsa submit 8b-a1b slurm.partition=h100 slurm.nodes=16 --run-dir /scratch/runs/8b

Each stage becomes one job that starts after the stage before it. A job that nears its time limit saves, is requeued and
goes on. `hsa status RUN_DIR` shows the jobs; docs/cluster.md tells the rest.
"""


class Stage(Protocol):
    """What this room reads of a recipe's stage: its name and its own Slurm settings."""

    name: str

    @property
    def slurm(self) -> Mapping[str, Any]: ...


class Recipe(Protocol):
    """What this room reads of a recipe."""

    name: str
    slurm: SlurmConfig

    @property
    def stages(self) -> Sequence[Stage]: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hsa submit`."""
    from pretrain.run_dir import add_allow_change

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe's name in recipes/, or the path of a YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="recipe keys to change")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="seen by every node (default runs/NAME)")
    add_allow_change(parser)
    parser.add_argument("--dry-run", action="store_true", help="only print; needs neither data nor Slurm")


def main(args: argparse.Namespace) -> int:
    """Submit the chain, or print it. Returns 0; SlurmError, RecipeError or RunDirError for the user's mistakes."""
    from pretrain.recipe import load_recipe
    from pretrain.run_dir import RunDir, check_resume

    loaded = load_recipe(args.recipe, args.overrides)
    recipe = loaded.recipe
    jobs = stage_jobs(
        recipe,
        args.recipe,
        args.overrides,
        run_dir=args.run_dir or Path("runs") / recipe.name,
        allow_change=args.allow_change,
    )
    warnings = list(loaded.warnings)
    try:
        check_ranks(recipe, jobs)
    except ValueError as error:
        if not args.dry_run:
            raise
        warnings.append(str(error))
    for warning in warnings:
        print(f"hsa: warning: {warning}", file=sys.stderr)
    if args.dry_run:
        print(dry_run(jobs), end="")
        return 0
    run = RunDir(jobs[0].run_dir)
    if run.exists():
        check_resume(run.read_recipe(), loaded.frozen, args.allow_change)
    submitted = submit_chain(jobs)
    for job in submitted:
        print(f"job {job.job_id}  {job.stage}  {job.script}")
    print(f"follow it with `hsa status {shlex.quote(str(jobs[0].run_dir))}`")
    return 0


def stage_jobs(
    recipe: Recipe,
    recipe_argument: str,
    overrides: Sequence[str],
    *,
    run_dir: Path,
    work_dir: Path | None = None,
    allow_change: Sequence[str] = (),
    program: Sequence[str] = (sys.executable, "-m", "pretrain"),
) -> list[StageJob]:
    """The jobs of a recipe, one per stage.

    `recipe_argument`, `overrides` and `allow_change` are handed to `hsa train` as they were given. Jobs run in
    `work_dir` (the current directory), so that relative paths of the recipe mean the same there.
    """
    work_dir = (work_dir or Path.cwd()).resolve()
    run_dir = work_dir / run_dir
    recipe_path = work_dir / recipe_argument
    recipe_word = str(recipe_path) if recipe_path.is_file() else recipe_argument
    names = [stage.name for stage in recipe.stages]
    jobs = []
    for index, stage in enumerate(recipe.stages):
        if names.count(stage.name) > 1:
            raise SlurmError(f'two stages are called "{stage.name}": each job trains up to one of that name')
        where = f"stages[{index}].slurm" if stage.slurm else "slurm"
        train = ["train", recipe_word, *overrides, "--run-dir", str(run_dir), "--until-stage", stage.name]
        if allow_change:
            train += ["--allow-change", *allow_change]
        jobs.append(
            StageJob(
                run=recipe.name,
                stage=stage.name,
                index=index + 1,
                count=len(names),
                slurm=stage_slurm(recipe.slurm, stage.slurm, where=where),
                command=(*program, *train),
                run_dir=run_dir,
                work_dir=work_dir,
            )
        )
    return jobs


def check_ranks(recipe: Any, jobs: Sequence[StageJob]) -> None:
    """Refuse now what the trainer would refuse after days in the queue: ranks that the recipe cannot be split over.

    Raises TopologyError or RecipeError (both ValueError) that names the stage.
    """
    from pretrain.topology import check_stage

    for job, stage in zip(jobs, recipe.stages, strict=True):
        where = f"{job.slurm.nodes} nodes x {job.slurm.tasks_per_node} ranks"
        check_stage(recipe, stage, job.slurm.world_size, where)


def dry_run(jobs: Sequence[StageJob]) -> str:
    """Every script with the sbatch command that would submit it; shell variables stand for the job ids."""
    parts = []
    for job in jobs:
        after = f"$job{job.index - 1}" if job.index > 1 else None
        words = [word if word.startswith("--dependency") else shlex.quote(word) for word in sbatch_command(job, after)]
        parts.append(f"# ==== {job.script}\n{render(job)}\n# ==== submitted by\njob{job.index}=$({' '.join(words)})\n")
    return "\n".join(parts)


def submit_chain(jobs: Sequence[StageJob]) -> list[Job]:
    """Write the scripts, submit each after the one before it, and record the job ids in RUN/slurm/jobs.json.

    All or nothing: when Slurm refuses a stage, the ones before it are cancelled and the scripts removed.
    """
    run_dir = jobs[0].run_dir
    for program in ("sbatch", "scancel"):
        if shutil.which(program) is None:
            raise SlurmError(
                f"{program} is not on PATH: call `hsa submit` on a login node of the cluster, or add --dry-run"
            )
    if running := active_jobs(run_dir):
        raise SlurmError(
            f"{run_dir} already has jobs in the queue: cancel them with `scancel {_listed(running, ' ')}`, or choose "
            "another --run-dir"
        )
    submitted: list[Job] = []
    with _scripts(jobs):
        try:
            for job in jobs:
                after = str(submitted[-1].job_id) if submitted else None
                submitted.append(Job(job.stage, _sbatch(job, after), str(job.script)))
            record_chain(run_dir, submitted)
        except BaseException as error:
            # An interrupt must not leave half a chain either.
            note = _cancel([job.job_id for job in submitted])
            if isinstance(error, SlurmError):
                raise SlurmError(f"{error}; {note}") from error
            raise
    return submitted


@contextlib.contextmanager
def _scripts(jobs: Sequence[StageJob]) -> Iterator[None]:
    """The scripts of the chain on disk, taken away again when the body fails; so are the directories made for them."""
    from pretrain.run_dir import LAYOUT, RunDir

    run_dir = jobs[0].run_dir
    folders = [*(run_dir / name for name in LAYOUT), run_dir, *run_dir.parents]
    made = [path for path in folders if not path.exists()]
    earlier = {job.script: job.script.read_text() if job.script.exists() else None for job in jobs}
    try:
        RunDir(run_dir).create()
        for job in jobs:
            job.script.write_text(render(job))
        yield
    except BaseException:
        for script, text in earlier.items():
            with contextlib.suppress(OSError):
                script.unlink() if text is None else script.write_text(text)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _sbatch(job: StageJob, after: str | None) -> int:
    """Submit one stage; its job id."""
    command = sbatch_command(job, after)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f'stage "{job.stage}": `{shlex.join(command)}` failed ({error})') from error
    # --parsable prints "id" or "id;cluster".
    first = done.stdout.strip().split(";")[0]
    if done.returncode or not first.isdigit():
        said = " ".join((done.stderr or done.stdout).split()) or f"status {done.returncode}"
        raise SlurmError(
            f'sbatch refused stage "{job.stage}" of {job.run}: {said}; see to the recipe\'s slurm section, or to what '
            "keeps this host from the cluster"
        )
    return int(first)


def _cancel(job_ids: list[int]) -> str:
    """Cancel jobs; a sentence that says what became of them."""
    if not job_ids:
        return "nothing was submitted"
    try:
        done = subprocess.run(["scancel", *map(str, job_ids)], capture_output=True, timeout=60, check=False)
        cancelled = done.returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        cancelled = False
    if cancelled:
        return f"the stages submitted before it (jobs {_listed(job_ids)}) were cancelled"
    return f"cancelling the stages before it failed too: call `scancel {_listed(job_ids, ' ')}`"


def _listed(job_ids: Sequence[int], separator: str = ", ") -> str:
    return separator.join(map(str, job_ids))
