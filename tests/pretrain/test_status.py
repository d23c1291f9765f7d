"""hsa status: on a fresh, a running, a stopped, a finished and a broken run directory."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import pytest

from pretrain import metrics_log, status
from pretrain.errors import RunDirError
from pretrain.metrics_log import MetricsLog
from pretrain.run_dir import RunDir
from slurm.errors import SlurmError

PLAN = {
    "total_steps": 20,
    "stages": [
        {"name": "warmup", "first_step": 1, "last_step": 10},
        {"name": "long", "first_step": 11, "last_step": None},
    ],
}
RECIPE = {"name": "tiny", "tracking": {"mlflow": {"uri": "none"}}}


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "demo")
    run.create()
    run.begin(RECIPE, name="tiny", plan=PLAN)
    return run


def train(run: RunDir, steps: int) -> None:
    log = MetricsLog(run.metrics_path)
    for step in range(1, steps + 1):
        log.append(
            {
                "step": step,
                "stage": "warmup" if step <= 10 else "long",
                "tokens": step * 1024,
                "loss": 3.0,
                "grad_norm": 1.0,
                "lr": 1e-3,
                "step_seconds": 2.0,
                "data_wait_seconds": 0.0,
            }
        )
    log.close()


def asked(run: RunDir, capsys, *flags: str) -> str:
    parser = argparse.ArgumentParser()
    status.add_arguments(parser)
    assert status.main(parser.parse_args([str(run.path), *flags])) == 0
    return capsys.readouterr().out


def as_json(run: RunDir, capsys) -> dict:
    return json.loads(asked(run, capsys, "--json"), parse_constant=pytest.fail)


def test_before_the_first_step(run, capsys):
    found = as_json(run, capsys)
    assert (found["name"], found["stage"], found["step"], found["tokens"]) == ("tiny", None, 0, 0)
    assert (found["finished"], found["last_checkpoint"], found["eta_seconds"]) == (False, None, None)
    assert "none yet" in asked(run, capsys)


def test_stopped_in_the_middle(run, capsys):
    train(run, 12)
    (run.checkpoints / "step_00000010").mkdir()
    run.latest_path.write_text("step_00000010\n")
    run.record_start(step=0, ranks=1)
    run.record_start(step=10, ranks=1)
    run.update_run(created=run.read_run()["created"] - 240)
    found = as_json(run, capsys)
    assert (found["stage"], found["step"], found["tokens"]) == ("long", 12, 12 * 1024)
    assert found["last_checkpoint"] == "step_00000010"
    assert found["eta_seconds"] == 8 * 2.0
    assert found["goodput"] == pytest.approx(24 / 240, rel=0.05)
    assert (found["state"], found["restarts"], found["tokens_per_second"]) == ("stopped", 1, 512.0)
    text = asked(run, capsys)
    assert "long (2 of 2)" in text and "12 of 20 (60%), loss 3.0000" in text and "16s of training left" in text


def test_latest_may_be_a_link(run, capsys):
    (run.checkpoints / "step_00000004").mkdir()
    run.latest_path.symlink_to("step_00000004")
    assert as_json(run, capsys)["last_checkpoint"] == "step_00000004"


def test_while_it_trains(run, capsys):
    train(run, 3)
    with open(run.metrics_path, "a") as file:
        file.write('{"step": 4, "sta')  # just being written
    hold = "import sys, pretrain.run_dir as r; r.RunDir(sys.argv[1]).acquire(); print(flush=True); sys.stdin.read()"
    trainer = subprocess.Popen(
        [sys.executable, "-c", hold, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        trainer.stdout.readline()
        found = as_json(run, capsys)
        assert (found["state"], found["step"], found["writer"].split()[1]) == ("running", 3, str(trainer.pid))
        assert "ETA        34s" in asked(run, capsys)
    finally:
        trainer.stdin.close()
        trainer.wait()


def test_finished(run, capsys):
    train(run, 20)
    run.update_run(finished=True)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    found = as_json(run, capsys)
    assert (found["finished"], found["eta_seconds"], found["state"]) == (True, 0.0, "finished")
    assert "done" in asked(run, capsys)
    assert before == {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}, "status wrote something"


def test_a_loss_that_is_not_finite_is_valid_json(run, capsys):
    log = MetricsLog(run.metrics_path)
    keys = dict.fromkeys(("tokens", "grad_norm", "lr", "step_seconds", "data_wait_seconds"), 1.0)
    log.append({"step": 1, "stage": "warmup", **keys, "loss": float("inf")})
    assert as_json(run, capsys)["loss"] is None


def test_jobs_with_their_state(run, capsys, tmp_path, monkeypatch):
    jobs = [{"stage": "warmup", "job_id": 41, "script": "a"}, {"stage": "long", "job_id": 42, "script": "b"}]
    (run.slurm / "jobs.json").write_text(json.dumps([{"submitted": "2026-11-24T14:00:00+00:00", "jobs": jobs}]))
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\necho '42|RUNNING|None'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}{os.pathsep}{os.environ['PATH']}")
    found = as_json(run, capsys)
    assert found["jobs"] == [
        {"id": 41, "stage": "warmup", "state": None},
        {"id": 42, "stage": "long", "state": "RUNNING"},
    ]
    assert found["state"] == "running"
    text = asked(run, capsys)
    assert "41 warmup: not in the queue" in text and "42 long: RUNNING" in text


def test_broken_directories_are_named(run, tmp_path, capsys):
    with pytest.raises(RunDirError, match="there is no run directory"):
        status.collect(RunDir(tmp_path / "absent"))
    (tmp_path / "other").mkdir()
    with pytest.raises(RunDirError, match="not a run directory"):
        status.collect(RunDir(tmp_path / "other"))

    run.latest_path.write_text("step_00000099")
    with pytest.raises(RunDirError, match=r"latest points to 'step_00000099', which is not there"):
        status.collect(run)
    run.latest_path.unlink()

    (run.slurm / "jobs.json").write_text("{")
    with pytest.raises(SlurmError, match=r"jobs\.json"):
        status.collect(run)
    (run.slurm / "jobs.json").unlink()

    run.metrics_path.write_text('{"step": 1}\n')
    with pytest.raises(RunDirError, match=r"metrics\.jsonl is damaged.*step_seconds"):
        status.collect(run)
    run.metrics_path.write_text("garbage\n")
    with pytest.raises(RunDirError, match=r"metrics\.jsonl is damaged"):
        status.collect(run)
    run.run_path.write_text("{")
    with pytest.raises(RunDirError, match=r"run\.json is damaged"):
        status.collect(run)


def test_send_without_tracking_is_refused(run, capsys):
    with pytest.raises(RunDirError, match=r"not tracked"):
        asked(run, capsys, "--send")


def test_shards_that_cannot_be_read_are_named_and_counted(run, capsys):
    assert as_json(run, capsys)["skipped"] == {}
    train(run, 2)
    log = MetricsLog(run.metrics_path, resume_step=2)
    (record,) = metrics_log.read(run.metrics_path, after=1)
    skipped = {"/data/web-000003.tar": 7, "/data/web-000009.tar": 1}
    log.append({**record, "step": 3, "skipped_documents": 8, "skipped": list(skipped.items())})
    log.append({**record, "step": 4, "skipped_documents": 8})
    log.close()
    assert as_json(run, capsys)["skipped"] == skipped
    text = asked(run, capsys)
    assert "skipped    7 documents of /data/web-000003.tar that could not be read" in text
    assert text.count("could not be read") == 2
