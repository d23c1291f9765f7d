"""The recipe of the small long-context model: size, stages, share of synthetic text, and all of it at toy size."""

import json
import subprocess

import numpy as np
import pytest

from data_pipeline.words import WORDS
from parallel.model_config import count_parameters
from pretrain.recipe import load_recipe
from pretrain.train import stage_synthetic
from tests.conftest import hsa_command, hsa_environment

DOMAINS = ("books", "essays", "docs", "code-doc", "dictionary", "kernel-doc", "python", "kernel")


def test_size_stages_and_synthetic_share():
    recipe = load_recipe("h100-16m").recipe
    assert count_parameters(recipe.model).total == 35_075_648
    warmup = [stage for stage in recipe.stages if stage.name.startswith("warmup")]
    main = [stage for stage in recipe.stages if stage not in warmup]
    assert [stage.top_k for stage in recipe.stages] == [None] * 7 + [128]  # all chunks until the last stage
    assert [stage.window for stage in recipe.stages] == [128, 256, 512, 512, 512, 512, 512, 512]
    assert recipe.stages[-2].context > recipe.stages[-3].context
    assert max(stage.context for stage in recipe.stages) <= 32768
    for stage in main:  # one sequence in twenty, documents never longer than a sequence
        assert stage_synthetic(recipe, stage).rate <= 0.05
    for stage in recipe.stages:
        settings = stage_synthetic(recipe, stage)
        assert settings.templates == "wide" and settings.digits == 7
        assert recipe.stage_batch(stage) * stage.context == 65536
    assert recipe.stages[-1].learning_rate.end < 0.05
    kernel = next(entry.weight for entry in recipe.data.mix if entry.name == "kernel")
    assert kernel / sum(entry.weight for entry in recipe.data.mix) < 0.4


@pytest.mark.slow
def test_its_stages_and_its_evaluation_at_toy_size(tmp_path):
    """Train all stages in two commands and ask for needles in texts that questions share."""
    rng = np.random.default_rng(0)
    text = tmp_path / "large" / "text"
    text.mkdir(parents=True)
    for domain in (*DOMAINS, "held_out"):
        words = rng.choice(WORDS, 24000)
        words[::9] = "river."
        (text / f"{domain}.jsonl").write_text(json.dumps({"text": " ".join(words)}) + "\n")
    environment = {**hsa_environment(), "HSA_DATA": str(tmp_path)}

    def hsa(*arguments):
        done = subprocess.run(
            hsa_command(*arguments), env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    shards = tmp_path / "large" / "shards"
    hsa("data", "tokenize", text, "--out", shards, "--tokenizer", "bpe:600", "--workers", "1", "--quiet")
    model = dict(hidden_size=32, ffn_hidden_size=48, num_heads=2, head_dim=16, swa_kv_heads=2, hsa_kv_heads=1)
    model |= dict(retrieval_heads=1, retrieval_dim=16, encoder_ffn_hidden_size=48, lower_layers=1, upper_layers=2)
    overrides = [f"model.{key}={value}" for key, value in model.items()]
    overrides += ["precision=fp32", "tracking.mlflow.uri=none", "data.readers=2", "model.hsa_layers=1"]
    lengths = {"warmup-1k": 512, "warmup-2k": 512, "warmup-4k": 512}
    lengths |= {"warmup-16k": 1024, "warmup-32k": 2048, "pretrain": 512, "long": 2048, "anneal": 2048}
    for name, context in lengths.items():
        overrides += [f"stages.{name}.{key}={value}" for key, value in (("context", context), ("batch", 4))]
        overrides += [f"stages.{name}.window=64", f"stages.{name}.until.tokens={4 * context}"]
    overrides += ["stages.pretrain.data.synthetic={min_length: 320}", "stages.long.data.synthetic={min_length: 320}"]
    overrides += ["stages.anneal.data.synthetic={min_length: 320}"]
    run = tmp_path / "run"
    hsa("train", "h100-16m", "--run-dir", run, "--until-stage", "warmup-2k", *overrides)
    hsa("train", "h100-16m", "--run-dir", run, *overrides)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == list(lengths) and json.loads((run / "run.json").read_text())["finished"]

    shared = ("--haystacks", "2", "--templates", "eval")
    out = hsa(
        "eval", "niah", run, "--lengths", "1k", "--values", "number,word", "--samples", "2", "--depths", "2", *shared
    )
    assert "niah_single.word at 1k" in out
    found = json.loads((run / "eval" / "niah.json").read_text())
    hsa(
        "eval", "niah", run, "--lengths", "1k", "--values", "number,word", "--samples", "2", "--depths", "2", *shared,
        "--top-k", "1,32", "--name", "two"
    )  # fmt: skip
    two = json.loads((run / "eval" / "two.json").read_text())
    assert two["model"]["settings"] == {"top_k": [1, 32]}
    assert list(two["values"]) == ["number top-k 1", "number top-k 32", "word top-k 1", "word top-k 32"]
    for kind in ("number", "word"):  # 32 is the last stage's
        assert two["values"][f"{kind} top-k 32"]["cells"] == found["values"][kind]["cells"]
    assert found["haystacks_per_length"] == 2 and set(found["values"]) == {"number", "word"}
    assert [cell["n"] for cell in found["cells"]] == [4, 4]
