"""One new token per sequence through the whole model, in buffers of fixed size: what a CUDA graph can hold.

Every sequence has a position of its own, on the device. Windows are ring buffers: slot = position mod window. Keys
enter them rotated by their absolute position (angles in fp64, so that 16M is as exact as 16), and unrotated as well,
for a prompt that goes on after generation. The chunk in the making collects the lower decoder's output; the reader
encodes it when it is full.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hsa_kernels import ops
from parallel.compat import MoELayer
from parallel.experts import stacked_weights
from parallel.layers import DecoderLayer, KeysAndValues
from pretrain.context_store import ContextStore
from pretrain.cuda_graph import recorded
from pretrain.model import HSAModel

_ROTATED, _VALUE, _RAW = range(3)
Turn = tuple[Tensor, Tensor]
Places = dict[int, tuple[Tensor, Tensor]]  # by window: the slot of the new token, and how many slots are filled then


class DecodeStep:
    """The buffers of B sequences and the step over them.

    static_experts: compute the chosen experts of a mixture without asking the device how many tokens each got. It holds
    on to the weights as they are now, so only for weights that nobody trains.
    """

    def __init__(
        self,
        model: HSAModel,
        store: ContextStore,
        batch: int,
        *,
        window: int,
        hsa_window: int,
        top_k: int | None,
        neighbours: int = 0,
        static_experts: bool,
    ) -> None:
        self.model, self.store, self.top_k, self.neighbours = model, store, top_k, neighbours
        self.layers: list[DecoderLayer] = list(model.decoder.layers)
        self.lower = model.model.first_hsa_layer
        parameter = next(model.parameters())
        device, sizes = parameter.device, model.model
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.position = torch.zeros(batch, dtype=torch.int64, device=device)
        self.pending = parameter.new_zeros(batch, sizes.chunk_size, sizes.hidden_size)
        self.rings: dict[int, Tensor] = {}
        for layer in self.layers:
            if layer.has_window:
                size = hsa_window if layer.has_hsa else window
                self.rings[layer.layer_number] = parameter.new_zeros(3, batch, sizes.swa_kv_heads, size, sizes.head_dim)
        self.experts = (
            {
                layer.layer_number: stacked_weights(layer.mlp.experts)
                for layer in self.layers
                if isinstance(layer.mlp, MoELayer)
            }
            if static_experts
            else {}
        )
        self._frequencies = model.rotary_pos_emb.inv_freq.to(device=device, dtype=torch.float64)
        self._rows = torch.arange(batch, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    # ------------------------------------------------------------------------------------------------ entering state

    def load(self, rows: Sequence[int], position: int, halos: dict[int, KeysAndValues], pending: Tensor | None) -> None:
        """Take over sequences that were read up to `position`: each window's last keys and values (n, B, Hkv, D), keys
        unrotated, and the incomplete chunk (m, B, hidden).
        """
        where = torch.tensor(list(rows), device=self.position.device)
        self.position[where] = position
        for number, (k, v) in halos.items():
            ring = self.rings[number]
            positions = torch.arange(position - k.shape[0], position, device=k.device)
            slots = positions % ring.shape[3]
            rotated = self._rotate(k, positions[:, None])
            for kind, x in ((_ROTATED, rotated), (_VALUE, v), (_RAW, k)):
                # (n, B, Hkv, D) -> ring rows: both index tensors in front, so the result is (B, n, Hkv, D).
                ring[kind].transpose(1, 2)[where[:, None], slots[None]] = x.transpose(0, 1)
        if pending is not None and pending.shape[0]:
            self.pending[where, : pending.shape[0]] = pending.transpose(0, 1)

    def unload(self, row: int, position: int) -> tuple[dict[int, KeysAndValues], Tensor]:
        """The inverse of `load` for one sequence."""
        halos = {}
        for layer in self.layers:
            if layer.has_window:
                ring = self.rings[layer.layer_number][:, row]
                size = ring.shape[2]
                count = min(position, size - 1)
                slots = torch.arange(position - count, position, device=ring.device) % size
                k, v = (ring[kind][:, slots].transpose(0, 1)[:, None] for kind in (_RAW, _VALUE))
                halos[layer.layer_number] = (k, v)
        return halos, self.pending[row, : position % self.model.model.chunk_size][:, None].clone()

    # --------------------------------------------------------------------------------------------------- the step

    def run(self, tokens: Tensor, *, graph: bool) -> Tensor:
        """tokens (B,) int64 -> logits (B, V) float32; the buffer is overwritten by the next step.

        graph: replay a CUDA graph, captured on the first call.
        """
        self.tokens.copy_(tokens)
        if not graph:
            return self.step()
        if self._graph is None:
            self._capture()
        assert self._graph is not None and self._logits is not None
        self._graph.replay()
        return self._logits

    def forget_graph(self) -> None:
        """Needed after the memory's buffers have moved."""
        self._graph = self._logits = None

    def _capture(self) -> None:
        before = self.position.clone()
        # The step writes the same again into every buffer but this one.
        self._graph, self._logits = recorded(self.step, lambda: self.position.copy_(before))

    @torch.compiler.set_stance("force_eager")
    def step(self) -> Tensor:
        """One token per sequence from `tokens`; moves `position` on.

        Nothing is compiled for it: a graph hides the launches of small kernels, and a first token should not wait for a
        compiler.
        """
        x = self.model.embed(self.tokens[:, None])  # (1, B, hidden)
        turn = self._turn(self.position[None])
        visible = (self.position // self.model.model.chunk_size).int()
        sizes = {ring.shape[3] for ring in self.rings.values()}
        places = {n: (self.position % n, torch.clamp(self.position + 1, max=n)) for n in sizes}
        for index, layer in enumerate(self.layers):
            if index == self.lower:
                self.pending[self._rows, self.position % self.model.model.chunk_size] = x[0]
            x = self._layer(layer, x, turn, places, visible)
        self.position.add_(1)
        return self.model.logits(self.model.decoder.final_layernorm(x))[0].float()

    def _layer(self, layer: DecoderLayer, x: Tensor, turn: Turn, places: Places, visible: Tensor) -> Tensor:
        if layer.has_window:
            x = x + self._window(layer, layer.input_layernorm(x), turn, places)
        mlp_input = x
        if layer.has_hsa:
            hsa = layer.hsa_attention
            q, retrieval = hsa.queries(layer.hsa_layernorm(x), self.position[None])
            weigh = hsa.weights if hsa.recency is not None else None
            out = self.store.attend(
                q[0], retrieval[0], visible, self.top_k, self.neighbours, decay=hsa.decay(), weigh=weigh
            )
            mlp_input = x + hsa.linear_proj(out.flatten(1)[None])[0]
            if not layer.model.ablations.bypass:
                x = mlp_input
        mlp_input = layer.pre_mlp_layernorm(mlp_input)
        if layer.layer_number in self.experts:
            return x + self._experts(layer.mlp, mlp_input, *self.experts[layer.layer_number])
        return x + layer.mlp(mlp_input)[0]

    def _window(self, layer: DecoderLayer, x: Tensor, turn: Turn, places: Places) -> Tensor:
        attention = layer.self_attention
        q, k, v = attention.get_query_key_value_tensors(x)  # (1, B, heads, D)
        ring = self.rings[layer.layer_number]
        slot, filled = places[ring.shape[3]]
        rotated = _rotated(torch.cat((q, k), 2), turn)
        q, rotated = rotated.split((q.shape[2], k.shape[2]), 2)
        ring.transpose(2, 3)[:, self._rows, slot] = torch.cat((rotated, v, k))
        out = ops.window_decode(q[0], ring[_ROTATED], ring[_VALUE], filled)
        return attention.linear_proj(out.flatten(1)[None])[0]

    def _experts(self, moe: MoELayer, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        """The mixture with shapes that depend on nothing but the batch: the chosen experts' weights gathered, or, when
        that would be more than all of them, every expert for every token.
        """
        probabilities = moe.router(x)[0].to(x.dtype)  # (B, E), 0 where not chosen
        flat, top_k = x[0], moe.config.moe_router_topk
        if flat.shape[0] * top_k <= w1.shape[0]:
            weights, chosen = probabilities.topk(top_k, dim=-1)
            inner = _swiglu(torch.matmul(w1[chosen], flat[:, None, :, None])[..., 0]) * weights[..., None]
            out = torch.matmul(w2[chosen], inner[..., None])[..., 0].sum(1)
        else:
            inner = _swiglu(torch.matmul(flat[None], w1.transpose(1, 2))) * probabilities.t()[..., None]
            out = torch.matmul(inner, w2.transpose(1, 2)).sum(0)
        if moe.shared_experts is not None:
            out = out + moe.shared_experts(x)[0]
        return out[None]

    def _turn(self, positions: Tensor) -> Turn:
        """positions (n, B) or (n, 1) -> cosines and sines (n, B, 1, D) of their rotary angles."""
        angles = torch.remainder(positions[..., None].double() * self._frequencies, 2 * math.pi)[:, :, None]
        wide = torch.promote_types(self.pending.dtype, torch.float32)
        cos, sin = angles.to(wide).cos(), angles.to(wide).sin()
        dtype = self.pending.dtype
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)

    def _rotate(self, k: Tensor, positions: Tensor) -> Tensor:
        return _rotated(k, self._turn(positions))


def _rotated(x: Tensor, turn: Turn) -> Tensor:
    """x (n, B, heads, D) turned in three launches: all layers share the cosines, and the sines with the first half's
    negated, of which the other half of x makes the rest."""
    cos, sin = turn
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up
