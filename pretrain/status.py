"""``hsa status RUN_DIR``: where a training stands, from the files of its run directory alone.

Works while it trains, between two jobs, after the end; reads only (but for ``--send``).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

from pretrain import metrics_log
from pretrain.console import short_count, short_time
from pretrain.errors import RunDirError
from pretrain.run_dir import RunDir

_ETA_STEPS = 32
EPILOG = """example:
  hsa status runs/demo
  hsa status runs/demo --json | python -c 'import json, sys; print(json.load(sys.stdin)["step"])'"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``hsa status``."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run_dir", help="run directory, e.g. runs/demo")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--send", action="store_true", help="first send MLflow what it has not got of a stopped run")


def main(args: argparse.Namespace) -> int:
    """Print the status; RunDirError (exit status 2) when it is no run directory or a damaged one."""
    run_dir = RunDir(args.run_dir)
    if args.send:
        from pretrain.tracking import send_rest

        run_dir.read_run()
        if not send_rest(run_dir):
            return 1
    status = collect(run_dir)
    print(json.dumps(status, indent=2) if args.json else render(status))
    return 0


def collect(run_dir: RunDir) -> dict[str, Any]:
    """The status as the object that ``--json`` prints.

    Always there: ``name, stage, step, tokens, finished, last_checkpoint, eta_seconds``. ``stage`` is ``null`` before
    the first step, ``last_checkpoint`` (its directory's name) before the first one, ``eta_seconds`` while unknown.
    ``state`` is running, stopped or finished. ``goodput`` is the time of the steps that counted, divided by the wall
    time since the run was made: waiting in a queue, starting, saving, and steps done twice are lost time.
    """
    if not run_dir.path.is_dir():
        raise RunDirError(f"there is no run directory {run_dir.path}")
    run = run_dir.read_run()
    finished = bool(run.get("finished"))
    productive, last = 0.0, None
    recent: list[float] = []
    skipped: list[tuple[str, int]] = []
    for record in metrics_log.read(run_dir.metrics_path):
        if missing := [key for key in metrics_log.REQUIRED if key not in record]:
            raise RunDirError(f"{run_dir.metrics_path} is damaged at step {record['step']}: no {', '.join(missing)}")
        productive += record["step_seconds"]
        recent = [*recent[-_ETA_STEPS + 1 :], record["step_seconds"]]
        skipped = record.get("skipped", skipped)
        last = record
    jobs = _jobs(run_dir)
    writer = run_dir.writer()
    running = writer is not None or any(job.get("state") == "RUNNING" for job in jobs)
    step = last["step"] if last else 0
    total = (run.get("plan") or {}).get("total_steps")
    eta = 0.0 if finished else None
    if not finished and recent and total is not None:
        eta = max(0, total - step) * statistics.median(recent)
    end = _modified(run_dir.metrics_path) if finished else time.time()
    created = run.get("created")
    wall = max(end - created, 1e-9) if created and end else None
    from pretrain.tracking import unsent

    return {
        "name": run.get("name", run_dir.name),
        "stage": last["stage"] if last else None,
        "step": step,
        "tokens": last["tokens"] if last else 0,
        "finished": finished,
        "last_checkpoint": _last_checkpoint(run_dir),
        "eta_seconds": eta,
        "state": "finished" if finished else "running" if running else "stopped",
        "writer": writer,
        "total_steps": total,
        "loss": last["loss"] if last and math.isfinite(last["loss"]) else None,
        "tokens_per_second": _speed(run_dir, last),
        "goodput": min(1.0, productive / wall) if wall else None,
        "restarts": max(0, len(run.get("starts", [])) - 1),
        "changes": len(run.get("changes", [])),
        "stages": (run.get("plan") or {}).get("stages", []),
        "jobs": jobs,
        "mlflow": run.get("mlflow") or None,
        "unsent_steps": unsent(run_dir),
        "skipped": dict(skipped),
    }


def render(status: dict[str, Any]) -> str:
    """The status as text for people."""
    total = status["total_steps"]
    share = f" of {total} ({100 * status['step'] / total:.0f}%)" if total else ""
    loss = f", loss {status['loss']:.4f}" if status["loss"] is not None else ""
    speed = f", {short_count(status['tokens_per_second'])} tok/s" if status["tokens_per_second"] else ""
    goodput = status["goodput"]
    state = status["state"] + (f" ({status['writer']})" if status["writer"] else "")
    rows = [
        ("run", f"{status['name']}: {state}"),
        ("stage", f"{status['stage'] or 'none yet'}{_stage_span(status)}"),
        ("step", f"{status['step']}{share}{loss}"),
        ("tokens", f"{status['tokens']:,}{speed}"),
        ("checkpoint", status["last_checkpoint"] or "none yet"),
        ("ETA", "done" if status["finished"] else _eta(status)),
        ("goodput", "unknown" if goodput is None else f"{100 * goodput:.1f}% of the time since it began"),
        ("restarts", f"{status['restarts']}" + (f", {status['changes']} recipe changes" if status["changes"] else "")),
    ]
    for file, count in status["skipped"].items():
        rows.append(("skipped", f"{count} documents of {file} that could not be read"))
    for job in status["jobs"]:
        rows.append(("job", f"{job['id']} {job['stage']}: {job['state'] or 'not in the queue'}"))
    if status["mlflow"] and status["mlflow"].get("run_id"):
        rows.append(("MLflow", f"run {status['mlflow']['run_id']} in {status['mlflow']['uri']}"))
    if status["unsent_steps"] and status["state"] != "running":
        rows.append(("unsent", f"{status['unsent_steps']} steps are not in MLflow yet: add --send, or go on training"))
    return "\n".join(f"{label:<11}{text}" for label, text in rows)


def _eta(status: dict[str, Any]) -> str:
    if status["eta_seconds"] is None:
        return "unknown"
    left = short_time(status["eta_seconds"])
    return left if status["state"] == "running" else f"{left} of training left"


def _stage_span(status: dict[str, Any]) -> str:
    for number, stage in enumerate(status["stages"], 1):
        if stage.get("name") == status["stage"]:
            last = stage.get("last_step")
            return f" ({number} of {len(status['stages'])}" + (f", to step {last})" if last else ")")
    return ""


def _last_checkpoint(run_dir: RunDir) -> str | None:
    """Name of the directory that ``latest`` points to; RunDirError when it points to nothing."""
    latest = run_dir.latest_path
    if latest.is_symlink():
        name = Path(latest.readlink()).name
    elif latest.is_file():
        name = latest.read_text(encoding="utf-8").strip()
    else:
        return None
    if not name or not (run_dir.checkpoints / name).is_dir():
        raise RunDirError(
            f"{latest} points to {name or 'nothing'!r}, which is not there; put the name of a step_ directory into it"
        )
    return name


def _speed(run_dir: RunDir, last: dict[str, Any] | None) -> float | None:
    """Tokens per second over the last steps."""
    if last is None:
        return None
    records = list(metrics_log.read(run_dir.metrics_path, after=max(0, last["step"] - _ETA_STEPS)))
    seconds = sum(record["step_seconds"] for record in records[1:])
    return (records[-1]["tokens"] - records[0]["tokens"]) / seconds if seconds > 0 else None


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _jobs(run_dir: RunDir) -> list[dict[str, Any]]:
    """The submitted jobs, oldest first, with their state where Slurm is there and still knows them."""
    from slurm.jobs import queue_states, read_chains

    jobs = [job for chain in read_chains(run_dir.path) for job in chain.jobs]
    states = queue_states(job.job_id for job in jobs)
    return [{"id": job.job_id, "stage": job.stage, "state": states.get(job.job_id)} for job in jobs]
