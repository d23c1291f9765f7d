"""`hsa bench step` and `hsa bench checkpoint`: figures of a tiny recipe that belong together; no time is judged."""

import json

import pytest


def test_step_compares_variants_in_one_run(tiny_recipe, hsa, tmp_path):
    out = tmp_path / "step.json"
    options = ["--steps", "2", "--against", "recompute=full", "--against", "compute.grouped_experts=off"]
    done = hsa("bench", "step", tiny_recipe, "batch=4", *options, "--stage", "second", "--json", out)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert figures["stage"] == "second" and figures["overrides"] == ["batch=4"]
    plain, full, _ = figures["variants"]
    assert [row["name"] for row in figures["variants"]] == ["as it is", "recompute=full", "compute.grouped_experts=off"]
    assert plain["time_ratio"] == 1 and full["planned_bytes"] < plain["planned_bytes"]
    for row in figures["variants"]:
        assert len(row["all_seconds"]) == 2 and row["tokens_per_second"] == pytest.approx(4 * 128 / row["seconds"])
        assert set(row["split_seconds"]) == {"data", "forward", "optimizer", "backward and reduction"}
        assert all(seconds > 0 for seconds in row["split_seconds"].values())


def test_checkpoint_is_saved_loaded_and_removed(tiny_recipe, hsa, tmp_path):
    out, folder = tmp_path / "checkpoint.json", tmp_path / "disk"
    folder.mkdir()
    done = hsa("bench", "checkpoint", tiny_recipe, "--dir", folder, "--repeats", "2", "--json", out)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert [row["name"] for row in figures["rows"]] == ["save", "load", "verify"]
    for row in figures["rows"]:
        assert row["gigabytes_per_second"] == pytest.approx(figures["bytes"] / row["seconds"] / 1e9)
    assert figures["bytes"] > 12 * 40_000 and not list(folder.iterdir())


def test_wrong_input_is_one_message(tiny_recipe, hsa):
    done = hsa("bench", "step", tiny_recipe, "--stage", "third")
    assert done.returncode == 2 and "the recipe's stages are first, second" in done.stderr
    assert "Traceback" not in done.stderr
