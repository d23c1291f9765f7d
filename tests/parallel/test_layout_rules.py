"""Stages by cost, the payload between stages, halos by distance, and what the mesh refuses of a model."""

import dataclasses

import pytest
import torch

from parallel.context import Exchange, halo_shares
from parallel.errors import TopologyError
from parallel.mesh import ParallelConfig, check_micro_batches, check_topology
from parallel.model_config import ModelConfig
from parallel.pipeline import Reach, join_payload, layer_costs, split_layers, split_payload, stage_layout
from parallel.selection import balancing_pays, handed_over, scored_pairs
from pretrain.recipe import load_recipe
from pretrain.topology import reach_of

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, ffn_hidden_size=48, lower_layers=4, upper_layers=4, hsa_layers=2, num_heads=4,
    head_dim=8, swa_kv_heads=2, hsa_kv_heads=2, retrieval_heads=2, retrieval_dim=16, chunk_size=8,
    encoder_ffn_hidden_size=32,
)  # fmt: skip
REACH = Reach(window=32, hsa_window=16, chunks=64, context=256)


@pytest.mark.parametrize("stages", range(1, 9))
def test_stages_hold_every_layer_once_and_none_is_empty(stages):
    counts = split_layers(MODEL, stages, REACH)
    assert len(counts) == stages and sum(counts) == MODEL.num_layers and min(counts) >= 1


def test_the_dearest_stage_is_as_cheap_as_any_split_allows():
    costs = layer_costs(MODEL, REACH)
    costs[-1] += MODEL.vocab_size * MODEL.hidden_size

    def dearest(cuts):
        return max(sum(costs[a:b]) for a, b in zip((0, *cuts), (*cuts, 8), strict=True))

    first, second, _ = split_layers(MODEL, 3, REACH)
    best = min(dearest((i, j)) for i in range(1, 7) for j in range(i + 1, 8))
    assert dearest((first, first + second)) == pytest.approx(best)
    assert sum(costs[4:]) > sum(costs[:4]), "HSA layers, the encoder and the output layer make the upper half dearer"


def test_stages_are_uneven_where_layers_are():
    """Dear windows pull layers out of the first stage, dear HSA layers out of the last one."""
    wide, deep = (Reach(window=window, hsa_window=16, chunks=chunks) for window, chunks in ((4096, 64), (16, 4096)))
    assert split_layers(MODEL, 2, wide) == [3, 5] and split_layers(MODEL, 2, deep) == [5, 3]
    large_encoder = dataclasses.replace(MODEL, encoder_ffn_hidden_size=1 << 12)
    assert split_layers(large_encoder, 3, REACH) == [4, 1, 3]
    large_head = dataclasses.replace(MODEL, vocab_size=1 << 20)
    assert split_layers(large_head, 2, REACH) == [7, 1]


def test_the_stage_with_most_tokens_says_where_to_cut():
    reach = reach_of(load_recipe("8b-a1b").recipe)
    assert reach == Reach(window=4096, hsa_window=512, chunks=4096, context=16384)


def test_layout_names_embedding_and_loss_once():
    layout = stage_layout(MODEL, 4, REACH)
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


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (3, 40), (8, 16), (17, 17)])
def test_a_query_is_scored_with_the_chunks_before_it(start, stop):
    assert scored_pairs(start, stop, 8) == sum(position // 8 for position in range(start, stop))


@pytest.mark.parametrize(("length", "ranks"), [(16, 4), (24, 3), (64, 2), (8, 8), (40, 5), (4096, 6)])
def test_queries_handed_over_make_every_pair_of_ranks_as_even_as_it_can_be(length, ranks):
    shares = handed_over(length, 8, ranks)
    assert len(shares) == ranks // 2
    for low, count in enumerate(shares):
        end = (ranks - low) * length

        def gap(moved, low=low, end=end):
            helped = scored_pairs(end - moved, end, 8)
            own = scored_pairs(end - length, end - moved, 8)
            return abs(own - helped - scored_pairs(low * length, (low + 1) * length, 8))

        assert 0 <= count <= length
        assert gap(count) == min(gap(moved) for moved in range(max(0, count - 50), min(length, count + 50) + 1))


def test_balancing_pays_in_long_contexts_only():
    def pays(context, top_k=64):
        return balancing_pays(length=context // 8, ranks=8, chunk_size=64, top_k=top_k, retrieval_size=128)

    assert not pays(16 << 10) and pays(1 << 20)
    assert not pays(1 << 20, top_k=(1 << 20) // 64), "every score would travel"
    assert not balancing_pays(length=1 << 20, ranks=1, chunk_size=64, top_k=64, retrieval_size=128)


def test_work_between_start_and_wait_runs_while_the_exchange_is_under_way():
    """In forward and in backward: started before the work, waited for behind it, and the numbers are those awaited."""
    events = []

    class Handle:
        def __init__(self, name, out, value):
            self.name, self.out, self.value = name, out, value

        def wait(self):
            events.append(f"wait {self.name}")
            self.out.copy_(self.value)  # nothing may have read it before

    def start(name, factor):
        def run(x):
            events.append(f"start {name}")
            out = torch.full_like(x, float("nan"))
            return out, Handle(name, out, factor * x)

        return run

    class Work(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            events.append("work")
            return x * 1.0

        @staticmethod
        def backward(ctx, gradient):
            events.append("work back")
            return gradient

    x = torch.ones(3, requires_grad=True)
    exchange = Exchange(start("forward", 2.0), start("backward", 5.0))
    pending = exchange.begin(x * 1.0)
    worked = Work.apply(x)
    total = exchange.end(pending) + worked
    assert torch.equal(total, torch.full((3,), 3.0))
    total.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 6.0))
    assert events == ["start forward", "work", "wait forward", "start backward", "work back", "wait backward"]


@pytest.mark.parametrize(
    ("sizes", "ranks", "facts", "words"),
    [
        (dict(tensor=2, sequence=False), 2, dict(num_experts=4), ["parallel.sequence=false", "experts"]),
        (dict(tensor=4), 4, dict(key_value_heads={"hsa_kv_heads": 3}), ["model.hsa_kv_heads=3", "3 or 6"]),
        (dict(tensor=4), 4, dict(widths={"vocab_size": 1002}), ["model.vocab_size=1002", "3 or 6"]),
        (dict(tensor=3), 3, dict(context_length=64), ["64 tokens", "tensor 3", "63 or 66"]),
    ],
)
def test_a_model_that_cannot_be_split_is_refused(sizes, ranks, facts, words):
    with pytest.raises(TopologyError) as caught:
        check_topology(ParallelConfig(**sizes), ranks, **facts)
    for word in words:
        assert word in str(caught.value)


def test_interleaving_wants_whole_rounds_of_micro_batches():
    check_micro_batches(ParallelConfig(pipeline=2, virtual_pipeline=2), 4)
    with pytest.raises(TopologyError, match="3 micro-batches.*2 or 4"):
        check_micro_batches(ParallelConfig(pipeline=2, virtual_pipeline=2), 3)
