"""A checkpoint as files: names, manifest, verification, deletion. Needs neither torch nor Megatron; not collective."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from parallel.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LATEST = "latest"
TEMPORARY, TRASH = ".tmp-", ".trash-"
_STEP = re.compile(r"step_(\d{8,})")
_HASH_BLOCK = 1 << 22

# Checkpoints whose every byte this process has checked; saves a second reading between find_latest and load_checkpoint.
_verified: set[Path] = set()


def step_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is or will be."""
    return directory / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; CheckpointError when the name is not that of a checkpoint."""
    match = _STEP.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint: its name should be step_ and eight digits")
    return int(match[1])


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoint directories by step, oldest first, unverified; empty when the directory is missing."""
    if not directory.is_dir():
        return []
    return sorted((p for p in directory.iterdir() if p.is_dir() and _STEP.fullmatch(p.name)), key=step_of)


def clean_temporary(directory: Path) -> None:
    """Remove what killed saves and deletions left. For the process that owns the run directory, before it saves.

    A save killed when everything was written and only the name was missing is given its name.
    """
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if not path.name.startswith((TEMPORARY, TRASH)):
            continue
        final = directory / path.name.removeprefix(TEMPORARY)
        if _STEP.fullmatch(final.name) and not final.exists():
            with contextlib.suppress(CheckpointError):
                verify(path)
                path.rename(final)
                continue
        remove(path)


def remove(path: Path) -> None:
    """Delete a file or a directory tree; nothing happens when it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path, *, sync: bool = False) -> str:
    """Hex digest of a file, which is flushed to the disk first if asked."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Make names created or renamed in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, text: str) -> None:
    """Write a small file aside, sync it, and move it into place."""
    aside = path.with_name(f"{TEMPORARY}{path.name}")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_directory(path.parent)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; CheckpointError when it is missing or cannot be read."""
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        return {**manifest, "files": files}
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} cannot be read ({error})") from None


def damage(path: Path, files: dict[str, tuple[int, str]], share: slice = slice(None), *, hashes: bool = True) -> str:
    """What is wrong with the files of a checkpoint, or "". Sizes of all, contents of this share of them."""
    for name, (size, _) in files.items():
        try:
            found = (path / name).stat().st_size
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
    if hashes:
        names = sorted(files)[share]
        with ThreadPoolExecutor(min(8, len(names)) or 1) as pool:
            try:
                for name, digest in zip(names, pool.map(lambda name: sha256(path / name), names), strict=True):
                    if digest != files[name][1]:
                        return f"the contents of {name} have changed (sha256)"
            except OSError as error:
                return f"{error.filename} cannot be read ({error.strerror})"
    return ""


def verify(path: Path) -> None:
    """Check every byte of a checkpoint against its manifest; CheckpointError names what is wrong."""
    found = damage(path, read_manifest(path)["files"])
    if found:
        raise CheckpointError(f"checkpoint {path} is damaged: {found}")
    _verified.add(path.resolve())


def find_latest(directory: Path) -> Path | None:
    """The newest checkpoint that verifies; None when there is none at all.

    A damaged one is named in a warning and the one before it is tried. CheckpointError when all are damaged.
    """
    damaged = []
    for path in reversed(list_checkpoints(directory)):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            damaged.append(str(error))
            logger.warning("%s; trying the one before it", error)
    if damaged:
        remedy = "restore one of them from a copy, or move the run directory away to start over"
        raise CheckpointError(f"no usable checkpoint in {directory}: {'; '.join(damaged)}; {remedy}")
    return None


def discard(path: Path) -> None:
    """Delete a checkpoint so that at no moment a part of it bears its name."""
    _verified.discard(path.resolve())
    trash = path.with_name(TRASH + path.name)
    remove(trash)
    path.rename(trash)
    remove(trash)


def was_verified(path: Path) -> bool:
    """True when ``verify`` has passed this checkpoint in this process."""
    return path.resolve() in _verified
