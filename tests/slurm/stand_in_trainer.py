"""Stands in for `python -m pretrain` in the tests of the job scripts: it counts steps instead of training.

`stand_in_trainer.py train PLAN.json --run-dir DIR --until-stage NAME`, with PLAN.json::

    {"stages": {"warmup": 5, "pretrain": 10},       steps of each stage
     "fail_in": "pretrain",                         optional: die with status 3 in this stage
     "endless_until_signal": "warmup"}              optional: this stage goes on until USR1 has come once

It keeps the trainer's contract with the script: RUN/checkpoints/latest names the last checkpoint, USR1 means save,
leave RUN/slurm/requeue.<jobid> and exit with 75, and a finished stage exits 0 and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

STEP_SECONDS = 0.1


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    parser.add_argument("plan", type=Path)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--until-stage")
    args = parser.parse_args()
    stop: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: stop.append(number))
    try:
        return train(json.loads(args.plan.read_text()), args.run_dir, args.until_stage, stop)
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def train(plan: dict, run_dir: Path, until_stage: str, stop: list[int]) -> int:
    rank = int(os.environ["SLURM_PROCID"])
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    latest = run_dir / "checkpoints/latest"
    marker = run_dir / f"slurm/requeue.{os.environ['SLURM_JOB_ID']}"
    signalled = run_dir / "signalled"
    ranks = run_dir / "ranks"
    ranks.mkdir(exist_ok=True)
    (ranks / f"{os.environ['SLURM_JOB_ID']}.{restart}.{rank}").write_text(
        json.dumps(
            {name: value for name, value in os.environ.items() if name.startswith(("SLURM", "MASTER_", "CUDA_"))}
        )
    )
    # Steps up to the end of this stage; every rank reads them before rank 0 moves on.
    end = 0
    for stage, steps in plan["stages"].items():
        end += steps
        if stage == until_stage:
            break
    step = int(latest.read_text().removeprefix("step_")) if latest.exists() else 0
    endless = plan.get("endless_until_signal") == until_stage and not signalled.exists()
    while step < end or endless:
        time.sleep(STEP_SECONDS)
        step += 1
        if rank == 0:
            with (run_dir / "metrics.jsonl").open("a") as metrics:
                metrics.write(json.dumps({"step": step, "stage": until_stage, "restart": restart}) + "\n")
            latest.parent.mkdir(exist_ok=True)
            aside = latest.with_name("aside")
            aside.write_text(f"step_{step}")
            aside.replace(latest)
        if plan.get("fail_in") == until_stage:
            return 3
        if stop:
            if rank == 0:
                signalled.touch()
                marker.touch()
            # No rank may leave before the checkpoint and the marker are whole: Slurm ends the others at once.
            while not marker.exists():
                time.sleep(0.05)
            return 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
