"""Two GPUs over NCCL: every layout of two ranks against one GPU, and `hsa train` with a context shared by two.

The ranks, the comparison and its tolerances are those of tests/distributed/test_layouts.py, at sizes that the kernels
take. Everything that starts processes starts at once, or start-up and compilation would be most of the time.
"""

import math
import subprocess

import pytest
import torch
import yaml

from tests.conftest import hsa_command, hsa_environment, losses, tiny_container
from tests.distributed.layouts import assert_equals_one_rank, launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices, for NCCL between them"),
]

SIZES = {"head_dim": 16, "chunk_size": 16, "retrieval_dim": 32}
# Fewer tokens than FlexAttention takes: it would be compiled for every length.
BASE = {
    "window": 24, "hsa_window": 16, "top_k": 2, "length": 96, "steps": 4, "micro_batch": 2, "probe": 19, "model": SIZES,
}  # fmt: skip
DENSE = {**SIZES, "num_experts": 0}
LAYOUTS = {
    "tensor, sequence": {"parallel": {"tensor": 2}, "micro_batch": 4},
    "tensor": {"parallel": {"tensor": 2, "sequence": False}, "model": DENSE, "micro_batch": 4},
    "expert": {"parallel": {"expert": 2}},
    "context": {"parallel": {"context": 2, "balance_selection": False}},
    "context, selection shared out": {"parallel": {"context": 2, "balance_selection": True}},
    "context, windows wider than a slice, recomputed": {
        "parallel": {"context": 2}, "window": 64, "hsa_window": 56, "recompute": "selective",
    },
    "data": {"parallel": {}},
    "data, state shared, reduction overlapped": {
        "parallel": {}, "micro_batch": 1, "optimizer": {"distributed": True}, "overlap": True,
    },
    "pipeline": {"parallel": {"pipeline": 2}},
    "interleaved pipeline": {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "micro_batch": 1},
}  # fmt: skip
RUNS = {"one": (1, ()), "two": (2, ("parallel.context=2",))}


@pytest.fixture(scope="module")
def training(tiny_data, tmp_path_factory):
    """Three bf16 steps on one GPU and on two, under way: {name: (process, run directory)}."""
    folder = tmp_path_factory.mktemp("training")
    recipe = tiny_container(tiny_data)
    recipe["precision"] = "bf16"
    recipe["model"] |= {"head_dim": 16, "retrieval_dim": 32}
    recipe["stages"] = [{"name": "only", "context": 512, "window": 128, "batch": 4, "until": {"tokens": 3 * 4 * 512}}]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    environment = hsa_environment()
    del environment["CUDA_VISIBLE_DEVICES"]
    started = {}
    for name, (ranks, options) in RUNS.items():
        words = ("train", folder / "tiny.yaml", *options, "--run-dir", folder / name)
        with (folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                hsa_command(*words, ranks=ranks), env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        started[name] = (process, folder / name)
    yield started
    for process, _ in started.values():
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def results(tmp_path_factory, training):
    """A function that gives (one GPU's result, that of two) for the name of a layout."""
    both = launch({2: LAYOUTS}, BASE, tmp_path_factory.mktemp("layouts"), "cuda", timeout=240)
    return lambda name: both(2, name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_equal_one(results, layout):
    assert_equals_one_rank(*results(layout), {**BASE, **LAYOUTS[layout]})


def test_a_context_shared_by_two_gpus_trains_in_bf16(training):
    curves = {}
    for name, (process, run_dir) in training.items():
        code = process.wait(timeout=240)
        text = run_dir.with_name(f"{name}.log").read_text()
        assert code == 0, text
        assert "cuda" in text
        curves[name] = losses(run_dir)
    assert len(curves["one"]) == len(curves["two"]) == 3
    for (_, _, loss, norm), (_, _, expected, expected_norm) in zip(curves["two"], curves["one"], strict=True):
        assert math.isfinite(loss)
        assert loss == pytest.approx(expected, rel=5e-3)
        assert norm == pytest.approx(expected_norm, rel=5e-2)
