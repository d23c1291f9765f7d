"""A world of one rank, and the toy model, for tests that need Megatron."""

import importlib.util
import sys
from pathlib import Path

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


@pytest.fixture(scope="session")
def toy():
    """The module toy.py beside this file."""
    name = "toy_of_parallel_tests"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("toy.py"))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
