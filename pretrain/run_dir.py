"""The run directory: its layout, its lock, and the small files that say what the run is.

Layout::

    RUN/recipe.yaml         the resolved recipe, frozen; rewritten only with a change that was allowed and recorded
    RUN/run.json            ids, versions, plan, restarts, recorded changes, ``finished``
    RUN/metrics.jsonl       one object per step                          (metrics_log.py)
    RUN/evaluations.jsonl   one object per probe or evaluation           (metrics_log.py)
    RUN/tracking.json       what the tracking store still lacks          (tracking.py)
    RUN/checkpoints/        step_00001200/ ..., latest
    RUN/logs  RUN/eval      files for people
    RUN/slurm/              scripts, jobs.json, requeue.<jobid>
    RUN/.lock               held by the one process that writes

Files are replaced whole (written aside, synced, renamed), so a kill at any moment leaves the old or the new one.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import os
import platform
import re
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from pretrain.errors import RunDirError

LAYOUT = ("checkpoints", "logs", "slurm", "eval")
_FILES = ("recipe.yaml", "run.json", "metrics.jsonl", "evaluations.jsonl", "tracking.json", ".lock")
FREE_ON_RESUME = ("max_steps", "parallel", "device", "checkpoint", "tracking", "slurm")
_PACKAGES = ("torch", "megatron-core", "mlflow", "webdataset", "omegaconf", "tokenizers", "numpy", "triton")
_LOCK_PATIENCE_S = 2.0  # a killed trainer's lock lives until the kernel has torn the process down


@dataclass(frozen=True)
class Change:
    """One recipe key that differs from the frozen recipe; ``old`` or ``new`` is ``None`` where the key is absent."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}"


def write_atomic(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8) so that a kill or a full disk leaves the old file or the new one, whole."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    with contextlib.suppress(OSError):  # some network file systems can't sync a directory
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """``write_atomic`` of ``value`` as indented JSON."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def write_yaml(path: Path, value: Any) -> None:
    """``write_atomic`` of a plain container as YAML, keys in the order given."""
    write_atomic(path, yaml.safe_dump(_plain(value), sort_keys=False, allow_unicode=True, width=120))


def read_json(path: Path) -> Any:
    """The JSON in ``path``; RunDirError names the file when it is missing, unreadable or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunDirError(f"can't read {path}: {error.strerror}") from None
    except ValueError as error:
        raise RunDirError(f"{path} is damaged ({error}); restore it or start with a new run directory") from None


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists as ``{"stages.0.context": 16384, ...}``: the keys of OmegaConf overrides.

    Empty containers stay as values, so that emptying a list is seen as a change.
    """
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat.update(flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat or ({prefix: [] if isinstance(value, list | tuple) else {}} if prefix else {})


def add_allow_change(parser: argparse.ArgumentParser) -> None:
    """The argument ``--allow-change`` of all commands that go on with a run; `check_resume` takes what it holds."""
    parser.add_argument(
        "--allow-change",
        nargs="+",
        type=_key,
        action="extend",
        default=[],
        metavar="KEY",
        help="recipe keys that may differ from the run's frozen recipe; the change is recorded",
    )


def _key(text: str) -> str:
    """An override behind ``--allow-change`` would be taken for a key, and its value would be lost."""
    if "=" in text:
        raise argparse.ArgumentTypeError(
            f"{text}: names of keys only stand behind --allow-change; give what changes in front of it"
        )
    return text


def check_resume(frozen: dict[str, Any], now: dict[str, Any], allow: Iterable[str] = ()) -> list[Change]:
    """Compare the frozen recipe with today's; return the changes to record, or refuse.

    Free to change are ``max_steps`` and everything under ``parallel``, ``device``, ``checkpoint``, ``tracking`` and
    ``slurm``. Anything else must be named in ``allow``: a key, or a prefix of keys (``stages.1``; ``stages[1]`` is the
    same).

    Raises:
        RunDirError: lists each refused key, old -> new, and how to allow it.
    """
    old, new = flatten(_plain(frozen)), flatten(_plain(now))
    keys = [*old, *(key for key in new if key not in old)]
    changes = [
        Change(key, old.get(key), new.get(key))
        for key in keys
        if (key in old) != (key in new) or not _same(old[key], new[key])
    ]
    allowed = (*FREE_ON_RESUME, *(_dotted(key) for key in allow))
    refused = [change for change in changes if not _covered(change.key, allowed)]
    if refused:
        flags = " ".join(f"--allow-change {change.key}" for change in refused[:8])
        flags += " ..." if len(refused) > 8 else ""
        raise RunDirError(
            "the recipe differs from the one this run was started with: "
            + "; ".join(map(str, refused))
            + f". Put the old values back, start in another --run-dir, or go on with the change recorded: {flags}"
        )
    return changes


class RunDir:
    """One run directory. Making the object touches nothing; ``create`` and ``acquire`` do.

    Only the process that holds the lock (rank 0 of the trainer) may write. ``run.json`` may be updated from several of
    its threads.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().absolute()
        self.name = self.path.name
        self.recipe_path = self.path / "recipe.yaml"
        self.run_path = self.path / "run.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.evaluations_path = self.path / "evaluations.jsonl"
        self.tracking_path = self.path / "tracking.json"
        self.checkpoints = self.path / "checkpoints"
        self.latest_path = self.checkpoints / "latest"
        self.logs = self.path / "logs"
        self.slurm = self.path / "slurm"
        self.eval = self.path / "eval"
        self._lock_path = self.path / ".lock"
        self._lock_fd: int | None = None
        self._update = threading.RLock()

    # -- creation and opening -------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make the directory and its folders; fine when it is a run directory already.

        Raises:
            RunDirError: a file is in the way, no permission, read-only file system, or a folder with foreign contents.
        """
        foreign = self._foreign_entry()
        if foreign is not None:
            raise RunDirError(
                f"{self.path} is not empty and not a run directory (it holds {foreign!r}); choose another --run-dir"
            )
        try:
            for name in LAYOUT:
                (self.path / name).mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe.{os.getpid()}"
            probe.touch()
            probe.unlink()
        except (FileExistsError, NotADirectoryError) as error:
            blocking = next((p for p in (self.path, *self.path.parents) if p.exists() and not p.is_dir()), None)
            raise RunDirError(
                f"can't make the run directory {self.path}: {blocking or error.filename} is a file; "
                "move it away or choose another --run-dir"
            ) from None
        except PermissionError as error:
            raise RunDirError(
                f"can't write the run directory {self.path}: {error.strerror} ({error.filename}); "
                "choose a --run-dir that you may write"
            ) from None
        except OSError as error:
            if error.errno in (28, 122):  # ENOSPC, EDQUOT: a crash of the machine, not a mistake of the user
                raise
            raise RunDirError(
                f"can't make the run directory {self.path}: {error.strerror} ({error.filename}); "
                "choose another --run-dir"
            ) from None

    def exists(self) -> bool:
        """Whether a run was started here (``run.json`` is there)."""
        return self.run_path.is_file()

    def _foreign_entry(self) -> str | None:
        try:
            names = sorted(entry.name for entry in os.scandir(self.path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError as error:
            raise RunDirError(f"can't read the run directory {self.path}: {error.strerror}") from None
        if "run.json" in names:
            return None
        # a directory that `hsa submit` prepared, or one whose first start was killed, has parts of the layout only
        known = (*LAYOUT, *_FILES)
        passing = re.compile(r"\..*\.tmp|\.probe\.\d+|\.nfs.*")
        return next((name for name in names if name not in known and not passing.fullmatch(name)), None)

    # -- the single writer ----------------------------------------------------------------------------------------

    def acquire(self) -> RunDir:
        """Become the one writer, until ``release`` or the death of this process (SIGKILL included).

        The lock is a ``flock``: it binds the processes of this host (and of others where the file system carries it).

        Raises:
            RunDirError: another process trains here; names it.
        """
        if self._lock_fd is not None:
            return self
        fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder = os.pread(fd, 200, 0).decode(errors="replace").strip() or "another process"
                    os.close(fd)
                    raise RunDirError(
                        f"{self.path} is being trained by {holder}; wait for it, stop it, or choose another --run-dir"
                    ) from None
                time.sleep(0.05)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._lock_fd = fd
        # forked children (checkpoint writers) must not keep the lock alive after this process has died
        os.register_at_fork(after_in_child=self._forget_lock)
        return self

    def release(self) -> None:
        """Give the lock back; fine when it isn't held."""
        self._forget_lock()

    def _forget_lock(self) -> None:
        fd, self._lock_fd = self._lock_fd, None
        if fd is not None:
            with contextlib.suppress(OSError):
                os.close(fd)

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._lock_fd is not None

    def writer(self) -> str | None:
        """Who trains here on this host, or ``None``; writes nothing."""
        try:
            fd = os.open(self._lock_path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.pread(fd, 200, 0).decode(errors="replace").strip() or "another process"
        finally:
            os.close(fd)
        return None

    # -- run.json -------------------------------------------------------------------------------------------------

    def read_run(self) -> dict[str, Any]:
        """The contents of ``run.json``; RunDirError when there is none or it is damaged."""
        if not self.exists():
            raise RunDirError(f"{self.path} is not a run directory (no run.json); start one with `hsa train RECIPE`")
        run = read_json(self.run_path)
        if not isinstance(run, dict) or "run_id" not in run:
            raise RunDirError(f"{self.run_path} is damaged (no run_id); restore it or start with a new run directory")
        return run

    def update_run(self, change: Callable[[dict[str, Any]], None] | None = None, **fields: Any) -> dict[str, Any]:
        """Set fields of ``run.json``, or let ``change`` edit the dict in place; written only when something differs."""
        with self._update:
            run = self.read_run()
            before = json.dumps(run)
            run.update(fields)
            if change is not None:
                change(run)
            if json.dumps(run) != before:
                write_json(self.run_path, run)
            return run

    @property
    def finished(self) -> bool:
        """Whether training has reached its end. A finished run is left as it is: check this before ``acquire``."""
        return self.exists() and bool(self.read_run().get("finished"))

    def begin(self, recipe: dict[str, Any], *, name: str, plan: dict[str, Any]) -> dict[str, Any]:
        """Freeze ``recipe`` and write the first ``run.json``. Call under the lock, when ``exists()`` is false.

        ``run.json`` comes last: a kill in between leaves a directory that the next call begins again.
        """
        write_yaml(self.recipe_path, recipe)
        run = {
            "format": 1,
            "name": name,
            "run_id": uuid.uuid4().hex,
            "created": time.time(),
            "finished": False,
            "plan": plan,
            "versions": versions(),
            "git_commit": git_commit(),
            "mlflow": {},
            "starts": [],
            "changes": [],
        }
        write_json(self.run_path, run)
        return run

    def read_recipe(self) -> dict[str, Any]:
        """The frozen recipe as a plain dict; RunDirError when it is missing or damaged."""
        try:
            recipe = yaml.safe_load(self.recipe_path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RunDirError(f"can't read {self.recipe_path}: {error.strerror}") from None
        except yaml.YAMLError as error:
            raise RunDirError(f"{self.recipe_path} is damaged: {str(error).splitlines()[0]}") from None
        if not isinstance(recipe, dict):
            raise RunDirError(f"{self.recipe_path} is damaged (not a mapping)")
        return recipe

    def resume(self, recipe: dict[str, Any], *, allow: Iterable[str] = (), step: int = 0) -> list[Change]:
        """``check_resume`` against the frozen recipe; record what changed in ``run.json``, then freeze the new one."""
        changes = check_resume(self.read_recipe(), recipe, allow)
        if changes:
            now = time.time()
            self.update_run(
                lambda run: run["changes"].extend({"at": now, "step": step, **asdict(change)} for change in changes)
            )
            write_yaml(self.recipe_path, recipe)
        return changes

    def record_start(self, *, step: int, ranks: int) -> int:
        """Append to the history of starts (``step``: last step of the checkpoint resumed from); number of restarts."""
        start = {
            "at": time.time(),
            "step": step,
            "ranks": ranks,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "git_commit": git_commit(),
        }
        run = self.update_run(lambda run: run["starts"].append(start))
        return len(run["starts"]) - 1

    # -- requeue --------------------------------------------------------------------------------------------------

    def requeue_marker(self, job_id: str | int) -> Path:
        """``RUN/slurm/requeue.<jobid>``: tells the batch script to requeue itself (an exit code may be replaced)."""
        return self.slurm / f"requeue.{job_id}"

    def request_requeue(self, job_id: str | int | None = None) -> Path | None:
        """Leave the marker for ``job_id``, by default this Slurm job; ``None`` outside Slurm."""
        job_id = job_id if job_id is not None else os.environ.get("SLURM_JOB_ID")
        if job_id is None:
            return None
        marker = self.requeue_marker(job_id)
        marker.parent.mkdir(exist_ok=True)
        write_atomic(marker, f"{time.time()}\n")
        return marker


def versions() -> dict[str, str]:
    """Python and the installed packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for package in ("hsa-ultralong", *_PACKAGES):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def git_commit() -> str | None:
    """Commit of the checkout that this code runs from, ``+changes`` when tracked files differ; ``None`` in a wheel."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        ask = {"cwd": root, "capture_output": True, "text": True, "timeout": 10, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **ask).stdout.strip()  # type: ignore[call-overload]
        status = ["git", "--no-optional-locks", "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, **ask).stdout.strip()  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def _plain(value: Any) -> Any:
    """The value as YAML would give it back: tuples as lists, keys as strings, paths and enums as strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    return getattr(value, "name", None) if hasattr(type(value), "__members__") else str(value)


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, float) and isinstance(new, float) and math.isnan(old) and math.isnan(new):
        return True
    return old == new and isinstance(old, bool) == isinstance(new, bool)


def _dotted(key: str) -> str:
    return re.sub(r"\[(\w+)\]", r".\1", key).strip(".")


def _covered(key: str, prefixes: Iterable[str]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)
