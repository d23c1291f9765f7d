"""What is left out of the shards, and why: broken records go to ``quarantine.jsonl``, duplicates are dropped."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.sources import BadRecord, Document, describe

DEDUP = ("none", "exact", "near")
"""exact: the same text, byte for byte. near: also a Jaccard similarity of the word 5-grams of about 0.8 or more."""
MAX_DOCUMENT_BYTES = 1 << 30
"""No document may have more tokens than the index can count (2^31 - 1)."""
QUARANTINE = "quarantine.jsonl"
_KEEP = 1 << 16  # bytes of a broken record that are kept with it
_SHINGLE, _PERMUTATIONS, _THRESHOLD = 5, 128, 0.8


def text_hash(text: str) -> bytes:
    """16 bytes that are the same for the same text only."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class Quarantine:
    """Counts what is left out and writes a line for each: source, place, reason, detail, the record's first bytes.

    strict: stop at the first broken record instead (empty documents and duplicates are no reason to stop).
    """

    def __init__(self, file: Path, strict: bool) -> None:
        self.counts: Counter[str] = Counter()
        self._strict = strict
        self._out = file.open("w", encoding="utf-8")

    def bad(self, record: BadRecord) -> None:
        """Put a broken record aside; DataError when strict."""
        if self._strict:
            raise DataError(record.message)
        self._write(record.source, record.place, record.reason, detail=record.message, data=record.data)

    def leave_out(self, document: Document, reason: str, detail: str | None = None, keep: bool = False) -> None:
        """Put a document aside."""
        data = document.text[:_KEEP].encode() if keep else None
        self._write(document.source, document.place, reason, detail=detail, data=data, id_=document.id)

    def _write(
        self, source: str, place: str, reason: str, *, detail: str | None, data: bytes | None, id_: str | None = None
    ) -> None:
        self.counts[reason] += 1
        line: dict[str, object] = {"source": source, "place": place, "reason": reason}
        if id_ is not None:
            line["id"] = id_
        if detail is not None:
            line["detail"] = detail
        if data is not None:
            line |= {"bytes": len(data), "data_base64": base64.b64encode(data[:_KEEP]).decode()}
        self._out.write(json.dumps(line, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Flush and close the file."""
        self._out.close()


class Deduplicator:
    """Recognises documents that were seen before. Memory: about 80 bytes a document (near: about 3 kB)."""

    def __init__(self, kind: str) -> None:
        if kind not in DEDUP:
            raise DataError(f"--dedup {kind}: choose from {', '.join(DEDUP)}")
        self._seen: set[bytes] | None = None if kind == "none" else set()
        self._index = None
        if kind == "near":
            try:
                import datasketch
            except ImportError as error:
                raise DataError(
                    '--dedup near needs the package datasketch: pip install "hsa-ultralong[data]", or use --dedup exact'
                ) from error
            self._minhash = datasketch.MinHash
            self._index = datasketch.MinHashLSH(threshold=_THRESHOLD, num_perm=_PERMUTATIONS)

    def seen(self, document: Document) -> str | None:
        """None for a new document (remembered from now on), else which kind of duplicate it is and of what."""
        if self._seen is None:
            return None
        digest = text_hash(document.text)
        if digest in self._seen:
            return "the same text as an earlier document"
        self._seen.add(digest)
        if self._index is None:
            return None
        words = document.text.split()
        shingles = {" ".join(words[i : i + _SHINGLE]) for i in range(max(1, len(words) - _SHINGLE + 1))}
        sketch = self._minhash(num_perm=_PERMUTATIONS, seed=1)
        sketch.update_batch([s.encode() for s in sorted(shingles)])
        alike = self._index.query(sketch)
        if alike:
            return f"nearly the text of {min(alike)}"
        self._index.insert(f"{document.source} {document.place}", sketch, check_duplication=False)
        return None


def clean(
    documents: Iterable[Document], quarantine: Quarantine, dedup: str, max_bytes: int = MAX_DOCUMENT_BYTES
) -> Iterator[tuple[Document, int]]:
    """(document, bytes of its text) of what is to be trained on; the rest is counted and written down."""
    duplicates = Deduplicator(dedup)
    for document in documents:
        if not document.text.strip():
            quarantine.leave_out(document, "empty")
            continue
        size = len(document.text.encode())
        if size > max_bytes:
            message = (
                f"{describe(document)} has {size:,} bytes of text, more than {max_bytes:,}; cut it or raise --max-mb"
            )
            quarantine.bad(
                BadRecord(document.source, document.place, "too long", message, document.text[:_KEEP].encode())
            )
            continue
        of = duplicates.seen(document)
        if of is not None:
            quarantine.leave_out(document, "duplicate", of)
            continue
        yield document, size
