"""What an evaluation asks of a model, as text: log-likelihood of continuations and of whole texts, generation up to a
stop. Requests of different lengths share batches; no text is cut, whatever its length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from pretrain.evaluation.decoding import Sampling, StopText, TextStream, continue_tokens

Progress = Callable[[int, int], None]


class RaggedEngine(Protocol):
    """The part of `pretrain.inference.InferenceEngine` that is used here."""

    def reset(self) -> None:
        """Forget every sequence."""

    def prefill(self, tokens: torch.Tensor, lengths: Sequence[int] | None = None) -> torch.Tensor:
        """Right-padded (B, L) int64 -> (B, V) logits of the token after each row's own end."""

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B,) int64 -> (B, V) logits."""

    def score_greedy(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Right-padded (B, L) int64 -> nats (B, L - 1) of tokens 1.., and whether each was the likeliest."""


class TextScorer:
    """Answers requests with an engine. batch: requests at a time; token_budget: tokens of a batch with its padding."""

    def __init__(self, engine: RaggedEngine, tokenizer: Any, *, batch: int = 16, token_budget: int = 1 << 18) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.batch, self.token_budget = batch, token_budget

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(context, continuation) -> the continuation's log-probability in nats, and whether greedy generation would
        have said it. An empty context is the start of a document.
        """
        return self._score([self.split(context, continuation) for context, continuation in pairs])

    def loglikelihood_of_texts(self, texts: Sequence[str]) -> list[float]:
        """Log-probability in nats of whole texts, each the start of a document, with all of it as context."""
        start = [self.tokenizer.eos_id]
        return [total for total, _ in self._score([(start, self.tokenizer.encode(text)) for text in texts])]

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both parts. Space at the end of the context belongs to the continuation, and both are tokenized
        together: a word that the border cuts keeps its tokens.
        """
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        if not context:
            return [self.tokenizer.eos_id], self.tokenizer.encode(continuation)
        before = self.tokenizer.encode(context)
        whole = self.tokenizer.encode(context + continuation)
        if whole[: len(before)] == before and len(whole) > len(before):
            return before, whole[len(before) :]
        return before, self.tokenizer.encode(continuation)

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)  # an empty continuation is certain
        rows = [i for i, (_, continuation) in enumerate(pairs) if continuation]
        for group in self._batches({i: len(pairs[i][0]) + len(pairs[i][1]) for i in rows}):
            tokens, _ = _padded([pairs[i][0] + pairs[i][1] for i in group])
            losses, likeliest = (x.cpu() for x in self.engine.score_greedy(tokens))
            for row, i in enumerate(group):
                before, after = map(len, pairs[i])
                part = slice(before - 1, before + after - 1)
                results[i] = (-losses[row, part].double().sum().item(), bool(likeliest[row, part].all()))
        return results

    def generate(
        self, prompts: Sequence[str], *, stops: Sequence[str], max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[str]:
        """Continuations up to an end token, the first stop (not part of the result) or the number of tokens."""
        ids = [self.tokenizer.encode(prompt) or [self.tokenizer.eos_id] for prompt in prompts]
        texts = [""] * len(prompts)
        for group in self._batches({i: len(prompt) for i, prompt in enumerate(ids)}):
            tokens, lengths = _padded([ids[i] for i in group])
            streams = [(TextStream(self.tokenizer), StopText(stops)) for _ in group]
            parts: list[list[str]] = [[] for _ in group]
            ended = [False] * len(group)
            self.engine.reset()
            logits = self.engine.prefill(tokens, lengths)
            steps = continue_tokens(
                self.engine,  # type: ignore[arg-type]
                logits,
                tokens,
                max_new_tokens=max_new_tokens,
                vocab_size=self.tokenizer.vocab_size,
                sampling=sampling,
            )
            for step in steps:
                for row, (stream, stop) in enumerate(streams):
                    if ended[row]:
                        continue
                    if int(step[row]) == self.tokenizer.eos_id:
                        ended[row] = True
                        continue
                    parts[row].append(stop.push(stream.push(int(step[row]))))
                    ended[row] = stop.stopped
                if all(ended):
                    break
            for row, (stream, stop) in enumerate(streams):
                texts[group[row]] = "".join([*parts[row], stop.push(stream.finish()), stop.finish()])
        return texts

    def _batches(self, sizes: dict[int, int]) -> Iterator[list[int]]:
        """Numbers of requests, alike in length, the longest first so that memory runs out at once or never."""
        group: list[int] = []
        for i in sorted(sizes, key=lambda i: -sizes[i]):
            if group and (len(group) == self.batch or (len(group) + 1) * sizes[group[0]] > self.token_budget):
                yield group
                group = []
            group.append(i)
        if group:
            yield group


def _padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, list[int]]:
    lengths = [len(row) for row in rows]
    tokens = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return tokens, lengths
