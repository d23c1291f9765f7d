"""The forward pass of a model in training, at any parallel layout: logits on every rank, and an engine that answers
probes with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parallel.compat import DistributedDataParallel, get_forward_backward_func, parallel_state
from parallel.context import local_slice
from pretrain.model import HSAModel


def whole_logits(chunks: Sequence[nn.Module], tokens: Tensor, documents: Tensor | None = None) -> Tensor:
    """Logits (B, L, vocabulary) float32 on every rank; every rank calls this with the same tokens (B, L) int64.

    chunks: this rank's model chunks, in Megatron's DDP or bare. L is a multiple of `length_unit`.
    """
    context = parallel_state.get_context_parallel_group()
    config = _bare(chunks[0]).config

    def step(micro_batches: Iterator[None], model: nn.Module) -> tuple[Tensor, Any]:
        next(micro_batches)
        return model(local_slice(tokens, context), documents=documents), lambda output, non_loss_data: output

    with torch.no_grad():
        collected = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter([None] * _micro_batches(config)) for _ in chunks],
            model=list(chunks),
            num_microbatches=_micro_batches(config),
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
        batch, length = tokens.shape[0], tokens.shape[1] // context.size()
        logits = torch.empty(batch, length, _bare(chunks[0]).model.vocab_size, device=tokens.device)
        if collected:
            logits.copy_(collected[0])
        stages = parallel_state.get_pipeline_model_parallel_group()
        if stages.size() > 1:
            torch.distributed.broadcast(
                logits, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=stages
            )
        if context.size() == 1:
            return logits
        slices = [torch.empty_like(logits) for _ in range(context.size())]
        torch.distributed.all_gather(slices, logits, group=context)
        return torch.cat(slices, dim=1)


def _micro_batches(config: Any) -> int:
    """An interleaved schedule takes no fewer micro-batches than stages; the rest repeat the first."""
    return config.pipeline_model_parallel_size if config.virtual_pipeline_model_parallel_size else 1


def _bare(chunk: nn.Module) -> HSAModel:
    return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk  # type: ignore[return-value]


def length_unit(model: HSAModel) -> int:
    """Lengths that this layout can run are multiples of this: whole chunks on every rank, equal parts of them."""
    config = model.config
    shared = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return config.context_parallel_size * math.lcm(model.model.chunk_size, shared)


class LayoutEngine:
    """`InferenceEngine` for probes during training where the model is spread over ranks: each token costs one whole
    forward pass, so it is for short answers. Window and top-k are the model's own. Every rank calls it alike.
    """

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        self.chunks = chunks
        self.unit = length_unit(_bare(chunks[0]))
        self.device = next(chunks[0].parameters()).device
        self.reset()

    def reset(self) -> None:
        """Forget everything read so far."""
        self._tokens: Tensor | None = None

    def prefill(self, tokens: Tensor) -> Tensor:
        """tokens (B, L) int64 -> logits (B, V) float32 of the token after them."""
        read = tokens.to(self.device)
        self._tokens = read if self._tokens is None else torch.cat((self._tokens, read), dim=1)
        return self._logits(self._tokens)[:, -1]

    def _logits(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, L, V), in evaluation mode. What is padded to the right is seen by nothing."""
        length = tokens.shape[1]
        training = self.chunks[0].training
        for chunk in self.chunks:
            chunk.eval()
        logits = whole_logits(self.chunks, nn.functional.pad(tokens, (0, -length % self.unit)))
        for chunk in self.chunks:
            chunk.train(training)
        return logits[:, :length]

    def decode(self, tokens: Tensor) -> Tensor:
        """One more token per sequence, tokens (B,) int64 -> logits (B, V) float32 of the one after it."""
        return self.prefill(tokens[:, None])

    def score(self, tokens: Tensor, last: int | None = None) -> Tensor:
        """(B, L) int64 -> (B, L - 1) float32 nll in nats of tokens[:, 1:], or of the ``last`` tokens; leaves an empty
        state.
        """
        self.reset()
        tokens = tokens.to(self.device)
        scored = tokens.shape[1] - 1 if last is None else last
        logits = self._logits(tokens)[:, -1 - scored : -1]
        return nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, -scored:], reduction="none")
