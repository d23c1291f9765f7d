"""The kernel benchmark without a GPU: what it refuses, what it feeds the kernels, how it ends."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

pytest.importorskip("triton")

from hsa_kernels import reference
from hsa_kernels.bench import cases, kernels


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys):
    assert kernels.main(parse()) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_a_missing_checkout_of_the_authors_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--authors-path wants a checkout"):
        cases.load_authors(str(tmp_path))


def test_a_wrong_result_gets_no_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "measure", lambda run, repeats: 2.0)
    monkeypatch.setattr(kernels, "peak_gigabytes", lambda run: 0.5)
    path = tmp_path / "rows.json"
    report = kernels.Report({"matmul_tflops": 100.0}, str(path))
    assert report.add("s", "right", lambda: None, error=1e-3, flops=1e11) == 2.0
    assert report.add("s", "wrong", lambda: None, error=4e-3) is None
    assert report.add("s", "not a number", lambda: None, error=float("nan")) is None
    right, wrong, nan = json.loads(path.read_text())["rows"]
    assert right["tflops"] == pytest.approx(50.0) and right["ceiling_fraction"] == pytest.approx(0.5)
    for row in (wrong, nan):
        assert "ms" not in row and "exceeds" in row["refused"]
    assert capsys.readouterr().out.count("REFUSED") == 2


def test_the_gate_sees_errors_in_any_gradient():
    """attention_error on the CPU: the oracle itself passes; a wrong gradient of one input does not."""
    length, size = 256, 16
    ids = cases.choose_ids(length, 2, 4, size, "random", torch.device("cpu"))
    g = torch.Generator().manual_seed(0)
    q, k, v, cot = (torch.randn(1, length, h, 16, generator=g) for h in (4, 2, 2, 4))
    w = torch.rand(ids.shape, generator=g)
    case = cases.Case(q, k, v, w, ids, cot, size)
    run = kernels._ours(case)
    assert cases.attention_error(case, run, backward=True) < 1e-5
    for wrong in range(4):

        def tampered(*inputs, wrong=wrong):
            scaled = [x * 1.01 - x.detach() * 0.01 if i == wrong else x for i, x in enumerate(inputs)]
            return run(*scaled)

        assert cases.attention_error(case, tampered, backward=True) > 5e-3


@pytest.mark.parametrize("kind", ["overlap", "random", "clustered", "hot"])
def test_selections_of_the_benchmark_are_causal(kind):
    size, length = 16, 1024
    ids = cases.choose_ids(length, 2, 8, size, kind, torch.device("cpu"))
    visible = (torch.arange(length) // size).view(1, -1, 1, 1)
    assert ids.dtype == torch.int32 and bool((ids < visible).all())
    assert bool((ids[:, :size] == -1).all()) and bool((ids[:, size:] >= 0).all())
    if kind == "overlap":
        assert (ids[:, 1:] == ids[:, :-1]).float().mean() > 0.7


def test_all_means_every_visible_chunk():
    ids = cases.choose_ids(200, 1, 4, 64, "all", torch.device("cpu"))[0, :, 0]
    assert ids[63].tolist() == [-1] * 4 and ids[64].tolist() == [0, -1, -1, -1] and ids[199].tolist() == [0, 1, 2, -1]


def test_the_gate_of_the_window_sees_a_wrong_window():
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 300, 2, 16, generator=g) for _ in "qkv"]

    def run(q, k, v, window=40):
        return reference.sliding_window_attention(q, k, v, window=window)

    assert cases.window_error(run, inputs, 40) < 1e-5
    assert cases.window_error(run, inputs, 41) > 1e-3
    assert cases.window_error(run, inputs, 500) > 1e-3
