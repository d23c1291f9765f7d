"""Hugging Face folders: the modelling file computes what our model computes; weights survive the way out and back."""

import json
import subprocess
import sys

import pytest
import torch

from data_pipeline.tokenizer import Tokenizer, train_bpe
from parallel import mesh
from parallel.model_config import Ablations, ModelConfig
from pretrain import cli
from pretrain.errors import RecipeError, RunDirError
from pretrain.huggingface.export import MODELING, export_model
from pretrain.huggingface.modeling_hsa_ultralong import HSAUltraLong
from pretrain.huggingface.names import our_tensors
from pretrain.model import build_model
from pretrain.model_io import load_for_inference
from tests.conftest import hsa_environment, tiny_container

SIZES = dict(
    vocab_size=320, hidden_size=32, ffn_hidden_size=48, lower_layers=2, upper_layers=3, hsa_layers=2, num_heads=4,
    head_dim=8, swa_kv_heads=2, hsa_kv_heads=2, retrieval_heads=2, retrieval_dim=16, chunk_size=8, encoder_layers=2,
    encoder_ffn_hidden_size=24, num_experts=4, experts_per_token=2, expert_ffn_hidden_size=16,
    shared_expert_ffn_hidden_size=20, init_std=0.2, rope_base=5000.0, norm_eps=1e-5,
)  # fmt: skip
VARIANTS = {
    "experts, tied": {},
    "one expert per token, untied": dict(experts_per_token=1, tied_embeddings=False, retrieval_heads=1),
    "no bypass": dict(ablations=Ablations(bypass=False)),
    "dense, hsa layers of their own": dict(num_experts=0, swa_in_hsa=False, hsa_kv_heads=1, retrieval_heads=1),
}
TEXT = "The grass was dry and long that year. Nobody came to cut it, and the wind lay down in it. " * 3


@pytest.fixture(autouse=True)
def world(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    yield
    mesh.shutdown()


def exported(tmp_path, top_k=3, seed=0, **changes):
    """A model with gains and biases that are not 1 and 0, and its folder."""
    mesh.initialize(device="cpu", seed=1)
    model = build_model(ModelConfig(**{**SIZES, **changes}), max_length=256, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in our_tensors(model.state_dict()).values():
            if x.dim() == 1:
                x.add_(torch.rand(x.shape, generator=generator) * 0.3)
    model.set_schedule(window=16, hsa_window=8, top_k=top_k)
    file = tmp_path / "tokenizer.json"
    file.write_text(train_bpe([TEXT], 300))
    tokenizer = Tokenizer(file)
    about = {"name": "tiny", "step": 7, "stage": "long", "context": 128, "precision": "fp32"}
    ids = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    export_model(model, tmp_path / "hf", window=16, hsa_window=8, top_k=top_k, tokenizer_file=file, about=about, **ids)
    return model, tmp_path / "hf"


def draw(batch, length):
    return torch.randint(0, 300, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("top_k", [3, None])
def test_the_modelling_file_computes_our_logits(tmp_path, variant, top_k):
    model, folder = exported(tmp_path, top_k, **VARIANTS[variant])
    theirs = HSAUltraLong.from_folder(folder)
    tokens = draw(2, 600)  # several blocks of queries
    with torch.no_grad():
        ours = model(tokens)
        # Our whole forward pass rotates by positions in fp32, the file by distances: a few 1e-5 apart at position 600.
        assert (theirs(tokens) - ours).abs().max() <= 1e-5 * ours.abs().max()
        for length in (1, 7, 9, 77):
            ours = model(torch.nn.functional.pad(tokens[:, :length], (0, -length % 8)))[:, :length]
            torch.testing.assert_close(theirs(tokens[:, :length]), ours, rtol=1e-5, atol=1e-5)


def test_the_file_needs_nothing_of_ours(tmp_path):
    """In a process that can import neither our packages nor transformers."""
    model, folder = exported(tmp_path)
    script = f"""
import sys
class Nothing:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("pretrain", "parallel", "hsa_kernels", "data_pipeline", "megatron", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Nothing())
sys.path.insert(0, {str(folder)!r})
import torch
from {MODELING.removesuffix(".py")} import HSAUltraLong
torch.save(HSAUltraLong.from_folder({str(folder)!r})(torch.arange(40)[None]), {str(tmp_path / "logits.pt")!r})
"""
    environment = {**hsa_environment(), "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)
    with torch.no_grad():
        expected = model(torch.arange(40)[None])
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-5)


def test_transformers_loads_and_generates(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, folder = exported(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == theirs.config.eos_token_id is not None
    assert tokenizer(TEXT)["input_ids"] == Tokenizer(folder / "tokenizer.json").encode(TEXT)
    tokens = draw(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-5, atol=1e-5)
        expected = tokens
        for _ in range(12):
            padded = torch.nn.functional.pad(expected, (0, -expected.shape[1] % 8))
            expected = torch.cat((expected, model(padded)[:, expected.shape[1] - 1].argmax(-1, keepdim=True)), 1)
    settings = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)
    generated = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    eos = theirs.config.eos_token_id
    assert not (expected[:, 40:] == eos).any(), "choose other weights: an end token would be suppressed"
    assert torch.equal(generated, expected)
    # The second row one token shorter, padded on the left: as if alone.
    ragged = tokens.clone()
    ragged[1, 0] = 0
    mask = torch.ones_like(ragged)
    mask[1, 0] = 0
    alone = theirs.generate(tokens[1:, 1:], attention_mask=mask[1:, 1:], **settings)
    assert torch.equal(theirs.generate(ragged, attention_mask=mask, **settings)[1, 1:], alone[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_out_and_back_gives_the_same_bits(tmp_path, variant, capsys):
    model, folder = exported(tmp_path, **VARIANTS[variant])
    ours = our_tensors(model.state_dict())
    mesh.shutdown()
    assert cli.main(["import", str(folder), "--out", str(tmp_path / "run")]) == 0
    loaded = load_for_inference(tmp_path / "run", device="cpu")
    for name, x in our_tensors(loaded.model.state_dict()).items():
        assert torch.equal(x, ours[name]), name
    stage = loaded.stage
    assert (stage.name, stage.context, stage.window, stage.hsa_window, stage.top_k) == ("long", 128, 16, 8, 3)
    assert loaded.tokenizer.fingerprint == Tokenizer(folder / "tokenizer.json").fingerprint
    mesh.shutdown()
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "again")]) == 0
    assert not torch.distributed.is_initialized()  # a command takes down what it has set up
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / MODELING).read_bytes() == (folder / MODELING).read_bytes()


def test_an_imported_model_is_trained_on(tmp_path, tiny_data, hsa):
    container = tiny_container(tiny_data)
    container["optimizer"]["lr"] = 1e-30  # so that the weights after a step are those before it
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(container))
    from pretrain.recipe import load_recipe

    sizes = load_recipe(str(recipe)).recipe.model
    model, folder = exported(tmp_path, seed=9, **{name: getattr(sizes, name) for name in vars(sizes)})
    ours = our_tensors(model.state_dict())
    mesh.shutdown()
    run = tmp_path / "run"
    assert hsa("import", folder, "--out", run, "--recipe", recipe).returncode == 0
    trained = hsa("train", recipe, "max_steps=2", "--run-dir", run)
    assert trained.returncode == 0, trained.stderr
    loaded = load_for_inference(run, device="cpu")
    assert loaded.step == 2
    for name, x in our_tensors(loaded.model.state_dict()).items():
        if not name.endswith("expert_bias"):
            assert torch.equal(x, ours[name]), name


def test_mistakes_are_named(tmp_path, tiny_recipe):
    _, folder = exported(tmp_path)
    mesh.shutdown()

    def run(*words):
        parser = cli.build_parser("import")
        from pretrain.huggingface import importing

        return importing.main(cli.parse(parser, ["import", *map(str, words)]))

    with pytest.raises(RecipeError, match="another shape: upper_layers 3"):
        run(folder, "--out", tmp_path / "run", "--recipe", tiny_recipe)
    with pytest.raises(RecipeError, match="would drop the HSA weights"):
        run(folder, "--out", tmp_path / "run", "--recipe", tiny_recipe, "model.ablations.hsa=false")
    with pytest.raises(RunDirError, match="no config.json"):
        run(tmp_path, "--out", tmp_path / "run")
    with pytest.raises(RunDirError, match="is not empty"):
        run(folder, "--out", tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(RunDirError, match="damaged"):
        run(folder, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
