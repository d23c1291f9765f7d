"""Chosen chunks bring the chunk before them along."""

import pytest
import torch

from parallel.previous import with_previous


def slowly(ids, weights, best):
    """One token: ids and weights as lists -> {id: weight}."""
    chosen = {i: w for i, w in zip(ids, weights, strict=True) if i >= 0}
    heaviest = sorted(chosen, key=chosen.__getitem__, reverse=True)[:best]
    read = dict(chosen)
    for chunk in heaviest:
        if chunk > 0:
            read[chunk - 1] = max(read.get(chunk - 1, 0.0), chosen[chunk])
    total = sum(read.values())
    return {i: w / total for i, w in read.items()}


@pytest.mark.parametrize("best", [1, 2, 5, 9])
@pytest.mark.parametrize("seed", range(3))
def test_equal_to_one_token_after_the_other(best, seed):
    generator = torch.Generator().manual_seed(seed)
    chunks, top_k = 9, 5  # few, so that neighbours are often chosen both
    ids = torch.stack([torch.randperm(chunks, generator=generator)[:top_k] for _ in range(24)]).view(2, 4, 3, top_k)
    ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
    weights = torch.rand(ids.shape, generator=generator, dtype=torch.float64).masked_fill(ids < 0, 0.0)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    more, heavier = with_previous(ids, weights, best)
    assert more.shape[-1] == top_k + min(best, top_k)
    for row_ids, row_weights, got_ids, got_weights in zip(
        *(x.flatten(0, 2).tolist() for x in (ids, weights, more, heavier)), strict=True
    ):
        got = {i: w for i, w in zip(got_ids, got_weights, strict=True) if i >= 0}
        assert len(got) == sum(i >= 0 for i in got_ids)  # no chunk twice
        assert all(w == 0.0 for i, w in zip(got_ids, got_weights, strict=True) if i < 0)
        assert got == pytest.approx(slowly(row_ids, row_weights, best)) if any(i >= 0 for i in row_ids) else not got


def test_other_ids_of_the_chunks_before():
    ids, weights = with_previous(torch.tensor([[7, 4]]), torch.tensor([[0.25, 0.75]]), 1, lambda ids: ids + 100)
    assert ids.tolist() == [[7, 4, 104]]
    torch.testing.assert_close(weights, torch.tensor([[0.25, 0.75, 0.75]]) / 1.75)
