"""Optimizers behind Megatron's interface: AdamW (distributed or replicated), and Muon for matrices beside AdamW.

``wrap_model`` puts Megatron's DDP around the model, ``build_optimizer`` gives an optimizer with

    zero_grad()   step() -> (updated, grad_norm, None)   param_groups   scale_loss(loss)
    sharded_state_dict(...)   load_state_dict(...)   reload_model_params()

Order of construction: transformer config (calculate_per_token_loss=True), model, ``wrap_model``, ``build_optimizer``.
The caller sets the learning rate before every update: each group has ``max_lr``, the top of its schedule, and
``wd_mult``; its ``lr`` and ``weight_decay`` are what the update uses.

Memory per parameter beside weight and fp32 gradient: AdamW 12 bytes (8 in fp32), Muon 8 (4) for matrices and AdamW's
for the rest; distributed, divided by the data-parallel size. Megatron's distributed AdamW cuts parameters anywhere. A
matrix that Muon makes orthogonal must be whole, so there every parameter has an owner among its replicas, which alone
keeps its state and moves it; the others get the moved weights from it (`shares`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from parallel import compat
from parallel.muon import Muon
from parallel.offload import HostState
from parallel.repairs import init_adam_state

OPTIMIZERS = ("adamw", "muon")


@dataclass
class OptimizerSettings:
    """What a recipe says under ``optimizer:``.

    lr: of AdamW, and under muon of everything that is not a matrix of the decoder; muon_lr: of those matrices.
    weight_decay: decoupled, not applied to vectors (norms, biases). clip: largest global gradient norm, 0 for none.
    warmup_steps: of the learning rate, linear, from the run's first step; stages shape it after that.
    distributed: share the state among the data-parallel ranks. offload: keep master copies
    and moments in host memory between updates.
    """

    name: str = "adamw"
    lr: float = 3.87e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup_steps: int = 0
    muon_lr: float = 0.01
    muon_momentum: float = 0.95
    muon_ns_steps: int = 5
    distributed: bool = True
    offload: bool = False

    def problems(self) -> list[str]:
        """Everything that makes these settings impossible, each as ``optimizer.field: what is wrong``."""
        found = []
        if self.name not in OPTIMIZERS:
            found.append(f"optimizer.name: {self.name!r} is none of {', '.join(OPTIMIZERS)}")
        for name in ("lr", "muon_lr", "eps"):
            if not getattr(self, name) > 0:
                found.append(f"optimizer.{name}: must be positive, is {getattr(self, name)}")
        for name in ("weight_decay", "clip", "warmup_steps"):
            if getattr(self, name) < 0:
                found.append(f"optimizer.{name}: must not be negative, is {getattr(self, name)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            found.append(f"optimizer.betas: two numbers in [0, 1) wanted, got {list(self.betas)}")
        if not 0 <= self.muon_momentum < 1:
            found.append(f"optimizer.muon_momentum: must be in [0, 1), is {self.muon_momentum}")
        if self.muon_ns_steps < 1:
            found.append(f"optimizer.muon_ns_steps: must be at least 1, is {self.muon_ns_steps}")
        return found

    @property
    def shares_state(self) -> bool:
        """True when Megatron's distributed optimizer is used."""
        return self.distributed and self.name == "adamw"

    @property
    def has_owners(self) -> bool:
        """True when every parameter's state is kept by one of its replicas."""
        return self.distributed and self.name == "muon"


def ddp_config(settings: OptimizerSettings, *, overlap: bool = False) -> compat.DistributedDataParallelConfig:
    """Megatron's DDP configuration: fp32 gradients; overlap hides their reduction behind the backward pass (GPU).

    The gathering of updated parameters is not overlapped: it would end in the next forward pass, and a checkpoint
    written before that would hold parameters of two different steps.
    """
    return compat.DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        use_distributed_optimizer=settings.shares_state,
        check_for_nan_in_grad=False,  # step() looks at the norm and refuses the update
    )


def wrap_model(
    chunks: Sequence[nn.Module], settings: OptimizerSettings, *, overlap: bool = False
) -> list[compat.DistributedDataParallel]:
    """Put Megatron's DDP around every model chunk (already on its device) and make all replicas equal to rank 0's.

    The chunks' config must have calculate_per_token_loss=True: set after DDP is built, gradients come out divided by
    the data-parallel size a second time.
    """
    wrapped = []
    for index, chunk in enumerate(chunks):
        config = compat.get_model_config(chunk)
        assert config.calculate_per_token_loss, "set calculate_per_token_loss before DDP is built"
        wrapped.append(
            compat.DistributedDataParallel(
                config, ddp_config(settings, overlap=overlap), chunk, disable_bucketing=index > 0
            )
        )
    for chunk in wrapped:
        chunk.broadcast_params()
    if overlap:  # gradients are reduced in the last micro-batch only
        no_sync = [chunk.no_sync for chunk in wrapped]
        compat.get_model_config(chunks[0]).no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync
    return wrapped


class Optimizer(compat.ChainedOptimizer):
    """Megatron's chain of optimizers with one gradient norm, which leaves the weights alone when that is not finite."""

    host: HostState | None = None  # where the state is kept between updates, if not on the device

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients. A forward pass comes next, so state that is kept on the host leaves the device."""
        super().zero_grad(set_to_none)
        if self.host is not None:
            self.host.leave()

    def _bring_state(self) -> None:
        if self.host is not None:
            self.host.come()

    @torch.no_grad()
    def step(self) -> tuple[bool, float, None]:
        """Clip by the global norm and update. Returns (updated, gradient norm before clipping, None)."""
        if self.prepare_grads():
            return False, math.nan, None
        norm = float(self.get_grad_norm())
        if not math.isfinite(norm):
            return False, norm, None
        for optimizer in self.chained_optimizers:
            parameters = [] if optimizer.is_stub_optimizer else optimizer.get_parameters()
            if parameters and self.config.clip_grad > 0:
                compat.clip_grad_by_total_norm_fp32(parameters, max_norm=self.config.clip_grad, total_norm=norm)
        self._bring_state()
        return self.step_with_ready_grads(), norm, None

    def init_state(self) -> None:
        """Allocate all optimizer state as it is before the first step (zeros); allocated state is left alone."""
        self._bring_state()
        for optimizer in self._active():
            init_torch_state(optimizer.optimizer)

    def _active(self) -> list[compat.MegatronOptimizer]:
        return [optimizer for optimizer in self.chained_optimizers if not optimizer.is_stub_optimizer]

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """State tensors under the names of the parameters, and the step; nothing that depends on the layout.

        How many optimizers are chained differs between expert-parallel sizes, and hyperparameters are the recipe's: so
        Megatron's unsharded state stays in this process, and the step is stored once for all.
        """
        self.init_state()
        self._synchronize_steps()
        state: dict[str, Any] = {"step": self._updates()}
        for index, optimizer in enumerate(self._active()):
            part = optimizer.sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs)
            state[f"part{index}"] = {
                name: value if name in _SHARDED else compat.LocalNonpersistentObject(value)
                for name, value in part.items()
            }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what sharded_state_dict gave and the checkpoint filled."""
        self._bring_state()
        step = state_dict["step"]
        for index, optimizer in enumerate(self._active()):
            part = state_dict[f"part{index}"]
            if isinstance(optimizer, _NamedState):
                part["step"] = step
            else:
                for group in part["optimizer"]["param_groups"]:
                    group["step"] = step
            optimizer.load_state_dict(part)

    def _updates(self) -> int:
        """Number of updates done; a rank that owns no parameter of AdamW hears it from the others."""
        done = self._own_updates()
        if any(getattr(optimizer, "shares", None) for optimizer in self._active()):
            most = torch.tensor(done, device=torch.cuda.current_device() if torch.cuda.is_available() else "cpu")
            torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
            done = int(most)
        return done

    def _own_updates(self) -> int:
        """Number of updates done, from the first AdamW state: torch keeps it by parameter, fused ones by group."""
        for optimizer in self._active():
            for group in optimizer.param_groups:
                if "step" in group and not isinstance(optimizer.optimizer, torch.optim.AdamW):
                    return int(group["step"])
                for parameter in group["params"]:
                    if "step" in optimizer.optimizer.state[parameter]:
                        return int(optimizer.optimizer.state[parameter]["step"])
        return 0


# The entries of the chained optimizers' states that hold tensors of the checkpoint.
_SHARDED = ("param_state", "state", "fp32_params")


class _NamedState(compat.MegatronOptimizer):
    """Checkpoint state of a replicated optimizer under the names of the model's parameters, and weights from owners.

    shares: where parameters have owners, what each rank of `replicas` owns; this optimizer then has this rank's alone.

    Megatron's own drops the step while it is 0, and numbers the states of a bf16 model over its bf16 parameters alone,
    so that one fp32 parameter (a norm's gain) among them shifts every state behind it to a wrong name.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        # Before Megatron puts master copies in the place of the model's parameters.
        self.model_params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.shares: list[list[nn.Parameter]] = []
        self.replicas: Any = None
        super().__init__(optimizer, *args)

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """The update, then every owner's weights to the other replicas."""
        done = super().step_with_ready_grads()  # type: ignore[safe-super]
        for owner, parameters in enumerate(self.shares):
            for dtype in sorted({parameter.dtype for parameter in parameters}, key=str):
                same = [parameter.data for parameter in parameters if parameter.dtype == dtype]
                flat = torch.cat([values.flatten() for values in same])
                torch.distributed.broadcast(flat, group=self.replicas, group_src=owner)
                parts = flat.split([values.numel() for values in same])
                torch._foreach_copy_(same, [part.view_as(values) for part, values in zip(parts, same, strict=True)])
        return done

    def _masters(self) -> dict[int, torch.Tensor]:
        """fp32 master copies by the number of the parameter in the optimizer."""
        return {
            index: parameter.main_param
            for index, parameter in enumerate(self.model_params)
            if parameter.dtype != torch.float32
        }

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, metadata: dict | None = None
    ) -> dict[str, Any]:
        """Inner state and master copies, both by the number of the parameter."""
        inner = self.optimizer.state_dict()
        names = compat.get_param_id_to_sharded_param_map(model_sharded_state_dict, self.model_params)
        compat.optim_state_to_sharding_state(inner, names, exclude_keys=("step",))
        masters = {
            index: compat.make_sharded_optimizer_tensor(names[index], master, prefix="optimizer.state.fp32_param")
            for index, master in self._masters().items()
        }
        if self.shares:  # what one replica alone has is no replica
            for tensor in (
                *masters.values(),
                *(value for state in inner["state"].values() for value in state.values()),
            ):
                if hasattr(tensor, "replica_id"):
                    tensor.replica_id = (*tensor.replica_id[:-1], 0)
        return {"state": inner["state"], "fp32_params": masters}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what sharded_state_dict gave and the checkpoint filled, with the common ``step`` added."""
        inner = self.optimizer.state_dict()
        for index, state in state_dict["state"].items():
            if "step" in inner["state"][index]:
                state["step"] = torch.tensor(float(state_dict["step"]))
        self.optimizer.load_state_dict({"state": state_dict["state"], "param_groups": inner["param_groups"]})
        with torch.no_grad():
            for index, master in self._masters().items():
                master.copy_(state_dict["fp32_params"][index])


class ReplicatedFP32(_NamedState, compat.FP32Optimizer):
    """Megatron's optimizer of fp32 parameters, replicated over the data-parallel ranks."""


class ReplicatedBF16(_NamedState, compat.Float16OptimizerWithFloat16Params):
    """Megatron's optimizer of bf16 parameters with fp32 master copies, replicated over the data-parallel ranks."""


def init_torch_state(optimizer: torch.optim.Optimizer) -> None:
    """Allocate the state of torch's AdamW or of Muon as before the first step; Megatron does so for fused ones."""
    if isinstance(optimizer, Muon):
        optimizer.init_state()
    elif isinstance(optimizer, torch.optim.AdamW):
        init_adam_state(optimizer)


def is_muon_parameter(name: str, parameter: nn.Parameter) -> bool:
    """True for the matrices Muon updates: not the embedding, output layer or router, nor anything like a vector."""
    if parameter.dim() < 2 or min(parameter.shape[-2:]) == 1:
        return False
    if getattr(parameter, "is_embedding_or_output_parameter", False):
        return False
    parts = name.split(".")
    return not any(part in ("router", "word_embeddings", "output_layer") for part in parts)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """True when weight decay applies: matrices only."""
    return parameter.dim() > 1 and not name.endswith(".bias")


def _optimizer_config(settings: OptimizerSettings, dtype: torch.dtype) -> compat.OptimizerConfig:
    return compat.OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=0.0,  # Megatron wants a number, though schedules are ours
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        clip_grad=settings.clip,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=settings.shares_state,
    )


def build_optimizer(
    settings: OptimizerSettings, chunks: Sequence[compat.DistributedDataParallel], *, fused: bool = False
) -> Optimizer:
    """The optimizer of the wrapped model chunks. bf16 parameters get fp32 master copies; fp32 ones among them do not.

    fused: the distributed AdamW is Transformer Engine's or apex's. Parameters are float32 or bfloat16, anything else
    is a ValueError.
    """
    dtypes = {parameter.dtype for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad}
    if not dtypes <= {torch.float32, torch.bfloat16}:
        raise ValueError(f"parameters must be float32 or bfloat16, found {sorted(map(str, dtypes))}")
    config = _optimizer_config(settings, torch.bfloat16 if torch.bfloat16 in dtypes else torch.float32)
    if settings.shares_state:
        with compat.adam_of(fused=fused):
            built = compat.get_megatron_optimizer(config, list(chunks))
        chained = getattr(built, "chained_optimizers", [built])
    else:
        chained = _replicated(settings, config, chunks)
    optimizer = Optimizer(chained)
    if settings.offload:
        optimizer.host = HostState(optimizer._active())
    _set_hyperparameters(optimizer, settings)
    return optimizer


def _replicated(
    settings: OptimizerSettings, config: compat.OptimizerConfig, chunks: Sequence[nn.Module]
) -> list[compat.MegatronOptimizer]:
    """AdamW, and Muon for matrices if named so, each split in dense and expert-parallel parameters as in Megatron."""
    state = compat.parallel_state
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad:
                expert = not getattr(parameter, "allreduce", True)
                muon = settings.name == "muon" and is_muon_parameter(name, parameter)
                key = (expert, muon, decays(name, parameter))
                groups.setdefault(key, []).append(parameter)
    chained: list[compat.MegatronOptimizer] = []
    for expert in (False, True):
        replicas = (
            state.get_expert_data_parallel_group()
            if expert
            else state.get_data_parallel_group(with_context_parallel=True)
        )
        loads = [0] * replicas.size()
        for muon in (True, False):
            shares: list[list[nn.Parameter]] = []
            if settings.has_owners and replicas.size() > 1:
                mine = [p for decay in (True, False) for p in groups.get((expert, muon, decay), [])]
                shares = share_out(mine, loads)
                own = {id(p) for p in shares[replicas.rank()]}
                for decay in (True, False):
                    if (expert, muon, decay) in groups:
                        groups[expert, muon, decay] = [p for p in groups[expert, muon, decay] if id(p) in own]
            param_groups = [
                {
                    "params": groups[expert, muon, decay],
                    # Megatron's checkpoint recognises groups by these four, its scheduler reads wd_mult.
                    "wd_mult": 1.0 if decay else 0.0,
                    "lr_mult": 1.0,
                    "is_expert_parallel": expert,
                    "is_decoupled_lr": muon,
                    "default_config": not muon,
                }
                for decay in (True, False)
                if (expert, muon, decay) in groups
            ]
            if param_groups:
                wrapped = _wrap(settings, config, param_groups, muon=muon, expert=expert)
                if shares:
                    wrapped.shares, wrapped.replicas = shares, replicas
                    wrapped.grad_stats_parallel_group = torch.distributed.group.WORLD
                    if expert:  # an owner counts what it owns, whatever its tensor-parallel rank
                        wrapped.tp_group = state.get_expert_tensor_parallel_group()
                chained.append(wrapped)
    return chained


def share_out(parameters: list[nn.Parameter], loads: list[int]) -> list[list[nn.Parameter]]:
    """What every replica owns: the largest first, each to the replica that has least; `loads` (elements) grow."""
    shares: list[list[nn.Parameter]] = [[] for _ in loads]
    for parameter in sorted(parameters, key=lambda p: -p.numel()):
        owner = loads.index(min(loads))
        shares[owner].append(parameter)
        loads[owner] += parameter.numel()
    return shares


def _wrap(
    settings: OptimizerSettings,
    config: compat.OptimizerConfig,
    param_groups: list[dict[str, Any]],
    *,
    muon: bool,
    expert: bool,
) -> ReplicatedFP32 | ReplicatedBF16:
    inner: torch.optim.Optimizer
    if muon:
        inner = Muon(
            param_groups,
            settings.muon_lr,
            settings.muon_momentum,
            settings.muon_ns_steps,
            tensor_group=compat.parallel_state.get_tensor_model_parallel_group(),
        )
    else:
        inner = torch.optim.AdamW(param_groups, settings.lr, tuple(settings.betas), settings.eps, weight_decay=0.0)

    def init_state(optimizer: torch.optim.Optimizer, _: Any = None) -> None:
        init_torch_state(optimizer)

    if config.bf16:
        wrapped: ReplicatedFP32 | ReplicatedBF16 = ReplicatedBF16(inner, config, None, init_state)
    else:
        wrapped = ReplicatedFP32(inner, config, init_state)
    state = compat.parallel_state
    wrapped.grad_stats_parallel_group = (
        state.get_expert_tensor_model_pipeline_parallel_group() if expert else state.get_model_parallel_group()
    )
    wrapped.tp_group = state.get_tensor_model_parallel_group()
    return wrapped


def _set_hyperparameters(optimizer: Optimizer, settings: OptimizerSettings) -> None:
    """Give every group its top learning rate and what its kind of optimizer needs."""
    for chained in optimizer.chained_optimizers:
        muon = isinstance(chained.optimizer, Muon)
        for group in chained.param_groups:
            group["lr"] = group["max_lr"] = settings.muon_lr if muon else settings.lr
            group["weight_decay"] = settings.weight_decay * group["wd_mult"]
