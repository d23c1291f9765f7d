"""Which optional accelerators are installed, found out without importing them.

Importing Transformer Engine or DeepSpeed takes seconds and may initialise CUDA, and the name ``apex`` on PyPI belongs
to an unrelated web toolkit that must never be mistaken for NVIDIA's apex. So everything here looks at files only.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

# Files that NVIDIA's apex has and the web toolkit of the same name has not.
_APEX_FILES = ("optimizers/fused_adam.py", "normalization/fused_layer_norm.py", "multi_tensor_apply/__init__.py")


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
        lines.append("deepspeed: not installed: nothing needs it")
    return lines
