"""The packed batch handed to the model. Legend: b sequences, L positions each (the stage's context)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch


@dataclass
class PackedBatch:
    """CPU tensors of ``b`` packed sequences of ``L`` tokens.

    tokens (b, L) int64. labels (b, L) int64: the next token of the same document, 0 where there is none; the last
    position of a document that goes on in a later sequence keeps its true label. loss_weights (b, L) float32: 0 where
    there is no label. documents (b, L) int32: 0, 1, ... ascending within each sequence; a document starts on a chunk
    boundary and owns the padding up to the next one. domains (b, L) int16: index into ``BatchStream.domain_names``.
    evidence (b, L, PLACES) int32: where the label is a token of an answer, positions in the sequence of what says the
    same and of what names it (`data_pipeline.evidence`); -1 elsewhere.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_weights: torch.Tensor
    documents: torch.Tensor
    domains: torch.Tensor
    evidence: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Positions in the batch, padding included."""
        return self.tokens.numel()

    def cu_seqlens(self, row: int) -> torch.Tensor:
        """int32 (number of documents + 1,): where the documents of sequence ``row`` start, and L."""
        documents = self.documents[row]
        starts = torch.nonzero(documents[1:] != documents[:-1]).flatten() + 1
        edges = [starts.new_zeros(1), starts, starts.new_full((1,), documents.numel())]
        return torch.cat(edges).to(torch.int32)

    def select(self, rows: slice) -> PackedBatch:
        """A micro-batch: the sequences ``rows``, as views."""
        return PackedBatch(*(getattr(self, f.name)[rows] for f in fields(self)))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch on ``device``."""
        return PackedBatch(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory (CUDA only)."""
        return PackedBatch(*(getattr(self, f.name).pin_memory() for f in fields(self)))

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> PackedBatch:
        """Wrap NumPy arrays of the documented dtypes without a copy."""
        return cls(**{f.name: torch.from_numpy(arrays[f.name]) for f in fields(cls)})
