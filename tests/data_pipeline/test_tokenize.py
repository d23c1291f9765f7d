"""Text to shards and back, through plain webdataset; interrupted runs; broken input."""

from __future__ import annotations

import argparse
import fcntl
import gzip
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
import zstandard

from data_pipeline import commands, tokenizing
from data_pipeline.errors import DataError
from data_pipeline.shards import ShardSet, dtype_for, sha256_file, verify
from data_pipeline.sources import read_documents
from data_pipeline.tokenizer import Tokenizer, load_tokenizer, train_bpe
from data_pipeline.tokenizing import tokenize


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    commands.add_arguments(parser)
    return commands.main(parser.parse_args(arguments))


def gone(pid: int) -> bool:
    """The process ends within 20 seconds (a zombie that nobody collects has ended)."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def test_round_trip_through_plain_webdataset(corpus: Path, shards: Path, tokenizer: Tokenizer) -> None:
    """Every document that is not empty comes back as its text, in order within its domain."""
    expected: dict[str, list[str]] = {}
    for document in read_documents([corpus / "news.txt", corpus / "tales.jsonl"]):
        if document.text.strip():
            expected.setdefault(document.domain, []).append(document.text)
    found: dict[str, list[str]] = {}
    files = [str(f) for f in sorted(shards.glob("*.tar"))]
    assert len(files) > 5
    for sample in webdataset.WebDataset(files, shardshuffle=False):
        ids = np.frombuffer(sample["tokens.u16"], dtype="<u2")
        meta = json.loads(sample["json"])
        assert ids[-1] == tokenizer.eos_id and meta["length"] == len(ids)
        found.setdefault(meta["domain"], []).append(tokenizer.decode(ids))
    assert found == expected


def test_manifest_counts_and_hashes(shards: Path) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    index = np.load(shards / "index.npy")
    assert manifest["documents"] == len(index) == 70 + 1 and manifest["empty_documents"] == 1
    assert manifest["tokens"] == index["length"].sum() == sum(s["tokens"] for s in manifest["shards"])
    assert [d["name"] for d in manifest["domains"]] == ["notes", "tales", "text"]
    assert manifest["dtype"] == "uint16" and manifest["tokenizer"]["vocab_size"] == 600
    assert all(sha256_file(shards / s["file"]) == s["sha256"] for s in manifest["shards"])
    assert sorted(f.name for f in shards.iterdir()) == sorted(
        ["manifest.json", "index.npy", "tokenizer.json", "quarantine.jsonl", *(s["file"] for s in manifest["shards"])]
    )
    assert dtype_for(1 << 16) == "uint16" and dtype_for((1 << 16) + 1) == "uint32"


def test_compressed_sources_and_processes_give_the_same_tokens(corpus: Path, shards: Path, tmp_path: Path) -> None:
    text = (corpus / "tales.jsonl").read_bytes()
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "news.txt").write_bytes((corpus / "news.txt").read_bytes())
    for name, data in (("tales.jsonl.gz", gzip.compress(text)), ("tales.jsonl.zst", zstandard.compress(text))):
        (folder / name).write_bytes(data)
        out = tmp_path / name
        manifest = tokenize([folder], out, str(shards), shard_bytes=8000, workers=2, quiet=True)
        assert manifest["tokens"] == ShardSet(shards).tokens
        for field in ("length", "shard", "crc32"):  # offsets differ: the file's name is in the documents' meta
            assert np.array_equal(ShardSet(out).index[field], ShardSet(shards).index[field])
        (folder / name).unlink()


def test_an_interrupted_run_goes_on_and_leaves_the_same_shards(
    corpus: Path, shards: Path, tmp_path: Path, monkeypatch
) -> None:
    out = tmp_path / "out"
    written: list[str] = []
    write = tokenizing.write_shard

    def failing(path: Path, *arguments):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, *arguments)

    monkeypatch.setattr(tokenizing, "write_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        tokenize([corpus], out, "bpe:600", shard_bytes=8000, workers=1, quiet=True)
    assert not out.exists()
    again: list[str] = []
    monkeypatch.setattr(tokenizing, "write_shard", lambda path, *a: (again.append(path.name), write(path, *a))[1])
    monkeypatch.setattr(tokenizing, "train_bpe", lambda *a: pytest.fail("the tokenizer was trained before"))
    manifest = tokenize([corpus], out, "bpe:600", shard_bytes=8000, workers=1, quiet=True)
    assert not set(written) & set(again) and len(written + again) == len(manifest["shards"])
    assert manifest["shards"] == ShardSet(shards).manifest["shards"]


def test_a_changed_request_starts_afresh(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "request.json").write_text("{}")
    (partial / "old-000000.tar").write_text("left over")
    tokenize([corpus / "news.txt"], out, "bpe:300", domain="news", workers=1, quiet=True)
    assert [f.name for f in out.glob("*.tar")] == ["news-000000.tar"] and not partial.exists()


def test_two_calls_do_not_write_the_same_folder(corpus: Path, tmp_path: Path, shards: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is writing"):
            tokenize([corpus], tmp_path / "out", str(shards), workers=1, quiet=True)
    tokenize([corpus], tmp_path / "out", str(shards), workers=1, quiet=True)


def test_killed_command_leaves_no_workers_and_goes_on(corpus: Path, tmp_path: Path, shards: Path) -> None:
    """SIGKILL of the command: its worker processes leave, nothing is at DIR, the next call finishes."""
    out = tmp_path / "out"
    script = f"""
import multiprocessing, time
from data_pipeline import tokenizing

def slow(*args, **options):
    print(*[p.pid for p in multiprocessing.active_children()], flush=True)
    time.sleep(60)

if __name__ == "__main__":
    tokenizing.wait = slow
    tokenizing.tokenize([{str(corpus)!r}], {str(out)!r}, {str(shards)!r}, shard_bytes=8000, workers=2, quiet=True)
"""
    (tmp_path / "command.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = subprocess.Popen(
        [sys.executable, str(tmp_path / "command.py")], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert command.stdout is not None
    workers = [int(pid) for pid in command.stdout.readline().split()]
    assert workers
    command.kill()
    command.wait()
    command.stdout.close()
    assert all(gone(pid) for pid in workers)
    assert not out.exists()
    manifest = tokenize([corpus], out, str(shards), shard_bytes=8000, workers=1, quiet=True)
    assert manifest["documents"] == 71


def test_a_killed_worker_is_one_message_and_nothing_is_half_written(
    corpus: Path, tmp_path: Path, shards: Path, monkeypatch
) -> None:
    """SIGKILL of one of the worker processes; the same call then finishes with the shards of an unbroken one."""
    wait, out = tokenizing.wait, tmp_path / "out"
    others = set(multiprocessing.active_children())  # of earlier tests in this process

    def deadly(*args, **options):
        next(child for child in multiprocessing.active_children() if child not in others).kill()
        return wait(*args, **options)

    monkeypatch.setattr(tokenizing, "wait", deadly)
    with pytest.raises(DataError, match="a tokenizing process was killed .* the same command goes on"):
        tokenize([corpus], out, str(shards), shard_bytes=8000, workers=2, quiet=True)
    monkeypatch.undo()
    assert not out.exists() and set(multiprocessing.active_children()) <= others
    manifest = tokenize([corpus], out, str(shards), shard_bytes=8000, workers=1, quiet=True)
    assert manifest["index"]["sha256"] == json.loads((shards / "manifest.json").read_text())["index"]["sha256"]
    verify(out)


def test_commands(corpus: Path, tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "s")
    assert run("tokenize", str(corpus), "--out", out, "--tokenizer", "bpe:400", "--workers", "1", "--quiet") == 0
    assert run("verify", out) == 0
    assert "71 documents" in capsys.readouterr().out
    assert run("inspect", out) == 0
    tree = capsys.readouterr().out
    assert "tales  40 documents" in tree and "fingerprint" in tree
    assert run("inspect", out, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert sum(d["tokens"] for d in summary["domains"]) == summary["tokens"]
    for domain in summary["domains"]:
        assert sum(domain["tokens_by_length"].values()) == domain["tokens"]


def test_byte_level_bpe(tokenizer: Tokenizer) -> None:
    """Single digits, any bytes, no special tokens from text."""
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, 1, 600)
    for text in ["4821", "Zürich 漢字\t\n\n  x", "<|endoftext|><|pad|>", "\x00\x7f"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.eos_id, tokenizer.pad_id} & set(ids)
    digits = [tokenizer.encode(d) for d in "0123456789"]
    assert all(len(ids) == 1 for ids in digits)
    assert tokenizer.encode("4821") == sum((digits[int(d)] for d in "4821"), [])
    for text in ["The magic number for apple is 4821.", " VAR x = VAR yard.\n What? 12 and 7", "a  b\n\n c9"]:
        assert tokenizer.encode_words(text).tolist() == tokenizer.encode(text)
    assert train_bpe(["a b c " * 50], 300) == train_bpe(["a b c " * 50], 300)


def test_held_out_files_are_read_only_when_named(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer, shards: Path
) -> None:
    assert not any("held" in s["file"] for s in ShardSet(shards).manifest["sources"])
    out = tmp_path / "held"
    tokenize([corpus / "held_out.jsonl"], out, tokenizer.path, workers=1, quiet=True)
    assert ShardSet(out).documents == 1


def test_broken_input_is_one_clear_message(tmp_path: Path, corpus: Path, shards: Path) -> None:
    out = tmp_path / "out"

    def source(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    good = b'{"text": "fine"}\n'
    cases = [
        ([source("latin.txt", "Z\xfcrich".encode("latin-1"))], "latin.txt is not UTF-8: byte 1 is 0xfc"),
        ([source("latin.jsonl", good + b'{"text": "Z\xfc"}\n')], "latin.jsonl is not UTF-8: byte 28"),
        ([source("cut.jsonl", good + b'{"text": "fi')], "cut.jsonl line 2 is not a JSON object"),
        ([source("key.jsonl", b'{"txt": "fine"}\n')], "key.jsonl line 1 .*KeyError"),
        ([source("type.jsonl", b'{"text": 3}\n')], 'type.jsonl line 1: "text" is int'),
        ([source("cut.jsonl.gz", gzip.compress(good * 1000)[:-20])], "cut.jsonl.gz is damaged or truncated"),
        ([source("cut.jsonl.zst", b"no zstandard")], "cut.jsonl.zst is damaged or truncated"),
        ([source("empty.jsonl", b"")], "every document is empty"),
        ([source("blank.txt", b" \n")], "every document is empty"),
        ([tmp_path / "none.txt"], "no such source"),
        ([tmp_path / "bare"], "no text in .*bare"),
    ]
    (tmp_path / "bare").mkdir()
    for sources, message in cases:
        with pytest.raises(DataError, match=message):
            tokenize(sources, out, str(shards), workers=1, strict=True, quiet=True)
        assert not out.exists()
    for tokenizer, message in [
        ("bpe:many", "write bpe:N"),
        ("bpe:100", "at least 258"),
        (str(tmp_path), "no tokenizer at"),
        (str(tmp_path / "latin.txt"), "not a Hugging Face tokenizer.json"),
    ]:
        with pytest.raises(DataError, match=message):
            tokenize([corpus], out, tokenizer, workers=1, quiet=True)
    out.mkdir()
    with pytest.raises(DataError, match="out exists; remove it"):
        tokenize([corpus], out, str(shards), workers=1, quiet=True)
    with pytest.raises(DataError, match="need different names"):
        tokenize(
            [source("names.jsonl", b'{"text":"a","domain":"a b"}\n{"text":"b","domain":"a/b"}\n')],
            tmp_path / "o2",
            str(shards),
            workers=1,
            quiet=True,
        )


def test_a_tokenizer_without_end_of_document_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = Path(tokenizer.path).read_text(encoding="utf-8").replace("<|endoftext|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="no end-of-document token"):
        load_tokenizer(tmp_path)
