"""Muon against plain torch: torch.optim.Muon, and a singular value decomposition."""

import pytest
import torch

from parallel.muon import Muon, orthogonalize, update_scale


@pytest.mark.parametrize("shape", [(32, 32), (24, 63), (65, 16), (3, 16, 40)])
def test_orthogonalize_keeps_directions_and_levels_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    # In the basis of the singular vectors the result is diagonal, with values near one.
    core = u.mT @ orthogonalize(matrix, 5) @ vh.mT
    values = core.diagonal(dim1=-2, dim2=-1)
    assert (values > 0.5).all() and (values < 1.25).all()
    assert torch.allclose(core - torch.diag_embed(values), torch.zeros_like(core), atol=1e-3)


def test_orthogonalize_of_zero_is_zero():
    assert torch.equal(orthogonalize(torch.zeros(4, 8)), torch.zeros(4, 8))


def test_batched_equals_one_by_one():
    stack = torch.randn(5, 12, 20, generator=torch.Generator().manual_seed(1))
    single = torch.stack([orthogonalize(matrix) for matrix in stack])
    torch.testing.assert_close(orthogonalize(stack), single, rtol=1e-5, atol=1e-6)


def test_update_scale():
    assert update_scale((8, 32)) == 1.0 and update_scale((32, 8)) == 2.0


def test_twenty_steps_equal_torch():
    """torch's orthogonalises in bfloat16, so the updates agree to its precision."""
    generator = torch.Generator().manual_seed(2)
    start = [torch.randn(16, 24, generator=generator), torch.randn(40, 16, generator=generator)]
    target = [torch.randn(tensor.shape, generator=generator) for tensor in start]
    ours = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    theirs = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    mine = Muon(ours, lr=0.01, momentum=0.9, ns_steps=5, weight_decay=0.1)
    torchs = torch.optim.Muon(theirs, lr=0.01, momentum=0.9, ns_steps=5, weight_decay=0.1, nesterov=True)
    for _ in range(20):
        for parameters, optimizer in ((ours, mine), (theirs, torchs)):
            optimizer.zero_grad()
            sum(((p - t) ** 2).sum() for p, t in zip(parameters, target, strict=True)).backward()
            optimizer.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        moved = (b - before).norm()
        assert moved > 0.1 and (a - b).norm() < 0.01 * moved


def test_groups_state_and_parameters_without_gradient():
    used, unused = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([{"params": [used, unused]}], lr=0.1)
    used.grad = torch.eye(4)
    optimizer.step()
    assert not torch.equal(used, torch.ones(4, 4)) and torch.equal(unused, torch.ones(4, 4))
    assert set(optimizer.state[unused]) == {"momentum_buffer"}


def test_vectors_are_refused():
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.ones(4))])
