"""``hsa data tokenize``: documents to shards, in parallel, restartable.

One reader cuts the documents, domain by domain, into shards of about ``shard_bytes`` of text; worker processes encode
and write them. The cut depends on the input only, so a second call after an interruption skips the shards that are
there. Everything is written to ``DIR.partial`` and renamed at the end: ``DIR`` is complete or absent.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.processes import exit_with_parent
from data_pipeline.shards import dtype_for, sha256_file, write_array, write_atomically, write_manifest, write_shard
from data_pipeline.sources import Document, find_sources, read_documents
from data_pipeline.tokenizer import Tokenizer, load_tokenizer, train_bpe

_PIECE = 1 << 16  # characters of text that are kept or left together when sampling for the BPE
_BATCH = 1 << 20  # characters encoded in one call


def tokenize(
    sources: Iterable[str | Path],
    out: str | Path,
    tokenizer: str,
    *,
    domain: str | None = None,
    shard_bytes: int = 64 << 20,
    bpe_bytes: int = 32 << 20,
    workers: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the shards of ``sources`` to the new folder ``out`` and return the manifest.

    tokenizer: path of a ``tokenizer.json``, or ``bpe:N`` to train a byte-level BPE of N entries on an even sample of
    at most ``bpe_bytes`` of the text. domain: label for all documents instead of their own. shard_bytes: text per
    shard. workers: processes, by default one per core.

    Raises DataError when ``out`` exists, for unreadable sources and when they hold no text.
    """
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists; remove it or choose another --out")
    files = find_sources(sources)
    staging = out.with_name(out.name + ".partial")
    request = {
        "files": [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files],
        "tokenizer": tokenizer if tokenizer.startswith("bpe:") else load_tokenizer(tokenizer).fingerprint,
        "domain": domain,
        "shard_bytes": shard_bytes,
        "bpe_bytes": bpe_bytes,
    }
    say = (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))
    started = time.monotonic()
    with _staging(staging, request):
        chosen = _tokenizer(staging, tokenizer, files, bpe_bytes, say)
        counts = {"empty_documents": 0, "text_bytes": 0}
        jobs = _jobs(files, domain, shard_bytes, counts)
        results = _write_all(staging, chosen, jobs, workers or os.cpu_count() or 1, say)
        if not results:
            names = ", ".join(map(str, files[:3])) + (" ..." if len(files) > 3 else "")
            raise DataError(f"no text in {names}: every document is empty")
        results.sort(key=lambda shard: (shard["domain"], shard["file"]))
        rows = [np.load(staging / (Path(shard["file"]).stem + ".index.npy")) for shard in results]
        shards = [{k: v for k, v in shard.items() if k != "text_sha256"} for shard in results]
        sources_read = [{"file": f.name, "bytes": f.stat().st_size, "sha256": sha256_file(f)} for f in files]
        manifest = write_manifest(
            staging, chosen, dtype_for(chosen.vocab_size), shards, rows, {**counts, "sources": sources_read}
        )
        for pattern in ("*.index.npy", "*.done.json", "*.tmp", "request.json", "lock"):
            for leftover in staging.glob(pattern):
                leftover.unlink()
        staging.rename(out)
    seconds = time.monotonic() - started
    say(
        f"{out}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens in {len(shards)} shards "
        f"({counts['text_bytes'] / max(manifest['tokens'], 1):.2f} bytes per token, {counts['empty_documents']} empty "
        f"documents left out, {counts['text_bytes'] / 1e6 / max(seconds, 1e-9):.1f} MB/s)"
    )
    return manifest


@contextmanager
def _staging(staging: Path, request: dict[str, Any]) -> Iterator[None]:
    """Hold ``staging``: kept when an interrupted call made it for the same request, emptied otherwise."""
    data = json.dumps(request, indent=1).encode()
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = (staging / "lock").open("w")
    except OSError as error:
        raise DataError(f"cannot write {staging}: {error.strerror}; choose a writable --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"another process is writing {staging}; wait for it or choose another --out") from error
        file = staging / "request.json"
        if not (file.is_file() and file.read_bytes() == data):
            for left in staging.iterdir():
                if left.name != "lock":
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            write_atomically(file, data)
        yield


def _tokenizer(staging: Path, choice: str, files: list[Path], bpe_bytes: int, say: Any) -> Tokenizer:
    file = staging / "tokenizer.json"
    if not file.exists():
        if choice.startswith("bpe:"):
            size = choice.removeprefix("bpe:")
            if not size.isdecimal():
                raise DataError(f"--tokenizer {choice}: write bpe:N with the number of entries, for example bpe:8192")
            started = time.monotonic()
            text = train_bpe(_sample(files, bpe_bytes), int(size))
            say(f"trained a byte-level BPE of {int(size):,} entries in {time.monotonic() - started:.1f} s")
        else:
            text = Path(load_tokenizer(choice).path).read_text(encoding="utf-8")
        write_atomically(file, text.encode("utf-8"))
    return load_tokenizer(file)


def _sample(files: list[Path], limit: int) -> Iterator[str]:
    """Pieces of text spread evenly over all files, about ``limit`` bytes of them."""
    total = sum(f.stat().st_size * (4 if f.suffix in (".gz", ".zst") else 1) for f in files)
    share = min(1.0, limit / max(total, 1))
    credit = 1.0
    for document in read_documents(files):
        for start in range(0, len(document.text), _PIECE):
            piece = document.text[start : start + _PIECE]
            credit += share * len(piece) / _PIECE
            if share == 1.0 or credit >= 1.0:
                credit -= 1.0
                yield piece


Job = tuple[str, str, list[tuple[dict[str, str], str]]]


def _jobs(files: list[Path], domain: str | None, shard_bytes: int, counts: dict[str, int]) -> Iterator[Job]:
    """(shard file, domain, documents) for every shard, cut by the input alone."""
    pending: dict[str, list[tuple[dict[str, str], str]]] = {}
    sizes: dict[str, int] = {}
    made: dict[str, int] = {}
    labels: dict[str, str] = {}

    def cut(label: str) -> Job:
        number = made[label] = made.get(label, -1) + 1
        sizes[label] = 0
        return f"{label}-{number:06d}.tar", label, pending.pop(label)

    for document in read_documents(files, domain):
        if not document.text.strip():
            counts["empty_documents"] += 1
            continue
        label = _label(document, labels)
        size = len(document.text.encode("utf-8", "surrogatepass"))
        counts["text_bytes"] += size
        pending.setdefault(label, []).append(
            ({"id": document.id, "domain": label, "source": document.source}, document.text)
        )
        sizes[label] = sizes.get(label, 0) + size
        if sizes[label] >= shard_bytes:
            yield cut(label)
    for label in sorted(pending):
        yield cut(label)


def _label(document: Document, labels: dict[str, str]) -> str:
    """The domain as a file name; two domains must not become one by that."""
    label = re.sub(r"[^A-Za-z0-9_-]", "_", document.domain) or "_"
    if labels.setdefault(label, document.domain) != document.domain:
        raise DataError(
            f"the domains {labels[label]!r} and {document.domain!r} ({document.source}) need different names in "
            "letters, digits, - and _; rename one"
        )
    return label


def _write_all(
    staging: Path, tokenizer: Tokenizer, jobs: Iterator[Job], workers: int, say: Any
) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    running: set[Future] = set()
    tokens = 0
    environment = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # inherited by the workers: parallel over processes, not threads
    pool = (
        ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _start_worker, (str(staging), tokenizer.path)
        )
        if workers > 1
        else None
    )
    if pool is None:
        _start_worker(str(staging), tokenizer.path)
    try:
        while True:
            job = next(jobs, None)
            if job is not None and pool is None:
                done = [_encode_shard(*job)]
            elif job is not None and pool is not None:
                running.add(pool.submit(_encode_shard, *job))
                if len(running) <= workers + 1:
                    continue
                done = []
            elif not running:
                return results
            else:
                done = []
            if running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                done += [future.result() for future in finished]
            for shard in done:
                results.append(shard)
                tokens += shard["tokens"]
                say(
                    f"{shard['file']}: {shard['documents']:,} documents, {shard['tokens']:,} tokens ({tokens:,} so far)"
                )
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        if environment is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = environment


_worker: tuple[Path, Tokenizer] | None = None


def _start_worker(staging: str, tokenizer: str) -> None:
    global _worker
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        exit_with_parent(parent.pid)
    _worker = Path(staging), load_tokenizer(tokenizer)


def _encode_shard(file: str, domain: str, documents: list[tuple[dict[str, str], str]]) -> dict[str, Any]:
    """Encode and write one shard, or find it done. Runs in a worker; returns the shard's part of the manifest."""
    assert _worker is not None
    staging, tokenizer = _worker
    path = staging / file
    done = staging / (path.stem + ".done.json")
    digest = hashlib.sha256(json.dumps(documents).encode()).hexdigest()
    if done.is_file():
        shard = json.loads(done.read_bytes())
        if shard["text_sha256"] == digest and path.is_file() and path.stat().st_size == shard["bytes"]:
            return shard
    rows = write_shard(path, _encoded(tokenizer, documents), dtype_for(tokenizer.vocab_size))
    write_array(staging / (path.stem + ".index.npy"), rows)
    shard = {
        "file": file,
        "domain": domain,
        "documents": len(rows),
        "tokens": int(rows["length"].sum(dtype=np.int64)),
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
        "text_sha256": digest,
    }
    write_atomically(done, json.dumps(shard).encode())
    return shard


def _encoded(
    tokenizer: Tokenizer, documents: list[tuple[dict[str, str], str]]
) -> Iterator[tuple[dict[str, str], np.ndarray]]:
    """(meta, ids with the closing eos), encoding many short documents in one call of the library."""
    start = 0
    while start < len(documents):
        end, size = start, 0
        while end < len(documents) and (size == 0 or size + len(documents[end][1]) <= _BATCH):
            size += len(documents[end][1])
            end += 1
        ids = tokenizer.encode_batch([text for _, text in documents[start:end]])
        for (meta, _), document in zip(documents[start:end], ids, strict=True):
            yield meta, np.array([*document, tokenizer.eos_id])
        start = end
