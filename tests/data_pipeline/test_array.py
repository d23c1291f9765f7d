"""Tokenizing over the tasks of an array, and a merge that is killed at every step."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import array, commands
from data_pipeline.array import merge, share_of
from data_pipeline.errors import DataError
from data_pipeline.shards import ShardSet, verify
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizing import tokenize


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Seven files; two texts are in several of them, one record is broken."""
    rng = np.random.default_rng(2)
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(7):
        texts = [f"document {rng.integers(10**9)} of file {number}" for _ in range(rng.integers(1, 9))] + ["the same"]
        records = [{"text": t, "domain": "ab"[i % 2]} for i, t in enumerate(texts)] + [{"text": "again", "domain": "c"}]
        (folder / f"f{number}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    with (folder / "f3.jsonl").open("a") as file:
        file.write("{broken\n")
    return sorted(folder.iterdir())


def texts_of(folder: Path, tokenizer: Tokenizer) -> list[str]:
    shards = ShardSet(folder)
    return sorted(tokenizer.decode(shards.document(i)) for i in range(shards.documents))


def run_tasks(files: list[Path], out: Path, tokenizer: Tokenizer, size: int, **options) -> None:
    for index in range(size):
        tokenize(files, out, tokenizer.path, shard_bytes=100, workers=1, array=(index, size), quiet=True, **options)


def test_every_file_belongs_to_one_task(files: list[Path]) -> None:
    for size in (1, 2, 3, 9):
        shares = [share_of(files, index, size) for index in range(size)]
        assert sorted(sum(shares, [])) == files
        sizes = [sum(f.stat().st_size for f in share) for share in shares]
        assert max(sizes) - min(sizes) <= max(f.stat().st_size for f in files)
    with pytest.raises(DataError, match="between 0 and 1"):
        share_of(files, 2, 2)


@pytest.mark.parametrize("dedup", ["none", "exact"])
@pytest.mark.parametrize("size", [2, 9])
def test_merged_tasks_hold_the_documents_of_a_single_call(
    files: list[Path], tmp_path: Path, tokenizer: Tokenizer, size: int, dedup: str
) -> None:
    single = tokenize(files, tmp_path / "single", tokenizer.path, dedup=dedup, workers=1, quiet=True)
    run_tasks(files, tmp_path / "out", tokenizer, size, dedup=dedup)
    assert not (tmp_path / "out").exists()
    manifest = merge(tmp_path / "out", quiet=True)
    assert texts_of(tmp_path / "out", tokenizer) == texts_of(tmp_path / "single", tokenizer)
    assert manifest["tokens"] == single["tokens"] and len(manifest["shards"]) > 3
    same = manifest["duplicates_of_other_tasks"] + manifest["left_out"].get("duplicate", 0)
    assert same == single["left_out"].get("duplicate", 0)
    assert manifest["left_out"]["no JSON text"] == 1 and "broken" not in str(texts_of(tmp_path / "out", tokenizer))
    assert len((tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()) == sum(manifest["left_out"].values())
    verify(tmp_path / "out")
    assert not (tmp_path / "out.array").exists()


def test_a_merge_killed_anywhere_is_repeated(
    files: list[Path], tmp_path: Path, tokenizer: Tokenizer, monkeypatch
) -> None:
    """Every system call of the merge that changes a name or removes one is the last one, once."""
    run_tasks(files, tmp_path / "expected", tokenizer, 3, dedup="exact")
    expected = merge(tmp_path / "expected", quiet=True)
    run_tasks(files, tmp_path / "out", tokenizer, 3, dedup="exact")
    kills = [0, 0]

    def dying(function):
        def call(*arguments, **options):
            kills[0] += 1
            if kills[0] > kills[1]:
                kills[:] = [0, kills[1] + 1]
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return call

    for owner, name in [(Path, "replace"), (Path, "rename"), (array.shutil, "rmtree"), (array.shutil, "copy")]:
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    manifest = None
    while manifest is None:
        try:
            kills[0] = 0
            manifest = merge(tmp_path / "out", quiet=True)
        except KeyboardInterrupt:
            continue
    monkeypatch.undo()
    assert kills[1] > 4
    assert manifest == expected
    verify(tmp_path / "out")
    assert not (tmp_path / "out.array").exists()


def test_missing_or_different_tasks_are_named(files: list[Path], tmp_path: Path, tokenizer: Tokenizer) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match="no array tasks beside"):
        merge(out)
    for index in (0, 2):
        tokenize(files, out, tokenizer.path, array=(index, 4), workers=1, quiet=True)
    with pytest.raises(DataError, match="2 of 4 tasks .* run them again: --array=1,3"):
        merge(out)
    for index in (1, 3):
        tokenize(files, out, tokenizer.path, array=(index, 4), dedup="exact", workers=1, quiet=True)
    with pytest.raises(DataError, match="called with different options"):
        merge(out)
    tokenize(files, out, tokenizer.path, array=(0, 5), workers=1, quiet=True)
    with pytest.raises(DataError, match="arrays of different sizes"):
        merge(out)
    with pytest.raises(DataError, match="cannot each train bpe:300"):
        tokenize(files, out, "bpe:300", array=(0, 2), workers=1, quiet=True)
    assert not out.exists()


def test_slurm_names_the_task(files: list[Path], tmp_path: Path, tokenizer: Tokenizer, monkeypatch) -> None:
    """Two array tasks by their environment (an array that starts at 1), then the merge command."""
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    out = str(tmp_path / "out")

    def run(*arguments: str) -> int:
        parser = argparse.ArgumentParser()
        commands.add_arguments(parser)
        return commands.main(parser.parse_args(arguments))

    for task in ("1", "2"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        assert run("tokenize", str(files[0].parent), "--out", out, "--tokenizer", tokenizer.path, "--workers", "1") == 0
    assert run("merge", out) == 0
    assert ShardSet(out).documents == sum(len(f.read_text().splitlines()) for f in files) - 1
