"""A checkpoint comes back bit for bit, or says what is wrong with it."""

import errno
import json
import logging
import random
import shutil
import subprocess
import threading
from collections import namedtuple

import numpy as np
import pytest
import torch

from parallel import checkpoint, checkpoint_files, compat, mesh
from parallel.checkpoint import (
    PendingSave,
    clean_temporary,
    find_latest,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from parallel.errors import CheckpointError


def save(trained, directory, **changes):
    arguments = {"extra": {"steps": trained.steps}, **changes}
    return save_checkpoint(directory, trained.steps, trained.chunks, trained.optimizer, **arguments)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps(trained, number):
    return [trained.step() for _ in range(number)]


@pytest.fixture
def small(world_of_one, toy):
    """A trained toy, the fastest kind."""
    trained = toy.Toy(toy.settings("muon"))
    trained.step()
    return trained


# --- what comes back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "distributed", "bf16", "experts"),
    [
        ("adamw", True, False, 0),
        ("adamw", True, True, 4),
        ("adamw", False, False, 4),
        ("adamw", False, True, 0),
        ("muon", True, False, 4),
        ("muon", True, True, 0),
    ],
)
def test_resume_is_bit_exact(world_of_one, toy, tmp_path, name, distributed, bf16, experts):
    """With dropout, so that the random states count; from a model and generators that were elsewhere."""
    kind = dict(bf16=bf16, experts=experts)
    settings = toy.settings(name, distributed=distributed)
    unbroken = toy.Toy(settings, **kind)
    steps(unbroken, 3)
    path = save(unbroken, tmp_path)
    expected = steps(unbroken, 3)

    mesh.seed_everything(999)
    resumed = toy.Toy(settings, **kind)
    steps(resumed, 1)
    assert load_checkpoint(path, resumed.chunks, resumed.optimizer) == {"steps": 3}
    resumed.steps = 3
    assert steps(resumed, 3) == expected
    assert equal(unbroken.weights(), resumed.weights())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_checkpoint_before_the_first_step(world_of_one, toy, tmp_path, name):
    unbroken = toy.Toy(toy.settings(name))
    path = save(unbroken, tmp_path)
    expected = steps(unbroken, 2)
    resumed = toy.Toy(toy.settings(name))
    load_checkpoint(path, resumed.chunks, resumed.optimizer)
    assert steps(resumed, 2) == expected


def test_every_parameter_has_a_step_of_its_own(world_of_one, toy, tmp_path):
    """Shared, it would be advanced once per parameter in every update."""
    trained = toy.Toy(toy.settings("adamw"))
    steps(trained, 2)
    load_checkpoint(save(trained, tmp_path), trained.chunks, trained.optimizer)
    steps(trained, 1)
    inner = trained.optimizer.chained_optimizers[0].optimizer
    assert {state["step"].item() for state in inner.state.values()} == {3.0}


def test_the_model_alone_without_optimizer_and_without_ddp(small, toy, tmp_path):
    path = save(small, tmp_path)
    other = toy.Toy(toy.settings("adamw")).chunks[0].module
    state = torch.get_rng_state()
    assert load_checkpoint(path, [other]) == {"steps": 1}
    assert equal(small.weights(), {k: v for k, v in other.state_dict().items() if v is not None})
    assert torch.equal(state, torch.get_rng_state())  # inference keeps its own


def test_a_bf16_checkpoint_loads_into_an_fp32_model(world_of_one, toy, tmp_path):
    trained = toy.Toy(toy.settings("muon"), bf16=True)
    trained.step()
    other = toy.Toy(toy.settings("muon"))
    load_checkpoint(save(trained, tmp_path), other.chunks)
    assert equal({name: value.float() for name, value in trained.weights().items()}, other.weights())


def test_hyperparameters_are_the_recipes_not_the_checkpoints(small, toy, tmp_path):
    path = save(small, tmp_path)
    changed = toy.Toy(toy.settings("muon", muon_momentum=0.5))
    changed.optimizer.param_groups[0]["lr"] = 0.125
    load_checkpoint(path, changed.chunks, changed.optimizer)
    assert changed.optimizer.param_groups[0]["momentum"] == 0.5
    assert changed.optimizer.param_groups[0]["lr"] == 0.125


def test_all_random_generators_come_back(small, tmp_path):
    path = save(small, tmp_path)

    def draw():
        with compat.get_cuda_rng_tracker().fork():
            forked = torch.rand(1).item()
        return random.random(), np.random.rand(), torch.rand(1).item(), forked

    expected = draw()
    draw()
    load_checkpoint(path, small.chunks, small.optimizer)
    assert draw() == expected


def test_extra_keeps_its_values_and_types(small, tmp_path):
    extra = {
        "position": {"stage": 1, "tokens": 10**15, "loss": 0.1 + 0.2, "name": None, "done": False},
        "lanes": {0: {"carry": np.arange(5, dtype=np.uint16), "epoch": np.int64(3)}, 7: {"carry": np.zeros((0, 2))}},
        "ids": ["a", ("b", 1)],
    }
    loaded = load_checkpoint(save(small, tmp_path, extra=extra), small.chunks)
    assert loaded["position"] == extra["position"] and loaded["ids"] == extra["ids"]
    assert sorted(loaded["lanes"]) == [0, 7] and loaded["lanes"][0]["epoch"] == 3
    for lane in (0, 7):
        carry = loaded["lanes"][lane]["carry"]
        assert carry.dtype == extra["lanes"][lane]["carry"].dtype
        np.testing.assert_array_equal(carry, extra["lanes"][lane]["carry"])


def test_extra_refuses_what_it_could_not_give_back(small, tmp_path):
    with pytest.raises(TypeError, match="cannot hold a object"):
        save(small, tmp_path, extra={"x": object()})
    assert list_checkpoints(tmp_path) == []


# --- files, pointer, rotation --------------------------------------------------------------------------------------


def test_layout_manifest_and_pointer(small, tmp_path):
    path = save(small, tmp_path)
    assert path == tmp_path / "step_00000001" and (tmp_path / "latest").read_text() == "step_00000001\n"
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 1 and manifest["world_size"] == 1
    assert set(manifest["files"]) == {file.name for file in path.iterdir()} - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry == {"size": (path / name).stat().st_size, "sha256": checkpoint_files.sha256(path / name)}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_rotation(small, tmp_path):
    for step in range(1, 7):
        small.steps = step
        save(small, tmp_path, keep_last=2, keep=lambda step: step % 3 == 0)
    assert [checkpoint.step_of(path) for path in list_checkpoints(tmp_path)] == [3, 5, 6]


def test_rotation_does_not_count_damaged_checkpoints(small, tmp_path):
    for step in (1, 2):
        small.steps = step
        path = save(small, tmp_path)
    (path / "training.pt").write_bytes(b"")
    small.steps = 3
    save(small, tmp_path, keep_last=2)
    assert [checkpoint.step_of(path) for path in list_checkpoints(tmp_path)] == [1, 2, 3]


def test_the_same_step_is_replaced(small, tmp_path):
    save(small, tmp_path, extra={"which": "first"})
    path = save(small, tmp_path, extra={"which": "second"})
    assert load_checkpoint(path, small.chunks)["which"] == "second"
    assert len(list_checkpoints(tmp_path)) == 1


def test_leftovers_of_killed_processes_are_removed(small, tmp_path):
    save(small, tmp_path)
    for name in (".tmp-step_00000009", ".trash-step_00000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / ".tmp-latest").write_text("step_0")
    assert find_latest(tmp_path) == tmp_path / "step_00000001"
    clean_temporary(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["latest", "step_00000001"]
    clean_temporary(tmp_path / "missing")


def test_a_save_killed_before_the_rename_is_completed(small, tmp_path):
    path = save(small, tmp_path)
    path.rename(tmp_path / ".tmp-step_00000001")
    assert find_latest(tmp_path) is None
    clean_temporary(tmp_path)
    assert find_latest(tmp_path) == path
    assert load_checkpoint(path, small.chunks, small.optimizer) == {"steps": 1}


def test_a_rotation_that_fails_does_not_stop_training(small, tmp_path, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "discard", refuse)
    for step in (1, 2):
        small.steps = step
        save(small, tmp_path, keep_last=1)
    assert "could not be deleted" in caplog.text and len(list_checkpoints(tmp_path)) == 2


# --- damage --------------------------------------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("name", "harm", "words"),
    [
        ("__0_0.distcp", flip, "contents of __0_0.distcp have changed"),
        ("__0_0.distcp", truncate, "bytes instead of"),
        ("training.pt", lambda path: path.unlink(), "training.pt cannot be read"),
        ("manifest.json", truncate, "manifest.json cannot be read"),
        ("manifest.json", lambda path: path.write_text("[]"), "manifest.json cannot be read"),
        ("manifest.json", lambda path: path.unlink(), "manifest.json is missing"),
    ],
)
def test_damage_is_named_and_the_one_before_is_used(small, tmp_path, caplog, name, harm, words):
    first = save(small, tmp_path)
    small.steps = 2
    second = save(small, tmp_path)
    harm(second / name)
    with caplog.at_level(logging.WARNING):
        assert find_latest(tmp_path) == first
    assert str(second) in caplog.text and words in caplog.text
    before = small.weights()
    with pytest.raises(CheckpointError, match=words) as caught:
        load_checkpoint(second, small.chunks, small.optimizer)
    assert caught.value.exit_status == 2 and str(second) in str(caught.value)
    assert equal(before, small.weights())
    harm(first / name)
    with pytest.raises(CheckpointError, match="no usable checkpoint") as caught:
        find_latest(tmp_path)
    assert str(first) in str(caught.value) and str(second) in str(caught.value)


def test_nothing_there(small, tmp_path):
    assert find_latest(tmp_path) is None and find_latest(tmp_path / "missing") is None
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "step_00000001", small.chunks)


# --- another model -------------------------------------------------------------------------------------------------


def test_another_width_names_the_parameter_and_both_shapes(small, toy, tmp_path):
    path = save(small, tmp_path)
    other = toy.Toy(toy.settings("muon"), width=64)
    before = other.weights()
    with pytest.raises(CheckpointError, match="belongs to another model") as caught:
        load_checkpoint(path, other.chunks, other.optimizer)
    assert "embedding.word_embeddings.weight has shape [64, 32] there and [64, 64] here" in str(caught.value)
    assert equal(before, other.weights())


def test_other_layers_are_named(small, toy, tmp_path):
    path = save(small, tmp_path)
    other = toy.Toy(toy.settings("muon"), experts=4)
    with pytest.raises(CheckpointError, match="is not in the checkpoint") as caught:
        load_checkpoint(path, other.chunks)
    assert "decoder.layers.0.mlp." in str(caught.value)


def test_another_optimizer_is_named(small, toy, tmp_path):
    path = save(small, tmp_path)
    other = toy.Toy(toy.settings("adamw", distributed=False))
    with pytest.raises(CheckpointError, match="belongs to another optimizer") as caught:
        load_checkpoint(path, other.chunks, other.optimizer)
    assert "exp_avg" in str(caught.value)


# --- in the background ---------------------------------------------------------------------------------------------


@pytest.fixture
def slow_disk(monkeypatch):
    """An event that every file waits for."""
    goes_on, write = threading.Event(), compat.write_bucket

    def write_bucket(bucket):
        assert goes_on.wait(60)
        return write(bucket)

    monkeypatch.setattr(compat, "write_bucket", write_bucket)
    yield goes_on
    goes_on.set()


def begin(trained, directory):
    return PendingSave(directory, trained.steps, trained.chunks, trained.optimizer, extra={"steps": trained.steps})


@pytest.mark.parametrize(
    ("name", "distributed", "bf16"), [("adamw", True, True), ("adamw", False, False), ("muon", True, False)]
)
def test_what_is_saved_is_what_was_there_when_the_save_began(
    world_of_one, toy, tmp_path, slow_disk, name, distributed, bf16
):
    settings = toy.settings(name, distributed=distributed)
    unbroken = toy.Toy(settings, bf16=bf16)
    steps(unbroken, 2)
    pending = begin(unbroken, tmp_path)
    expected = steps(unbroken, 3)  # while nothing is written yet
    slow_disk.set()
    path = pending.finish()

    resumed = toy.Toy(settings, bf16=bf16)
    assert load_checkpoint(path, resumed.chunks, resumed.optimizer) == {"steps": 2}
    resumed.steps = 2
    assert steps(resumed, 3) == expected
    assert equal(unbroken.weights(), resumed.weights())


def test_a_save_under_way_bears_no_name(small, tmp_path, slow_disk):
    slow_disk.set()
    first = save(small, tmp_path)
    slow_disk.clear()
    small.step()
    pending = begin(small, tmp_path)
    assert not pending.written()
    assert find_latest(tmp_path) == first and (tmp_path / "latest").read_text() == f"{first.name}\n"
    slow_disk.set()
    pending._thread.join()
    assert pending.written() and find_latest(tmp_path) == first
    assert pending.finish() == find_latest(tmp_path) == tmp_path / "step_00000002"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["latest", "step_00000001", "step_00000002"]


# --- full disk -----------------------------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def fail_without_room(monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))


def fail_in_the_tensors(monkeypatch):
    def write_bucket(bucket):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compat, "write_bucket", write_bucket)


def fail_in_the_rest(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "sha256", full)


def fail_in_the_manifest(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(checkpoint, "sync_directory", full)


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "in the background"])
@pytest.mark.parametrize("fail", [fail_without_room, fail_in_the_tensors, fail_in_the_rest, fail_in_the_manifest])
def test_full_disk_leaves_what_was_there(small, tmp_path, monkeypatch, fail, background):
    first = save(small, tmp_path)
    small.step()
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises(OSError, match="the disk is full") as caught:
            begin(small, tmp_path).finish() if background else save(small, tmp_path)
    assert caught.value.errno in (errno.ENOSPC, errno.EDQUOT) and not hasattr(caught.value, "exit_status")
    for words in ("step 2", str(tmp_path), "step_00000001 is untouched", "Make room"):
        assert words in str(caught.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["latest", "step_00000001"]
    assert find_latest(tmp_path) == first
    save(small, tmp_path)  # training goes on once there is room
    assert find_latest(tmp_path) == tmp_path / "step_00000002"


def test_a_folder_removed_under_a_save_is_no_full_disk(small, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"

    def cleared(*args, **kwargs):
        shutil.rmtree(folder)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(checkpoint, "sha256", cleared)
    with pytest.raises(OSError, match="the folder is gone") as caught:
        save(small, folder)
    assert caught.value.errno == errno.ENOENT and str(folder) in str(caught.value)


def test_a_really_full_disk(small, tmp_path, monkeypatch):
    """On a file system of half a megabyte, without the look at the free space beforehand."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    try:
        first = save(small, tmp_path)
        small.step()
        monkeypatch.setattr(checkpoint, "_bytes_to_write", lambda state: 0)
        with pytest.raises(OSError, match="the disk is full"):
            save(small, tmp_path)
        assert find_latest(tmp_path) == first
        assert sorted(file.name for file in tmp_path.iterdir()) == ["latest", "step_00000001"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
