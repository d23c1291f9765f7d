"""The mesh of ranks: parallel sizes, their check before anything starts, process groups and random seeds.

Rank order is Megatron's default, tp-cp-ep-dp-pp: tensor-parallel neighbours are adjacent ranks. Expert parallelism
takes its ranks out of the data-parallel ones, so the data-parallel size is world / (tensor * context * pipeline).
"""

from __future__ import annotations

import datetime
import os
import random
import socket
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed

from parallel.errors import TopologyError

T = TypeVar("T")


@dataclass
class ParallelConfig:
    """Sizes of the parallel forms, as written under ``parallel:`` in a recipe.

    ``data`` is what the number of ranks leaves for data parallelism; a number here is only checked against it.
    ``sequence`` splits norms and residuals over the tensor-parallel ranks (null: wherever there are several);
    ``virtual_pipeline`` is the number of model chunks of each pipeline rank (1: no interleaving);
    ``balance_selection`` shares the scoring of chunks out evenly over the context-parallel ranks (null: where it saves
    time by estimate, see ``parallel.selection``).
    """

    tensor: int = 1
    expert: int = 1
    context: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    data: int | None = None
    sequence: bool | None = None
    balance_selection: bool | None = None

    @property
    def uses_sequence(self) -> bool:
        """True when activations between the tensor-parallel products are split over their ranks."""
        return self.tensor > 1 if self.sequence is None else self.sequence

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model and one sequence: tensor * context * pipeline."""
        return self.tensor * self.context * self.pipeline


def _nearest(wanted: int, fits: list[int]) -> str:
    """The values of ``fits`` just below and just above ``wanted``, for a message."""
    below = [n for n in fits if n < wanted]
    above = [n for n in fits if n > wanted]
    return " or ".join(str(n) for n in ([max(below)] if below else []) + ([min(above)] if above else [])) or "none"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def check_topology(
    parallel: ParallelConfig,
    world_size: int,
    *,
    num_layers: int | None = None,
    num_heads: int | None = None,
    num_experts: int | None = None,
    key_value_heads: dict[str, int] | None = None,
    widths: dict[str, int] | None = None,
    context_length: int | None = None,
    chunk_size: int | None = None,
    lanes: int | None = None,
    batch: int | None = None,
) -> int:
    """Check that the sizes fit ``world_size`` ranks and the model facts that are given; return the data-parallel size.

    num_heads: query heads; num_experts: None or 0 for a dense model; key_value_heads: numbers of heads by the model's
    field names, which tensor-parallel ranks share out or share; widths: sizes by the model's field names that they cut
    into equal parts; context_length, chunk_size in tokens; lanes: data lanes; batch: sequences per step. Raises
    TopologyError naming the numbers that clash and the nearest that work.
    """
    for name in ("tensor", "expert", "context", "pipeline", "virtual_pipeline"):
        if getattr(parallel, name) < 1:
            raise TopologyError(f"parallel.{name}={getattr(parallel, name)} must be at least 1")
    if world_size < 1:
        raise TopologyError(f"a run needs at least 1 rank, got {world_size}")
    product = f"tensor {parallel.tensor} x context {parallel.context} x pipeline {parallel.pipeline}"
    if world_size % parallel.model_ranks:
        fits = [n for n in range(parallel.model_ranks, world_size + 2 * parallel.model_ranks, parallel.model_ranks)]
        raise TopologyError(
            f"parallel: {product} = {parallel.model_ranks} does not divide {world_size} ranks; "
            f"start {_nearest(world_size, fits)} ranks, or choose sizes whose product is "
            f"{_nearest(parallel.model_ranks, _divisors(world_size))}"
        )
    data = world_size // parallel.model_ranks
    if parallel.data is not None and parallel.data != data:
        raise TopologyError(
            f"parallel.data={parallel.data}, but {world_size} ranks / ({product}) leave {data}; leave parallel.data "
            f"out, or start {parallel.data * parallel.model_ranks} ranks"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise TopologyError("parallel.sequence=true needs parallel.tensor of at least 2")
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise TopologyError(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs parallel.pipeline of at least 2"
        )
    # Megatron forms expert groups from the ranks of one pipeline stage (expert tensor parallelism is 1 here).
    stage_ranks = world_size // parallel.pipeline
    if stage_ranks % parallel.expert:
        raise TopologyError(
            f"parallel.expert={parallel.expert} does not divide the {stage_ranks} ranks of a pipeline stage "
            f"({world_size} ranks / pipeline {parallel.pipeline}); the nearest that works: "
            f"{_nearest(parallel.expert, _divisors(stage_ranks))}"
        )
    if parallel.expert > 1 and not num_experts and num_experts is not None:
        raise TopologyError(f"parallel.expert={parallel.expert} but the model has no experts; set parallel.expert=1")
    for name, size, what, number in (
        ("expert", parallel.expert, "experts", num_experts or None),
        ("tensor", parallel.tensor, "query heads", num_heads),
        ("pipeline", parallel.pipeline, "layers", num_layers),
    ):
        stages = size * parallel.virtual_pipeline if name == "pipeline" else size
        if number is None:
            continue
        # Pipeline stages may be uneven, so there only has to be a layer for each.
        if number < stages if name == "pipeline" else number % stages:
            fits = list(range(1, number + 1)) if name == "pipeline" else _divisors(number)
            raise TopologyError(
                f"parallel.{name}: {stages} does not fit the model's {number} {what}; the nearest that works: "
                f"{_nearest(stages, fits)}"
            )
    if parallel.tensor > 1 and not parallel.uses_sequence and num_experts:
        raise TopologyError(
            f"parallel.sequence=false with parallel.tensor={parallel.tensor}: Megatron trains experts under tensor "
            "parallelism only with sequence parallelism; leave parallel.sequence out or set it to true"
        )
    for field, width in (widths or {}).items():
        if width % parallel.tensor:
            raise TopologyError(
                f"parallel.tensor={parallel.tensor} does not divide model.{field}={width}; the nearest that works: "
                f"{_nearest(parallel.tensor, _divisors(width))}"
            )
    for field, heads in (key_value_heads or {}).items():
        if heads % parallel.tensor and parallel.tensor % heads:
            works = [n for n in range(1, 2 * parallel.tensor + 1) if heads % n == 0 or n % heads == 0]
            raise TopologyError(
                f"parallel.tensor={parallel.tensor} neither divides model.{field}={heads} nor is a multiple of it; "
                f"the nearest that works: {_nearest(parallel.tensor, works)}"
            )
    if context_length is not None and parallel.uses_sequence:
        unit = parallel.tensor * parallel.context
        if context_length % unit:
            raise TopologyError(
                f"a context of {context_length} tokens cannot be split over parallel.tensor {parallel.tensor} x "
                f"parallel.context {parallel.context} ranks; the nearest that work: "
                f"{_nearest(context_length, list(range(unit, context_length + 2 * unit, unit)))}"
            )
    if context_length is not None and parallel.context > 1:
        unit = parallel.context * (chunk_size or 1)
        if context_length % unit:
            raise TopologyError(
                f"parallel.context={parallel.context}: a context of {context_length} tokens cannot be cut into "
                f"{parallel.context} slices of whole chunks of {chunk_size or 1}; use a multiple of {unit} tokens "
                f"({_nearest(context_length, list(range(unit, context_length + 2 * unit, unit)))})"
            )
    if lanes is not None and lanes % data:
        fits = sorted({n * parallel.model_ranks for n in _divisors(lanes)})
        raise TopologyError(
            f"data.lanes={lanes} is not a multiple of the data-parallel size {data} ({world_size} ranks / {product}); "
            f"the nearest numbers of ranks that work: {_nearest(world_size, fits)}"
        )
    if batch is not None and batch % (lanes or data):
        unit, what = (lanes, "data.lanes") if lanes else (data, "the data-parallel size")
        raise TopologyError(
            f"a batch of {batch} sequences is not a multiple of {what} ({unit}); the nearest that work: "
            f"{_nearest(batch, list(range(unit, batch + 2 * unit, unit)))}"
        )
    return data


def check_micro_batches(parallel: ParallelConfig, count: int) -> None:
    """Check that an interleaved pipeline gets micro-batches in whole rounds of its ranks; TopologyError otherwise."""
    if parallel.virtual_pipeline > 1 and count % parallel.pipeline:
        raise TopologyError(
            f"{count} micro-batches per step and data-parallel rank are no multiple of "
            f"parallel.pipeline={parallel.pipeline}, as parallel.virtual_pipeline={parallel.virtual_pipeline} needs; "
            f"change batch or micro_batch so that there are "
            f"{_nearest(count, list(range(parallel.pipeline, count + 2 * parallel.pipeline, parallel.pipeline)))}"
        )


@dataclass(frozen=True)
class _Place:
    """Where this process stands in the run: its rank, the number of ranks, and its index on the host."""

    rank: int
    world_size: int
    local_rank: int


def launched_world_size() -> int:
    """Number of ranks the launcher (torchrun, srun, or none: 1) started, without starting anything."""
    return _place().world_size


def launched_rank() -> int:
    """Rank the launcher gave this process (0 without a launcher), without starting anything."""
    return _place().rank


def _place() -> _Place:
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:  # torchrun
        rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
        return _Place(rank, world, int(env.get("LOCAL_RANK", rank)))
    # srun. A batch script itself has SLURM_PROCID=0 and the job's SLURM_NTASKS, but is one process: only a step has
    # SLURM_STEP_NUM_TASKS.
    if "SLURM_PROCID" in env and ("SLURM_STEP_NUM_TASKS" in env or "SLURM_JOB_ID" not in env):
        world = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or "1")
        if world > 1:
            return _Place(int(env["SLURM_PROCID"]), world, int(env.get("SLURM_LOCALID", "0")))
    return _Place(0, 1, 0)


def _first_slurm_host() -> str:
    """First host of the step's node list: ``n[3-4],n7`` -> ``n3``."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST") or socket.gethostname()
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return nodes.split(",")[0]
    return head + rest.replace("]", ",").replace("-", ",").split(",")[0]


def _rendezvous(place: _Place) -> dict[str, Any]:
    """How torch.distributed finds the other ranks: arguments of init_process_group."""
    if place.world_size == 1 and "MASTER_PORT" not in os.environ:
        # A store inside this process: two runs on one host can never meet, and a kill leaves nothing behind.
        return {"store": torch.distributed.HashStore()}
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_slurm_host()
    if "MASTER_PORT" not in os.environ:
        # The same on every task of a step, different for neighbours on a shared node.
        job, step = int(os.environ.get("SLURM_JOB_ID", "0")), os.environ.get("SLURM_STEP_ID", "0")
        os.environ["MASTER_PORT"] = str(20000 + (job * 8 + (int(step) if step.isdigit() else 0)) % 12000)
    return {"init_method": "env://"}


def resolve_device(name: str = "auto") -> torch.device:
    """The device of this rank for a recipe's ``device``: auto | cpu | cuda. TopologyError when there is no such GPU."""
    if name not in ("auto", "cpu", "cuda"):
        raise TopologyError(f"device={name!r}: choose auto, cpu or cuda")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        if torch.cuda.is_available():
            raise TopologyError("device=cpu on a machine with a GPU: hide it with CUDA_VISIBLE_DEVICES= as well")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TopologyError("device=cuda but torch sees no GPU (torch.cuda.is_available() is False)")
    place, count = _place(), torch.cuda.device_count()
    index = 0 if count == 1 else place.local_rank  # srun may show each task only its own GPU
    if index >= count:
        raise TopologyError(f"rank {place.rank} is number {place.local_rank} on this host, which has {count} GPUs")
    return torch.device("cuda", index)


def initialize(
    parallel: ParallelConfig | None = None,
    device: str | torch.device = "auto",
    *,
    seed: int = 0,
    timeout_minutes: float = 30.0,
) -> torch.device:
    """Start torch.distributed and Megatron's groups, set every seed, and return this rank's device.

    gloo on CPU, nccl on GPU. Ranks come from torchrun's variables, else from srun's, else this is a world of one with a
    store of its own. Call ``shutdown`` at the end. Raises TopologyError when the sizes do not fit.
    """
    from parallel import compat

    compat.adopt_modules()
    parallel = parallel or ParallelConfig()
    place = _place()
    check_topology(parallel, place.world_size)
    if parallel.tensor > 1 or parallel.context > 1:
        # Before CUDA is asked for anything. With one queue kernels start in order of issue, so that an exchange begins
        # before the products that it shall hide behind (Megatron asks for it under TP and CP).
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    resolved = device if isinstance(device, torch.device) else resolve_device(device)
    if resolved.type == "cuda":
        torch.cuda.set_device(resolved)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            backend="nccl" if resolved.type == "cuda" else "gloo",
            **_rendezvous(place),
            rank=place.rank,
            world_size=place.world_size,
            timeout=datetime.timedelta(minutes=timeout_minutes),
            device_id=resolved if resolved.type == "cuda" else None,
        )
    if not compat.parallel_state.model_parallel_is_initialized():
        compat.parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=1,
            distributed_timeout_minutes=max(1, round(timeout_minutes)),
        )
    seed_everything(seed)
    return resolved


def seed_everything(seed: int) -> None:
    """Seed python, numpy, torch and Megatron's trackers: the same on every data-parallel rank."""
    from parallel import compat

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    compat.model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    """Take down Megatron's groups and torch.distributed; harmless when nothing is up."""
    from parallel import compat

    if compat.parallel_state.model_parallel_is_initialized():
        compat.parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank() -> int:
    """This process's rank in the run; 0 before initialize()."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """Number of ranks in the run; 1 before initialize()."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def is_writer() -> bool:
    """True on the one rank that writes logs, metrics and pointers (rank 0)."""
    return rank() == 0


def data_rank() -> int:
    """Index of this rank among the data-parallel ones; ranks of one model copy share it."""
    from parallel import compat

    return compat.parallel_state.get_data_parallel_rank()


def data_size() -> int:
    """Number of data-parallel ranks."""
    from parallel import compat

    return compat.parallel_state.get_data_parallel_world_size()


def barrier() -> None:
    """Wait for every rank; nothing to do for a lone process."""
    if world_size() > 1:
        torch.distributed.barrier()


def broadcast_object(value: T) -> T:
    """The writer's ``value`` on every rank (a small picklable object)."""
    if world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Every rank's ``value`` in rank order, on every rank (small picklable objects)."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values
