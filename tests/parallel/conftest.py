"""A world of one rank for tests that need Megatron's process groups."""

import pytest

from parallel import mesh


@pytest.fixture
def world_of_one(monkeypatch):
    """Process groups and seeds of a lone process, whatever launcher pytest itself runs under."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    device = mesh.initialize(seed=1234)
    yield device
    mesh.shutdown()
