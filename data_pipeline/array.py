"""Tokenizing over the tasks of a Slurm array: who takes which file, and the merge of what the tasks wrote.

    DIR.array/task-0003-of-0016/    like DIR.partial of a single call, closed by ``complete.json``
    DIR.array/merged/               what the merge has moved together so far; renamed to DIR at the end

Each step of the merge can be repeated, so a merge that was killed is called again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.shards import dtype_for, write_manifest
from data_pipeline.tokenizer import load_tokenizer

COMPLETE = "complete.json"
LEFTOVERS = ("*.index.npy", "*.hashes.npy", "*.done.json", "*.tmp", "request.json", "lock")
_QUARANTINE = "quarantine.jsonl"


def index_of(shard: Path) -> Path:
    """The index rows of one shard while the folder is being made."""
    return shard.with_name(shard.stem + ".index.npy")


def hashes_of(shard: Path) -> Path:
    """uint64 (documents, 2): hashes of the texts of one shard while the folder is being made."""
    return shard.with_name(shard.stem + ".hashes.npy")


def array_of_environment() -> tuple[int | None, int | None]:
    """(index, size) of the Slurm array task this process runs in, (None, None) outside of one."""
    index, size = os.environ.get("SLURM_ARRAY_TASK_ID"), os.environ.get("SLURM_ARRAY_TASK_COUNT")
    if index is None or size is None:
        return None, None
    return int(index) - int(os.environ.get("SLURM_ARRAY_TASK_MIN", 0)), int(size)


def share_of(files: list[Path], index: int, size: int) -> list[Path]:
    """The files of one task, in order: the largest file first, each to the task that has least so far."""
    if not 0 <= index < size:
        raise DataError(f"array task {index} of {size}: the index must be between 0 and {size - 1}")
    load = [0] * size
    mine = []
    for file in sorted(files, key=lambda f: (-f.stat().st_size, str(f))):
        task = load.index(min(load))
        load[task] += file.stat().st_size + 1
        if task == index:
            mine.append(file)
    return [file for file in files if file in set(mine)]


def array_folder(out: Path) -> Path:
    """Where the tasks write."""
    return out.with_name(out.name + ".array")


def task_folder(out: Path, index: int, size: int) -> Path:
    """Where one task writes."""
    return array_folder(out) / f"task-{index:04d}-of-{size:04d}"


def merge(out: str | Path, *, quiet: bool = False) -> dict[str, Any]:
    """Join what the tasks of an array wrote to the new folder ``out`` and return the manifest.

    With ``--dedup`` of the tasks, texts that several tasks hold keep one row of the index (the copies stay in their
    tars, unread). Safe to repeat after a kill at any moment.

    Raises DataError when tasks are missing or were not called alike.
    """
    out = Path(out)
    folder = array_folder(out)
    if not folder.is_dir():
        raise DataError(f"no array tasks beside {out} (no {folder}); run `hsa data tokenize ... --array-size N` first")
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"another process is merging {folder}; wait for it") from error
        merged, done = folder / "merged", folder / "done"
        if out.exists():
            if merged.exists() or not done.exists():
                raise DataError(f"{out} exists; remove it or choose another --out")
            manifest = json.loads((out / "manifest.json").read_bytes())  # killed after the last step but one
        else:
            merged.mkdir(exist_ok=True)
            manifest = _merge(merged, folder, _tasks(folder))
            done.touch()
            merged.rename(out)
        shutil.rmtree(folder)
    if not quiet:
        from data_pipeline.tokenizing import report

        report(out, manifest, 0.0, lambda text: print(text, file=sys.stderr, flush=True))
    return manifest


def _tasks(folder: Path) -> dict[str, dict[str, Any]]:
    names = sorted(f.name for f in folder.glob("task-*-of-*"))
    sizes = {name.rpartition("-")[2] for name in names}
    if len(sizes) != 1:
        raise DataError(f"{folder} holds tasks of arrays of different sizes ({', '.join(sorted(sizes))}); remove one")
    size = int(sizes.pop())
    wanted = [f"task-{i:04d}-of-{size:04d}" for i in range(size)]
    missing = [i for i, name in enumerate(wanted) if not (folder / name / COMPLETE).is_file()]
    if missing:
        shown = ",".join(map(str, missing[:20]))
        raise DataError(f"{len(missing)} of {size} tasks in {folder} are not done; run them again: --array={shown}")
    tasks = {name: json.loads((folder / name / COMPLETE).read_bytes()) for name in wanted}
    common = [{k: v for k, v in task["request"].items() if k != "files"} for task in tasks.values()]
    if any(request != common[0] for request in common):
        raise DataError(
            f"the tasks in {folder} were called with different options; remove it and run all of them again"
        )
    labels: dict[str, str] = {}
    for task in tasks.values():
        for label, name in task["labels"].items():
            if labels.setdefault(label, name) != name:
                raise DataError(f"the domains {labels[label]!r} and {name!r} need different names; rename one")
    return tasks


def _merge(merged: Path, folder: Path, tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found = [(shard, folder / name) for name, task in tasks.items() for shard in task["shards"]]
    found.sort(key=lambda pair: (pair[0]["domain"], pair[0]["file"]))
    if not found:
        raise DataError(f"no text in any task of {folder}: every record was left out")
    dedup = next(iter(tasks.values()))["request"]["dedup"] != "none"
    rows = [np.load(index_of(task / shard["file"])) for shard, task in found]
    dropped = 0
    if dedup:
        hashes = np.concatenate([np.load(hashes_of(task / shard["file"])) for shard, task in found])
        keep = np.zeros(len(hashes), dtype=bool)
        keep[np.unique(hashes, axis=0, return_index=True)[1]] = True
        dropped = int((~keep).sum())
        edges = np.cumsum([0, *map(len, rows)])
        rows = [part[keep[a:b]] for part, a, b in zip(rows, edges[:-1], edges[1:], strict=True)]
    shards, parts = [], []
    for (shard, task), part in zip(found, rows, strict=True):
        if not len(part):
            continue
        source, target = task / shard["file"], merged / shard["file"]
        if source.exists():
            source.replace(target)
        if not target.is_file() or target.stat().st_size != shard["bytes"]:
            raise DataError(f"{source} is missing or truncated; remove {task} and run its task again")
        shards.append(dict(shard))
        parts.append(part)
    tokenizer_file = next(folder / name / "tokenizer.json" for name in tasks)
    shutil.copy(tokenizer_file, merged / "tokenizer.json")
    left_out: dict[str, int] = {}
    with (merged / _QUARANTINE).open("wb") as all_of_them:
        for name, task_record in tasks.items():
            for reason, n in task_record["extra"]["left_out"].items():
                left_out[reason] = left_out.get(reason, 0) + n
            if (folder / name / _QUARANTINE).is_file():
                all_of_them.write((folder / name / _QUARANTINE).read_bytes())
    if not left_out:
        (merged / _QUARANTINE).unlink()
    extras = [task["extra"] for task in tasks.values()]
    extra = {
        "empty_documents": left_out.get("empty", 0),
        "text_bytes": sum(e["text_bytes"] for e in extras),
        "left_out": left_out,
        "duplicates_of_other_tasks": dropped,
        "sources": [source for e in extras for source in e["sources"]],
    }
    tokenizer = load_tokenizer(merged)
    for leftover in merged.glob("*.tmp"):
        leftover.unlink()
    return write_manifest(merged, tokenizer, dtype_for(tokenizer.vocab_size), shards, parts, extra)
