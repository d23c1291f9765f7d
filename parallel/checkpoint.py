"""The distributed checkpoint: whole or absent, verified before use, rotated.

Layout of one checkpoint, written through megatron.core.dist_checkpointing (format torch_dist)::

    step_00001200/__*_*.distcp .metadata common.pt metadata.json    model and optimizer, by parameter name
                  training.pt                                       random states, the caller's extra
                  manifest.json                                     size and sha256 of every file above

It is written into ``.tmp-step_00001200`` beside it, synced, given its manifest, and renamed; the file ``latest`` (the
newest name) is replaced after that and is only for people and scripts. Old checkpoints are renamed to ``.trash-...``
before they are deleted. So whatever is called step_* is whole, whenever the process dies; ``clean_temporary`` removes
what a killed process left. Optimizer state is stored in the shape of the parameters (fully_reshardable) and loads at
any data-parallel size; on the same topology everything comes back bit for bit.

``save_checkpoint``, ``load_checkpoint`` and ``PendingSave`` (a save in the background) are collective: every rank calls
them. The other functions are not.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import queue
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from parallel import compat, mesh
from parallel.checkpoint_files import (
    LATEST,
    MANIFEST,
    TEMPORARY,
    clean_temporary,
    damage,
    discard,
    find_latest,
    list_checkpoints,
    read_manifest,
    remove,
    replace_file,
    sha256,
    step_of,
    step_path,
    sync_directory,
    verify,
    was_verified,
)
from parallel.errors import CheckpointError
from parallel.optimizer import Optimizer

__all__ = [
    "PendingSave",
    "clean_temporary",
    "find_latest",
    "list_checkpoints",
    "load_checkpoint",
    "read_training_state",
    "save_checkpoint",
    "step_of",
    "step_path",
    "verify",
]

logger = logging.getLogger(__name__)

FORMAT = 1
TRAINING = "training.pt"


# ---------------------------------------------------------------------------------------------------------------------
# Plain state: random generators and the caller's extra, without pickle
# ---------------------------------------------------------------------------------------------------------------------


def _pack(value: Any) -> Any:
    """Replace numpy arrays and scalars, so that torch.load(weights_only=True) reads the result."""
    if isinstance(value, np.ndarray):
        return {"__ndarray__": torch.from_numpy(np.ascontiguousarray(value).view(np.uint8).reshape(-1).copy()),
                "dtype": value.dtype.str, "shape": list(value.shape)}  # fmt: skip
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: _pack(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_pack(item) for item in value)
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.Tensor)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}: {value!r:.80}")


def _unpack(value: Any) -> Any:
    if isinstance(value, dict):
        if "__ndarray__" in value:
            flat = value["__ndarray__"].numpy().view(np.dtype(value["dtype"]))
            return flat.reshape(value["shape"]).copy()
        return {key: _unpack(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_unpack(item) for item in value)
    return value


def random_states() -> dict[str, Any]:
    """The states of every random generator of this process."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": compat.get_cuda_rng_tracker().get_states(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Set every generator; a CUDA state is skipped where there is no CUDA."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    compat.get_cuda_rng_tracker().set_states(states["megatron"])


# ---------------------------------------------------------------------------------------------------------------------
# Sharded state
# ---------------------------------------------------------------------------------------------------------------------


def _metadata() -> dict[str, Any]:
    """How Megatron shall lay out optimizer state: by parameter, without prefixes that depend on the layout."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }


def _module(chunk: nn.Module) -> nn.Module:
    """The model inside Megatron's DDP."""
    return chunk.module if isinstance(chunk, compat.DistributedDataParallel) else chunk


def _sharded_state(chunks: Sequence[nn.Module], optimizer: Optimizer | None, *, is_loading: bool) -> dict[str, Any]:
    group = compat.parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {**_metadata(), "dp_cp_group": group}
    state: dict[str, Any] = {}
    for index, chunk in enumerate(chunks):
        state[f"model{index}"] = _module(chunk).sharded_state_dict(metadata=metadata)
    if optimizer is not None:
        models = {name: value for name, value in state.items() if name.startswith("model")}
        state["optimizer"] = optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=metadata)
    return state


def _tensors(state: Any) -> Iterator[compat.ShardedTensor]:
    """All sharded tensors of a state, those behind factories included."""
    for leaf in compat.nested_values(state):
        if isinstance(leaf, compat.ShardedTensorFactory):
            yield from _tensors(leaf.build())
        elif isinstance(leaf, compat.ShardedTensor):
            yield leaf


def _bytes_to_write(state: dict[str, Any]) -> int:
    """Bytes of tensor data this rank will write."""
    total = 0
    for tensor in _tensors(state):
        replica = tensor.replica_id
        main = replica == 0 if isinstance(replica, int) else all(index == 0 for index in replica)
        if main and tensor.data is not None:
            total += tensor.data.numel() * tensor.data.element_size()
    return total


class _SaveInProcess(compat.TorchDistSaveShardedStrategy):
    """Megatron's torch_dist strategy, written by threads of this process.

    Megatron forks a process per file and spawns a manager process for their results. That costs seconds per save, runs
    the user's __main__ again, and turns a full disk into a message about a dead worker.

    `save` plans and copies to host memory, no more; `write` then needs no other rank and nothing of the model, and
    `finalize` is collective again. With `snapshot`, tensors that are in host memory already are copied too, so that
    training may go on while `write` runs.
    """

    snapshot = False
    error: BaseException | None = None  # what this rank's writing ended with
    entries: dict[str, dict[str, Any]]  # size and hash of this rank's files, once they are written
    write: Callable[[], None]
    finalize: Callable[[], None]

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any, **kwargs: Any) -> Any:
        with compat.results_queue(queue.Queue):
            return super().async_save(sharded_state_dict, checkpoint_dir, **kwargs)

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, *_: Any) -> Any:
        self.entries = {}
        buckets = writer.preload_tensors(writer.write_buckets, non_blocking=False)
        if self.snapshot:
            on_host = {id(tensor) for bucket in writer.write_buckets for _, tensor in bucket[2][1]}
            buckets = [
                (path, name, (data, [(item, t.clone() if id(t) in on_host else t) for item, t in tensors]))
                for path, name, (data, tensors) in buckets
            ]
        writer.write_buckets = [(path, name, ([], [])) for path, name, _ in buckets]  # only their number is asked for

        def write() -> None:
            try:
                with ThreadPoolExecutor(max(1, len(buckets))) as pool:
                    results = list(pool.map(compat.write_bucket, buckets))
                self.entries = {Path(path).name: _entry(Path(path)) for path, _, _ in buckets}
            except Exception as error:  # Megatron's finalisation makes every rank fail
                self.error = error
                writer.results_queue.put(error)
            else:
                writer.results_queue.put(dict(enumerate(results)))
            buckets.clear()

        def finalize() -> None:
            compat.save_state_dict_async_finalize(*save_state_dict_ret)

        self.write, self.finalize = write if buckets else lambda: None, finalize
        return compat.AsyncRequest(None, [], [])


def _entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file, which is on the disk then."""
    return {"size": path.stat().st_size, "sha256": sha256(path, sync=True)}


# ---------------------------------------------------------------------------------------------------------------------
# Save
# ---------------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    directory: Path,
    step: int,
    model_chunks: Sequence[nn.Module],
    optimizer: Optimizer | None,
    *,
    extra: dict[str, Any],
    keep_last: int = 3,
    keep: Callable[[int], bool] | None = None,
) -> Path:
    """Write the checkpoint of ``step`` into ``directory`` and rotate the old ones; every rank calls this.

    extra: small plain values, the same on every rank (rank 0's are stored), except extra["lanes"]: a dict of this
    rank's data lanes, lane -> state, which is merged over the ranks. keep_last: how many of the newest checkpoints
    stay; keep: which older steps stay as well. An existing checkpoint of the same step is replaced.

    Raises OSError on a full disk: nothing half-written stays, earlier checkpoints are untouched.
    """
    return PendingSave(
        directory, step, model_chunks, optimizer, extra=extra, keep_last=keep_last, keep=keep, background=False
    ).finish()


class PendingSave:
    """A save that was started: its tensors are in host memory, and with `background` copies of them, which a thread of
    each rank writes while training goes on. Host memory holds this rank's part of the checkpoint until then.

    Collective, like `finish` and `written`; arguments and errors are those of `save_checkpoint`. One save at a time.
    Until `finish`, nothing bears the checkpoint's name.
    """

    def __init__(
        self,
        directory: Path,
        step: int,
        model_chunks: Sequence[nn.Module],
        optimizer: Optimizer | None,
        *,
        extra: dict[str, Any],
        keep_last: int = 3,
        keep: Callable[[int], bool] | None = None,
        background: bool = True,
    ) -> None:
        self.directory, self.step, self.keep_last, self.keep = directory.absolute(), step, keep_last, keep
        self.final = step_path(self.directory, step)
        self.temporary = self.directory / f"{TEMPORARY}{self.final.name}"
        self.training = {
            "step": step,
            "random": mesh.gather_objects(random_states()),
            "extra": _merge_lanes(extra),
        }
        state = _sharded_state(model_chunks, optimizer, is_loading=False)
        self.needed = sum(mesh.gather_objects(_bytes_to_write(state)))
        try:
            _together(_prepare, self.directory, self.temporary, self.needed, on_writer=True)
        except OSError as error:
            raise self._explain(error.errno, error.strerror or str(error)) from error
        self.strategy = _SaveInProcess("torch_dist", 1, thread_count=2 if self.needed > 1 << 28 else 1)
        self.strategy.snapshot = background
        with self._failures():
            compat.dist_checkpointing.save(state, str(self.temporary), self.strategy, content_metadata=_metadata())
        self._thread: threading.Thread | None = None
        if background:
            # No daemon: a process that ends by itself finishes its files first.
            self._thread = threading.Thread(target=self.strategy.write, name=f"checkpoint-{step}")
            self._thread.start()

    def written(self) -> bool:
        """True when every rank has written its files, so that `finish` has nothing to wait for."""
        return all(mesh.gather_objects(self._thread is None or not self._thread.is_alive()))

    def finish(self) -> Path:
        """Wait for the files, give the checkpoint its name and rotate the old ones; returns its path."""
        if self._thread is not None:
            self._thread.join()
        else:
            self.strategy.write()
        with self._failures():
            self.strategy.finalize()
        try:
            _together(lambda: torch.save(_pack(self.training), self.temporary / TRAINING), on_writer=True)
            written = _together(lambda: self.strategy.entries)
            known = {name: entry for part in written for name, entry in part.items()}
            names = sorted(path.name for path in self.temporary.iterdir() if path.name not in known)
            share = names[mesh.rank() :: mesh.world_size()]
            entries = _together(lambda: {name: _entry(self.temporary / name) for name in share})
            files = known | {name: entry for part in entries for name, entry in part.items()}
            _together(_publish, self.temporary, self.final, self.step, dict(sorted(files.items())), on_writer=True)
        except OSError as error:
            explained = self._explain(error.errno, error.strerror or str(error))
            mesh.barrier()
            if mesh.is_writer():
                remove(self.temporary)
            raise explained from error
        if mesh.is_writer():
            try:
                _rotate(self.directory, self.final, max(1, self.keep_last), self.keep)
            except OSError as error:  # the checkpoint is safe, so training goes on
                logger.warning("old checkpoints in %s could not be deleted: %s", self.directory, error)
        mesh.barrier()
        return self.final

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn what Megatron raises into an OSError that says what is left, and leave nothing half-written."""
        try:
            yield
        except compat.CheckpointException as error:  # raised on every rank alike, with the reason on one
            failed = self.strategy.error
            reasons = mesh.gather_objects((_errno(failed), str(failed or "")))
            reason = next(((number, text) for number, text in reasons if text), (None, str(error)))
            explained = self._explain(*reason)
            mesh.barrier()
            if mesh.is_writer():
                remove(self.temporary)
            raise explained from error
        except (OSError, RuntimeError) as error:
            # This rank alone knows. It must not enter another collective: it stops, and the launcher stops the others.
            explained = self._explain(_errno(error), str(error))
            remove(self.temporary)
            raise explained from error

    def _explain(self, number: int | None, text: str) -> OSError:
        return _explain(number, text, self.directory, self.step, self.needed)


def _together(function: Callable[..., Any], *args: Any, on_writer: bool = False) -> list[Any]:
    """Call on every rank (or on rank 0 only) and return the results by rank.

    An OSError or RuntimeError of one is raised on all, so that no rank waits for another that has given up.
    """
    result: Any = None
    failure: tuple[int, str] | None = None
    if mesh.is_writer() or not on_writer:
        try:
            result = function(*args)
        except (OSError, RuntimeError) as error:
            failure = (_errno(error) or errno.EIO, str(error))
    outcomes = mesh.gather_objects((result, failure))
    for _, failed in outcomes:
        if failed is not None:
            raise OSError(*failed)
    return [value for value, _ in outcomes]


def _errno(error: BaseException | None) -> int | None:
    """The errno of an OSError, also of one behind torch's wrappers; torch.save may hide it altogether."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def _explain(number: int | None, text: str, directory: Path, step: int, needed: int) -> OSError:
    """An OSError that says what failed, whether it is the disk, and what is left. Call before freeing any room."""
    problem = f"the checkpoint of step {step} could not be written to {directory}"
    if not directory.is_dir():  # a write takes long enough for somebody to clear the run away
        return OSError(number or errno.ENOENT, f"{problem}: the folder is gone, removed while it was written ({text})")
    free = shutil.disk_usage(directory).free
    full = number in (errno.ENOSPC, errno.EDQUOT) or free < max(needed, 1 << 20)
    left = list_checkpoints(directory)
    kept = f"{left[-1].name} is untouched" if left else "there is no earlier one"
    if not full:
        return OSError(number or errno.EIO, f"{problem}: {text} ({kept})")
    return OSError(
        errno.EDQUOT if number == errno.EDQUOT else errno.ENOSPC,
        f"{problem}: the disk is full (about {needed / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free); nothing of "
        f"it is left, {kept}. Make room and start the run again",
    )


def _prepare(directory: Path, temporary: Path, needed: int) -> None:
    """An empty directory to write into, on a disk that has the room."""
    directory.mkdir(parents=True, exist_ok=True)
    remove(temporary)
    if shutil.disk_usage(directory).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    temporary.mkdir()


def _publish(temporary: Path, final: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest, give the checkpoint its name, and move the pointer."""
    manifest = {
        "format": FORMAT,
        "step": step,
        "world_size": mesh.world_size(),
        "megatron_core": compat.MEGATRON_VERSION,
        "torch": torch.__version__,
        "files": files,
    }
    with (temporary / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(temporary)
    if final.exists():
        discard(final)
    temporary.rename(final)
    sync_directory(final.parent)
    replace_file(final.parent / LATEST, final.name + "\n")


def _rotate(directory: Path, newest: Path, keep_last: int, keep: Callable[[int], bool] | None) -> None:
    """Delete old checkpoints. Damaged ones are not counted, so that keep_last usable ones stay."""
    usable = 0
    for path in reversed(list_checkpoints(directory)):
        if path == newest or step_of(path) > step_of(newest):
            usable += path == newest
            continue
        if usable < keep_last:
            with contextlib.suppress(CheckpointError):
                usable += not damage(path, read_manifest(path)["files"], hashes=False)
        elif keep is None or not keep(step_of(path)):
            discard(path)


def _merge_lanes(extra: dict[str, Any]) -> dict[str, Any]:
    """Rank 0's extra with the lanes of all ranks."""
    lanes = extra.get("lanes")
    merged = dict(mesh.broadcast_object(extra))
    gathered = mesh.gather_objects(lanes)
    if any(part is not None for part in gathered):
        merged["lanes"] = {lane: state for part in gathered if part for lane, state in part.items()}
    return merged


# ---------------------------------------------------------------------------------------------------------------------
# Load
# ---------------------------------------------------------------------------------------------------------------------


def read_training_state(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors: step, random, extra. Not collective, needs no model."""
    try:
        return _unpack(torch.load(path / TRAINING, map_location="cpu", weights_only=True))
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: {TRAINING} cannot be read ({error.strerror})") from None
    except Exception as error:  # torch's unpickler raises many kinds
        raise CheckpointError(f"checkpoint {path} is damaged: {TRAINING} cannot be read ({error})") from None


def load_checkpoint(
    path: Path,
    model_chunks: Sequence[nn.Module],
    optimizer: Optimizer | None = None,
) -> dict[str, Any]:
    """Load a checkpoint into the model, and into the optimizer if one is given; every rank calls this.

    Returns the ``extra`` it was saved with, all ranks' lanes in extra["lanes"]. With an optimizer, the random
    generators are set as well: to this rank's states at the same number of ranks, else to rank 0's. The optimizer's
    hyperparameters stay what they are: the recipe's.

    CheckpointError when the checkpoint is damaged or belongs to another model or optimizer; the message names the
    parameter. Nothing is changed then.
    """
    path = Path(path).absolute()
    share = slice(mesh.rank(), None, mesh.world_size())
    try:
        manifest = read_manifest(path)
        found = damage(path, manifest["files"], share, hashes=not was_verified(path))
        problem = f"checkpoint {path} is damaged: {found}" if found else ""
    except CheckpointError as error:
        problem = str(error)
    _raise_together(problem)
    training = read_training_state(path)
    state = _sharded_state(model_chunks, optimizer, is_loading=True)
    stored = {tensor.key: tuple(tensor.global_shape) for tensor in _stored_tensors(path)}
    # Ranks of other pipeline stages hold other parameters.
    wanted = {k: v for part in mesh.gather_objects(_shapes(state)) for k, v in part.items()}
    _raise_together(_difference(path, stored, wanted, with_optimizer=optimizer is not None))
    with torch.no_grad():
        loaded = compat.dist_checkpointing.load(state, str(path))
        for index, chunk in enumerate(model_chunks):
            _module(chunk).load_state_dict(loaded[f"model{index}"])
        if optimizer is not None:
            optimizer.load_state_dict(loaded["optimizer"])
    if optimizer is not None:
        states = training["random"]
        set_random_states(states[mesh.rank() if len(states) == mesh.world_size() else 0])
    mesh.barrier()
    return training["extra"]


def _raise_together(problem: str) -> None:
    """Raise CheckpointError on every rank when one has a problem."""
    problems = [found for found in mesh.gather_objects(problem) if found]
    if problems:
        raise CheckpointError(problems[0])


def _stored_tensors(path: Path) -> list[compat.ShardedTensor]:
    return list(compat.dist_checkpointing.load_tensors_metadata(str(path)).values())


def _shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {tensor.key: tuple(tensor.global_shape) for tensor in _tensors(state)}


def _difference(
    path: Path, stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], *, with_optimizer: bool
) -> str:
    """Why the checkpoint does not fit this model and optimizer, or "" when it does. Both: whole shapes by key."""
    for what in ("model", "optimizer") if with_optimizer else ("model",):
        ours, theirs = (
            {key: shape for key, shape in shapes.items() if key.startswith("optimizer.") == (what == "optimizer")}
            for shapes in (wanted, stored)
        )
        found = [
            f"{key} has shape {list(theirs[key])} there and {list(ours[key])} here"
            for key in ours
            if key in theirs and theirs[key] != ours[key]
        ]
        found += [f"{key} is not in the checkpoint" for key in ours if key not in theirs]
        found += [f"{key} is only in the checkpoint" for key in theirs if key not in ours]
        if found:
            more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
            remedy = "use the recipe it was trained with, or another run directory"
            return f"checkpoint {path} belongs to another {what}: {'; '.join(found[:3])}{more}; {remedy}"
    return ""
