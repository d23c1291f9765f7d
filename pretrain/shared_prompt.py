"""Many prompts that differ from one long text in a few places: the text is read once, each prompt costs its edits.

Exact, by the argument of `pretrain.inference`: a token's lower output depends on the sum(window - 1) tokens before it,
so an edit changes the lower outputs, and with them the chunks of the context memory, from its first token to that many
after its last; everything else of the memory is the shared text's. The upper decoder runs over the last receptive
field of every prompt, which is all that the next token needs, and answers are decoded for all prompts together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parallel.layers import DecoderLayer, KeysAndValues, next_halo
from parallel.shared_memory import SharedMemory
from pretrain.inference import InferenceEngine

_SEGMENT = 1 << 16  # tokens of one pass while the shared text is read, on CUDA
_TOKENS = {"cuda": 1 << 18, "cpu": 1 << 14}  # tokens of one lower pass over edited places
_OVERLAYS = {"cuda": 1 << 15, "cpu": 0}  # chunks of overlays to begin with; growing copies the whole memory once
_GRAIN = 128  # lengths of passes are multiples of it: kernels are compiled for few shapes

Edit = tuple[int, np.ndarray]
"""Position and tokens (n,) that overwrite the text there."""


@dataclass
class _Piece:
    """Chunks first .. end - 1 of a prompt, to be encoded from its own tokens."""

    prompt: int
    first: int
    end: int


class SharedPrompt:
    """Answers questions about edited copies of one text.

    engine: for its model and settings.
    """

    def __init__(self, engine: InferenceEngine) -> None:
        self.engine = engine
        self.model = engine.model
        self.chunk = engine.model.model.chunk_size
        settings = engine.settings
        self.reach = sum(layer_window(layer, settings) - 1 for layer in engine.lower if layer.has_window)
        self.segment = max(engine.segment, _SEGMENT) if engine.device.type == "cuda" else engine.segment
        self.widest = max(layer_window(layer, settings) for layer in (*engine.lower, *engine.upper))
        self.upper_length = -(-engine.receptive_field // self.chunk) * self.chunk + self.chunk
        self.tail = -(-(self.upper_length + self.chunk + self.reach) // _GRAIN) * _GRAIN
        self._angles = self.model.rotary_pos_emb(max(self.segment, self.tail) + self.widest)

    def choose(self, **settings: float | None) -> None:
        """Answer with other ``top_k``, ``neighbours``, ``retrieval_temperature`` or ``distance_decay`` from now on.

        What was read stays: the memory does not depend on them.
        """
        self.engine.settings.update(settings)

    @torch.no_grad()
    def read(self, tokens: np.ndarray) -> None:
        """Read the shared text (n,): its lower decoder and memory, segment by segment. Needs at least one chunk."""
        self.tokens = np.ascontiguousarray(tokens, dtype=np.int64)
        chunks = len(self.tokens) // self.chunk
        if not chunks:
            raise ValueError(f"a shared text has at least one chunk of {self.chunk} tokens, this one {len(tokens)}")
        engine, memory = self.engine, None
        step = max(self.chunk, self.segment // self.chunk * self.chunk)
        halos: dict[int, KeysAndValues] = {}
        encoder = engine.upper[0].encoder
        assert encoder is not None
        self.memory: SharedMemory | None = None
        with engine._evaluating():
            for start in range(0, chunks * self.chunk, step):
                part = torch.from_numpy(self.tokens[start : min(start + step, chunks * self.chunk)])
                hidden = self._lower(part[None].to(engine.device), halos)
                first = start // self.chunk
                numbers = torch.arange(first, first + hidden.shape[0] // self.chunk, device=engine.device)
                new = encoder(hidden, numbers[None])
                if memory is None:
                    memory = SharedMemory(new, chunks, _OVERLAYS[engine.device.type])
                memory.append(new)
        self.memory = memory

    @torch.no_grad()
    def answers(self, edits: Sequence[Sequence[Edit]], length: int, max_new_tokens: int, vocab_size: int) -> np.ndarray:
        """Greedy continuations (B, max_new_tokens) int64 of B prompts: the first ``length`` tokens of the text with
        each prompt's edits. Edits of one prompt do not overlap and end before ``length``."""
        memory = self.memory
        assert memory is not None, "read a text first"
        if not 1 <= length <= len(self.tokens):
            raise ValueError(f"a prompt has 1 to {len(self.tokens)} tokens of the text, not {length}")
        upper_start = max(0, length - self.upper_length)
        shared = upper_start // self.chunk  # chunks from here on belong to the tail, every prompt's own
        whole = length // self.chunk
        growth = max_new_tokens // self.chunk + 2
        pieces = [piece for b, list_ in enumerate(edits) for piece in self._pieces(b, list_, shared)]
        counts = np.bincount([p.prompt for p in pieces], [p.end - p.first for p in pieces], len(edits)).astype(int)
        size = int(counts.max(initial=0)) + whole - shared + growth
        memory.overlay(len(edits), shared, size)
        with self.engine._evaluating():
            self._encode_pieces(pieces, edits)
            return self._finish(edits, length, shared, counts, max_new_tokens, vocab_size)

    # ------------------------------------------------------------------------------------------------------------

    def _pieces(self, prompt: int, edits: Sequence[Edit], shared: int) -> list[_Piece]:
        """Chunks before ``shared`` that the edits change, neighbouring ones joined."""
        pieces: list[_Piece] = []
        for start, tokens in sorted(edits, key=lambda edit: edit[0]):
            first = start // self.chunk
            end = min(shared, (start + len(tokens) - 1 + self.reach) // self.chunk + 1)
            if first >= end:
                continue
            if pieces and first <= pieces[-1].end:
                pieces[-1].end = max(end, pieces[-1].end)
            else:
                pieces.append(_Piece(prompt, first, end))
        return pieces

    def _text(self, edits: Sequence[Edit], start: int, end: int) -> np.ndarray:
        """Tokens start .. end - 1 of a prompt."""
        text = self.tokens[start:end].copy()
        for position, tokens in edits:
            low, high = max(start, position), min(end, position + len(tokens))
            if low < high:
                text[low - start : high - start] = tokens[low - position : high - position]
        return text

    def _encode_pieces(self, pieces: list[_Piece], edits: Sequence[Sequence[Edit]]) -> None:
        """Run the lower decoder and the encoder over the changed places, those of like length together."""
        memory, encoder, device = self.memory, self.engine.upper[0].encoder, self.engine.device
        assert memory is not None and encoder is not None
        used = [0] * len(edits)
        warm = -(-self.reach // self.chunk) * self.chunk
        spans = [(max(0, p.first * self.chunk - warm), p.end * self.chunk, p) for p in pieces]
        grain = self.tail // 2
        by_length: dict[int, list[tuple[int, int, _Piece]]] = {}
        for span in spans:
            by_length.setdefault(-(-(span[1] - span[0]) // grain) * grain, []).append(span)
        for padded, group in sorted(by_length.items()):
            rows = max(1, _TOKENS[device.type] // padded)
            for at in range(0, len(group), rows):
                part = group[at : at + rows]
                block = np.zeros((len(part), padded), dtype=np.int64)
                for row, (start, end, piece) in enumerate(part):
                    block[row, : end - start] = self._text(edits[piece.prompt], start, end)
                hidden = self._lower(torch.from_numpy(block).to(device), {})
                kept: list[Tensor] = []
                prompts: list[int] = []
                slots: list[int] = []
                numbers: list[int] = []
                for row, (start, end, piece) in enumerate(part):
                    count = piece.end - piece.first
                    kept.append(hidden[piece.first * self.chunk - start : end - start, row])
                    prompts += [piece.prompt] * count
                    slots += range(used[piece.prompt], used[piece.prompt] + count)
                    numbers += range(piece.first, piece.end)
                    used[piece.prompt] += count
                whose, place, number = (torch.tensor(x, device=device) for x in (prompts, slots, numbers))
                new = encoder(torch.cat(kept)[:, None], number[None])
                memory.put(whose, place, number, new)

    def _finish(
        self,
        edits: Sequence[Sequence[Edit]],
        length: int,
        shared: int,
        counts: np.ndarray,
        max_new_tokens: int,
        vocab_size: int,
    ) -> np.ndarray:
        """The tails through both decoders, then greedy decoding of all prompts together."""
        engine, memory, device = self.engine, self.memory, self.engine.device
        encoder = engine.upper[0].encoder
        assert memory is not None and encoder is not None
        start = max(0, length - self.tail)
        halos: dict[int, KeysAndValues] = {}
        hidden = self._lower_tails(edits, start, length, halos)
        slot = torch.from_numpy(counts).to(device)
        everyone = torch.arange(len(edits), device=device)

        def add(first: int, lower: Tensor) -> None:
            """Encode chunks first .. of every prompt from lower outputs (n * S, B, hidden)."""
            count = lower.shape[0] // self.chunk
            if not count:
                return
            ahead = torch.arange(count, device=device)
            memory.put(
                everyone.repeat_interleave(count),
                (slot[:, None] + ahead).flatten(),
                (first + ahead).repeat(len(edits)),
                encoder(lower, (first + ahead)[None]),
            )
            slot.add_(count)

        whole = length // self.chunk
        add(shared, hidden[shared * self.chunk - start : whole * self.chunk - start])
        pending = hidden[whole * self.chunk - start :]
        upper_start = max(0, length - self.upper_length)
        output = self._through(engine.upper, hidden[upper_start - start :], halos, memory, upper_start, last_only=True)
        answers = []
        for step in range(max_new_tokens):
            tokens = engine._next_logits(output)[:, :vocab_size].argmax(-1)
            answers.append(tokens)
            if step + 1 == max_new_tokens:
                break
            lower = self._lower(tokens[:, None], halos)
            pending = torch.cat((pending, lower))
            if pending.shape[0] == self.chunk:
                add(whole, pending)
                whole, pending = whole + 1, pending[:0]
            output = self._through(engine.upper, lower, halos, memory, length + step)
        return torch.stack(answers, 1).cpu().numpy()

    def _lower_tails(
        self, edits: Sequence[Sequence[Edit]], start: int, length: int, halos: dict[int, KeysAndValues]
    ) -> Tensor:
        """Lower outputs (n, B, hidden) of tokens start .. length - 1 of every prompt. What all begin with alike, nearly
        everything where they differ in their questions, is computed once.
        """
        tails = np.stack([self._text(list_, start, length) for list_ in edits])
        differ = np.flatnonzero((tails != tails[0]).any(0))
        alike = min(int(differ[0]) if differ.size else length, tails.shape[1] - 1) // _GRAIN * _GRAIN
        tokens = torch.from_numpy(tails).to(self.engine.device)
        if len(edits) == 1 or not alike:
            return self._lower(tokens, halos)
        once = self._lower(tokens[:1, :alike], halos)
        for number, (k, v) in halos.items():
            halos[number] = (k.expand(-1, len(edits), -1, -1), v.expand(-1, len(edits), -1, -1))
        return torch.cat((once.expand(-1, len(edits), -1), self._lower(tokens[:, alike:], halos)))

    def _lower(self, tokens: Tensor, halos: dict[int, KeysAndValues]) -> Tensor:
        """tokens (B, n) after those of ``halos`` (updated) -> lower outputs (n, B, hidden)."""
        return self._through(self.engine.lower, self.model.embed(tokens), halos, None, 0)

    def _through(
        self,
        layers: list[DecoderLayer],
        hidden: Tensor,
        halos: dict[int, KeysAndValues],
        memory: SharedMemory | None,
        query_offset: int,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Layers over tokens query_offset .. of every prompt. last_only: only the last output is wanted, so each
        layer gets no more tokens than those above it can see."""
        if hidden.shape[0] + self.widest > self._angles.shape[0]:
            self._angles = self.model.rotary_pos_emb(hidden.shape[0] + self.widest)
        reach = sum(layer_window(layer, self.engine.settings) - 1 for layer in layers if layer.has_window)
        for layer in layers:
            if last_only and hidden.shape[0] > reach + 1:
                query_offset += hidden.shape[0] - reach - 1
                hidden = hidden[-reach - 1 :]
            hidden, keys_values = layer.mix(
                hidden, self._angles, memory=memory, halo=halos.get(layer.layer_number), query_offset=query_offset
            )
            if keys_values is not None:
                reach -= layer.window - 1
                halos[layer.layer_number] = next_halo(keys_values, layer.window)
        return hidden


def layer_window(layer: DecoderLayer, settings: dict[str, Any]) -> int:
    """Window of a layer under an engine's settings, in tokens."""
    window = settings["hsa_window" if layer.has_hsa else "window"]
    assert window is not None
    return window
