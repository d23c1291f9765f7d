"""Reading a long prompt and continuing it: segment by segment, with state of bounded size besides the context memory.

Why a prompt costs linear time, exactly. HSA layers read only the context memory, which is made from the lower decoder's
output. The lower decoder is sliding-window attention, so it can be run segment by segment with the last `window - 1`
keys and values of each layer. The upper decoder's windows reach back at most sum(window - 1) tokens in all, so for the
next token only that last stretch of the prompt has to pass the upper decoder at all. `full_prefill` runs it over
everything, for comparison.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.layers import DecoderLayer, KeysAndValues
from parallel.memory import ContextMemory
from pretrain.model import HSAModel


class GrowingMemory:
    """Context memory that chunks are appended to; buffers double, so appending costs constant time on average."""

    def __init__(self) -> None:
        self.chunks = 0
        self._buffers: list[Tensor] = []
        self._chunk_size = 0

    def append(self, new: ContextMemory) -> None:
        parts = [new.k, new.v, new.landmarks]
        if not self._buffers:
            self._chunk_size = new.k.shape[1] // new.chunks
            self._buffers = [part.new_empty(part.shape[0], 0, *part.shape[2:]) for part in parts]
        needed = self.chunks + new.chunks
        capacity = self._buffers[2].shape[1]
        for index, part in enumerate(parts):
            per_chunk = part.shape[1] // new.chunks
            if needed > capacity:
                old = self._buffers[index]
                grown = old.new_empty(old.shape[0], max(needed, 2 * capacity) * per_chunk, *old.shape[2:])
                grown[:, : self.chunks * per_chunk] = old[:, : self.chunks * per_chunk]
                self._buffers[index] = grown
            self._buffers[index][:, self.chunks * per_chunk : needed * per_chunk] = part
        self.chunks = needed

    def view(self) -> ContextMemory | None:
        """The chunks appended so far, or None before the first."""
        if not self.chunks:
            return None
        k, v, landmarks = self._buffers
        tokens = self.chunks * self._chunk_size
        return ContextMemory(k=k[:, :tokens], v=v[:, :tokens], landmarks=landmarks[:, : self.chunks])


class InferenceEngine:
    """Streams tokens through a model.

    window, hsa_window in tokens; top_k in chunks (None: all visible); segment: tokens per forward pass while a prompt
    is read. All sequences of a batch have the same length.
    """

    def __init__(
        self,
        model: HSAModel,
        *,
        window: int,
        hsa_window: int,
        top_k: int | None,
        segment: int = 2048,
        full_prefill: bool = False,
    ) -> None:
        if segment < 1:
            raise ValueError(f"segment must be at least one token, is {segment}")
        self.model = model
        self.settings = {"window": window, "hsa_window": hsa_window, "top_k": top_k}
        self.segment = segment
        self.full_prefill = full_prefill
        layers = list(model.decoder.layers)
        first_hsa = next(i for i, layer in enumerate(layers) if layer.has_hsa)
        self.lower: list[DecoderLayer] = layers[:first_hsa]
        self.upper: list[DecoderLayer] = layers[first_hsa:]
        self.device = next(model.parameters()).device
        windows = [hsa_window if layer.has_hsa else window for layer in self.upper if layer.has_window]
        self.receptive_field = 1 + sum(size - 1 for size in windows)
        # Only differences of positions matter inside a window, so angles are counted from the left end of the halo:
        # they stay small however long the text is (an absolute position of 16M would have no fp32 precision left).
        self._angles = model.rotary_pos_emb(segment + max(window, hsa_window))
        self.reset()

    def reset(self) -> None:
        """Forget everything read so far."""
        self.position = 0  # tokens that passed the lower decoder
        self._halos: dict[int, KeysAndValues] = {}
        self._pending: Tensor | None = None  # lower output of the chunk that is not complete yet (n, B, hidden)
        self._memory = GrowingMemory()

    # -------------------------------------------------------------------------------------------------------- public
    # calls

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        """tokens (B, L) int64 -> logits (B, V) float32 of the token after them."""
        if tokens.shape[1] < 1:
            raise ValueError("an empty prompt has no next token: give at least one token")
        with self._evaluating():
            tail: list[Tensor] = []
            for part in tokens.to(self.device).split(self.segment, dim=1):
                hidden = self._read(part)
                if self.full_prefill:
                    tail = [self._upper(hidden, self.position - hidden.shape[0])]
                    continue
                tail.append(hidden)
                while sum(t.shape[0] for t in tail[1:]) >= self.receptive_field:
                    tail.pop(0)
            if self.full_prefill:
                return self._next_logits(tail[0])
            stretch = torch.cat(tail)[-self.receptive_field :]
            start = self.position - stretch.shape[0]
            for part in stretch.split(self.segment):
                output = self._upper(part, start)
                start += part.shape[0]
            return self._next_logits(output)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """One more token per sequence, tokens (B,) int64 -> logits (B, V) float32 of the one after it."""
        with self._evaluating():
            hidden = self._read(tokens.to(self.device)[:, None])
            return self._next_logits(self._upper(hidden, self.position - 1))

    @torch.no_grad()
    def score(self, tokens: Tensor) -> Tensor:
        """Negative log-likelihood in nats of tokens[:, 1:], given all before them: (B, L) int64 -> (B, L - 1) float32.

        Starts from an empty state and leaves one behind.
        """
        self.reset()
        losses = []
        tokens = tokens.to(self.device)
        with self._evaluating():
            for start in range(0, tokens.shape[1] - 1, self.segment):
                part = tokens[:, start : min(start + self.segment, tokens.shape[1] - 1)]
                output = self._upper(self._read(part), start)
                logits = self.model.logits(self.model.decoder.final_layernorm(output)).float()
                labels = tokens[:, start + 1 : start + 1 + part.shape[1]].transpose(0, 1)
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
                losses.append(loss.view(labels.shape).transpose(0, 1))
        self.reset()
        return torch.cat(losses, dim=1)

    # -------------------------------------------------------------------------------------------------------------
    # insides

    def _evaluating(self) -> _Evaluating:
        return _Evaluating(self.model, self.settings)

    def _read(self, tokens: Tensor) -> Tensor:
        """Embedding, lower decoder and, for every chunk they complete, the encoder. Returns the lower output (L, B,
        hidden).
        """
        hidden = self._layers(self.lower, self.model.embed(tokens), memory=None, query_offset=self.position)
        self.position += tokens.shape[1]
        pending = hidden if self._pending is None else torch.cat((self._pending, hidden))
        chunk = self.model.model.chunk_size
        complete = pending.shape[0] // chunk * chunk
        if complete:
            encoder = self.upper[0].encoder
            assert encoder is not None
            self._memory.append(encoder(pending[:complete]))
        self._pending = pending[complete:]
        return hidden

    def _upper(self, hidden: Tensor, query_offset: int) -> Tensor:
        return self._layers(self.upper, hidden, memory=self._memory.view(), query_offset=query_offset)

    def _layers(
        self, layers: list[DecoderLayer], hidden: Tensor, *, memory: ContextMemory | None, query_offset: int
    ) -> Tensor:
        for layer in layers:
            number = layer.layer_number
            hidden, keys_values = layer.mix(
                hidden, self._angles, memory=memory, halo=self._halos.get(number), query_offset=query_offset
            )
            if keys_values is not None:
                keep = layer.window - 1
                self._halos[number] = tuple(x[x.shape[0] - min(keep, x.shape[0]) :] for x in keys_values)  # type: ignore[assignment]
        return hidden

    def _next_logits(self, hidden: Tensor) -> Tensor:
        last = self.model.decoder.final_layernorm(hidden[-1:])
        return self.model.logits(last)[0].float()


class _Evaluating:
    """Evaluation mode and the engine's own schedule inside the block; what training had set, after it."""

    def __init__(self, model: HSAModel, settings: dict[str, int | None]) -> None:
        self.model, self.settings = model, settings

    def __enter__(self) -> None:
        schedule = self.model.schedule
        self.before = {"window": schedule.window, "hsa_window": schedule.hsa_window, "top_k": schedule.top_k}
        self.training = self.model.training
        self.model.eval()
        self.model.set_schedule(**self.settings)  # type: ignore[arg-type]

    def __exit__(self, *_: object) -> None:
        self.model.train(self.training)
        self.model.set_schedule(**self.before)  # type: ignore[arg-type]
