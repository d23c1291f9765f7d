"""Keeping stdout for results."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def only_writer_to_stdout() -> Iterator[TextIO]:
    """Yield the real stdout; whatever else prints there meanwhile, libraries below Python included, goes to stderr."""
    stream = sys.stdout
    stream.flush()
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # replaced by something without a descriptor, as in tests
        with contextlib.redirect_stdout(sys.stderr):
            yield stream
        return
    kept = os.dup(number)
    os.dup2(sys.__stderr__.fileno() if sys.__stderr__ else 2, number)
    try:
        with (
            open(kept, "w", encoding="utf-8", errors="replace", newline="", closefd=False) as out,
            contextlib.redirect_stdout(sys.stderr),
        ):
            yield out
    finally:
        os.dup2(kept, number)
        os.close(kept)
