"""Dense checkpoints as initialisation: the same function where the architectures allow it, and an honest report."""

import json

import pytest
import torch

from data_pipeline.tokenizer import train_bpe
from parallel import mesh
from pretrain import cli
from pretrain.huggingface.names import split_qkv
from pretrain.model_io import load_for_inference

transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=300, hidden_size=32, intermediate_size=56, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=7000.0,
    initializer_range=0.2,
)  # fmt: skip
TEXT = "The grass was dry and long that year. Nobody came to cut it, and the wind lay down in it. "


@pytest.fixture(autouse=True)
def world(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    yield
    mesh.shutdown()


def foreign(tmp_path, kind, **changes):
    torch.manual_seed(0)
    model = kind[0](kind[1](**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "norm" in name:
                x.add_(torch.rand(x.shape) * 0.3)
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(train_bpe([TEXT], 280))
    return model


QWEN3 = (transformers.Qwen3ForCausalLM, transformers.Qwen3Config)
LLAMA = (transformers.LlamaForCausalLM, transformers.LlamaConfig)


def imported(tmp_path, *words):
    report = tmp_path / "report.json"
    assert (
        cli.main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "run"), "--report", str(report), *words]) == 0
    )
    return load_for_inference(tmp_path / "run", device="cpu"), json.loads(report.read_text())


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_with_normalised_queries_is_the_same_function(tmp_path, tied):
    theirs = foreign(tmp_path, QWEN3, tie_word_embeddings=tied)
    loaded, report = imported(tmp_path)
    model = loaded.model
    assert model.model.tied_embeddings == tied and model.model.rope_base == 7000.0
    model.set_schedule(window=512, hsa_window=512, top_k=None)
    tokens = torch.randint(0, 300, (2, 128))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    assert not report["unused"] and not report["notes"]
    left = {name for name, what in report["tensors"].items() if what.startswith("left")}
    assert left and all("encoder" in name or "hsa" in name for name in left)
    model.set_schedule(window=16, hsa_window=16, top_k=None)
    with torch.no_grad():
        assert (model(tokens) - theirs(tokens).logits)[:, 100:].abs().max() > 1e-2


def test_llama_gives_what_fits_and_the_report_says_what_does_not(tmp_path, capsys):
    theirs = foreign(tmp_path, LLAMA)
    loaded, report = imported(tmp_path)
    assert "not normalise queries and keys" in report["notes"][0] and "estimates" in capsys.readouterr().out
    sizes, state = loaded.model.model, loaded.model.state_dict()
    q, k, v = split_qkv(state["decoder.layers.2.self_attention.linear_qkv.weight"], 2, sizes)
    attention = theirs.model.layers[2].self_attn
    for ours, projection in ((q, attention.q_proj), (k, attention.k_proj), (v, attention.v_proj)):
        assert torch.equal(ours, projection.weight)
    # The first layer's MLP, on the same input, is theirs.
    x = torch.randn(5, 1, 32)
    with torch.no_grad():
        layer = loaded.model.decoder.layers[0]
        expected = theirs.model.layers[0].mlp(theirs.model.layers[0].post_attention_layernorm(x))
        torch.testing.assert_close(layer.mlp(layer.pre_mlp_layernorm(x))[0], expected, rtol=1e-5, atol=1e-5)
        # Queries have their old size on average.
        normal = torch.randn(400, 1, 32)
        read = theirs.model.layers[0].input_layernorm(normal)
        size = theirs.model.layers[0].self_attn.q_proj(read).square().mean().sqrt()
        ours = layer.self_attention.get_query_key_value_tensors(layer.input_layernorm(normal))[0]
        assert ours.square().mean().sqrt() == pytest.approx(size.item(), rel=0.1)


def test_other_shapes_stay_as_they_were_made(tmp_path, tiny_recipe):
    foreign(tmp_path, LLAMA, vocab_size=320, num_hidden_layers=3)
    loaded, report = imported(tmp_path, "--recipe", str(tiny_recipe), "model.ffn_hidden_size=56")
    tensors = report["tensors"]
    assert tensors["embedding.word_embeddings.weight"] == "taken"
    assert tensors["decoder.layers.0.mlp.linear_fc1.weight"] == "taken: fused"
    assert tensors["decoder.layers.0.mlp.linear_fc2.weight"] == "taken"
    assert "no such tensor" in tensors["decoder.layers.1.mlp.experts.linear_fc1.weight"]
    assert "no such tensor" in tensors["decoder.layers.3.self_attention.linear_qkv.weight"]
    assert tensors["decoder.layers.2.hsa_attention.linear_proj.weight"].startswith("set to 0")
    assert "layers.1.mlp.up_proj.weight" in report["unused"]
    assert any("rope_base" in note for note in report["notes"])
    assert loaded.recipe.model.num_experts == 4


def test_a_folder_without_a_llama_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "t5", "d_model": 3}')
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert cli.main(["import", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "is no Llama-like checkpoint: its configuration lacks vocab_size" in capsys.readouterr().err
    (tmp_path / "x.gguf").write_text("no")
    assert cli.main(["import", str(tmp_path / "x.gguf"), "--out", str(tmp_path / "run")]) == 2
    assert "x.gguf" in capsys.readouterr().err
