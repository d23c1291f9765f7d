"""``hsa data tokenize``: documents to shards, in parallel, restartable.

One reader cuts the documents, domain by domain, into shards of about ``shard_bytes`` of text; worker processes encode
and write them. The cut depends on the input only, so a second call after an interruption skips the shards that are
there. Everything is written to ``DIR.partial`` and renamed at the end: ``DIR`` is complete or absent. Records that are
no documents go to ``quarantine.jsonl``. The tasks of a Slurm array share the files; ``array.py`` joins what they wrote.
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
from array import array as integers
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.array import COMPLETE, LEFTOVERS, hashes_of, index_of, share_of, task_folder
from data_pipeline.cleaning import MAX_DOCUMENT_BYTES, QUARANTINE, Quarantine, clean, text_hash
from data_pipeline.errors import DataError
from data_pipeline.processes import exit_with_parent
from data_pipeline.shards import dtype_for, sha256_file, write_array, write_atomically, write_manifest, write_shard
from data_pipeline.sources import Document, find_sources, is_compressed, read_documents
from data_pipeline.tokenizer import Tokenizer, load_tokenizer, train_bpe
from data_pipeline.tokenizer_files import tokenizer_text

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
    strict: bool = False,
    dedup: str = "none",
    max_bytes: int = MAX_DOCUMENT_BYTES,
    array: tuple[int, int] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the shards of ``sources`` to the new folder ``out`` and return the manifest.

    tokenizer: path of a ``tokenizer.json``, a ``.model`` of SentencePiece or ``.tiktoken`` ranks (see
    :func:`~data_pipeline.tokenizer_files.tokenizer_text`), or ``bpe:N`` to train a byte-level BPE of N entries on an
    even sample of at most ``bpe_bytes`` of the text. domain: label for all documents instead of their own.
    shard_bytes: text per shard. workers: processes, by default one per core. strict: a broken record stops instead of
    going to ``quarantine.jsonl``. dedup: one of :data:`data_pipeline.cleaning.DEDUP`. max_bytes: a longer document
    counts as broken. array: (index, size) takes this task's share of the files, writes it beside ``out``, for
    :func:`data_pipeline.array.merge`, and returns what the merge needs.

    Raises DataError when ``out`` exists, for unreadable sources and when they hold no text.
    """
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists; remove it or choose another --out")
    files = find_sources(sources)
    prefix, staging = "", out.with_name(out.name + ".partial")
    if array is not None:
        if tokenizer.startswith("bpe:"):
            raise DataError(f"the tasks of an array cannot each train {tokenizer}; give the path of a tokenizer")
        files = share_of(files, *array)
        prefix, staging = f"{array[0]:04d}-", task_folder(out, *array)
    request = {
        "files": [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files],
        "tokenizer": tokenizer if tokenizer.startswith("bpe:") else _fingerprint(tokenizer_text(tokenizer)),
        "domain": domain,
        "shard_bytes": shard_bytes,
        "bpe_bytes": bpe_bytes,
        "strict": strict,
        "dedup": dedup,
        "max_bytes": max_bytes,
    }
    say = (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))
    started = time.monotonic()
    with _staging(staging, request):
        if array is not None and (staging / COMPLETE).is_file():
            return json.loads((staging / COMPLETE).read_bytes())
        chosen = _tokenizer(staging, tokenizer, files, bpe_bytes, say)
        quarantine = Quarantine(staging / QUARANTINE, strict)
        try:
            counts = {"text_bytes": 0}
            documents = clean(read_documents(files, domain, quarantine.bad), quarantine, dedup, max_bytes)
            jobs = _jobs(documents, shard_bytes, prefix, counts)
            results = _write_all(staging, chosen, jobs, workers or os.cpu_count() or 1, say)
        finally:
            quarantine.close()
        left_out = dict(quarantine.counts)
        if not results and array is None:
            names = ", ".join(map(str, files[:3])) + (" ..." if len(files) > 3 else "")
            if set(left_out) <= {"empty"}:
                raise DataError(f"no text in {names}: every document is empty")
            reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.items())
            raise DataError(f"no text in {names}: every record was put aside ({reasons}), see {staging / QUARANTINE}")
        results.sort(key=lambda shard: (shard["domain"], shard["file"]))
        extra = {
            "empty_documents": left_out.get("empty", 0),
            **counts,
            "left_out": left_out,
            "sources": [{"file": f.name, "bytes": f.stat().st_size, "sha256": sha256_file(f)} for f in files],
        }
        shards = [{k: v for k, v in shard.items() if k not in ("text_sha256", "label")} for shard in results]
        if not left_out:
            (staging / QUARANTINE).unlink()
        if array is not None:
            labels = {shard["domain"]: shard["label"] for shard in results}
            task = {"request": request, "shards": shards, "labels": labels, "extra": extra}
            write_atomically(staging / COMPLETE, json.dumps(task).encode())
            say(f"task {array[0]} of {array[1]} is done; when all are: hsa data merge {out}")
            return task
        rows = [np.load(index_of(staging / shard["file"])) for shard in shards]
        manifest = write_manifest(staging, chosen, dtype_for(chosen.vocab_size), shards, rows, extra)
        for pattern in LEFTOVERS:
            for leftover in staging.glob(pattern):
                leftover.unlink()
        staging.rename(out)
    report(out, manifest, time.monotonic() - started, say)
    return manifest


def _fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def report(out: Path, manifest: dict[str, Any], seconds: float, say: Callable[[str], None]) -> None:
    """Say what was made and, whatever it is, what was left out."""
    tokens, size = manifest["tokens"], manifest["text_bytes"]
    say(
        f"{out}: {manifest['documents']:,} documents, {tokens:,} tokens in {len(manifest['shards'])} shards "
        f"({size / max(tokens, 1):.2f} bytes per token, {manifest['empty_documents']} empty "
        f"documents left out, {size / 1e6 / max(seconds, 1e-9):.1f} MB/s)"
    )
    others = {reason: n for reason, n in manifest["left_out"].items() if reason != "empty"}
    if others:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(others.items()))
        print(f"{out}: records left out: {reasons}; see {out / QUARANTINE}", file=sys.stderr, flush=True)


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
            text = tokenizer_text(choice)
        write_atomically(file, text.encode("utf-8"))
    return load_tokenizer(file)


def _sample(files: list[Path], limit: int) -> Iterator[str]:
    """Pieces of text spread evenly over all files, about ``limit`` bytes of them."""
    total = sum(f.stat().st_size * (4 if is_compressed(f) else 1) for f in files)
    share = min(1.0, limit / max(total, 1))
    credit = 1.0
    for document in read_documents(files, bad=lambda record: None):  # they are counted when the shards are made
        for start in range(0, len(document.text), _PIECE):
            piece = document.text[start : start + _PIECE]
            credit += share * len(piece) / _PIECE
            if share == 1.0 or credit >= 1.0:
                credit -= 1.0
                yield piece


Job = tuple[str, str, str, list[tuple[dict[str, str], str]]]


def _jobs(
    documents: Iterable[tuple[Document, int]], shard_bytes: int, prefix: str, counts: dict[str, int]
) -> Iterator[Job]:
    """(shard file, domain, its own name, documents) for every shard, cut by the input alone."""
    pending: dict[str, list[tuple[dict[str, str], str]]] = {}
    sizes: dict[str, int] = {}
    made: dict[str, int] = {}
    labels: dict[str, str] = {}

    def cut(label: str) -> Job:
        number = made[label] = made.get(label, -1) + 1
        sizes[label] = 0
        return f"{label}-{prefix}{number:06d}.tar", label, labels[label], pending.pop(label)

    for document, size in documents:
        label = _label(document, labels)
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
    except BrokenProcessPool as error:
        raise DataError(
            "a tokenizing process was killed (out of memory?); the same command goes on from the shards that are done, "
            "with fewer --workers or a smaller --shard-mb if memory is short"
        ) from error
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


def _encode_shard(file: str, domain: str, label: str, documents: list[tuple[dict[str, str], str]]) -> dict[str, Any]:
    """Encode and write one shard, or find it done. Runs in a worker; returns the shard's part of the manifest."""
    assert _worker is not None
    staging, tokenizer = _worker
    path = staging / file
    done = staging / (path.stem + ".done.json")
    hashes = b"".join(text_hash(text) for _, text in documents)
    digest = hashlib.sha256(json.dumps([meta for meta, _ in documents]).encode() + hashes).hexdigest()
    if done.is_file():
        shard = json.loads(done.read_bytes())
        if shard["text_sha256"] == digest and path.is_file() and path.stat().st_size == shard["bytes"]:
            return shard
    rows = write_shard(path, _encoded(tokenizer, documents), dtype_for(tokenizer.vocab_size))
    write_array(index_of(path), rows)
    write_array(hashes_of(path), np.frombuffer(hashes, dtype="<u8").reshape(-1, 2))
    shard = {
        "file": file,
        "domain": domain,
        "documents": len(rows),
        "tokens": int(rows["length"].sum(dtype=np.int64)),
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
        "label": label,
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
            document.append(tokenizer.eos_id)
            yield meta, np.frombuffer(integers("I", document), dtype=np.uintc)  # twice as fast as np.array of a list
        start = end
