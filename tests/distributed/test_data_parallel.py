"""Two gloo ranks under torchrun: the losses of one rank."""

import pytest

from tests.conftest import losses

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize(
    "options", [[], ["optimizer.name=muon"], ["parallel.expert=2"]], ids=["adamw", "muon", "experts"]
)
def test_two_ranks_give_the_losses_of_one(tiny_recipe, hsa, tmp_path, options):
    one, two = tmp_path / "one", tmp_path / "two"
    single = [option for option in options if not option.startswith("parallel")]
    for run_dir, ranks, chosen in ((one, 1, single), (two, 2, options)):
        done = hsa("train", tiny_recipe, *chosen, "--run-dir", run_dir, ranks=ranks)
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
