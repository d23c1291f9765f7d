"""Lanes: one global order of batches, whatever the number of readers.

The stream is N lanes. Lane l owns, in every domain, the positions l, l + N, l + 2N, ... of the endless row "seeded
permutation of epoch 0, of epoch 1, ...": each document of an epoch belongs to one lane, and small domains still serve
every lane. Where a sequence ends the document does not: its cursor (document, offset) stays and the rest follows when
the domain is drawn again, so nothing is lost at any context. The domain of the next piece is the one that is furthest
behind its share of tokens; with ``best_fit`` some documents of the domain wait, and the rest of a sequence gets the
longest that it holds whole. A lane's state is these few integers; a stage with another context, and a job with another
number of ranks, read on.

Legend: L context, n tokens of a piece.
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from data_pipeline.config import DEFAULT_TASKS, TASKS, DataConfig, SyntheticConfig
from data_pipeline.cursor import Cursor
from data_pipeline.errors import DataError
from data_pipeline.evidence import NONE
from data_pipeline.mix import Domain, merge_synthetic, mix_entries, open_mixes
from data_pipeline.packing import Packing
from data_pipeline.permutation import seed_key
from data_pipeline.synthetic import SampleTooShort, SyntheticSample, build_sample
from data_pipeline.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from data_pipeline.batch import PackedBatch

_FEWEST_WORDS = 64  # that `frequent_names` draws from


class _Lane:
    """One lane: its cursors, its mixing draw and its counters."""

    def __init__(self, number: int, stream: BatchStream) -> None:
        self.number, self._stream, self._inverse_weights = number, stream, stream._inverse_weights
        self.sequence = 0
        self.samples = 0
        self.cursors = [self._cursor(domain, None) for domain in stream._domains]
        self._others: dict[str, Any] = {}
        self.skipped: dict[str, int] = {}
        self._draw_from_start()
        key = seed_key(stream.seed, "rate", number)
        self._phase = key / 2.0**64

    def _cursor(self, domain: Domain, saved: dict[str, Any] | None) -> Cursor:
        saved = saved or {"document": 0, "offset": 0}
        return Cursor(domain, self.number, self._stream.lanes, self._stream._buffer_size, saved)

    def _draw_from_start(self) -> None:
        """A new mix: random phases of up to one sequence, so that lanes do not draw the same domain in step."""
        rng = np.random.default_rng(seed_key(self._stream.seed, "mix", self._stream._mix_id, self.number))
        self._spend([int(u * self._stream.context) for u in rng.random(len(self.cursors))])

    def _spend(self, spent: list[int]) -> None:
        """Tokens drawn from each domain, and the same divided by its weight: the least is due."""
        self.spent = spent
        self._due = [n * inverse for n, inverse in zip(spent, self._inverse_weights, strict=True)]

    def state(self) -> dict[str, Any]:
        domains = dict(self._others)
        for cursor in self.cursors:
            domains[cursor.domain.name] = cursor.state()
        state = {
            "seed": self._stream.seed,
            "lanes": self._stream.lanes,
            "sequence": self.sequence,
            "samples": self.samples,
            "domains": domains,
            "mix": {"id": self._stream._mix_id, "spent": list(self.spent)},
        }
        if self.skipped:
            state["skipped"] = dict(self.skipped)
        return state

    def load(self, state: dict[str, Any]) -> None:
        stream = self._stream
        for name, value in (("seed", stream.seed), ("lanes", stream.lanes)):
            if state[name] != value:
                raise DataError(
                    f"the saved data position was made with {name} {state[name]}, the run has {value}; "
                    f"{name} must stay the same for the whole run"
                )
        self.sequence, self.samples = int(state["sequence"]), int(state["samples"])
        self._others = copy.deepcopy(state["domains"])
        for i, domain in enumerate(stream._domains):
            saved = self._others.pop(domain.name, {"data": domain.identity, "document": 0, "offset": 0})
            if saved["data"] != domain.identity:
                raise DataError(
                    f"domain {domain.name} in {domain.shards.path} is not the data of the saved position; restore the "
                    "old shards, or give the mix entry another name to start it from the beginning"
                )
            self.cursors[i] = self._cursor(domain, saved)
        self.skipped = dict(state.get("skipped", {}))
        if state["mix"]["id"] == stream._mix_id:
            self._spend([int(s) for s in state["mix"]["spent"]])
        else:
            self._draw_from_start()

    def take(self, limit: int, fit: bool = False) -> tuple[int, np.ndarray, int]:
        """(domain, 1..limit tokens, next token or -1) from the domain furthest behind its share of tokens that may
        still be read; ``fit``: a whole document if one fits."""
        due, failed = self._due, 0
        while True:
            lowest = min(due)
            best = due.index(lowest)
            cursor = self.cursors[best]
            try:
                piece = cursor.take(limit, fit)
            except DataError as error:
                if not self._stream._skip or not cursor.reading:
                    raise
                self._count_skipped(cursor.domain, cursor.skip(), error)
                failed += 1
                if failed > cursor.domain.documents:
                    raise DataError(f"no document of domain {cursor.domain.name} can be read: {error}") from error
                continue
            if piece is None:
                if lowest == math.inf:
                    raise DataError(
                        f"lane {self.number} has read max_epochs of every domain of the mix; raise max_epochs, add "
                        "data, or end the stage earlier"
                    )
                due[best] = math.inf
                continue
            self.spent[best] = spent = self.spent[best] + len(piece[0])
            due[best] = spent * self._inverse_weights[best]
            return best, *piece

    def _count_skipped(self, domain: Domain, row: int, error: DataError) -> None:
        """Count a document that cannot be read, and name its shard once."""
        file = str(domain.shards.shard_files[int(domain.shards.index[row]["shard"])])
        self.skipped[file] = self.skipped.get(file, 0) + 1
        if self.skipped[file] == 1:
            print(f"hsa: lane {self.number} skips what it cannot read: {error}", file=sys.stderr, flush=True)

    def _haystack(self, n: int) -> np.ndarray:
        out = np.empty(n, dtype=np.int64)
        position = 0
        while position < n:
            _, tokens, _ = self.take(n - position)
            out[position : position + len(tokens)] = tokens
            position += len(tokens)
        if n and int(out.max()) >= self._stream._vocab_size:
            self._stream._refuse_token()
        return out.astype(np.int32)

    def fill(self, out: Packing, start: int) -> None:
        """Write the lane's next sequence; ``start`` is its first position in the batch."""
        rate, i = self._stream.synthetic.rate, self.sequence
        self.sequence += 1
        if rate and math.floor((i + 1) * rate + self._phase) > math.floor(i * rate + self._phase):
            self._fill_synthetic(out, start)
        else:
            self._fill_text(out, start)

    def _fill_text(self, out: Packing, start: int) -> None:
        chunk, tokens, take = self._stream.chunk_size, out.tokens, self.take
        position, number, limit = start, 0, start + self._stream.context
        while position < limit:
            domain, piece, after = take(limit - position, number > 0)
            end = position + len(piece)
            stop = end + -end % chunk
            tokens[position:end] = piece
            out.add(number, domain, stop - position)
            if after < 0:
                out.end(end - 1, stop)
            position, number = stop, number + 1
        out.close_row(after)

    def _fill_synthetic(self, out: Packing, start: int) -> None:
        stream = self._stream
        options, context, chunk = stream.synthetic, stream.context, stream.chunk_size
        position = number = 0
        while position < context:
            rng = np.random.Generator(
                np.random.Philox(key=[seed_key(stream.seed, "synthetic"), self.number], counter=[0, 0, 0, self.samples])
            )
            self.samples += 1
            length = context - position
            if options.min_length is not None:
                low = -(-options.min_length // chunk)
                drawn = chunk * math.floor(math.exp(rng.uniform(math.log(low), math.log(context // chunk + 1))))
                if length - drawn >= low * chunk:
                    length = drawn
            sample = self._sample(rng, length)
            first, end = start + position, start + position + length
            out.tokens[first:end] = sample.tokens
            answer = options.copy_weight if sample.kind == "copy" else options.answer_weight
            out.weights[first : end - 1] = np.where(
                sample.answer_mask[1:], answer, np.where(sample.text_mask[1:], options.text_weight, 0.0)
            )
            said = sample.evidence[1:]
            out.evidence[first : end - 1] = np.where(said == NONE, NONE, position + said)
            out.add(number, len(stream._domains) + TASKS.index(sample.kind), length)
            out.end(end - 1, end)
            position, number = position + length, number + 1
        out.close_row(-1)

    def _sample(self, rng: np.random.Generator, length: int) -> SyntheticSample:
        stream = self._stream
        for _ in range(100):  # what does not fit a short sample is drawn again
            task = stream._tasks[int(np.searchsorted(stream._task_edges, rng.random(), side="right"))]
            try:
                return build_sample(
                    task,
                    rng,
                    stream.tokenizer,
                    self._haystack,
                    length,
                    chunk_size=stream.chunk_size,
                    **stream._task_options,
                )
            except SampleTooShort:
                continue
        raise DataError(
            f"no synthetic task fits into {length} tokens; raise data.synthetic.min_length or the stage's context"
        )


class BatchStream:
    """The batches of some lanes. Made by :func:`open_stream`; ``domain_names`` names the ids in
    ``PackedBatch.domains``."""

    def __init__(
        self,
        data: DataConfig,
        *,
        lanes: int,
        lane_ids: Sequence[int],
        batch: int,
        context: int,
        chunk_size: int,
        seed: int,
        mix: str | None = None,
        synthetic: SyntheticConfig,
    ) -> None:
        self._arguments = {
            "data": data,
            "lanes": lanes,
            "lane_ids": list(lane_ids),
            "batch": batch,
            "context": context,
            "chunk_size": chunk_size,
            "seed": seed,
            "mix": mix,
            "synthetic": synthetic,
        }
        _check_sizes(lanes, lane_ids, batch, context, chunk_size)
        self.lanes, self.seed, self.context, self.chunk_size = lanes, seed, context, chunk_size
        self.lane_ids = sorted(lane_ids)
        self.per_lane = batch // lanes
        self.synthetic = synthetic
        self.tokenizer: Tokenizer = load_tokenizer(data.tokenizer)
        opened = open_mixes(data, self.tokenizer)
        entries = mix_entries(data, mix)
        self._domains = [Domain(entry, opened[entry.path], seed) for entry in entries]
        self._inverse_weights = [1.0 / d.weight for d in self._domains]
        self._vocab_size = min(d.shards.vocab_size for d in self._domains)
        self._mix_id = f"{seed_key(*[(d.name, d.weight, d.identity) for d in self._domains]):016x}"
        self.domain_names = [d.name for d in self._domains] + list(TASKS)
        if data.packing not in ("split", "best_fit") or data.packing_buffer < 1:
            raise DataError(
                f"data.packing must be split or best_fit and data.packing_buffer at least 1, not {data.packing} and "
                f"{data.packing_buffer}"
            )
        if data.unreadable not in ("stop", "skip"):
            raise DataError(f"data.unreadable must be stop or skip, not {data.unreadable}")
        if data.prefetch < 0 or data.readers < 1:
            raise DataError(
                f"data.prefetch must be 0 or more and data.readers at least 1, not {data.prefetch} and {data.readers}; "
                "prefetch 0 reads without a process of its own"
            )
        self._buffer_size = data.packing_buffer if data.packing == "best_fit" else 0
        self._skip = data.unreadable == "skip"
        self._prepare_synthetic()
        self._lanes = [_Lane(number, self) for number in self.lane_ids]

    def _prepare_synthetic(self) -> None:
        """Check the options and make one sample of every task now, not in the middle of the run."""
        options = self.synthetic
        where = "data.synthetic"
        if not 0.0 <= options.rate <= 1.0:
            raise DataError(f"{where}.rate must be between 0 and 1, not {options.rate}")
        frequencies = dict(options.tasks) or DEFAULT_TASKS
        unknown = sorted(set(frequencies) - set(TASKS))
        if unknown:
            raise DataError(f"{where}.tasks: unknown task {unknown[0]!r}; choose from {', '.join(TASKS)}")
        shares = np.array([float(frequencies.get(task, 0.0)) for task in TASKS])
        if (shares < 0).any() or (options.rate > 0 and shares.sum() <= 0):
            raise DataError(f"{where}.tasks: the frequencies must not be negative and not all be 0")
        if options.min_length is not None and not 8 <= options.min_length <= self.context:
            raise DataError(
                f"{where}.min_length must be between 8 and the context {self.context}, not {options.min_length}"
            )
        self._check_frequent_names(f"{where}.frequent_names")
        self._check_evidence(where)
        self._tasks = [task for task, share in zip(TASKS, shares, strict=True) if share > 0]
        self._task_edges = np.cumsum(shares[shares > 0] / max(shares.sum(), 1e-30))[:-1]
        self._task_options = {
            name: getattr(options, name)
            for name in ("templates", "digits", "keys", "queries", "hops", "copy_random", "frequent_names")
        }
        if options.rate > 0:
            for task in self._tasks:
                self._try(task, self.context)
            if options.min_length is not None:
                self._check_shortest(-(-options.min_length // self.chunk_size) * self.chunk_size)

    def _check_frequent_names(self, where: str) -> None:
        share, templates = self.synthetic.frequent_names, self.synthetic.templates
        if not 0.0 <= share <= 1.0:
            raise DataError(f"{where} must be between 0 and 1, not {share}")
        if share and templates != "wide":
            raise DataError(f"{where}: only templates wide can have them, not {templates}; leave it out")
        words = len(self.tokenizer.frequent_words)
        if share and words < _FEWEST_WORDS:
            raise DataError(
                f"{where}: {words} words of {self.tokenizer.path} are one token, and {_FEWEST_WORDS} are needed; leave "
                "it out or take a larger vocabulary"
            )

    def _check_evidence(self, where: str) -> None:
        options = self.synthetic
        if not 0.0 <= options.evidence_weight < math.inf:
            raise DataError(f"{where}.evidence_weight must be 0 or more, not {options.evidence_weight}")
        if options.evidence_context is not None and options.evidence_context < self.context:
            raise DataError(
                f"{where}.evidence_context must be at least the context {self.context}, not "
                f"{options.evidence_context}; leave it out to ask for no more than the context"
            )

    def _try(self, task: str, length: int) -> None:
        rng = np.random.default_rng(0)

        def blank(n: int) -> np.ndarray:
            return np.zeros(n, dtype=np.int32)

        build_sample(task, rng, self.tokenizer, blank, length, chunk_size=self.chunk_size, **self._task_options)

    def _check_shortest(self, length: int) -> None:
        """Short samples hold the tasks that fit; one must."""
        problem: SampleTooShort | None = None
        for task in self._tasks:
            try:
                return self._try(task, length)
            except SampleTooShort as error:
                problem = error
        raise DataError(f"data.synthetic.min_length is too small for every task: {problem}")

    def next_arrays(self) -> dict[str, np.ndarray]:
        """The next batch as NumPy arrays (see PackedBatch for names, shapes and dtypes)."""
        packing = Packing(
            len(self._lanes) * self.per_lane, self.context, self.tokenizer.pad_id, self.synthetic.text_weight
        )
        start = 0
        for lane in self._lanes:
            for _ in range(self.per_lane):
                lane.fill(packing, start)
                start += self.context
        if int(packing.tokens.max()) >= self._vocab_size:
            self._refuse_token()
        return packing.arrays()

    def _refuse_token(self) -> NoReturn:
        """Name the shard of the token outside the vocabulary: it was read a moment ago."""
        for count in itertools.count():
            rows = [(c.domain.shards, c.row_back(count)) for lane in self._lanes for c in lane.cursors]
            for shards, row in rows:
                if row is not None:
                    shards.check_tokens(row)
            assert any(row is not None for _, row in rows), "a token outside the vocabulary that no document holds"
        raise AssertionError

    def next_batch(self) -> PackedBatch:
        """The next batch of these lanes: (len(lane_ids) * batch / lanes, context), lanes in ascending order."""
        from data_pipeline.batch import PackedBatch

        return PackedBatch.from_arrays(self.next_arrays())

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """``{lane id: position after the last batch}``, JSON-able. Join the dicts of all ranks for a checkpoint."""
        return {str(lane.number): lane.state() for lane in self._lanes}

    def load_state_dict(self, state: dict[Any, dict[str, Any]]) -> None:
        """Go to a position; ``state`` may hold more lanes than these. DataError when one is missing or of other
        data."""
        by_number = {int(number): value for number, value in state.items()}
        for lane in self._lanes:
            if lane.number not in by_number:
                raise DataError(
                    f"the saved data position has no lane {lane.number}; it was made with other lanes, and the number "
                    "of lanes must stay the same for the whole run"
                )
            lane.load(by_number[lane.number])

    def epochs(self, state: dict[str, dict[str, Any]] | None = None) -> dict[str, float]:
        """Epochs of every domain finished at ``state`` (now), by the documents that these lanes have completed."""
        state = self.state_dict() if state is None else state
        result = {}
        for domain in self._domains:
            done = sum(lane["domains"][domain.name]["document"] for lane in state.values())
            result[domain.name] = done * self.lanes / len(state) / domain.documents
        return result

    def skipped(self, state: dict[str, dict[str, Any]] | None = None) -> dict[str, int]:
        """Documents that these lanes could not read and skipped, by shard file."""
        state = self.state_dict() if state is None else state
        counts: dict[str, int] = {}
        for lane in state.values():
            for file, documents in lane.get("skipped", {}).items():
                counts[file] = counts.get(file, 0) + documents
        return counts

    def close(self) -> None:
        """Close the shards."""
        for domain in self._domains:
            domain.shards.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"arguments": self._arguments, "state": self.state_dict()}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__init__(**saved["arguments"])  # type: ignore[misc]
        self.load_state_dict(saved["state"])


def open_stream(
    data: DataConfig,
    *,
    lanes: int,
    lane_ids: Sequence[int],
    batch: int,
    context: int,
    chunk_size: int,
    seed: int,
    mix: str | None = None,
    synthetic: SyntheticConfig | dict[str, Any] | None = None,
) -> BatchStream:
    """Open the mix and check everything that can be checked without reading the shards.

    data: a DataConfig, or the OmegaConf node of one. lanes: N. lane_ids: the lanes read here (rank r of R reads those
    congruent to r). batch: GLOBAL batch in sequences, a multiple of N. context: tokens per sequence. mix: name in
    ``data.mixes``; None is ``data.mix``. synthetic: replaces ``data.synthetic``, or some of its fields (a dict).

    Raises DataError for impossible sizes, missing, truncated or foreign shards of ANY mix of the recipe, a tokenizer
    that did not make the shards, and synthetic tasks that do not fit into the context.
    """
    if not isinstance(data, DataConfig):
        from omegaconf import OmegaConf

        data = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), data))  # type: ignore[assignment]
    synthetic = merge_synthetic(data.synthetic, synthetic)
    return BatchStream(
        data,
        lanes=lanes,
        lane_ids=lane_ids,
        batch=batch,
        context=context,
        chunk_size=chunk_size,
        seed=seed,
        mix=mix,
        synthetic=synthetic,
    )


def _check_sizes(lanes: int, lane_ids: Sequence[int], batch: int, context: int, chunk_size: int) -> None:
    if lanes < 1 or batch < lanes or batch % lanes:
        near = max(1, round(batch / max(lanes, 1))) * max(lanes, 1)
        raise DataError(
            f"a batch of {batch} sequences cannot be shared by {lanes} lanes; use a multiple of {lanes}, such as {near}"
        )
    if not lane_ids or len(set(lane_ids)) != len(lane_ids) or not all(0 <= i < lanes for i in lane_ids):
        raise DataError(
            f"lane ids {list(lane_ids)} are not different numbers below {lanes}; data.lanes must be a multiple of the "
            "data-parallel size"
        )
    if context < chunk_size or context % chunk_size:
        raise DataError(f"a context of {context} tokens is not a multiple of the chunk size {chunk_size}")
