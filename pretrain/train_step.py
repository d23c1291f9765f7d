"""One optimisation step: micro-batches through Megatron's forward-backward schedule, gradients scaled, parameters
moved.

The objective of a step is the weighted mean of the token losses over the GLOBAL batch: sum(weight * nll) / sum(weight).
The sum of weights is known only after all ranks have seen their micro-batches, so every backward pass runs on plain
sums, and the gradients are divided once, after they were summed over the ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data_pipeline.batch import PackedBatch
from parallel import mesh
from parallel.compat import DistributedDataParallel, finalize_model_grads, get_forward_backward_func, parallel_state
from parallel.context import local_slice
from parallel.evidence import take_sums
from parallel.router import LoadStatistics
from parallel.tensor import sum_partial_gradients
from pretrain.graphed import GraphedPass
from pretrain.model import HSAModel
from pretrain.step_sums import StepSums, document_positions

_FIELDS = ("tokens", "labels", "loss_weights", "documents", "domains", "evidence")


@dataclass
class StepResult:
    """What one step says of itself, over all ranks.

    loss: the objective, nats per weighted token. domain_losses: plain mean nll per domain name, for domains that had
    tokens. position_losses: the same by how many tokens of its document stand before a token in its sequence; the key
    is the least position of a group, 0, 16, 32, 64, ... stop: number of ranks that want to stop. skipped: documents
    that could not be read, since the run began. updated: False when the gradient norm was not finite and the weights
    stayed as they were. experts: loads of the experts' layers by metric name. evidence: mean over tokens, heads and
    layers of the evidence loss, nats; None where none was asked for.
    """

    loss: float
    grad_norm: float
    domain_losses: dict[str, float]
    position_losses: dict[int, float]
    stop: int
    skipped: int
    updated: bool
    experts: dict[str, float] = field(default_factory=dict)
    evidence: float | None = None


class TrainStep:
    """Runs steps on this rank's model chunks (one, unless the pipeline is interleaved); `domains` names the ids in a
    batch's `domains`.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        optimizer: Any,
        domains: list[str],
        device: torch.device,
        *,
        cuda_graph: bool = False,
    ) -> None:
        self.chunks = list(chunks)
        self.optimizer = optimizer
        self.domains = domains
        self.device = device
        self.config = self.chunks[0].config
        self.context = parallel_state.get_context_parallel_group()
        self.config.finalize_model_grads_func = self._finalize
        self.loads = LoadStatistics(self.chunks, self.config) if self.config.num_moe_experts else None
        self._sums: StepSums  # of the step that is going on
        self._graphed = GraphedPass(device) if cuda_graph else None
        self._loads = torch.zeros(0, dtype=torch.float64, device=device)
        self._evidence = torch.zeros(2, dtype=torch.float64, device=device)

    def __call__(self, batch: PackedBatch, micro_batch: int, *, wants_stop: bool, skipped: int = 0) -> StepResult:
        """Train on this data-parallel rank's share of a global batch; the step's numbers are those of the global batch.

        All ranks that hold a part of one model copy or of one sequence are given the same batch. skipped: documents
        that this rank's lanes have had to skip since the run began.
        """
        copies = mesh.world_size() // mesh.data_size()  # ranks that were given the same batch

        def prepare() -> None:
            self._sums.values.zero_()
            self._sums.say(wants_stop=wants_stop, skipped=skipped / copies)

        self.optimizer.zero_grad()
        micro_batches = self._micro_batches(batch, micro_batch)
        if self._graphed is None:
            self._sums = StepSums(self.domains, batch.tokens.shape[1], self.device)
            prepare()
            self._pass(micro_batches)
        else:  # a graph adds to the tensors that it was recorded with
            if not hasattr(self, "_sums"):
                self._sums = StepSums(self.domains, batch.tokens.shape[1], self.device)
            self._graphed(self._pass, micro_batches, prepare)
        updated, grad_norm, _zeros = self.optimizer.step()
        # Everything the step says comes to the host in one copy.
        read = torch.cat((self._evidence, self._sums.values, self._loads)).tolist()
        (told, asked), sums, loads = read[:2], read[2 : 2 + len(self._sums.values)], read[2 + len(self._sums.values) :]
        loss, stop, all_skipped, by_domain, by_position = self._sums.read(sums)
        experts = {} if self.loads is None else self.loads.metrics([loads[i : i + 4] for i in range(0, len(loads), 4)])
        evidence = told / asked if asked else None
        return StepResult(loss, float(grad_norm), by_domain, by_position, stop, all_skipped, updated, experts, evidence)

    def _micro_batches(self, batch: PackedBatch, size: int) -> list[dict[str, Tensor]]:
        """This rank's parts, still where the batch is."""
        parts = []
        for start in range(0, batch.tokens.shape[0], size):
            micro = {name: getattr(batch, name)[start : start + size] for name in _FIELDS}
            # Documents stay whole: windows and chunk selection look past the left edge of this rank's slice.
            parts.append(
                {name: x if name == "documents" else local_slice(x, self.context) for name, x in micro.items()}
            )
        return parts

    def _pass(self, micro_batches: list[dict[str, Tensor]]) -> None:
        """Gradients of the step, in the gradient buffers, and its sums."""
        batch, length = micro_batches[0]["documents"].shape
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=[self._on_device(micro_batches) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=batch,
            forward_only=False,
        )

    def _on_device(self, micro_batches: list[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        for micro in micro_batches:
            yield {name: x.to(self.device, non_blocking=True) for name, x in micro.items()}

    def _forward(self, micro_batches: Iterator[dict[str, Tensor]], model: HSAModel) -> tuple[Tensor, Any]:
        micro = next(micro_batches)
        losses = model(
            micro["tokens"], labels=micro["labels"], documents=micro["documents"], evidence=micro["evidence"]
        )
        return losses, functools.partial(self._loss, micro)

    def _loss(self, micro: dict[str, Tensor], losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        weights = micro["loss_weights"]
        weighted = (losses * weights).sum()
        with torch.no_grad():
            positions = local_slice(document_positions(micro["documents"]), self.context).contiguous()
            self._sums.add(weighted, losses, weights, micro["domains"], positions)
        return weighted, (weights > 0).sum().to(torch.int), {}

    def _finalize(self, model: list[DistributedDataParallel], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        """Megatron's reduction of gradients, then ours: divide by the global sum of weights."""
        loads = self._loads if self.loads is None else self.loads.local(self.device)
        finalize_model_grads(model, None, **kwargs)
        sum_partial_gradients(model)
        if parallel_state.get_tensor_model_parallel_rank() > 0:
            self._sums.forget_tokens()  # the same ones as on the first of these ranks
        total = torch.cat((self._sums.values, loads, take_sums(model, self.device)))
        torch.distributed.all_reduce(total)
        sums, loads, self._evidence = total.split((len(self._sums.values), len(loads), 2))
        self._sums.values.copy_(sums)
        if self.loads is not None:
            self._loads = self.loads.summary(loads).flatten()
        scale = (1.0 / sums[1].clamp_min(1e-9)).float()  # stays on the device
        for chunk in model:
            chunk.scale_gradients(scale)
