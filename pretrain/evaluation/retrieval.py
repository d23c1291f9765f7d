"""The runner behind needle-in-a-haystack and the RULER tasks.

Every sample is built by `data_pipeline.synthetic` in held-out text, ends in a question, and is answered by the
model's own greedy generation; nothing is teacher-forced. A sample depends only on (seed, task, length, depth or
distance, its number), so one cell can be repeated alone, with any batch size.
"""

import math
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from data_pipeline.config import TASKS
from data_pipeline.synthetic import SyntheticSample, answer_text, build_sample, score
from pretrain.errors import RecipeError
from pretrain.evaluation import ruler_tasks
from pretrain.evaluation.decoding import Engine, greedy_answers
from pretrain.evaluation.haystack import Haystack
from pretrain.evaluation.tally import Tally, total
from pretrain.evaluation.units import format_length

TOKEN_BUDGET = 1 << 18  # tokens of one batch; a longer sample goes alone
MAX_ANSWER_TOKENS = 64  # a copy answer is half the sample: its first tokens are enough to see whether copying works

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """One length at one depth (0 = start of the text, 1 = just before the question; None = free) or needle distance
    (tokens).
    """

    length: int
    depth: float | None
    distance: int | None
    tally: Tally

    def to_json(self) -> dict:
        """length, depth, distance and the tally's fields."""
        return {"length": self.length, "depth": self.depth, "distance": self.distance, **self.tally.to_json()}


MISTAKES = 5  # wrong answers that a report keeps per cell: enough to see what kind they are


@dataclass(frozen=True)
class Mistake:
    """A wrong answer: the text wanted and what the model said up to its end token (cut at the length wanted)."""

    length: int
    depth: float | None
    wanted: str
    answered: str


@dataclass
class TaskResult:
    """Outcome of one task over lengths x places."""

    task: str
    templates: str
    seed: int
    samples: int
    cells: list[Cell]
    haystack_tokens: int
    seconds: dict[int, float] = field(default_factory=dict)  # per length: building, prefill and generation
    texts: int | None = None  # haystacks per length that the samples share; None: every sample has its own
    mistakes: list[Mistake] = field(default_factory=list)  # the first MISTAKES of every cell

    def note(self, mistake: Mistake) -> None:
        """Keep a wrong answer, unless its cell has enough of them."""
        if sum((m.length, m.depth) == (mistake.length, mistake.depth) for m in self.mistakes) < MISTAKES:
            self.mistakes.append(mistake)

    @property
    def lengths(self) -> list[int]:
        """Lengths in the order they were run."""
        return list(dict.fromkeys(cell.length for cell in self.cells))

    @property
    def depths(self) -> list[float]:
        """Depths of the grid; empty for the distance form and for tasks without a depth."""
        return list(dict.fromkeys(cell.depth for cell in self.cells if cell.depth is not None))

    def by_length(self) -> dict[int, Tally]:
        """All samples of a length together."""
        return {n: total(cell.tally for cell in self.cells if cell.length == n) for n in self.lengths}

    def to_json(self) -> dict:
        """Plain JSON: settings, cells, totals per length, how often the held-out text had to be repeated to fill a
        length, and some of the wrong answers.
        """
        hay = self.haystack_tokens
        return {
            "task": self.task,
            "templates": self.templates,
            "seed": self.seed,
            "samples_per_cell": self.samples,
            "haystack_tokens": hay,
            "haystacks_per_length": self.texts,
            "lengths": [
                {
                    "length": n,
                    "haystack_repeats": math.ceil(n / hay),
                    "seconds": round(self.seconds.get(n, 0.0), 3),
                    **tally.to_json(),
                }
                for n, tally in self.by_length().items()
            ],
            "cells": [cell.to_json() for cell in self.cells],
            "mistakes": [asdict(mistake) for mistake in self.mistakes],
        }


def depth_grid(count: int) -> list[float]:
    """``count`` depths from 0 to 1, evenly; a single one is the middle."""
    if count < 1:
        raise RecipeError(f"--depths is {count}: at least one depth is needed")
    return [0.5] if count == 1 else [round(i / (count - 1), 4) for i in range(count)]


def run_task(
    engine: Engine,
    tokenizer,
    haystack: np.ndarray | Haystack,
    *,
    task: str,
    lengths: Sequence[int],
    depths: Sequence[float | None] = (None,),
    distances: Sequence[int] = (),
    samples: int,
    seed: int = 0,
    chunk_size: int = 1,
    templates: str = "train",
    options: Mapping[str, Any] | None = None,
    batch: int = 16,
    token_budget: int = TOKEN_BUDGET,
    progress: Progress | None = None,
) -> TaskResult:
    """Ask ``samples`` questions per length and place, and count exact answers.

    ``haystack``: 1-D held-out tokens. ``lengths``: tokens of a whole sample (prompt, answer and end token), multiples
    of ``chunk_size``. ``distances``, when given, replaces ``depths`` (niah_single only): exactly that many tokens of
    text lie between the needle and the question. ``options``: digits, keys, queries, hops, copy_random of
    `build_sample`. At most ``batch`` samples, and ``token_budget`` tokens, run together. ``progress`` gets one line
    per length.

    Raises RecipeError on an unknown task, a bad count, and a length too short for the task or the distance.
    """
    if task not in (*TASKS, *ruler_tasks.TASKS):
        raise RecipeError(f"unknown task {task!r}: known are {', '.join((*TASKS, *ruler_tasks.TASKS))}")
    if samples < 1 or batch < 1:
        raise RecipeError(f"need at least one sample and a batch of one, got samples={samples}, batch={batch}")
    if distances and task != "niah_single":
        raise RecipeError(
            f"{task} has several needles and takes no distance: leave the distance out or ask for niah_single"
        )
    hay = haystack if isinstance(haystack, Haystack) else Haystack(haystack)
    places: list[tuple[float | None, int | None]] = [(None, d) for d in distances] or [
        (depth, None) for depth in depths
    ]
    result = TaskResult(task, templates, seed, samples, [], len(hay))
    for length in lengths:
        started = time.perf_counter()
        tallies = dict.fromkeys(range(len(places)), Tally())

        def plan(length: int = length) -> Iterator[tuple[int, SyntheticSample]]:
            for cell, (depth, distance) in enumerate(places):
                for number in range(samples):
                    entropy = [
                        seed,
                        length,
                        number,
                        *(zlib.crc32(repr(part).encode()) for part in (task, depth, distance)),
                    ]
                    builder = _Builder(task, tokenizer, hay, length, chunk_size, templates, options or {}, entropy)
                    yield cell, builder.at_depth(depth) if distance is None else builder.at_distance(distance)

        rows = max(1, min(batch, token_budget // length))
        for cell, tally, mistake in _answer(engine, tokenizer, plan(), rows):
            tallies[cell] += tally
            if mistake:
                result.note(Mistake(length, places[cell][0], *mistake))
        cells = [Cell(length, depth, distance, tallies[i]) for i, (depth, distance) in enumerate(places)]
        result.cells += cells
        result.seconds[length] = time.perf_counter() - started
        if progress:
            done = total(cell.tally for cell in cells)
            progress(
                f"{task} at {format_length(length)}: {done.correct} of {done.n} exact ({100 * done.accuracy:.1f} %), "
                f"{result.seconds[length]:.1f} s"
            )
    return result


@dataclass(frozen=True)
class _Builder:
    """One numbered sample; ``entropy`` seeds everything that is drawn for it."""

    task: str
    tokenizer: Any
    haystack: Haystack
    length: int
    chunk_size: int
    templates: str
    options: Mapping[str, Any]
    entropy: list[int]

    def at_depth(self, depth: float | None) -> SyntheticSample:
        """The sample with its needle at ``depth`` (moved to the end of a sentence close by); None draws the depth."""
        return self._build(depth, self.haystack.reader(self._hay_rng()))

    def at_distance(self, distance: int) -> SyntheticSample:
        """The sample with exactly ``distance`` tokens of text between needle and question.

        A needle moves to the end of a sentence near its depth. So the text is taken from the held-out tokens in such
        a way that a sentence ends exactly where the needle belongs, and it stays there.
        """
        room = self._room()
        before = room - distance
        if before < 0:
            raise RecipeError(
                f"a {self.task} sample of {self.length} tokens has {room} tokens of text, too few for a needle "
                f"{distance} tokens before the question: take a longer length or a smaller distance"
            )
        text = self.haystack.split_reader(self._hay_rng(), before, self.tokenizer.sentence_ends)
        return self._build(before / max(1, room), text)

    def _hay_rng(self) -> np.random.Generator:
        # its own stream: the text does not depend on what the needle drew
        return np.random.default_rng([*self.entropy, 1])

    def _room(self) -> int:
        """Tokens of haystack that the sample asks for."""
        asked = [0]

        def measure(n: int) -> np.ndarray:
            asked[0] = n
            return np.zeros(n, dtype=np.int32)

        self._build(0.0, measure)
        return asked[0]

    def _build(self, depth: float | None, text: Callable[[int], np.ndarray]) -> SyntheticSample:
        rng = np.random.default_rng(self.entropy)
        try:
            if self.task in ruler_tasks.TASKS:
                known = {name: self.options[name] for name in ruler_tasks.OPTIONS if name in self.options}
                return ruler_tasks.build(self.task, rng, self.tokenizer, text, self.length, depth=depth, **known)
            return build_sample(
                self.task,
                rng,
                self.tokenizer,
                text,
                self.length,
                depth=depth,
                chunk_size=self.chunk_size,
                templates=self.templates,
                **{name: value for name, value in self.options.items() if name != "documents"},  # type: ignore[arg-type]
            )
        except RecipeError:
            raise
        except ValueError as error:
            raise RecipeError(f"cannot evaluate {self.task} at {self.length} tokens: {error}") from error


_Scored = tuple[int, Tally, tuple[str, str] | None]


def _answer(engine: Engine, tokenizer, plan: Iterator[tuple[int, SyntheticSample]], rows: int) -> Iterator[_Scored]:
    """Generate in batches of equal prompt length and yield what `_answer_batch` does."""
    waiting: dict[int, list[tuple[int, SyntheticSample]]] = defaultdict(list)
    for item in plan:
        queue = waiting[item[1].prompt_length]
        queue.append(item)
        if len(queue) == rows:
            yield from _answer_batch(engine, tokenizer, queue)
            queue.clear()
    for queue in waiting.values():
        if queue:
            yield from _answer_batch(engine, tokenizer, queue)


def _answer_batch(engine: Engine, tokenizer, items: list[tuple[int, SyntheticSample]]) -> Iterator[_Scored]:
    """Cell, tally of one sample and, of a wrong one, what was wanted and what was said."""
    references = [reference_answer(sample) for _, sample in items]
    prompts = np.stack([sample.tokens[: sample.prompt_length] for _, sample in items])
    steps = max(len(tokens) for tokens in references)
    generated = greedy_answers(engine, prompts, max_new_tokens=steps, vocab_size=tokenizer.vocab_size)
    for (cell, sample), reference, row in zip(items, references, generated, strict=True):
        answer = row[: len(reference)]
        right = int((answer == reference).sum())
        # a copy may be cut short, and random tokens do not survive decoding; anything else is compared as text
        if isinstance(sample, ruler_tasks.RulerSample):
            exact = sample.accepts(answer_text(tokenizer, answer.tolist()))
        elif sample.kind == "copy":
            exact = right == len(reference)
        else:
            exact = score(sample, tokenizer, answer.tolist())
        wrong = None if exact else (answer_text(tokenizer, reference.tolist()), answer_text(tokenizer, answer.tolist()))
        yield cell, Tally(1, int(exact), len(reference), right), wrong


def reference_answer(sample: SyntheticSample) -> np.ndarray:
    """int64 tokens the model has to say: the answer and the end token after it, of a copy MAX_ANSWER_TOKENS at most."""
    answer = sample.tokens[sample.prompt_length :]
    return answer[: MAX_ANSWER_TOKENS if sample.kind == "copy" else None].astype(np.int64)
