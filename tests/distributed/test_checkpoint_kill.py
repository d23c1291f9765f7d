"""SIGKILL at any moment, while training or saving: what is there is whole, and the run goes on as if nothing was."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from parallel import checkpoint_files
from tests.conftest import hsa_environment

pytestmark = pytest.mark.distributed

STEPS = 20


def start(directory, *, load, background=False):
    job = {
        "kind": {"name": "adamw"},
        "to": STEPS,
        "background": background,
        "save": str(directory),
        "save_at": list(range(1, STEPS + 1)),
        "load": str(directory) if load else None,
    }
    worker = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("checkpoint_worker.py")), json.dumps([job])]
    return subprocess.Popen(worker, env=hsa_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-4000:]
    return json.loads(output.strip().splitlines()[-1])[0]


def newest(directory):
    """The newest step, without looking inside."""
    return max((checkpoint_files.step_of(path) for path in checkpoint_files.list_checkpoints(directory)), default=0)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return finish(start(tmp_path_factory.mktemp("unbroken"), load=False))


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "in the background"])
def test_killed_runs_end_like_an_unbroken_one(unbroken, tmp_path, background):
    broken = tmp_path / "broken"
    moments = random.Random(7)
    last = 0
    for after in (2, 9):
        process = start(broken, load=last > 0, background=background)
        while newest(broken) < after and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moments.uniform(0.0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = checkpoint_files.find_latest(broken)
        assert found is not None and checkpoint_files.step_of(found) >= last
        assert found == checkpoint_files.list_checkpoints(broken)[-1]  # nothing that bears a name is damaged
        last = checkpoint_files.step_of(found)
        checkpoint_files.clean_temporary(broken)
    ended = finish(start(broken, load=True, background=background))
    assert ended["losses"] == unbroken["losses"][last:]
    assert ended["weights"] == unbroken["weights"]
    assert [checkpoint_files.step_of(path) for path in checkpoint_files.list_checkpoints(broken)] == [STEPS - 1, STEPS]
