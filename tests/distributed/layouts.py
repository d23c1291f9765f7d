"""Layouts against one rank, for any device: launching `layout_worker.py` on a list of them, and the comparison."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import hsa_environment

WORKER = Path(__file__).with_name("layout_worker.py")
# What a layout may differ in from the run of one rank that it is compared with.
_FREE = ("parallel", "micro_batch", "recompute", "steps", "compute", "overlap")
# Steps that are held to rounding. After many, two scores may be so nearly equal that rounding decides which expert or
# chunk one token gets, on one kind of processor and not on another: seen at step 19, one choice of 128.
_EXACT = 10


def reference_of(job, base):
    """The name and the job of one rank that a layout is compared with; several layouts share one."""
    same = {key: value for key, value in job.items() if key not in _FREE}
    same |= {"steps": base["steps"], "micro_batch": 4, "parallel": {}}
    return json.dumps(same, sort_keys=True), same


def launch(layouts, base, folder, device, timeout):
    """Run all layouts, {ranks: {name: job}}, and their references; `base` completes the jobs.

    Gives a function of (ranks, name) that returns (one rank's result, the layout's). What failed fails there, so that
    the layouts that did run are judged.
    """
    jobs, references = [], {}
    for ranks, named in layouts.items():
        for name, special in named.items():
            job = {**base, **special}
            key, reference = reference_of(job, base)
            if key not in references:
                references[key] = {**reference, "ranks": 1, "name": f"reference {len(references)}"}
            jobs.append({**job, "ranks": ranks, "name": f"{ranks} {name}", "reference": references[key]["name"]})
    (folder / "jobs.json").write_text(json.dumps([*references.values(), *jobs]))
    environment = hsa_environment()
    if device == "cuda":
        del environment["CUDA_VISIBLE_DEVICES"]
        environment["TORCH_COMPILE_DISABLE"] = "1"  # compiling takes longer than all layouts
    command = [sys.executable, "-W", "ignore", str(WORKER), str(folder / "jobs.json"), str(folder), device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    by_name = {job["name"]: job["reference"] for job in jobs}

    def both(ranks, name):
        found = []
        for wanted, number in ((by_name[f"{ranks} {name}"], 1), (f"{ranks} {name}", ranks)):
            path = folder / f"{wanted}.pt"
            assert path.exists(), f"{wanted} gave no result:\n{(folder / f'ranks-{number}.log').read_text()[-6000:]}"
            found.append(torch.load(path))
        return found

    return both


def assert_equals_one_rank(single, spread, job):
    """Losses, norms, every gradient, reports by domain, position and expert, logits, and what a token moves."""
    steps = len(spread["losses"])
    assert steps == job["steps"]
    assert spread["losses"][:_EXACT] == pytest.approx(single["losses"][: min(steps, _EXACT)], rel=1e-5)
    assert spread["losses"] == pytest.approx(single["losses"][:steps], rel=1e-3)
    assert spread["grad_norms"][0] == pytest.approx(single["grad_norms"][0], rel=1e-4)
    starts = {start for start in (0, 16, 32, 64) if start < job["length"]}
    for kind, keys in (("domains", {"a", "b"}), ("positions", starts)):
        assert single[kind][0].keys() == keys
        for step, (ours, theirs) in enumerate(zip(spread[kind], single[kind], strict=False)):
            assert ours == pytest.approx(theirs, rel=1e-5 if step < _EXACT else 1e-3)
    for step, (ours, theirs) in enumerate(zip(spread["experts"], single["experts"], strict=False)):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7 if step < _EXACT else 0.02)
    assert spread["evidence"][:_EXACT] == pytest.approx(single["evidence"][: min(steps, _EXACT)], rel=1e-5)
    assert spread["evidence"] == pytest.approx(single["evidence"][:steps], rel=1e-3)
    assert spread["gradients"].keys() == single["gradients"].keys()
    for name, expected in single["gradients"].items():
        difference = (spread["gradients"][name] - expected).norm() / expected.norm().clamp_min(1e-12)
        assert difference < 1e-4, f"{name}: {difference:.1e}"
    assert not spread["unequal copies"]
    torch.testing.assert_close(spread["logits"], single["logits"], rtol=1e-4, atol=1e-5)
    assert single["moved"] and spread["moved"] == single["moved"]
