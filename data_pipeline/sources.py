"""Reading documents from text and JSONL files. A broken file is one DataError with the place, never a wrong token."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from data_pipeline.errors import DataError

_JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_TEXT = (".txt", ".text", ".md")
HELD_OUT = "held_out"
"""Files of this name in a source folder are for evaluation; they are tokenized only when named themselves."""


@dataclass(frozen=True)
class Document:
    """One document: an id, its domain label, its text and where it came from."""

    id: str
    domain: str
    text: str
    source: str


def find_sources(sources: Iterable[str | Path]) -> list[Path]:
    """The files behind ``sources``: files as named, folders searched for .txt, .text, .md and .jsonl(.gz, .zst),
    sorted."""
    files: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            found = [f for f in sorted(source.rglob("*")) if f.is_file() and f.name.endswith(_JSONL + _TEXT)]
            found = [f for f in found if f.name.split(".")[0] != HELD_OUT]
            if not found:
                raise DataError(f"no text in {source}; it needs files named *{', *'.join(_TEXT + _JSONL)}")
            files += found
        elif source.is_file():
            files.append(source)
        else:
            raise DataError(f"no such source: {source}; give text or JSONL files, or a folder of them")
    return files


def read_documents(files: Iterable[Path], domain: str | None = None) -> Iterator[Document]:
    """Every document of ``files`` in order. ``domain`` overrides the records' own labels.

    A JSONL record is ``{"text": ..., "id"?, "domain"?, "source"?}``, its domain by default the file's stem; any other
    file is one document of the domain "text".
    """
    for file in files:
        if file.name.endswith(_JSONL):
            yield from _read_jsonl(file, domain)
        else:
            yield Document(file.stem, domain or "text", _decode(file.read_bytes(), file, 0), file.name)


def _read_jsonl(file: Path, domain: str | None) -> Iterator[Document]:
    offset = 0
    with _open(file) as lines:
        for number, line in enumerate(_guarded(lines, file), start=1):
            if line.strip():
                text = _decode(line, file, offset)
                try:
                    record = json.loads(text)
                    body = record["text"]
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        f'{file} line {number} is not a JSON object with a "text" ({error!r}); correct or remove '
                        "the line"
                    ) from error
                if not isinstance(body, str):
                    raise DataError(
                        f'{file} line {number}: "text" is {type(body).__name__}, not a string; correct the line'
                    )
                label = domain or record.get("domain") or file.name.split(".")[0]
                yield Document(
                    str(record.get("id", f"{file.name}:{number}")),
                    str(label),
                    body,
                    str(record.get("source", file.name)),
                )
            offset += len(line)


def _open(file: Path) -> IO[bytes]:
    if file.suffix == ".gz":
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if file.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise DataError(
                f"reading {file} needs the package zstandard; pip install zstandard or decompress it"
            ) from error
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file.open("rb"), read_across_frames=True))
    return file.open("rb")


def _guarded(lines: IO[bytes], file: Path) -> Iterator[bytes]:
    """The lines, with what a truncated or damaged archive raises turned into a DataError."""
    iterator = iter(lines)
    while True:
        try:
            line = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # gzip, zlib and zstandard each have their own
            raise DataError(f"{file} is damaged or truncated ({error}); copy it again") from error
        yield line


def _decode(data: bytes, file: Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8: byte {offset + error.start} is {data[error.start]:#04x}; convert it, for example "
            f"with `iconv -f latin1 -t utf-8`"
        ) from error
