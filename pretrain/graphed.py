"""The forward and backward pass of a training step as one CUDA graph.

A small model spends more time in Python and in launches than its kernels take. All shapes of a stage are equal and
nothing in the pass waits for the device, so after a few ordinary steps the pass is recorded once and replayed from then
on. The gradient accumulators must have been made on the stream that records (`side_stream`): the backward pass runs
there.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from parallel import mesh
from pretrain.recipe import Recipe

Work = Callable[[list[dict[str, Tensor]]], None]

_ORDINARY = 3  # steps before recording: kernels get compiled, allocations and communicators made


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which the gradient accumulators are made and the pass is recorded."""
    return torch.cuda.Stream(device)


def uses_graph(recipe: Recipe, device: torch.device) -> bool:
    """Whether this recipe's pass can and shall be a graph: one GPU, no experts (their loads decide shapes)."""
    alone = mesh.world_size() == 1 and device.type == "cuda"
    return recipe.compute.cuda_graph and alone and not recipe.model.num_experts


class GraphedPass:
    """Runs the same ``work(inputs)`` for inputs of always the same shapes, from the fourth call on as a graph.

    ``work`` reads the tensors of ``inputs`` and leaves what it makes in tensors that exist before. Where recording
    fails the pass goes on without a graph, and says so once.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = side_stream(device)
        self._inputs: list[dict[str, Tensor]] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0
        self._refused = False

    def __call__(self, work: Work, inputs: list[dict[str, Tensor]], prepare: Callable[[], None]) -> None:
        """Copy ``inputs`` (host or device) to where the graph reads, call ``prepare`` (what ``work`` adds to is set to
        its start), and run.

        ``work`` is given anew each time, not kept: its owner owns this object, and in a circle of the two a stage's
        graph would keep its activations' memory until the garbage collector comes by, which may be never.
        """
        device = self._stream.device
        if not self._inputs:
            self._inputs = [{name: x.to(device) for name, x in part.items()} for part in inputs]
        else:
            for mine, part in zip(self._inputs, inputs, strict=True):
                for name, x in part.items():
                    mine[name].copy_(x, non_blocking=True)
        prepare()
        if self._graph is not None:
            self._graph.replay()
            return
        self._calls += 1
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            if self._calls <= _ORDINARY or self._refused:
                work(self._inputs)
            else:
                self._record(work, prepare)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _record(self, work: Work, prepare: Callable[[], None]) -> None:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                work(self._inputs)
        except Exception as error:  # whatever a kernel, a hook or the driver does not allow while recording
            print(f"hsa: no CUDA graph of the training pass: {error}".splitlines()[0], file=sys.stderr, flush=True)
            self._refused = True
            torch.cuda.synchronize()
            prepare()
            work(self._inputs)
            return
        self._graph = graph
        graph.replay()
