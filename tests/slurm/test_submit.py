"""`hsa submit` as typed, without a cluster: what it prints, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pretrain.cli import main
from pretrain.recipe import load_recipe
from pretrain.run_dir import RunDir
from slurm.errors import SlurmError
from slurm.jobs import Chain, Job, jobs_file, queue_states, read_chains, record_chain


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty directory, with no Slurm on PATH."""
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    return tmp_path


def program(folder: Path, name: str, text: str) -> None:
    (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / "bin" / name).chmod(0o755)


def test_dry_run_needs_neither_data_nor_slurm(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "8b-a1b", "slurm.partition=h100", "--run-dir", "/scratch/8b", "--dry-run"]) == 0
    printed = capsys.readouterr()
    for expected in (
        "#SBATCH --requeue\n",
        "#SBATCH --signal=B:USR1@300\n",
        "#SBATCH --partition=h100\n",
        "train 8b-a1b slurm.partition=h100 --run-dir",
        "job1=$(sbatch --parsable /scratch/8b/slurm/01-warmup.sbatch)\n",
        "job4=$(sbatch --parsable --dependency=afterok:$job3 --kill-on-invalid-dep=yes /scratch/8b/slurm/04-",
    ):
        assert expected in printed.out
    assert printed.out.count("exec srun") == 4
    assert printed.err == ""
    assert os.listdir(folder) == ["bin"], "a dry run writes nothing"


def test_dry_run_warns_of_ranks_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "8b-a1b", "slurm.nodes=3", "--dry-run"]) == 0
    assert 'warning: stage "warmup" on 3 nodes x 8 ranks' in capsys.readouterr().err


def test_ranks_that_do_not_fit_are_not_submitted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program(folder, "sbatch", "touch submitted; echo 41")
    assert main(["submit", "8b-a1b", "slurm.nodes=3"]) == 2
    assert "data.lanes=256" in capsys.readouterr().err
    assert not (folder / "submitted").exists()


def test_missing_slurm_is_one_message(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "8b-a1b"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("hsa: error: sbatch is not on PATH: call `hsa submit` on a login node")
    assert os.listdir(folder) == ["bin"]


def test_chain_is_recorded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = folder / "count"
    program(folder, "sbatch", f'echo "$@" >>{count}; echo "$((40 + $(/usr/bin/wc -l <{count})));cluster"')
    program(folder, "scancel", "exit 1")
    assert main(["submit", "8b-a1b"]) == 0
    (chain,) = read_chains(Path("runs/hsa-ul-8b-a1b"))
    assert [(job.stage, job.job_id) for job in chain.jobs] == [
        ("warmup", 41),
        ("pretrain", 42),
        ("long", 43),
        ("anneal", 44),
    ]
    dependencies = [line.split()[1] for line in count.read_text().splitlines()]
    assert dependencies[1:] == [f"--dependency=afterok:{number}" for number in (41, 42, 43)]
    assert "job 44  anneal" in capsys.readouterr().out
    assert all(Path(job.script).read_text().startswith("#!/bin/bash\n") for job in chain.jobs)


@pytest.mark.parametrize(
    ("scancel", "consequence"),
    [
        ('echo "$@" >cancelled', "the stages submitted before it (jobs 40, 41) were cancelled"),
        ("exit 1", "cancelling the stages before it failed too: call `scancel 40 41`"),
    ],
)
def test_refusal_half_way_cancels_the_chain(
    folder: Path, capsys: pytest.CaptureFixture[str], scancel: str, consequence: str
) -> None:
    program(
        folder,
        "sbatch",
        'case "$*" in *long*) echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1;; *warmup*) echo 40;; '
        "*) echo 41;; esac",
    )
    program(folder, "scancel", scancel)
    assert main(["submit", "8b-a1b"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert 'sbatch refused stage "long" of hsa-ul-8b-a1b: sbatch: error: QOSMaxSubmitJobPerUserLimit' in message
    assert consequence in message
    assert not Path("runs").exists(), "scripts and folders made for the chain are gone"


def test_refusal_keeps_what_was_there_before(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program(folder, "sbatch", "exit 1")
    program(folder, "scancel", "exit 0")
    run_dir = Path("run")
    script = run_dir / "slurm/01-warmup.sbatch"
    script.parent.mkdir(parents=True)
    script.write_text("the script of an earlier chain")
    assert main(["submit", "8b-a1b", "--run-dir", "run"]) == 2
    assert "keeps this host from the cluster; nothing was submitted" in capsys.readouterr().err
    assert [path.name for path in script.parent.iterdir()] == ["01-warmup.sbatch"]
    assert script.read_text() == "the script of an earlier chain"


def test_run_directory_in_the_way_is_one_message(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program(folder, "sbatch", "echo 1")
    program(folder, "scancel", "exit 0")
    Path("run").write_text("a file")
    assert main(["submit", "8b-a1b", "--run-dir", "run"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"{folder}/run is a file" in message


def test_foreign_directory_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program(folder, "sbatch", "touch submitted; echo 1")
    program(folder, "scancel", "exit 0")
    (folder / "run").mkdir()
    (folder / "run/thesis.tex").touch()
    assert main(["submit", "8b-a1b", "--run-dir", "run"]) == 2
    assert "is not empty and not a run directory" in capsys.readouterr().err
    assert os.listdir("run") == ["thesis.tex"]
    assert not (folder / "submitted").exists()


def test_changed_recipe_of_a_started_run_is_refused_before_the_queue(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program(folder, "sbatch", "touch submitted; echo 1")
    program(folder, "scancel", "exit 0")
    run_dir = RunDir("run")
    run_dir.create()
    run_dir.begin(load_recipe("8b-a1b").frozen, name="8b", plan={})
    assert main(["submit", "8b-a1b", "seed=5", "slurm.nodes=16", "--run-dir", "run"]) == 2
    assert "seed: 0 -> 5" in capsys.readouterr().err
    assert not (folder / "submitted").exists()

    assert main(["submit", "8b-a1b", "seed=5", "--run-dir", "run", "--allow-change", "seed"]) == 0
    script = Path("run/slurm/01-warmup.sbatch").read_text()
    assert "--allow-change seed" in script


def test_jobs_file_keeps_every_chain(tmp_path: Path) -> None:
    jobs_file(tmp_path).parent.mkdir()
    assert read_chains(tmp_path) == []
    record_chain(tmp_path, [Job("warmup", 1, "a.sbatch")])
    record_chain(tmp_path, [Job("warmup", 2, "a.sbatch"), Job("pretrain", 3, "b.sbatch")])
    assert [[job.job_id for job in chain.jobs] for chain in read_chains(tmp_path)] == [[1], [2, 3]]
    assert isinstance(read_chains(tmp_path)[0], Chain)
    assert [path.name for path in jobs_file(tmp_path).parent.iterdir()] == ["jobs.json"]


@pytest.mark.parametrize("content", ["[", '{"jobs": 3}', json.dumps([{"submitted": "now", "jobs": [{"id": 3}]}])])
def test_damaged_jobs_file_is_named(tmp_path: Path, content: str) -> None:
    jobs_file(tmp_path).parent.mkdir()
    jobs_file(tmp_path).write_text(content)
    with pytest.raises(SlurmError, match=r"cannot read .*jobs\.json"):
        read_chains(tmp_path)


def test_queue_states(folder: Path) -> None:
    assert queue_states([1, 2]) == {}, "no Slurm, no states"
    program(folder, "squeue", "printf '1|RUNNING|None\\n2|PENDING|Dependency\\n'")
    assert queue_states([2, 1, 3]) == {1: "RUNNING", 2: "PENDING (Dependency)"}
    assert queue_states([]) == {}
