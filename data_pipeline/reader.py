"""The reader process behind PrefetchingStream: ``python -m data_pipeline.reader PARENT_PID``.

A pickled BatchStream comes in on standard input, frames go out on standard output: an 8-byte length, a pickled header
(names, shapes, dtypes and the position after the batch), the raw arrays. It imports NumPy and tokenizers, not torch.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from typing import IO, Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.processes import allow_open_files, exit_with_parent


def write_frame(pipe: IO[bytes], header: dict[str, Any], arrays: list[np.ndarray]) -> None:
    """Send one frame."""
    data = pickle.dumps(header)
    pipe.write(len(data).to_bytes(8, "little") + data)
    for array in arrays:
        pipe.write(array.data)
    pipe.flush()


def read_exactly(pipe: IO[bytes], into: memoryview) -> bool:
    """Fill ``into``; False when the pipe ends first."""
    done = 0
    while done < len(into):
        n = pipe.readinto(into[done:])  # type: ignore[attr-defined]
        if not n:
            return False
        done += n
    return True


def read_header(pipe: IO[bytes]) -> dict[str, Any] | None:
    """The header of the next frame, None when the writer is gone."""
    size = bytearray(8)
    if not read_exactly(pipe, memoryview(size)):
        return None
    data = bytearray(int.from_bytes(size, "little"))
    return pickle.loads(data) if read_exactly(pipe, memoryview(data)) else None


def main() -> None:
    """Read batches until the other side goes away."""
    pipe = os.fdopen(os.dup(1), "wb", buffering=1 << 20)
    os.dup2(2, 1)  # nothing else may write into the pipe
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)  # meant for the trainer, which closes the pipe when it has saved
    exit_with_parent(int(sys.argv[1]))
    allow_open_files()
    try:
        stream = pickle.load(sys.stdin.buffer)
        while True:
            arrays = stream.next_arrays()
            layout = [(name, a.shape, a.dtype.str) for name, a in arrays.items()]
            write_frame(pipe, {"arrays": layout, "state": stream.state_dict()}, list(arrays.values()))
    except BrokenPipeError:
        os._exit(0)
    except DataError as error:
        write_frame(pipe, {"data_error": str(error)}, [])
    except Exception:
        write_frame(pipe, {"error": traceback.format_exc()}, [])


if __name__ == "__main__":
    main()
