"""Generation on top of an inference engine: greedy for evaluation, sampled for people, text as it becomes readable.

The engine is `pretrain.inference.InferenceEngine`; anything with the three methods of `Engine` will do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from pretrain.errors import RecipeError


class Engine(Protocol):
    """What generation and scoring need of a model. B sequences of L tokens, vocabulary V (may be padded)."""

    def reset(self) -> None:
        """Forget every sequence."""

    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, L) int64 prompts -> (B, V) float32 logits of the next token."""

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B,) int64 tokens, one per sequence -> (B, V) float32 logits of the one after."""

    def score(self, tokens: torch.Tensor, last: int | None = None) -> torch.Tensor:
        """(B, L) int64 -> (B, L-1) float32 negative log-likelihood (nats) of tokens 1..L-1, each given those before;
        (B, last) of the last ones only."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked. ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 keep every
    token. ``min_p``: least probability, as a share of the likeliest token's. ``repetition_penalty``: logits of tokens
    that occurred, in the prompt or since, are divided by it when positive and multiplied when negative (arXiv
    1909.05858); 1 does nothing.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise RecipeError(f"--temperature is {self.temperature}: it must be 0 (greedy) or larger")
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"--top-p is {self.top_p}: it must be above 0 and at most 1")
        if self.top_k < 0:
            raise RecipeError(f"--top-k-sampling is {self.top_k}: it must be 0 (all tokens) or larger")
        if not 0 <= self.min_p <= 1:
            raise RecipeError(f"--min-p is {self.min_p}: it must be between 0 (all tokens) and 1")
        if not self.repetition_penalty > 0:
            raise RecipeError(f"--repetition-penalty is {self.repetition_penalty}: it must be above 0 (1 does nothing)")


def pick(
    logits: torch.Tensor,
    sampling: Sampling,
    generator: torch.Generator | None = None,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, V) logits -> (B,) int64. Top-k is applied before top-p and min-p; the most likely token always stays in.

    ``generator`` must live on the device of the logits; it is not used when greedy. ``seen`` (B, V) bool: tokens that
    occurred, for the repetition penalty.
    """
    if seen is not None and sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    scaled = logits.float() / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[-1]:
        floor = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < floor, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = scaled.sort(dim=-1, descending=True)
        mass = ordered.softmax(dim=-1)
        outside = mass.cumsum(dim=-1) - mass >= sampling.top_p  # the mass before a token already suffices
        scaled = scaled.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
    if sampling.min_p > 0:
        mass = scaled.softmax(dim=-1)
        scaled = scaled.masked_fill(mass < sampling.min_p * mass.amax(-1, keepdim=True), float("-inf"))
    return torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def generate_tokens(
    engine: Engine, prompts: np.ndarray, *, max_new_tokens: int, vocab_size: int, sampling: Sampling | None = None
) -> Iterator[np.ndarray]:
    """Yield (B,) int64 arrays, one per generated position, for (B, L) integer prompts.

    ``vocab_size`` is the tokenizer's: the padding of the model's vocabulary is never generated. Stopping at an end
    token is the caller's business (it stops asking).
    """
    engine.reset()
    tokens = torch.from_numpy(np.ascontiguousarray(prompts, dtype=np.int64))
    yield from continue_tokens(
        engine, engine.prefill(tokens), tokens, max_new_tokens=max_new_tokens, vocab_size=vocab_size, sampling=sampling
    )


@torch.no_grad()
def continue_tokens(
    engine: Engine,
    logits: torch.Tensor,
    prompts: torch.Tensor,
    *,
    max_new_tokens: int,
    vocab_size: int,
    sampling: Sampling | None = None,
) -> Iterator[np.ndarray]:
    """As `generate_tokens`, from a prompt that was read already: ``logits`` (B, V) of the next token, ``prompts``
    (B, L) int64 for the repetition penalty. The last yielded tokens are not read by the engine.
    """
    sampling = sampling or Sampling()
    generator = torch.Generator(device=logits.device).manual_seed(sampling.seed)
    seen = None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros(logits.shape[0], vocab_size, dtype=torch.bool, device=logits.device)
        seen.scatter_(1, prompts.to(logits.device), True)
    for position in range(max_new_tokens):
        tokens = pick(logits[:, :vocab_size], sampling, generator, seen)
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        yield tokens.cpu().numpy()
        if position + 1 < max_new_tokens:
            logits = engine.decode(tokens)


def greedy_answers(engine: Engine, prompts: np.ndarray, *, max_new_tokens: int, vocab_size: int) -> np.ndarray:
    """(B, L) prompts -> (B, max_new_tokens) int64 greedy continuations."""
    steps = list(generate_tokens(engine, prompts, max_new_tokens=max_new_tokens, vocab_size=vocab_size))
    return np.stack(steps, axis=1)


class TextStream:
    """Turns token ids into text piece by piece, holding back bytes of an unfinished UTF-8 character.

    Only a short tail is decoded again per token, so the cost is linear in the length of the text.
    """

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._known = 0  # ids before this one only serve as left context
        self._shown = 0  # ids before this one are printed

    def push(self, token: int) -> str:
        """Text that became final with this token; may be empty."""
        self._ids.append(int(token))
        return self._advance(final=False)

    def finish(self) -> str:
        """What is left, with replacement characters for bytes that never became a character."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        shown = self._tokenizer.decode(self._ids[self._known : self._shown])
        text = self._tokenizer.decode(self._ids[self._known :])
        if len(text) <= len(shown) or (text.endswith("\ufffd") and not final):
            return ""
        self._known, self._shown = self._shown, len(self._ids)
        return text[len(shown) :]


class StopText:
    """Cuts a stream of text at the first of some strings, holding back what may turn out to be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that may be shown now; nothing after a stop string, which itself is not shown."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        longest = max(map(len, self._stops), default=1) - 1
        keep = next((n for n in range(min(longest, len(self._held)), 0, -1) if self._may_begin(self._held[-n:])), 0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """What was held back."""
        return "" if self.stopped else self._held

    def _may_begin(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self._stops)
