"""Pieces of work that are commands of their own, several at a time, each on one GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from pretrain.signals import STOPPED, StopRequest


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls this process' GPUs, without touching them; empty where there are none."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def run_all(
    names: Sequence[str],
    run: Callable[[str, str | None], int],
    *,
    jobs: int,
    gpus: Sequence[str],
    after: Mapping[str, str],
) -> dict[str, int]:
    """Call ``run(name, gpu)`` for every name, ``jobs`` at a time, in the order given; exit statuses by name.

    gpus: the job in slot i gets number i modulo their count; none: ``None``. after: names that wait for another one of
    ``names``. When one was STOPPED, or after a signal to stop (Ctrl-C, of which a terminal tells the commands, too),
    nothing new begins and those that run are waited for; what they leave with after a signal counts as STOPPED.
    """
    waiting, free = list(names), list(range(jobs))
    running: dict[Future[int], tuple[str, int]] = {}
    statuses: dict[str, int] = {}
    stop = StopRequest()
    try:
        with ThreadPoolExecutor(jobs) as pool:
            while True:
                busy = {*waiting, *(name for name, _ in running.values())}
                ready = [name for name in waiting if after.get(name) not in busy]
                while free and ready and not stop.received and STOPPED not in statuses.values():
                    name, slot = ready.pop(0), free.pop(0)
                    waiting.remove(name)
                    running[pool.submit(run, name, gpus[slot % len(gpus)] if gpus else None)] = name, slot
                if not running:
                    return statuses
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name, slot = running.pop(future)
                    statuses[name] = STOPPED if stop.received and future.result() else future.result()
                    free.append(slot)
                free.sort()
    finally:
        stop.close()
