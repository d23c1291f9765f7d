"""Without a GPU the kernels run under Triton's interpreter, which the environment chooses while Triton is imported."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
import torch

# Files whose tests run kernels.
KERNEL_FILES = ("test_triton.py", "test_bench_kernels.py")


def _choose_interpreter() -> bool:
    """Choose the interpreter for this run of the tests. False when somebody imported Triton for the GPU before."""
    if "triton" not in sys.modules:
        # Stays set: parts of Triton are imported late and look again. Nothing else runs kernels without a GPU.
        os.environ["TRITON_INTERPRET"] = "1"
        return True
    from triton import language
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(language.sum, InterpretedFunction)


HAS_TRITON = importlib.util.find_spec("triton") is not None
READY = HAS_TRITON and (torch.cuda.is_available() or _choose_interpreter())


@pytest.fixture(scope="session")
def kernels_run_here() -> bool:
    """Whether this process can run the kernels; if not, test_kernel_process.py runs their tests in another one."""
    return READY


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "Triton was imported for the GPU before: test_kernel_process.py runs this" if HAS_TRITON else "no Triton"
    for item in items:
        if not READY and item.path.name in KERNEL_FILES and item.path.parent.name == "hsa_kernels":
            item.add_marker(pytest.mark.skip(reason=reason))
