"""The MLflow store seen from a training run: find or make its runs, send, and ask what is there already.

Plain, blocking calls; tracking.py makes them from its background thread. Only ``connect`` imports MLflow (it takes
seconds). Every call raises what MLflow raises; ``StoreUnusable`` means that trying again can't help.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

Point = tuple[str, float, int, int]  # metric key, value, time in ms, step

METRICS_PER_CALL = 1000  # MLflow's limit for one log_batch, which the stores write in one transaction
_PARAMS_PER_CALL = 100
_LONGEST_PARAM = 500  # MLflow 3 takes 6000 characters, older servers 500
_LONGEST_KEY = 250

# Short retries: a dead server must cost the sender seconds, not the four minutes of MLflow's defaults. A value that the
# user has set wins. The others keep MLflow from printing between the console lines and from calling home.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

# Runs in a process of its own: it keeps seconds of schema migration off the trainer's interpreter lock. The store is
# made aside and linked into place, since a store whose migration was killed half-way is refused for ever.
_MAKE_SQLITE = """
import contextlib, fcntl, os, sys
final = sys.argv[1]
aside = final + ".new"
with open(os.path.join(os.path.dirname(final), "." + os.path.basename(final) + ".lock"), "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not os.path.exists(final):
        for stale in (aside, aside + "-journal"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(stale)
        from mlflow.tracking import MlflowClient
        MlflowClient("sqlite:///" + aside).search_experiments()
        os.rename(aside, final)
"""


class StoreUnusable(Exception):
    """The store can't be used at all, now or later: MLflow isn't installed, or it refuses such a URI."""


class Store:
    """One training run's view of an MLflow store.

    Args:
        uri: any MLflow tracking URI; a sqlite file and its folder are made when absent.
        experiment: name; made when absent (with a sqlite store its artifacts go to ``mlflow-artifacts`` beside it).
        run_id: our own id of the training run, the tag by which its MLflow runs are found again.
    """

    def __init__(self, uri: str, experiment: str, run_id: str) -> None:
        self.uri, self.experiment, self.run_id = uri, experiment, run_id
        self._client: Any = None
        self._experiment_id = ""

    def connect(self) -> None:
        """Import MLflow, make a missing sqlite store, find or make the experiment."""
        for key, value in _ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        if importlib.util.find_spec("mlflow") is None:
            raise StoreUnusable("MLflow is not installed (pip install mlflow)")
        database = sqlite_path(self.uri)
        if database is not None:
            if importlib.util.find_spec("sqlalchemy") is None or importlib.util.find_spec("alembic") is None:
                raise StoreUnusable("mlflow-skinny has no sqlite store (pip install mlflow, or name a server's URI)")
            _make_sqlite(database)
        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
        from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

        try:
            self._client = MlflowClient(self.uri)
            found = self._client.get_experiment_by_name(self.experiment)
        except UnsupportedModelRegistryStoreURIException as error:
            raise StoreUnusable(f"MLflow knows no store {self.uri!r}: {error}") from None
        except MlflowException as error:
            if "filesystem tracking backend" in str(error).lower():
                raise StoreUnusable(f"MLflow refuses the file store {self.uri!r}; use sqlite:///PATH") from None
            raise
        if found is None:
            place = (database.parent / "mlflow-artifacts").as_uri() if database is not None else None
            try:
                kind = {"mlflow.experimentKind": "custom_model_development"}  # which of its two pages MLflow's UI opens
                self._experiment_id = self._client.create_experiment(self.experiment, place, kind)
            except MlflowException:  # another training made it meanwhile
                found = self._client.get_experiment_by_name(self.experiment)
                if found is None:
                    raise
        if found is not None:
            if found.lifecycle_stage == "deleted":
                self._client.restore_experiment(found.experiment_id)
            self._experiment_id = found.experiment_id

    def training_run(self, name: str) -> str:
        """MLflow id of the parent run; made when this store has none of this training."""
        return self._find_or_make({"hsa.run_id": self.run_id, "hsa.role": "training"}, name)

    def stage_run(self, parent: str, stage: str, index: int, name: str) -> str:
        """MLflow id of the child run of a stage, below ``parent``; made when absent."""
        tags = {"hsa.run_id": self.run_id, "hsa.role": "stage", "hsa.stage": stage}
        return self._find_or_make(tags, name, {"mlflow.parentRunId": parent, "hsa.stage_index": str(index)})

    def _find_or_make(self, identity: dict[str, str], name: str, more: dict[str, str] | None = None) -> str:
        from mlflow.entities import ViewType

        quoted = {key: value.replace("'", "_") for key, value in identity.items()}
        runs = self._client.search_runs(
            [self._experiment_id],
            " and ".join(f"tags.`{key}` = '{value}'" for key, value in quoted.items()),
            run_view_type=ViewType.ALL,
            max_results=1,
            order_by=["attributes.start_time ASC"],
        )
        if runs:
            if runs[0].info.lifecycle_stage == "deleted":
                self._client.restore_run(runs[0].info.run_id)
            return runs[0].info.run_id
        # tags travel with the creation, so that a kill can't leave a run that the next start would not find
        return self._client.create_run(self._experiment_id, run_name=name, tags={**quoted, **(more or {})}).info.run_id

    def last_steps(self, run: str) -> dict[str, int]:
        """Greatest step in the store of each metric of the run."""
        # The public ``data.metrics`` has values without their steps, and a metric's history grows with the run; this is
        # how MLflow's own system monitor finds the step to go on from.
        return {metric.key: metric.step for metric in self._client.get_run(run).data._metric_objs}

    def send(self, run: str, points: list[Point]) -> None:
        """Store up to ``METRICS_PER_CALL`` points, all or none."""
        from mlflow.entities import Metric

        self._client.log_batch(run, metrics=[Metric(key, value, ms, step) for key, value, ms, step in points])

    def send_params(self, run: str, params: dict[str, Any]) -> None:
        """Store parameters. MLflow never changes one: a value that differs from the stored one becomes a tag."""
        from mlflow.entities import Param, RunTag

        stored = self._client.get_run(run).data.params
        wanted = {safe_key(key): _param_text(value) for key, value in params.items()}
        new = [Param(key, value) for key, value in wanted.items() if key not in stored]
        changed = [RunTag(f"hsa.changed.{k}"[:_LONGEST_KEY], v) for k, v in wanted.items() if stored.get(k, v) != v]
        for start in range(0, len(new), _PARAMS_PER_CALL):
            self._client.log_batch(run, params=new[start : start + _PARAMS_PER_CALL])
        for start in range(0, len(changed), _PARAMS_PER_CALL):
            self._client.log_batch(run, tags=changed[start : start + _PARAMS_PER_CALL])

    def send_file(self, run: str, path: Path, folder: str) -> None:
        """Store a file as an artifact below ``folder``; sending it again replaces it."""
        self._client.log_artifact(run, str(path), folder)

    def set_status(self, run: str, status: str) -> None:
        """RUNNING, FINISHED, KILLED or FAILED; anything but RUNNING sets the run's end time too."""
        if self._client.get_run(run).info.status == status:
            return
        if status == "RUNNING":
            self._client.update_run(run, status=status)
        else:
            self._client.set_terminated(run, status)


def sqlite_path(uri: str) -> Path | None:
    """The database file of a sqlite URI, ``None`` for any other URI."""
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", uri)
    return Path(unquote(match[1])).absolute() if match else None


def safe_key(key: str) -> str:
    """The key with every character that MLflow refuses replaced by ``_``."""
    return re.sub(r"[^\w\-. /]", "_", key).strip("/.")[:_LONGEST_KEY]


def points_of(record: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    """Every number in a record as (key, value), nested keys joined by dots; flags and texts are left out."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from points_of(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield safe_key(prefix + key), float(value)


def _param_text(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= _LONGEST_PARAM else text[: _LONGEST_PARAM - 3] + "..."


def _make_sqlite(path: Path) -> None:
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(
        [sys.executable, "-c", _MAKE_SQLITE, str(path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,  # Ctrl-C in the terminal is for the trainer
        timeout=300,
    )
    if made.returncode:
        raise OSError(f"can't make the store {path}: {(made.stderr.strip().splitlines() or ['no message'])[-1]}")


def now_ms() -> int:
    """Time in milliseconds, as MLflow counts it."""
    return time.time_ns() // 1_000_000
