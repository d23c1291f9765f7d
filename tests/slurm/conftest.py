"""The real cluster, started once for all tests that ask for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster, missing_requirement


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    reason = missing_requirement()
    if reason is not None:
        # A developer's laptop may lack Slurm; the machine that guards the project may not.
        if os.environ.get("CI") == "true":
            pytest.fail(f"no Slurm cluster can be started: {reason}")
        pytest.skip(f"no Slurm cluster can be started: {reason}")
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(running_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> SlurmCluster:
    """The cluster, with this process's environment pointing at it."""
    for name in [name for name in os.environ if name not in running_cluster.environment]:
        monkeypatch.delenv(name)
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, running_cluster.environment[name])
    return running_cluster


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"
