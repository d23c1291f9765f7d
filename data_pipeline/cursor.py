"""Where a lane stands in a domain: positions in its row of documents, and reading from them.

These calls are made for every piece of text, so what they do is little: positions are permuted and looked up in the
index by the thousand, a document is one read and one checksum, and its pieces are views of it.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.mix import Domain
from data_pipeline.permutation import permute

_AHEAD, _LOOKED_UP = 1024, 64  # positions permuted, and documents looked up in the index, in one vectorised call


class Reading:
    """One document while it is read: ``document`` counts the lane's documents of the domain from the run's start."""

    __slots__ = ("_entry", "_opened", "_shards", "_tokens", "document", "length", "offset", "row")

    def __init__(self, domain: Domain, document: int, entry: tuple[int, int, int, int, int], offset: int) -> None:
        self._shards, self.document, self._entry, self.offset = domain.shards, document, entry, offset
        self.row, _, self.length, _, _ = entry
        self._tokens: np.ndarray | None = None
        self._opened = False
        if offset >= self.length:
            raise DataError(
                f"the saved position in domain {domain.name} is behind the end of its document in "
                f"{domain.shards.path}; restore the shards that the run was started with"
            )

    def take(self, limit: int) -> tuple[np.ndarray, int]:
        """The next 1..limit tokens, and the token after them (-1 at the document's end).

        The document is checked against its checksum when it is opened, and kept if it is small.
        """
        if not self._opened:
            self._tokens = self._shards.load(*self._entry)
            self._opened = True
        start, tokens = self.offset, self._tokens
        end = start + limit
        if end >= self.length:
            self.offset = self.length
            if tokens is None:
                return self._shards.read(self.row, start, self.length - start), -1
            return (tokens[start:] if start else tokens), -1
        self.offset = end
        if tokens is None:
            tokens = self._shards.read(self.row, start, limit + 1)
            return tokens[:-1], int(tokens[-1])
        return tokens[start:end], int(tokens[end])


class Cursor:
    """The lane's documents of one domain: positions lane, lane + lanes, ... of its endless permuted row.

    buffer_size: documents that wait in ``pending``, oldest first, so that :meth:`take` can choose the one that fits
    best; 0 reads one after the other. Its part of the state is a few integers, in both cases.
    """

    def __init__(self, domain: Domain, lane: int, lanes: int, buffer_size: int, saved: dict[str, Any]) -> None:
        self.domain, self._lane, self._lanes, self._buffer_size = domain, lane, lanes, buffer_size
        self._next, self._offset = int(saved["document"]), int(saved["offset"])  # the next one to open, and where
        self._block = self._part = -1
        self._block_rows = np.empty(0, dtype=np.int64)
        self._entries: list[tuple[int, int, int, int, int]] = []
        self._current: Reading | None = None
        self._end = sys.maxsize if domain.positions is None else max(0, -(-(domain.positions - lane) // lanes))
        self.pending = [self._open(int(document), int(offset)) for document, offset in saved.get("buffer", [])]
        if self.pending and not buffer_size:
            raise DataError("the saved data position was made with data.packing best_fit; keep it for the whole run")

    def state(self) -> dict[str, Any]:
        """JSON-able: the documents' identity, the next document, the offset in it, the documents that wait."""
        document, offset = self._next, self._offset
        if not self._buffer_size and self._current is not None:
            document, offset = self._current.document, self._current.offset
        state = {"data": self.domain.identity, "document": document, "offset": offset}
        if self.pending:
            state["buffer"] = [[reading.document, reading.offset] for reading in self.pending]
        return state

    @property
    def reading(self) -> bool:
        """Whether a document was chosen and is not at its end."""
        return self._current is not None

    def take(self, limit: int, fit: bool = False) -> tuple[np.ndarray, int] | None:
        """1..limit tokens of a document, and the token after them (-1 at the document's end); None when the lane has
        read its part of the epochs that the mix allows.

        The document is the current one; with ``fit`` and a buffer it is the longest that ``limit`` holds whole, if any.
        """
        reading = self._current
        if self._buffer_size:
            reading = self._current = self._choose(limit, fit)
        elif reading is None and self._next < self._end:
            reading = self._current = self._open(self._next, self._offset)
            self._next, self._offset = self._next + 1, 0
        if reading is None:
            return None
        piece = reading.take(limit)
        if piece[1] < 0:
            self.skip()
        return piece

    def skip(self) -> int:
        """Leave the document of the last :meth:`take`; returns its row."""
        reading, self._current = self._current, None
        assert reading is not None
        if self._buffer_size:
            self.pending.remove(reading)
        return reading.row

    def row_back(self, count: int) -> int | None:
        """Row of the index of the ``count``-th last document that was opened; None before the first one."""
        document = self._next - 1 - count
        return None if document < 0 else self._open(document, 0).row

    def _choose(self, limit: int, fit: bool) -> Reading | None:
        while len(self.pending) < self._buffer_size and self._next < self._end:
            self.pending.append(self._open(self._next, self._offset))
            self._next, self._offset = self._next + 1, 0
        if not self.pending:
            return None
        chosen, longest = self.pending[0], 0
        if fit:
            for reading in self.pending:
                if longest < reading.length - reading.offset <= limit:
                    chosen, longest = reading, reading.length - reading.offset
        return chosen

    def _open(self, document: int, offset: int) -> Reading:
        part = document // _LOOKED_UP
        if part != self._part:
            block, first = divmod(part * _LOOKED_UP, _AHEAD)
            if block != self._block:
                steps = np.arange(block * _AHEAD, (block + 1) * _AHEAD, dtype=np.int64)
                numbers = permute(self._lane + steps * self._lanes, self.domain.documents, self.domain.key)
                self._block, self._block_rows = block, self.domain.rows(numbers)
            rows = self._block_rows[first : first + _LOOKED_UP]
            columns = zip(*self.domain.shards.index[rows].tolist(), strict=True)
            self._part, self._entries = part, list(zip(rows.tolist(), *columns, strict=True))
        return Reading(self.domain, document, self._entries[document % _LOOKED_UP], offset)
