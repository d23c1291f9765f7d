"""Losses by domain and by position in the document, against a loop over the tokens."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from pretrain.step_sums import StepSums, document_positions


def test_positions_start_again_with_every_document() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0] * 8, [0, 1, 2, 3, 4, 5, 6, 7], [3, 3, 3, 3, 9, 9, 9, 9]])
    expected = [[0, 1, 2, 0, 1, 0, 1, 2], list(range(8)), [0] * 8, [0, 1, 2, 3] * 2]
    assert document_positions(documents.int()).tolist() == expected


@pytest.mark.parametrize("context", [8, 16, 100, 256])
def test_sums_are_those_of_a_loop_over_the_tokens(context: int) -> None:
    """Over several micro-batches: unweighted tokens do not count, and domains and positions without a token are
    left out. One token with a loss that is no number and no weight changes nothing."""
    generator = torch.Generator().manual_seed(context)
    names = ["a", "b", "empty", "c"]
    sums = StepSums(names, context, torch.device("cpu"))
    by_domain, by_position = defaultdict(list), defaultdict(list)
    total = weight_sum = 0.0
    for _ in range(3):
        losses = torch.rand(2, context, generator=generator)
        weights = torch.rand(2, context, generator=generator) * (torch.rand(2, context, generator=generator) < 0.7)
        domains = torch.tensor([0, 1, 3])[torch.randint(0, 3, (2, context), generator=generator)].short()
        documents = (torch.rand(2, context, generator=generator) < 0.02).int().cumsum(1)
        positions = document_positions(documents)
        for row in range(2):
            for i in range(context):
                weight, loss = float(weights[row, i]), float(losses[row, i])
                total, weight_sum = total + weight * loss, weight_sum + weight
                if weight > 0:
                    by_domain[names[domains[row, i]]].append(loss)
                    place = int(positions[row, i])
                    by_position[0 if place < 16 else 1 << (place.bit_length() - 1)].append(loss)
        weighted = (losses * weights).sum()
        losses[weights == 0] = torch.nan
        sums.add(weighted, losses, weights, domains, positions)
    loss, stop, skipped, domain_losses, position_losses = sums.read(sums.values.tolist())
    assert (loss, stop, skipped) == (pytest.approx(total / weight_sum, rel=1e-6), 0, 0)
    assert domain_losses == pytest.approx({k: sum(v) / len(v) for k, v in by_domain.items()}, rel=1e-6)
    assert position_losses == pytest.approx({k: sum(v) / len(v) for k, v in by_position.items()}, rel=1e-6)
    assert list(position_losses) == sorted(position_losses) and "empty" not in domain_losses
    sums.say(wants_stop=True, skipped=3.0)
    sums.forget_tokens()
    assert sums.read(sums.values.tolist()) == (0.0, 1, 3, {}, {})
