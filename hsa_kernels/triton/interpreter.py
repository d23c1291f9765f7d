"""Repair of Triton's CPU interpreter for NumPy 2.4 and later. Used under TRITON_INTERPRET=1 only.

Triton 3.6 turns its one-element arrays into loop bounds with int(array); NumPy 2.4 accepts that for 0-d arrays only.
"""

from __future__ import annotations

import os

_ENABLED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def enabled() -> bool:
    """Whether kernels are interpreted on the CPU: the environment when they were imported decides."""
    return _ENABLED


def repair() -> None:
    """Make interpreted scalars usable as integers whatever NumPy's version is. Harmless when called twice."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor
    if getattr(original, "repaired", False):
        return

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    patched.repaired = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patched
