"""Recording work as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Made = TypeVar("Made")


def recorded(step: Callable[[], Made], undo: Callable[[], None]) -> tuple[torch.cuda.CUDAGraph, Made]:
    """A graph of ``step`` and what it makes, overwritten by every replay.

    The step runs twice before, on another stream, so that kernels are compiled and workspaces made outside of the
    graph; ``undo`` takes back what one run has changed. Recording itself runs nothing.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
            undo()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    return graph, made
