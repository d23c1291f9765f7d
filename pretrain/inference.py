"""Reading a long prompt and continuing it: segment by segment, with state of bounded size besides the context memory.

Why a prompt costs linear time, exactly: docs/inference.md has the proof. HSA layers read only the context memory, which
is made from the lower decoder's output. The lower decoder is sliding-window attention, so it can be run segment by
segment with the last `window - 1` keys and values of each layer. The upper decoder's windows reach back at most
sum(window - 1) tokens in all, so for the next token only that last stretch of the prompt has to pass the upper decoder
at all. `full_prefill` runs it over everything, for comparison. A model without HSA is all lower decoder and leaves the
store empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from parallel.layers import DecoderLayer, KeysAndValues, next_halo
from parallel.memory import ContextMemory
from pretrain.context_store import ContextStore, Placement
from pretrain.decode_step import DecodeStep
from pretrain.model import HSAModel
from pretrain.prefill_graph import WORTH, Halos, SegmentGraph


@dataclass(frozen=True)
class Reading:
    """Sequences that were read up to the same position. Nothing in it is ever changed in place.

    rows: their numbers in the batch. position: tokens that passed the lower decoder. halos: by layer number, the last
    window - 1 keys (not rotated) and values, (n, B, Hkv, D). pending: lower output of the chunk that is not complete
    yet, (m, B, hidden).
    """

    rows: tuple[int, ...]
    position: int = 0
    halos: dict[int, KeysAndValues] = field(default_factory=dict)
    pending: Tensor | None = None

    def part(self, rows: Sequence[int]) -> Reading:
        """Some of its sequences."""
        if tuple(rows) == self.rows:
            return self
        where = [self.rows.index(row) for row in rows]
        halos = {number: (k[:, where], v[:, where]) for number, (k, v) in self.halos.items()}
        return Reading(tuple(rows), self.position, halos, None if self.pending is None else self.pending[:, where])


class InferenceEngine:
    """Streams tokens through a model.

    window, hsa_window in tokens; top_k in chunks (None: all visible); neighbours: so many of a token's best chunks
    bring the chunks beside them (`parallel.neighbours`); retrieval_temperature: what scores of chunks are divided by
    before their softmax; distance_decay: scores of chunks n > decay_from tokens back fall by distance_decay *
    ln(n / decay_from); segment: tokens of one sequence per forward pass while a prompt is read (None: 2048, on CUDA
    16384). memory: where the context memory's keys and values lie. frozen: nobody trains these weights while the engine
    lives; then mixtures of experts are computed without asking the device how many tokens each expert got, and on CUDA
    a decode step is one CUDA graph (not with the memory on the host, where the chosen chunks are fetched in between).
    """

    def __init__(
        self,
        model: HSAModel,
        *,
        window: int,
        hsa_window: int,
        top_k: int | None,
        neighbours: int = 0,
        retrieval_temperature: float = 1.0,
        distance_decay: float = 0.0,
        decay_from: int = 0,
        segment: int | None = None,
        full_prefill: bool = False,
        memory: Placement | None = None,
        frozen: bool = False,
    ) -> None:
        parameter = next(model.parameters())
        self.model = model
        self.device = parameter.device
        self.settings: dict[str, Any] = {
            "window": window,
            "hsa_window": hsa_window,
            "top_k": top_k,
            "neighbours": neighbours,
            "retrieval_temperature": retrieval_temperature,
            "distance_decay": distance_decay,
            "decay_from": decay_from,
        }
        self.segment = segment or (16384 if self.device.type == "cuda" else 2048)
        if self.segment < 1:
            raise ValueError(f"segment must be at least one token, is {segment}")
        if distance_decay and decay_from < 1:
            raise ValueError(f"distance_decay {distance_decay} needs decay_from, the tokens it begins at: {decay_from}")
        self.full_prefill = full_prefill
        self.frozen = frozen
        self.placement = memory or Placement()
        self.uses_graph = frozen and self.device.type == "cuda" and not self.placement.host
        layers = list(model.decoder.layers)
        first_hsa = model.model.first_hsa_layer
        self.lower: list[DecoderLayer] = layers[:first_hsa]
        self.upper: list[DecoderLayer] = layers[first_hsa:]
        windows = [hsa_window if layer.has_hsa else window for layer in self.upper if layer.has_window]
        self.receptive_field = 1 + sum(size - 1 for size in windows)
        # Only differences of positions matter inside a window, so angles are counted from the left end of the halo:
        # they stay small however long the text is (an absolute position of 16M would have no fp32 precision left).
        self._angles = model.rotary_pos_emb(self.segment + max(window, hsa_window))
        self.store = ContextStore(model.model, self.device, parameter.dtype, self.placement)
        self._step: DecodeStep | None = None
        self.graphs_segments = self.uses_graph and not model.model.num_experts  # experts' loads decide shapes
        self._segment: SegmentGraph | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything read so far; buffers stay."""
        self._readings: list[Reading] = []
        self._positions: list[int] | None = None  # of every sequence, while the decode step holds the state

    # -------------------------------------------------------------------------------------------------------- public
    # calls

    @property
    def positions(self) -> list[int]:
        """Tokens read so far, by sequence; empty before the first prompt."""
        if self._positions is not None:
            return list(self._positions)
        found = {row: reading.position for reading in self._readings for row in reading.rows}
        return [found[row] for row in sorted(found)]

    def chunks(self, tokens: int) -> int:
        """Chunks of the memory that so many tokens complete; 0 without HSA."""
        return tokens // self.model.model.chunk_size if self.upper else 0

    @torch.no_grad()
    def prefill(self, tokens: Tensor, lengths: Sequence[int] | None = None, *, padded_left: bool = False) -> Tensor:
        """tokens (B, L) int64 -> logits (B, V) float32 of the token after them.

        lengths: real tokens of every row, those behind them (before them: padded_left) being padding of any id; None:
        all L. Called again, it goes on where the sequences are.
        """
        batch, longest = tokens.shape
        lengths = [longest] * batch if lengths is None else [int(n) for n in lengths]
        if len(lengths) != batch or min(lengths, default=0) < 1 or max(lengths) > longest:
            raise ValueError(f"an empty prompt has no next token: {batch} rows of up to {longest}, lengths {lengths}")
        before = self.readings()
        if before and sum(len(reading.rows) for reading in before) != batch:
            raise ValueError(f"{len(self.positions)} sequences are being read, {batch} go on: reset first")
        readings = before or [Reading(tuple(range(batch)))]
        chunks = max(self.chunks(reading.position + lengths[row]) for reading in readings for row in reading.rows)
        self._reserve(batch, chunks + 8 + chunks // 64, keep=bool(before))
        tokens = tokens.to(self.device)
        logits: dict[int, Tensor] = {}
        after: list[Reading] = []
        with self._evaluating():
            for reading in readings:
                for length in sorted({lengths[row] for row in reading.rows}):
                    rows = [row for row in reading.rows if lengths[row] == length]
                    mine = tokens[rows, longest - length :] if padded_left else tokens[rows, :length]
                    read, found = self._read_prompt(reading.part(rows), mine)
                    after.append(read)
                    logits.update(zip(rows, found, strict=True))
        self._readings = after
        return torch.stack([logits[row] for row in range(batch)])

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """One more token per sequence, tokens (B,) int64 -> logits (B, V) float32 of the one after it."""
        with self._evaluating():
            step = self._enter_decoding()
            positions = self._positions
            assert positions is not None
            size = self.model.model.chunk_size
            self._reserve(len(positions), self.chunks(max(positions) + 1), keep=True)
            logits = step.run(tokens.to(self.device), graph=self.uses_graph).clone()
            positions[:] = [position + 1 for position in positions]
            full = [row for row, position in enumerate(positions) if position % size == 0]
            if full and self.upper:
                numbers = torch.tensor([[positions[row] // size - 1] for row in full], device=self.device)
                chunks = self._encode(step.pending[full].transpose(0, 1), numbers)
                for i, row in enumerate(full):
                    one = ContextMemory(chunks.k[i : i + 1], chunks.v[i : i + 1], chunks.landmarks[i : i + 1])
                    self.store.write(one, [row], positions[row] // size - 1)
            return logits

    def score(self, tokens: Tensor, last: int | None = None) -> Tensor:
        """Negative log-likelihood in nats of tokens[:, 1:], given all before them: (B, L) int64 -> (B, L - 1) float32.

        last: of so many tokens at the end only, (B, last); those before them are read as a prompt is, which costs less.
        Starts from an empty state and leaves one behind. Rows may be padded on the right: nothing sees padding.
        """
        return self.score_greedy(tokens, last)[0]

    @torch.no_grad()
    def score_greedy(self, tokens: Tensor, last: int | None = None) -> tuple[Tensor, Tensor]:
        """As `score`, and whether each token was the likeliest one, bool of the same shape."""
        length = tokens.shape[1]
        if last is not None and not 1 <= last < length:
            raise ValueError(f"of {length} tokens the last 1 to {length - 1} can be scored, not {last}")
        first = 0 if last is None else length - 1 - last  # whose output is the first to count
        begin = max(0, first - (self.receptive_field - 1))  # where the upper decoder has to begin for that
        self.reset()
        losses, likeliest = [], []
        tokens = tokens.to(self.device)
        reading = Reading(tuple(range(tokens.shape[0])))
        self._reserve(tokens.shape[0], self.chunks(length), keep=False)
        with self._evaluating():
            for start in range(0, length - 1, self.segment):
                part = tokens[:, start : min(start + self.segment, length - 1)]
                reading, hidden = self._read(reading, part)
                end, start = start + part.shape[1], max(start, begin)
                if start >= end:
                    continue
                reading, output = self._upper(reading, hidden[start - end :], start)
                start = max(start, first)
                if start >= end:
                    continue
                logits = self.model.logits(self.model.decoder.final_layernorm(output[start - end :])).float()
                labels = tokens[:, start + 1 : end + 1].transpose(0, 1)
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
                losses.append(loss.view(labels.shape).transpose(0, 1))
                likeliest.append((logits.argmax(-1) == labels).transpose(0, 1))
        self.reset()
        return torch.cat(losses, dim=1), torch.cat(likeliest, dim=1)

    def readings(self) -> list[Reading]:
        """The state as it is between prompts: give it to `rewind` to come back, as often as wanted, until `reset` or a
        longer memory has overwritten what was read before.
        """
        if self._positions is not None:
            assert self._step is not None
            by_position: dict[int, list[int]] = {}
            for row, position in enumerate(self._positions):
                by_position.setdefault(position, []).append(row)
            self._readings = []
            for position, rows in by_position.items():
                parts = [self._step.unload(row, position) for row in rows]
                halos = {
                    number: (
                        torch.cat([halo[number][0] for halo, _ in parts], 1),
                        torch.cat([halo[number][1] for halo, _ in parts], 1),
                    )
                    for number in parts[0][0]
                }
                pending = torch.cat([pending for _, pending in parts], 1)
                self._readings.append(Reading(tuple(rows), position, halos, pending))
            self._positions = None
        return list(self._readings)

    def rewind(self, readings: Sequence[Reading]) -> None:
        """Go back to an earlier `readings()`; chunks that came later are overwritten by what is read now."""
        self._positions = None
        self._readings = list(readings)

    # -------------------------------------------------------------------------------------------------------------
    # insides

    def _evaluating(self) -> _Evaluating:
        return _Evaluating(self.model, self.settings)

    def _reserve(self, batch: int, chunks: int, *, keep: bool) -> None:
        room = (self.store.batch, self.store.capacity)
        self.store.reserve(batch, chunks, keep=keep)
        if self._step is not None and room != (self.store.batch, self.store.capacity):
            self._step.forget_graph()

    def _enter_decoding(self) -> DecodeStep:
        if self._positions is None:
            positions = self.positions
            if not positions:
                raise ValueError("nothing was read yet: prefill comes before decode")
            if self._step is None or self._step.tokens.shape[0] != len(positions):
                settings = {n: self.settings[n] for n in ("window", "hsa_window", "top_k", "neighbours")}
                self._step = DecodeStep(self.model, self.store, len(positions), **settings, static_experts=self.frozen)
            for reading in self._readings:
                self._step.load(reading.rows, reading.position, reading.halos, reading.pending)
            self._positions, self._readings = positions, []
        assert self._step is not None
        return self._step

    def _read_prompt(self, reading: Reading, tokens: Tensor) -> tuple[Reading, Tensor]:
        """Tokens (B, L) of one reading's sequences -> the reading after them and logits (B, V)."""
        tail: list[Tensor] = []
        parts = list(tokens.split(self.segment, dim=1))
        while parts:
            alike = 0 if self.full_prefill else self._alike(reading, parts)
            if alike >= WORTH:
                reading, hidden = self._read_alike(reading, parts[:alike])
                parts, tail = parts[alike:], [hidden]
                continue
            reading, hidden = self._read(reading, parts.pop(0))
            if self.full_prefill:
                reading, output = self._upper(reading, hidden, reading.position - hidden.shape[0])
                tail = [output]
                continue
            tail.append(hidden)
            while sum(t.shape[0] for t in tail[1:]) >= self.receptive_field:
                tail.pop(0)
        if not self.full_prefill:
            stretch = torch.cat(tail)[-self.receptive_field :]
            tail.clear()
            start = reading.position - stretch.shape[0]
            for part in stretch.split(self.segment):
                reading, output = self._upper(reading, part, start)
                start += part.shape[0]
        return reading, self._next_logits(output)

    def _read(self, reading: Reading, tokens: Tensor) -> tuple[Reading, Tensor]:
        """Embedding, lower decoder and, for every chunk they complete, the encoder. Returns the lower output (L, B,
        hidden) as well.
        """
        start = reading.position
        hidden, halos = self._layers(self.lower, self.model.embed(tokens), reading.halos, None, start)
        if not self.upper:
            return Reading(reading.rows, start + tokens.shape[1], halos), hidden
        waiting = reading.pending
        pending = hidden if waiting is None or not waiting.shape[0] else torch.cat((waiting, hidden))
        chunk = self.model.model.chunk_size
        complete = pending.shape[0] // chunk * chunk
        if complete:
            first = start // chunk
            numbers = torch.arange(first, first + complete // chunk, device=self.device)[None]
            self.store.write(self._encode(pending[:complete], numbers), reading.rows, first)
        return Reading(reading.rows, start + tokens.shape[1], halos, pending[complete:].clone()), hidden

    def _alike(self, reading: Reading, parts: list[Tensor]) -> int:
        """How many of the next segments can be read in fixed buffers; 0 where this one cannot."""
        chunk, waiting = self.model.model.chunk_size, reading.pending
        whole = self.segment % chunk == 0 and waiting is not None and not waiting.shape[0]
        reach = bool(reading.halos) and all(
            reading.halos[layer.layer_number][0].shape[0] == layer.window - 1
            for layer in self.lower
            if layer.has_window
        )
        if not (self.graphs_segments and self.upper and whole and reach and self.segment >= self.receptive_field):
            return 0
        return len(parts) - (parts[-1].shape[1] < self.segment)

    def _read_alike(self, reading: Reading, parts: list[Tensor]) -> tuple[Reading, Tensor]:
        """As `_read` for whole segments one after the other; returns the lower output of the last `receptive_field`
        tokens.
        """
        chunk = self.model.model.chunk_size
        numbers = torch.arange(self.segment // chunk, device=self.device)[None]
        lower = [layer.layer_number for layer in self.lower if layer.has_window]
        halos = {number: reading.halos[number] for number in lower}
        graph = self._segment
        if graph is None or not graph.fits(parts[0]):
            graph = self._segment = SegmentGraph(self._work_alike, parts[0], numbers, halos)
        graph.load(halos)
        for part in parts:
            first = reading.position // chunk
            hidden, memory = graph.run(part, numbers + first)
            self.store.write(memory, reading.rows, first)
            reading = replace(reading, position=reading.position + self.segment)
        return replace(reading, halos={**reading.halos, **graph.halos()}), hidden[-self.receptive_field :].clone()

    def _work_alike(self, tokens: Tensor, numbers: Tensor, halos: Halos) -> tuple[Tensor, ContextMemory, Halos]:
        hidden, after = self._layers(self.lower, self.model.embed(tokens), dict(halos), None, 0)
        return hidden, self._encode(hidden, numbers), after

    def _encode(self, hidden: Tensor, numbers: Tensor) -> ContextMemory:
        encoder = self.upper[0].encoder
        assert encoder is not None
        return encoder(hidden, numbers)

    def _upper(self, reading: Reading, hidden: Tensor, query_offset: int) -> tuple[Reading, Tensor]:
        memory = self.store.view(reading.rows, self.chunks(reading.position))
        hidden, halos = self._layers(self.upper, hidden, reading.halos, memory, query_offset)
        return replace(reading, halos=halos), hidden

    def _layers(
        self,
        layers: list[DecoderLayer],
        hidden: Tensor,
        halos: dict[int, KeysAndValues],
        memory: ContextMemory | None,
        query_offset: int,
    ) -> tuple[Tensor, dict[int, KeysAndValues]]:
        halos = dict(halos)
        for layer in layers:
            number = layer.layer_number
            hidden, keys_values = layer.mix(
                hidden, self._angles, memory=memory, halo=halos.get(number), query_offset=query_offset
            )
            if keys_values is not None:
                halos[number] = next_halo(keys_values, layer.window)
        return hidden, halos

    def _next_logits(self, hidden: Tensor) -> Tensor:
        last = self.model.decoder.final_layernorm(hidden[-1:])
        return self.model.logits(last)[0].float()


class _Evaluating:
    """Evaluation mode and the engine's own schedule inside the block; what training had set, after it."""

    def __init__(self, model: HSAModel, settings: dict[str, Any]) -> None:
        self.model, self.settings = model, settings

    def __enter__(self) -> None:
        schedule = self.model.schedule
        self.before = {name: getattr(schedule, name) for name in self.settings}
        self.training = self.model.training
        if self.training:  # walking all modules for every token would cost more than the token
            self.model.eval()
        self.model.set_schedule(**self.settings)

    def __exit__(self, *_: object) -> None:
        if self.training:
            self.model.train()
        self.model.set_schedule(**self.before)
