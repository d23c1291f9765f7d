"""The whole way on a real cluster: the demo recipe is submitted on two nodes, hits its time limit, comes back, and ends
with the losses of a run that nothing interrupted."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slurm.jobs import read_chains
from tests.slurm.cluster import ENDED, SlurmCluster, started

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = ("books", "essays", "bible", "docs", "code-doc")
# The demo's model, data stream and three stages with far fewer steps: 80, 4 and 4. Made-up words cost more tokens than
# English, so the first context is longer than the demo's.
RECIPE = [
    "demo",
    *("stages.warmup.context=128", "stages.warmup.batch=16", "stages.warmup.until={tokens: 163840}"),
    *("stages.pretrain.context=256", "stages.pretrain.batch=8", "stages.pretrain.until={tokens: 8192}"),
    *("stages.long.context=512", "stages.long.batch=8", "stages.long.until={tokens: 16384}"),
    "checkpoint.every_steps=null",
    "tracking.mlflow.uri=none",
]
# Slurm 22.05 looks at time limits every 30 s from the controller's start on, and sends the signal up to 30 s early.
CHECK_SECONDS = 30


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Shards of made-up words in the demo's domains."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnoprstuw", k=draw.randint(2, 8))) for _ in range(400)]
    text = tmp_path / "data/demo/text"
    text.mkdir(parents=True)
    for domain in DOMAINS:
        documents = [" ".join(draw.choices(words, k=1500)) + ".\n" for _ in range(20)]
        lines = [json.dumps({"text": document, "domain": domain}) for document in documents]
        (text / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")
    hsa(
        "data", "tokenize", str(text), "--out", str(tmp_path / "data/demo/shards"), "--tokenizer", "bpe:1024", "--quiet"
    )
    return tmp_path / "data"


@pytest.fixture
def fresh_cluster(tmp_path: Path) -> Iterator[SlurmCluster]:
    """A cluster of its own, because the test counts the seconds since its start."""
    with started(tmp_path / "slurm") as cluster:
        yield cluster


def hsa(*arguments: str, environment: dict[str, str] | None = None, launcher: list[str] | None = None) -> str:
    """Run a command of the checkout; its standard output."""
    # One thread: the order of floating-point sums must not depend on how many cores a launcher leaves to a rank.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**(environment or os.environ), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(launcher or []), "-m", "pretrain", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def steps(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of every step, without what a clock measured."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    clocks = ("step_seconds", "data_wait_seconds", "time")
    return [{name: value for name, value in record.items() if name not in clocks} for record in records]


def test_interrupted_demo_equals_an_unbroken_run(tmp_path: Path, data: Path, fresh_cluster: SlurmCluster) -> None:
    cluster, start = fresh_cluster, time.monotonic()
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    environment = {**cluster.environment, "HSA_DATA": str(data)}
    settings = [
        "slurm.nodes=2",
        "slurm.gpus_per_node=0",
        "slurm.time=0:02:00",
        "slurm.signal_seconds=100",
        "stages.pretrain.slurm={time: '0:10:00'}",
        "stages.long.slurm={time: '0:10:00'}",
    ]
    cluster.run("scontrol", "update", "PartitionName=train", "State=DOWN")
    printed = hsa("submit", *RECIPE, *settings, "--run-dir", str(broken), environment=environment)
    (chain,) = read_chains(broken)
    assert [job.stage for job in chain.jobs] == ["warmup", "pretrain", "long"]
    assert all(f"job {job.job_id}  {job.stage}" in printed for job in chain.jobs)
    logs = [Path(job.script).with_suffix(f".{job.job_id}.log") for job in chain.jobs]
    first = chain.jobs[0].job_id
    # The first job starts a few seconds before a look at the limit, so that this falls into training at any speed.
    time.sleep((0.75 * CHECK_SECONDS - (time.monotonic() - start)) % CHECK_SECONDS)
    cluster.run("scontrol", "update", "PartitionName=train", "State=UP")

    def requeued() -> bool:
        job = cluster.job(first)
        assert job["JobState"] not in ENDED, logs[0].read_text()
        return job["Restarts"] == "1"

    cluster.wait_for(requeued, 120, "the time limit to requeue the warm-up")
    # Once is enough: the second attempt gets the time it needs.
    cluster.run("scontrol", "update", f"JobId={first}", "TimeLimit=30")
    for job, log in zip(chain.jobs, logs, strict=True):
        assert cluster.wait_until_ended(job.job_id, 300) == "COMPLETED", log.read_text()
    text = logs[0].read_text()
    assert "USR1: training is asked to save and stop" in text
    assert "resumed at step" in text
    assert [cluster.job(job.job_id)["Restarts"] for job in chain.jobs] == ["1", "0", "0"]

    two_ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    hsa(
        "train",
        *RECIPE,
        "--run-dir",
        str(unbroken),
        environment={**os.environ, "HSA_DATA": str(data)},
        launcher=two_ranks,
    )
    assert steps(broken) == steps(unbroken)
    assert [record["step"] for record in steps(broken)] == list(range(1, 89))

    status = json.loads(hsa("status", str(broken), "--json", environment=environment))
    assert (status["finished"], status["step"], status["name"]) == (True, 88, "demo")
    assert [(job["id"], job["stage"], job["state"]) for job in status["jobs"]] == [
        (job.job_id, job.stage, "COMPLETED") for job in chain.jobs
    ]
