"""Stages by cost, the payload between stages, halos by distance, and what the mesh refuses of a model."""

import pytest
import torch

from parallel.context import halo_shares
from parallel.errors import TopologyError
from parallel.mesh import ParallelConfig, check_micro_batches, check_topology
from parallel.model_config import ModelConfig
from parallel.pipeline import join_payload, layer_costs, split_layers, split_payload, stage_layout

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, ffn_hidden_size=48, lower_layers=4, upper_layers=4, hsa_layers=2, num_heads=4,
    head_dim=8, swa_kv_heads=2, hsa_kv_heads=2, retrieval_heads=2, retrieval_dim=16, chunk_size=8,
    encoder_ffn_hidden_size=32,
)  # fmt: skip


@pytest.mark.parametrize("stages", range(1, 9))
def test_stages_hold_every_layer_once_and_none_is_empty(stages):
    counts = split_layers(MODEL, stages)
    assert len(counts) == stages and sum(counts) == MODEL.num_layers and min(counts) >= 1


def test_the_dearest_stage_is_as_cheap_as_any_split_allows():
    costs = layer_costs(MODEL)
    costs[-1] += MODEL.vocab_size * MODEL.hidden_size

    def dearest(cuts):
        return max(sum(costs[a:b]) for a, b in zip((0, *cuts), (*cuts, 8), strict=True))

    first, second, _ = split_layers(MODEL, 3)
    best = min(dearest((i, j)) for i in range(1, 7) for j in range(i + 1, 8))
    assert dearest((first, first + second)) == pytest.approx(best)
    assert sum(costs[4:]) > sum(costs[:4]), "HSA layers, the encoder and the output layer make the upper half dearer"


def test_layout_names_embedding_and_loss_once():
    layout = stage_layout(MODEL, 4)
    assert layout[0][0] == "embedding" and layout[-1][-1] == "loss"
    assert sum(row.count("decoder") for row in layout) == 8


@pytest.mark.parametrize(("length", "chunks", "width"), [(16, 2, 24), (12, 7, 5), (8, 8, 1)])
def test_a_payload_comes_apart_as_it_was_put_together(length, chunks, width):
    hidden, memory = torch.randn(length, 3, 32), torch.randn(chunks, 3, width)
    again = split_payload(join_payload(hidden, memory), 32, chunks, width)
    assert torch.equal(again[0], hidden) and torch.equal(again[1], memory)


def test_halos_come_from_the_nearest_first():
    assert halo_shares(16, 39, 4) == [16, 16, 7]
    assert halo_shares(16, 15, 4) == [15, 0, 0]
    assert halo_shares(16, 500, 4) == [16, 16, 16]


@pytest.mark.parametrize(
    ("sizes", "ranks", "facts", "words"),
    [
        (dict(tensor=2, sequence=False), 2, dict(num_experts=4), ["parallel.sequence=false", "experts"]),
        (dict(tensor=4), 4, dict(key_value_heads={"hsa_kv_heads": 3}), ["model.hsa_kv_heads=3", "3 or 6"]),
        (dict(tensor=4), 4, dict(vocab_size=1002), ["1002 tokens of vocabulary", "3 or 6"]),
        (dict(tensor=3), 3, dict(context_length=64), ["64 tokens", "tensor 3", "63 or 66"]),
    ],
)
def test_a_model_that_cannot_be_split_is_refused(sizes, ranks, facts, words):
    with pytest.raises(TopologyError) as caught:
        check_topology(ParallelConfig(**sizes), ranks, **facts)
    for word in words:
        assert word in str(caught.value)


def test_interleaving_wants_whole_rounds_of_micro_batches():
    check_micro_batches(ParallelConfig(pipeline=2, virtual_pipeline=2), 4, "first")
    with pytest.raises(TopologyError, match="first: 3 micro-batches.*2 or 4"):
        check_micro_batches(ParallelConfig(pipeline=2, virtual_pipeline=2), 3, "first")
