"""Optimizer state kept on the host: the same training to the last bit, and nothing of it on the device meanwhile."""

import pytest
import torch

from parallel import checkpoint, mesh

KINDS = {
    "adamw": {"name": "adamw"},
    "adamw, replicated": {"name": "adamw", "distributed": False},
    "muon": {"name": "muon"},
}


def state_tensors(trained):
    """Moments and master copies."""
    model = {p.untyped_storage().data_ptr() for p in trained.chunks[0].parameters()}
    for chained in trained.optimizer.chained_optimizers:
        for state in chained.optimizer.state.values():
            yield from (value for value in state.values() if value.dim())
        for group in chained.optimizer.param_groups:
            yield from (p for p in group["params"] if p.untyped_storage().data_ptr() not in model)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_equal_to_the_last_bit(world_of_one, toy, kind, bf16, tmp_path):
    runs = []
    for offload in (False, True):
        mesh.seed_everything(11)
        settings = dict(KINDS[kind])
        trained = toy.Toy(toy.settings(settings.pop("name"), **settings, offload=offload), bf16=bf16, experts=4)
        losses = [trained.step() for _ in range(3)]
        path = checkpoint.save_checkpoint(tmp_path / str(offload), 3, trained.chunks, trained.optimizer, extra={})
        losses += [trained.step() for _ in range(2)]
        runs.append((losses, trained.weights(), path, trained))
    (plain, plain_weights, plain_path, _), (losses, weights, path, trained) = runs
    assert losses == plain and all(torch.equal(weights[name], plain_weights[name]) for name in weights)
    # What an offloading run saved is what the other one saved: each goes on from the other's checkpoint.
    for source in (plain_path, path):
        checkpoint.load_checkpoint(source, trained.chunks, trained.optimizer)
        trained.steps = 3
        assert [trained.step() for _ in range(2)] == plain[3:]


@pytest.mark.parametrize("kind", KINDS)
def test_between_updates_the_state_takes_no_memory(world_of_one, toy, kind):
    settings = dict(KINDS[kind])
    trained = toy.Toy(toy.settings(settings.pop("name"), **settings, offload=True), bf16=True)
    trained.step()
    held = {id(x): x for x in state_tensors(trained)}
    assert sum(x.untyped_storage().nbytes() for x in held.values()) > 100_000
    trained.optimizer.zero_grad()
    assert not trained.optimizer.host.is_here
    assert all(x.untyped_storage().nbytes() <= 4 for x in held.values())
    trained.optimizer.init_state()  # whoever wants the state, a checkpoint for one, gets it
    assert trained.optimizer.host.is_here and all(x.isfinite().all() for x in state_tensors(trained))
