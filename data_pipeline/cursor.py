"""Where a lane stands in a domain: positions in its row of documents, and reading from them."""

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

    __slots__ = ("_entry", "_opened", "_tokens", "document", "domain", "length", "offset", "row")

    def __init__(self, domain: Domain, document: int, row: int, entry: tuple[int, int, int, int], offset: int) -> None:
        self.domain, self.document, self.row, self.offset = domain, document, row, offset
        self._entry, self.length = entry, entry[1]
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
            self._tokens = self.domain.shards.load(self.row, *self._entry)
            self._opened = True
        start, tokens = self.offset, self._tokens
        self.offset = end = min(start + limit, self.length)
        if tokens is None:
            return self._read(start, end)
        if end < self.length:
            return tokens[start:end], int(tokens[end])
        return (tokens[start:] if start else tokens), -1

    def _read(self, start: int, end: int) -> tuple[np.ndarray, int]:
        shards = self.domain.shards
        more = end < self.length
        tokens = shards.read(self.row, start, end - start + more)
        if (largest := int(tokens.max())) >= shards.vocab_size:
            shards.refuse_token(self.row, largest)
        return (tokens[:-1], int(tokens[-1])) if more else (tokens, -1)


class Cursor:
    """The lane's documents of one domain: positions lane, lane + lanes, ... of its endless permuted row.

    buffer_size: documents that wait in ``pending``, oldest first, so that :meth:`take` can choose the one that fits
    best; 0 reads one after the other. Its part of the state is a few integers, in both cases.
    """

    def __init__(self, domain: Domain, lane: int, lanes: int, buffer_size: int, saved: dict[str, Any]) -> None:
        self.domain, self._lane, self._lanes, self._buffer_size = domain, lane, lanes, buffer_size
        self.document, self.offset = int(saved["document"]), int(saved["offset"])
        self._block = self._part = -1
        self._block_rows = np.empty(0, dtype=np.int64)
        self._rows: list[int] = []
        self._entries: list[tuple[int, int, int, int]] = []
        self._current: Reading | None = None
        self._end = sys.maxsize if domain.positions is None else max(0, -(-(domain.positions - lane) // lanes))
        self.pending = [self._open(int(document), int(offset)) for document, offset in saved.get("buffer", [])]
        if self.pending and not buffer_size:
            raise DataError("the saved data position was made with data.packing best_fit; keep it for the whole run")

    def state(self) -> dict[str, Any]:
        """JSON-able: the documents' identity, the next document, the offset in it, the documents that wait."""
        state = {"data": self.domain.identity, "document": self.document, "offset": self.offset}
        if self.pending:
            state["buffer"] = [[reading.document, reading.offset] for reading in self.pending]
        return state

    @property
    def reading(self) -> bool:
        """Whether a document was chosen and is not at its end."""
        return self._current is not None

    @property
    def used_up(self) -> bool:
        """Whether the lane has read its part of the epochs that the mix allows."""
        return self.document >= self._end and not self.pending

    def take(self, limit: int, fit: bool = False) -> tuple[np.ndarray, int]:
        """1..limit tokens of a document, and the token after them (-1 at the document's end).

        The document is the current one; with ``fit`` and a buffer it is the longest that ``limit`` holds whole, if any.
        """
        if self._buffer_size:
            self._current = self._choose(limit, fit)
        elif self._current is None:
            self._current = self._open(self.document, self.offset)
        tokens, after = self._current.take(limit)
        if self._buffer_size:
            if after < 0:
                self.skip()
        elif after < 0:
            self.document, self.offset, self._current = self.document + 1, 0, None
        else:
            self.offset = self._current.offset
        return tokens, after

    def skip(self) -> int:
        """Leave the document of the last :meth:`take`; returns its row."""
        reading, self._current = self._current, None
        assert reading is not None
        if self._buffer_size:
            self.pending.remove(reading)
        else:
            self.document, self.offset = self.document + 1, 0
        return reading.row

    def _choose(self, limit: int, fit: bool) -> Reading:
        while len(self.pending) < self._buffer_size and self.document < self._end:
            self.pending.append(self._open(self.document, self.offset))
            self.document, self.offset = self.document + 1, 0
        chosen, longest = self.pending[0], 0
        if fit:
            for reading in self.pending:
                if longest < reading.length - reading.offset <= limit:
                    chosen, longest = reading, reading.length - reading.offset
        return chosen

    def _open(self, document: int, offset: int) -> Reading:
        part, number = divmod(document, _LOOKED_UP)
        if part != self._part:
            block, first = divmod(part * _LOOKED_UP, _AHEAD)
            if block != self._block:
                steps = np.arange(block * _AHEAD, (block + 1) * _AHEAD, dtype=np.int64)
                numbers = permute(self._lane + steps * self._lanes, self.domain.documents, self.domain.key)
                self._block, self._block_rows = block, self.domain.rows(numbers)
            rows = self._block_rows[first : first + _LOOKED_UP]
            self._part, self._rows, self._entries = part, rows.tolist(), self.domain.shards.index[rows].tolist()
        return Reading(self.domain, document, self._rows[number], self._entries[number], offset)
