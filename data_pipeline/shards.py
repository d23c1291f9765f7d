"""The shard format: WebDataset tars of pretokenised documents, one index, one manifest. docs/data.md is the
description.

    DIR/manifest.json            counts, hashes, tokenizer, dtype, domains and shards in index order
    DIR/index.npy                INDEX_DTYPE, one row per document: where its tokens are
    DIR/tokenizer.json           the tokenizer that made the ids
    DIR/<domain>-000000.tar      members <key>.tokens.u16 (or .u32) and <key>.json, documents closed by the eos token

Tokens are little-endian and contiguous inside the tar (members start on 512 bytes), so a document is one ``pread``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import sys
import tarfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.remote import RemoteFolder, is_remote
from data_pipeline.tokenizer import Tokenizer, load_tokenizer

FORMAT = "hsa-token-shards"
VERSION = 1
INDEX_DTYPE = np.dtype([("offset", "<i8"), ("length", "<i4"), ("shard", "<i4"), ("crc32", "<u4")])
"""offset: bytes from the start of the tar to the first token; length: tokens, eos included; shard: row of the
manifest."""
_DTYPES: dict[str, tuple[str, np.dtype]] = {
    "uint16": ("tokens.u16", np.dtype("<u2")),
    "uint32": ("tokens.u32", np.dtype("<u4")),
}
WHOLE = 1 << 18
"""Documents of at most this many tokens are read and kept whole while a lane goes through them."""
_BLOCK = 512


def dtype_for(vocab_size: int) -> str:
    """The smallest of "uint16" and "uint32" that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write aside, flush to the disk, rename: ``path`` is the old file or the new one, never half of it."""
    aside = _aside(path)
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_array(path: Path, array: np.ndarray) -> None:
    """:func:`write_atomically` of a ``.npy`` file."""
    data = io.BytesIO()
    np.save(data, array)
    write_atomically(path, data.getbuffer())


def _aside(path: Path) -> Path:
    """A name beside ``path`` that no other process writes to."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def write_shard(path: Path, documents: Iterable[tuple[dict[str, Any], np.ndarray]], dtype: str) -> np.ndarray:
    """Write one tar at ``path`` (aside, then renamed) and return its index rows with ``shard`` = 0.

    documents: (meta, ids) in order; ids end with eos. meta needs no keys; "length" is added. The tar is deterministic.
    """
    suffix, kind = _DTYPES[dtype]
    rows = []
    aside = _aside(path)
    with aside.open("wb") as file:
        for number, (meta, ids) in enumerate(documents):
            key = f"{path.stem}-{number:08d}"
            payload = np.ascontiguousarray(ids, dtype=kind).tobytes()
            offset = _write_member(file, f"{key}.{suffix}", payload)
            _write_member(file, f"{key}.json", json.dumps({**meta, "length": len(ids)}, ensure_ascii=False).encode())
            rows.append((offset, len(ids), 0, zlib.crc32(payload)))
        file.write(b"\0" * (2 * _BLOCK))
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    return np.array(rows, dtype=INDEX_DTYPE)


def _write_member(file: Any, name: str, payload: bytes) -> int:
    info = tarfile.TarInfo(name)
    info.size = len(payload)
    file.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = file.tell()
    file.write(payload)
    file.write(b"\0" * (-len(payload) % _BLOCK))
    return offset


class OpenFiles:
    """The shards that this process holds open, oldest first: opening one anew for every document would make steps
    dearer the more shards there are. All but 256 of the files that RLIMIT_NOFILE allows (or half of them, where that is
    more); then the oldest is closed."""

    def __init__(self) -> None:
        self._owners: dict[int, tuple[dict[int, int], int]] = {}

    def open(self, file: Path, owner: dict[int, int], shard: int) -> int:
        """A handle of ``file``, also put into ``owner[shard]`` and taken from there when it is closed."""
        while len(self._owners) >= self.limit():
            self.close(next(iter(self._owners)))
        handle = os.open(file, os.O_RDONLY)
        self._owners[handle] = owner, shard
        owner[shard] = handle
        return handle

    def close(self, handle: int) -> None:
        """Close a handle of :meth:`open`."""
        owner, shard = self._owners.pop(handle)
        del owner[shard]
        os.close(handle)

    def limit(self) -> int:
        """How many shards may be open."""
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return max(1, allowed // 2, allowed - 256) if allowed != resource.RLIM_INFINITY else sys.maxsize


OPEN_FILES = OpenFiles()


@dataclass(frozen=True)
class Domain:
    """A domain's rows of the index: documents first .. first + documents - 1, holding ``tokens`` tokens."""

    name: str
    first: int
    documents: int
    tokens: int


class ShardSet:
    """An opened folder of shards; documents are numbered by their row in the index.

    Opening reads the manifest, maps the index and compares file sizes (no shard is opened). Reading opens shards when
    they are first needed and keeps them open as far as the process may (:class:`OpenFiles`). A folder behind a URL or
    ``pipe:`` (see ``remote.py``) is fetched file by file into a cache.

    Raises DataError, naming the file and what to do, for a missing, truncated or foreign file.
    """

    def __init__(self, path: str | Path) -> None:
        self._remote = RemoteFolder(str(path)) if is_remote(path) else None
        self.path = Path(path) if self._remote is None else self._remote.path
        if self._remote is not None:
            self._remote.fetch("manifest.json")
        manifest = read_manifest(self.path)
        self.manifest = manifest
        self.dtype_name: str = manifest["dtype"]
        self.dtype = _DTYPES[self.dtype_name][1]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.tokenizer_fingerprint: str = manifest["tokenizer"]["fingerprint"]
        self.fingerprint: str = manifest["index"]["sha256"]
        self.documents: int = manifest["documents"]
        self.tokens: int = manifest["tokens"]
        self.domains = [Domain(d["name"], d["first"], d["documents"], d["tokens"]) for d in manifest["domains"]]
        self.shard_files = [self.path / shard["file"] for shard in manifest["shards"]]
        if not self.documents:
            raise DataError(f"{self.path} holds no documents; {_REMAKE}")
        index_file = self.path / manifest["index"]["file"]
        if self._remote is None:
            for file, shard in zip(self.shard_files, manifest["shards"], strict=True):
                _check_size(file, shard["bytes"])
        else:
            self._remote.fetch(index_file.name, manifest["index"]["bytes"], manifest["index"]["sha256"])
        _check_size(index_file, manifest["index"]["bytes"])
        try:
            self.index = np.load(index_file, mmap_mode="r").view(np.ndarray)
        except ValueError as error:
            raise DataError(f"{index_file} is not an index ({error}); {_REMAKE}") from error
        if self.index.dtype != INDEX_DTYPE or len(self.index) != self.documents:
            raise DataError(f"{index_file} does not describe the {self.documents} documents of the manifest; {_REMAKE}")
        self._files = OPEN_FILES
        self._open: dict[int, int] = {}

    def local(self, shard: int) -> Path:
        """The file of a shard on this machine, fetched if it lies elsewhere."""
        if self._remote is not None:
            entry = self.manifest["shards"][shard]
            self._remote.fetch(entry["file"], entry["bytes"], entry["sha256"])
        return self.shard_files[shard]

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise DataError unless ``tokenizer`` is the one that made the ids."""
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise DataError(
                f"the shards in {self.path} were made with another tokenizer than {tokenizer.path} (fingerprints "
                f"{self.tokenizer_fingerprint[:12]} and {tokenizer.fingerprint[:12]}); set data.tokenizer to "
                f"{self.path / 'tokenizer.json'} or tokenize the text again"
            )

    def domain(self, name: str) -> Domain:
        """The domain ``name``, or every document for ``"*"``."""
        if name == "*":
            return Domain("*", 0, self.documents, self.tokens)
        for domain in self.domains:
            if domain.name == name:
                return domain
        names = ", ".join(d.name for d in self.domains)
        raise DataError(f"no domain {name!r} in {self.path}; it has {names} (or use domain: '*' for all)")

    def read(self, document: int, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count of a document, in the shards' own dtype. Only the size read is checked."""
        row = self.index[document]
        size = self.dtype.itemsize
        data = self._pread(int(row["shard"]), count * size, int(row["offset"]) + start * size)
        return np.frombuffer(data, dtype=self.dtype)

    def document(self, document: int) -> np.ndarray | None:
        """All tokens of a document, checked against its checksum; None (checked, not kept) above ``WHOLE`` tokens."""
        return self.load(document, *self.index[document].tolist())

    def load(self, document: int, offset: int, length: int, shard: int, crc32: int) -> np.ndarray | None:
        """:meth:`document` with the index row at hand: one read and one checksum, which also tells an index or a dtype
        that belongs to another shard. That its ids are in the vocabulary is for :meth:`check_tokens` to find."""
        if length > WHOLE:
            self.check_document(document)
            return None
        data = self._pread(shard, length * self.dtype.itemsize, offset)
        if zlib.crc32(data) != crc32:
            self._refuse(document)
        return np.frombuffer(data, self.dtype)

    def check_tokens(self, document: int) -> None:
        """Raise DataError for a token outside the vocabulary."""
        length, step = int(self.index[document]["length"]), 1 << 22
        for start in range(0, length, step):
            largest = int(self.read(document, start, min(step, length - start)).max())
            if largest >= self.vocab_size:
                raise DataError(
                    f"{self.shard_files[int(self.index[document]['shard'])]} holds the token {largest}, outside the "
                    f"vocabulary of {self.vocab_size}; {_REMAKE}"
                )

    def check_document(self, document: int) -> None:
        """Compare a document with its index row and checksum; DataError when it is not what was written."""
        row = self.index[document]
        left, offset = int(row["length"]) * self.dtype.itemsize, int(row["offset"])
        self._check_header(row)
        crc = 0
        while left:
            block = self._pread(int(row["shard"]), min(left, 1 << 24), offset)
            crc, left, offset = zlib.crc32(block, crc), left - len(block), offset + len(block)
        if crc != int(row["crc32"]):
            self._refuse(document)

    def _check_header(self, row: np.void) -> None:
        """The tar header in front of the tokens must announce exactly these bytes: the index is not another shard's."""
        offset, shard = int(row["offset"]), int(row["shard"])
        header = self._pread(shard, _BLOCK, offset - _BLOCK)
        size = header[124:135]
        wanted = int(row["length"]) * self.dtype.itemsize
        if header[257:262] != b"ustar" or not size.isdigit() or int(size, 8) != wanted:
            raise DataError(f"{self.shard_files[shard]} does not match its index at byte {offset}; {_REMAKE}")

    def _refuse(self, document: int) -> NoReturn:
        """Raise the DataError for a document with another checksum than the index says."""
        row = self.index[document]
        self._check_header(row)
        raise DataError(
            f"{self.shard_files[int(row['shard'])]} is damaged: the document at byte {int(row['offset'])} has another "
            f"checksum; {_REMAKE}"
        )

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        handle = self._open.get(shard)
        if handle is None:
            self.local(shard)
            try:
                handle = self._files.open(self.shard_files[shard], self._open, shard)
            except OSError as error:
                raise DataError(f"cannot open shard {self.shard_files[shard]}: {error.strerror}; {_REMAKE}") from error
        data = os.pread(handle, size, offset)
        if len(data) != size:
            raise DataError(f"{self.shard_files[shard]} is truncated at byte {offset + len(data)}; {_REMAKE}")
        return data

    def close(self) -> None:
        """Close the open shards; reading opens them again."""
        for handle in list(self._open.values()):
            self._files.close(handle)

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()


_REMAKE = "copy it again from the original or run `hsa data tokenize` again"


def _check_size(file: Path, size: int) -> None:
    try:
        actual = file.stat().st_size
    except OSError as error:
        raise DataError(f"{file} is missing ({error.strerror}) though the manifest lists it; {_REMAKE}") from error
    if actual != size:
        word = "truncated" if actual < size else "not the file that was written"
        raise DataError(f"{file} is {word}: {actual} bytes where the manifest says {size}; {_REMAKE}")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a folder of shards; DataError when there is none that this version reads."""
    file = path / "manifest.json"
    if not file.is_file():
        raise DataError(
            f"no token shards at {path} (no manifest.json); make them with `hsa data tokenize SRC --out {path} "
            "--tokenizer T` or correct the path in data.mix"
        )
    try:
        manifest = json.loads(file.read_bytes())
        known = manifest["format"] == FORMAT and manifest["version"] == VERSION and manifest["dtype"] in _DTYPES
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a shard manifest ({error!r}); {_REMAKE}") from error
    if not known:
        raise DataError(
            f"{file} is {manifest.get('format')} version {manifest.get('version')} with dtype "
            f"{manifest.get('dtype')}; this version reads {FORMAT} version {VERSION} with dtype "
            f"{' or '.join(_DTYPES)}"
        )
    return manifest


def write_manifest(
    path: Path,
    tokenizer: Tokenizer,
    dtype: str,
    shards: list[dict[str, Any]],
    rows: list[np.ndarray],
    extra: dict[str, Any],
) -> dict[str, Any]:
    """Write index.npy and then manifest.json for finished ``shards`` (file, domain, bytes, sha256) and their index
    rows.

    Shards of one domain must follow one another. The manifest comes last: with it the folder is complete.
    """
    for number, part in enumerate(rows):
        part["shard"] = number
    index = np.concatenate(rows)
    index_file = path / "index.npy"
    write_array(index_file, index)
    domains: dict[str, dict[str, Any]] = {}
    first = 0
    for shard, part in zip(shards, rows, strict=True):
        shard |= {"documents": len(part), "tokens": int(part["length"].sum(dtype=np.int64))}
        domain = domains.setdefault(
            shard["domain"], {"name": shard["domain"], "first": first, "documents": 0, "tokens": 0, "shards": 0}
        )
        domain["documents"] += shard["documents"]
        domain["tokens"] += shard["tokens"]
        domain["shards"] += 1
        first += len(part)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype,
        "documents": len(index),
        "tokens": int(index["length"].sum(dtype=np.int64)),
        "tokenizer": {
            "file": "tokenizer.json",
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
        },
        "domains": list(domains.values()),
        "index": {"file": "index.npy", "bytes": index_file.stat().st_size, "sha256": sha256_file(index_file)},
        **extra,
        "shards": shards,
    }
    write_atomically(path / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False).encode())
    return manifest


def verify(path: str | Path) -> dict[str, Any]:
    """Check every byte: sizes, sha256 of tokenizer, index and shards, counts, every id inside the vocabulary.

    Returns the manifest; raises one DataError that names the first damaged file and how many there are.
    """
    data = ShardSet(path)
    manifest = data.manifest
    hashes = [
        (data.path / manifest["index"]["file"], manifest["index"]["sha256"]),
        (data.path / manifest["tokenizer"]["file"], manifest["tokenizer"]["fingerprint"]),
    ]
    hashes += [(f, s["sha256"]) for f, s in zip(data.shard_files, manifest["shards"], strict=True)]
    if is_remote(path):
        load_tokenizer(path)
        for shard in range(len(data.shard_files)):
            data.local(shard)
    for file, _ in hashes[:2]:
        if not file.is_file():
            raise DataError(f"{file} is missing; {_REMAKE}")
    with ThreadPoolExecutor() as pool:
        found = pool.map(sha256_file, [file for file, _ in hashes])
        damaged = [file for (file, wanted), got in zip(hashes, found, strict=True) if wanted != got]
    if damaged:
        more = f" (and {len(damaged) - 1} more files)" if len(damaged) > 1 else ""
        raise DataError(f"{damaged[0]} is damaged: its sha256 is not the manifest's{more}; {_REMAKE}")
    lengths = data.index["length"].astype(np.int64)
    counts = np.bincount(data.index["shard"], minlength=len(data.shard_files))
    tokens = np.bincount(data.index["shard"], weights=lengths, minlength=len(data.shard_files)).astype(np.int64)
    for number, shard in enumerate(manifest["shards"]):
        if counts[number] != shard["documents"] or tokens[number] != shard["tokens"]:
            raise DataError(
                f"{data.path / 'manifest.json'} counts {shard['documents']} documents and {shard['tokens']} "
                f"tokens in {shard['file']}, the index {counts[number]} and {tokens[number]}; {_REMAKE}"
            )
    for document in range(data.documents):
        data.check_document(document)
        data.check_tokens(document)
    if sum(d.documents for d in data.domains) != data.documents or lengths.sum() != data.tokens:
        raise DataError(f"{data.path / 'manifest.json'}: the domains do not add up to its totals; {_REMAKE}")
    return manifest
