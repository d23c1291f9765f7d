"""`hsa bench data`: reading, opening, resuming and tokenizing, each beside its baseline of the same run."""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import DataConfig, MixEntry
from data_pipeline.lanes import BatchStream, open_stream
from data_pipeline.shards import ShardSet, write_manifest, write_shard
from data_pipeline.tokenizer import load_tokenizer, train_bpe
from data_pipeline.words import QUALITIES, WORDS

_LANES = 16
_SHAPES = [(512, 16), (4096, 64), (16384, 64)]  # context, chunk


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hsa bench data`. Example: hsa bench data --json data.json"""
    parser.add_argument("--json", metavar="FILE", help="write all rows and the machine to FILE")
    parser.add_argument("--tokens", type=float, default=20e6, help="tokens of the generated documents (default 20e6)")
    parser.add_argument("--many", type=int, default=10_000, help="shards of the start-up test (default 10000)")
    parser.add_argument("--text", metavar="FILE", help="text to tokenize (default: generated sentences)")
    parser.add_argument(
        "--energon",
        metavar="PYTHON",
        default=sys.executable,
        help="a Python with megatron-energon to compare with (default: this one)",
    )


def main(args: argparse.Namespace) -> int:
    """Run everything and print one line per figure."""
    rows: list[dict[str, Any]] = []

    def add(name: str, value: float, unit: str, **facts: Any) -> None:
        rows.append({"name": name, "value": value, "unit": unit, **facts})
        more = "".join(
            f"   {k.replace('_', ' ')} {v:.4g}" if isinstance(v, float) else f"   {k} {v}" for k, v in facts.items()
        )
        print(f"{name:46s} {value:10.4g} {unit}{more}", flush=True)

    with tempfile.TemporaryDirectory(prefix="hsa-bench-data-") as folder:
        work = Path(folder)
        shards = make_shards(work / "shards", int(args.tokens))
        reading(shards, add)
        energon(shards, work / "energon", args.energon, add)
        many_shards(work / "many", shards, args.many, add)
        cost_of_shards(work / "split", shards, args.many, add)
        tokenizing(work, args.text, add)
    if args.json:
        machine = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "numpy": np.__version__,
        }
        Path(args.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    return 0


Add = Callable[..., None]


def make_shards(folder: Path, tokens: int) -> Path:
    """Random ids in three domains; log-normal lengths like those of web text, books and notes."""
    folder.mkdir()
    words = " ".join(WORDS + QUALITIES)
    (folder / "tokenizer.json").write_text(train_bpe([words], 512), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    rng = np.random.default_rng(0)
    files, rows = [], []
    for domain, median, share in (("books", 30_000, 0.4), ("notes", 150, 0.1), ("web", 700, 0.5)):
        left = int(tokens * share)
        documents: list[tuple[dict[str, Any], np.ndarray]] = []
        while left > 0:
            length = int(min(left, max(1, rng.lognormal(np.log(median), 1.0))))
            documents.append(({}, np.append(rng.integers(2, tokenizer.vocab_size, length), tokenizer.eos_id)))
            left -= length
        file = folder / f"{domain}-000000.tar"
        rows.append(write_shard(file, documents, "uint16"))
        files.append({"file": file.name, "domain": domain, "bytes": file.stat().st_size, "sha256": ""})
    write_manifest(folder, tokenizer, "uint16", files, rows, {})
    return folder


def _open(shards: Path, context: int, chunk: int, **changes: Any) -> BatchStream:
    path = str(shards)
    mix = [MixEntry("web", path, 60.0), MixEntry("books", path, 30.0), MixEntry("notes", path, 10.0)]
    synthetic = {"rate": changes.pop("rate", 0.0)}
    data = DataConfig(tokenizer=path, mix=mix, **changes)
    batch = _LANES * max(1, 65536 // (context * _LANES))
    return open_stream(
        data,
        lanes=_LANES,
        lane_ids=range(_LANES),
        batch=batch,
        context=context,
        chunk_size=chunk,
        seed=1,
        synthetic=synthetic,
    )


def documents_read(stream: BatchStream, batches: int) -> list[tuple[int, int, int]]:
    """(shard, bytes, offset) of the documents of the next batches, in order."""
    shards = stream._domains[0].shards
    found: list[tuple[int, int, int]] = []
    load = shards.load

    def note(document: int, offset: int, length: int, shard: int, crc32: int) -> Any:
        found.append((shard, length * shards.dtype.itemsize, offset))
        return load(document, offset, length, shard, crc32)

    shards.load = note  # type: ignore[method-assign]
    for _ in range(batches):
        stream.next_arrays()
    shards.load = load  # type: ignore[method-assign]
    return found


def numpy_loop(
    shards: ShardSet, documents_in_order: list[tuple[int, int, int]], shape: tuple[int, int], chunk: int, batches: int
) -> None:
    """The baseline: the same documents in the same order, one read each, into the same five arrays. It knows where
    everything is and checks nothing."""
    rows, context = shape
    files = [os.open(file, os.O_RDONLY) for file in shards.shard_files]
    number = start = 0
    tokens_of: np.ndarray = np.empty(0, dtype=shards.dtype)
    for _ in range(batches):
        tokens = np.full(shape, 1, dtype=np.int64)
        labels, weights = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
        documents, domains = np.empty(shape, dtype=np.int32), np.empty(shape, dtype=np.int16)
        for row in range(rows):
            position = count = 0
            while position < context:
                if start >= len(tokens_of):
                    shard, size, offset = documents_in_order[number % len(documents_in_order)]
                    tokens_of, start = np.frombuffer(os.pread(files[shard], size, offset), dtype=shards.dtype), 0
                    number += 1
                piece = tokens_of[start : start + context - position]
                end = position + len(piece)
                stop = -(-end // chunk) * chunk
                tokens[row, position:end] = piece
                labels[row, position : end - 1] = piece[1:]
                weights[row, position : end - 1] = 1.0
                documents[row, position:stop] = count
                domains[row, position:stop] = 0
                start, position, count = start + len(piece), stop, count + 1
    for file in files:
        os.close(file)


def _read(stream: BatchStream, batches: int) -> None:
    for _ in range(batches):
        stream.next_arrays()


def _best(run: Callable[[], object], repeats: int = 3) -> float:
    """Least CPU seconds of one call: other processes of the machine do not count."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return min(times)


def reading(path: Path, add: Add) -> None:
    """Packed batches from the page cache against the numpy loop; mix and padding on the way."""
    shards = ShardSet(path)
    verify_cache = sum(len(f.read_bytes()) for f in shards.shard_files)
    add("bytes of shards, in the page cache", verify_cache / 1e6, "MB")
    for context, chunk in _SHAPES:
        stream = _open(path, context, chunk)
        shape = stream.next_arrays()["tokens"].shape
        batches = max(2, shards.tokens // (shape[0] * shape[1]))  # all of them: what was just read is not in the cache
        size = batches * shape[0] * shape[1]
        order = documents_read(stream, batches)
        ours, plain = [], []
        for _ in range(4):  # taken in turns: the machine's mood is the same for both
            ours.append(_best(functools.partial(_read, stream, batches), 1))
            plain.append(_best(functools.partial(numpy_loop, shards, order, shape, chunk, batches), 1))
        rate, baseline = size / min(ours) / 1e6, size / min(plain) / 1e6
        add(f"read, context {context}, chunk {chunk}", rate, "M tokens/s", numpy_loop=baseline, ratio=rate / baseline)
    for name, changes in (("best_fit", {"packing": "best_fit"}), ("1 % synthetic", {"rate": 0.01})):
        stream = _open(path, 4096, 64, **changes)
        stream.next_arrays()
        batches = max(2, min(4_000_000, shards.tokens) // 65536)
        seconds = _best(functools.partial(_read, stream, batches))
        add(f"read, context 4096, chunk 64, {name}", batches * 65536 / seconds / 1e6, "M tokens/s")
    for packing in ("split", "best_fit"):
        stream = _open(path, 4096, 64, packing=packing)
        counts, pad, pieces, ends = np.zeros(3), 0, 0, 0
        for _ in range(max(2, min(10_500_000, 2 * shards.tokens) // 65536)):
            batch = stream.next_arrays()
            real = batch["tokens"] != stream.tokenizer.pad_id
            counts += np.bincount(batch["domains"][real], minlength=3)[:3]
            pad += int((~real).sum())
            pieces += int(batch["documents"].max(axis=1).sum()) + len(real)
            ends += int((batch["tokens"] == stream.tokenizer.eos_id).sum())
        error = float(np.abs(counts / counts.sum() - [0.6, 0.3, 0.1]).max())
        add(
            f"mix after {counts.sum() / 1e6:.1f}M tokens, {packing}",
            100 * error,
            "% off at most",
            padding_percent=float(100 * pad / (pad + counts.sum())),
            cuts_per_million_tokens=float(1e6 * (pieces - ends) / counts.sum()),
        )


def energon(path: Path, work: Path, python: str, add: Add) -> None:
    """All documents of the shards: packed batches of this package against documents from megatron-energon."""
    from data_pipeline import bench_energon

    shards = ShardSet(path)
    data = DataConfig(tokenizer=str(path), mix=[MixEntry("all", str(path), 1.0, domain="*")])
    stream = _one_domain(data, 64)
    batches = max(2, shards.tokens // 65536)
    ours = batches * 65536 / _best(functools.partial(_read, stream, batches)) / 1e6
    found = bench_energon.run(python, path, work, min(2000, shards.documents))
    if isinstance(found, str):
        print(f"against megatron-energon: not measured, {found}", flush=True)
        add("read all documents, context 4096, chunk 64", ours, "M tokens/s")
        return
    theirs = found["tokens_per_second"] / 1e6
    add("read all documents, context 4096, chunk 64", ours, "M tokens/s", energon=theirs, ratio=ours / theirs)


def _one_domain(data: DataConfig, chunk: int) -> BatchStream:
    return open_stream(
        data,
        lanes=_LANES,
        lane_ids=range(_LANES),
        batch=16,
        context=4096,
        chunk_size=chunk,
        seed=1,
        synthetic={"rate": 0},
    )


_RESUME = """
import json, sys, time
from pathlib import Path
started = time.perf_counter()
from data_pipeline.bench import _open_many
imported = time.perf_counter()
stream = _open_many(Path(sys.argv[1]))
opened = time.perf_counter()
if len(sys.argv) > 2:
    stream.load_state_dict(json.loads(Path(sys.argv[2]).read_text()))
stream.next_arrays()
first = time.perf_counter()
print(json.dumps({"open": opened - imported, "first": first - opened,
    "memory": int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024,
    "state": stream.state_dict()}))
"""
_STEPS = """
import json, sys, time
from pathlib import Path
from data_pipeline.bench import _open_many
from data_pipeline.processes import allow_open_files
allow_open_files()
stream, batches = _open_many(Path(sys.argv[1])), int(sys.argv[2])
def read():
    started = time.process_time()
    for _ in range(batches):
        stream.next_arrays()
    return (time.process_time() - started) / batches
print(json.dumps({"first": read(), "later": min(read() for _ in range(4))}))
"""


def _open_many(path: Path) -> BatchStream:
    return _one_domain(DataConfig(tokenizer=str(path), mix=[MixEntry("web", str(path), 1.0)]), 64)


def _in_new_process(script: str, *arguments: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path)}
    command = [sys.executable, "-c", script, *arguments]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def _copies(path: Path, source: Path, shards: int, documents: list[np.ndarray], linked: bool) -> None:
    """Shards in ``path`` that hold the same documents, as links of one file or as files of their own."""
    path.mkdir()
    (path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    rows = write_shard(path / "first.tar", [({}, ids) for ids in documents], "uint16")
    data = (path / "first.tar").read_bytes()
    files = []
    for number in range(shards):
        file = path / f"web-{number:06d}.tar"
        if linked:
            file.hardlink_to(path / "first.tar")
        else:
            file.write_bytes(data)
        files.append({"file": file.name, "domain": "web", "bytes": len(data), "sha256": ""})
    write_manifest(path, load_tokenizer(source), "uint16", files, [rows.copy() for _ in files], {})


def many_shards(folder: Path, source: Path, count: int, add: Add) -> None:
    """Start-up, resume and memory with ``count`` shards and with 100, of 200 documents each, in fresh processes."""
    rng = np.random.default_rng(0)
    documents = [np.append(rng.integers(2, 512, int(n)), 0) for n in rng.integers(50, 3000, 200)]
    for shards in (100, count):
        path = folder.with_name(f"{folder.name}-{shards}")
        _copies(path, source, shards, documents, linked=True)
        fresh = _in_new_process(_RESUME, str(path))
        state = path / "state.json"
        state.write_text(json.dumps(fresh["state"]))
        again = _in_new_process(_RESUME, str(path), str(state))
        name = f"{shards:,} shards, {shards * 200:,} documents"
        add(f"{name}: start-up", fresh["open"], "s", first_batch_s=fresh["first"], memory_MB=fresh["memory"])
        add(f"{name}: resume", again["open"] + again["first"], "s", of_it_opening=again["open"])


def cost_of_shards(folder: Path, source: Path, most: int, add: Add) -> None:
    """A batch of 65,536 tokens of the same documents in 100 and in more shards: the first time that each shard is
    read, and later."""
    rng = np.random.default_rng(0)
    five = [np.append(rng.integers(2, 512, n), 0) for n in (200, 600, 1100, 1900, 3700)]
    batches = max(2, most * sum(map(len, five)) // 65536)
    cost: dict[int, dict[str, float]] = {}
    counts = sorted({min(100, most), min(1000, most), most})
    for shards in counts:
        _copies(folder.with_name(f"{folder.name}-{shards}"), source, shards, five * (most // shards), linked=False)
    for _ in range(3):  # in turns
        for shards in counts:
            path = folder.with_name(f"{folder.name}-{shards}")
            found = _in_new_process(_STEPS, str(path), str(batches))
            known = cost.get(shards, found)
            cost[shards] = {key: min(value, known[key]) for key, value in found.items()}
    for shards in counts:
        add(
            f"{5 * most:,} documents in {shards:,} shards: a batch",
            1e3 * cost[shards]["later"],
            "ms",
            of_fewest=cost[shards]["later"] / cost[counts[0]]["later"],
            first_time_ms=1e3 * cost[shards]["first"],
        )
        shutil.rmtree(folder.with_name(f"{folder.name}-{shards}"))


def tokenizing(work: Path, text: str | None, add: Add) -> None:
    """One worker of `hsa data tokenize` against the tokenizer library's own batch call, in one thread."""
    from data_pipeline.tokenizing import tokenize

    rng = np.random.default_rng(1)
    if text is not None:
        whole = Path(text).read_text(encoding="utf-8")[: 8 << 20]
        pieces = [whole[i : i + 5000] for i in range(0, len(whole), 5000)]
    else:
        pieces = [" ".join(rng.choice(WORDS, 800)) + ".\n" for _ in range(1500)]
    source = work / "text.jsonl"
    source.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces), encoding="utf-8")
    size = sum(len(piece.encode()) for piece in pieces) / 1e6
    file = work / "bpe.json"
    file.write_text(train_bpe(pieces[:300], 4096), encoding="utf-8")
    tokenizer = load_tokenizer(file)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    ours, library = [], []
    for turn in range(3):
        library.append(_best(functools.partial(tokenizer.encode_batch, pieces), 1))
        out = work / f"tokenized-{turn}"
        ours.append(_best(functools.partial(tokenize, [source], out, str(file), workers=1, quiet=True), 1))
    rate, baseline = size / min(ours), size / min(library)
    add("tokenize, one worker, reading and writing too", rate, "MB/s", library=baseline, ratio=rate / baseline)
    add("peak memory of this benchmark", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "MB")
