"""Reading documents from text, JSONL and Parquet files.

A broken record is one DataError with the place, or is handed to a callback; it is never a wrong token.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from data_pipeline.errors import DataError

_JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_TEXT = (".txt", ".text", ".md")
_PARQUET = (".parquet",)
HELD_OUT = "held_out"
"""Files of this name in a source folder are for evaluation; they are tokenized only when named themselves."""


@dataclass(frozen=True)
class Document:
    """One document: an id, its domain label, its text, the file it came from and the place in it."""

    id: str
    domain: str
    text: str
    source: str
    place: str = ""


@dataclass(frozen=True)
class BadRecord:
    """A record that is no document. reason: a few words to count by. message: what is wrong, where, what to do."""

    source: str
    place: str
    reason: str
    message: str
    data: bytes


Bad = Callable[[BadRecord], None]


def _stop(record: BadRecord) -> NoReturn:
    raise DataError(record.message)


def describe(document: Document) -> str:
    """File and place of a document."""
    return f"{document.source} {document.place}".strip()


def find_sources(sources: Iterable[str | Path]) -> list[Path]:
    """The files behind ``sources``: files as named, folders searched for .txt, .text, .md, .jsonl(.gz, .zst) and
    .parquet, sorted."""
    files: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            kinds = _TEXT + _JSONL + _PARQUET
            found = [f for f in sorted(source.rglob("*")) if f.is_file() and f.name.endswith(kinds)]
            found = [f for f in found if f.name.split(".")[0] != HELD_OUT]
            if not found:
                raise DataError(f"no text in {source}; it needs files named *{', *'.join(kinds)}")
            files += found
        elif source.is_file():
            files.append(source)
        else:
            raise DataError(f"no such source: {source}; give text, JSONL or Parquet files, or a folder of them")
    return files


def is_compressed(file: Path) -> bool:
    """Whether the file holds several times its own size of text."""
    return file.suffix in (".gz", ".zst", ".parquet")


def read_documents(files: Iterable[Path], domain: str | None = None, bad: Bad = _stop) -> Iterator[Document]:
    """Every document of ``files`` in order. ``domain`` overrides the records' own labels.

    A JSONL record is ``{"text": ..., "id"?, "domain"?, "source"?}``, its domain by default the file's stem, a Parquet
    row has these columns; any other file is one document of the domain "text". ``bad`` gets every record that is no
    document (by default the first one is a DataError). A damaged archive is a DataError in any case: nobody knows how
    much of it is lost.
    """
    for file in files:
        if file.name.endswith(_JSONL):
            yield from _read_jsonl(file, domain, bad)
        elif file.name.endswith(_PARQUET):
            yield from _read_parquet(file, domain, bad)
        else:
            text = _decode(file.read_bytes(), file, 0, "", bad)
            if text is not None:
                yield Document(file.stem, domain or "text", text, file.name)


def _read_jsonl(file: Path, domain: str | None, bad: Bad) -> Iterator[Document]:
    offset = 0
    with _open(file) as lines:
        for number, line in enumerate(_guarded(lines, file), start=1):
            if line.strip():
                text = _decode(line, file, offset, f"line {number}", bad)
                document = None if text is None else _record(text, line, file, number, domain, bad)
                if document is not None:
                    yield document
            offset += len(line)


def _record(text: str, line: bytes, file: Path, number: int, domain: str | None, bad: Bad) -> Document | None:
    place = f"line {number}"
    try:
        record = json.loads(text)
        body = record["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        message = f'{file} {place} is not a JSON object with a "text" ({error!r}); correct or remove the line'
        bad(BadRecord(file.name, place, "no JSON text", message, line))
        return None
    if not isinstance(body, str):
        message = f'{file} {place}: "text" is {type(body).__name__}, not a string; correct the line'
        bad(BadRecord(file.name, place, "no JSON text", message, line))
        return None
    return _document(body, record, file, place, f"{file.name}:{number}", domain, line, bad)


def _document(
    body: str, record: dict[str, Any], file: Path, place: str, default_id: str, domain: str | None, raw: bytes, bad: Bad
) -> Document | None:
    try:
        body.encode()
    except UnicodeEncodeError as error:  # "\ud800" in JSON
        message = f"{file} {place}: the text has half a surrogate pair at character {error.start}; correct the record"
        bad(BadRecord(file.name, place, "not UTF-8", message, raw))
        return None

    def label(key: str, default: str) -> str:
        value = record.get(key)
        return default if value is None else str(value).encode("utf-8", "replace").decode()

    name = domain or label("domain", "") or file.name.split(".")[0]
    return Document(label("id", default_id), name, body, label("source", file.name), place)


def _read_parquet(file: Path, domain: str | None, bad: Bad) -> Iterator[Document]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f'reading {file} needs the package pyarrow; pip install "hsa-ultralong[data]" or give JSONL'
        ) from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} is no Parquet file, damaged or truncated ({error}); copy it again") from error
    with table:
        columns = [c for c in ("text", "id", "domain", "source") if c in table.schema_arrow.names]
        if "text" not in columns:
            there = ", ".join(table.schema_arrow.names)
            raise DataError(f'{file} has no column "text" (there: {there}); rename the column that holds the text')
        number = 0
        for batch in _guarded(table.iter_batches(batch_size=256, columns=columns), file):
            for record in batch.to_pylist():
                number += 1
                place, body = f"row {number}", record["text"]
                if isinstance(body, bytes):
                    body = _decode(body, file, 0, place, bad)
                    if body is None:
                        continue
                if not isinstance(body, str):
                    message = f'{file} {place}: "text" is {type(body).__name__}, not a string; correct the row'
                    bad(BadRecord(file.name, place, "no text", message, b""))
                    continue
                document = _document(body, record, file, place, f"{file.name}:{number}", domain, b"", bad)
                if document is not None:
                    yield document


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


def _guarded(records: Iterable[Any], file: Path) -> Iterator[Any]:
    """The lines or batches, with what a truncated or damaged archive raises turned into a DataError."""
    iterator = iter(records)
    while True:
        try:
            record = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # gzip, zlib, zstandard and pyarrow each have their own
            raise DataError(f"{file} is damaged or truncated ({error}); copy it again") from error
        yield record


def _decode(data: bytes, file: Path, offset: int, place: str, bad: Bad) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{file} {place}".strip() if place.startswith("row") else str(file)
        message = (
            f"{where} is not UTF-8: byte {offset + error.start} is {data[error.start]:#04x}; convert it, for example "
            f"with `iconv -f latin1 -t utf-8`"
        )
        bad(BadRecord(file.name, place, "not UTF-8", message, data))
        return None
