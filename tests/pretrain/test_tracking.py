"""Tracking against real MLflow stores: nothing missing, nothing twice, and training never waits."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter

import pytest

from pretrain import metrics_log, mlflow_store, tracking
from pretrain.errors import RunDirError
from pretrain.mlflow_store import Store, points_of, safe_key, sqlite_path
from pretrain.run_dir import RunDir, read_json
from pretrain.tracking import MLflowConfig, Tracker, TrackingConfig, resolve_uri, send_rest, unsent

HALF, TOTAL = 20, 40  # steps of the stage warmup, of both stages
STEP_METRICS = {"tokens", "loss", "grad_norm", "lr", "step_seconds", "data_wait_seconds", "moe.max_load"}


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A sqlite store just made; tests copy it, since making one takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow_store._make_sqlite(path)
    return path


@pytest.fixture
def runs(tmp_path, empty_store):
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


def recipe(uri=None) -> dict:
    return {
        "name": "tiny",
        "optimizer": {"lr": 1e-3},
        "note": "x" * 2000,
        "stages": [{"name": "warmup", "context": 128}, {"name": "long", "context": 256}],
        "tracking": {"mlflow": {"uri": uri, "experiment": "tests"}},
    }


def record(step: int) -> dict:
    return {
        "step": step,
        "stage": "warmup" if step <= HALF else "long",
        "tokens": step * 1024,
        "loss": 5.0 / step,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "step_seconds": 0.01,
        "data_wait_seconds": 0.0,
        "moe": {"max_load": 1.5},
    }


class Training:
    """What the train loop does with a run directory, without the training."""

    def __init__(self, path, *, resume=0, uri=None, say=None, system_seconds=0.0, close_seconds=30.0):
        self.said: list[str] = []
        self.run = RunDir(path)
        self.run.create()
        self.run.acquire()
        if not self.run.exists():
            self.run.begin(recipe(uri), name="tiny", plan={"total_steps": TOTAL, "stages": []})
        config = MLflowConfig(uri, "tests", close_seconds, system_seconds)
        self.log = metrics_log.MetricsLog(self.run.metrics_path, resume)
        self.tracker = Tracker(
            self.run, config, params=self.run.read_recipe(), resume_step=resume, say=say or self.said.append
        )
        self.step, self.stage = resume, None

    def go(self, until: int, pause: float = 0.0) -> None:
        while self.step < until:
            self.step += 1
            line = record(self.step)
            if line["stage"] != self.stage:
                if self.stage:
                    self.tracker.stage_finished(self.stage)
                self.stage = line["stage"]
                self.tracker.stage_started(self.stage, int(self.step > HALF))
            self.log.append(line)
            self.tracker.step_logged()
            if self.step % 10 == 0:
                found = {"name": "niah@128", "stage": self.stage, "right": self.step / TOTAL}
                self.tracker.log_evaluation(found, self.step)
            time.sleep(pause)

    def close(self, status: str) -> bool:
        if status == "FINISHED" and self.stage:
            self.tracker.stage_finished(self.stage)
        self.log.close()
        arrived = self.tracker.close(status)
        self.run.release()
        return arrived


def stored_runs(uri: str) -> tuple[object, dict[str, object]]:
    """Client, and the runs of the experiment by name; fails when a name is there twice."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    by_name = {run.info.run_name: run for run in found}
    assert len(by_name) == len(found), [run.info.run_name for run in found]
    return client, by_name


def check_store(uri: str, last: int, status: str) -> None:
    """The parent has every step up to ``last``, the children those of their stage, all once and with their value."""
    client, found = stored_runs(uri)
    children = {"tiny/warmup": range(1, min(last, HALF) + 1), "tiny/long": range(HALF + 1, last + 1)}
    expected = {"tiny": range(1, last + 1), **{name: steps for name, steps in children.items() if steps}}
    assert set(found) == set(expected)
    parent = found["tiny"].info.run_id
    for name, steps in expected.items():
        run = found[name]
        assert run.data.tags.get("mlflow.parentRunId") == (None if name == "tiny" else parent)
        steps_only = {key for key in run.data.metrics if not key.startswith(("eval/", "system/"))}
        assert steps_only == STEP_METRICS
        for key in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, key)
            doubled = [step for step, count in Counter(point.step for point in history).items() if count > 1]
            assert not doubled, f"{name} {key}: steps {doubled} are there twice"
            if key in STEP_METRICS:
                assert sorted(point.step for point in history) == list(steps), (name, key)
            if key == "loss":
                assert all(point.value == 5.0 / point.step for point in history)
            if key.startswith("eval/"):
                assert key == "eval/niah_128/right"
                assert sorted(point.step for point in history) == [step for step in steps if step % 10 == 0]
    assert found["tiny"].info.status == status


def test_one_run_with_a_child_per_stage(runs):
    training = Training(runs / "demo", system_seconds=0.01)
    training.go(5)
    deadline = time.monotonic() + 60
    while unsent(training.run) and time.monotonic() < deadline:  # let it sample the machine at least once
        time.sleep(0.05)
    training.go(TOTAL, pause=0.05)
    picture = training.run.eval / "niah" / "heat.png"
    picture.parent.mkdir()
    picture.write_bytes(b"a picture")
    training.tracker.log_picture(picture)
    assert training.close("FINISHED")
    assert training.said == []

    uri = resolve_uri(None, training.run)
    assert uri == f"sqlite:///{runs}/mlflow.db"
    check_store(uri, TOTAL, "FINISHED")
    client, found = stored_runs(uri)
    parent = found["tiny"]
    assert parent.data.params["optimizer.lr"] == "0.001" and parent.data.params["stages.1.context"] == "256"
    assert len(parent.data.params["note"]) == 500
    assert found["tiny/long"].data.params == {"name": "long", "context": "256"}
    assert parent.data.metrics["system/cpu_utilization_percentage"] >= 0
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert [file.path for file in client.list_artifacts(parent.info.run_id, "eval/niah")] == ["eval/niah/heat.png"]
    assert parent.info.artifact_uri.startswith((runs / "mlflow-artifacts").as_uri())
    ids = training.run.read_run()["mlflow"]
    assert ids["run_id"] == parent.info.run_id
    assert ids["stages"] == {name.split("/")[1]: run.info.run_id for name, run in found.items() if "/" in name}
    assert unsent(training.run) == 0


def test_a_restart_continues_and_steps_done_again_are_not_sent_again(runs):
    training = Training(runs / "demo")
    training.go(25)
    assert training.close("KILLED")
    uri = resolve_uri(None, training.run)
    check_store(uri, 25, "KILLED")
    assert stored_runs(uri)[1]["tiny/long"].info.status == "KILLED"

    again = Training(runs / "demo", resume=15)
    again.go(18)
    assert again.close("FAILED")
    check_store(uri, 25, "FAILED")

    last = Training(runs / "demo", resume=15)
    last.go(TOTAL)
    assert last.close("FINISHED")
    check_store(uri, TOTAL, "FINISHED")
    assert {run.info.status for run in stored_runs(uri)[1].values()} == {"FINISHED"}


def test_a_changed_parameter_becomes_a_tag(runs):
    first = Training(runs / "demo")
    first.go(3)
    first.close("KILLED")
    first.run.acquire()
    first.run.resume({**recipe(), "optimizer": {"lr": 2e-3}}, allow=["optimizer.lr"])
    first.run.release()
    again = Training(runs / "demo", resume=3)
    again.go(4)
    assert again.close("KILLED")
    run = stored_runs(resolve_uri(None, again.run))[1]["tiny"]
    assert run.data.params["optimizer.lr"] == "0.001"
    assert run.data.tags["hsa.changed.optimizer.lr"] == "0.002"


def test_an_answer_that_got_lost_doubles_nothing(runs, monkeypatch):
    """The store has taken a batch, but the sender is told that it failed."""
    rng = random.Random(3)
    send = Store.send

    def unlucky(self, run, points):
        send(self, run, points)
        if rng.random() < 0.4:
            raise ConnectionError("the answer got lost")

    monkeypatch.setattr(Store, "send", unlucky)
    monkeypatch.setattr(tracking, "METRICS_PER_CALL", 30)
    monkeypatch.setattr(tracking, "_LONGEST_PAUSE_S", 0.05)
    training = Training(runs / "demo", close_seconds=60)
    training.go(TOTAL)
    assert training.close("FINISHED")
    assert training.said and "does not answer (ConnectionError: the answer got lost)" in training.said[0]
    check_store(resolve_uri(None, training.run), TOTAL, "FINISHED")


TRAINER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("t", sys.argv[1])
t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t)
t.tracking.METRICS_PER_CALL, t.tracking._INTERVAL_S = 21, 0.0  # many small sends: more moments to be killed at
training = t.Training(sys.argv[2], resume=int(sys.argv[3]), close_seconds=60)
print("go", flush=True)
training.go(t.TOTAL, pause=0.02)
print(training.close("FINISHED"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("store_there", [True, False])
def test_sigkill_at_any_moment(tmp_path, empty_store, store_there):
    """Also while the store is being made: then the first kills come before there is one."""
    if store_there:
        shutil.copy(empty_store, tmp_path / "mlflow.db")
    run, rng = RunDir(tmp_path / "demo"), random.Random(11 + store_there)
    command = [sys.executable, "-c", TRAINER, __file__, str(run.path)]
    resume = 0
    for attempt in range(4):
        trainer = subprocess.Popen([*command, str(resume)], stdout=subprocess.PIPE, text=True)
        trainer.stdout.readline()
        time.sleep(rng.uniform(0.2, 5.0) if not store_there or attempt == 0 else rng.uniform(2.0, 4.0))
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
        last = metrics_log.last_record(run.metrics_path)
        resume = max(0, (last["step"] if last else 0) - rng.randint(0, 8))
    done = subprocess.run([*command, str(resume)], stdout=subprocess.PIPE, text=True, timeout=120)
    assert done.stdout.split() == ["go", "True"]
    check_store(resolve_uri(None, run), TOTAL, "FINISHED")
    assert not (tmp_path / "mlflow.db.new").exists()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A real ``mlflow server`` that can be killed and started again on the same store."""

    def __init__(self, folder, port: int) -> None:
        self.port, self.uri = port, f"http://127.0.0.1:{port}"
        command = ["-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--artifacts-destination", str(folder / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self.process = subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | quiet,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, "the server does not start"
                time.sleep(0.1)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.mark.slow
def test_server_outage(runs):
    """The server dies in the middle and comes back: all is replayed. Dead at the end: the next start sends the rest."""
    port = free_port()
    server = Server(runs, port)
    try:
        training = Training(runs / "demo", uri=server.uri, close_seconds=3)
        training.go(10)
        deadline = time.monotonic() + 60
        while unsent(training.run) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert unsent(training.run) == 0

        server.kill()
        began = time.monotonic()
        training.go(30, pause=0.1)
        pace = time.monotonic() - began
        server = Server(runs, port)
        deadline = time.monotonic() + 60
        # results of evaluations are sent after the steps: no unsent step does not mean that all is there
        while read_json(training.run.tracking_path)["sent_evaluation_step"] < 30 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert unsent(training.run) == 0
        check_store(server.uri, 30, "RUNNING")
        assert pace < 20 * 0.1 + 1, "the loop waited for the dead server"

        server.kill()
        training.go(35)
        picture = training.run.eval / "late.png"
        picture.write_bytes(b"late")
        training.tracker.log_picture(picture)
        assert not training.close("KILLED")
        texts = [text for text in training.said if "does not answer" in text]
        assert 1 <= len(texts) <= 2, training.said  # once for each outage at most
        assert "5 steps" in training.said[-1] and "--send" in training.said[-1]
        assert unsent(training.run) == 5

        server = Server(runs, port)
        assert send_rest(training.run)
        check_store(server.uri, 35, "KILLED")
        client, found = stored_runs(server.uri)
        assert [file.path for file in client.list_artifacts(found["tiny"].info.run_id, "eval")] == ["eval/late.png"]
    finally:
        server.kill()


def test_a_store_that_never_answers_costs_nothing(tmp_path):
    training = Training(tmp_path / "demo", uri=f"http://127.0.0.1:{free_port()}", close_seconds=0.5)
    training.go(TOTAL)
    assert [found["step"] for found in metrics_log.read(training.run.metrics_path)] == list(range(1, TOTAL + 1))
    assert not training.close("FINISHED")
    assert f"{TOTAL} steps" in training.said[-1] and str(training.run.path) in training.said[-1]
    assert unsent(training.run) == TOTAL


def test_another_store_gets_the_whole_run(runs, empty_store):
    training = Training(runs / "demo")
    training.go(12)
    training.close("KILLED")
    uri = f"sqlite:///{runs}/other.db"
    shutil.copy(empty_store, runs / "other.db")
    moved = Training(runs / "demo", resume=12, uri=uri)
    moved.go(14)
    assert moved.close("KILLED")
    check_store(uri, 14, "KILLED")
    assert moved.run.read_run()["mlflow"]["uri"] == uri


@pytest.mark.parametrize("uri", ["none", "None"])
def test_files_only(tmp_path, uri):
    training = Training(tmp_path / "demo", uri=uri)
    training.go(TOTAL)
    assert training.close("FINISHED")
    assert training.said == ["tracking: no MLflow (tracking.mlflow.uri is none); metrics go to files only"]
    assert [found["step"] for found in metrics_log.read(training.run.evaluations_path)] == [10, 20, 30, 40]
    assert not (tmp_path / "mlflow.db").exists()
    assert unsent(training.run) == 0
    with pytest.raises(RunDirError, match="not tracked"):
        send_rest(training.run)


@pytest.mark.parametrize(
    ("missing", "uri", "message"),
    [
        ("mlflow", None, "MLflow is not installed"),
        ("alembic", None, "mlflow-skinny has no sqlite store"),
        (None, "file:///tmp/mlruns-refused", "refuses the file store"),
        (None, "gopher://x", "knows no store"),
    ],
)
def test_no_usable_store_is_said_plainly(tmp_path, monkeypatch, missing, uri, message):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    training = Training(tmp_path / "demo", uri=uri)
    training.go(3)
    assert not training.close("FINISHED")
    assert len(training.said) == 1 and message in training.said[0] and "files only" in training.said[0]
    assert unsent(training.run) == 0


def test_other_ranks_do_nothing(tmp_path):
    tracker = Tracker(RunDir(tmp_path / "absent"), MLflowConfig(), is_writer=False)
    tracker.stage_started("warmup", 0)
    tracker.step_logged()
    tracker.log_evaluation({"x": 1}, 1)
    tracker.log_picture(tmp_path / "x.png")
    tracker.stage_finished("warmup")
    assert tracker.close("FINISHED")
    assert list(tmp_path.iterdir()) == []


def test_the_configuration_is_an_omegaconf_schema(tmp_path):
    from omegaconf import OmegaConf

    config = OmegaConf.structured(TrackingConfig)
    config.mlflow.uri = "none"
    run = RunDir(tmp_path / "demo")
    run.create()
    run.begin(recipe("none"), name="tiny", plan={})
    assert Tracker(run, config.mlflow, params={}, say=lambda text: None).close()


def test_names_that_mlflow_takes():
    assert safe_key("eval/niah.single@16k/right[0]") == "eval/niah.single_16k/right_0_"
    values = dict(points_of({"a": 1, "b": {"c": 2.5, "flag": True}, "text": "x", "none": None}))
    assert values == {"a": 1.0, "b.c": 2.5}
    assert str(sqlite_path("sqlite:////data/my%20runs/mlflow.db?timeout=5")) == "/data/my runs/mlflow.db"
    assert sqlite_path("http://host:5000") is None and sqlite_path("postgresql://host/db") is None
