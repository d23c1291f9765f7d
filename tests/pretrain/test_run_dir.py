"""The run directory: creation, the single writer, frozen recipe, whole files."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from pretrain import run_dir as run_dir_module
from pretrain.cli import main
from pretrain.errors import RecipeError, RunDirError
from pretrain.run_dir import RunDir, check_resume, flatten, write_atomic

RECIPE = {
    "name": "tiny",
    "max_steps": None,
    "parallel": {"tensor": 1},
    "optimizer": {"lr": 3.87e-4, "betas": [0.9, 0.95]},
    "stages": [{"name": "warmup", "context": 128}, {"name": "long", "context": 256}],
    "checkpoint": {"keep_last": 3},
}
PLAN = {"total_steps": 10, "stages": [{"name": "warmup", "first_step": 1, "last_step": 10}]}

HOLD_LOCK = """
import sys, time
from pretrain.run_dir import RunDir
RunDir(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(60)
"""


def begun(path) -> RunDir:
    run = RunDir(path)
    run.create()
    run.acquire()
    run.begin(RECIPE, name="tiny", plan=PLAN)
    return run


def test_errors_leave_with_status_2():
    for error in (RunDirError, RecipeError):
        assert issubclass(error, ValueError)
        assert error.exit_status == 2


def test_create_makes_the_layout_and_accepts_itself(tmp_path):
    run = RunDir(tmp_path / "runs" / "demo")
    assert not run.exists() and not run.finished
    run.create()
    run.create()
    assert {path.name for path in run.path.iterdir()} == {"checkpoints", "logs", "slurm", "eval"}


def test_create_accepts_what_submit_prepared(tmp_path):
    (tmp_path / "demo" / "slurm").mkdir(parents=True)
    (tmp_path / "demo" / "slurm" / "jobs.json").write_text("[]")
    RunDir(tmp_path / "demo").create()


@pytest.mark.parametrize("inner", ["", "below"])
def test_a_file_in_the_way(tmp_path, inner):
    (tmp_path / "demo").write_text("mine")
    with pytest.raises(RunDirError, match=r"demo is a file; move it away"):
        RunDir(tmp_path / "demo" / inner).create()
    assert (tmp_path / "demo").read_text() == "mine"


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunDirError, match=r"not a run directory \(it holds 'thesis.tex'\)"):
        RunDir(tmp_path).create()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unwritable_place():
    with pytest.raises(RunDirError, match=r"can't make the run directory /proc/hsa.*--run-dir"):
        RunDir("/proc/hsa/demo").create()


def test_no_permission(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(run_dir_module.Path, "mkdir", refuse)  # root may write everywhere
    with pytest.raises(RunDirError, match=r"can't write the run directory .*demo: Permission denied"):
        RunDir(tmp_path / "demo").create()


def test_a_full_disk_is_a_crash_and_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "run.json"
    write_atomic(target, "old")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_dir_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_second_writer_is_refused_and_sigkill_frees(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir_module, "_LOCK_PATIENCE_S", 0.2)
    run = RunDir(tmp_path / "demo")
    run.create()
    assert run.writer() is None
    holder = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, str(run.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunDirError, match=rf"demo is being trained by process {holder.pid} on "):
            run.acquire()
        assert run.writer().startswith(f"process {holder.pid} ")
        assert not run.held
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert run.writer() is None
    run.acquire()
    assert run.held
    run.release()
    assert run.writer() is None


def test_forked_children_do_not_keep_the_lock(tmp_path):
    run = RunDir(tmp_path / "demo")
    run.create()
    run.acquire()
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    try:
        run.release()  # closes this process's descriptor only, as SIGKILL would
        deadline = time.monotonic() + 30
        while run.writer() and time.monotonic() < deadline:  # the child may just be starting
            time.sleep(0.01)
        RunDir(run.path).acquire().release()
    finally:
        child.kill()
        child.join()


def test_begin_freezes_recipe_and_ids(tmp_path):
    run = begun(tmp_path / "demo")
    assert run.read_recipe() == RECIPE
    record = run.read_run()
    assert record["name"] == "tiny" and record["plan"] == PLAN and not run.finished
    assert len(record["run_id"]) == 32 and record["versions"]["torch"]
    assert run.record_start(step=0, ranks=1) == 0
    assert run.record_start(step=5, ranks=2) == 1
    starts = RunDir(run.path).read_run()["starts"]
    assert [(start["step"], start["ranks"]) for start in starts] == [(0, 1), (5, 2)]
    run.update_run(finished=True)
    assert RunDir(run.path).finished


def test_update_without_a_difference_writes_nothing(tmp_path):
    run = begun(tmp_path / "demo")
    before = run.run_path.stat().st_ino
    run.update_run(finished=False)
    assert run.run_path.stat().st_ino == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "x"}'])
def test_damaged_run_json_is_named(tmp_path, text):
    run = begun(tmp_path / "demo")
    run.run_path.write_text(text)
    with pytest.raises(RunDirError, match=r"run\.json is damaged"):
        run.read_run()


def test_not_a_run_directory(tmp_path):
    with pytest.raises(RunDirError, match="not a run directory"):
        RunDir(tmp_path).read_run()


def test_flatten_uses_override_keys():
    flat = flatten(RECIPE)
    assert flat["stages.1.context"] == 256 and flat["optimizer.betas.0"] == 0.9
    assert flatten({"mix": []}) == {"mix": []}
    assert flatten({}) == {}


def changed(**edits):
    import copy

    recipe = copy.deepcopy(RECIPE)
    for key, value in edits.items():
        *path, last = key.split("__")
        inner = recipe
        for name in path:
            inner = inner[int(name) if name.isdigit() else name]
        inner[int(last) if last.isdigit() else last] = value
    return recipe


def test_free_keys_change_and_are_listed():
    now = changed(max_steps=5, parallel__tensor=2, checkpoint__keep_last=1)
    assert [str(change) for change in check_resume(RECIPE, now)] == [
        "max_steps: None -> 5",
        "parallel.tensor: 1 -> 2",
        "checkpoint.keep_last: 3 -> 1",
    ]


def test_other_changes_are_refused_with_every_key():
    now = changed(optimizer__lr=1e-3, stages__1__context=512, max_steps=5)
    with pytest.raises(RunDirError) as caught:
        check_resume(RECIPE, now)
    message = str(caught.value)
    assert "optimizer.lr: 0.000387 -> 0.001" in message
    assert "stages.1.context: 256 -> 512" in message
    assert "--allow-change optimizer.lr --allow-change stages.1.context" in message
    assert "max_steps:" not in message


@pytest.mark.parametrize("command", ["train", "submit"])
def test_an_override_behind_allow_change_is_refused_not_lost(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "demo", "--allow-change", "seed", "seed=7"])
    assert caught.value.code == 2
    assert "seed=7: names of keys only" in capsys.readouterr().err


@pytest.mark.parametrize(
    "allow", [["optimizer.lr", "stages.1.context"], ["optimizer", "stages[1]"], ["stages", "optimizer"]]
)
def test_allowed_changes_pass(allow):
    now = changed(optimizer__lr=1e-3, stages__1__context=512)
    assert [change.key for change in check_resume(RECIPE, now, allow)] == ["optimizer.lr", "stages.1.context"]


def test_a_prefix_is_a_whole_name():
    with pytest.raises(RunDirError, match="max_steps_more"):
        check_resume({}, {"max_steps_more": 1})


def test_added_and_removed_keys_count():
    shorter = changed()
    del shorter["stages"][1]
    with pytest.raises(RunDirError, match=r"stages\.1\.name: 'long' -> None"):
        check_resume(RECIPE, shorter)
    with pytest.raises(RunDirError, match=r"new: None -> 0"):
        check_resume(RECIPE, {**RECIPE, "new": 0})
    with pytest.raises(RunDirError, match="flag: 1 -> True"):
        check_resume({"flag": 1}, {"flag": True})


def test_resume_records_and_refreezes(tmp_path):
    run = begun(tmp_path / "demo")
    assert run.resume(RECIPE) == []
    now = changed(max_steps=7, optimizer__lr=1e-3)
    with pytest.raises(RunDirError):
        run.resume(now)
    assert run.read_recipe() == RECIPE and run.read_run()["changes"] == []
    run.resume(now, allow=["optimizer.lr"], step=4)
    assert run.read_recipe() == now
    recorded = run.read_run()["changes"]
    assert [(c["key"], c["old"], c["new"], c["step"]) for c in recorded] == [
        ("max_steps", None, 7, 4),
        ("optimizer.lr", 3.87e-4, 1e-3, 4),
    ]
    assert run.resume(now) == []


def test_requeue_marker(tmp_path, monkeypatch):
    run = begun(tmp_path / "demo")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert run.request_requeue() is None
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    assert run.request_requeue() == run.path / "slurm" / "requeue.41"
    assert (run.path / "slurm" / "requeue.41").exists()
    assert not [name for name in os.listdir(run.slurm) if name.endswith(".tmp")]
