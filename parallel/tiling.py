"""Dense MLPs in tiles of the sequence, by DeepSpeed's TiledMLP: for long contexts, and exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel.compat import MLP


class TiledMLP(MLP):
    """Megatron's dense MLP, run on one part of the tokens after the other and again in backward, so that the wide
    activations of one part exist at a time.
    """

    def __init__(
        self, *args: Any, tiles: int, pg_collection: Any = None, is_mtp_layer: bool = False, **kwargs: Any
    ) -> None:
        # A newer Megatron gives these two to every kind of MLP but its own, an older one gives no groups at all.
        if pg_collection is not None:
            kwargs["tp_group"] = pg_collection.tp
        super().__init__(*args, **kwargs)
        self.tiles = tiles

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """(L, B, hidden) -> (L, B, hidden), None. Outside training there is nothing to save."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(hidden_states, *args, **kwargs)
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP as Tiled

        # Its backward cuts flattened tokens, its forward the last dimension but one: the same for two dimensions.
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        tiles = min(self.tiles, flat.shape[0])
        return Tiled.apply(_mlp, self, flat, tiles, []).view_as(hidden_states), None


def _mlp(module: TiledMLP, tokens: Tensor) -> Tensor:
    return MLP.forward(module, tokens)[0]
