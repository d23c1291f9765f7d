"""The same command on a GPU: losses follow those of the CPU, and a resumed run those of the unbroken one."""

import gc
import json
import subprocess

import pytest
import torch

from pretrain.graphed import GraphedPass
from tests.conftest import hsa_command, hsa_environment, losses, records
from tests.pretrain.test_evidence_training import asking_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def train(recipe, run_dir, *overrides, cpu=False):
    environment = hsa_environment()
    if not cpu:
        del environment["CUDA_VISIBLE_DEVICES"]
    done = subprocess.run(
        hsa_command("train", recipe, *overrides, "--run-dir", run_dir),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("cuda" in done.stdout) is not cpu
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert all(("gpu_memory_gib" in json.loads(line)) is not cpu for line in lines)
    return losses(run_dir)


def test_gpu_losses_follow_the_cpu(tiny_recipe, tmp_path):
    on_gpu, on_cpu = train(tiny_recipe, tmp_path / "gpu"), train(tiny_recipe, tmp_path / "cpu", cpu=True)
    assert len(on_gpu) == len(on_cpu) == 12
    for (_, _, loss, norm), (_, _, expected, expected_norm) in zip(on_gpu, on_cpu, strict=True):
        assert loss == pytest.approx(expected, rel=1e-4)
        assert norm == pytest.approx(expected_norm, rel=1e-2)


def test_deterministic_gpu_run_resumes_bit_for_bit(tiny_recipe, tmp_path):
    whole = train(tiny_recipe, tmp_path / "whole", "deterministic=true")
    train(tiny_recipe, tmp_path / "parts", "deterministic=true", "max_steps=5")
    assert train(tiny_recipe, tmp_path / "parts", "deterministic=true") == whole


def test_a_graph_trains_like_single_launches(tiny_recipe, tmp_path):
    dense = ("model.num_experts=0", "model.experts_per_token=0")
    plain = train(tiny_recipe, tmp_path / "plain", *dense)
    graph = train(tiny_recipe, tmp_path / "graph", *dense, "compute.cuda_graph=true")
    assert len(plain) == len(graph) == 12
    for (_, _, loss, norm), (_, _, expected, expected_norm) in zip(graph, plain, strict=True):
        assert loss == pytest.approx(expected, rel=1e-4)
        assert norm == pytest.approx(expected_norm, rel=1e-2)


def test_a_graph_asks_for_evidence_like_single_launches(tiny_data, tmp_path):
    """Over two stages that ask and one that does not; losses of the retrieval are in the metrics of the first two."""
    recipe = asking_recipe(tiny_data, tmp_path)
    dense = ("model.num_experts=0", "model.experts_per_token=0")
    train(recipe, tmp_path / "plain", *dense)
    train(recipe, tmp_path / "graph", *dense, "compute.cuda_graph=true")
    plain, graph = records(tmp_path / "plain"), records(tmp_path / "graph")
    assert ["evidence_loss" in r for r in graph] == [r["stage"] != "third" for r in plain]
    for ours, theirs in zip(graph, plain, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours.get("evidence_loss", 0) == pytest.approx(theirs.get("evidence_loss", 0), rel=1e-3)


def test_a_stage_gives_back_the_memory_of_the_one_before():
    """Each graph has buffers of its own: four stages after one another reserve no more than one does."""

    class Stage:
        def __init__(self):
            self.sum = torch.zeros((), device="cuda")
            self.graphed = GraphedPass(self.sum.device)

        def work(self, inputs):
            self.sum += (inputs[0]["x"] * torch.ones(1 << 26, device="cuda")).sum()  # 512 MiB

    reserved = []
    gc.disable()
    try:
        for _ in range(4):
            stage = Stage()
            for _ in range(5):
                stage.graphed(stage.work, [{"x": torch.ones(1)}], stage.sum.zero_)
            assert stage.sum.item() == 1 << 26 and stage.graphed._graph is not None
            reserved.append(torch.cuda.memory_reserved())
    finally:
        gc.enable()
    assert max(reserved) < 1.5 * reserved[0]
