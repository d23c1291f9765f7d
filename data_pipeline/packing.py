"""The arrays of a batch while lanes fill them: what is the same for all pieces is written for the whole batch at once.

Legend: b sequences, L context; positions count through the whole batch, b L of them.
"""

from __future__ import annotations

import numpy as np

from data_pipeline.evidence import no_evidence


class Packing:
    """The batch being made. Lanes write ``tokens`` and, where they are not what all text has, ``weights`` and
    ``evidence``; the rest follows.

    tokens int64 (b L), filled with ``pad_id``; weights float32 (b L), filled with ``text_weight``; evidence int32
    (b L, PLACES), filled with NONE.
    """

    def __init__(self, rows: int, context: int, pad_id: int, text_weight: float) -> None:
        self.shape = (rows, context)
        self.tokens = np.full(rows * context, pad_id, dtype=np.int64)
        self.weights = np.full(rows * context, text_weight, dtype=np.float32)
        self.evidence = no_evidence(rows * context)
        self._sizes: list[int] = []
        self._numbers: list[int] = []
        self._domains: list[int] = []
        self._ends: list[slice] = []
        self._follows: list[int] = []

    def add(self, number: int, domain: int, size: int) -> None:
        """The next piece: document ``number`` of its sequence, of ``size`` positions, padding included."""
        self._numbers.append(number)
        self._domains.append(domain)
        self._sizes.append(size)

    def end(self, last: int, stop: int) -> None:
        """Nothing follows the token at ``last``, nor the padding up to ``stop``."""
        self._ends.append(slice(last, stop))

    def close_row(self, follows: int) -> None:
        """A sequence is full; ``follows`` is the token after its last one, -1 if there is none."""
        self._follows.append(max(follows, 0))

    def arrays(self) -> dict[str, np.ndarray]:
        """The batch as NumPy arrays (see PackedBatch for names, shapes and dtypes)."""
        tokens = self.tokens.reshape(self.shape)
        labels = np.empty(self.shape, dtype=np.int64)
        labels[:, :-1] = tokens[:, 1:]
        labels[:, -1] = self._follows
        flat_labels, weights = labels.reshape(-1), self.weights
        for place in self._ends:
            flat_labels[place] = 0
            weights[place] = 0.0
        sizes = np.array(self._sizes)
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_weights": weights.reshape(self.shape),
            "documents": np.repeat(np.array(self._numbers, dtype=np.int32), sizes).reshape(self.shape),
            "domains": np.repeat(np.array(self._domains, dtype=np.int16), sizes).reshape(self.shape),
            "evidence": self.evidence.reshape(*self.shape, -1),
        }
