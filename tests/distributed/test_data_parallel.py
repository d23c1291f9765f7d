"""Two gloo ranks under torchrun: the losses of one rank."""

import json
import shutil

import pytest

from data_pipeline.shards import ShardSet
from tests.conftest import losses

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("options", [[], ["optimizer.name=muon"]], ids=["adamw", "muon"])
def test_two_ranks_give_the_losses_of_one(tiny_recipe, hsa, tmp_path, options):
    one, two = tmp_path / "one", tmp_path / "two"
    for run_dir, ranks in ((one, 1), (two, 2)):
        done = hsa("train", tiny_recipe, *options, "--run-dir", run_dir, ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
    for (_, stage, loss, norm), (_, expected_stage, expected, expected_norm) in zip(
        losses(two), losses(one), strict=True
    ):
        assert stage == expected_stage
        assert loss == pytest.approx(expected, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-3)


def test_a_run_goes_on_at_another_number_of_ranks(tiny_recipe, hsa, tmp_path):
    whole, resized = tmp_path / "whole", tmp_path / "resized"
    assert hsa("train", tiny_recipe, "--run-dir", whole).returncode == 0
    for ranks, limit in ((2, 4), (1, 8), (2, 12)):
        done = hsa("train", tiny_recipe, f"max_steps={limit}", "--run-dir", resized, ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
    for (_, _, loss, _), (_, _, expected, _) in zip(losses(resized), losses(whole), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)


def test_shards_that_cannot_be_read_are_counted_over_all_ranks(tiny_data, tiny_recipe, hsa, tmp_path):
    """Three of four books are damaged. The log names the shard, the metrics and the status count what
    both ranks have left out, and so does a run that goes on from a checkpoint."""
    damaged = shutil.copytree(tiny_data / "shards", tmp_path / "damaged")
    shards = ShardSet(damaged)
    file = shards.shard_files[0]
    content = bytearray(file.read_bytes())
    books = shards.domain("books")
    for row in range(books.first, books.first + books.documents):
        content[int(shards.index[row]["offset"])] ^= row % 4 > 0
    file.write_bytes(content)
    tiny_recipe.write_text(tiny_recipe.read_text().replace(str(tiny_data / "shards"), str(damaged)))
    run, last = tmp_path / "run", {}
    for limit in (7, 9):
        options = ("data.unreadable=skip", f"max_steps={limit}", "--run-dir", run)
        done = hsa("train", tiny_recipe, *options, ranks=2)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"documents of {file} that cannot be read" in done.stdout
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        named = [record for record in records if "skipped" in record]
        assert named and all(record["skipped"] == [[str(file), record["skipped_documents"]]] for record in named)
        counts = [record.get("skipped_documents", 0) for record in records]
        assert counts == sorted(counts) and counts[-1] >= counts[0]
        last = json.loads(hsa("status", run, "--json").stdout)["skipped"]
        assert last == {str(file): counts[-1]} and counts[-1] > 1
        assert {"loss/books", "loss_from/0", "loss_from/32"} <= set().union(*records)
