"""Where the context memory of a long text lies while it is read and continued: one set of buffers that chunks are
written into, on the device or in host memory, in the model's dtype or in FP8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hsa_kernels import ops
from parallel.memory import ContextMemory
from parallel.model_config import ModelConfig
from parallel.neighbours import in_text, with_neighbours
from parallel.selection import Decay

FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(FP8).max


@dataclass(frozen=True)
class Placement:
    """Where keys and values of the memory lie. Landmarks, which every token reads, stay on the device in any case.

    host: in host memory (pinned where there is a GPU); chosen chunks are brought on demand. fp8: as float8_e4m3fn with
    one scale per chunk and head, half the bytes of bf16.
    """

    host: bool = False
    fp8: bool = False


class ContextStore:
    """Buffers of B sequences with room for `capacity` chunks each; the room at least doubles when it has to grow.

    How many chunks of a sequence are real is the reader's knowledge, not the store's: what lies behind them is finite
    and never chosen.
    """

    def __init__(self, model: ModelConfig, device: torch.device, dtype: torch.dtype, placement: Placement) -> None:
        self.model, self.device, self.dtype, self.placement = model, device, dtype, placement
        self.batch = self.capacity = 0
        self.k = self.v = self.scales = self.landmarks = torch.empty(0)

    # ------------------------------------------------------------------------------------------------------- buffers

    def reserve(self, batch: int, chunks: int, *, keep: bool) -> None:
        """Room for that many chunks of that many sequences; keep: what was written stays."""
        if batch == self.batch and chunks <= self.capacity:
            return
        room = max(1, chunks)
        if keep and self.capacity:
            if batch != self.batch:
                raise ValueError(f"the memory of {self.batch} sequences cannot go on as that of {batch}")
            room = max(room, 2 * self.capacity)
        old = [self.k, self.v, self.scales, self.landmarks]
        model, kv_device = self.model, torch.device("cpu") if self.placement.host else self.device
        if not keep:
            self.k = self.v = self.scales = self.landmarks = torch.empty(0)  # freed before the new ones are made
            old.clear()

        def buffer(per_chunk: int, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
            pin = device.type == "cpu" and self.device.type == "cuda"
            return torch.zeros(batch, room * per_chunk, *shape, dtype=dtype, device=device, pin_memory=pin)

        # FP8 numbers are kept as bytes: indexing knows those on every device.
        kv_type = torch.uint8 if self.placement.fp8 else self.dtype
        kv = [
            buffer(model.chunk_size, model.hsa_kv_heads, model.head_dim, dtype=kv_type, device=kv_device)
            for _ in range(2)
        ]
        scale_shape = (model.hsa_kv_heads, 2 if self.placement.fp8 else 0)
        scales = buffer(1, *scale_shape, dtype=torch.float32, device=self.device)
        heads = model.retrieval_heads
        landmarks = buffer(1, heads, model.retrieval_dim // heads, dtype=self.dtype, device=self.device)
        new = (*kv, scales, landmarks)
        if old and self.capacity:
            for source, target in zip(old, new, strict=True):
                target[:, : source.shape[1]] = source
        self.k, self.v, self.scales, self.landmarks = new
        self.batch, self.capacity = batch, room

    def write(self, new: ContextMemory, rows: Sequence[int], at: int) -> None:
        """Put chunks at, at + 1, ... of the given sequences; new has one row for each of them."""
        size, stop = self.model.chunk_size, at + new.chunks
        k, v, scales = self._encoded(new)
        for i, row in enumerate(rows):
            self.k[row, at * size : stop * size] = k[i]
            self.v[row, at * size : stop * size] = v[i]
            self.landmarks[row, at:stop] = new.landmarks[i]
            if self.placement.fp8:
                self.scales[row, at:stop] = scales[i]

    def _encoded(self, new: ContextMemory) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values as they are kept, and scales (B, C, Hkv, 2)."""
        if not self.placement.fp8:
            return new.k, new.v, torch.empty(0)
        parts, scales = [], []
        for x in (new.k, new.v):
            chunks = x.unflatten(1, (new.chunks, -1)).float()
            scale = chunks.abs().amax((2, 4), keepdim=True).clamp(min=1e-12) / _FP8_MAX  # (B, C, 1, Hkv, 1)
            parts.append((chunks / scale).to(FP8).view(torch.uint8).flatten(1, 2))
            scales.append(scale[:, :, 0, :, 0])
        return parts[0], parts[1], torch.stack(scales, -1)

    # ------------------------------------------------------------------------------------------------------ reading

    def view(self, rows: Sequence[int], chunks: int) -> ContextMemory | None:
        """The first chunks of some sequences for a forward pass, or None where there are none."""
        if not chunks:
            return None
        adjacent = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        pick = slice(rows[0], rows[0] + len(rows)) if adjacent else list(rows)
        tokens = chunks * self.model.chunk_size
        landmarks = self.landmarks[pick, :chunks]
        if self.placement == Placement():
            return ContextMemory(self.k[pick, :tokens], self.v[pick, :tokens], landmarks)
        return _FetchedMemory(self.k[:, :tokens], self.v[:, :tokens], landmarks, store=self, rows=tuple(rows))

    def attend(
        self,
        q: Tensor,
        retrieval: Tensor,
        visible: Tensor,
        top_k: int | None,
        neighbours: int = 0,
        *,
        decay: Decay | None = None,
        weigh: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """HSA of one new token per sequence: q (B, Hq, D), retrieval (B, Hr, Dr), visible (B,) int32 chunks.
        neighbours: so many of the best chunks bring the chunks beside them. decay: of scores with the distance. weigh:
        weights from logarithms of the usual ones and ids in ascending order.

        Shapes alone decide what is launched, unless keys and values lie in host memory.
        """
        wanted = min(top_k or self.capacity, self.capacity)
        falls = {} if decay is None else decay.arguments(retrieval)
        ids, weights = ops.hsa_decode_select(retrieval, self.landmarks, visible, top_k=wanted, **falls)
        if weigh is not None:
            weights = weigh(weights.log(), ids)
        if neighbours:
            ids, weights = with_neighbours(ids, weights, neighbours, in_text(visible[:, None, None]))
            rest = (1 << (ids.shape[2] - 1).bit_length()) - ids.shape[2]  # the kernel takes powers of two
            ids, weights = nn.functional.pad(ids, (0, rest), value=-1), nn.functional.pad(weights, (0, rest))
        k, v = self.k, self.v
        if self.placement != Placement():
            heads = self.model.hsa_kv_heads
            k, v = self._chosen(ids.expand(-1, heads, -1))
            # Slot j holds what was chosen j-th.
            slots = torch.arange(ids.shape[2], device=ids.device, dtype=ids.dtype)
            ids = torch.where(ids >= 0, slots, -1)
        return ops.hsa_decode_attend(q, k, v, weights, ids, chunk_size=self.model.chunk_size)

    def _chosen(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, Hkv, K), -1 = any -> the keys and values of those chunks (B, K * S, Hkv, D) on the device."""
        ids = ids.clamp(min=0).long()
        batch, heads, count = ids.shape
        where = ids.to(self.k.device)
        row = torch.arange(batch, device=where.device)[:, None, None]
        head = torch.arange(heads, device=where.device)[None, :, None]
        out = []
        for index, kept in enumerate((self.k, self.v)):
            found = kept.unflatten(1, (self.capacity, -1))[row, where, :, head].to(self.device)  # (B, Hkv, K, S, D)
            if self.placement.fp8:
                scale = self.scales[..., index][row.to(self.device), ids, head.to(self.device)]
                found = (found.view(FP8).float() * scale[..., None, None]).to(self.dtype)
            out.append(found.permute(0, 2, 3, 1, 4).reshape(batch, count * self.model.chunk_size, heads, -1))
        return out[0], out[1]

    def chunks_of(self, row: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (n, S, Hkv, D) of the chunks ids (n,) of one sequence, on the device."""
        out = []
        for index, kept in enumerate((self.k, self.v)):
            found = kept[row].unflatten(0, (self.capacity, -1))[ids.to(kept.device)].to(self.device)
            if self.placement.fp8:
                scale = self.scales[row, ids, :, index]
                found = (found.view(FP8).float() * scale[:, None, :, None]).to(self.dtype)
            out.append(found)
        return out[0], out[1]

    # -------------------------------------------------------------------------------------------------- saved state

    def tensors(self, chunks: int) -> dict[str, Tensor]:
        """The first chunks of all sequences as they are kept, for a file."""
        tokens = chunks * self.model.chunk_size
        kept = {"k": self.k[:, :tokens], "v": self.v[:, :tokens], "landmarks": self.landmarks[:, :chunks]}
        return {**kept, "scales": self.scales[:, :chunks]} if self.placement.fp8 else kept

    def restore(self, kept: dict[str, Tensor], chunks: int) -> None:
        """The inverse of `tensors`, in the same placement's number format."""
        self.reserve(kept["landmarks"].shape[0], chunks, keep=False)
        for name, source in kept.items():
            getattr(self, name)[:, : source.shape[1]] = source


@dataclass
class _FetchedMemory(ContextMemory):
    """A memory whose keys and values are brought to the device, and out of FP8, for the chosen chunks alone."""

    store: ContextStore
    rows: tuple[int, ...]

    def fetch(self, k: Tensor, v: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found, local = [], []
        for i, row in enumerate(self.rows):
            mine = indices[i]
            ids = torch.unique(mine[mine >= 0]).long()
            found.append(self.store.chunks_of(row, ids if ids.numel() else ids.new_zeros(1)))
            place = torch.searchsorted(ids, mine.long()).to(indices.dtype)
            local.append(torch.where(mine >= 0, place, -1))
        width = max(k.shape[0] for k, _ in found)

        def together(index: int) -> Tensor:
            parts = [torch.nn.functional.pad(f[index], (0,) * 7 + (width - f[index].shape[0],)) for f in found]
            return torch.stack(parts).flatten(1, 2)

        return together(0), together(1), torch.stack(local)
