"""Several reader processes for one rank: each prefetches the batches of some of its lanes.

Lanes do not know of each other, so the batches are the same for any number of readers. Worth it where samples are
expensive to make (synthetic ones, a fast model); text alone needs one. The parts of the next batch are joined by a
thread while the training step runs.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from data_pipeline.batch import PackedBatch
from data_pipeline.lanes import BatchStream
from data_pipeline.prefetch import PrefetchingStream, put_unless_stopped


class SharedReaders:
    """`PrefetchingStream` of a rank's lanes, read by up to ``readers`` processes; the same interface.

    open_lanes: opens the `BatchStream` of the lanes it is given.
    """

    def __init__(
        self, open_lanes: Callable[[Sequence[int]], BatchStream], lane_ids: Sequence[int], readers: int, depth: int
    ) -> None:
        ids = sorted(lane_ids)
        count = min(readers, len(ids))
        edges = [i * len(ids) // count for i in range(count + 1)]
        self._open = open_lanes
        self._parts = [ids[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]
        self._depth = depth
        self._streams: list[PrefetchingStream] = []
        self._joined: queue.Queue = queue.Queue(1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._join_ahead, name="data-joiner", daemon=True)
        self._state: dict[str, dict[str, Any]] = {}
        self._skipped: dict[str, int] = {}
        self._failure: BaseException | None = None

    def start(self, state: dict[Any, dict[str, Any]] | None) -> SharedReaders:
        """Begin to read, from ``state`` on if there is one."""
        for part in self._parts:
            stream = self._open(part)
            if state is not None:
                stream.load_state_dict(state)
            self._streams.append(PrefetchingStream(stream, depth=self._depth))
        self._state, self._skipped = self._position()
        self._thread.start()
        return self

    @property
    def domain_names(self) -> list[str]:
        """Names of the ids in ``PackedBatch.domains``."""
        return self._streams[0].domain_names

    def next_batch(self) -> PackedBatch:
        """The next batch of all lanes, in ascending order; usually at once."""
        if self._failure is not None:
            raise self._failure
        item = self._joined.get()
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        batch, self._state, self._skipped = item
        return batch

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Position of all lanes after the last batch that was handed out."""
        return self._state

    def skipped(self) -> dict[str, int]:
        """Documents that could not be read and were skipped, by shard file, in the batches handed out."""
        return self._skipped

    def _position(self) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
        state: dict[str, dict[str, Any]] = {}
        counts: dict[str, int] = {}
        for stream in self._streams:
            state.update(stream.state_dict())
            for file, documents in stream.skipped().items():
                counts[file] = counts.get(file, 0) + documents
        return state, counts

    def _join_ahead(self) -> None:
        try:
            while not self._stop.is_set():
                batches = [stream.next_batch() for stream in self._streams]
                if len(batches) == 1:
                    batch = batches[0]
                else:
                    parts = {name: [getattr(batch, name) for batch in batches] for name in vars(batches[0])}
                    batch = PackedBatch(**{name: _join(tensors) for name, tensors in parts.items()})
                put_unless_stopped(self._joined, (batch, *self._position()), self._stop)
        except BaseException as error:
            put_unless_stopped(self._joined, error, self._stop)

    def close(self) -> None:
        """End the reader processes."""
        self._stop.set()
        for stream in self._streams:
            stream.close()
        if self._thread.is_alive():
            self._thread.join()


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    """The rows of all parts, in page-locked memory if theirs is."""
    rows = sum(len(part) for part in parts)
    whole = torch.empty(rows, *parts[0].shape[1:], dtype=parts[0].dtype, pin_memory=parts[0].is_pinned())
    return torch.cat(parts, out=whole)
