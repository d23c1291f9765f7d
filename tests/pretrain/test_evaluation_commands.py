"""``hsa eval`` and ``hsa generate`` with a model that is a stand-in: files, tables, streams and messages."""

import argparse
import io
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.config import DataConfig
from data_pipeline.tokenizer import Tokenizer, train_bpe
from parallel.model_config import ModelConfig
from pretrain import cli
from pretrain.errors import RecipeError, RunDirError
from pretrain.evaluation import commands, generate

TEXT = "The grass was dry and long that year. Nobody came to cut it, and the wind lay down in it. "
ANSWER = " and so on: naïve – 42.\n"


class Engine:
    """Continues every prompt with ANSWER and an end token; scores every token with 2 nats."""

    def __init__(self, tokenizer, **options):
        self.tokenizer, self.options = tokenizer, options
        self.prompts = []

    def reset(self):
        pass

    def prefill(self, tokens):
        print("a library says something on stdout")
        self.prompts.append(tokens.numpy())
        self.queue = [*self.tokenizer.encode(ANSWER), self.tokenizer.eos_id]
        return self._logits(len(tokens))

    def decode(self, tokens):
        return self._logits(len(tokens))

    def score(self, tokens, last=None):
        return torch.full((tokens.shape[0], last or tokens.shape[1] - 1), 2.0)

    def _logits(self, rows):
        logits = torch.zeros(rows, self.tokenizer.vocab_size + 5)
        logits[:, self.queue.pop(0) if self.queue else self.tokenizer.eos_id] = 1.0
        return logits


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A run directory with a checkpoint, and a loader that makes an Engine for it."""
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000040").mkdir(parents=True)
    (tmp_path / "tokenizer.json").write_text(train_bpe([TEXT], 280))
    (tmp_path / "held_out.txt").write_text(TEXT * 40)
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    stages = [
        types.SimpleNamespace(name="warmup", context=128, window=16, top_k=4),
        types.SimpleNamespace(name="long", context=256, window=32, top_k=None),
        types.SimpleNamespace(name="never", context=1 << 20, window=64, top_k=4),
    ]
    state = types.SimpleNamespace(run=run, tokenizer=tokenizer, engines=[], calls=[], tmp_path=tmp_path)

    def load_for_inference(checkpoint, *, device="auto", overrides=()):
        print("loading")
        state.calls.append((Path(checkpoint), device, tuple(overrides)))
        data = DataConfig(tokenizer="", held_out=str(tmp_path / "held_out.txt"), mix=[])

        def engine_factory(**options):
            state.engines.append(Engine(tokenizer, **options))
            return state.engines[-1]

        recipe = types.SimpleNamespace(name="tiny", stages=stages, data=data, model=ModelConfig())
        return types.SimpleNamespace(
            model=None, tokenizer=tokenizer, recipe=recipe, engine_factory=engine_factory, step=40, stage="long"
        )

    loader = types.ModuleType("pretrain.model_io")
    loader.load_for_inference = load_for_inference
    monkeypatch.setitem(sys.modules, "pretrain.model_io", loader)
    return state


def evaluate(*arguments):
    parser = argparse.ArgumentParser()
    commands.add_arguments(parser)
    return commands.main(parser.parse_args([str(a) for a in arguments]))


def continue_prompt(*arguments):
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    return generate.main(parser.parse_args([str(a) for a in arguments]))


# ----------------------------------------------------------------------------------------------------- hsa eval


def test_niah_leaves_json_and_picture_in_the_run_and_prints_a_table(world, capsys):
    arguments = ["niah", world.run, "--lengths", "1x,4x", "--depths", 3, "--samples", 2, "--top-k", "4"]
    assert evaluate(*arguments, "--full-prefill") == 0
    value = json.loads((world.run / "eval" / "niah.json").read_text())
    assert value["evaluation"] == "niah" and value["task"] == "niah_single" and value["templates"] == "train"
    assert value["model"]["training_context"] == 256  # of the stages up to the checkpoint's, not of later ones
    assert value["model"]["step"] == 40 and value["model"]["stage"] == "long"
    assert value["model"]["settings"] == {"top_k": 4, "full_prefill": True}
    assert [item["length"] for item in value["lengths"]] == [256, 1024]
    assert all(cell["n"] == 2 and cell["accuracy"] == 0 for cell in value["cells"])
    assert (world.run / "eval" / "niah.png").stat().st_size > 5000
    out, err = capsys.readouterr()
    assert "niah_single: exact answers in %" in out and str(world.run / "eval" / "niah.json") in out
    assert "niah_single at 1k: 0 of 6 exact" in err
    assert world.engines[0].options == {"top_k": 4, "full_prefill": True}


def test_what_all_chunks_cost_is_said_beyond_the_training_context(world, capsys):
    words = "stage long reads all chunks, 16 per token at 1k: --top-k 32 reads the best 32"
    for options, said in ((["1x,4x"], True), (["1x"], False), (["4x", "--top-k", "8"], False)):
        assert evaluate("niah", world.run, "--depths", 1, "--samples", 1, "--lengths", *options) == 0
        assert (words in capsys.readouterr().err) == said


def test_distance_counts_in_windows_and_files_go_where_they_are_told(world):
    folder, file = world.tmp_path / "there", world.tmp_path / "result.json"
    step = world.run / "checkpoints" / "step_00000040"
    options = ["--distance", "4w", "--samples", 2, "--out", folder, "--json", file, "--name", "far"]
    assert evaluate("niah", step, "data.held_out=x", "--lengths", "1x", *options, "--device", "cpu") == 0
    assert [cell["distance"] for cell in json.loads(file.read_text())["cells"]] == [128]
    assert (folder / "far.png").exists() and not (folder / "far.json").exists()
    assert world.calls == [(step, "cpu", ("data.held_out=x",))]
    assert commands.run_dir_of(step) == world.run.resolve()


def test_ruler_and_ppl(world, capsys):
    assert evaluate("ruler", world.run, "--lengths", "300", "--samples", 1, "--tasks", "copy,variable_tracking") == 0
    assert list(json.loads((world.run / "eval" / "ruler.json").read_text())["tasks"]) == ["copy", "variable_tracking"]
    assert evaluate("ppl", world.run, "--lengths", "128,1m") == 0
    value = json.loads((world.run / "eval" / "ppl.json").read_text())
    assert value["contexts"][0]["perplexity"] == pytest.approx(np.exp(2)) and "1048576" in value["left_out"]
    out, err = capsys.readouterr()
    assert "7.39" in out and "no unigram baseline" in err
    assert {path.name for path in (world.run / "eval").iterdir()} == {"ruler.json", "ruler.png", "ppl.json", "ppl.png"}


def test_ppl_of_the_same_tokens_behind_every_length(world, capsys):
    assert evaluate("ppl", world.run, "--lengths", "128,1x,300,1m", "--last", 50, "--samples", 3, "--name", "same") == 0
    value = json.loads((world.run / "eval" / "same.json").read_text())
    assert (value["last"], value["reference"]) == (50, 256)  # the training context
    assert [item["n"] for item in value["contexts"]] == [150] * 3 and "1048576" in value["left_out"]
    assert value["contexts"][2]["difference"]["nll"] == 0
    assert "against 256" in capsys.readouterr().out and (world.run / "eval" / "same.png").exists()
    for last, message in ((128, "--last is 128: sequences of 128 can score their last 1 to 127"), (0, "--last is 0")):
        with pytest.raises(RecipeError, match=message):
            evaluate("ppl", world.run, "--lengths", "128,1x", "--last", last)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--lengths", "4z"], "'4z' is not a length"),
        (["--lengths", "16"], "cannot evaluate niah_single at 16 tokens"),
        (["--depths", "0"], "--depths is 0"),
        (["--samples", "0"], "--samples is 0"),
        (["--top-k", "some"], "--top-k is 'some'"),
        (["--retrieval-temperature", "0"], "--retrieval-temperature is '0'"),
        (["--retrieval-temperature", "warm"], "--retrieval-temperature is 'warm'"),
        (["--distance-decay", "-1"], "--distance-decay is '-1'"),
        (["--distance-decay", "inf"], "--distance-decay is 'inf': write 0 or more"),
        (["--distance-decay", "0,0.5"], "--distance-decay: several are asked of texts that"),
        (["--retrieval-temperature", "1,0.5"], "--retrieval-temperature: several are asked of texts that"),
        (["--distance", "9k", "--lengths", "1k"], "too few for a needle 9216 tokens"),
    ],
)
def test_impossible_arguments_are_one_message(world, arguments, message):
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        evaluate("niah", world.run, *arguments)
    assert caught.value.exit_status == 2
    assert not (world.run / "eval").exists()


def test_unknown_task_and_missing_checkpoint(world):
    with pytest.raises(RecipeError, match="unknown task 'qa'"):
        evaluate("ruler", world.run, "--tasks", "qa")
    assert not world.calls  # found before the model was loaded
    for path in (world.tmp_path / "nowhere", world.tmp_path / "held_out.txt"):
        with pytest.raises(RunDirError, match=f"no checkpoint: {path}") as caught:
            evaluate("niah", path)
        assert caught.value.exit_status == 2


def test_pictures_go_to_the_tracking_store_and_its_absence_costs_a_warning(world, capsys, monkeypatch):
    sent = []

    class Store:
        def __init__(self, uri, experiment, run_id):
            self.uri = uri

        def connect(self):
            if "broken" in self.uri:
                raise ConnectionError("no route\nto host")

        def send_file(self, run, path, folder):
            sent.append((run, path.name, folder))

    monkeypatch.setattr("pretrain.mlflow_store.Store", Store)
    run = {"run_id": "ours", "mlflow": {"uri": "http://fine", "experiment": "e", "run_id": "theirs"}}
    (world.run / "run.json").write_text(json.dumps(run))
    arguments = ["niah", world.run, "--lengths", "256", "--depths", 1, "--samples", 1]
    assert evaluate(*arguments) == 0
    assert sent == [("theirs", "niah.png", "eval")] and "warning" not in capsys.readouterr().err
    for uri in ("http://broken", f"sqlite:///{world.tmp_path}/gone.db"):
        run["mlflow"]["uri"] = uri
        (world.run / "run.json").write_text(json.dumps(run))
        assert evaluate(*arguments) == 0
        assert "warning: pictures were not logged" in capsys.readouterr().err
    assert not (world.tmp_path / "gone.db").exists() and len(sent) == 1


# ------------------------------------------------------------------------------------------------- hsa generate


def test_generate_prints_the_continuation_and_nothing_else(world, capsys):
    prompt = world.tmp_path / "prompt.txt"
    prompt.write_text(TEXT * 30)  # far longer than any training context
    assert continue_prompt(world.run, "--prompt-file", prompt) == 0
    out, err = capsys.readouterr()
    assert out == ANSWER
    assert "a library says something" in err and "training context 256" in err
    (ids,) = world.engines[0].prompts
    assert ids.shape[1] > 256 and world.tokenizer.decode(ids[0]) == TEXT * 30


def test_generate_stops_at_the_number_of_tokens_and_reads_stdin(world, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Ein Gras")))
    assert continue_prompt(world.run, "--prompt-file", "-", "--max-new-tokens", 3, "--full-prefill") == 0
    assert capsys.readouterr().out == world.tokenizer.decode(world.tokenizer.encode(ANSWER)[:3])
    assert world.engines[0].options == {"full_prefill": True}


def test_scores_fall_beyond_the_longest_context_trained_so_far(world):
    evaluate("niah", world.run, "--lengths", "256", "--samples", 1, "--distance-decay", "0.5")
    evaluate("niah", world.run, "--lengths", "256", "--samples", 1)
    assert [engine.options for engine in world.engines] == [{"distance_decay": 0.5, "decay_from": 256}, {}]


def test_generate_takes_one_value_and_names_no_option_that_it_lacks(world, capsys):
    prompt = world.tmp_path / "prompt.txt"
    prompt.write_text(TEXT)
    for option, values in (("--top-k", "4,8"), ("--retrieval-temperature", "1,0.5"), ("--distance-decay", "0,1")):
        with pytest.raises(RecipeError, match=f"{option}: several are asked of texts that questions share: give one"):
            continue_prompt(world.run, "--prompt-file", prompt, option, values)
    with pytest.raises(SystemExit):
        continue_prompt("--help")
    assert "--haystacks" not in capsys.readouterr().out


def test_generate_is_greedy_unless_sampling_is_asked_for():
    def sampling(*arguments):
        parser = argparse.ArgumentParser()
        generate.add_arguments(parser)
        return generate.sampling_of(parser.parse_args(["x", "--prompt-file", "-", *arguments]))

    assert sampling().temperature == 0
    assert sampling("--top-p", "0.9").temperature == 1
    assert sampling("--top-k-sampling", "5").top_k == 5
    assert sampling("--temperature", "0.7", "--top-p", "0.9", "--seed", "3").temperature == 0.7
    with pytest.raises(RecipeError, match="--top-p is 2"):
        sampling("--top-p", "2")


@pytest.mark.parametrize(
    "content,message",
    [(b"", "is empty"), (b" \n", "is empty"), (b"caf\xe9", "not UTF-8"), (None, "cannot read")],
)
def test_prompts_that_are_none(world, content, message):
    prompt = world.tmp_path / "prompt.txt"
    if content is not None:
        prompt.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        continue_prompt(world.run, "--prompt-file", prompt)
    assert caught.value.exit_status == 2 and not world.calls
    with pytest.raises(RecipeError, match="--max-new-tokens is 0"):
        continue_prompt(world.run, "--prompt-file", prompt, "--max-new-tokens", 0)


def test_the_command_line_says_one_line_and_returns_2(world, capsys):
    assert cli.main(["generate", str(world.run), "--prompt-file", "/no/file"]) == 2
    assert cli.main(["eval", "niah", str(world.tmp_path / "nowhere"), "--lengths", "4k"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and [line[:11] for line in err.splitlines()] == ["hsa: error:"] * 2


def test_stdout_is_kept_clean_below_python_too():
    program = """
import os, sys
from pretrain.evaluation.streams import only_writer_to_stdout
with only_writer_to_stdout() as out:
    print("noise"); os.write(1, b"low noise\\n"); out.write("text é"); out.flush()
print("after")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=300)
    assert done.stdout.decode() == "text éafter\n"
    assert "noise" in done.stderr.decode() and "low noise" in done.stderr.decode()
