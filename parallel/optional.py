"""Which optional accelerators are installed, found out without importing them.

Importing Transformer Engine or DeepSpeed takes seconds and may initialise CUDA, and the name ``apex`` on PyPI belongs
to an unrelated web toolkit that must never be mistaken for NVIDIA's apex. So everything here looks at files only.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import OptionalPartError

# Files that NVIDIA's apex has and the web toolkit of the same name has not.
_APEX_FILES = ("optimizers/fused_adam.py", "normalization/fused_layer_norm.py", "multi_tensor_apply/__init__.py")

CHOICES = ("auto", "require", "off")


@dataclass
class ComputeConfig:
    """How the same mathematics is computed, as written under ``compute:`` in a recipe. Nothing here changes the model.

    grouped_experts: all experts of a layer in one product (Transformer Engine's where installed, else torch's).
    gradient_accumulation_fusion, fused_optimizer: NVIDIA apex's. Each auto | require | off: used where it can be, or an
    error where it cannot, or never.
    loss: full (all logits at once) | chunked (logits of loss_chunk tokens at a time, computed again in backward) |
    deepspeed (DeepSpeed's vocabulary-parallel linear cross entropy, the same idea in one operator).
    tiled_mlp: parts of the sequence in which dense MLPs run, by DeepSpeed's TiledMLP; 1 is not tiled.
    fp8_format: hybrid (e4m3 forward, e5m2 for gradients) | e4m3. fp8_scaling: tensorwise (by the tensor's own largest
    number) | delayed (by the largest of earlier steps). Both for precision: fp8 alone, see ``parallel.precision``.
    cuda_graph: forward and backward pass of a step are one CUDA graph, recorded anew in every stage: for small models,
    which wait for the host otherwise. On one GPU, without experts; elsewhere it changes nothing.
    """

    grouped_experts: str = "auto"
    gradient_accumulation_fusion: str = "auto"
    fused_optimizer: str = "auto"
    loss: str = "full"
    loss_chunk: int = 1024
    tiled_mlp: int = 1
    fp8_format: str = "hybrid"
    fp8_scaling: str = "tensorwise"
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        for name in ("grouped_experts", "gradient_accumulation_fusion", "fused_optimizer"):
            if getattr(self, name) == "False":  # what YAML makes of an unquoted off
                setattr(self, name, "off")

    def problems(self) -> list[str]:
        """Everything that makes these settings impossible anywhere, each as ``compute.field: what is wrong``."""
        found = [
            f"compute.{name}: {getattr(self, name)!r} is none of {', '.join(CHOICES)}"
            for name in ("grouped_experts", "gradient_accumulation_fusion", "fused_optimizer")
            if getattr(self, name) not in CHOICES
        ]
        for name, known in (("loss", LOSSES), ("fp8_format", FP8_FORMATS), ("fp8_scaling", FP8_SCALINGS)):
            if getattr(self, name) not in known:
                found.append(f"compute.{name}: {getattr(self, name)!r} is none of {', '.join(known)}")
        for name in ("loss_chunk", "tiled_mlp"):
            if getattr(self, name) < 1:
                found.append(f"compute.{name}: must be at least 1, is {getattr(self, name)}")
        return found


LOSSES = ("full", "chunked", "deepspeed")
FP8_FORMATS = ("hybrid", "e4m3")
FP8_SCALINGS = ("tensorwise", "delayed")


@dataclass(frozen=True)
class Package:
    """One optional package: ``state`` is "installed", "absent" or "foreign" (another project of the same name)."""

    name: str
    state: str
    location: str = ""
    version: str = ""
    features: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """True when the package is there and is the one we mean."""
        return self.state == "installed"


def _find(name: str) -> Path | None:
    """Directory of a top-level package, or None; never executes the package."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # ValueError: a stub in sys.modules without a spec
        return None
    if spec is None:
        return None
    if spec.origin and spec.origin not in ("built-in", "namespace"):
        return Path(spec.origin).parent
    locations = list(spec.submodule_search_locations or [])
    return Path(locations[0]) if locations else None


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def find_apex() -> Package:
    """NVIDIA's apex with the compiled extensions it brings, or "foreign" for any other package named apex."""
    directory = _find("apex")
    if directory is None:
        return Package("apex", "absent")
    if not all((directory / file).is_file() for file in _APEX_FILES):
        return Package("apex", "foreign", str(directory), _version("apex"))
    extensions = tuple(name for name in ("amp_C", "fused_weight_gradient_mlp_cuda") if _find(name) is not None)
    return Package("apex", "installed", str(directory), _version("apex"), extensions)


def find_transformer_engine() -> Package:
    """Transformer Engine for PyTorch (a meta package without its torch half does not count)."""
    directory = _find("transformer_engine")
    if directory is None:
        return Package("transformer_engine", "absent")
    version = _version("transformer-engine") or _version("transformer_engine_torch")
    if not (directory / "pytorch" / "__init__.py").is_file():
        return Package("transformer_engine", "foreign", str(directory), version)
    return Package("transformer_engine", "installed", str(directory), version)


def find_deepspeed() -> Package:
    """DeepSpeed."""
    directory = _find("deepspeed")
    if directory is None:
        return Package("deepspeed", "absent")
    return Package("deepspeed", "installed", str(directory), _version("deepspeed"))


def use_fused_gradients(choice: str, *, on_gpu: bool) -> bool:
    """Whether weight gradients are added up inside their matrix product, for `gradient_accumulation_fusion`."""
    found = _apex_problem(find_apex(), "fused_weight_gradient_mlp_cuda", on_gpu)
    return _decide("gradient_accumulation_fusion", choice, found)


def use_fused_optimizer(choice: str, *, on_gpu: bool) -> bool:
    """Whether AdamW is one kernel over all parameters, Transformer Engine's or apex's, for `fused_optimizer`."""
    found = "" if on_gpu and find_transformer_engine().usable else _apex_problem(find_apex(), "amp_C", on_gpu)
    return _decide("fused_optimizer", choice, found)


def _apex_problem(apex: Package, extension: str, on_gpu: bool) -> str:
    """Why this part of NVIDIA's apex cannot be used, or nothing."""
    if apex.state == "absent":
        return "NVIDIA's apex is not installed (PyPI's apex is another project: build github.com/NVIDIA/apex)"
    if apex.state == "foreign":
        version = f" {apex.version}" if apex.version else ""
        return (
            f"the package apex{version} in {apex.location} is not NVIDIA's apex but PyPI's unrelated project of that "
            "name: pip uninstall apex, then build github.com/NVIDIA/apex"
        )
    if extension not in apex.features:
        return f"NVIDIA's apex in {apex.location} was built without {extension}"
    return "" if on_gpu else "NVIDIA's apex needs a GPU"


def _decide(key: str, choice: str, problem: str) -> bool:
    if choice == "require" and problem:
        raise OptionalPartError(f"compute.{key}=require: {problem}; or set compute.{key}=auto")
    return choice != "off" and not problem


def check_compute(compute: ComputeConfig, *, on_gpu: bool) -> None:
    """OptionalPartError for the first thing under ``compute:`` that this machine cannot do."""
    use_fused_gradients(compute.gradient_accumulation_fusion, on_gpu=on_gpu)
    use_fused_optimizer(compute.fused_optimizer, on_gpu=on_gpu)
    for key, wanted in (("loss=deepspeed", compute.loss == "deepspeed"), ("tiled_mlp", compute.tiled_mlp > 1)):
        if wanted and not find_deepspeed().usable:
            raise OptionalPartError(
                f"compute.{key} needs DeepSpeed: pip install 'hsa-ultralong[deepspeed]', or leave the key out"
            )


def describe_use(compute: ComputeConfig, *, on_gpu: bool, experts: str = "") -> str:
    """One line: which way each part is computed in this run."""
    gradients = "fused (apex)" if use_fused_gradients(compute.gradient_accumulation_fusion, on_gpu=on_gpu) else "torch"
    optimizer = "fused" if use_fused_optimizer(compute.fused_optimizer, on_gpu=on_gpu) else "torch"
    parts = [f"experts {experts}"] if experts else []
    parts += [f"gradient accumulation {gradients}", f"AdamW {optimizer}", f"loss {compute.loss}"]
    if compute.tiled_mlp > 1:
        parts.append(f"dense MLPs in {compute.tiled_mlp} tiles")
    return "in use: " + ", ".join(parts)


def describe() -> list[str]:
    """One line per optional package: what was found and what is used in its place."""
    apex, engine, deepspeed = find_apex(), find_transformer_engine(), find_deepspeed()
    lines = []
    if apex.usable:
        missing = [name for name in ("amp_C", "fused_weight_gradient_mlp_cuda") if name not in apex.features]
        note = f" (not built: {', '.join(missing)})" if missing else ""
        lines.append(f"apex {apex.version}: NVIDIA's, fused AdamW{note}")
    elif apex.state == "foreign":
        lines.append(
            f"apex: {apex.location} is not NVIDIA's apex but an unrelated package of that name: "
            "ignored, torch AdamW is used"
        )
    else:
        lines.append("apex: not installed: torch AdamW is used")
    if engine.usable:
        lines.append(f"transformer_engine {engine.version}: installed")
    elif engine.state == "foreign":
        lines.append(f"transformer_engine: {engine.location} has no PyTorch part; ignored, torch kernels are used")
    else:
        lines.append("transformer_engine: not installed: torch kernels are used")
    if deepspeed.usable:
        lines.append(f"deepspeed {deepspeed.version}: installed")
    else:
        lines.append("deepspeed: not installed: compute.loss=deepspeed and compute.tiled_mlp need it")
    return lines
