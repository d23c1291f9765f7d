"""The two attentions of the decoder, made of Megatron's parallel linear layers and the operators of `hsa_kernels`.

Hidden states are (L, B, hidden), Megatron's layout; operators take (B, L, heads, head size).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hsa_kernels import ops
from parallel.compat import (
    MegatronModule,
    ProcessGroupCollection,
    RowParallelLinear,
    SelfAttention,
    TransformerConfig,
    tensor_parallel,
)
from parallel.context import keep_in_graph, start_halo
from parallel.evidence import EvidenceLoss, EvidenceSums
from parallel.fused import rotate
from parallel.memory import ContextMemory
from parallel.model_config import ModelConfig
from parallel.neighbours import in_text, with_neighbours
from parallel.norm import RMSNorm
from parallel.positions import absolute_angles
from parallel.selection import Decay, select_chunks
from parallel.shared_memory import SharedMemory
from parallel.tensor import HeadLinear, whole_sequence


@dataclass
class AttentionSchedule:
    """What a stage may change about attention. One object is shared by all layers of a model, so setting it once is
    enough.

    window, hsa_window: tokens a sliding-window layer sees, the token itself included (hsa_window: inside HSA layers).
    top_k: chunks an HSA token reads; None means every visible chunk.
    neighbours: so many of a token's best chunks bring the chunks beside them (`with_neighbours`); for reading only.
    retrieval_temperature: scores of chunks are divided by it before their softmax; for reading only. Which chunks are
    chosen does not depend on it, how much the best of them weighs does.
    distance_decay, decay_from: scores of chunks n > decay_from tokens back fall by distance_decay * ln(n / decay_from);
    for reading texts longer than those of the training, whose chunks are more than a token had to choose among.
    evidence: the loss that asks for the chunk which holds an answer; for training only.
    balance_selection: share chunk selection out evenly over context-parallel ranks; None: where it pays.
    """

    window: int = 512
    hsa_window: int = 512
    top_k: int | None = None
    neighbours: int = 0
    retrieval_temperature: float = 1.0
    distance_decay: float = 0.0
    decay_from: int = 0
    evidence: EvidenceLoss = EvidenceLoss()
    balance_selection: bool | None = None


class NoCoreAttention:
    """Megatron builds a core attention inside `SelfAttention`; ours is an operator, so the slot stays empty."""

    def __init__(self, **_: object) -> None:
        pass


class SlidingWindowSelfAttention(SelfAttention):
    """Causal self-attention over the last `window` tokens: Megatron's projections and QK-norm, RoPE, our operator."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        rotary_pos_emb: Tensor,
        *,
        window: int,
        documents: Tensor | None = None,
        halo: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attend.

        hidden_states (L, B, hidden); rotary_pos_emb (n + L, 1, 1, D) angles of positions 0 .. n + L - 1, n the length
        of the halo (only differences of positions matter, so a halo's first token may be called position 0); documents
        (B, n + L) int32; halo: keys and values (n, B, Hkv, D) of the n tokens to the left, keys not yet rotated.

        Under context parallelism there is no halo to be given: it comes from the left neighbours, and documents are
        those of the whole sequence. Tokens that do not see it are computed while it is under way.

        Returns the output (L, B, hidden) and the keys and values, not rotated, of these tokens, behind those of `halo`
        where these are fewer than `window`.
        """
        q, k, v = self.get_query_key_value_tensors(hidden_states)
        group, length = self.pg_collection.cp, k.shape[0]
        if group.size() > 1:
            fetch, left = start_halo(k, v, window - 1, group), group.rank() * length
        elif halo is None or length < window:
            if halo is not None:
                k, v = torch.cat((halo[0], k)), torch.cat((halo[1], v))
            return self.linear_proj(self._attend(q, k, v, rotary_pos_emb, window, documents))[0], (k, v)
        else:
            fetch, left = (lambda: halo), halo[0].shape[0]
        attended = self._attend_behind(q, k, v, rotary_pos_emb, window, documents, fetch, left)
        return self.linear_proj(attended)[0], (k, v)

    def _attend_behind(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        angles: Tensor,
        window: int,
        documents: Tensor | None,
        fetch: Callable[[], tuple[Tensor, Tensor]],
        left: int,
    ) -> Tensor:
        """Context output (L, B, heads * D) of tokens whose left neighbours' keys and values `fetch` returns.
        `documents` begin `left` tokens before these.

        Tokens out of their reach attend first and to the keys as they are: copying all of them behind a halo took a
        tenth of a small model's prefill.
        """
        length = k.shape[0]

        def own(first: int, stop: int) -> Tensor | None:
            return None if documents is None else documents[:, left + first : left + stop].contiguous()

        near = min(window, length)  # a round number: the kernel's blocks of the far part stay aligned
        far = []
        if near < length:
            # The same angles for keys and queries of both parts: only differences of positions matter.
            far = [self._attend(q[near:], k, v, angles[:length], window, own(0, length))]
        halo_k, halo_v = fetch()
        keys = torch.cat((halo_k, k[:near])), torch.cat((halo_v, v[:near]))
        return torch.cat((self._attend(q[:near], *keys, angles, window, own(-halo_k.shape[0], near)), *far))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, angles: Tensor, window: int, documents: Tensor | None) -> Tensor:
        """q (l, B, Hq, D) against k, v (n, B, Hkv, D) whose last l are the queries' own tokens -> (l, B, Hq * D).
        documents (B, n) of the keys.
        """
        offset = k.shape[0] - q.shape[0]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q = rotate(q, angles[offset : offset + q.shape[0]])
            k = rotate(k, angles[: k.shape[0]])
            out = ops.sliding_window_attention(
                q.transpose(0, 1),
                k.transpose(0, 1),
                v.transpose(0, 1),
                window=window,
                documents=documents,
                key_offset=offset,
            )
            return out.transpose(0, 1).flatten(2)

        if self.checkpoint_core_attention and self.training:
            return tensor_parallel.checkpoint(attend, False, q, k, v)
        return attend(q, k, v)


class HierarchicalSparseAttention(MegatronModule):
    """Retrieval of chunks by landmark scores and attention inside each retrieved chunk (FACTS: arXiv 2511.23319,
    section 2).

    Owns the query side only: keys, values and landmarks come from the context memory, shared by all HSA layers. No
    positional encoding, unless `model.ablations` asks for one. Queries and keys are RMS-normalised per head, retrieval
    queries and landmarks per retrieval head.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        schedule: AttentionSchedule,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.model = model
        self.schedule = schedule
        self.tp_group = pg_collection.tp
        self.cp_group = pg_collection.cp
        retrieval_size = model.retrieval_dim // model.retrieval_heads
        self.linear_q = HeadLinear(config, model.num_heads, model.head_dim, self.tp_group)
        self.linear_retrieval = HeadLinear(config, model.retrieval_heads, retrieval_size, self.tp_group)
        self.linear_proj = RowParallelLinear(
            model.num_heads * model.head_dim,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.tp_group,
        )
        self.q_layernorm = RMSNorm(config, model.head_dim, config.layernorm_epsilon)
        self.retrieval_layernorm = RMSNorm(config, retrieval_size, config.layernorm_epsilon)
        self.checkpoint_core_attention = config.recompute_granularity == "selective"
        self.evidence = EvidenceSums()
        self.recency: nn.Parameter | None = None
        if model.ablations.recency_decay:
            self.recency = nn.Parameter(torch.ones(1, dtype=config.params_dtype))

    def queries(self, hidden_states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states (L, B, hidden), whole, of tokens at positions (L or 1, B or 1) -> queries (L, B, Hq, D) and
        retrieval queries (L, B, Hr, Dr), fp32 at least, divided by the schedule's temperature.
        """
        model = self.model
        q = self.q_layernorm(self.linear_q(hidden_states)[0].unflatten(-1, (-1, model.head_dim)))
        if model.ablations.hsa_rope:
            q = rotate(q, absolute_angles(positions, model, q.dtype))
        retrieval = self.linear_retrieval(hidden_states)[0]
        retrieval = retrieval.unflatten(-1, (-1, model.retrieval_dim // model.retrieval_heads))
        # Scores decide which chunks are read at all: fp32 at least, whatever the precision of the run.
        wide = torch.promote_types(retrieval.dtype, torch.float32)
        retrieval = self.retrieval_layernorm(retrieval.to(wide))
        if self.schedule.retrieval_temperature != 1.0:
            retrieval = retrieval / self.schedule.retrieval_temperature
        return q, retrieval

    def decay(self) -> Decay | None:
        """How scores fall with the distance, or None."""
        schedule = self.schedule
        if not schedule.distance_decay:
            return None
        # Scores are divided by the temperature, so what is taken off them is, too.
        return Decay(
            schedule.distance_decay / schedule.retrieval_temperature, schedule.decay_from / self.model.chunk_size
        )

    def weights(self, scores: Tensor, indices: Tensor) -> Tensor:
        """Weights (..., K) of chosen chunks from their scores, or the logarithms of weights: indices ascend, -1 = none.

        With recency decay a score falls by softplus(recency - 4) (0.05 at first) from each chosen chunk to the next
        older one. So the decay does not grow with the length of the text.
        """
        if self.recency is not None:
            places = torch.arange(indices.shape[-1], device=scores.device)
            scores = scores + nn.functional.softplus(self.recency.to(scores.dtype) - 4) * places
        return ops.selection_weights(scores, indices)

    def _noise(self, retrieval: Tensor, chunks: int) -> Tensor | None:
        """Gumbel noise (B, L, Hr, chunks) for retrieval queries (L, B, Hr, Dr) in training, None without.

        From torch's own generator, whose state checkpoints keep: a resumed run draws what the unbroken one draws.
        """
        scale, top_k = self.model.ablations.selection_noise, self.schedule.top_k
        if not (scale and self.training) or top_k is None or top_k >= chunks:
            return None
        length, batch, heads = retrieval.shape[:3]
        drawn = torch.empty(batch, length, heads, chunks, dtype=torch.float32, device=retrieval.device)
        return drawn.exponential_().log_().mul_(-scale)

    def forward(
        self,
        hidden_states: Tensor,
        memory: ContextMemory | SharedMemory | Callable[[], ContextMemory],
        *,
        documents: Tensor | None = None,
        evidence: Tensor | None = None,
        query_offset: int = 0,
    ) -> Tensor:
        """hidden_states (L, B, hidden) of tokens query_offset .. query_offset + L - 1 (L / tensor of them under
        sequence parallelism); memory, or what waits for it; documents (B, keys) int32. evidence (B, L, P)
        int: for the loss of that name, positions in the sequence (`data_pipeline.evidence`), -1 none.

        Returns the like of hidden_states; rows that see no completed chunk are 0 before the output projection.
        """
        model = self.model
        hidden_states = whole_sequence(hidden_states, self.config, self.tp_group)
        positions = torch.arange(query_offset, query_offset + hidden_states.shape[0], device=hidden_states.device)
        q, retrieval = self.queries(hidden_states, positions[:, None])
        wide = retrieval.dtype
        if isinstance(memory, SharedMemory):
            out = memory.read(
                q.transpose(0, 1),
                retrieval.transpose(0, 1),
                top_k=self.schedule.top_k,
                neighbours=self.schedule.neighbours,
                query_offset=query_offset,
                decay=self.decay(),
                weigh=self.weights if self.recency is not None else None,
            )
            return self.linear_proj(out.transpose(0, 1).flatten(2))[0]
        read = memory if isinstance(memory, ContextMemory) else memory()

        def attend(q: Tensor, retrieval: Tensor, k: Tensor, v: Tensor, landmarks: Tensor) -> Tensor:
            indices, scores = select_chunks(
                retrieval,
                landmarks.to(wide),
                group=self.cp_group,
                balance=self.schedule.balance_selection,
                top_k=min(self.schedule.top_k or read.chunks, read.chunks),
                chunk_size=model.chunk_size,
                query_offset=query_offset,
                documents=documents,
                noise=self._noise(retrieval, read.chunks),
                decay=self.decay(),
            )
            weights = self.weights(scores, indices)
            asked = self.schedule.evidence
            # With gradients only: once, also where layers are computed again.
            if asked.weight and evidence is not None and self.training and torch.is_grad_enabled():
                places = evidence.div(model.chunk_size, rounding_mode="floor")
                weights = self.evidence(weights, scores, indices, places, asked, self.tp_group.size())
            if self.schedule.neighbours:
                now = (positions // model.chunk_size)[:, None, None]
                indices, weights = with_neighbours(indices, weights, self.schedule.neighbours, in_text(now))
            if indices.shape[2] < k.shape[2]:  # one retrieval shared by all key/value heads
                indices = indices.expand(-1, -1, k.shape[2], -1)
                weights = weights.expand(-1, -1, k.shape[2], -1)
            k, v, indices = read.fetch(k, v, indices)
            out = ops.hsa_attention(q.transpose(0, 1), k, v, weights, indices, chunk_size=model.chunk_size)
            if self.cp_group.size() > 1:
                out = keep_in_graph(out, scores)
            return out.transpose(0, 1).flatten(2)

        inputs = (q, retrieval, read.k, read.v, read.landmarks)
        if self.checkpoint_core_attention and self.training:
            out = tensor_parallel.checkpoint(attend, False, *inputs)
        else:
            out = attend(*inputs)
        return self.linear_proj(out)[0]
