"""One reading of the machine that rank 0 runs on: CPU, memory, this process, and the GPUs.

MLflow's own monitor is not used: it gives up for good at the first request that fails, and counts its samples instead
of steps. The names are the ones it uses, so MLflow's page of system metrics shows them.
"""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any


def sample_system() -> dict[str, float]:
    """Percent and megabytes by name; empty without psutil, no GPU values without pynvml (nvidia-ml-py)."""
    values: dict[str, float] = {}
    if importlib.util.find_spec("psutil") is not None:
        import psutil

        memory = psutil.virtual_memory()
        values["cpu_utilization_percentage"] = psutil.cpu_percent()
        values["system_memory_usage_megabytes"] = (memory.total - memory.available) / 1e6
        values["system_memory_usage_percentage"] = memory.percent
        values["process_memory_megabytes"] = psutil.Process().memory_info().rss / 1e6
    values.update(_gpus())
    return values


def _gpus() -> dict[str, float]:
    if importlib.util.find_spec("pynvml") is None:
        return {}
    import pynvml

    values: dict[str, float] = {}
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle: Any = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            values[f"gpu_{index}_utilization_percentage"] = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
            values[f"gpu_{index}_memory_usage_megabytes"] = memory.used / 1e6
            values[f"gpu_{index}_memory_usage_percentage"] = 100.0 * memory.used / memory.total
    return values
