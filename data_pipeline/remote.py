"""Shards that lie elsewhere: fetched whole into a local cache when they are first needed, through webdataset's openers.

http://host/shards                               https, sftp, gs, hf ... as webdataset knows them
pipe:aws s3 cp s3://bucket/shards/{file} -       any command that writes the file to its standard output
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

from data_pipeline.errors import DataError

TRIES = 5
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds, doubled from try to try
_PIECE = 1 << 20


def is_remote(path: str | Path) -> bool:
    """Whether ``path`` is a URL or a ``pipe:`` command."""
    return str(path).startswith("pipe:") or "://" in str(path)


def cache_folder() -> Path:
    """``$HSA_SHARD_CACHE``, else ``hsa/shards`` in the user's cache. Nothing is ever removed from it."""
    if folder := os.environ.get("HSA_SHARD_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hsa" / "shards"


class RemoteFolder:
    """A folder of shards behind ``url``; ``path`` is where its files are kept on this machine.

    A file is written aside, compared with the size and sha256 that the manifest gives, and renamed, so several
    processes can share the cache. A file that cannot be had after TRIES tries is not tried again by this process.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        if url.startswith("pipe:") and "{file}" not in url:
            raise DataError(f"{url} does not say where the file's name belongs; write {{file}} in the command")
        self.path = cache_folder() / hashlib.sha256(url.encode()).hexdigest()[:16]
        self._failed: dict[str, str] = {}

    def fetch(self, name: str, size: int | None = None, sha256: str | None = None) -> Path:
        """The local file ``name``. Without a size it is fetched anew (the manifest). DataError when it can't be had."""
        file = self.path / name
        if size is not None and file.is_file() and file.stat().st_size == size:
            return file
        if name in self._failed:
            raise DataError(self._failed[name])
        wait, problem = _FIRST_WAIT, ""
        for attempt in range(TRIES):
            if attempt:
                print(f"hsa: {name} of {self.url}: {problem}; trying again in {wait:g} s", file=sys.stderr, flush=True)
                time.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
            try:
                return self._download(name, file, size, sha256)
            except _Incomplete as error:
                problem = str(error)
        self._failed[name] = (
            f"{name} of {self.url} could not be fetched in {TRIES} tries: {problem}; check the address, the network "
            "and the access rights"
        )
        raise DataError(self._failed[name])

    def _download(self, name: str, file: Path, size: int | None, sha256: str | None) -> Path:
        from webdataset.gopen import gopen

        url = self.url.replace("{file}", name) if self.url.startswith("pipe:") else f"{self.url.rstrip('/')}/{name}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            aside = file.with_name(f"{name}.{os.getpid()}.tmp")
            digest, done = hashlib.sha256(), 0
            out = aside.open("wb")
        except OSError as error:
            raise DataError(
                f"cannot write {file}: {error.strerror}; set HSA_SHARD_CACHE to a writable folder"
            ) from error
        try:
            with out:
                try:
                    stream = gopen(url, "rb")
                except (OSError, ValueError) as error:
                    raise _Incomplete(str(error)) from error
                try:
                    while piece := _read(stream):
                        out.write(piece)
                        digest.update(piece)
                        done += len(piece)
                finally:
                    _close(stream)
            if size is None:
                _check_json(aside)
            elif done != size:
                raise _Incomplete(f"{done} bytes came where the manifest says {size}")
            if sha256 and digest.hexdigest() != sha256:
                raise _Incomplete("what came has another sha256 than the manifest says")
            aside.replace(file)
        finally:
            aside.unlink(missing_ok=True)
        return file


class _Incomplete(Exception):
    """A try that failed."""


def _read(stream) -> bytes:
    try:
        return stream.read(_PIECE)
    except OSError as error:  # the command behind a pipe failed
        raise _Incomplete(str(error)) from error


def _close(stream) -> None:
    try:
        stream.close()
    except OSError as error:
        raise _Incomplete(str(error)) from error


def _check_json(file: Path) -> None:
    try:
        json.loads(file.read_bytes())
    except ValueError as error:
        raise _Incomplete(f"no manifest came ({file.stat().st_size} bytes)") from error
