"""Perplexity of held-out text by position, beside what a unigram model would reach.

Sequences do not overlap and the text is never repeated (a repeated text can be looked up, which would flatter a
retrieving model): a context longer than the text is left out and the result says so.

Contexts measured so are measured on different text, and text differs by more than contexts do. ``last`` compares them
on the same tokens: a few places of the text, each read behind every context.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from pretrain.errors import RecipeError
from pretrain.evaluation.decoding import Engine
from pretrain.evaluation.retrieval import TOKEN_BUDGET, Progress
from pretrain.evaluation.units import format_length

_Z95 = 1.959963984540054
# tokens whose losses are averaged before the spread is taken: neighbours are correlated, blocks nearly not
_BLOCK = 128


@dataclass(frozen=True)
class Mean:
    """Mean negative log-likelihood (nats per token) of ``n`` tokens with a 95 % interval; low = high = NaN below 2
    blocks.
    """

    n: int
    nll: float
    low: float
    high: float

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)


@dataclass(frozen=True)
class Bucket:
    """Predicted tokens at positions ``start`` (inclusive) to ``end`` (exclusive), 0 = first token of the sequence."""

    start: int
    end: int
    mean: Mean


@dataclass
class ContextPpl:
    """Perplexity with sequences of ``context`` tokens; ``difference``: its losses minus those of the same tokens in the
    reference context (with ``last`` only).
    """

    context: int
    sequences: int
    overall: Mean
    bits_per_byte: float
    buckets: list[Bucket]
    seconds: float
    difference: Mean | None = None


@dataclass
class PplResult:
    """All contexts, the unigram baseline (nats per token; None without counts), and what could not be measured and
    why. ``last``: tokens scored at the end of every sequence (None: all); ``reference``: the context that the others
    are compared with.
    """

    contexts: list[ContextPpl]
    unigram_nll: float | None
    text_tokens: int
    last: int | None = None
    reference: int | None = None
    left_out: dict[int, str] = field(default_factory=dict)

    def to_json(self) -> dict:
        """Plain JSON; NaN intervals become null."""
        unigram = (
            None if self.unigram_nll is None else {"nll": self.unigram_nll, "perplexity": math.exp(self.unigram_nll)}
        )
        return {
            "text_tokens": self.text_tokens,
            "last": self.last,
            "reference": self.reference,
            "unigram": unigram,
            "left_out": {str(context): why for context, why in self.left_out.items()},
            "contexts": [
                {
                    "context": item.context,
                    "sequences": item.sequences,
                    **_mean_json(item.overall),
                    "bits_per_byte": item.bits_per_byte,
                    "seconds": round(item.seconds, 3),
                    "difference": None if item.difference is None else _mean_json(item.difference),
                    "positions": [{"start": b.start, "end": b.end, **_mean_json(b.mean)} for b in item.buckets],
                }
                for item in self.contexts
            ],
        }


def _mean_json(mean: Mean) -> dict:
    numbers = {
        key: None if isinstance(value, float) and math.isnan(value) else value for key, value in asdict(mean).items()
    }
    return {**numbers, "perplexity": mean.perplexity}


def run_ppl(
    engine: Engine,
    tokenizer,
    text: np.ndarray,
    *,
    contexts: Sequence[int],
    sequences: int | None = None,
    last: int | None = None,
    reference: int | None = None,
    unigram_counts: np.ndarray | None = None,
    batch: int = 16,
    token_budget: int = TOKEN_BUDGET,
    progress: Progress | None = None,
) -> PplResult:
    """Score ``text`` (1-D held-out tokens) in sequences of each context.

    ``sequences`` limits how many (spread evenly over the text; None = all that fit). ``last``: only so many tokens at
    the end of every sequence, and sequences of all contexts end at the same places; contexts are then compared with
    ``reference`` (the shortest where that is not among them). ``unigram_counts`` (V,) are token counts of the training
    data. Raises RecipeError when not even the shortest context fits the text.
    """
    tokens = np.asarray(text).astype(np.int64, copy=False)
    if min(contexts) < 2:
        raise RecipeError("perplexity needs a context of at least 2 tokens")
    if last is not None and not 1 <= last < min(contexts):
        shortest = format_length(min(contexts))
        raise RecipeError(f"--last is {last}: sequences of {shortest} can score their last 1 to {min(contexts) - 1}")
    fitting = [context for context in contexts if context <= tokens.size]
    if not fitting:
        raise RecipeError(
            f"the held-out text has {tokens.size} tokens, less than the shortest context "
            f"{format_length(min(contexts))}: give a shorter --lengths or a longer text with data.held_out=PATH"
        )
    unigram = None if unigram_counts is None else unigram_nll(unigram_counts, tokens)
    result = PplResult([], unigram, int(tokens.size))
    result.left_out = {c: f"the held-out text has {tokens.size} tokens" for c in contexts if c not in fitting}
    if last is not None:
        result.last, result.reference = last, reference if reference in fitting else min(fitting)
        ends = sequence_ends(tokens.size, max(fitting), last, sequences)
    losses = {}
    for context in fitting:
        starts = sequence_starts(tokens.size, context, sequences) if last is None else [end - context for end in ends]
        measured, losses[context] = _score_context(
            engine, tokenizer, tokens, context, starts, last, batch, token_budget
        )
        result.contexts.append(measured)
        if progress:
            progress(
                f"ppl at {format_length(context)}: {measured.overall.perplexity:.3f} over {measured.overall.n} tokens, "
                f"{measured.seconds:.1f} s"
            )
    if result.reference is not None:
        for item in result.contexts:
            item.difference = mean_nll(losses[item.context] - losses[result.reference])
    return result


def sequence_starts(size: int, context: int, limit: int | None) -> list[int]:
    """First positions of non-overlapping sequences, spread evenly over ``size`` tokens when there are more than
    ``limit``.
    """
    fitting = size // context
    if limit is None or fitting <= limit:
        return [i * context for i in range(fitting)]
    return [(i * fitting // limit) * context for i in range(limit)]


def sequence_ends(size: int, longest: int, last: int, limit: int | None) -> list[int]:
    """Ends (exclusive) of sequences of up to ``longest`` tokens whose ``last`` ones do not overlap, spread evenly over
    the ``size`` tokens when there are more than ``limit``.
    """
    return [longest + start for start in sequence_starts(size - longest + last, last, limit)]


@torch.no_grad()
def _score_context(
    engine: Engine,
    tokenizer,
    tokens: np.ndarray,
    context: int,
    starts: list[int],
    last: int | None,
    batch: int,
    token_budget: int,
) -> tuple[ContextPpl, np.ndarray]:
    began = time.perf_counter()
    rows = max(1, min(batch, token_budget // context))
    scored = context - 1 if last is None else last
    nll = np.empty((len(starts), scored), dtype=np.float32)
    text_bytes = 0
    for at in range(0, len(starts), rows):
        chosen = starts[at : at + rows]
        block = np.stack([tokens[start : start + context] for start in chosen])
        engine.reset()
        nll[at : at + len(chosen)] = engine.score(torch.from_numpy(block), last).float().cpu().numpy()
        text_bytes += sum(len(tokenizer.decode(row[-scored:].tolist()).encode("utf-8")) for row in block)
    ranges = position_buckets(context) if last is None else [(context - last, context)]
    first = context - scored
    buckets = [Bucket(start, end, mean_nll(nll[:, start - first : end - first])) for start, end in ranges]
    measured = ContextPpl(
        context=context,
        sequences=len(starts),
        overall=mean_nll(nll),
        bits_per_byte=float(nll.sum(dtype=np.float64)) / math.log(2) / max(1, text_bytes),
        buckets=buckets,
        seconds=time.perf_counter() - began,
    )
    return measured, nll


def position_buckets(context: int) -> list[tuple[int, int]]:
    """[start, end) ranges over positions 1 to context - 1: up to 16, then two per octave (16, 24, 32, 48, 64, ...)."""
    edges, power = [1], 16
    while power < context:
        edges += [power, power + power // 2]
        power *= 2
    edges = [edge for edge in edges if edge < context] + [context]
    return list(zip(edges[:-1], edges[1:], strict=True))


def mean_nll(nll: np.ndarray) -> Mean:
    """Mean of (sequences, positions) losses; the interval comes from the spread of blocks of up to 128 neighbours."""
    sequences, width = nll.shape
    size = min(_BLOCK, width)
    whole = width // size * size
    blocks = nll[:, :whole].reshape(sequences, -1, size).mean(axis=2, dtype=np.float64).ravel()
    mean = float(nll.mean(dtype=np.float64))
    if blocks.size < 2:
        return Mean(nll.size, mean, math.nan, math.nan)
    half = _Z95 * float(blocks.std(ddof=1)) / math.sqrt(blocks.size)
    return Mean(nll.size, mean, mean - half, mean + half)


def unigram_nll(counts: np.ndarray, tokens: np.ndarray) -> float:
    """Mean nats per token of ``tokens`` under training counts (V,) with add-one smoothing: p(t) = (count[t] + 1) / (N
    + V).
    """
    counts = np.asarray(counts, dtype=np.float64)
    if tokens.size and int(tokens.max()) >= counts.size:
        raise RecipeError(
            f"token {int(tokens.max())} is outside the {counts.size} unigram counts: another tokenizer made them"
        )
    log_p = np.log(counts + 1) - math.log(counts.sum() + counts.size)
    return float(-log_p[tokens].mean())
