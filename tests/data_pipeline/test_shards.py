"""Damaged or foreign shards: one message that names the file, and no wrong token."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import shards as shards_module
from data_pipeline.config import DataConfig, MixEntry
from data_pipeline.errors import DataError
from data_pipeline.lanes import BatchStream, open_stream
from data_pipeline.shards import OPEN_FILES, OpenFiles, ShardSet, sha256_file, verify, write_manifest, write_shard
from data_pipeline.tokenizer import Tokenizer, load_tokenizer, train_bpe


@pytest.fixture
def copied(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def read_all(folder: Path, tokenizer: Path | None = None, batches: int = 60) -> None:
    config = DataConfig(tokenizer=str(tokenizer or folder), mix=[MixEntry("all", str(folder), 1.0, domain="*")])
    stream = open_stream(
        config, lanes=2, lane_ids=[0, 1], batch=2, context=256, chunk_size=16, seed=1, synthetic={"rate": 0.0}
    )
    for _ in range(batches):
        stream.next_arrays()


def edit_manifest(folder: Path, **changes) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def test_good_shards_verify_and_read(shards: Path) -> None:
    assert verify(shards)["documents"] == 71
    read_all(shards)


def test_missing_and_truncated_files_are_named_at_open(copied: Path) -> None:
    shard, index = copied / "tales-000001.tar", copied / "index.npy"
    for file, keep in [(shard, 3000), (index, 200), (shard, None), (index, None), (copied / "manifest.json", None)]:
        data = file.read_bytes()
        if keep is None:
            file.unlink()
        else:
            file.write_bytes(data[:keep])
        for use in (ShardSet, verify, lambda folder: read_all(folder, copied)):
            with pytest.raises(DataError, match=f"{file.name}.*tokenize"):
                use(copied)
        file.write_bytes(data)
    read_all(copied)


def test_flipped_bit_is_found_by_verify_and_by_reading(copied: Path) -> None:
    file = copied / "tales-000000.tar"
    flip(file, int(np.load(copied / "index.npy")["offset"][40]) + 8)
    with pytest.raises(DataError, match="damaged: its sha256"):
        verify(copied)
    with pytest.raises(DataError, match="another checksum|damaged: the document at byte"):
        read_all(copied)


def test_flipped_bit_in_index_and_tokenizer_is_found_by_verify(copied: Path) -> None:
    for name in ("index.npy", "tokenizer.json"):
        data = (copied / name).read_bytes()
        flip(copied / name, len(data) - 5)
        with pytest.raises(DataError, match=name):
            verify(copied)
        (copied / name).write_bytes(data)


def test_index_of_another_folder_does_not_train(copied: Path, shards: Path) -> None:
    index = np.load(copied / "index.npy")
    shuffled = index.copy()
    shuffled["offset"], shuffled["length"] = index["offset"][::-1], index["length"][::-1]
    np.save(copied / "index.npy", shuffled)
    with pytest.raises(DataError, match="does not match its index|damaged|truncated"):
        read_all(copied)
    np.save(copied / "index.npy", index[:-1])
    with pytest.raises(DataError, match="index.npy is truncated"):
        read_all(copied)


def test_index_of_another_shard_does_not_train(copied: Path) -> None:
    """Two shards of the folder change places in the index, or as files of the same size."""
    index = np.load(copied / "index.npy")
    swapped = index.copy()
    swapped["shard"] = np.array([*range(2, index["shard"].max() + 1), 0, 1])[index["shard"]]
    np.save(copied / "index.npy", swapped)
    with pytest.raises(DataError, match="does not match its index|damaged|truncated"):
        read_all(copied)
    with pytest.raises(DataError):
        verify(copied)


def test_a_shard_that_is_cut_while_it_is_read_is_named(copied: Path) -> None:
    shards = ShardSet(copied)
    last = int(np.flatnonzero(shards.index["shard"] == shards.index["shard"][-1])[-1])
    shards.document(last)
    file = shards.shard_files[int(shards.index["shard"][last])]
    os.truncate(file, int(shards.index["offset"][last]) + 2)
    with pytest.raises(DataError, match=f"{file.name} is truncated at byte"):
        shards.document(last)


def test_empty_shards(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A shard without documents is read over; a file of no bytes, and a folder without a document, are refused."""
    shutil.copy(tokenizer.path, tmp_path / "tokenizer.json")
    contents: list[list] = [[], [({}, np.array([5, 6, 0]))] * 40, []]
    rows, files = [], []
    for number, documents in enumerate(contents):
        file = tmp_path / f"x-{number:06d}.tar"
        rows.append(write_shard(file, documents, "uint16"))
        files.append({"file": file.name, "domain": "x", "bytes": file.stat().st_size, "sha256": sha256_file(file)})
    write_manifest(tmp_path, tokenizer, "uint16", files, rows, {})
    assert verify(tmp_path)["documents"] == 40
    read_all(tmp_path, batches=5)
    (tmp_path / "x-000002.tar").write_bytes(b"")
    with pytest.raises(DataError, match="x-000002.tar is truncated: 0 bytes"):
        read_all(tmp_path)
    write_manifest(tmp_path, tokenizer, "uint16", files[:1], rows[:1], {})
    for use in (read_all, verify):
        with pytest.raises(DataError, match="holds no documents"):
            use(tmp_path)


def test_another_tokenizer_is_refused(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(train_bpe(["other text " * 30], 300), encoding="utf-8")
    with pytest.raises(DataError, match="made with another tokenizer.*set data.tokenizer to"):
        read_all(copied, tmp_path)


def test_wrong_dtype_and_version_are_refused(copied: Path) -> None:
    edit_manifest(copied, dtype="uint32")
    with pytest.raises(DataError, match="does not match its index"):
        read_all(copied)
    with pytest.raises(DataError):
        verify(copied)
    for change, message in [
        ({"dtype": "int16"}, "dtype int16"),
        ({"version": 9}, "version 9"),
        ({"format": "x"}, "x version"),
    ]:
        edit_manifest(copied, **{"dtype": "uint16", "version": 1, **change})
        with pytest.raises(DataError, match=message):
            ShardSet(copied)
    (copied / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="not a shard manifest"):
        ShardSet(copied)


def test_tokens_outside_the_vocabulary_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shutil.copy(tokenizer.path, tmp_path / "tokenizer.json")
    rows = write_shard(tmp_path / "x-000000.tar", [({}, np.array([5, 700, 0]))], "uint16")
    file = tmp_path / "x-000000.tar"
    write_manifest(
        tmp_path,
        load_tokenizer(tmp_path),
        "uint16",
        [{"file": file.name, "domain": "x", "bytes": file.stat().st_size, "sha256": sha256_file(file)}],
        [rows],
        {},
    )
    with pytest.raises(DataError, match="token 700, outside the vocabulary"):
        read_all(tmp_path)
    with pytest.raises(DataError, match="x-000000.tar holds the token 700"):
        verify(tmp_path)
    config = DataConfig(tokenizer=str(tmp_path), mix=[MixEntry("x", str(tmp_path), 1.0)], unreadable="skip")
    options = {"lanes": 1, "lane_ids": [0], "batch": 1, "context": 512, "chunk_size": 16, "seed": 1}
    with pytest.raises(DataError, match="token 700"):  # in a haystack, too, and never skipped: the writer is wrong
        open_stream(config, **options, synthetic={"rate": 1.0}).next_arrays()


def test_a_shard_that_vanishes_while_reading_is_named(copied: Path) -> None:
    shards = ShardSet(copied)
    (copied / "tales-000000.tar").rename(copied / "away")
    row = int(
        np.flatnonzero(shards.index["shard"] == [f.name for f in shards.shard_files].index("tales-000000.tar"))[0]
    )
    with pytest.raises(DataError, match="cannot open shard .*tales-000000.tar"):
        shards.document(row)


def test_open_files_stay_below_the_limit_of_the_process(
    copied: Path, numbered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest is closed, also when it is another folder's; what was closed is opened again; nothing stays open."""
    files = OpenFiles()
    monkeypatch.setattr(shards_module, "OPEN_FILES", files)
    monkeypatch.setattr(files, "limit", lambda: 2)
    sets = [ShardSet(copied), ShardSet(numbered)]
    expected = [[s.document(i) for i in range(s.documents)] for s in sets]
    handles: set[int] = set()
    for number in range(60):
        data, wanted = sets[number % 2], expected[number % 2]
        row = (7 * number) % data.documents
        assert np.array_equal(data.document(row), wanted[row])
        opened = [handle for s in sets for handle in s._open.values()]
        assert len(opened) <= 2 and all(os.fstat(handle) for handle in opened)
        handles.update(opened)
    for data in sets:
        data.close()
    for handle in handles:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(handle)


def test_the_limit_follows_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed, limit in [(1024, 768), (100, 50), (1, 1), (resource.RLIM_INFINITY, sys.maxsize)]:
        monkeypatch.setattr(resource, "getrlimit", lambda what, allowed=allowed: (allowed, allowed))
        assert OPEN_FILES.limit() == limit
    monkeypatch.undo()
    script = (
        "import resource as r; from data_pipeline.processes import allow_open_files\n"
        "hard = r.getrlimit(r.RLIMIT_NOFILE)[1]; r.setrlimit(r.RLIMIT_NOFILE, (64, hard)); allow_open_files()\n"
        "assert r.getrlimit(r.RLIMIT_NOFILE) == (hard, hard)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def test_ten_thousand_shards_cost_no_more_than_what_is_read(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening 10,000 shards opens none of them and takes little memory; a batch opens what it reads, once; a saved
    position is continued without reading what lies before it."""
    shutil.copy(tokenizer.path, tmp_path / "tokenizer.json")
    rows = write_shard(tmp_path / "first.tar", [({}, np.array([7, 8, 9, 0]))] * 3, "uint16")
    files = []
    for number in range(10_000):
        file = tmp_path / f"x-{number:06d}.tar"
        file.hardlink_to(tmp_path / "first.tar")
        files.append({"file": file.name, "domain": "x", "bytes": file.stat().st_size, "sha256": ""})
    write_manifest(tmp_path, tokenizer, "uint16", files, [rows.copy() for _ in files], {})
    reads: list[int] = []
    pread = ShardSet._pread
    monkeypatch.setattr(ShardSet, "_pread", lambda self, shard, *a: (reads.append(shard), pread(self, shard, *a))[1])
    config = DataConfig(tokenizer=str(tmp_path), mix=[MixEntry("x", str(tmp_path), 1.0)])
    options = {"lanes": 2, "lane_ids": [0, 1], "batch": 2, "context": 256, "chunk_size": 16, "seed": 1}

    def open_it() -> BatchStream:
        return open_stream(config, **options, synthetic={"rate": 0.0})

    tracemalloc.start()
    stream = open_it()
    assert not reads and not stream._domains[0].shards._open
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
    for _ in range(20):
        stream.next_arrays()
    assert len(reads) == 20 * 2 * 256 // 16  # one read for each of the documents
    opened = stream._domains[0].shards._open
    assert set(opened) == set(reads) and len(opened) < len(reads)  # each was opened once
    state = stream.state_dict()
    expected = stream.next_arrays()
    reads.clear()
    again = open_it()
    again.load_state_dict(state)
    assert not reads
    assert np.array_equal(again.next_arrays()["tokens"], expected["tokens"])
    assert len(reads) == 2 * 256 // 16
