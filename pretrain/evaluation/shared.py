"""Retrieval tasks over texts that many questions share: a text is read once and every sample is an edit of it.

Needles overwrite tokens of the haystack, the question overwrites its end. Several haystacks per length, each with
questions of every task, keep the samples from hanging on one text.
"""

import time
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data_pipeline.synthetic import answer_text, make_facts, needle_haystack
from pretrain.errors import RecipeError
from pretrain.evaluation.haystack import Haystack
from pretrain.evaluation.retrieval import Cell, Mistake, Progress, TaskResult
from pretrain.evaluation.tally import Tally, total
from pretrain.evaluation.units import format_length
from pretrain.shared_prompt import Edit, SharedPrompt

TASKS = ("niah_single", "niah_multikey", "niah_multiquery", "variable_tracking", "niah_needles")
"""Tasks that can be asked of a shared text."""

_ROOM = 64  # tokens kept free for the answer
_SNAP = 48  # a needle moves by at most so many tokens to follow the end of a sentence
_QUESTION = 128  # tokens in front of the end that hold no needles of a haystack made of them


Way = Mapping[str, float | None]
"""Settings of an engine that a text can be asked with once it is read: top_k, retrieval_temperature, distance_decay."""
_Tallies = dict[tuple[str, int], Tally]


@dataclass(frozen=True)
class Ask:
    """One task as it is asked. label: its name in the result. depths: (None,) draws every needle's place; a grid places
    the asked needle. samples: per depth, over all haystacks. options: those of `make_facts`."""

    label: str
    task: str
    samples: int
    depths: Sequence[float | None] = (None,)
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sample:
    label: str
    cell: int
    depth: float | None
    edits: list[Edit]
    answer: str
    tokens: np.ndarray  # of the answer and the end token


def run_shared(
    prompt: SharedPrompt,
    tokenizer,
    haystack: np.ndarray | Haystack,
    asks: Sequence[Ask],
    *,
    lengths: Sequence[int],
    haystacks: int,
    seed: int = 0,
    templates: str = "eval",
    batch: int = 32,
    ways: Sequence[Way] = ({},),
    progress: Progress | None = None,
) -> dict[str, TaskResult]:
    """Ask every task at every length, and count exact answers of the model's own greedy generation.

    ``ways``: settings to change; several are asked the same questions of the same texts, each text read once, and
    results are labelled with what sets them apart (`label_of`).

    Per length ``haystacks`` texts are read; sample i of a cell goes to text i % haystacks. Tokens of a sample: its
    length, less up to 128 for the answer and so that questions end at any place of a chunk. RecipeError for a task
    that cannot be asked so, or a length that is too short.
    """
    for ask in asks:
        if ask.task not in TASKS:
            raise RecipeError(f"--haystacks: {ask.task} cannot share a text; tasks that can: {', '.join(TASKS)}")
    hay = haystack if isinstance(haystack, Haystack) else Haystack(haystack)
    ends = tokenizer.sentence_ends
    differing = [key for key in ways[0] if len({way[key] for way in ways}) > 1]

    def name(label: str, way: Way) -> str:
        return label_of(label, {key: way[key] for key in differing})

    results = {
        name(ask.label, way): TaskResult(
            name(ask.label, way), templates, seed, ask.samples, [], len(hay), texts=haystacks
        )
        for ask in asks
        for way in ways
    }
    for length in lengths:
        tallies: _Tallies = defaultdict(Tally)
        seconds: dict[str, float] = defaultdict(float)

        def count(samples: list[_Sample], end: int, length: int = length, tallies: _Tallies = tallies) -> None:
            for way in ways:
                if way:
                    prompt.choose(**way)
                named = [replace(s, label=name(s.label, way)) for s in samples]
                _count(prompt, tokenizer, named, end, batch, tallies, length, results)

        for number in range(haystacks):
            began = time.perf_counter()
            rng = np.random.default_rng([seed, length, number])
            end = length - _ROOM - int(rng.integers(64))
            if end < 256:
                raise RecipeError(f"--haystacks: a shared text of {length} tokens is too short, take 1k or more")
            text = hay.reader(rng)(length)
            entropies = {ask.label: [seed, zlib.crc32(ask.label.encode()), length, number] for ask in asks}
            plain = [ask for ask in asks if ask.task != "niah_needles"]
            if plain:
                prompt.read(text)
                samples = [
                    _edited(ask, cell, depth, tokenizer, text, end, ends, [*entropies[ask.label], i], templates)
                    for ask in plain
                    for cell, depth in enumerate(ask.depths)
                    for i in range(number, ask.samples, haystacks)
                ]
                count(samples, end)
                for ask in plain:
                    seconds[ask.label] += (time.perf_counter() - began) / len(plain)
            for ask in asks:
                if ask.task == "niah_needles":
                    began = time.perf_counter()
                    some = len(range(number, ask.samples, haystacks))
                    count(_needles(ask, prompt, tokenizer, text, end, entropies[ask.label], templates, some), end)
                    seconds[ask.label] += time.perf_counter() - began
        for ask, way in ((ask, way) for ask in asks for way in ways):
            result = results[name(ask.label, way)]
            cells = [Cell(length, depth, None, tallies[result.task, i]) for i, depth in enumerate(ask.depths)]
            result.cells += cells
            result.seconds[length] = seconds[ask.label] / len(ways)
            if progress:
                done = result.by_length()[length]
                low, high = done.interval
                share = f"{100 * done.accuracy:.1f} %, {100 * low:.1f} to {100 * high:.1f}"
                progress(
                    f"{result.task} at {format_length(length)}: {done.correct} of {done.n} exact ({share}), "
                    f"{result.seconds[length]:.1f} s"
                )
    return results


def label_of(label: str, settings: Way) -> str:
    """The label of results that were asked for with these of several settings."""
    words = {"top_k": "top-k", "retrieval_temperature": "temperature", "distance_decay": "decay"}
    values = ("full" if value is None else f"{value:g}" for value in settings.values())
    return " ".join([label, *(f"{words[key]} {value}" for key, value in zip(settings, values, strict=True))])


def together(results: Sequence[TaskResult], label: str) -> TaskResult:
    """The samples of several results over the same grid as one result."""
    first = results[0]
    cells = []
    for same in zip(*(result.cells for result in results), strict=True):
        place = same[0]
        cells.append(Cell(place.length, place.depth, place.distance, total(cell.tally for cell in same)))
    seconds = {n: sum(result.seconds[n] for result in results) for n in first.lengths}
    samples = sum(result.samples for result in results)
    mistakes = [mistake for result in results for mistake in result.mistakes]
    return TaskResult(
        label, first.templates, first.seed, samples, cells, first.haystack_tokens, seconds, first.texts, mistakes
    )


def _edited(
    ask: Ask,
    cell: int,
    depth: float | None,
    tokenizer,
    text: np.ndarray,
    end: int,
    ends: np.ndarray,
    entropy: list[int],
    templates: str,
) -> _Sample:
    """A sample with its needles over ``text`` and its question in front of position ``end``."""
    rng = np.random.default_rng([*entropy, cell])
    facts = make_facts(ask.task, rng, templates=templates, **ask.options)  # type: ignore[arg-type]
    question = tokenizer.encode_words(facts.question)
    needles = [tokenizer.encode_words(needle) for needle in facts.needles]
    room = end - len(question)
    if 2 * sum(map(len, needles)) > room:
        raise RecipeError(f"{ask.task} does not fit into {end} tokens: take a longer length")
    starts = _places(rng, [len(needle) for needle in needles], room, depth, facts.ordered, text, ends)
    edits: list[Edit] = [(room, question), *zip(starts, needles, strict=True)]
    return _Sample(ask.label, cell, depth, edits, facts.answer.strip(), _reference(tokenizer, facts.answer))


def _places(
    rng: np.random.Generator,
    sizes: list[int],
    room: int,
    depth: float | None,
    ordered: bool,
    text: np.ndarray,
    ends: np.ndarray,
) -> list[int]:
    """Where needles of ``sizes`` tokens begin: behind the end of a sentence where one is close, without overlap."""
    while True:
        depths = np.sort(rng.random(len(sizes))) if ordered else rng.random(len(sizes))
        if depth is not None:
            if ordered:
                depths = depth + (1.0 - depth) * depths
            else:
                depths[0] = depth
        starts = []
        for share, size in zip(depths.tolist(), sizes, strict=True):
            start = round(share * (room - size))
            if 0 < start < room - size:
                low = max(0, start - _SNAP)
                near = np.flatnonzero(ends[text[low : start + _SNAP]]) + low + 1
                near = near[near <= room - size]
                if len(near):
                    start = int(near[np.argmin(np.abs(near - start))])
            starts.append(start)
        order = np.argsort(starts, kind="stable")
        gaps = [starts[b] - starts[a] - sizes[a] for a, b in zip(order[:-1], order[1:], strict=True)]
        if all(gap >= 0 for gap in gaps) and (not ordered or starts == sorted(starts)):
            return starts


def _needles(
    ask: Ask,
    prompt: SharedPrompt,
    tokenizer,
    text: np.ndarray,
    end: int,
    entropy: list[int],
    templates: str,
    count: int,
) -> list[_Sample]:
    """Read a text made of needles (a little of ``text`` before them) and ask for one of them per sample."""
    rng = np.random.default_rng(entropy)
    options = {name: ask.options[name] for name in ("digits", "values") if name in ask.options}
    facts = needle_haystack(rng, tokenizer, end - _QUESTION, templates=templates, **options)  # type: ignore[arg-type]
    pieces = [tokenizer.encode_words(needle) for needle in facts.needles]
    filled = text.copy()
    needles = np.concatenate(pieces)
    first = end - _QUESTION - len(needles)
    filled[first : end - _QUESTION] = needles
    prompt.read(filled)
    samples = []
    for cell, depth in enumerate(ask.depths):
        if depth is None:  # every needle once, while there are enough
            places = rng.choice(len(pieces), count, replace=count > len(pieces)).tolist()
        else:
            places = [min(len(pieces) - 1, int(depth * len(pieces)))] * count
        for asked in places:
            question = tokenizer.encode_words(facts.question(asked))
            answer = " " + facts.values[asked]
            samples.append(
                _Sample(
                    ask.label,
                    cell,
                    depth,
                    [(end - len(question), question)],
                    answer.strip(),
                    _reference(tokenizer, answer),
                )
            )
    return samples


def _reference(tokenizer, answer: str) -> np.ndarray:
    return np.append(tokenizer.encode_words(answer), tokenizer.eos_id)


def _count(
    prompt: SharedPrompt,
    tokenizer,
    samples: list[_Sample],
    end: int,
    batch: int,
    tallies: _Tallies,
    length: int,
    results: dict[str, TaskResult],
) -> None:
    """Answer samples in batches, add them to the tallies of their cells and the wrong ones to their results."""
    for at in range(0, len(samples), batch):
        part = samples[at : at + batch]
        steps = max(len(sample.tokens) for sample in part)
        generated = prompt.answers([sample.edits for sample in part], end, steps, tokenizer.vocab_size)
        for sample, row in zip(part, generated, strict=True):
            answer = row[: len(sample.tokens)]
            said = answer_text(tokenizer, answer.tolist())
            exact = said == sample.answer
            if not exact:
                results[sample.label].note(Mistake(length, sample.depth, sample.answer, said))
            right = int((answer == sample.tokens).sum())
            tallies[sample.label, sample.cell] += Tally(1, int(exact), len(sample.tokens), right)
