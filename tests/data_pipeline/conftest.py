"""A small corpus of three domains and its shards, made once per session."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import DataConfig, MixEntry
from data_pipeline.shards import write_manifest, write_shard
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from data_pipeline.tokenizing import tokenize
from data_pipeline.words import QUALITIES, WORDS

UNIQUE = 5000
"""Numbered shards hold ids from here on, each once; the tokenizer's own ids are all smaller."""


def make_text(rng: np.random.Generator, sentences: int) -> str:
    """Sentences of common words."""
    lines = []
    for _ in range(sentences):
        nouns, adjectives = rng.choice(WORDS, 3), rng.choice(QUALITIES, 2)
        lines.append(f"The {adjectives[0]} {nouns[0]} saw a {adjectives[1]} {nouns[1]} near the {nouns[2]}.")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with tales.jsonl (two domains), news.txt and a held-out file."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(7)
    records = [{"id": f"t{i}", "domain": "tales", "text": make_text(rng, int(rng.integers(1, 30)))} for i in range(40)]
    records += [{"id": f"n{i}", "domain": "notes", "text": make_text(rng, int(rng.integers(1, 8)))} for i in range(30)]
    records[5]["text"] = "Ünïcode — 漢字 and <|endoftext|> are text, 1234567890 too.\n"
    records.insert(9, {"id": "empty", "domain": "tales", "text": "  \n"})
    (folder / "tales.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    (folder / "news.txt").write_text(make_text(rng, 600))
    (folder / "held_out.jsonl").write_text(json.dumps({"text": "HELD OUT"}) + "\n")
    return folder


@pytest.fixture(scope="session")
def shards(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as shards: domains notes, tales (several shards) and text (one long document). Read-only."""
    out = tmp_path_factory.mktemp("tokenized") / "shards"
    tokenize([corpus], out, "bpe:600", shard_bytes=8000, workers=1, quiet=True)
    return out


@pytest.fixture(scope="session")
def tokenizer(shards: Path) -> Tokenizer:
    return load_tokenizer(shards)


@pytest.fixture(scope="session")
def data(shards: Path) -> DataConfig:
    """A mix over the small corpus."""
    path = str(shards)
    mix = [MixEntry("tales", path, 5.0), MixEntry("notes", path, 2.0), MixEntry("text", path, 3.0)]
    return DataConfig(
        tokenizer=path, mix=mix, mixes={"long": [MixEntry("text", path, 1.0), MixEntry("tales", path, 1.0)]}
    )


@pytest.fixture(scope="session")
def numbered(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 23 documents whose ids are all different (closing eos apart), 1 to 40,000 tokens long."""
    folder = tmp_path_factory.mktemp("numbered")
    (folder / "tokenizer.json").write_bytes(Path(tokenizer.path).read_bytes())
    rng = np.random.default_rng(3)
    lengths = [*rng.integers(1, 300, 19).tolist(), 1, 16, 1000, 40_000]
    start, documents = UNIQUE, []
    for length in lengths:
        documents.append(np.append(np.arange(start, start + length), tokenizer.eos_id))
        start += length
    rows, files = [], []
    for number in range(3):
        file = folder / f"numbers-{number:06d}.tar"
        rows.append(write_shard(file, [({}, ids) for ids in documents[number::3]], "uint32"))
        files.append({"file": file.name, "domain": "numbers", "bytes": file.stat().st_size, "sha256": ""})
    manifest = write_manifest(folder, tokenizer, "uint32", files, rows, {})
    manifest["tokenizer"]["vocab_size"] = start  # the numbers are no tokens of the tokenizer
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
