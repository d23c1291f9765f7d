"""The evidence loss against the same written token by token, and its gradient through attached scores."""

import math

import pytest
import torch

from parallel.evidence import EvidenceLoss, EvidenceSums, evidence_losses, take_sums


def plain(scores, indices, places, chunks):
    """-log of what the first two places have of every head's softmax, wrong chunks counted as if there were `chunks`,
    the other places not at all.
    """
    batch, length, heads, _ = scores.shape
    losses = torch.zeros(batch, length, heads, dtype=scores.dtype)
    found = torch.zeros(batch, length, heads, dtype=torch.bool)
    for b in range(batch):
        for i in range(length):
            for h in range(heads):
                chosen = [k for k, index in enumerate(indices[b, i, h].tolist()) if index >= 0]
                right = [k for k in chosen if indices[b, i, h, k] in places[b, i, :2]]
                wrong = [k for k in chosen if indices[b, i, h, k] not in places[b, i]]
                if not right:
                    continue
                often = max(chunks / len(chosen), 1.0) if chunks else 1.0
                share = sum(scores[b, i, h, k].exp() for k in right)
                losses[b, i, h] = (share + often * sum(scores[b, i, h, k].exp() for k in wrong)).log() - share.log()
                found[b, i, h] = True
    return losses, found


def chosen_chunks(seed, batch=2, length=11, heads=3, top_k=5, chunks=9):
    """Scores, ascending chunks with -1 behind them (none at all for first tokens), and four places each."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, length, heads, top_k, generator=g, dtype=torch.float64) * 4
    indices = torch.full((batch, length, heads, top_k), -1)
    for b in range(batch):
        for i in range(length):
            for h in range(heads):
                n = min(i, top_k)
                indices[b, i, h, :n] = torch.randperm(min(max(i, 1), chunks), generator=g)[:n].sort().values
    return scores, indices.int(), torch.randint(-1, chunks, (batch, length, 4), generator=g)


@pytest.mark.parametrize("chunks", [0, 3, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_losses_and_gradients_are_the_plain_ones(seed, chunks):
    scores, indices, places = chosen_chunks(seed)
    assert any(len({*row[:2]} & {*row[2:]} - {-1}) for row in places.flatten(0, 1).tolist())  # right after all
    ours, theirs = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    losses, found = evidence_losses(ours, indices, places, chunks)
    expected, where = plain(theirs, indices, places, chunks)
    assert found.any() and not found.all() and torch.equal(found, where)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(losses.shape, generator=g, dtype=torch.float64)
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_far_scores_stay_finite():
    """fp32: a right chunk far below the others, far above them, alone, and beside one that does not count."""
    scores = torch.tensor([[[[200.0, -200.0]], [[-200.0, 200.0]], [[3.0, 9.0]], [[200.0, -200.0]]]]).requires_grad_()
    indices = torch.tensor([[[[0, 1]], [[0, 1]], [[1, -1]], [[0, 1]]]])
    places = torch.tensor([[[1, 1, -1, -1]] * 3 + [[1, -1, -1, 0]]])
    losses, _ = evidence_losses(scores, indices, places, 1 << 18)
    assert losses.flatten().tolist() == pytest.approx([400.0 + math.log(1 << 17), 0.0, 0.0, 0.0])
    losses.sum().backward()
    assert scores.grad.isfinite().all()


def test_attached_losses_reach_the_scores_and_are_counted():
    """What is attached leaves the weights alone; its gradient has the weight, over all heads of all ranks."""
    scores, indices, places = chosen_chunks(5)
    scores.requires_grad_()
    weights = scores.softmax(-1)
    module, asked = EvidenceSums(), EvidenceLoss(weight=0.25, chunks=100)
    attached = module(weights, scores, indices, places, asked, ranks=2)
    assert torch.equal(attached, weights)
    (attached * 3.0).square().sum().backward()
    again = scores.detach().clone().requires_grad_()
    losses, found = plain(again, indices, places, 100)
    ((again.softmax(-1) * 3.0).square().sum() + 0.25 / (3 * 2) * losses.sum()).backward()
    torch.testing.assert_close(scores.grad, again.grad, rtol=1e-12, atol=1e-12)
    taken = take_sums([module], torch.device("cpu"))
    assert taken.tolist() == pytest.approx([losses.sum().item(), found.sum().item()], rel=1e-6)
    assert take_sums([module], torch.device("cpu")).tolist() == [0.0, 0.0]
