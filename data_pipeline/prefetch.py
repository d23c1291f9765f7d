"""Batches made ahead of the training step by a process of their own."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import torch

from data_pipeline.batch import PackedBatch
from data_pipeline.errors import DataError
from data_pipeline.lanes import BatchStream
from data_pipeline.reader import read_exactly, read_header

_TRIES = 3


class PrefetchingStream:
    """A BatchStream read by a new process, ``depth`` batches ahead, in page-locked memory when there is CUDA.

    Same interface and same batches as the stream itself. ``state_dict`` belongs to the last batch handed out, never
    to what was read ahead. A reader that dies (SIGKILL, out of memory) is started again from the last batch that
    arrived, so nothing is lost or repeated; after three deaths without a batch ``next_batch`` raises RuntimeError.
    DataErrors of the reader are raised by ``next_batch``. Use as a context manager, or call :meth:`close`.
    """

    def __init__(self, stream: BatchStream, depth: int = 2) -> None:
        if depth < 1:
            raise DataError(
                f"data.prefetch must be at least 1 to read ahead, not {depth}; 0 reads in the training process"
            )
        self._stream = stream
        self._depth = depth
        self._state = stream.state_dict()
        self._pin = torch.cuda.is_available()
        self._failure: BaseException | None = None
        self._start()

    @property
    def domain_names(self) -> list[str]:
        """Names of the ids in ``PackedBatch.domains``."""
        return self._stream.domain_names

    @property
    def reader_pid(self) -> int | None:
        """Process id of the reader, None while there is none."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def next_batch(self) -> PackedBatch:
        """The next batch, usually at once."""
        if self._failure is not None:
            raise self._failure
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        batch, self._state = item
        return batch

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Position after the last batch that :meth:`next_batch` returned."""
        return self._state

    def load_state_dict(self, state: dict[Any, dict[str, Any]]) -> None:
        """Throw away what was read ahead and go on from ``state``."""
        self.close()
        self._stream.load_state_dict(state)
        self._state = self._stream.state_dict()
        self._start()

    def epochs(self) -> dict[str, float]:
        """Epochs of every domain finished by the batches handed out."""
        return self._stream.epochs(self._state)

    def skipped(self) -> dict[str, int]:
        """Documents that could not be read and were skipped, by shard file, in the batches handed out."""
        return self._stream.skipped(self._state)

    def close(self) -> None:
        """End the reader process."""
        self._stop.set()
        process = self._process
        if process is not None:
            process.kill()
        self._thread.join()
        with contextlib.suppress(queue.Full):  # a thread that waits in next_batch, if there is one, must not wait on
            self._queue.put_nowait(RuntimeError("the data reader was closed"))
        self._stream.close()

    def __enter__(self) -> PrefetchingStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_thread") and not self._stop.is_set():
            self._stop.set()
            if self._process is not None:
                self._process.kill()

    def _start(self) -> None:
        self._failure = None
        self._queue: queue.Queue = queue.Queue(self._depth)
        self._stop = threading.Event()
        self._process: subprocess.Popen | None = None
        self._thread = threading.Thread(
            target=self._receive,
            args=(pickle.dumps(self._stream), self._queue, self._stop),
            name="data-reader",
            daemon=True,
        )
        self._thread.start()

    def _receive(self, stream: bytes, out: queue.Queue, stop: threading.Event) -> None:
        """Thread: start the reader, pass its batches on, start it again when it dies."""
        deaths = 0
        state: dict | None = None
        try:
            while not stop.is_set():
                if state is not None:
                    self._stream.load_state_dict(state)
                    stream = pickle.dumps(self._stream)
                process = self._process = _spawn(stream)
                assert process.stdout is not None
                while (header := read_header(process.stdout)) is not None:
                    if "data_error" in header:
                        raise DataError(header["data_error"])
                    if "error" in header:
                        raise RuntimeError(f"the data reader process failed:\n{header['error']}")
                    batch = self._read(process, header)
                    if batch is None:
                        break
                    deaths, state = 0, header["state"]
                    if not put_unless_stopped(out, (batch, state), stop):
                        break
                process.kill()
                process.stdout.close()
                status = process.wait()
                deaths += 1
                if deaths > _TRIES:
                    raise RuntimeError(
                        f"the data reader process died {deaths} times in a row (last exit status {status})"
                    )
        except BaseException as error:
            put_unless_stopped(out, error, stop)

    def _read(self, process: subprocess.Popen, header: dict[str, Any]) -> PackedBatch | None:
        tensors = {}
        for name, shape, dtype in header["arrays"]:
            kind = torch.from_numpy(np.empty(0, dtype=dtype)).dtype
            tensor = torch.empty(shape, dtype=kind, pin_memory=self._pin)
            if not read_exactly(process.stdout, memoryview(tensor.numpy()).cast("B")):  # type: ignore[arg-type]
                return None
            tensors[name] = tensor
        return PackedBatch(**tensors)


def put_unless_stopped(out: queue.Queue, item: Any, stop: threading.Event) -> bool:
    """Put `item` once there is room; False if `stop` was set first."""
    while not stop.is_set():
        try:
            out.put(item, timeout=0.2)
            return True
        except queue.Full:
            continue
    return False


def _spawn(stream: bytes) -> subprocess.Popen:
    """A new interpreter (no fork: the trainer has threads and perhaps CUDA) that sees the same packages."""
    paths = [os.path.abspath(p) for p in sys.path]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "data_pipeline.reader", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        bufsize=1 << 20,
    )
    assert process.stdin is not None
    try:
        process.stdin.write(stream)
        process.stdin.close()
    except BrokenPipeError:
        pass  # it died at once; the receiver sees the end of its output and counts it
    return process
