"""Chosen chunks bring the chunks beside them along."""

import pytest
import torch

from parallel.neighbours import in_text, with_neighbours


def slowly(ids, weights, best, end):
    """One token: ids and weights as lists, first chunk out of reach -> {id: weight}."""
    chosen = {i: w for i, w in zip(ids, weights, strict=True) if i >= 0}
    heaviest = sorted(chosen, key=chosen.__getitem__, reverse=True)[:best]
    read = dict(chosen)
    for chunk in heaviest:
        for beside in (chunk - 1, chunk + 1):
            if 0 <= beside < end:
                read[beside] = max(read.get(beside, 0.0), chosen[chunk])
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
    end = torch.randint(chunks, chunks + 2, (4, 1, 1), generator=generator)
    more, heavier = with_neighbours(ids, weights, best, in_text(end))
    assert more.shape[-1] == top_k + 2 * min(best, top_k)
    ends = end.expand(2, 4, 3, 1)
    for row_ids, row_weights, got_ids, got_weights, (last,) in zip(
        *(x.flatten(0, 2).tolist() for x in (ids, weights, more, heavier, ends)), strict=True
    ):
        got = {i: w for i, w in zip(got_ids, got_weights, strict=True) if i >= 0}
        assert len(got) == sum(i >= 0 for i in got_ids)  # no chunk twice
        assert all(w == 0.0 for i, w in zip(got_ids, got_weights, strict=True) if i < 0)
        assert (
            got == pytest.approx(slowly(row_ids, row_weights, best, last)) if any(i >= 0 for i in row_ids) else not got
        )


def test_other_ids_of_the_chunks_beside():
    ids, weights = with_neighbours(
        torch.tensor([[7, 4, -1]]),
        torch.tensor([[0.25, 0.75, 0.0]]),
        1,
        lambda ids, step: ids + 100 * step,
    )
    assert ids.tolist() == [[7, 4, -1, -1, 104]]  # 4 - 100 is none
    torch.testing.assert_close(weights, torch.tensor([[0.25, 0.75, 0.0, 0.0, 0.75]]) / 1.75)
