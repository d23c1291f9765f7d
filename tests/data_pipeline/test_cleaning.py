"""What is left out is counted and written down: broken records, empty ones, duplicates. And Parquet."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards import ShardSet, verify
from data_pipeline.sources import read_documents
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizing import tokenize

BROKEN = b'{"text": "Z\xfc"}\n'


def jsonl(file: Path, *texts: str) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def texts(folder: Path, tokenizer: Tokenizer) -> list[str]:
    shards = ShardSet(folder)
    return [tokenizer.decode(shards.document(i)) for i in range(shards.documents)]


def put_aside(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def test_broken_records_are_put_aside_and_the_others_kept(tmp_path: Path, tokenizer: Tokenizer, capsys) -> None:
    source = tmp_path / "mixed.jsonl"
    lines = [b'{"text": "one"}\n', BROKEN, b'{"txt": "x"}\n', b'{"text": " "}\n', b'{"text": "\\ud800 half"}\n']
    lines += [b'{"text": 3}\n', b"[" * 100_000 + b"\n", b'{"text": "' + b"long " * 100 + b'"}\n', b'{"text": "two"}\n']
    source.write_bytes(b"".join(lines))
    (tmp_path / "latin.txt").write_bytes("Zürich".encode("latin-1"))
    out = tmp_path / "out"
    files = [source, tmp_path / "latin.txt"]
    manifest = tokenize(files, out, tokenizer.path, max_bytes=200, workers=1, quiet=True)
    assert texts(out, tokenizer) == ["one", "two"]
    assert manifest["left_out"] == {"not UTF-8": 3, "no JSON text": 3, "empty": 1, "too long": 1}
    assert manifest["empty_documents"] == 1
    error = capsys.readouterr().err  # said although it is quiet
    assert "3 no JSON text, 3 not UTF-8, 1 too long; see" in error and "quarantine.jsonl" in error
    aside = put_aside(out)
    assert [(r["source"], r["place"]) for r in aside] == [
        *[("mixed.jsonl", f"line {n}") for n in (2, 3, 4, 5, 6, 7, 8)],
        ("latin.txt", ""),
    ]
    assert base64.b64decode(aside[0]["data_base64"]) == BROKEN and "byte 27 is 0xfc" in aside[0]["detail"]
    assert aside[6]["reason"] == "too long" and "raise --max-mb" in aside[6]["detail"]
    assert verify(out)["documents"] == 2
    for strict in (lambda: tokenize([source], tmp_path / "s", tokenizer.path, strict=True, quiet=True, workers=1),):
        with pytest.raises(DataError, match="mixed.jsonl is not UTF-8: byte 27"):
            strict()


def test_nothing_but_broken_records_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "bad.jsonl").write_bytes(BROKEN * 3)
    with pytest.raises(DataError, match=r"every record was put aside \(3 not UTF-8\), see .*quarantine.jsonl"):
        tokenize([tmp_path / "bad.jsonl"], tmp_path / "out", tokenizer.path, workers=1, quiet=True)
    assert not (tmp_path / "out").exists()


def test_exact_and_near_duplicates(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(400)]
    first = " ".join(rng.permutation(words))
    near = first.replace("word7 ", "word8 ")
    other = " ".join(rng.permutation(words))
    source = jsonl(tmp_path / "d.jsonl", first, other, first, near, "short", "short", "shorter")
    kept = {"none": 7, "exact": 5, "near": 4}
    for dedup, documents in kept.items():
        manifest = tokenize([source], tmp_path / dedup, tokenizer.path, dedup=dedup, workers=1, quiet=True)
        assert manifest["documents"] == documents and sum(manifest["left_out"].values()) == 7 - documents
    reasons = {r["id"]: r["detail"] for r in put_aside(tmp_path / "near")}
    assert reasons["d.jsonl:4"] == "nearly the text of d.jsonl line 1"
    assert reasons["d.jsonl:3"] == reasons["d.jsonl:6"] == "the same text as an earlier document"
    with pytest.raises(DataError, match="--dedup fuzzy: choose from none, exact, near"):
        tokenize([source], tmp_path / "x", tokenizer.path, dedup="fuzzy", workers=1, quiet=True)


def test_parquet(tmp_path: Path, tokenizer: Tokenizer, capsys) -> None:
    file = tmp_path / "web.parquet"
    columns = {"text": ["one", None, "three", ""], "id": ["a", "b", None, "d"], "other": [1, 2, 3, 4]}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    found = list(read_documents([file], bad=lambda record: None))
    assert [(d.id, d.domain, d.text) for d in found] == [
        ("a", "web", "one"),
        ("web.parquet:3", "web", "three"),
        ("d", "web", ""),
    ]
    manifest = tokenize([tmp_path], tmp_path / "out", tokenizer.path, workers=1, quiet=True)
    assert manifest["left_out"] == {"no text": 1, "empty": 1} and texts(tmp_path / "out", tokenizer) == ["one", "three"]
    with pytest.raises(DataError, match='web.parquet row 2: "text" is NoneType'):
        list(read_documents([file]))
    binary = tmp_path / "binary.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"fine", b"Z\xfc"]}), binary)
    with pytest.raises(DataError, match="binary.parquet row 2 is not UTF-8"):
        list(read_documents([binary]))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), binary)
    with pytest.raises(DataError, match='no column "text" .there: body'):
        list(read_documents([binary]))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DataError, match="web.parquet is no Parquet file, damaged or truncated"):
        list(read_documents([file]))


@pytest.mark.parametrize("package", ["pyarrow", "datasketch", "sentencepiece"])
def test_a_missing_package_names_the_extra(package: str, tmp_path: Path, tokenizer: Tokenizer, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    source = jsonl(tmp_path / "a.jsonl", "text")
    (tmp_path / "b.parquet").write_bytes(b"")
    (tmp_path / "c.model").write_bytes(b"")
    calls = {
        "pyarrow": lambda: tokenize([tmp_path / "b.parquet"], tmp_path / "o", tokenizer.path, workers=1, quiet=True),
        "datasketch": lambda: tokenize([source], tmp_path / "o", tokenizer.path, dedup="near", workers=1, quiet=True),
        "sentencepiece": lambda: tokenize([source], tmp_path / "o", str(tmp_path / "c.model"), workers=1, quiet=True),
    }
    with pytest.raises(DataError, match=rf"{package}.*hsa-ultralong\[data\]"):
        calls[package]()
