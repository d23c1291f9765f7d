"""The body of the batch script, run by bash with small stand-ins for srun and scontrol on PATH.

Quick, and sharp on what a real cluster shows only by luck: a status that comes with a signal, a marker left by a dead
attempt, a run that makes no progress, a controller that does not answer.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from slurm.config import SlurmConfig
from slurm.render import render
from slurm.submit import stage_jobs

# srun: forward nothing, run the command; scontrol: two host names, and a record of what was requeued.
SRUN = '#!/bin/bash\necho "$*" >>"$CALLS/srun"\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'n1\\nn2\\n'; exit; fi
echo "$*" >>"$CALLS/scontrol"
[ ! -e "$CALLS/deaf" ]
"""


class Script:
    """A rendered script whose training is the given shell code; `$RUN` in it is the run directory."""

    def __init__(self, tmp_path: Path) -> None:
        self.run_dir = tmp_path / "run dir"
        self.calls = tmp_path / "calls"
        self.path = tmp_path / "stage.sbatch"
        (self.run_dir / "slurm").mkdir(parents=True)
        self.calls.mkdir()
        programs = tmp_path / "bin"
        programs.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sleep", "#!/bin/bash\nexec /bin/sleep 0.1\n")):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "RUN": str(self.run_dir),
            "SLURM_JOB_ID": "41",
            "SLURM_JOB_NODELIST": "n[1-2]",
        }

    def start(self, training: str, *, setup: list[str] | None = None, restart: int = 0) -> subprocess.Popen[str]:
        stage = SimpleNamespace(name="warmup", slurm={})
        recipe = SimpleNamespace(name="tiny", slurm=SlurmConfig(cpus_per_task=3, setup=setup or []), stages=[stage])
        (job,) = stage_jobs(recipe, "tiny", [], run_dir=self.run_dir, program=("bash", "-c", training))
        self.path.write_text(render(job))
        environment = {**self.environment, "SLURM_RESTART_COUNT": str(restart)}
        return subprocess.Popen(
            ["bash", str(self.path)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def run(self, training: str, *, setup: list[str] | None = None, restart: int = 0) -> tuple[int, str]:
        """Status and output."""
        process = self.start(training, setup=setup, restart=restart)
        output, _ = process.communicate(timeout=30)
        return process.returncode, output

    def requeued(self) -> list[str]:
        path = self.calls / "scontrol"
        return path.read_text().splitlines() if path.exists() else []

    def checkpoint(self, name: str) -> None:
        (self.run_dir / "checkpoints").mkdir(exist_ok=True)
        (self.run_dir / "checkpoints/latest").write_text(name)


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_rendezvous_and_srun_options(script: Script) -> None:
    status, output = script.run('echo "at $MASTER_ADDR:$MASTER_PORT threads $OMP_NUM_THREADS"')
    assert status == 0
    assert "at n1:10041 threads 1" in output
    assert "--kill-on-bad-exit=1 --cpus-per-task=3" in (script.calls / "srun").read_text()
    assert script.requeued() == []


@pytest.mark.parametrize("status", [0, 1, 2, 75, 143])
def test_status_of_training_is_returned(script: Script, status: int) -> None:
    assert script.run(f"exit {status}")[0] == status
    assert script.requeued() == [], "without the marker nothing is requeued, 75 or not"


@pytest.mark.parametrize("status", [0, 75, 143])
def test_marker_requeues_whatever_the_status(script: Script, status: int) -> None:
    script.run(f'touch "$RUN/slurm/requeue.41"; exit {status}')
    assert script.requeued() == ["requeue 41"]
    assert not (script.run_dir / "slurm/requeue.41").exists()


def test_marker_of_a_dead_attempt_is_void(script: Script) -> None:
    (script.run_dir / "slurm/requeue.41").touch()
    assert script.run("exit 0", restart=1)[0] == 0
    assert script.requeued() == []


def test_deaf_controller_is_asked_again_then_the_job_fails(script: Script) -> None:
    (script.calls / "deaf").touch()
    status, output = script.run('touch "$RUN/slurm/requeue.41"')
    assert status == 1
    assert len(script.requeued()) == 4
    assert "submit the run again, it goes on from its last checkpoint" in output


# In Python, because a shell cannot trap a signal that it was started to ignore.
LISTENING = f"""exec {sys.executable} -c '
import os, pathlib, signal, sys, time
run = pathlib.Path(os.environ["RUN"])
told = []
signal.signal(signal.SIGUSR1, lambda number, frame: told.append(number))
(run / "listening").touch()
while not told:
    time.sleep(0.02)
sys.exit(7)'
"""


def test_signal_reaches_training_and_its_status_survives(script: Script) -> None:
    process = script.start(LISTENING)
    wait_for((script.run_dir / "listening").exists)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 7, output
    assert output.count("USR1: training is asked to save and stop") == 1


def test_signal_during_setup_is_handed_on_later(script: Script) -> None:
    process = script.start(LISTENING, setup=['touch "$RUN/setup"', "/bin/sleep 0.3"])
    wait_for((script.run_dir / "setup").exists)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 7, output


def test_signal_before_the_handler_is_not_deadly_and_is_repeated(script: Script) -> None:
    # As a trainer that imports for a while: the first signals find nobody.
    process = script.start('touch "$RUN/importing"; /bin/sleep 1;' + LISTENING)
    wait_for((script.run_dir / "importing").exists)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 7, output


def test_many_signals_do_not_change_the_status(script: Script) -> None:
    process = script.start('touch "$RUN/begun"; trap "" USR1; /bin/sleep 1; exit 3')
    wait_for((script.run_dir / "begun").exists)
    for _ in range(50):
        if process.poll() is None:
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.01)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 3, output


def test_failing_setup_ends_the_job(script: Script) -> None:
    status, output = script.run("exit 0", setup=["echo before", "false", "echo behind"])
    assert status == 1
    assert "before" in output and "behind" not in output
    assert not (script.calls / "srun").exists()


def test_three_restarts_without_a_new_checkpoint_stop_the_run(script: Script) -> None:
    script.checkpoint("step_00000040")
    for restart in range(3):
        assert script.run("exit 0", restart=restart)[0] == 0
    status, output = script.run('touch "$RUN/trained"', restart=3)
    assert status == 1
    assert "3 restarts brought no checkpoint after 'step_00000040'" in output
    assert not (script.run_dir / "trained").exists()


def test_progress_starts_the_count_anew(script: Script) -> None:
    for restart, step in enumerate([0, 0, 0, 1, 1, 1, 2]):
        script.checkpoint(f"step_{step}")
        assert script.run("exit 0", restart=restart)[0] == 0
