"""Generation on top of an inference engine: greedy for evaluation, sampled for people, text as it becomes readable.

The engine is `pretrain.inference.InferenceEngine`; anything with the three methods of `Engine` will do.
"""

from collections.abc import Iterator
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

    def score(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, L) int64 -> (B, L-1) float32 negative log-likelihood (nats) of tokens 1..L-1, each given those before."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep every token."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise RecipeError(f"--temperature is {self.temperature}: it must be 0 (greedy) or larger")
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"--top-p is {self.top_p}: it must be above 0 and at most 1")
        if self.top_k < 0:
            raise RecipeError(f"--top-k-sampling is {self.top_k}: it must be 0 (all tokens) or larger")


def pick(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> torch.Tensor:
    """(B, V) logits -> (B,) int64. Top-k is applied before top-p; the most likely token always stays in.

    ``generator`` must live on the device of the logits; it is not used when greedy.
    """
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
    return torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def generate_tokens(
    engine: Engine, prompts: np.ndarray, *, max_new_tokens: int, vocab_size: int, sampling: Sampling | None = None
) -> Iterator[np.ndarray]:
    """Yield (B,) int64 arrays, one per generated position, for (B, L) integer prompts.

    ``vocab_size`` is the tokenizer's: the padding of the model's vocabulary is never generated. Stopping at an end
    token is the caller's business (it stops asking).
    """
    sampling = sampling or Sampling()
    engine.reset()
    logits = engine.prefill(torch.from_numpy(np.ascontiguousarray(prompts, dtype=np.int64)))
    generator = torch.Generator(device=logits.device).manual_seed(sampling.seed)
    for position in range(max_new_tokens):
        tokens = pick(logits[:, :vocab_size], sampling, generator)
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
