"""Context memory: what the chunk encoder leaves for every HSA layer, and the one tensor form in which it travels.

Megatron's TransformerBlock threads a single `context` tensor through its layers (activation checkpointing included), so
the memory is packed into one tensor (C, B, width) whenever it passes between layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.model_config import ModelConfig


@dataclass
class ContextMemory:
    """Keys, values and landmarks of C completed chunks of S tokens.

    k, v: (B, C * S, Hkv, D), keys already normalised. landmarks: (B, C, Hr, Dr), already normalised.
    """

    k: Tensor
    v: Tensor
    landmarks: Tensor

    @property
    def chunks(self) -> int:
        return self.landmarks.shape[1]

    def fetch(self, k: Tensor, v: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values to attend to, and the chosen chunks' ids (B, L, Hkv, K) among them: here all there are.

        A memory that is kept elsewhere brings the chosen chunks only.
        """
        return k, v, indices

    def pack(self) -> Tensor:
        """(C, B, S * Hkv * D * 2 + Hr * Dr), chunk first like Megatron's hidden states are token first."""
        batch, chunks = self.landmarks.shape[:2]
        parts = [
            self.k.reshape(batch, chunks, -1),
            self.v.reshape(batch, chunks, -1),
            self.landmarks.reshape(batch, chunks, -1),
        ]
        return torch.cat(parts, dim=-1).transpose(0, 1).contiguous()

    @staticmethod
    def unpack(packed: Tensor, model: ModelConfig, retrieval_heads: int | None = None) -> ContextMemory:
        """The inverse of `pack` for the sizes of `model`; retrieval_heads: those of this rank, if not all."""
        chunks, batch, width = packed.shape
        retrieval_heads = retrieval_heads or model.retrieval_heads
        landmark_width = model.retrieval_dim // model.retrieval_heads * retrieval_heads
        kv_width = (width - landmark_width) // 2
        k, v, landmarks = packed.transpose(0, 1).split([kv_width, kv_width, landmark_width], dim=-1)
        shape = (batch, chunks * model.chunk_size, -1, model.head_dim)
        return ContextMemory(
            k=k.reshape(shape),
            v=v.reshape(shape),
            landmarks=landmarks.reshape(batch, chunks, retrieval_heads, -1),
        )
