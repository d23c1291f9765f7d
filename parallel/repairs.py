"""Repairs of Megatron-core that every machine needs, applied once by `compat` after it has imported Megatron.

This module imports none of Megatron: it finds the modules that are loaded.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch


def l2_norm(_: int, __: Any, lists: list[list[torch.Tensor]], *___: Any) -> tuple[torch.Tensor, None]:
    """Norm of all tensors together, (1,) float32."""
    norms = torch._foreach_norm([tensor for tensors in lists for tensor in tensors])
    return torch.linalg.vector_norm(torch.stack(list(norms))).float().reshape(1), None


def scale(_: int, __: Any, lists: list[list[torch.Tensor]], factor: float) -> None:
    """Tensors of the second list = factor * those of the first, which may be the same."""
    sources, targets = lists
    if not sources:
        return
    if all(a is b for a, b in zip(sources, targets, strict=True)):
        torch._foreach_mul_(targets, factor)
    else:
        torch._foreach_copy_(targets, sources if factor == 1.0 else list(torch._foreach_mul(sources, factor)))


def repair_router_gating() -> None:
    """0.16 refers to ``te_general_gemm`` in the router's gating even where Transformer Engine is absent (NameError)."""
    moe_utils = sys.modules["megatron.core.transformer.moe.moe_utils"]
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]


def repair_multi_tensor() -> None:
    """Megatron's stand-ins for apex's multi-tensor kernels go tensor by tensor and fetch every norm to the host: a
    third of a small model's update. torch has them in a few launches.
    """
    ours = {"l2_norm_impl": l2_norm, "multi_tensor_scale_impl": scale}
    for name in ("clip_grads", "optimizer"):
        module = sys.modules[f"megatron.core.optimizer.{name}"]
        for attribute, function in ours.items():
            theirs = getattr(module, attribute, None)
            if getattr(theirs, "__module__", "") == "megatron.core.utils":
                setattr(module, attribute, function)


def init_adam_state(optimizer: torch.optim.Optimizer) -> None:
    """Allocate what torch's AdamW allocates in its first step; parameters that have their state keep it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state.setdefault("step", torch.zeros((), dtype=torch.float32))


def repair_distributed_optimizer() -> None:
    """Make Megatron's distributed optimizer checkpoint torch's AdamW (used without Transformer Engine and apex).

    As it is, it cannot say what the step is before the first one, stumbles over "step" when it copies loaded state,
    copies into leaves that require gradients, and gives all parameters one common step tensor, which every parameter
    then advances: bias correction is silently wrong after a resume.
    """
    optimizer_class = sys.modules["megatron.core.optimizer.distrib_optimizer"].DistributedOptimizer
    sharded_state_dict, load_state_dict = optimizer_class.sharded_state_dict, optimizer_class.load_state_dict

    def is_torch_adam(self: Any) -> bool:
        return isinstance(self.optimizer, (torch.optim.Adam, torch.optim.AdamW))

    @functools.wraps(sharded_state_dict)
    def prefilled(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_torch_adam(self):
            init_adam_state(self.optimizer)
        return sharded_state_dict(self, *args, **kwargs)

    @functools.wraps(load_state_dict)
    def load(self: Any, state_dict: Any) -> None:
        with torch.no_grad():
            load_state_dict(self, state_dict)
        if is_torch_adam(self):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group_index, group_order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group_index]["params"][group_order]
        with torch.no_grad():
            main_param.copy_(tensors["param"])
            for name, value in self.optimizer.state[main_param].items():
                if name != "step":
                    value.copy_(tensors[name])

    original_set_states = optimizer_class._set_main_param_and_optimizer_states

    @functools.wraps(original_set_states)
    def set_main_param_and_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        (set_states if is_torch_adam(self) else original_set_states)(self, model_param, tensors)

    optimizer_class.sharded_state_dict = prefilled
    optimizer_class.load_state_dict = load
    optimizer_class._set_main_param_and_optimizer_states = set_main_param_and_states
