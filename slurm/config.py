"""The recipe's `slurm:` section, and a stage's own `slurm:` on top of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from slurm.errors import SlurmError

# Slurm's own spellings of a time limit, most specific first; groups are named after their unit.
_TIME_FORMS = (
    r"(?P<d>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?",
    r"(?P<h>\d+):(?P<m>\d+):(?P<s>\d+)",
    r"(?P<m>\d+):(?P<s>\d+)",
    r"(?P<m>\d+)",
)
# Options that the scripts set themselves; a second value would break requeueing or the rendezvous.
_OWN_OPTIONS = {
    "--job-name", "--nodes", "--ntasks", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time",
    "--partition", "--account", "--qos", "--chdir", "--requeue", "--no-requeue", "--signal", "--open-mode", "--output",
    "--error", "--dependency", "--kill-on-invalid-dep", "--array",
    "-J", "-N", "-n", "-c", "-t", "-p", "-A", "-q", "-D", "-o", "-e", "-d", "-a",
}  # fmt: skip


@dataclass
class SlurmConfig:
    """What a stage asks of the cluster. One task per GPU, or one per node when `gpus_per_node` is 0."""

    nodes: int = 1
    gpus_per_node: int = 8
    cpus_per_task: int | None = None
    time: str = "24:00:00"
    """Limit of one job, not of the stage: the job is requeued until the stage is done."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    exclusive: bool = False
    signal_seconds: int = 300
    """How long before the limit training is asked to save and stop: a step and a checkpoint must fit in."""
    sbatch: list[str] = field(default_factory=list)
    """More options for sbatch, one per line, such as "--constraint=h100"."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that run before training, such as "module load cuda"."""

    @property
    def tasks_per_node(self) -> int:
        """Ranks per node."""
        return self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.tasks_per_node


def stage_slurm(base: SlurmConfig, override: Mapping[str, Any] | None, *, where: str = "slurm") -> SlurmConfig:
    """`base` with a stage's own settings on top, checked.

    `where` is the recipe key that the messages name. Raises SlurmError for an unknown key, a wrong type or an
    impossible value.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(SlurmConfig), dataclasses.asdict(base), dict(override or {}))
        slurm = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise SlurmError(f"{where}: {str(error).splitlines()[0]}") from error
    assert isinstance(slurm, SlurmConfig)
    _check(slurm, where)
    return slurm


def time_seconds(time: str) -> int | None:
    """A Slurm time limit in seconds, None when it is not one. A bare number means minutes, as in Slurm."""
    for form in _TIME_FORMS:
        if match := re.fullmatch(form, time):
            parts = {unit: int(value or 0) for unit, value in match.groupdict().items()}
            units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
            return sum(units[unit] * value for unit, value in parts.items())
    return None


def _check(slurm: SlurmConfig, where: str) -> None:
    for name, least in (("nodes", 1), ("gpus_per_node", 0), ("cpus_per_task", 1), ("signal_seconds", 1)):
        value = getattr(slurm, name)
        if value is not None and value < least:
            raise SlurmError(f"{where}.{name} is {value}: it must be at least {least}")
    seconds = time_seconds(slurm.time)
    if seconds is None:
        raise SlurmError(f'{where}.time is "{slurm.time}", which is no time of Slurm: write "HH:MM:SS" or "D-HH:MM:SS"')
    if slurm.time.isdigit() and int(slurm.time) >= 60:
        # YAML 1.1 reads 24:00:00 as the sexagesimal number 86400, which Slurm would take for 60 days.
        meant = _sexagesimal(int(slurm.time))
        raise SlurmError(
            f"{where}.time is the number {slurm.time}, which is what YAML makes of {meant} without quotes: "
            f'write time: "{meant}", on a command line \'{where}.time="{meant}"\''
        )
    if seconds <= slurm.signal_seconds:
        raise SlurmError(
            f"{where}.time is {slurm.time} ({seconds} s) and {where}.signal_seconds {slurm.signal_seconds}: "
            "training would be stopped as soon as it starts; raise time or lower signal_seconds"
        )
    if slurm.signal_seconds > 65535:
        raise SlurmError(f"{where}.signal_seconds is {slurm.signal_seconds}: Slurm takes at most 65535")
    for option in slurm.sbatch:
        name = re.split(r"[=\s]", option, maxsplit=1)[0]
        if not option.startswith("-") or "\n" in option:
            raise SlurmError(
                f'{where}.sbatch has "{option}": each line is one option of sbatch, such as "--constraint=h100"'
            )
        if name in _OWN_OPTIONS:
            raise SlurmError(f"{where}.sbatch has {name}, which `hsa submit` sets itself: remove it")
    for name in ("partition", "account", "qos"):
        value = getattr(slurm, name)
        if value is not None and not re.fullmatch(r"[\w.,:+-]+", value):
            raise SlurmError(f'{where}.{name} is "{value}", which is no name of Slurm')


def _sexagesimal(number: int) -> str:
    hours, rest = divmod(number, 3600)
    return f"{hours:02d}:{rest // 60:02d}:{rest % 60:02d}"
