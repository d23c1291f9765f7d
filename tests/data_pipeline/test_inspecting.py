"""Trees, pictures and epochs of shards and recipes; the benchmark runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from data_pipeline import bench, commands, inspecting
from data_pipeline.errors import DataError
from data_pipeline.inspecting import inspect_recipe
from data_pipeline.shards import ShardSet


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    commands.add_arguments(parser)
    return commands.main(parser.parse_args(arguments))


RECIPE = """
data:
  tokenizer: {path}
  lanes: 4
  mix:
    - {{name: tales, path: {path}, weight: 3}}
    - {{name: notes, path: {path}, weight: 1, max_epochs: 2}}
  mixes:
    long:
      - {{name: long tales, path: {path}, domain: tales, min_length: 200}}
stages:
  - {{name: warm, until: {{metric: x, max_tokens: 10e3}}}}
  - {{name: main, until: {{tokens: 90e3}}}}
  - {{name: long, data: {{mix: long}}, until: {{tokens: 50e3}}}}
"""


def test_a_recipes_mixes_with_shares_and_epochs(shards: Path, tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(path=shards))
    summary = inspect_recipe(recipe)
    default, long = summary["mixes"]
    assert default["tokens"] == 100e3 and default["stages"] == ["warm", "main"] and long["tokens"] == 50e3
    notes = ShardSet(shards).domain("notes")
    assert [d["share"] for d in default["domains"]] == [0.75, 0.25]
    assert default["domains"][1]["epochs"] == pytest.approx(25e3 / notes.tokens)
    assert long["domains"][0]["length_quantiles"]["min"] >= 200
    assert set(summary["epochs"]) == {"tales", "notes", "long tales"}
    picture = tmp_path / "mix.png"
    assert run("inspect", str(recipe), "--picture", str(picture)) == 0
    text = capsys.readouterr().out
    assert "├─ default mix  warm, main: 100,000 tokens" in text and "documents of 200+ tokens" in text
    assert "at most 2 (reached" in text and "epochs over all stages: tales" in text
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert run("inspect", str(recipe), "--json") == 0
    assert json.loads(capsys.readouterr().out)["lanes"] == 4
    recipe.write_text("stages: []\n")
    with pytest.raises(DataError, match="has no readable data part"):
        inspect_recipe(recipe)


def test_a_picture_of_shards(shards: Path, tmp_path: Path, capsys) -> None:
    assert run("inspect", str(shards), "--picture", str(tmp_path / "s.png")) == 0
    assert "left out   1 empty; see quarantine.jsonl" in capsys.readouterr().out
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(DataError, match="cannot write the picture"):
        run("inspect", str(shards), "--picture", str(tmp_path / "none" / "s.png"))


@pytest.mark.parametrize("name", ["demo", "8b-a1b"])
def test_a_shipped_recipe_by_name_without_its_data(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Shares and tokens are shown all the same, and one sentence says what is missing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HSA_DATA", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"is not complete, missing: .*make shards with `hsa data tokenize") as error:
        run("inspect", name)
    text = capsys.readouterr().out
    assert "default mix" in text and "books" in text and "not there" in text and "%" in text
    for path in {line.split(" from ")[1].removesuffix(", not there") for line in text.splitlines() if " from " in line}:
        assert path in str(error.value)


def test_a_shipped_recipe_by_name_with_its_data(shards: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """A folder called like a recipe is the folder."""
    manifest = json.loads((shards / "manifest.json").read_text())
    first = [d["name"] for d in manifest["domains"]][0]
    folder = tmp_path / "recipes"
    folder.mkdir()
    recipe = RECIPE.format(path=shards)
    (folder / "mine.yaml").write_text(recipe)
    monkeypatch.setattr(inspecting, "__file__", str(tmp_path / "data_pipeline" / "inspecting.py"))
    monkeypatch.chdir(tmp_path)
    assert run("inspect", "mine") == 0
    assert "epochs over all stages: tales" in capsys.readouterr().out
    (tmp_path / "mine").symlink_to(shards)
    assert run("inspect", "mine") == 0
    assert f"─ {first}  " in capsys.readouterr().out
    with pytest.raises(DataError, match="nothing to inspect at other: .* the recipes shipped are mine"):
        run("inspect", "other")


@pytest.mark.slow
def test_the_benchmark_prints_every_figure_with_its_baseline(tmp_path: Path, capsys) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    file = tmp_path / "data.json"
    assert bench.main(parser.parse_args(["--tokens", "2e5", "--many", "120", "--json", str(file)])) == 0
    rows = json.loads(file.read_text())["rows"]
    assert all(
        row["numpy_loop"] > 0 and row["ratio"] > 0 for row in rows if row["name"].startswith("read, context 512")
    )
    assert {row["unit"] for row in rows} >= {"M tokens/s", "s", "ms", "MB/s"}
    assert any(row["name"].startswith("120 shards") for row in rows)
    assert "numpy loop" in capsys.readouterr().out
