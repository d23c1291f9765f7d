"""Real gloo ranks at every parallel layout against one rank: losses, norms, every gradient, and what a token moves.

Every layout is a test of its own; `layout_worker.py` runs all layouts of one number of ranks in one set of processes.
"""

import pytest

from parallel.context import halo_shares
from parallel.mesh import ParallelConfig
from parallel.model_config import ModelConfig
from parallel.optimizer import OptimizerSettings
from parallel.selection import handed_over
from pretrain.memory_plan import held_parameters, state_bytes
from pretrain.recipe import Recipe
from tests.distributed.layout_worker import SMALL
from tests.distributed.layouts import assert_equals_one_rank, launch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# Packed documents in every batch; top_k below the number of chunks, so that selection matters.
BASE = {"window": 16, "hsa_window": 8, "top_k": 3, "length": 64, "steps": 20, "micro_batch": 2, "probe": 19}
ONE_HEAD = {"hsa_kv_heads": 1, "retrieval_heads": 1, "swa_kv_heads": 1}
DENSE = {"num_experts": 0}
Z_LOSS = {"router_z_loss": 1e-2}
MUON = {"name": "muon", "distributed": True}
SHARED = {"distributed": True}
FEW = {"steps": 3}  # variants of a layout that is there with 20 steps

LAYOUTS = {
    2: {
        "tensor, sequence": {"parallel": {"tensor": 2}, "micro_batch": 4},
        "tensor": {"parallel": {"tensor": 2, "sequence": False}, "model": DENSE, "micro_batch": 4},
        "tensor, one key-value head": {"parallel": {"tensor": 2}, "model": ONE_HEAD, **FEW},
        "context": {"parallel": {"context": 2}},
        "context, windows wider than a slice": {
            "parallel": {"context": 2}, "window": 48, "hsa_window": 40, "top_k": None, "recompute": "full", **FEW,
        },
        "context, attention recomputed, z-loss": {
            "parallel": {"context": 2}, "recompute": "selective", "model": Z_LOSS, **FEW,
        },
        "pipeline": {"parallel": {"pipeline": 2}},
        "pipeline, untied, no bypass": {
            "parallel": {"pipeline": 2}, "model": {"tied_embeddings": False}, "recompute": "full", "bypass": False,
            **FEW,
        },
        "pipeline, attention recomputed": {"parallel": {"pipeline": 2}, "recompute": "selective", **FEW},
        "interleaved pipeline": {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "micro_batch": 1},
        "expert": {"parallel": {"expert": 2}},
        "expert, one after the other, z-loss": {
            "parallel": {"expert": 2}, "compute": {"grouped_experts": "off"}, "model": Z_LOSS, **FEW,
        },
        "tensor, logits in chunks": {
            "parallel": {"tensor": 2}, "micro_batch": 4, "compute": {"loss": "chunked", "loss_chunk": 48}, **FEW,
        },
        "tensor, DeepSpeed's loss and tiles": {
            "parallel": {"tensor": 2}, "micro_batch": 4, "compute": {"loss": "deepspeed", "tiled_mlp": 3}, **FEW,
        },
        "data": {"parallel": {}},
        "data, Muon": {"parallel": {}, "optimizer": MUON},
        "data, state shared, reduction overlapped": {
            "parallel": {}, "micro_batch": 1, "optimizer": SHARED, "overlap": True, **FEW,
        },
        "context, state shared, reduction overlapped": {
            "parallel": {"context": 2}, "optimizer": SHARED, "overlap": True, **FEW,
        },
    },
    3: {
        # the middle rank hands nothing over
        "context, selection shared out": {
            "parallel": {"context": 3, "balance_selection": True}, "length": 48, "window": 24, **FEW,
        },
    },
    4: {
        "tensor, 2 key-value heads": {"parallel": {"tensor": 4}, "micro_batch": 4},
        "context, windows over several slices": {"parallel": {"context": 4}, "window": 40, "hsa_window": 24},
        "context, selection shared out": {"parallel": {"context": 4, "balance_selection": True}, **FEW},
        "context, selection shared out, attention recomputed": {
            "parallel": {"context": 4, "balance_selection": True}, "window": 40, "hsa_window": 24,
            "recompute": "selective", **FEW,
        },
        "context, a chunk each": {  # the first rank sees no chunk at all
            "parallel": {"context": 4, "balance_selection": True}, "length": 32, "micro_batch": 1, **FEW,
        },
        "pipeline": {"parallel": {"pipeline": 4}, "micro_batch": 1},
        "expert": {"parallel": {"expert": 4}, "micro_batch": 1},
        "tensor x context, no bypass": {
            "parallel": {"tensor": 2, "context": 2, "balance_selection": True}, "model": ONE_HEAD, "window": 40,
            "micro_batch": 4, "bypass": False,
        },
        "context x pipeline": {"parallel": {"context": 2, "pipeline": 2}, "model": {"swa_in_hsa": False}},
        "expert x data": {"parallel": {"expert": 2}, "micro_batch": 1},
        "expert x data, Muon": {"parallel": {"expert": 2}, "micro_batch": 1, "optimizer": MUON},
        "tensor x expert, z-loss": {"parallel": {"tensor": 2, "expert": 2}, "model": Z_LOSS, **FEW},
    },
    8: {
        "tensor x expert x pipeline": {"parallel": {"tensor": 2, "expert": 2, "pipeline": 2}},
        "tensor x context x pipeline": {"parallel": {"tensor": 2, "context": 2, "pipeline": 2}, "model": DENSE, **FEW},
    },
}  # fmt: skip
CASES = [(ranks, name) for ranks, layouts in LAYOUTS.items() for name in layouts]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A function that gives (one rank's result, the layout's) for a number of ranks and the name of a layout."""
    return launch(LAYOUTS, BASE, tmp_path_factory.mktemp("layouts"), "cpu", timeout=550)


@pytest.mark.parametrize(("ranks", "layout"), CASES, ids=[f"{ranks} ranks: {name}" for ranks, name in CASES])
def test_a_layout_equals_one_rank(results, ranks, layout):
    assert_equals_one_rank(*results(ranks, layout), {**BASE, **LAYOUTS[ranks][layout]})


RANKS, SLICE, CHUNK, NUMBER = 4, 16, 8, 4  # context-parallel ranks, tokens of each, tokens of a chunk, bytes
SEQUENCES, HSA_LAYERS, HEADS = 4, 2, 2  # per step; retrieval heads


# Of buckets shared out, padded to whole ones, a model as small as this one has uneven parts.
EXACT = [(ranks, name) for ranks, name in CASES if LAYOUTS[ranks][name].get("optimizer") != SHARED]


@pytest.mark.parametrize(("ranks", "layout"), EXACT, ids=[f"{ranks} ranks: {name}" for ranks, name in EXACT])
def test_the_plan_knows_what_a_rank_holds(results, ranks, layout):
    """Parameters and moments of every rank, exactly; where parameters have owners, all moments exactly, and no rank
    more than its part and one parameter."""
    _, spread = results(ranks, layout)
    job = LAYOUTS[ranks][layout]
    model, parallel = ModelConfig(**{**SMALL, **job.get("model", {})}), ParallelConfig(**job["parallel"])
    settings = OptimizerSettings(**{"distributed": False, **job.get("optimizer", {})})
    recipe = Recipe(name="x", precision="fp32", model=model, parallel=parallel, optimizer=settings)
    together, largest = 0, max(weight.numel() for weight in spread["weights"].values()) if settings.has_owners else 0
    for rank, (parameters, moments) in enumerate(spread["held"]):
        held = held_parameters(model, parallel, rank // (ranks // parallel.pipeline))
        planned = state_bytes(held, recipe, ranks)["optimizer"]
        assert held.total == parameters, rank
        if settings.has_owners:
            assert 0 < 4 * moments <= planned + 8 * largest, rank
            together += planned - 4 * moments
        else:
            assert planned == 4 * moments, rank
    assert 0 <= together <= 8 * ranks  # rounded up


@pytest.mark.parametrize(("ranks", "layout"), [(2, "data, Muon"), (4, "expert x data, Muon")])
def test_muon_moves_weights_as_one_rank_does(results, ranks, layout):
    """After the same number of steps: every matrix, the experts' too."""
    single, spread = results(ranks, layout)
    assert len(spread["losses"]) == len(single["losses"])
    for name, expected in single["weights"].items():
        difference = (spread["weights"][name] - expected).norm() / expected.norm()
        assert difference < 1e-4, f"{name}: {difference:.1e}"


def test_bytes_moved_are_those_of_the_formula(results):
    """Context parallelism: windows' halos, and the memory once, however many HSA layers there are."""
    _, spread = results(RANKS, "context, windows over several slices")
    key_value = 2 * 2 * 8 * NUMBER  # keys and values, heads, head size
    for rank, counted in enumerate(spread["traffic"]):
        received = returned = 0
        for window, layers in ((40, 3), (24, 2)):
            shares = halo_shares(SLICE, window - 1, RANKS)
            received += layers * sum(shares[:rank])
            returned += layers * sum(shares[: RANKS - 1 - rank])
        assert counted["halo"] == SEQUENCES * (received + returned) * key_value
        chunk = (2 * CHUNK * 2 * 8 + 16) * NUMBER  # keys and values of a chunk, its landmark
        # Two HSA layers, one exchange: gathered in forward, scattered in backward.
        assert counted["memory"] == SEQUENCES * 2 * (RANKS - 1) * (SLICE // CHUNK) * chunk
        assert counted["selection"] == 0


def test_bytes_of_shared_selection_are_those_of_the_formula(results):
    _, spread = results(RANKS, "context, selection shared out")
    shares, top_k, size = handed_over(SLICE, CHUNK, RANKS), 3, 8
    for rank, counted in enumerate(spread["traffic"]):
        partner = RANKS - 1 - rank
        if rank < partner:  # queries, then gradients of scores
            numbers = shares[rank] * (size + top_k)
        else:  # ids and scores, then gradients of queries
            numbers = shares[partner] * (2 * top_k + size)
        assert counted["selection"] == SEQUENCES * HSA_LAYERS * HEADS * numbers * NUMBER


def test_shared_selection_is_even(results):
    """Pairs of query and chunk scored in a step, by rank: the largest over the mean."""

    def unevenness(layout):
        scored = [counted["scored"] for counted in results(RANKS, layout)[1]["traffic"]]
        return sum(scored), max(scored) * RANKS / sum(scored)

    total, uneven = unevenness("context, windows over several slices")
    shared, even = unevenness("context, selection shared out")
    assert total == shared
    assert uneven == pytest.approx(13 / 7)  # 2 N - 1 over N, but for the first chunk, which sees none
    assert even < 1.05
