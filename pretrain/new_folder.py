"""Folders that exist whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pretrain.errors import RunDirError


@contextlib.contextmanager
def whole_folder(target: Path, *, marker: str, option: str) -> Iterator[Path]:
    """Yield a folder beside `target` to write into; it becomes `target` when the block ends without an error.

    An existing target is replaced when it is empty or holds the file `marker` (it was written by the same command), and
    refused otherwise: RunDirError, naming the command's `option`.
    """
    target = target.absolute()
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or (target / marker).is_file())):
        raise RunDirError(f"{option}: {target} holds something else (no {marker} in it): choose another folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise RunDirError(f"{option}: cannot write to {target.parent}: {error.strerror}") from None
    try:
        yield aside
        aside.chmod(0o755)  # mkdtemp makes private folders
        for file in aside.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            target.rename(old / target.name)
            aside.rename(target)
            shutil.rmtree(old)
        else:
            aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
