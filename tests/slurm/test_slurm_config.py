"""The `slurm:` section: times, and settings that cannot work."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from slurm.config import SlurmConfig, stage_slurm, time_seconds
from slurm.errors import SlurmError


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("2", 120),
        ("2:30", 150),
        ("0:02:00", 120),
        ("24:00:00", 86400),
        ("1-0", 86400),
        ("1-1:30", 91800),
        ("7-00:00:01", 604801),
        ("tomorrow", None),
        ("1:2:3:4", None),
        ("-5", None),
    ],
)
def test_time_forms_of_slurm(time: str, seconds: int | None) -> None:
    assert time_seconds(time) == seconds


def test_stage_settings_go_on_top() -> None:
    base = SlurmConfig(nodes=4, partition="h100", sbatch=["--mem=0"])
    own = stage_slurm(base, {"nodes": 8, "time": "1:00:00"})
    assert (own.nodes, own.time, own.partition, own.sbatch) == (8, "1:00:00", "h100", ["--mem=0"])
    assert own.world_size == 64
    assert base.nodes == 4


def test_unquoted_time_is_refused_with_the_way_out() -> None:
    time = OmegaConf.from_dotlist(["time=24:00:00"]).time
    assert time == 86400, "YAML's sexagesimal numbers, the trap that the message explains"
    with pytest.raises(SlurmError) as caught:
        stage_slurm(SlurmConfig(), {"time": time})
    assert """'slurm.time="24:00:00"'""" in str(caught.value)
    assert OmegaConf.from_dotlist(['time="24:00:00"']).time == "24:00:00"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus_per_node": -1}, "slurm.gpus_per_node is -1: it must be at least 0"),
        ({"cpus_per_task": 0}, "slurm.cpus_per_task is 0"),
        ({"time": "soon"}, 'slurm.time is "soon", which is no time of Slurm'),
        ({"time": "0:05:00"}, "slurm.time is 0:05:00 .300 s. and slurm.signal_seconds 300: training would be stopped"),
        ({"signal_seconds": 70000, "time": "24:00:00"}, "Slurm takes at most 65535"),
        ({"sbatch": ["constraint=a"]}, 'slurm.sbatch has "constraint=a": each line is one option'),
        ({"sbatch": ["--signal=TERM@5"]}, "slurm.sbatch has --signal, which `hsa submit` sets itself"),
        ({"sbatch": ["-N 3"]}, "slurm.sbatch has -N"),
        ({"partition": "a b"}, 'slurm.partition is "a b", which is no name of Slurm'),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SlurmError, match=message) as caught:
        stage_slurm(SlurmConfig(), settings)
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)
