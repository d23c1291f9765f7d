"""`hsa train` at other layouts under torchrun: the losses of one rank, probes, and checkpoints between layouts."""

import json

import pytest

from tests.conftest import losses

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def train(hsa, recipe, run_dir, *options, ranks=1):
    done = hsa("train", recipe, *options, "--run-dir", run_dir, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_same_losses(run_dir, reference):
    for (_, stage, loss, norm), (_, expected_stage, expected, expected_norm) in zip(
        losses(run_dir), losses(reference), strict=True
    ):
        assert stage == expected_stage
        assert loss == pytest.approx(expected, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_wanders_through_layouts(tiny_recipe, hsa, tmp_path, optimizer):
    """Each start has another layout and goes on from the checkpoint of the one before."""
    whole, wandering = tmp_path / "whole", tmp_path / "wandering"
    name = f"optimizer.name={optimizer}"
    train(hsa, tiny_recipe, whole, name, "micro_batch=1")
    forms = ["parallel.tensor=2", "parallel.context=2", "parallel.pipeline=2", "parallel.expert=2"]
    for limit, form in zip((3, 6, 9, 11), forms, strict=True):
        train(hsa, tiny_recipe, wandering, name, "micro_batch=1", form, f"max_steps={limit}", ranks=2)
    train(hsa, tiny_recipe, wandering, name, "micro_batch=1")
    assert_same_losses(wandering, whole)


@pytest.mark.parametrize("form", ["tensor", "context", "pipeline"])
def test_a_stage_left_by_metric_is_left_at_the_same_step(tiny_recipe, hsa, tmp_path, form):
    """The probe answers the same questions at every layout."""
    options = [
        "stages.first.until={metric: niah.single@104, at_least: 0.0, max_tokens: 1792, every_steps: 2, samples: 2}",
        "max_steps=3",
    ]
    train(hsa, tiny_recipe, tmp_path / "spread", *options, f"parallel.{form}=2", ranks=2)
    run = json.loads((tmp_path / "spread" / "run.json").read_text())
    assert [entry["stage"] for entry in run["position"]["exits"]] == ["first"]
    assert [stage for _, stage, _, _ in losses(tmp_path / "spread")] == ["first", "first", "second"]


def test_impossible_layouts_are_refused_before_anything_starts(tiny_recipe, hsa, tmp_path):
    for option, words in (
        ("parallel.tensor=3", "tensor 3"),
        ("parallel.pipeline=9", "pipeline 9"),
        ("parallel.context=3", "context 3"),
    ):
        done = hsa("train", tiny_recipe, option, "--run-dir", tmp_path / "run")
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "run").exists()
