"""`hsa train` at other layouts under torchrun: the losses of one rank, probes, and checkpoints between layouts."""

import json

import pytest

from pretrain.cli import main
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


def evaluated(checkpoint, tmp_path, capsys):
    """Held-out loss and continuation of a prompt, by `hsa eval ppl` and `hsa generate` in this process."""
    out, prompt = tmp_path / "ppl.json", tmp_path / "prompt.txt"
    assert main(["eval", "ppl", str(checkpoint), "--lengths", "64", "--samples", "4", "--json", str(out)]) == 0
    prompt.write_text("The old house was")
    capsys.readouterr()
    assert main(["generate", str(checkpoint), "--prompt-file", str(prompt), "--max-new-tokens", "8"]) == 0
    return json.loads(out.read_text())["contexts"][0]["nll"], capsys.readouterr().out


ASYNC = "checkpoint.async=true"
# What a user types, and the last step that it trains.
LEGS = {
    "adamw": {"tensor": 3, "pipeline": 5, "context": 7, "expert": 9, "data": 11},
    "muon": {"pipeline": 4, "tensor": 9},
}


@pytest.mark.parametrize("optimizer", LEGS)
def test_a_run_wanders_through_layouts(tiny_recipe, hsa, tmp_path, capsys, optimizer):
    """Each start has another layout and goes on from the checkpoint of the one before; one rank ends the run. Every
    checkpoint says what that of one rank says.
    """
    whole, wandering = tmp_path / "whole", tmp_path / "wandering"
    options = [f"optimizer.name={optimizer}", "micro_batch=1", "checkpoint.every_steps=1", "checkpoint.keep_last=20"]
    train(hsa, tiny_recipe, whole, *options)
    for form, limit in LEGS[optimizer].items():
        train(hsa, tiny_recipe, wandering, *options, f"parallel.{form}=2", f"max_steps={limit}", ASYNC, ranks=2)
    train(hsa, tiny_recipe, wandering, *options, ASYNC)
    assert_same_losses(wandering, whole)
    for step in LEGS[optimizer].values():
        name = f"checkpoints/step_{step:08d}"
        (loss, text), (expected, same) = (evaluated(run / name, tmp_path, capsys) for run in (wandering, whole))
        assert loss == pytest.approx(expected, rel=1e-5)
        assert text and text == same


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
