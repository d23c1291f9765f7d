"""Real gloo ranks at every parallel layout against one rank: losses, norms, every gradient, and what a token moves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallel.context import halo_shares
from tests.conftest import hsa_environment

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORKER = Path(__file__).with_name("layout_worker.py")
# Packed documents in every batch; top_k below the number of chunks, so that selection matters.
BASE = {"window": 16, "hsa_window": 8, "top_k": 3, "length": 64, "steps": 3, "probe": 19}
ONE_HEAD = {"hsa_kv_heads": 1, "retrieval_heads": 1, "swa_kv_heads": 1}

TWO_RANKS = {
    "tensor": {"parallel": {"tensor": 2}},
    "tensor without sequence": {"parallel": {"tensor": 2, "sequence": False}, "model": {"num_experts": 0}},
    "tensor, one key/value head": {"parallel": {"tensor": 2}, "model": ONE_HEAD},
    "context": {"parallel": {"context": 2}},
    "context, wide windows": {
        "parallel": {"context": 2}, "window": 48, "hsa_window": 40, "top_k": None, "recompute": "full",
    },
    "pipeline": {"parallel": {"pipeline": 2}},
    "pipeline, untied": {"parallel": {"pipeline": 2}, "model": {"tied_embeddings": False}, "recompute": "full"},
    "interleaved pipeline": {"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
    "expert": {"parallel": {"expert": 2}},
    "data": {"parallel": {}, "micro_batch": 2},
}  # fmt: skip
FOUR_RANKS = {
    "tensor": {"parallel": {"tensor": 4}},
    "context, windows over several slices": {"parallel": {"context": 4}, "window": 40, "hsa_window": 24},
    "pipeline": {"parallel": {"pipeline": 4}},
    "tensor x context": {"parallel": {"tensor": 2, "context": 2}, "model": ONE_HEAD, "window": 40},
    "context x pipeline": {"parallel": {"context": 2, "pipeline": 2}, "model": {"swa_in_hsa": False}},
    "tensor x expert": {"parallel": {"tensor": 2, "expert": 2}},
    "expert x data": {"parallel": {"expert": 2}},
}


def launch(jobs, ranks, out):
    """Results of the jobs at one number of ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), str(WORKER), json.dumps(jobs), str(out)]
    done = subprocess.run(command, env=hsa_environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(out)


def both(jobs, ranks, folder):
    """(one rank's result, the layout's) by name."""
    jobs = {name: {**BASE, **job} for name, job in jobs.items()}
    single = launch([{**job, "parallel": {}} for job in jobs.values()], 1, folder / "one.pt")
    spread = launch(list(jobs.values()), ranks, folder / "many.pt")
    return dict(zip(jobs, zip(single, spread, strict=True), strict=True))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return both(TWO_RANKS, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return both(FOUR_RANKS, 4, tmp_path_factory.mktemp("four"))


def assert_same(single, spread):
    assert spread["losses"] == pytest.approx(single["losses"], rel=1e-5)
    assert spread["grad_norms"] == pytest.approx(single["grad_norms"], rel=1e-4)
    for ours, theirs in zip(spread["domains"], single["domains"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert spread["gradients"].keys() == single["gradients"].keys()
    for name, expected in single["gradients"].items():
        difference = (spread["gradients"][name] - expected).norm() / expected.norm().clamp_min(1e-12)
        assert difference < 1e-4, f"{name}: {difference:.1e}"
    torch.testing.assert_close(spread["logits"], single["logits"], rtol=1e-4, atol=1e-5)
    assert single["moved"] and spread["moved"] == single["moved"]


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_two_ranks_equal_one(two, layout):
    assert_same(*two[layout])


@pytest.mark.parametrize("layout", FOUR_RANKS)
def test_four_ranks_equal_one(four, layout):
    assert_same(*four[layout])


def test_bytes_moved_are_those_of_the_formula(four):
    """Context parallelism: windows' halos, and the memory once, however many HSA layers there are."""
    _, spread = four["context, windows over several slices"]
    ranks, micro_batches, length, width = 4, 4, 16, 4
    key_value = 2 * 2 * 8 * width  # keys and values, heads, head size
    reach = {40: 39, 24: 23}
    for rank, (halo, memory) in enumerate(spread["traffic"]):
        received = returned = 0
        for window, layers in ((40, 3), (24, 2)):
            shares = halo_shares(length, reach[window], ranks)
            received += layers * sum(shares[:rank])
            returned += layers * sum(shares[: ranks - 1 - rank])
        assert halo == micro_batches * (received + returned) * key_value
        chunk = (2 * 8 * 2 * 8 + 16) * width  # keys and values of a chunk of 8, its landmark
        # Two HSA layers, one exchange: gathered in forward, scattered in backward.
        assert memory == micro_batches * 2 * (ranks - 1) * (length // 8) * chunk
