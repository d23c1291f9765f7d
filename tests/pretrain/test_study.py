"""`hsa study`: what is refused before anything starts, the table, and a study end to end."""

import argparse
import json

import pytest
import yaml

from pretrain import study, study_losses
from pretrain.errors import RecipeError
from pretrain.signals import STOPPED
from pretrain.study import load_study, table

# Every item that the study of the method has to measure, by a word in the names of its variants.
ITEMS = "window top-k-eval top-k- no-warmup self-copy noise synthetic bypass rope groups ratio recency".split()

COMMON = {"tokens": 1, "loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "step_seconds": 0.1, "data_wait_seconds": 0.0}


def write(folder, base, variants, **more):
    path = folder / "study.yaml"
    evaluations = {"needles": "niah {run} --lengths 1x --samples 2 --depths 2", "text": "ppl {run} --lengths 1x"}
    content = {"name": "tiny", "base": str(base), "evaluations": evaluations, "variants": variants, **more}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("name", ["cpu", "h100"])
def test_shipped_studies_cover_every_item(name):
    study = load_study(name)
    names = [variant.name for variant in study.variants]
    assert names[0] == "baseline" and all(any(item in n for n in names) for item in ITEMS)
    assert sum(variant.name.startswith("window") for variant in study.variants) == 3
    assert sum(variant.of == "baseline" for variant in study.variants) >= 3
    assert all(variant.about for variant in study.variants)


def test_both_shipped_studies_ask_the_same():
    def asked(name):  # one study leaves out what the other's baseline has not; some have second seeds
        names = (variant.name.removeprefix("no-").removesuffix("-seed-1") for variant in load_study(name).variants)
        return {name for name in names if not name.startswith(own)}

    # What the two sizes cannot share.
    own = ("ratio", "groups", "top-k", "baseline", "frequent", "temperature", "chunk", "retrieval", "evidence")
    assert asked("cpu") == asked("h100")


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ([], "each needs a name of its own"),
        ([{"name": "a"}, {"name": "a"}], "each needs a name of its own"),
        ([{"name": "a", "override": ["seed=1"]}], r"unknown key 'variants\[0\].override', did you mean 'overrides'"),
        ([{"name": "a", "overrides": ["stages.third.window=8"]}], "variant a: .*no entry 'third'"),
        ([{"name": "a"}, {"name": "b", "of": "c"}], "variant b: no variant 'c' in study tiny: there are a, b"),
        ([{"name": "a"}, {"name": "b", "of": "a", "overrides": ["seed=1"]}], "variant b: `of` names a variant"),
    ],
)
def test_refused(tmp_path, tiny_recipe, variants, message):
    with pytest.raises(RecipeError, match=message):
        load_study(str(write(tmp_path, tiny_recipe, variants)))


def test_a_study_that_is_not_there():
    with pytest.raises(RecipeError, match="no study 'gpu'.*the studies shipped are cpu, full-attention, h100"):
        load_study("gpu")


def test_the_table_leaves_open_what_is_not_measured():
    cell = {"n": 20, "correct": 15, "accuracy": 0.75, "low": 0.531, "high": 0.888}
    loss = {"loss": {"512": {"nll": 3.25, "low": 3.2, "high": 3.3}}}
    rows = [
        {
            "name": "a",
            "about": "as it is",
            "tokens_per_second": 8250.4,
            "needles": {"niah_single": {"512": cell}},
            "text": loss,
        },
        {"name": "b", "about": "", "needles": {"niah_single": {"32768": cell}}},
        {"name": "c", "about": ""},
    ]
    assert table(rows, ["needles", "text"]).splitlines() == [
        "| variant | what | needles niah_single 512 | needles niah_single 32k | text loss 512 | tokens/s |",
        "| --- | --- | --- | --- | --- | --- |",
        "| a | as it is | 75 [53-89] |  | 3.250 ± 0.050 | 8,250 |",
        "| b |  |  | 75 [53-89] |  |  |",
        "| c |  |  |  |  |  |",
    ]


def test_losses_are_compared_over_the_steps_that_all_variants_have(tmp_path):
    """The longer log's further steps, a step in another stage and a domain of one variant alone do not count."""

    def log(name, records):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({**COMMON, **record}) + "\n" for record in records))
        return path

    stage = ["short"] * 500 + ["long"] * 6
    whole = [{"step": i + 1, "stage": stage[i], "loss/text": float(i), "loss/copy": 1.0} for i in range(506)]
    part = [{**r, "loss/text": r["loss/text"] + 0.5} for r in whole[:503]]
    for record in part:
        del record["loss/copy"]
    part[502] = {**part[502], "stage": "other"}
    logs = {"whole": log("whole", whole), "part": log("part", part)}
    rows = study_losses.compare(logs)
    assert [(row["stage"], row["variant"], row["steps"]) for row in rows] == [
        ("short", "whole", [101, 500]),
        ("short", "part", [101, 500]),
        ("long", "whole", [501, 502]),
        ("long", "part", [501, 502]),
    ]
    assert [row["losses"] for row in rows] == [{"text": 299.5}, {"text": 300.0}, {"text": 500.5}, {"text": 501.0}]
    assert study_losses.table(rows).splitlines()[-2:] == ["| whole | 500.500 |", "| part | 501.000 |"]
    assert study_losses.compare({"whole": logs["whole"]}) == []


def test_what_a_stop_left_out_is_named(monkeypatch, capsys, tmp_path, tiny_recipe):
    """A stop while the last running variant still finishes leaves no failure behind, only variants not begun."""
    path = write(tmp_path, tiny_recipe, [{"name": "a"}, {"name": "b"}])
    monkeypatch.setattr(study, "run_all", lambda names, run, **options: {"a": 0})
    parser = argparse.ArgumentParser()
    study.add_arguments(parser)
    assert study.main(parser.parse_args([str(path), "--out", str(tmp_path / "out")])) == STOPPED
    assert "stopped before the end of b; the same command goes on" in capsys.readouterr().out


@pytest.mark.slow
def test_end_to_end(hsa, tmp_path, tiny_recipe):
    """One variant is trained, one asks it otherwise, one fails and stops nobody; a second call trains nothing."""
    variants = [
        {"name": "broken", "overrides": [f"data.tokenizer={tmp_path}/none.json"]},
        {"name": "plain"},
        {"name": "wide", "of": "plain", "evaluate": "--top-k 8"},
        {"name": "later", "overrides": ["seed=2"]},
    ]
    path, out = write(tmp_path, tiny_recipe, variants, overrides=["seed=1"]), tmp_path / "out"
    early = hsa("study", path, "--out", out, "--only", "wide")
    assert early.returncode == 1 and "plain is not trained yet: run that variant first" in early.stdout
    done = hsa("study", path, "--out", out, "--only", "broken", "wide", "plain", "--jobs", "2")
    assert done.returncode == 1 and "1 of 3 variants failed: broken" in done.stderr, done.stdout + done.stderr
    assert "none.json" in (out / "logs" / "broken.log").read_text()
    rows = {row["name"]: row for row in json.loads((out / "study.json").read_text())["variants"]}
    for name in ("plain", "wide"):
        assert rows[name]["needles"]["niah_single"]["128"]["n"] == 4 and rows[name]["tokens"] == 4352
        assert 0 < rows[name]["text"]["loss"]["128"]["nll"] < 7 and rows[name]["tokens_per_second"] > 0
    assert json.loads((out / "wide" / "eval" / "needles.json").read_text())["model"]["settings"] == {"top_k": 8}
    assert not rows["broken"]["trained"] and not rows["later"]["trained"]
    assert "| plain | " in (out / "study.md").read_text() and "| later |  |  |  |  |" in (out / "study.md").read_text()
    assert json.loads((out / "study.json").read_text())["training_losses"] == []  # only one was trained
    again = hsa("study", path, "--out", out, "--only", "plain", "wide")
    assert again.returncode == 0 and "hsa train" not in again.stdout and "hsa eval" not in again.stdout
    none = hsa("study", path, "--out", out, "--jobs", "0")
    assert none.returncode == 2 and "--jobs must be at least 1, not 0" in none.stderr
    collected = hsa("study", path, "--out", out, "--table")
    assert collected.returncode == 0 and "| wide | " in collected.stdout
