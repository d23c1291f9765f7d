"""The evidence loss in the model and in training: what is added to the gradient, and that it stays on."""

import pytest
import torch
import yaml

from parallel.evidence import EvidenceLoss, EvidenceSums, take_sums
from parallel.model_config import ModelConfig
from pretrain.model import build_model
from tests.conftest import records, tiny_container
from tests.distributed.layout_worker import SMALL
from tests.parallel.test_evidence import plain

DENSE = ModelConfig(**{**SMALL, "num_experts": 0})
ASKING = {"rate": 1.0, "tasks": {"niah_single": 0.5, "recall": 0.5}, "evidence_weight": 0.5, "evidence_context": 4096}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_gradient_gains_the_plain_losses_of_every_hsa_layer(world_on_cpu, monkeypatch, recompute):
    """Chunks are those of the positions told; the sum over layers and the mean over heads are added once."""
    model = build_model(DENSE, max_length=64, seed=0, recompute=recompute)
    model.set_schedule(window=16, hsa_window=8, top_k=3)
    model.schedule.evidence = EvidenceLoss(weight=0.7, chunks=50)
    g = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, 64, (2, 2, 64), generator=g)
    evidence = (torch.arange(64)[:, None] * torch.rand(2, 64, 4, generator=g)).int()
    evidence[torch.rand(2, 64, 4, generator=g) < 0.5] = -1

    def gradients(evidence):
        model.zero_grad()
        model.train()(tokens, labels=labels, evidence=evidence).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    seen = []

    def kept(self, weights, scores, indices, *others):
        seen.append((scores, indices))
        return weights  # with nothing attached: it would be in the plain form's way back

    without, with_it = gradients(None), gradients(evidence)
    assert take_sums([model], torch.device("cpu"))[1] > 20
    model.config.recompute_granularity = None  # the plain form differentiates scores outside of the pass
    for layer in model.decoder.layers:
        if layer.has_hsa:
            layer.hsa_attention.checkpoint_core_attention = False
    model.decoder.config.recompute_granularity = None
    monkeypatch.setattr(EvidenceSums, "forward", kept)
    model.zero_grad()
    model(tokens, labels=labels, evidence=evidence)
    assert len(seen) == 2
    places = torch.where(evidence < 0, -1, evidence // 8)
    total = sum(plain(scores, indices, places, 50)[0].sum() / 2 for scores, indices in seen)
    (0.7 * total).backward()
    for name, parameter in model.named_parameters():
        added = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        error = (with_it[name] - without[name] - added).norm()
        assert error <= 1e-5 * without[name].norm() + 1e-4 * added.norm(), f"{name}: {error:.1e}"
    assert any((with_it[name] - without[name]).norm() > 1e-3 for name in with_it if "linear_retrieval" in name)


def test_evaluation_and_passes_without_gradients_ask_for_nothing(world_on_cpu):
    model = build_model(DENSE, max_length=64, seed=0)
    model.schedule.evidence = EvidenceLoss(weight=0.7)
    tokens = torch.zeros(1, 16, dtype=torch.long)
    evidence = torch.zeros(1, 16, 4, dtype=torch.int32)
    model.eval()(tokens, labels=tokens, evidence=evidence)
    with torch.no_grad():
        model.train()(tokens, labels=tokens, evidence=evidence)
    assert take_sums([model], torch.device("cpu")).tolist() == [0.0, 0.0]


def asking_recipe(tiny_data, folder):
    """Two stages that ask, and a third that does not; the first ends by a metric that it measures and never reaches."""
    raw = tiny_container(tiny_data)
    raw["data"]["synthetic"] = {**raw["data"]["synthetic"], **ASKING}
    first, second = raw["stages"]
    first |= {"context": 256, "window": 16}
    first["until"] = {
        "metric": "niah.single@256", "at_least": 1.0, "max_tokens": 5 * 4 * 256, "every_steps": 2, "samples": 2,
    }  # fmt: skip
    second |= {"context": 512, "until": {"tokens": 3 * 4 * 512}}
    third = {**second, "name": "third", "data": {"synthetic": {"evidence_weight": 0.0}}}
    raw["stages"] = [first, second, third]
    path = folder / "asking.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.slow
def test_training_asks_in_every_step_of_its_stages(tiny_data, hsa, tmp_path):
    """Whatever the micro-batch, activation checkpointing and interruptions, and also after the exit metric's probes."""
    recipe = asking_recipe(tiny_data, tmp_path)
    runs = {}
    for name, overrides in {
        "whole": [],
        "small": ["micro_batch=1", "recompute=full"],
        "attention": ["micro_batch=2", "recompute=selective"],
        "off": ["data.synthetic.evidence_weight=0"],
    }.items():
        done = hsa("train", recipe, *overrides, "--run-dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
        runs[name] = records(tmp_path / name)
    asked = [r["evidence_loss"] for r in runs["whole"] if r["stage"] != "third"]
    assert len(asked) == 8 and all(value > 0 for value in asked)
    assert not any("evidence_loss" in r for r in [*runs["off"], *runs["whole"][-3:]])
    for name in ("small", "attention"):
        for ours, theirs in zip(runs[name], runs["whole"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
            assert ours.get("evidence_loss", 0) == pytest.approx(theirs.get("evidence_loss", 0), rel=1e-3)
    assert runs["off"][0]["loss"] == runs["whole"][0]["loss"] and runs["off"][2]["loss"] != runs["whole"][2]["loss"]
    for limit in (["max_steps=3"], ["max_steps=6"], []):
        assert hsa("train", recipe, *limit, "--run-dir", tmp_path / "parts").returncode == 0
    same = ("step", "loss", "grad_norm", "evidence_loss")
    assert [[r.get(k) for k in same] for r in records(tmp_path / "parts")] == [
        [r.get(k) for k in same] for r in runs["whole"]
    ]
