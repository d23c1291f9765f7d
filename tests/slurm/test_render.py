"""The rendered scripts, word for word. After a wanted change: `UPDATE_GOLDEN=1 pytest tests/slurm/test_render.py`, then
read the difference."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.recipe import load_recipe
from slurm.config import SlurmConfig
from slurm.errors import SlurmError
from slurm.render import render, sbatch_command
from slurm.submit import dry_run, stage_jobs

GOLDEN = Path(__file__).with_name("golden")
PROGRAM = ("/opt/hsa/bin/python", "-m", "pretrain")


def recipe(slurm: SlurmConfig, **stages: dict[str, Any]) -> SimpleNamespace:
    """A recipe as far as this room looks: stages by name with their own Slurm settings."""
    return SimpleNamespace(
        name="tiny", slurm=slurm, stages=[SimpleNamespace(name=name, slurm=own) for name, own in stages.items()]
    )


def golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_cpu_stage() -> None:
    (job,) = stage_jobs(
        recipe(SlurmConfig(nodes=2, gpus_per_node=0), warmup={}),
        "demo",
        ["seed=3"],
        run_dir=Path("runs/tiny"),
        work_dir=Path("/home/ada/hsa"),
        program=PROGRAM,
    )
    golden("cpu.sbatch", render(job))
    assert sbatch_command(job) == ["sbatch", "--parsable", "/home/ada/hsa/runs/tiny/slurm/01-warmup.sbatch"]


def test_every_setting_and_awkward_paths() -> None:
    slurm = SlurmConfig(
        nodes=4,
        gpus_per_node=8,
        cpus_per_task=12,
        time="1-12:00:00",
        partition="h100",
        account="lab-7",
        qos="long",
        exclusive=True,
        signal_seconds=600,
        sbatch=["--constraint=nvlink", "--exclude=node13"],
        setup=["module load cuda/13.0", "export NCCL_DEBUG=WARN"],
    )
    jobs = stage_jobs(
        recipe(slurm, warmup={}, pretrain={"nodes": 8, "time": "2-00:00:00", "setup": []}),
        "demo",
        ["optimizer.lr=1e-3", "name=a run; rm -rf $HOME"],
        run_dir=Path("/scratch/100% new runs/tiny"),
        work_dir=Path("/home/ada/my checkout"),
        program=PROGRAM,
    )
    golden("every-setting.sbatch", render(jobs[1]))
    golden("every-setting-first.sbatch", render(jobs[0]))
    assert sbatch_command(jobs[1], "41")[2:4] == ["--dependency=afterok:41", "--kill-on-invalid-dep=yes"]


def test_chain_of_the_8b_recipe() -> None:
    jobs = stage_jobs(
        load_recipe("8b-a1b").recipe,
        "8b-a1b",
        [],
        run_dir=Path("/scratch/runs/8b-a1b"),
        work_dir=Path("/home/ada/hsa"),
        program=PROGRAM,
    )
    assert [job.stage for job in jobs] == ["warmup", "pretrain", "long", "anneal"]
    assert {job.slurm.world_size for job in jobs} == {256}
    golden("8b-a1b-dry-run.txt", dry_run(jobs))


def test_scripts_are_valid_bash(tmp_path: Path) -> None:
    for script in sorted(GOLDEN.glob("*.sbatch")):
        checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, ""), script


def test_command_survives_quoting() -> None:
    overrides = ["name=it's", 'slurm.time="24:00:00"', "data.mix=[{name: a b}]", "x=" + "y" * 200]
    (job,) = stage_jobs(
        recipe(SlurmConfig(), warmup={}), "demo", overrides, run_dir=Path("/r"), work_dir=Path("/"), program=PROGRAM
    )
    lines = render(job).splitlines()
    words = shlex.split(" ".join(lines[lines.index("command=(") + 1 : lines.index(")")]))
    assert words == [*PROGRAM, "train", "demo", *overrides, "--run-dir", "/r", "--until-stage", "warmup"]


def test_recipe_file_is_named_by_its_whole_path(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    (job,) = stage_jobs(
        recipe(SlurmConfig(), warmup={}), "mine.yaml", [], run_dir=Path("runs"), work_dir=tmp_path, program=PROGRAM
    )
    assert str(tmp_path / "mine.yaml") in job.command


@pytest.mark.parametrize(
    ("names", "run_dir", "message"),
    [
        ({"a/b": {}}, "/r", 'a stage is called "a/b"'),
        ({"warmup": {"nodes": 0}}, "/r", r"stages\[0\]\.slurm\.nodes is 0: it must be at least 1"),
        ({"warmup": {"node": 4}}, "/r", r"stages\[0\]\.slurm: Key 'node' not in 'SlurmConfig'. Did you mean: 'nodes'"),
        ({"warmup": {"nodes": "many"}}, "/r", r"stages\[0\]\.slurm: Value 'many' of type 'str' could not be converted"),
        ({"warmup": {}}, "/it's", "which sbatch cannot read"),
    ],
)
def test_impossible_chains_are_refused(names: dict[str, Any], run_dir: str, message: str) -> None:
    with pytest.raises(SlurmError, match=message):
        stage_jobs(recipe(SlurmConfig(), **names), "demo", [], run_dir=Path(run_dir), work_dir=Path("/"))
