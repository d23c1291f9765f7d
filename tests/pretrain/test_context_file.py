"""Saved contexts: equal to generation without a break, refused by what they do not belong to, whole or absent."""

import argparse
import sys
import types

import pytest
import torch

from data_pipeline.tokenizer import Tokenizer, train_bpe
from parallel.model_config import ModelConfig
from pretrain.context_file import load_context, save_context
from pretrain.context_store import Placement
from pretrain.errors import RunDirError
from pretrain.evaluation import generate
from pretrain.inference import InferenceEngine
from pretrain.model import build_model

pytestmark = pytest.mark.usefixtures("world_on_cpu")

SIZES = dict(
    vocab_size=288, hidden_size=32, ffn_hidden_size=48, lower_layers=1, upper_layers=1, num_heads=4, head_dim=8,
    swa_kv_heads=2, hsa_kv_heads=2, retrieval_heads=2, retrieval_dim=16, chunk_size=8, encoder_ffn_hidden_size=32,
    init_std=0.2,
)  # fmt: skip
TEXT = "The grass was dry and long that year. Nobody came to cut it, and the wind lay down in it. "


def engine_of(seed=0, window=16, **changes):
    model = build_model(ModelConfig(**SIZES), max_length=256, seed=seed).eval()
    return InferenceEngine(model, **{"window": window, "hsa_window": 8, "top_k": 3, "segment": 32, **changes})


def draw(batch, length, seed=0):
    return torch.randint(0, 280, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("placement", [Placement(), Placement(host=True), Placement(fp8=True)], ids=str)
@pytest.mark.parametrize("moment", ["after the prompt", "while generating"])
def test_going_on_later_gives_the_same_bits(tmp_path, placement, moment):
    tokens, lengths = draw(2, 140), [101, 75]
    further = draw(2, 40, seed=1)
    engine = engine_of(memory=placement)
    logits = engine.prefill(tokens[:, :101], lengths)
    if moment == "while generating":
        for i in range(10):
            logits = engine.decode(further[:, i])
    save_context(engine, tmp_path / "c", tokenizer_fingerprint="t", logits=logits, seen=tokens.unique())
    later = engine_of(memory=placement)
    loaded, seen = load_context(later, tmp_path / "c", tokenizer_fingerprint="t")
    assert torch.equal(loaded, logits) and torch.equal(seen, tokens.unique())
    assert later.positions == engine.positions
    assert torch.equal(later.prefill(further[:, 10:15]), engine.prefill(further[:, 10:15]))
    for i in range(15, 40):
        assert torch.equal(later.decode(further[:, i]), engine.decode(further[:, i]))


def test_what_it_does_not_belong_to_is_named(tmp_path):
    engine = engine_of()
    logits = engine.prefill(draw(1, 60))
    save_context(engine, tmp_path / "c", tokenizer_fingerprint="t", logits=logits, seen=draw(1, 60).unique())
    for other, tokenizer, message in (
        (engine_of(seed=1), "t", "other weights"),
        (engine_of(), "u", "another tokenizer"),
        (engine_of(top_k=4), "t", r"top_k=3 \(here 4\)"),
        (engine_of(retrieval_temperature=0.5), "t", r"retrieval_temperature=1.0 \(here 0.5\)"),
        (engine_of(distance_decay=0.5, decay_from=64), "t", r"distance_decay=0.0 \(here 0.5\)"),
        (engine_of(memory=Placement(fp8=True)), "t", "fp8=False"),
    ):
        with pytest.raises(RunDirError, match=message):
            load_context(other, tmp_path / "c", tokenizer_fingerprint=tokenizer)
    with pytest.raises(RunDirError, match="holds no saved context"):
        load_context(engine, tmp_path, tokenizer_fingerprint="t")
    file = tmp_path / "c" / "context.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RunDirError, match="damaged"):
        load_context(engine, tmp_path / "c", tokenizer_fingerprint="t")


def test_a_context_is_whole_or_absent(tmp_path, monkeypatch):
    import safetensors.torch

    engine = engine_of()
    arguments = dict(tokenizer_fingerprint="t", logits=engine.prefill(draw(1, 60)), seen=draw(1, 60).unique())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "novel.txt").write_text("x")
    with pytest.raises(RunDirError, match="holds something else"):
        save_context(engine, tmp_path / "mine", **arguments)
    save_context(engine, tmp_path / "c", **arguments)
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}

    def full_disk(tensors, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    engine.decode(draw(1, 1)[0])
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(safetensors.torch, "save_file", full_disk)
        save_context(engine, tmp_path / "c", **arguments)
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == before
    save_context(engine, tmp_path / "c", **arguments)
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "mine"]


def test_generate_reads_a_library_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "tokenizer.json").write_text(train_bpe([TEXT], 280))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    loaded = types.SimpleNamespace(
        tokenizer=tokenizer,
        recipe=types.SimpleNamespace(name="tiny", stages=[], model=ModelConfig()),
        engine_factory=lambda **options: engine_of(**options),
        step=1,
        stage="only",
    )
    loader = types.ModuleType("pretrain.model_io")
    loader.load_for_inference = lambda *args, **kwargs: loaded
    monkeypatch.setitem(sys.modules, "pretrain.model_io", loader)

    def run(*words):
        parser = argparse.ArgumentParser()
        generate.add_arguments(parser)
        assert generate.main(parser.parse_args([str(tmp_path / "run"), *map(str, words)])) == 0
        return capsys.readouterr().out

    (tmp_path / "all.txt").write_text(TEXT * 3)
    (tmp_path / "library.txt").write_text(TEXT * 2)
    (tmp_path / "question.txt").write_text(TEXT)
    whole = run("--prompt-file", tmp_path / "all.txt", "--max-new-tokens", 30)
    library = tmp_path / "library"
    nothing = run("--prompt-file", tmp_path / "library.txt", "--max-new-tokens", 0, "--context-out", library)
    assert nothing == ""
    asked = ["--context-in", library, "--prompt-file", tmp_path / "question.txt"]
    assert run(*asked, "--max-new-tokens", 30) == whole  # the text falls apart into the same tokens at a sentence
    first = run(*asked, "--max-new-tokens", 12, "--context-out", tmp_path / "half")
    assert first + run("--context-in", tmp_path / "half", "--max-new-tokens", 18) == whole
    cut = whole[6:9]
    assert run(*asked, "--max-new-tokens", 30, "--stop", cut) == whole[: whole.index(cut)]
