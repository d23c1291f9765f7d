"""The readers that the large set adds to the demo's: a dictionary, Python's standard library, Linux.

Files of one directory make one document, so that there is text much longer than a training context.
"""

from __future__ import annotations

import gzip
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.extract import read_text, tidy

_PIECE = 200_000  # characters of one document of the dictionary
_CORE = ("fs", "kernel", "lib", "mm", "net")
_TABLES = ("fs/nls", "lib/fonts")  # numbers, hardly any code


def dictionary(root: Path) -> Iterator[tuple[str, str]]:
    """GCIDE, cut between entries into documents of about 200,000 characters."""
    with gzip.open(root / "usr/share/dictd/gcide.dict.dz") as file:
        text = file.read().decode("utf-8", errors="replace")
    text = text[text.index("\nA \\") + 1 :] if "\nA \\" in text else text
    start = number = 0
    while start < len(text):
        # an entry begins with its headword at the left margin, everything else of it is indented
        entry = re.compile(r"^\S", re.M).search(text, start + _PIECE)
        end = entry.start() if entry else len(text)
        yield f"gcide/{number:04d}", tidy(text[start:end])
        start, number = end, number + 1


def python_library(root: Path) -> Iterator[tuple[str, str]]:
    """The standard library: one document a package directory, one a module outside of packages."""
    folder = root / "usr/lib/python3.11"
    files = [f for f in sorted(folder.rglob("*.py")) if f.is_file() and not f.is_symlink()]
    named = ((str(f.relative_to(folder)), read_text(f)) for f in files)
    yield from _by_directory(named, alone="")


def linux(root: Path) -> Iterator[tuple[str, str]]:
    """C files of the kernel's core, one document a directory."""
    return _by_directory(_linux(root, ".c", _CORE), alone=None)


def linux_documentation(root: Path) -> Iterator[tuple[str, str]]:
    """The kernel's documentation, one document a directory; translations are left out."""
    return _by_directory(_linux(root, ".rst", ("Documentation",)), alone=None)


def _linux(root: Path, suffix: str, folders: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    archives = sorted(root.glob("usr/src/linux-source-*.tar.xz"))
    if not archives:
        raise DataError(f"no linux-source archive under {root}/usr/src: the package's layout has changed")
    members = []
    with tarfile.open(archives[0], "r|xz") as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            if not (member.isfile() and name.endswith(suffix) and name.split("/")[0] in folders):
                continue
            if name.startswith((*_TABLES, "Documentation/translations")):
                continue
            file = archive.extractfile(member)
            assert file is not None
            members.append((name, file.read().decode("utf-8", errors="replace")))
    yield from sorted(members)


def _by_directory(files: Iterable[tuple[str, str]], alone: str | None) -> Iterator[tuple[str, str]]:
    """Join the files of a directory, each under its name. ``alone``: a directory whose files stay documents of their
    own."""
    joined: dict[str, list[str]] = {}
    for name, text in files:
        folder = name.rpartition("/")[0]
        key = name if folder == alone else folder
        joined.setdefault(key, []).append(f"{name}\n\n{tidy(text)}")
    for key, texts in joined.items():
        yield key.replace("/", "."), "\n".join(texts)
