"""Batch scripts: one per stage, a head made here and the fixed body of templates/stage.sh."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from slurm.config import SlurmConfig
from slurm.errors import SlurmError

# Restarts in a row that may begin from one and the same checkpoint.
MAX_RESTARTS_WITHOUT_PROGRESS = 3


@dataclass(frozen=True)
class StageJob:
    """One job of the chain: stage `stage`, number `index` of `count` (from 1), of the run `run`.

    `command` trains up to the end of the stage; it is run by one task per rank, in `work_dir`.
    """

    run: str
    stage: str
    index: int
    count: int
    slurm: SlurmConfig
    command: tuple[str, ...]
    run_dir: Path
    work_dir: Path

    def __post_init__(self) -> None:
        # Both go into file names, job names and #SBATCH lines.
        for what, name in (("the run", self.run), ("a stage", self.stage)):
            if not re.fullmatch(r"[\w.+-]+", name):
                raise SlurmError(f'{what} is called "{name}": a Slurm job needs letters, digits and . _ + - only')
        for path in (self.run_dir, self.work_dir):
            if re.search(r"[\n\"'\\]", str(path)):
                raise SlurmError(
                    f"the path {path} holds a quote, a backslash or a line break, which sbatch cannot read"
                )

    @property
    def script(self) -> Path:
        """Where the script lies."""
        return self.run_dir / "slurm" / f"{self.index:02d}-{self.stage}.sbatch"


def render(job: StageJob) -> str:
    """The batch script of a stage."""
    body = resources.files("slurm").joinpath("templates/stage.sh").read_text()
    return "\n".join([*_head(job), "", *_settings(job), "", body])


def sbatch_command(job: StageJob, after: str | None = None) -> list[str]:
    """The command that submits a stage; `after` is the job id of the stage before it."""
    command = ["sbatch", "--parsable"]
    if after is not None:
        # A stage whose predecessor failed can never run: Slurm drops it instead of keeping it in the queue for ever.
        command += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    return [*command, str(job.script)]


def _head(job: StageJob) -> list[str]:
    slurm = job.slurm
    options: list[tuple[str, object]] = [
        ("job-name", f"{job.run}.{job.stage}"),
        ("nodes", slurm.nodes),
        ("ntasks-per-node", slurm.tasks_per_node),
        ("gpus-per-node", slurm.gpus_per_node or None),
        ("cpus-per-task", slurm.cpus_per_task),
        ("time", slurm.time),
        ("partition", slurm.partition),
        ("account", slurm.account),
        ("qos", slurm.qos),
        ("chdir", _sbatch_quote(str(job.work_dir))),
        # %j is the job id; a percent sign of the path itself is doubled.
        ("output", _sbatch_quote(str(job.run_dir / "slurm").replace("%", "%%") + f"/{job.script.stem}.%j.log")),
        ("open-mode", "append"),
        ("signal", f"B:USR1@{slurm.signal_seconds}"),
    ]
    flags = ["--requeue", *(["--exclusive"] if slurm.exclusive else []), *slurm.sbatch]
    return [
        "#!/bin/bash",
        f'# Stage {job.index} of {job.count}, "{job.stage}", of the run {job.run}. Written by `hsa submit`.',
        *(f"#SBATCH --{name}={value}" for name, value in options if value is not None),
        *(f"#SBATCH {flag}" for flag in flags),
    ]


def _settings(job: StageJob) -> list[str]:
    # srun does not inherit --cpus-per-task from sbatch (Slurm 22.05 and later).
    srun = [f"--cpus-per-task={job.slurm.cpus_per_task}"] if job.slurm.cpus_per_task else []
    return [
        f"run_dir={shlex.quote(str(job.run_dir))}",
        f"max_restarts_without_progress={MAX_RESTARTS_WITHOUT_PROGRESS}",
        f"srun_options=({shlex.join(srun)})",
        "command=(",
        *(f"    {line}" for line in _wrapped(job.command)),
        ")",
        "setup() { # slurm.setup of the recipe",
        *(job.slurm.setup or ["    :"]),
        "}",
    ]


def _wrapped(command: tuple[str, ...], width: int = 100) -> list[str]:
    """The command's quoted words on lines of about `width` characters."""
    lines = [""]
    for word in map(shlex.quote, command):
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _sbatch_quote(value: str) -> str:
    """Quoted for an #SBATCH line, where a blank would end the value and # begin a comment."""
    return value if re.fullmatch(r"[\w./:%+,=@-]+", value) else f'"{value}"'
