"""The jobs of a run: what `hsa submit` records in RUN/slurm/jobs.json, and what Slurm says about them.

jobs.json holds one object per submitted chain, oldest first::

    [{"submitted": "2026-11-24T14:00:00+00:00",
      "jobs": [{"stage": "warmup", "job_id": 41, "script": "RUN/slurm/01-warmup.sbatch"}, ...]}, ...]
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from slurm.errors import SlurmError


@dataclass(frozen=True)
class Job:
    """One submitted stage."""

    stage: str
    job_id: int
    script: str


@dataclass(frozen=True)
class Chain:
    """The jobs of one `hsa submit`, in the order of the stages; `submitted` is ISO 8601, UTC."""

    submitted: str
    jobs: list[Job]


def jobs_file(run_dir: Path) -> Path:
    """Where a run directory keeps its chains."""
    return run_dir / "slurm" / "jobs.json"


def read_chains(run_dir: Path) -> list[Chain]:
    """The chains of a run, oldest first; empty when it was never submitted. Raises SlurmError for a damaged file."""
    path = jobs_file(run_dir)
    try:
        entries = json.loads(path.read_text())
        return [Chain(entry["submitted"], [Job(**job) for job in entry["jobs"]]) for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SlurmError(
            f"cannot read {path} ({error}): move it away, it only tells `hsa status` the job ids"
        ) from error


def record_chain(run_dir: Path, jobs: list[Job]) -> None:
    """Append a chain to jobs.json, which is replaced whole."""
    chains = [*read_chains(run_dir), Chain(datetime.now(UTC).isoformat(timespec="seconds"), jobs)]
    path = jobs_file(run_dir)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps([asdict(chain) for chain in chains], indent=1) + "\n")
    aside.replace(path)


def queue_states(job_ids: Iterable[int]) -> dict[int, str]:
    """State of each job that the queue still holds, such as "RUNNING" or "PENDING (Dependency)".

    Jobs that have left the queue are missing; without Slurm, or when it does not answer in 10 s, the result is empty.
    """
    wanted = sorted(set(job_ids))
    if not wanted or shutil.which("squeue") is None:
        return {}
    ids = ",".join(map(str, wanted))
    try:
        asked = subprocess.run(
            ["squeue", "--noheader", "--jobs", ids, "--states", "all", "--format", "%i|%T|%r"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return {}
    # Of a list, squeue leaves out the ids that it has forgotten; a single one is an error, with no line to read either.
    states = {}
    for line in asked.stdout.splitlines():
        job_id, state, reason = line.split("|")
        states[int(job_id)] = f"{state} ({reason})" if state == "PENDING" else state
    return states


def active_jobs(run_dir: Path) -> list[int]:
    """Ids of the run's jobs that are waiting or running."""
    ids = [job.job_id for chain in read_chains(run_dir) for job in chain.jobs]
    live = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED")
    return [job_id for job_id, state in queue_states(ids).items() if state.startswith(live)]
