"""The job scripts on a real one-host Slurm cluster, with a stand-in for the trainer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slurm.config import SlurmConfig
from slurm.errors import SlurmError
from slurm.jobs import Job, queue_states, read_chains
from slurm.submit import stage_jobs, submit_chain
from tests.slurm.cluster import SlurmCluster

pytestmark = pytest.mark.slurm

STAND_IN = Path(__file__).with_name("stand_in_trainer.py")


def submit(run_dir: Path, plan: dict[str, Any], **settings: Any) -> list[Job]:
    """Submit the plan's stages; `slurm_of` gives a stage settings of its own."""
    slurm_of = settings.pop("slurm_of", {})
    slurm = SlurmConfig(**{"nodes": 2, "gpus_per_node": 0, "time": "0:05:00", "signal_seconds": 60, **settings})
    recipe = SimpleNamespace(
        name="tiny",
        slurm=slurm,
        stages=[SimpleNamespace(name=name, slurm=slurm_of.get(name, {})) for name in plan["stages"]],
    )
    plan_file = run_dir.with_name("plan.json")
    plan_file.write_text(json.dumps(plan))
    program = (sys.executable, str(STAND_IN))
    return submit_chain(stage_jobs(recipe, str(plan_file), [], run_dir=run_dir, program=program))


def steps(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def log_of(run_dir: Path, job: Job) -> str:
    return Path(job.script).with_suffix(f".{job.job_id}.log").read_text()


def test_stages_run_one_after_the_other(cluster: SlurmCluster, run_dir: Path) -> None:
    slurm_of = {"pretrain": {"nodes": 1, "gpus_per_node": 4, "cpus_per_task": 2, "setup": ["export SLURM_SETUP=done"]}}
    jobs = submit(run_dir, {"stages": {"warmup": 5, "pretrain": 5}}, slurm_of=slurm_of)

    assert [chain.jobs for chain in read_chains(run_dir)] == [jobs]
    assert queue_states([jobs[1].job_id]) == {jobs[1].job_id: "PENDING (Dependency)"}
    assert [cluster.wait_until_ended(job.job_id, 60) for job in jobs] == ["COMPLETED", "COMPLETED"], log_of(
        run_dir, jobs[0]
    )

    assert [(entry["step"], entry["stage"]) for entry in steps(run_dir)] == [
        (step, "warmup" if step <= 5 else "pretrain") for step in range(1, 11)
    ]
    ranks = [json.loads(path.read_text()) for path in sorted((run_dir / "ranks").iterdir())]
    assert sorted((int(r["SLURM_JOB_ID"]), int(r["SLURM_PROCID"])) for r in ranks) == [
        *((jobs[0].job_id, rank) for rank in range(2)),
        *((jobs[1].job_id, rank) for rank in range(4)),
    ]
    first = [rank for rank in ranks if int(rank["SLURM_JOB_ID"]) == jobs[0].job_id]
    assert {rank["SLURMD_NODENAME"] for rank in first} == {"n1", "n2"}
    assert {(rank["MASTER_ADDR"], rank["MASTER_PORT"]) for rank in first} == {("n1", str(10000 + jobs[0].job_id))}
    second = [rank for rank in ranks if int(rank["SLURM_JOB_ID"]) == jobs[1].job_id]
    # Every task sees all GPUs of its node (NCCL's peer-to-peer needs that) and takes the one of its SLURM_LOCALID.
    assert {(rank["CUDA_VISIBLE_DEVICES"], rank["SLURM_CPUS_PER_TASK"]) for rank in second} == {("0,1,2,3", "2")}
    assert sorted(rank["SLURM_LOCALID"] for rank in second) == ["0", "1", "2", "3"]
    assert {rank["SLURM_SETUP"] for rank in second} == {"done"}


def test_time_limit_saves_requeues_and_goes_on(cluster: SlurmCluster, run_dir: Path) -> None:
    # Slurm sends the signal up to 60 s early, so with a limit of 2 minutes it comes within the first 20 s.
    plan = {"stages": {"warmup": 5, "pretrain": 5}, "endless_until_signal": "warmup"}
    jobs = submit(run_dir, plan, time="0:02:00", signal_seconds=100)

    assert [cluster.wait_until_ended(job.job_id, 120) for job in jobs] == ["COMPLETED", "COMPLETED"], log_of(
        run_dir, jobs[0]
    )

    assert cluster.job(jobs[0].job_id)["Restarts"] == "1"
    done = steps(run_dir)
    assert [entry["step"] for entry in done] == list(range(1, len(done) + 1))
    log = log_of(run_dir, jobs[0])
    assert "restart 0, nodes" in log and "restart 1, nodes" in log, "one log for all attempts"
    assert log.index("training is asked to save") < log.index("stopped with a checkpoint: requeued")
    assert not list((run_dir / "slurm").glob("requeue.*"))


def test_signal_by_hand_while_the_trainer_still_starts(cluster: SlurmCluster, run_dir: Path) -> None:
    # `scancel --signal=USR1 --batch` asks for a save and requeue at any time, so also before the trainer can listen.
    job, *_ = submit(run_dir, {"stages": {"warmup": 3}, "endless_until_signal": "warmup"})
    cluster.wait_for(lambda: (run_dir / f"slurm/starts.{job.job_id}").exists(), 20, "the script to start")
    cluster.run("scancel", "--signal=USR1", "--batch", str(job.job_id))

    assert cluster.wait_until_ended(job.job_id, 60) == "COMPLETED", log_of(run_dir, job)
    assert cluster.job(job.job_id)["Restarts"] == "1"


def test_failed_stage_cancels_the_rest(cluster: SlurmCluster, run_dir: Path) -> None:
    jobs = submit(run_dir, {"stages": {"warmup": 2, "pretrain": 5, "long": 5}, "fail_in": "pretrain"})

    assert [cluster.wait_until_ended(job.job_id, 60) for job in jobs] == ["COMPLETED", "FAILED", "CANCELLED"]
    # srun gives the greatest status of its tasks: 3, or 143 when the first failure ended the other task with SIGTERM.
    code = cluster.job(jobs[1].job_id)["ExitCode"]
    assert code in ("3:0", "143:0"), "the script returns srun's own status"
    assert f"training ended with status {code.removesuffix(':0')}" in log_of(run_dir, jobs[1])


@pytest.mark.parametrize("lost", ["n1", "n2"], ids=["with the script and rank 0", "with rank 1"])
def test_lost_node_requeues_on_other_nodes(cluster: SlurmCluster, run_dir: Path, lost: str) -> None:
    job, *_ = submit(run_dir, {"stages": {"warmup": 60}})
    cluster.wait_for(lambda: (run_dir / "metrics.jsonl").exists() and len(steps(run_dir)) > 5, 30, "some steps")
    assert cluster.job(job.job_id)["NodeList"] == "n[1-2]"
    cluster.lose_node(lost)
    try:
        assert cluster.wait_until_ended(job.job_id, 60) == "COMPLETED", log_of(run_dir, job)
    finally:
        cluster.restore_node(lost)

    shown = cluster.job(job.job_id)
    assert shown["Restarts"] == "1"
    assert lost not in cluster.run("scontrol", "show", "hostnames", shown["NodeList"]).stdout.split()
    done = steps(run_dir)
    # The step that the loss cut off may have been counted without its checkpoint; none is missing.
    assert sorted({entry["step"] for entry in done}) == list(range(1, 61))


def test_refused_stage_leaves_nothing_behind(cluster: SlurmCluster, run_dir: Path) -> None:
    plan = {"stages": {"warmup": 5, "pretrain": 5}}
    with pytest.raises(
        SlurmError, match=r'sbatch refused stage "pretrain" of tiny: .*partition.*were cancelled'
    ) as caught:
        submit(run_dir, plan, slurm_of={"pretrain": {"partition": "nowhere"}})

    assert "\n" not in str(caught.value)
    assert not run_dir.exists()
    assert cluster.run("squeue", "--noheader", "--states=PENDING,RUNNING").stdout == ""


def test_second_submission_of_a_queued_run_is_refused(cluster: SlurmCluster, run_dir: Path) -> None:
    plan = {"stages": {"warmup": 5}}
    (first,) = submit(run_dir, plan, sbatch=["--hold"])
    script = Path(first.script).read_text()
    with pytest.raises(SlurmError, match=rf"already has jobs in the queue: cancel them with `scancel {first.job_id}`"):
        submit(run_dir, plan)
    assert Path(first.script).read_text() == script

    cluster.run("scancel", str(first.job_id))
    cluster.wait_until_ended(first.job_id, 20)
    (second,) = submit(run_dir, plan)
    assert cluster.wait_until_ended(second.job_id, 60) == "COMPLETED"
    assert [[job.job_id for job in chain.jobs] for chain in read_chains(run_dir)] == [[first.job_id], [second.job_id]]
