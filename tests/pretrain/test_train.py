"""Training and resuming through the command line: the same losses to the last bit, whatever happens in between."""

import json
import os
import random
import signal
import subprocess
import time

import pytest

from tests.conftest import hsa_command, hsa_environment, losses


@pytest.fixture(scope="module")
def unbroken(tiny_data, tmp_path_factory):
    """Run directory of the tiny recipe trained without interruption, and its recipe file."""
    import yaml

    from tests.conftest import tiny_container

    folder = tmp_path_factory.mktemp("unbroken")
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tiny_container(tiny_data)))
    command = hsa_command("train", recipe, "--run-dir", folder / "run")
    done = subprocess.run(command, env=hsa_environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run", recipe


def test_metrics_hold_every_step_once(unbroken):
    run_dir, _ = unbroken
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, 13))
    assert [r["stage"] for r in records] == ["first"] * 7 + ["second"] * 5
    assert records[-1]["tokens"] == 7 * 4 * 64 + 5 * 4 * 128
    assert records[-1]["loss"] < records[0]["loss"]
    for name in ("loss", "grad_norm", "lr", "step_seconds", "data_wait_seconds", "tokens"):
        assert all(name in r for r in records)
    assert all(r["data_wait_seconds"] <= r["step_seconds"] for r in records)
    run = json.loads((run_dir / "run.json").read_text())
    assert run["finished"] and [e["stage"] for e in run["position"]["exits"]] == ["first", "second"]


def test_a_finished_run_is_left_as_it_is(unbroken, hsa):
    run_dir, recipe = unbroken
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(run_dir.rglob("*"))}
    done = hsa("train", recipe, "--run-dir", run_dir)
    assert done.returncode == 0, done.stderr
    after = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(run_dir.rglob("*"))}
    assert before == after


@pytest.mark.slow
def test_stopping_at_max_steps_and_going_on_changes_no_bit(unbroken, hsa, tmp_path):
    run_dir, recipe = unbroken
    broken = tmp_path / "run"
    for limit in (3, 3, 7, 9, None):
        done = hsa("train", recipe, *([f"max_steps={limit}"] if limit else []), "--run-dir", broken)
        assert done.returncode == 0, done.stderr
        if limit:
            assert len(losses(broken)) == limit
    assert losses(broken) == losses(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_sigkill_at_any_moment_changes_no_bit(unbroken, tmp_path, seed):
    run_dir, recipe = unbroken
    broken = tmp_path / "run"
    rng = random.Random(seed)
    kills, deadline = 0, time.monotonic() + 200
    while time.monotonic() < deadline:
        process = subprocess.Popen(
            hsa_command("train", recipe, "--run-dir", broken),
            env=hsa_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        # First kills come while training or saving goes on, later ones grow so that the run ends.
        target = rng.randint(1, 4)
        known = len(losses_so_far(broken))
        while process.poll() is None and kills < 4:
            if len(losses_so_far(broken)) >= known + target or time.monotonic() > deadline:
                time.sleep(rng.random() * 0.4)
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        process.wait()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.stderr.read().decode()
    assert kills >= 2
    assert losses(broken) == losses(run_dir)


def losses_so_far(run_dir):
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_leaves_with_75(unbroken, hsa, tmp_path, number):
    run_dir, recipe = unbroken
    broken = tmp_path / "run"
    process = subprocess.Popen(
        hsa_command("train", recipe, "--run-dir", broken),
        env={**hsa_environment(), "SLURM_JOB_ID": "77"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while process.poll() is None and len(losses_so_far(broken)) < 3:
        time.sleep(0.01)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert "Traceback" not in output
    assert (broken / "slurm" / "requeue.77").exists()
    steps = len(losses(broken))
    assert (broken / "checkpoints" / f"step_{steps:08d}" / "manifest.json").exists()
    assert hsa("train", recipe, "--run-dir", broken).returncode == 0
    assert losses(broken) == losses(run_dir)


@pytest.mark.slow
def test_muon_with_accumulation_and_checkpointing_resumes_too(tiny_recipe, hsa, tmp_path):
    options = ["optimizer.name=muon", "micro_batch=1", "recompute=full", "data.prefetch=0", "max_steps=6"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert hsa("train", tiny_recipe, *options, "--run-dir", whole).returncode == 0
    assert hsa("train", tiny_recipe, *options, "max_steps=4", "--run-dir", parts).returncode == 0
    assert hsa("train", tiny_recipe, *options, "--run-dir", parts).returncode == 0
    assert losses(parts) == losses(whole) and len(losses(whole)) == 6


@pytest.mark.slow
def test_micro_batches_and_recomputation_give_the_same_losses(unbroken, tiny_recipe, hsa, tmp_path):
    reference = losses(unbroken[0])[:4]
    for number, options in enumerate((["micro_batch=1"], ["recompute=full"], ["recompute=selective", "micro_batch=2"])):
        run_dir = tmp_path / str(number)
        done = hsa("train", tiny_recipe, *options, "max_steps=4", "--run-dir", run_dir)
        assert done.returncode == 0, done.stderr
        for (_, _, loss, norm), (_, _, expected, expected_norm) in zip(losses(run_dir), reference, strict=True):
            assert loss == pytest.approx(expected, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-3)


@pytest.mark.slow
def test_bf16_trains(tiny_recipe, hsa, tmp_path):
    run_dir = tmp_path / "run"
    done = hsa("train", tiny_recipe, "precision=bf16", "max_steps=4", "--run-dir", run_dir)
    assert done.returncode == 0, done.stderr
    assert losses(run_dir)[-1][2] < losses(run_dir)[0][2]


def test_until_stage_stops_after_that_stage(tiny_recipe, hsa, tmp_path):
    run_dir = tmp_path / "run"
    assert hsa("train", tiny_recipe, "--run-dir", run_dir, "--until-stage", "first").returncode == 0
    assert len(losses(run_dir)) == 7
    again = hsa("train", tiny_recipe, "--run-dir", run_dir, "--until-stage", "first")
    assert again.returncode == 0 and "nothing left" in again.stdout


def test_gradients_that_stay_broken_end_the_run(tiny_recipe, hsa, tmp_path):
    """A loss scale beyond fp32's range: every update is skipped and said so, the run stops by itself as a crash."""
    run_dir = tmp_path / "run"
    done = hsa("train", tiny_recipe, "data.synthetic.text_weight=1e38", "--run-dir", run_dir)
    assert done.returncode not in (0, 2, 75)
    assert done.stdout.count("the update was skipped") == 10 and "not finite in 10 steps" in done.stderr
