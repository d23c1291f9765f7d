"""Requests in text, and lm-evaluation-harness on top of them, against plain forward passes of a tiny model."""

import argparse
import importlib
import inspect
import json
import sys
import types
import unittest.mock

import pytest
import torch

from data_pipeline.tokenizer import Tokenizer, train_bpe
from parallel import mesh
from parallel.model_config import ModelConfig
from pretrain.errors import RecipeError
from pretrain.evaluation import commands
from pretrain.evaluation.requests import TextScorer
from pretrain.inference import InferenceEngine
from pretrain.model import build_model

SIZES = dict(
    vocab_size=288, hidden_size=32, ffn_hidden_size=48, lower_layers=1, upper_layers=1, num_heads=4, head_dim=8,
    swa_kv_heads=2, hsa_kv_heads=2, retrieval_heads=2, retrieval_dim=16, chunk_size=8, encoder_ffn_hidden_size=32,
    init_std=0.2,
)  # fmt: skip
TEXT = "The grass was dry and long that year. Nobody came to cut it, and the wind lay down in it. "


@pytest.fixture
def model(monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    mesh.initialize(device="cpu", seed=1)
    model = build_model(ModelConfig(**SIZES), max_length=256, seed=0).eval()
    model.set_schedule(window=16, hsa_window=8, top_k=3)
    (tmp_path / "tokenizer.json").write_text(train_bpe([TEXT], 280))
    yield model, Tokenizer(tmp_path / "tokenizer.json")
    mesh.shutdown()


def engine_of(model):
    return InferenceEngine(model, window=16, hsa_window=8, top_k=3, segment=32, frozen=True)


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.nn.functional.pad(torch.tensor([ids]), (0, -len(ids) % 8)))[0, : len(ids)].float()


def plain_score(model, before, after):
    """One request alone, by one forward pass."""
    logits = logits_of(model, [*before, *after])[len(before) - 1 : -1].log_softmax(-1)
    wanted = torch.tensor(after)
    return logits.gather(1, wanted[:, None]).sum().item(), bool((logits.argmax(-1) == wanted).all())


PAIRS = [
    (TEXT * 3, "The wind came."),
    ("The grass was", " dry"),
    ("The grass was ", "dry"),  # space at the border
    ("", "Nobody came to cut it"),
    (TEXT, ""),
    ("Nob", "ody came"),  # a word that the border cuts
]


def test_loglikelihoods_are_those_of_each_request_alone(model):
    model, tokenizer = model
    scorer = TextScorer(engine_of(model), tokenizer, batch=3)
    for (context, continuation), (total, greedy) in zip(PAIRS, scorer.loglikelihood(PAIRS), strict=True):
        before, after = scorer.split(context, continuation)
        assert tokenizer.decode([*before, *after]).strip() == (context + continuation).strip()
        if not continuation:
            continue
        expected, expected_greedy = plain_score(model, before, after)
        assert total == pytest.approx(expected, abs=1e-3) and greedy == expected_greedy
    assert scorer.split("The grass was ", "dry") == scorer.split("The grass was", " dry")
    before = tokenizer.encode(TEXT)
    likeliest = int(logits_of(model, before)[-1].argmax())
    found = scorer._score([(before, [likeliest]), (before, [(likeliest + 1) % 280])])
    assert [greedy for _, greedy in found] == [True, False]
    texts = [TEXT * 4, "The wind", TEXT]
    for text, total in zip(texts, scorer.loglikelihood_of_texts(texts), strict=True):
        assert total == pytest.approx(plain_score(model, [tokenizer.eos_id], tokenizer.encode(text))[0], abs=1e-3)


def test_generation_in_batches_stops_each_request_by_itself(model):
    model, tokenizer = model
    scorer = TextScorer(engine_of(model), tokenizer, batch=4)
    prompts = [TEXT * 2, "The", TEXT, "", "Nobody came"]

    def alone(prompt):
        ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
        start = len(ids)
        while len(ids) < start + 20:
            token = int(logits_of(model, ids)[-1, : tokenizer.vocab_size].argmax())
            if token == tokenizer.eos_id:
                break
            ids.append(token)
        return tokenizer.decode(ids[start:])

    expected = [alone(prompt) for prompt in prompts]
    assert scorer.generate(prompts, stops=[], max_new_tokens=20) == expected
    assert any(expected)
    stop = next(text for text in expected if len(text) > 6)[3:5]
    cut = [text[: text.index(stop)] if stop in text else text for text in expected]
    assert cut != expected and scorer.generate(prompts, stops=[stop], max_new_tokens=20) == cut


def harness_on(model, tokenizer, folder, monkeypatch):
    """`hsa eval lm-eval` on this model: a function of the tasks and further words."""
    loaded = commands.Loaded(
        model=types.SimpleNamespace(tokenizer=tokenizer, recipe=types.SimpleNamespace(name="tiny"), step=1, stage="s"),
        engine=engine_of(model),
        context=64,
        window=16,
        run_dir=folder,
        settings={},
    )
    monkeypatch.setattr(commands, "load", lambda args: loaded)
    monkeypatch.setenv("HF_HOME", str(folder / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")

    def run(tasks, *words):
        parser = argparse.ArgumentParser()
        commands.add_arguments(parser)
        return commands.main(parser.parse_args(["lm-eval", str(folder), "--tasks", tasks, *words]))

    return run


def test_the_harness_scores_a_checkpoint(model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    model, tokenizer = model
    scorer = TextScorer(engine_of(model), tokenizer)
    contexts = ["The grass was", "Nobody came", "and the wind", "The year was long. The"]
    endings = [" dry", " long", " down"]
    totals = [[t for t, _ in scorer.loglikelihood([(c, e) for e in endings])] for c in contexts]
    gold = [1, 0, 2, 1]
    accuracy = sum(row.index(max(row)) == g for row, g in zip(totals, gold, strict=True)) / 4
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"c": c, "e": endings, "g": g}) + "\n" for c, g in zip(contexts, gold, strict=True))
    )
    said = scorer.generate(contexts, stops=["."], max_new_tokens=8)
    written = tmp_path / "written.jsonl"
    written.write_text(
        "".join(json.dumps({"c": c, "a": a}) + "\n" for c, a in zip(contexts, [*said[:3], "x"], strict=True))
    )
    folder = tmp_path / "tasks"
    folder.mkdir()
    common = "dataset_path: json\ntest_split: test\ndoc_to_text: '{{c}}'\ntarget_delimiter: ''\n"
    (folder / "choice.yaml").write_text(
        f"task: tiny_choice\n{common}dataset_kwargs: {{data_files: {{test: {data}}}}}\noutput_type: multiple_choice\n"
        "doc_to_choice: e\ndoc_to_target: g\nmetric_list: [{metric: acc}]\n"
    )
    (folder / "written.yaml").write_text(
        f"task: tiny_written\n{common}dataset_kwargs: {{data_files: {{test: {written}}}}}\n"
        "output_type: generate_until\ndoc_to_target: a\ngeneration_kwargs: {until: ['.'], max_gen_toks: 8}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    (folder / "rolling.yaml").write_text(
        f"task: tiny_rolling\n{common.replace('{{c}}', '')}dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "output_type: loglikelihood_rolling\ndoc_to_target: '{{c}}'\nmetric_list: [{metric: bits_per_byte}]\n"
    )
    run = harness_on(model, tokenizer, tmp_path, monkeypatch)
    words = ["--include-path", str(folder), "--batch", "3"]
    assert run("tiny_choice,tiny_written,tiny_rolling", *words) == 0
    results = json.loads((tmp_path / "eval" / "lm-eval.json").read_text())["results"]
    assert results["tiny_choice"]["acc,none"] == accuracy
    assert results["tiny_written"]["exact_match,none"] == 0.75
    nats = sum(scorer.loglikelihood_of_texts(contexts))
    size = sum(len(c.encode()) for c in contexts)
    assert results["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(-nats / size / 0.6931471805599453, rel=1e-5)
    assert "tiny_choice" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="knows no task no_such_task"):
        run("no_such_task", *words)


def test_what_a_task_lacks_is_named():
    from pretrain.evaluation.lm_eval_adapter import missing_parts

    with pytest.raises(RecipeError, match=r"package is missing \(Please install words\): pip install"), missing_parts():
        raise ImportError("Please install words\nor else")
    with pytest.raises(RecipeError, match="NLTK_DATA"), missing_parts():
        raise LookupError("\n  Resource punkt_tab not found.\n  >>> import nltk")
    with pytest.raises(KeyError), missing_parts():
        raise KeyError("a mistake of ours")


def test_the_harness_reads_files_in_place_of_the_network(tmp_path):
    pytest.importorskip("lm_eval")
    import datasets
    import requests

    from pretrain.evaluation.lm_eval_adapter import offline_sources

    essays, squad = tmp_path / "essays.txt", tmp_path / "squad.json"
    essays.write_text(TEXT)
    squad.write_text('{"data": []}')
    before = datasets.load_dataset, requests.get
    with offline_sources(essays, squad, None):
        assert datasets.load_dataset("baber/paul_graham_essays", split="train")["text"] == [TEXT]
        response = requests.get("https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json", timeout=1)
        response.raise_for_status()
        assert response.json() == {"data": []}
    assert (datasets.load_dataset, requests.get) == before


@pytest.fixture
def ruler(monkeypatch, tmp_path):
    """What the harness's RULER tasks import and read, without their packages of words and sentences."""
    pytest.importorskip("lm_eval")
    nltk = pytest.importorskip("nltk")
    words = [a + b + c for a in "bdfgklmn" for b in ("a", "e", "ou") for c in ("ck", "d", "ll", "n", "st")]
    kinds = {"nouns": words, "adjectives": words, "verbs": words, "noun": words, "adjective": words, "verb": words}
    fake = types.SimpleNamespace(RandomWord=lambda: types.SimpleNamespace(_categories=kinds))
    (tmp_path / "tokenizers" / "punkt_tab").mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setitem(sys.modules, "wonderwords", fake)
    loaded = {name: module for name, module in sys.modules.items() if name.startswith("lm_eval.tasks.ruler.")}
    for name in loaded:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ruler.")]:
        del sys.modules[name]
    sys.modules.update(loaded)


@pytest.mark.parametrize(
    ("module", "task", "maker"),
    [
        ("niah_utils", "niah_multikey_3", "generate_samples"),
        ("vt_utils", "get_vt_dataset", "sys_vartrack_w_noise_random"),
        ("cwe_utils", "get_cw_dataset", "sys_word_pair_random"),
        ("fwe_utils", "fwe_download", "sys_kwext"),
        ("qa_utils", "get_squad", "generate_samples"),
    ],
)
def test_a_limit_makes_the_first_samples_of_each_ruler_length(ruler, tmp_path, monkeypatch, module, task, maker):
    from pretrain.evaluation.lm_eval_adapter import offline_sources, tokenizer_folder
    from pretrain.evaluation.lm_eval_ruler import samples_by_length

    module = importlib.import_module(f"lm_eval.tasks.ruler.{module}")
    # Of the module's own words: ruler_vt asks on without end where its worked example takes more than 500 tokens.
    (tmp_path / "tokenizer.json").write_text(train_bpe([inspect.getsource(module)], 900))
    (tmp_path / "hf").mkdir()
    folder = tokenizer_folder(Tokenizer(tmp_path / "tokenizer.json"), tmp_path / "hf")
    squad = tmp_path / "squad.json"
    asked = [{"question": f"Who came {i}?", "answers": [{"text": "Nobody"}], "is_impossible": False} for i in range(9)]
    paragraphs = [{"context": f"{i}. {TEXT}", "qas": asked} for i in range(7)]  # all of them fit into either length
    squad.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    spy = unittest.mock.Mock(wraps=getattr(module, maker))
    monkeypatch.setattr(module, maker, spy)
    with offline_sources(None, squad, None):
        few = samples_by_length(getattr(module, task), {"tokenizer": folder, "max_seq_lengths": [1536, 2048]}, 2)
        assert max(call.kwargs["num_samples"] for call in spy.call_args_list) == 2
        more = samples_by_length(getattr(module, task), {"tokenizer": folder, "max_seq_lengths": [2048]}, 4)
    assert {length: len(part) for length, part in few.items()} == {1536: 2, 2048: 2}
    assert {row["max_length"] for row in few[1536]} == {1536} and max(row["length"] for row in few[1536]) <= 1536 + 50
    assert len(more[2048]) == 4 and list(few[2048]) == list(more[2048])[:2]
    assert few[2048][0] != few[2048][1]


def test_the_harness_reports_each_ruler_length(ruler, model, tmp_path, monkeypatch):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"c": "The", "a": "x"}) + "\n" for _ in range(5)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "other.yaml").write_text(
        f"task: tiny_other\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "doc_to_text: '{{c}}'\ndoc_to_target: a\noutput_type: generate_until\ngeneration_kwargs: {max_gen_toks: 2}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    run = harness_on(*model, tmp_path, monkeypatch)
    words = ["--lengths", "1k,2k", "--limit", "2", "--include-path", str(tmp_path / "tasks")]
    assert run("niah_single_1,ruler_cwe,tiny_other", *words) == 0
    value = json.loads((tmp_path / "eval" / "lm-eval.json").read_text())
    scores = {task: row.get("2048,none") for task, row in value["results"].items()}
    assert value["lengths"] == {
        "niah_single_1": {
            "1024": {"score": value["results"]["niah_single_1"]["1024,none"], "samples": 2},
            "2048": {"score": scores["niah_single_1"], "samples": 2},
        },
        # Its shortest list of words, 60 of them, takes more than 1024 of these tokens.
        "ruler_cwe": {
            "1024": {"score": None, "samples": 0},
            "2048": {"score": scores["ruler_cwe"], "samples": 2},
        },
    }
    counts = {task: sizes["effective"] for task, sizes in value["n-samples"].items()}
    assert counts == {"niah_single_1": 4, "ruler_cwe": 2, "tiny_other": 2}
    with pytest.raises(RecipeError, match="ruler_cwe fits no sample into --lengths 1024"):
        run("ruler_cwe", "--lengths", "1k")
