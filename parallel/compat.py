"""Megatron-core as the rest of the project sees it: every import, version difference and repair in one place.

Everything else of the project imports Megatron names from here and never from ``megatron.core``. Three things happen on
import, in this order:

1. Megatron's own probes are kept honest: an unrelated package called ``apex`` is hidden from them.
2. Megatron is imported; without CUDA its ``torch.compile`` decorators are no-ops (they would build C++ at first use).
3. Repairs are made that hold on every machine, then, only where CUDA is not available, the CPU shim is installed.

The CPU shim
------------
Megatron writes ``torch.cuda.current_device()``, ``device="cuda"``, streams and CUDA random states into its code. Rather
than patching torch for the whole process (which breaks ``torch.device("meta")``, tracing and other libraries), each
Megatron module gets, under its global name ``torch``, a stand-in that is torch in everything but the device: see
``_CpuTorch``. Only three methods of ``torch.Tensor`` (``cuda``, ``pin_memory``, ``type``) are changed for everyone, and
only on machines on which the first two could do nothing but raise. On CPU the "CUDA generator" is the CPU generator.

The shim never runs where ``torch.cuda.is_available()``; there Megatron is used as it is.
"""

# ruff: noqa: E402, F401  (imports come after the shim, and are there for others)

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from parallel import repairs
from parallel.optional import find_apex, find_transformer_engine

CPU_SHIM: bool = not torch.cuda.is_available()
"""True when the CPU shim is in place (decided once, on import)."""

MEGATRON_VERSION: str = importlib.metadata.version("megatron-core")
"""Version of the installed megatron-core distribution."""


# ---------------------------------------------------------------------------------------------------------------------
# Import of Megatron
# ---------------------------------------------------------------------------------------------------------------------

_MODULES = (
    "dist_checkpointing",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.fully_parallel",
    "dist_checkpointing.strategies.state_dict_saver",
    "dist_checkpointing.strategies.torch",
    "distributed",
    "distributed.param_and_grad_buffer",
    "enums",
    "inference.contexts",
    "models.common.embeddings.language_model_embedding",
    "models.common.embeddings.rope_utils",
    "models.common.embeddings.rotary_pos_embedding",
    "models.common.language_module.language_module",
    "models.gpt.gpt_layer_specs",
    "models.gpt.gpt_model",
    "num_microbatches_calculator",
    "optimizer",
    "optimizer_param_scheduler",
    "parallel_state",
    "pipeline_parallel",
    "pipeline_parallel.schedules",
    "process_groups_config",
    "tensor_parallel",
    "tensor_parallel.mappings",
    "tensor_parallel.random",
    "tensor_parallel.utils",
    "timers",
    "transformer",
    "transformer.attention",
    "transformer.dot_product_attention",
    "transformer.mlp",
    "transformer.moe.experts",
    "transformer.moe.moe_layer",
    "transformer.moe.moe_utils",
    "transformer.moe.router",
    "transformer.moe.shared_experts",
    "transformer.moe.token_dispatcher",
    "transformer.spec_utils",
    "transformer.transformer_block",
    "transformer.transformer_layer",
    "utils",
)


def _identity_compile(model: Any = None, **_: Any) -> Any:
    """Stand-in for ``torch.compile`` as a bare decorator or with arguments."""
    return model if model is not None else (lambda function: function)


@contextlib.contextmanager
def _hidden(name: str, hide: bool) -> Iterator[None]:
    """Make ``import name`` raise ImportError inside the block, and leave no trace after it."""
    if not hide or name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def _import_megatron() -> None:
    """Import every Megatron module the project uses, so that the shim can reach all of them at once."""
    real_compile = torch.compile
    if CPU_SHIM:
        torch.compile = _identity_compile
    try:
        # What Megatron says about absent packages is said once, and better, by parallel.optional.describe().
        with warnings.catch_warnings(), _hidden("apex", find_apex().state == "foreign"):
            warnings.simplefilter("ignore")
            for name in _MODULES:
                importlib.import_module(f"megatron.core.{name}")
    finally:
        torch.compile = real_compile


# ---------------------------------------------------------------------------------------------------------------------
# The CPU shim
# ---------------------------------------------------------------------------------------------------------------------


def _names_cuda(device: Any) -> bool:
    """True for "cuda", "cuda:1", 1 and torch.device("cuda")."""
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def _current_device(*_: Any) -> torch.device:
    """CPU, or the device of an enclosing ``with torch.device(...)``, so that a model can be built on meta."""
    return torch.get_default_device()


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor factory for which "cuda" means the current device and pinned memory is ordinary memory."""

    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = _current_device()
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


class _Idle:
    """A stream or an event on a machine without any: every operation on it is already complete."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def _done(self, *_: Any, **__: Any) -> None: ...

    record = wait = wait_stream = wait_event = synchronize = _done

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event if event is not None else _Idle()

    def elapsed_time(self, _: Any) -> float:
        return 0.0


def _nothing(*_: Any, **__: Any) -> None: ...


def _idle_stream(*_: Any, **__: Any) -> _Idle:
    return _Idle()


def _no_context(*_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


class _CpuCuda(types.ModuleType):
    """``torch.cuda`` as Megatron sees it without CUDA; names not given here are the real module's."""

    is_available = staticmethod(lambda: False)
    current_device = staticmethod(_current_device)
    set_device = synchronize = empty_cache = set_stream = staticmethod(_nothing)
    Stream = Event = _Idle
    current_stream = default_stream = staticmethod(_idle_stream)
    stream = device = staticmethod(_no_context)
    get_rng_state = staticmethod(_get_rng_state)
    set_rng_state = staticmethod(_set_rng_state)
    manual_seed = staticmethod(_manual_seed)
    nvtx = types.SimpleNamespace(range_push=_nothing, range_pop=_nothing, range=_no_context)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _CpuTorch(types.ModuleType):
    """``torch`` as Megatron's modules see it without CUDA: the device is the CPU wherever they say "cuda"."""

    # fmt: off
    FACTORIES = ("arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones",
                 "ones_like", "rand", "randint", "randn", "tensor", "zeros", "zeros_like")
    # fmt: on

    def __init__(self) -> None:
        super().__init__("torch", "torch with the CPU in the place of CUDA (parallel.compat)")
        for name in self.FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))
        self.cuda = _CpuCuda("torch.cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_cpu_torch = _CpuTorch()


def _tensor_type(real: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.type()`` that names CUDA classes to Megatron, whose optimizers compare against these strings."""

    @functools.wraps(real)
    def type_(self: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        if dtype is not None:
            return real(self, dtype, non_blocking, **kwargs)
        name = real(self)
        if sys._getframe(1).f_globals.get("torch") is _cpu_torch:
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    return type_


def _tensor_cuda(self: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return self


def _tensor_pin_memory(self: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return self


class _ForkWarningFilter(logging.Filter):
    """Drops the complaint that the CPU generator moved inside a fork of the "CUDA" generator: here they are one."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def _move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """``moe_utils.maybe_move_tensor_to_cpu``, which converts to numpy only what comes from a GPU."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def adopt_modules() -> None:
    """Give the CPU stand-in to Megatron modules imported since the last call; does nothing where there is CUDA."""
    if not CPU_SHIM:
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = _cpu_torch  # type: ignore[attr-defined]


def _install_cpu_shim() -> None:
    torch.Tensor.cuda = _tensor_cuda  # type: ignore[assignment]
    torch.Tensor.pin_memory = _tensor_pin_memory  # type: ignore[assignment]
    torch.Tensor.type = _tensor_type(torch.Tensor.type)  # type: ignore[assignment]

    random = sys.modules["megatron.core.tensor_parallel.random"]
    random._get_cuda_rng_state = _get_rng_state  # type: ignore[attr-defined]
    random._set_cuda_rng_state = _set_rng_state  # type: ignore[attr-defined]
    logging.getLogger(random.__name__).addFilter(_ForkWarningFilter())

    for name in ("moe_utils", "token_dispatcher"):
        module = sys.modules[f"megatron.core.transformer.moe.{name}"]
        module.maybe_move_tensor_to_cpu = _move_to_cpu  # type: ignore[attr-defined]
    adopt_modules()


# ---------------------------------------------------------------------------------------------------------------------
# Parts that Megatron builds only where something is installed
# ---------------------------------------------------------------------------------------------------------------------


def transformer_engine_linears() -> tuple[Any, Any]:
    """Transformer Engine's column- and row-parallel linear layers behind Megatron's interface; needs it installed."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    return TEColumnParallelLinear, TERowParallelLinear


def transformer_engine_experts() -> Any:
    """Spec of Megatron's experts on Transformer Engine's grouped product; needs Transformer Engine."""
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelGroupedLinear,
        TERowParallelGroupedLinear,
    )

    experts = sys.modules["megatron.core.transformer.moe.experts"]
    kind = getattr(experts, "GroupedMLPSubmodules", MLPSubmodules)  # 0.16 has one class for all
    submodules = kind(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear)
    return ModuleSpec(module=experts.TEGroupedMLP, submodules=submodules)


@contextlib.contextmanager
def adam_of(*, fused: bool) -> Iterator[None]:
    """Optimizers built inside are torch's AdamW, with `fused` Transformer Engine's or apex's as Megatron found it."""
    module = sys.modules["megatron.core.optimizer"]
    kept = module.Adam, module.USING_PYTORCH_OPTIMIZER  # type: ignore[attr-defined]
    if not fused:
        module.Adam, module.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.Adam, module.USING_PYTORCH_OPTIMIZER = kept  # type: ignore[attr-defined]


@contextlib.contextmanager
def results_queue(factory: Callable[[], Any]) -> Iterator[None]:
    """Let Megatron's checkpoint writers use ``factory()`` for results instead of a queue in a spawned process."""
    module = sys.modules["megatron.core.dist_checkpointing.strategies.filesystem_async"]
    # The newer name is public.
    name = "get_write_results_queue" if hasattr(module, "get_write_results_queue") else "_get_write_results_queue"
    original = getattr(module, name)
    setattr(module, name, factory)
    try:
        yield
    finally:
        setattr(module, name, original)


class _Outcome:
    """The queues Megatron's file writer reports to, for one file written in the caller's thread."""

    value: Any = None

    def put(self, value: Any) -> None:
        self.value = value

    def get(self) -> None: ...

    def task_done(self) -> None: ...


def write_bucket(bucket: Any) -> list[Any]:
    """Write and sync one file of a checkpoint in this thread; returns Megatron's write results, raises what failed."""
    module = sys.modules["megatron.core.dist_checkpointing.strategies.filesystem_async"]
    outcome = _Outcome()
    transforms = module._StorageWriterTransforms()  # type: ignore[attr-defined]
    module.FileSystemWriterAsync.write_preloaded_data(  # type: ignore[attr-defined]
        [transforms], 0, bucket, outcome, outcome, use_fsync=True
    )
    _, results = outcome.value
    if isinstance(results, Exception):
        raise results
    return results


def _quiet_known_warnings() -> None:
    """Silence, by their exact words, warnings that Megatron 0.16 causes in every run and that nobody can act on."""
    for message, category in (
        ("The .grad attribute of a Tensor that is not a leaf Tensor", UserWarning),  # optimizer shards of parameters
        ("full scope is deprecated. Use empty cuda_graph_scope", UserWarning),  # a default of TransformerConfig
        ("moe_ffn_hidden_size is not set", UserWarning),
        # Routed experts are not split over tensor-parallel ranks; the variable matters to CUDA alone.
        ("`sequence_parallel` is set to `True`, but tensor model parallel size is 1", UserWarning),
        *(
            [("When using .* set the environment variable CUDA_DEVICE_MAX_CONNECTIONS", UserWarning)]
            if CPU_SHIM
            else []
        ),
        ("`load_state_dict` is deprecated and will be removed in future versions", FutureWarning),
        ("Please use DTensor instead and we are deprecating ShardedTensor", FutureWarning),
        ("`torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated", FutureWarning),
    ):
        warnings.filterwarnings("ignore", message=message, category=category)


_import_megatron()
repairs.repair_router_gating()
repairs.repair_distributed_optimizer()
repairs.repair_multi_tensor()
_quiet_known_warnings()
if CPU_SHIM:
    _install_cpu_shim()

HAVE_APEX: bool = find_apex().usable
"""NVIDIA's apex is installed."""
HAVE_TRANSFORMER_ENGINE: bool = find_transformer_engine().usable
"""Transformer Engine is installed."""

# ---------------------------------------------------------------------------------------------------------------------
# What the project uses of Megatron
# ---------------------------------------------------------------------------------------------------------------------

from megatron.core import (
    dist_checkpointing,
    parallel_state,
    tensor_parallel,
)
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
    optim_state_to_sharding_state,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_finalize
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    get_num_microbatches,
    init_num_microbatches_calculator,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import (
    clip_grad_by_total_norm_fp32,
    count_zeros_fp32,
    get_grad_norm_fp32,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    checkpoint,
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
    vocab_parallel_cross_entropy,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.timers import Timers
from megatron.core.transformer import MegatronModule, ModuleSpec, TransformerConfig, build_module
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.transformer.utils import (
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from megatron.core.utils import (
    get_model_config,
    init_method_normal,
    make_tp_sharded_tensor_for_checkpoint,
    make_viewless_tensor,
    scaled_init_method_normal,
)
from torch.distributed.checkpoint import CheckpointException

adopt_modules()
