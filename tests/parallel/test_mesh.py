"""Topology errors name the numbers; a lone process gets a world of its own; launchers are recognised."""

import subprocess
import sys

import pytest
import torch

from parallel import mesh
from parallel.errors import TopologyError
from parallel.mesh import ParallelConfig, check_topology


def test_data_parallel_size():
    assert check_topology(ParallelConfig(), 8) == 8
    assert check_topology(ParallelConfig(tensor=2, context=2), 8) == 2
    assert check_topology(ParallelConfig(expert=8), 256, num_experts=64, lanes=256, batch=1024) == 256


@pytest.mark.parametrize(
    ("sizes", "ranks", "facts", "words"),
    [
        (dict(tensor=3), 8, {}, ["tensor 3", "8 ranks", "6 or 9", "2 or 4"]),
        (dict(expert=3), 8, {}, ["parallel.expert=3", "8 ranks", "2 or 4"]),
        (dict(expert=4), 8, dict(num_experts=6), ["expert", "6 experts", "3 or 6"]),
        (dict(expert=2), 2, dict(num_experts=0), ["no experts"]),
        (dict(tensor=4), 4, dict(num_heads=6), ["6 query heads", "3 or 6"]),
        (dict(pipeline=4), 4, dict(num_layers=3), ["3 layers", "nearest that works: 3"]),
        (dict(pipeline=2, virtual_pipeline=4), 2, dict(num_layers=6), ["8", "6 layers"]),
        (dict(virtual_pipeline=2), 1, {}, ["virtual_pipeline=2", "parallel.pipeline"]),
        (dict(sequence=True), 1, {}, ["parallel.sequence", "parallel.tensor"]),
        (dict(context=2), 2, dict(context_length=192, chunk_size=64), ["192", "128 or 256"]),
        (dict(), 3, dict(lanes=8), ["data.lanes=8", "size 3", "2 or 4"]),
        (dict(), 2, dict(lanes=8, batch=12), ["12 sequences", "8", "8 or 16"]),
        (dict(tensor=0), 2, {}, ["parallel.tensor=0"]),
    ],
)
def test_impossible_sizes_name_the_numbers_and_the_nearest(sizes, ranks, facts, words):
    with pytest.raises(TopologyError) as caught:
        check_topology(ParallelConfig(**sizes), ranks, **facts)
    assert caught.value.exit_status == 2
    for word in words:
        assert word in str(caught.value)


def test_config_is_an_omegaconf_structure():
    from omegaconf import OmegaConf

    merged = OmegaConf.merge(OmegaConf.structured(ParallelConfig), {"tensor": 2})
    assert OmegaConf.to_object(merged) == ParallelConfig(tensor=2)


def test_world_of_one(world_of_one):
    assert (mesh.rank(), mesh.world_size(), mesh.data_rank(), mesh.data_size()) == (0, 1, 0, 1)
    assert mesh.is_writer()
    assert mesh.broadcast_object({"a": 1}) == {"a": 1} and mesh.gather_objects(3) == [3]
    total = torch.ones(1, device=world_of_one)
    torch.distributed.all_reduce(total)
    assert total.item() == 1


def test_initialize_twice_and_shut_down_twice(world_of_one):
    first = torch.rand(2)
    mesh.initialize(seed=1234)
    assert torch.equal(torch.rand(2), first)
    mesh.shutdown()
    mesh.shutdown()
    assert mesh.rank() == 0 and mesh.world_size() == 1


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 8, 1)),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}, (3, 4, 1)),
        # A batch script that calls hsa without srun is one process, whatever the job has.
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1, 0)),
    ],
)
def test_launchers(monkeypatch, environment, place):
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_JOB_ID",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = mesh._place()
    assert (found.rank, found.world_size, found.local_rank) == place


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n3", "n3"), ("n[3-4],n7", "n3"), ("gpu-a,gpu-b", "gpu-a"), ("n[01,04-07]", "n01"), ("a1,b[2-3]", "a1")],
)
def test_first_host_of_a_node_list(monkeypatch, nodes, first):
    monkeypatch.setenv("SLURM_STEP_NODELIST", nodes)
    assert mesh._first_slurm_host() == first


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without GPU")
def test_device_that_is_not_there():
    with pytest.raises(TopologyError, match="no GPU"):
        mesh.resolve_device("cuda")
    with pytest.raises(TopologyError, match="auto, cpu or cuda"):
        mesh.resolve_device("tpu")
    assert mesh.resolve_device("auto") == torch.device("cpu")


def test_presets_can_be_checked_without_megatron():
    """A plan on a login node must not pay for, or need, Megatron's import."""
    code = "import sys, parallel.mesh; raise SystemExit('megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
