"""MLflow tracking that training never waits for.

The log files of the run directory are the spool: the loop writes a line to ``metrics.jsonl`` and goes on; a background
thread reads the file and sends what the store lacks, in batches. A store that is slow or away costs the training
nothing: the thread warns once, tries again, and sends the rest when the store is back, or at the next start of the run,
or when ``hsa status RUN --send`` asks for it.

In the store a training is ONE run, however often it was restarted, with one child run per stage. The metrics of a step
are on the child of its stage and on the parent, which so shows the whole curve. Evaluations, too; system metrics,
pictures and the whole recipe are on the parent.

No step is missing and none is there twice, because the store itself is asked how far it is: a batch is one
transaction, so the greatest step of a metric in the store is the last one sent, whatever moment the trainer was killed
at. Steps that a resumed run does again are not sent again. RUN/tracking.json remembers the pictures that wait, and what
was sent, for ``hsa status``.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain import metrics_log
from pretrain.errors import RunDirError
from pretrain.mlflow_store import METRICS_PER_CALL, Point, Store, StoreUnusable, now_ms, points_of, safe_key
from pretrain.run_dir import RunDir, flatten, read_json, write_json
from pretrain.system_metrics import sample_system

_INTERVAL_S = 2.0  # between two sends
_LONGEST_PAUSE_S = 30.0  # between two attempts while the store is away
_SAMPLES_KEPT = 2000  # system metrics held in memory while the store is away
_NO_METRIC = ("step", "time")


@dataclass
class MLflowConfig:
    """Where the training is tracked.

    ``uri``: any MLflow tracking URI; null: ``mlflow.db`` (sqlite) beside the run directory; ``none``: files only.
    ``close_seconds``: the longest time that the end of training waits for the store.
    ``system_seconds``: between two samples of CPU, memory and GPU; 0: none.
    """

    uri: str | None = None
    experiment: str = "hsa-ultralong"
    close_seconds: float = 15.0
    system_seconds: float = 10.0


@dataclass
class TrackingConfig:
    """The recipe's ``tracking`` section."""

    mlflow: MLflowConfig = field(default_factory=MLflowConfig)


@dataclass
class _State:
    """What RUN/tracking.json holds. ``sent_*``: the last step known to be in the store."""

    status: str = "RUNNING"
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> {"index", "status"}
    pictures: list[str] = field(default_factory=list)  # wait to be sent; relative to the run directory
    sent_step: int = 0
    sent_evaluation_step: int = 0
    uri: str = ""  # the store that all this is about
    unusable: bool = False  # that store will never take anything


class Tracker:
    """Tracks one training. Made on every rank; does nothing but on the writer.

    Args:
        run_dir: begun (``run.json`` is there) and, on the writer, locked.
        config: the recipe's ``tracking.mlflow`` section.
        is_writer: true on rank 0 only.
        params: the resolved recipe, nested or flat.
        resume_step: step of the checkpoint that training goes on from; later evaluations are dropped from the log.
        say: prints one line for people; warnings of the background thread come through it.
    """

    def __init__(
        self,
        run_dir: RunDir,
        config: MLflowConfig,
        *,
        is_writer: bool = True,
        params: dict[str, Any] | None = None,
        resume_step: int = 0,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.is_writer = is_writer
        if not is_writer:
            return
        self._say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self._close_seconds = float(config.close_seconds)
        self._evaluations = metrics_log.EvaluationLog(run_dir.evaluations_path, resume_step)
        self._sender: _Sender | None = None
        uri = resolve_uri(config.uri, run_dir)
        if uri is None:
            self._say("tracking: no MLflow (tracking.mlflow.uri is none); metrics go to files only")
            return
        run = run_dir.read_run()
        store = Store(uri, config.experiment, run["run_id"])
        self._sender = _Sender(run_dir, store, flatten(params or {}), self._say, float(config.system_seconds))
        self._sender.change(status="RUNNING")
        self._sender.start()

    def stage_started(self, name: str, index: int) -> None:
        """A stage begins, or goes on after a restart."""
        if self.is_writer and self._sender:
            self._sender.change(stage=(name, index, "RUNNING"))

    def step_logged(self) -> None:
        """A line was added to metrics.jsonl. Never blocks."""
        if self.is_writer and self._sender:
            self._sender.wake.set()

    def log_evaluation(self, record: dict[str, Any], step: int) -> None:
        """Write a record to evaluations.jsonl, and its numbers to the store as ``eval/<name>/<key>``.

        ``record``: JSON-able, with ``name`` (default ``evaluation``) and ``stage``; one of a name per step.
        """
        if self.is_writer:
            self._evaluations.append({"step": step, "name": "evaluation", **record})
            self.step_logged()

    def log_picture(self, path: str | Path) -> None:
        """Send a file below the run directory as an artifact, under the same folder, soon. It must stay where it is."""
        if self.is_writer and self._sender:
            self._sender.change(picture=Path(path))

    def stage_finished(self, name: str) -> None:
        """The stage has reached its end."""
        if self.is_writer and self._sender:
            self._sender.change(stage=(name, None, "FINISHED"))

    def close(self, status: str = "FINISHED") -> bool:
        """Send the rest, waiting ``close_seconds`` at most; whether all of it arrived.

        ``status`` of the run in the store: FINISHED; KILLED for one that was stopped and wants to go on; FAILED.
        """
        if not self.is_writer:
            return True
        self._evaluations.close()
        if self._sender is None:
            return True
        sender, self._sender = self._sender, None
        sender.change(status=status)
        return sender.finish(self._close_seconds)


def resolve_uri(uri: str | None, run_dir: RunDir) -> str | None:
    """The MLflow URI that the recipe means: null is ``mlflow.db`` beside the run directory, ``none`` is ``None``."""
    if uri is None or uri == "":
        return f"sqlite:///{run_dir.path.parent / 'mlflow.db'}"
    return None if uri.lower() == "none" else uri


def unsent(run_dir: RunDir) -> int:
    """Steps of metrics.jsonl that the store is not known to have. Reads files only."""
    last = metrics_log.last_record(run_dir.metrics_path)
    if last is None or not run_dir.tracking_path.exists():
        return 0
    state = _load(run_dir)
    mlflow = (run_dir.read_recipe().get("tracking") or {}).get("mlflow") or {}
    if state.unusable or resolve_uri(mlflow.get("uri"), run_dir) is None:
        return 0
    return max(0, last["step"] - state.sent_step)


def send_rest(run_dir: RunDir, *, seconds: float = 60.0, say: Callable[[str], None] | None = None) -> bool:
    """Send what the store lacks of a run that nobody trains at the moment; whether all of it arrived.

    Raises:
        RunDirError: it is being trained (the trainer sends by itself), or is no run directory.
    """
    recipe = run_dir.read_recipe()
    config = (recipe.get("tracking") or {}).get("mlflow") or {}
    uri = resolve_uri(config.get("uri"), run_dir)
    if uri is None:
        raise RunDirError(f"{run_dir.path} is not tracked (tracking.mlflow.uri is none)")
    run_dir.acquire()
    try:
        store = Store(uri, config.get("experiment", MLflowConfig.experiment), run_dir.read_run()["run_id"])
        say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        sender = _Sender(run_dir, store, flatten(recipe), say, system_seconds=0.0)
        sender.start()
        return sender.finish(seconds)
    finally:
        run_dir.release()


class _Sender(threading.Thread):
    """The background thread: brings the store to what the files and ``_State`` say."""

    def __init__(
        self, run_dir: RunDir, store: Store, params: dict[str, Any], say: Callable[[str], None], system_seconds: float
    ) -> None:
        super().__init__(name="tracking", daemon=True)
        self.wake = threading.Event()
        self._run_dir, self._store, self._params, self._say = run_dir, store, params, say
        self._state, self._lock = _load(run_dir), threading.Lock()
        self._state.unusable = False
        if self._state.uri != store.uri:  # another store than before has nothing yet: all of the run goes there
            self._state.uri, self._state.sent_step, self._state.sent_evaluation_step = store.uri, 0, 0
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._system_seconds, self._last_sample = system_seconds, 0.0
        self._samples: deque[tuple[int, int, dict[str, float]]] = deque(maxlen=_SAMPLES_KEPT)
        self._name = str(run_dir.read_run().get("name") or run_dir.name)
        self._warned: str | None = None
        self._forget_store()

    # -- called by the trainer ------------------------------------------------------------------------------------

    def change(
        self,
        *,
        status: str | None = None,
        stage: tuple[str, int | None, str] | None = None,
        picture: Path | None = None,
    ) -> None:
        """Note what the store shall show, durably, and wake the thread."""
        with self._lock:
            if status is not None:
                self._state.status = status
            if stage is not None:
                name, index, stage_status = stage
                entry = self._state.stages.setdefault(name, {"index": len(self._state.stages)})
                entry["status"] = stage_status
                if index is not None:
                    entry["index"] = index
            if picture is not None:
                path = picture.absolute()
                inside = path.is_relative_to(self._run_dir.path)
                text = str(path.relative_to(self._run_dir.path) if inside else path)
                if text not in self._state.pictures:
                    self._state.pictures.append(text)
            self._save()
        self.wake.set()

    def finish(self, seconds: float) -> bool:
        """Send the rest, for ``seconds`` at most; whether all arrived."""
        self._closing.set()
        self.wake.set()
        self.join(seconds)
        if self.is_alive():
            self._abandoned.set()
            waiting = unsent(self._run_dir)
            what = f"{waiting} steps" if waiting else "the last of the run"
            self._say(
                f"tracking: {self._store.uri} has not taken {what} yet ({self._warned or 'it is slow'}); "
                f"nothing is lost: `hsa status {self._run_dir.path} --send` or the next start of the run sends the rest"
            )
            return False
        return not self._state.unusable

    # -- the thread -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        failures = 0
        with contextlib.suppress(Exception):
            sample_system()  # CPU use is measured between two readings
        while not self._abandoned.is_set():
            try:
                if self._parent is None:
                    self._meet_store()
                closing = self._closing.is_set()  # before the files are read, so that nothing comes after the last look
                self._send_all()
                if self._warned is not None:
                    self._say(f"tracking: {self._store.uri} is back, everything was sent")
                failures, self._warned = 0, None
                if closing:
                    return
            except StoreUnusable as error:
                self._say(f"tracking: {error}; metrics go to files only")
                with self._lock:
                    self._state.unusable = True
                    self._save()
                return
            except Exception as error:  # whatever the store, its driver or the network raise: training goes on
                self._forget_store()
                failures += 1
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
                if self._warned is None:
                    self._say(
                        f"tracking: {self._store.uri} does not answer ({reason}); training goes on, metrics wait in "
                        f"{self._run_dir.metrics_path} and are sent when it is back"
                    )
                self._warned = reason
            self._pause(min(_LONGEST_PAUSE_S, 2.0 ** min(failures, 10)) if failures else _INTERVAL_S)
            self._sample()

    def _pause(self, seconds: float) -> None:
        """Wait: at least ``seconds`` (less when closing), and on for news when the store is well."""
        if self._closing.is_set():
            self._abandoned.wait(min(seconds, 1.0) if self._warned is not None else 0)
            return
        if self._closing.wait(seconds) or self._warned is not None:
            return
        self.wake.wait()
        self.wake.clear()

    def _forget_store(self) -> None:
        """After an error nothing is known about the store: it is asked anew before anything is sent."""
        self._parent: str | None = None
        self._children: dict[str, str] = {}
        self._stored: dict[str, dict[str, int]] = {}  # MLflow run -> metric -> last step in the store
        self._statuses: dict[str, str] = {}
        self._offset = 0

    def _meet_store(self) -> None:
        self._store.connect()
        parent = self._store.training_run(self._name)
        self._record(lambda ids: ids.update(run_id=parent))
        self._stored[parent] = self._store.last_steps(parent)
        # steps go to the child first, so all that the parent has is with the children too
        self._offset = metrics_log.offset_after(self._run_dir.metrics_path, self._stored[parent].get("loss", 0))
        self._store.send_params(parent, self._params)
        self._parent = parent

    def _child(self, stage: str) -> str:
        if stage not in self._children:
            assert self._parent is not None
            with self._lock:
                entry = self._state.stages.setdefault(stage, {"index": len(self._state.stages), "status": "RUNNING"})
                index = entry["index"]
            child = self._store.stage_run(self._parent, stage, index, f"{self._name}/{stage}")
            self._record(lambda ids: ids.setdefault("stages", {}).update({stage: child}))
            prefix = f"stages.{index}."
            own = {key.removeprefix(prefix): value for key, value in self._params.items() if key.startswith(prefix)}
            self._store.send_params(child, own)
            self._stored[child] = self._store.last_steps(child)
            self._children[stage] = child
        return self._children[stage]

    def _record(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Write MLflow's ids into run.json, emptied first when the store is another one than before."""
        if self._abandoned.is_set():
            raise TimeoutError("stopped before all was sent")  # the lock of the run directory may be given back already

        def edit(run: dict[str, Any]) -> None:
            if run.get("mlflow", {}).get("uri") != self._store.uri:
                run["mlflow"] = {"uri": self._store.uri, "experiment": self._store.experiment}
            change(run["mlflow"])

        self._run_dir.update_run(edit)

    def _send_all(self) -> None:
        self._send_steps()
        self._send_evaluations()
        self._send_samples()
        self._send_pictures()
        with self._lock:
            stages = {name: entry["status"] for name, entry in self._state.stages.items()}
            status = self._state.status
        for name, stage_status in stages.items():
            # a stage that was going on when the training stopped is stopped like it
            self._set_status(self._child(name), status if stage_status == "RUNNING" else stage_status)
        assert self._parent is not None
        self._set_status(self._parent, status)

    def _set_status(self, run: str, status: str) -> None:
        if self._statuses.get(run) != status:
            self._store.set_status(run, status)
            self._statuses[run] = status

    def _send_steps(self) -> None:
        path = self._run_dir.metrics_path
        for records, end in _batches(metrics_log.read_from(path, self._offset)):
            if self._abandoned.is_set():
                raise TimeoutError("stopped before all was sent")
            by_stage: dict[str, list[dict[str, Any]]] = {}
            for record in records:
                by_stage.setdefault(record["stage"], []).append(record)
            for stage, of_stage in by_stage.items():
                self._send(self._child(stage), [point for record in of_stage for point in _step_points(record)])
            self._send(self._parent, [point for record in records for point in _step_points(record)])
            self._offset = end
            with self._lock:
                self._state.sent_step = max(self._state.sent_step, records[-1]["step"])
                self._save()
        with self._lock:  # the store may have had everything already
            last = self._stored[self._parent].get("loss", 0) if self._parent else 0
            if last > self._state.sent_step:
                self._state.sent_step = last
                self._save()

    def _send_evaluations(self) -> None:
        with self._lock:
            sent = self._state.sent_evaluation_step
        newest = sent
        # the file is short; whatever the store has already is left out by _send
        for record in metrics_log.read(self._run_dir.evaluations_path, max(0, sent - 1) if self._statuses else 0):
            body = {key: value for key, value in record.items() if key not in (*_NO_METRIC, "name", "stage")}
            prefix = f"eval/{safe_key(str(record['name']))}/"
            at = _milliseconds(record)
            points = [(safe_key(prefix + key), value, at, record["step"]) for key, value in points_of(body)]
            if isinstance(record.get("stage"), str):
                self._send(self._child(record["stage"]), points)
            self._send(self._parent, points)
            newest = max(newest, record["step"])
        if newest != sent:
            with self._lock:
                self._state.sent_evaluation_step = newest
                self._save()

    def _send_samples(self) -> None:
        while self._samples:
            step, at, values = self._samples[0]
            self._send(self._parent, [(f"system/{key}", value, at, step) for key, value in values.items()])
            self._samples.popleft()

    def _send_pictures(self) -> None:
        while True:
            with self._lock:
                if not self._state.pictures:
                    return
                text = self._state.pictures[0]
            path = self._run_dir.path / text
            if path.is_file():
                folder = str(Path(text).parent) if not Path(text).is_absolute() else "pictures"
                self._store.send_file(self._parent or "", path, "" if folder == "." else folder)
            with self._lock:
                self._state.pictures.remove(text)
                self._save()

    def _send(self, run: str | None, points: list[Point]) -> None:
        """Store the points that the run lacks."""
        assert run is not None
        stored = self._stored[run]
        new = [point for point in points if point[3] > stored.get(point[0], -1)]
        for start in range(0, len(new), METRICS_PER_CALL):
            part = new[start : start + METRICS_PER_CALL]
            self._store.send(run, part)
            for key, _, _, step in part:
                stored[key] = step

    def _sample(self) -> None:
        if self._system_seconds <= 0 or time.monotonic() - self._last_sample < self._system_seconds:
            return
        with contextlib.suppress(Exception):  # a sensor that fails must not stop the metrics
            last = metrics_log.last_record(self._run_dir.metrics_path)
            newest = self._samples[-1][0] if self._samples else 0
            if last is not None and last["step"] > newest and (values := sample_system()):
                self._samples.append((last["step"], now_ms(), values))
                self._last_sample = time.monotonic()

    def _save(self) -> None:
        with contextlib.suppress(OSError):  # a full disk is the loop's to report; here it would only hide a metric
            write_json(self._run_dir.tracking_path, vars(self._state))


def _load(run_dir: RunDir) -> _State:
    state = _State()
    with contextlib.suppress(RunDirError):  # absent or damaged: the store is asked anyway
        saved = read_json(run_dir.tracking_path)
        if isinstance(saved, dict):
            known = vars(state)
            known.update({key: value for key, value in saved.items() if type(value) is type(known.get(key))})
    return state


def _milliseconds(record: dict[str, Any]) -> int:
    return int(record["time"] * 1000) if "time" in record else now_ms()


def _step_points(record: dict[str, Any]) -> list[Point]:
    """A step's metrics, ``loss`` last: when the store has a step's loss it has all of that step."""
    at = _milliseconds(record)
    values = {key: value for key, value in points_of(record) if key not in _NO_METRIC}
    values["loss"] = values.pop("loss")
    return [(key, value, at, record["step"]) for key, value in values.items()]


def _batches(lines: Iterator[tuple[dict[str, Any], int]]) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Steps in groups that fit one call to the store, each with the byte where its last line ends."""
    records: list[dict[str, Any]] = []
    size, last_end = 0, 0
    for record, end in lines:
        points = sum(1 for _ in points_of(record))
        if records and size + points > METRICS_PER_CALL:
            yield records, last_end
            records, size = [], 0
        records.append(record)
        size, last_end = size + points, end
    if records:
        yield records, last_end
