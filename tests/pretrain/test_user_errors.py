"""What a user can get wrong: one message that says what, where and what to do, status 2, nothing half-written."""

import errno
import json
import os
import shutil
import subprocess

import pytest
import torch
import yaml

from parallel import mesh
from pretrain.cli import main
from pretrain.run_dir import RunDir
from tests.conftest import losses, tiny_container


def refused(capsys, *words):
    """Run the command line in this process; it must refuse with one line. Returns that line."""
    assert main(list(map(str, words))) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("hsa: error: ")]
    assert len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


@pytest.fixture
def train(capsys, tiny_recipe, tmp_path):
    def run(*overrides, recipe=None):
        message = refused(capsys, "train", recipe or tiny_recipe, *overrides, "--run-dir", tmp_path / "run")
        assert not (tmp_path / "run").exists(), "nothing may be written for a recipe that can't be trained"
        return message

    return run


def test_unknown_key(train):
    assert "optimizer.learning_rate" in train("optimizer.learning_rate=1")


def test_missing_paths(train, tmp_path):
    assert "nowhere" in train("data.tokenizer=nowhere/tokenizer.json")
    assert "nowhere" in train("data.mix[0].path=nowhere")


def test_no_such_recipe(capsys):
    assert "no recipe 'nothing.yaml'" in refused(capsys, "train", "nothing.yaml")


def test_window_that_is_no_multiple_of_the_chunk(train):
    message = train("stages.first.window=20")
    assert "stages.first.window" in message and "20" in message and "chunk size 8" in message and "24" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel.expert=3", ["expert", "3"]),
        ("parallel.tensor=2", ["tensor", "2"]),
        ("parallel.pipeline=0", ["pipeline", "at least 1"]),
    ],
)
def test_impossible_parallel_size(train, override, words):
    message = train(override)
    assert all(word in message for word in words), message


# One layout that cannot be for every fact of ranks, model, data and stage: ranks, overrides, and the words that say
# which numbers clash and what works. The model is the large preset.
IMPOSSIBLE = {
    "product": (24, ["parallel.tensor=16"], ["tensor 16", "does not divide 24 ranks", "16 or 32", "12 or 24"]),
    "data": (64, ["parallel.tensor=4", "parallel.data=8"], ["parallel.data=8", "64 ranks", "leave 16", "start 32"]),
    "experts": (64, ["parallel.expert=32", "model.num_experts=48"], ["48 experts", "24 or 48"]),
    "ranks by experts": (64, ["parallel.expert=48"], ["parallel.expert=48", "64 ranks", "32 or 64"]),
    "layers": (64, ["parallel.pipeline=32", "parallel.expert=1"], ["32", "30 layers", "30"]),
    "layers of virtual stages": (
        32, ["parallel.pipeline=16", "parallel.virtual_pipeline=2", "parallel.expert=1"], ["32", "30 layers", "30"],
    ),
    "query heads": (64, ["parallel.tensor=32"], ["16 query heads", "16"]),
    "key/value heads": (
        8, ["parallel.tensor=8", "model.num_heads=24", "model.swa_kv_heads=6"],
        ["parallel.tensor=8", "model.swa_kv_heads=6", "6 or 12"],
    ),
    "width": (8, ["parallel.tensor=8", "model.ffn_hidden_size=3332"], ["model.ffn_hidden_size=3332", "7 or 14"]),
    "vocabulary": (8, ["parallel.tensor=8", "model.vocab_size=100356"], ["model.vocab_size=100356", "6 or 12"]),
    "context": (
        8, ["parallel.context=8", "stages.warmup.context=16448"], ["16448", "whole chunks of 64", "16384 or 16896"],
    ),
    "sequence": (1, ["parallel.sequence=true"], ["parallel.sequence=true", "parallel.tensor"]),
    "experts without sequence": (
        2, ["parallel.tensor=2", "parallel.sequence=false", "parallel.expert=1"],
        ["parallel.sequence=false", "experts"],
    ),
    "lanes": (48, [], ["data.lanes=256", "size 48", "32 or 64"]),
    "batch": (1, ["stages.long.batch=500"], ["stages.long.batch", "500", "512"]),
    "micro-batch": (64, ["stages.long.micro_batch=3"], ["stages.long.micro_batch", "3", "1, 2, 4, 8"]),
    "rounds of micro-batches": (
        256, ["parallel.pipeline=4", "parallel.virtual_pipeline=2", "stages.long.micro_batch=4"],
        ['stage "long"', "2 micro-batches", "parallel.pipeline=4", "4"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_plan_refuses_what_no_ranks_can_run(capsys, case):
    ranks, overrides, words = IMPOSSIBLE[case]
    message = refused(capsys, "plan", "8b-a1b", *overrides, "--gpus", ranks)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_a_plan_refuses_is_not_submitted(capsys, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ranks, overrides, words = IMPOSSIBLE[case]
    message = refused(capsys, "submit", "8b-a1b", *overrides, f"slurm.nodes={ranks}", "slurm.gpus_per_node=1")
    assert all(word in message for word in words), message
    assert "stages." in message or f"{ranks} nodes x 1 ranks" in message
    assert not list(tmp_path.iterdir())


def test_ranks_that_cannot_share_the_lanes(tiny_recipe, hsa, tmp_path):
    done = hsa("train", tiny_recipe, "--run-dir", tmp_path / "run", ranks=3)
    assert done.returncode != 0 and "data.lanes" in done.stderr and "2" in done.stderr
    assert 'Traceback (most recent call last):\n  File "/' not in done.stdout and not (tmp_path / "run").exists()


def test_unwritable_run_directory(capsys, tiny_recipe, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(capsys, "train", tiny_recipe, "--run-dir", tmp_path / "file" / "run")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    assert "thesis.tex" in refused(capsys, "train", tiny_recipe, "--run-dir", foreign)
    # root may write anywhere but into /proc
    assert "/proc/run" in refused(capsys, "train", tiny_recipe, "--run-dir", "/proc/run")


@pytest.fixture
def broken_data(tiny_data, tmp_path):
    """A copy of the tiny shards to damage, and a recipe on it."""
    shards = tmp_path / "data" / "shards"
    shutil.copytree(tiny_data / "shards", shards)
    shutil.copytree(tiny_data / "text", tmp_path / "data" / "text")
    recipe = tmp_path / "broken.yaml"
    recipe.write_text(yaml.safe_dump(tiny_container(tmp_path / "data")))
    return shards, recipe


def test_missing_shard(train, broken_data):
    shards, recipe = broken_data
    victim = sorted(shards.glob("*.tar"))[0]
    victim.unlink()
    assert victim.name in train(recipe=recipe)


def test_truncated_shard(train, broken_data):
    shards, recipe = broken_data
    victim = sorted(shards.glob("*.tar"))[0]
    os.truncate(victim, victim.stat().st_size // 2)
    assert victim.name in train(recipe=recipe)


def test_flipped_bit_is_found_by_verify(capsys, broken_data):
    shards, _ = broken_data
    victim = sorted(shards.glob("*.tar"))[0]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert victim.name in refused(capsys, "data", "verify", shards)


def test_tokenizer_that_did_not_make_the_shards(train, tiny_data, tmp_path):
    from data_pipeline.tokenizer import train_bpe

    other = tmp_path / "tokenizer.json"
    other.write_text(train_bpe(["an entirely different text " * 50], 300))
    message = train(f"data.tokenizer={other}")
    assert "tokenizer" in message and str(other) in message


def test_tokenizer_larger_than_the_model(train):
    assert "vocab_size" in train("model.vocab_size=128")


def test_sizes_of_a_stage_that_clash(train):
    assert "stages.second.batch" in train("stages.second.batch=6")


@pytest.fixture
def stopped(tiny_recipe, hsa, tmp_path):
    """A run directory with checkpoints of steps 2 and 4."""
    run_dir = tmp_path / "stopped"
    done = hsa("train", tiny_recipe, "max_steps=4", "--run-dir", run_dir)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.slow
def test_changed_recipe_another_model_and_damaged_checkpoints(stopped, capsys, hsa, tiny_recipe):
    """One run, misused in several ways; what was there before is there after."""
    before = losses(stopped)

    message = refused(capsys, "train", tiny_recipe, "optimizer.lr=0.5", "--run-dir", stopped)
    assert "optimizer.lr" in message and "--allow-change optimizer.lr" in message

    other = ["model.hidden_size=64", "--run-dir", stopped, "--allow-change", "model"]
    done = hsa("train", tiny_recipe, *other)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "step_00000004" in done.stderr and "(" in done.stderr, done.stderr
    assert losses(stopped) == before

    newest = stopped / "checkpoints" / "step_00000004"
    data = next(newest.glob("*.distcp"))
    os.truncate(data, data.stat().st_size - 100)
    done = hsa("train", tiny_recipe, "max_steps=5", "--run-dir", stopped)
    assert done.returncode == 0 and data.name in done.stderr and "resumed at step 2" in done.stdout, (
        done.stdout + done.stderr
    )
    assert losses(stopped)[:4] == before

    for checkpoint in (stopped / "checkpoints").glob("step_*"):
        next(checkpoint.glob("*.distcp")).unlink()
    done = hsa("train", tiny_recipe, "max_steps=6", "--run-dir", stopped)
    assert done.returncode == 2 and "no usable checkpoint" in done.stderr


@pytest.mark.slow
def test_two_trainers_on_one_run_directory(tiny_recipe, hsa, tmp_path):
    """This process holds the lock as a trainer does; one started beside it must leave."""
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    run_dir.acquire()
    try:
        done = hsa("train", tiny_recipe, "--run-dir", run_dir.path)
        assert done.returncode == 2 and f"process {os.getpid()}" in done.stderr, done.stdout + done.stderr
        assert not run_dir.metrics_path.exists()
    finally:
        run_dir.release()


@pytest.mark.slow
def test_full_disk(tiny_recipe, hsa, tmp_path):
    """A real full file system (a small tmpfs, root only): a crash status, one message, the run goes on afterwards."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(mount)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    try:
        run_dir = mount / "run"
        done = hsa("train", tiny_recipe, "--run-dir", run_dir)
        assert done.returncode not in (0, 2, 75), done.stdout + done.stderr
        assert "disk" in (done.stdout + done.stderr) or os.strerror(errno.ENOSPC) in (done.stdout + done.stderr)
        left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        assert all(name == "latest" or name.startswith("step_") for name in left), left
        subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
        done = hsa("train", tiny_recipe, "--run-dir", run_dir)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(losses(run_dir)) == 12
        assert json.loads((run_dir / "run.json").read_text())["finished"]
    finally:
        subprocess.run(["umount", str(mount)], check=False)


def test_an_error_of_one_rank_leaves_no_process_group(monkeypatch, tmp_path, capsys):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    mesh.initialize(device="cpu", seed=0)
    assert torch.distributed.is_initialized()
    assert main(["eval", "niah", str(tmp_path / "nowhere"), "--lengths", "4k"]) == 2
    assert not torch.distributed.is_initialized() and "hsa: error:" in capsys.readouterr().err
