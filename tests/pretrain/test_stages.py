"""The stage controller: when stages end, what the learning rate does, what is left to train."""

import pytest

from pretrain.recipe import load_recipe
from pretrain.stages import Position, StageController

SHORT = [
    "stages[0].until.max_tokens=8192",  # 4 steps of 32 x 64 tokens
    "stages[0].until.every_steps=2",
    "stages[1].until.tokens=4096",  # 2 steps
    "stages[2].until.tokens=12288",  # 3 steps
    "optimizer.warmup_steps=4",
]


def controller(*overrides: str) -> StageController:
    return StageController(load_recipe("demo", [*SHORT, *overrides]).recipe)


def test_a_metric_ends_its_stage_early():
    stages = controller()
    stages.advance()
    assert not stages.probe_due()
    stages.advance()
    assert stages.probe_due()
    assert stages.exit_reason(0.94) is None
    reason = stages.exit_reason(0.96)
    assert reason is not None and "reached" in reason
    stages.leave_stage(reason, 0.96)
    assert stages.stage.name == "pretrain" and stages.completed("warmup") and not stages.completed("pretrain")
    assert stages.position.stage_step == 0 and stages.position.step == 2


def test_a_metric_never_reached_ends_at_max_tokens_and_says_so():
    stages = controller()
    for _ in range(4):
        stages.advance()
    assert stages.probe_due()
    reason = stages.exit_reason(0.5)
    assert reason is not None and "did NOT reach" in reason


def test_all_stages_to_the_end():
    stages, names = controller(), []
    while not stages.position.finished:
        stages.advance()
        reason = stages.exit_reason(0.0 if stages.probe_due() else None)
        if reason:
            names.append((stages.stage.name, stages.position.step))
            stages.leave_stage(reason)
    assert names == [("warmup", 4), ("pretrain", 6), ("long", 9)]
    assert stages.position.tokens == 8192 + 4096 + 12288
    assert stages.remaining_tokens() == 0
    assert stages.plan()["total_steps"] == 9


def test_a_position_survives_its_dictionary():
    stages = controller()
    stages.advance()
    again = StageController(stages.recipe, Position(**stages.position.as_dict()))
    assert again.position == stages.position and again.remaining_tokens() == stages.remaining_tokens()


def test_learning_rate_warms_up_over_the_run_and_follows_the_stage():
    stages = controller(
        "stages[2].learning_rate.schedule=linear", "stages[2].learning_rate.end=0", "stages[2].learning_rate.start=1"
    )
    factors = []
    while not stages.position.finished:
        factors.append(stages.learning_rate_factor())
        stages.advance()
        reason = stages.exit_reason(0.0 if stages.probe_due() else None)
        if reason:
            stages.leave_stage(reason)
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.5, 0])


def test_cosine():
    stages = controller(
        "stages[0].learning_rate.schedule=cosine", "stages[0].learning_rate.end=0.1", "optimizer.warmup_steps=0"
    )
    factors = []
    for _ in range(4):
        factors.append(stages.learning_rate_factor())
        stages.advance()
    assert factors == pytest.approx([1.0, 0.775, 0.325, 0.1])
