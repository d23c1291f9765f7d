"""The graphed pass of a training step: what keeps it, and with it the memory of its activations, alive."""

import gc
import weakref
from types import SimpleNamespace

import torch

from pretrain import graphed, train_step


def test_nothing_holds_the_step_of_a_stage_that_has_ended(monkeypatch):
    """The next stage's step takes its place and it is gone at once, without the garbage collector."""
    monkeypatch.setattr(graphed, "side_stream", lambda device: None)
    monkeypatch.setattr(train_step.parallel_state, "get_context_parallel_group", lambda: None)
    chunk = SimpleNamespace(config=SimpleNamespace(num_moe_experts=None))

    def make_step():
        return train_step.TrainStep([chunk], None, ["a"], torch.device("cpu"), cuda_graph=True)

    gc.disable()
    try:
        step = make_step()
        ended = weakref.ref(step), weakref.ref(step._graphed)
        step = make_step()
        assert [held() for held in ended] == [None, None]
    finally:
        gc.enable()
