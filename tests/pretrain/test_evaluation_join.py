"""``hsa eval join``: counts add up, trainings stay apart, and what was not asked alike is refused."""

import json
from dataclasses import replace

import pytest

from pretrain import cli
from pretrain.evaluation.retrieval import Cell, TaskResult
from pretrain.evaluation.shared import together
from pretrain.evaluation.tally import Tally

LENGTHS, DEPTHS = (64, 256), (0.0, 1.0)


def result(task, rights, depths=DEPTHS):
    """Ten questions per cell, of which ``rights`` are right, in order of length and depth."""
    places = [(n, depth) for n in LENGTHS for depth in depths]
    cells = [Cell(n, d, None, Tally(10, c, 30, 3 * c)) for (n, d), c in zip(places, rights, strict=True)]
    return TaskResult(task, "eval", 0, 10, cells, 128, dict.fromkeys(LENGTHS, 1.0), 1)


def head(kind, run, **settings):
    model = {"name": "toy", "step": 1200, "stage": "long", "run_dir": f"/runs/{run}", "training_context": 64}
    return {"evaluation": kind, "model": {**model, "window": 8, "settings": {"top_k": 4, **settings}}, "seconds": 1.0}


@pytest.fixture
def saved(tmp_path):
    """Files as `hsa eval` leaves them: two of niah with two kinds, two of ruler."""

    def save(name, value):
        path = tmp_path / name
        path.write_text(json.dumps(value))
        return path

    def niah(run, number, uuid, **settings):
        kinds = {"number": result("niah_single", number), "uuid": result("niah_single", uuid)}
        whole = together(list(kinds.values()), "niah_single")
        values = {kind: one.to_json() for kind, one in kinds.items()}
        return save(f"{run}.json", {**head("niah", run, **settings), **whole.to_json(), "values": values})

    def ruler(run, rights, task="variable_tracking", **settings):
        tasks = {task: result(task, rights, depths=(None,)).to_json()}
        return save(f"{run}-ruler.json", {**head("ruler", run, **settings), "tasks": tasks})

    return niah, ruler


def run(capsys, tmp_path, *arguments):
    status = cli.main(["eval", "join", *map(str, arguments), "--out", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    return status, out, err


def test_needles_of_two_trainings(saved, tmp_path, capsys):
    niah, _ = saved
    files = niah("seed0", (10, 10, 10, 7), (9, 10, 5, 5)), niah("seed1", (10, 10, 9, 8), (10, 10, 6, 4))
    status, out, _ = run(capsys, tmp_path, *files)
    assert status == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == "toy · step 1,200 (long) · 2 trainings".split()
    assert ["number", "seed0", "20", "100.0", "85.0"] in rows
    assert ["seed1", "20", "100.0", "85.0"] in rows
    assert ["all", "40", "100.0", "85.0"] in rows
    assert ["uuid", "seed0", "20", "95.0", "50.0"] in rows
    assert ["together", "seed0", "40", "97.5", "67.5"] in rows
    assert ["all", "80", "98.8", "67.5"] in rows
    assert "repeated at 256" in out
    value = json.loads((tmp_path / "out" / "niah.json").read_text())
    far = value["tasks"]["uuid"]["lengths"][1]
    assert (far["length"], far["correct"], far["n"]) == (256, 20, 40)
    assert far["each"]["seed1"]["correct"] == 10 and far["low"] < 0.5 < far["high"]
    assert (tmp_path / "out" / "niah.png").read_bytes().startswith(b"\x89PNG")


def test_tasks_of_three_trainings_whose_folders_have_one_name(saved, tmp_path, capsys):
    _, ruler = saved
    files = [ruler(f"seed{i}", rights) for i, rights in enumerate(((10, 9), (10, 7), (8, 5)))]
    for path in files:  # the same folder name on three machines
        value = json.loads(path.read_text())
        value["model"]["run_dir"] = f"/{path.stem}/run"
        path.write_text(json.dumps(value))
    status, out, _ = run(capsys, tmp_path, *files, "--name", "chains")
    assert status == 0 and "variable_tracking" in out
    assert all(str(path) in out for path in files)
    assert ["all", "30", "93.3", "70.0"] in [line.split() for line in out.splitlines()]
    assert (tmp_path / "out" / "chains.png").exists() and (tmp_path / "out" / "chains.json").exists()


def test_a_trainings_lengths_in_several_files(saved, tmp_path, capsys):
    """Long ones first or last, of two trainings whose folders have one name; a picture and a table of all lengths."""
    niah, _ = saved
    files = []
    for seed, rights in enumerate(((10, 10, 10, 7), (10, 8, 9, 8))):
        whole = json.loads(niah(f"seed{seed}", rights, rights).read_text())
        whole["model"]["run_dir"] = "/runs/same"
        for length in LENGTHS if seed else LENGTHS[::-1]:
            part = json.loads(json.dumps(whole))
            for one in (part, *part["values"].values()):
                for key in ("cells", "lengths"):
                    one[key] = [each for each in one[key] if each["length"] == length]
            files.append(tmp_path / f"seed{seed}-{length}.json")
            files[-1].write_text(json.dumps(part))
    status, out, _ = run(capsys, tmp_path, *files)
    assert status == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[0][-2:] == ["2", "trainings"] and rows[1][-2:] != rows[2][-2:]
    assert ["task", "training", "n", "64", "256"] in rows
    assert ["number", str(files[0]), "20", "100.0", "85.0"] in rows
    assert [str(files[2]), "20", "90.0", "85.0"] in rows
    value = json.loads((tmp_path / "out" / "niah.json").read_text())
    assert list(value["results"].values()) == [[*map(str, files[:2])], [*map(str, files[2:])]]
    status, out, _ = run(capsys, tmp_path, *files[:2])
    rows = [line.split() for line in out.splitlines()]
    assert status == 0 and "trainings" not in rows[0] and not any("all" in row for row in rows)
    assert ["number", "same", "20", "100.0", "85.0"] in rows
    status, out, err = run(capsys, tmp_path, *files[:3])
    assert status == 2 and not out and "differ in the grid of lengths and depths" in err


def test_another_evaluation_is_not_the_same_ones_further_lengths(saved, tmp_path, capsys):
    _, ruler = saved
    first = ruler("seed0", (10, 9), task="niah_single")
    other = result("niah_single", (10, 9), depths=(None,)).to_json()
    for one in (*other["cells"], *other["lengths"]):
        one["length"] *= 16
    second = tmp_path / "niah.json"
    second.write_text(json.dumps({**head("niah", "seed0"), **other}))
    status, out, err = run(capsys, tmp_path, first, second)
    assert status == 2 and not out and "differ in the evaluation" in err


def test_what_was_not_asked_alike_is_not_joined(saved, tmp_path, capsys):
    niah, ruler = saved
    first = niah("seed0", (10, 10, 10, 7), (9, 10, 5, 5))
    other = {
        "settings": niah("seed1", (10, 10, 10, 7), (9, 10, 5, 5), top_k=8),
        "the evaluation": ruler("seed2", (10, 9)),
    }
    value = json.loads(first.read_text())
    for cell in (cell for one in value["values"].values() for cell in one["cells"]):
        cell["length"] *= 2
    other["the grid of lengths and depths"] = tmp_path / "longer.json"
    other["the grid of lengths and depths"].write_text(json.dumps(value))
    for what, path in other.items():
        status, out, err = run(capsys, tmp_path, first, path)
        assert status == 2 and not out, what
        assert f"differ in {what}" in err and str(path) in err
    status, _, err = run(capsys, tmp_path, ruler("a", (9, 9)), ruler("b", (9, 9), task="niah_multikey"))
    assert status == 2 and "differ in tasks or values" in err
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_joined(saved, tmp_path, capsys):
    niah, _ = saved
    first = niah("seed0", (10, 10, 10, 7), (9, 10, 5, 5))
    foreign = tmp_path / "run.json"
    foreign.write_text("[1, 2]")
    perplexity = tmp_path / "ppl.json"
    perplexity.write_text(json.dumps({**head("ppl", "seed0"), "contexts": []}))
    for arguments, message in (
        ((first,), "two results at least"),
        ((first, first), "given twice"),
        ((first, tmp_path / "none.json"), "none.json"),
        ((first, foreign), "run.json is no result of hsa eval niah or ruler"),
        ((first, perplexity), "ppl.json is of hsa eval ppl"),
    ):
        status, out, err = run(capsys, tmp_path, *arguments)
        assert status == 2 and not out and message in err, arguments
        assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_one_kind_of_needle_makes_no_row_for_all_kinds(tmp_path, capsys):
    files = []
    for seed in range(2):
        one = replace(result("niah_single", (10, 9, 8, 7)), seed=seed)
        path = tmp_path / f"{seed}.json"
        path.write_text(json.dumps({**head("niah", f"seed{seed}"), **one.to_json()}))
        files.append(path)
    status, out, _ = run(capsys, tmp_path, *files)
    assert status == 0 and "niah_single" in out and "together" not in out
