"""Peak speed of the devices we know, for model FLOP/s utilisation (MFU).

Dense peaks (no structured sparsity) from NVIDIA's data sheets, in TFLOP/s.
"""

from __future__ import annotations

import torch

# name as in torch.cuda.get_device_name(), the most specific first: (bf16 tensor cores, tf32 tensor cores, fp32)
_PEAK_TFLOPS: tuple[tuple[str, tuple[float, float, float]], ...] = (
    ("GB200", (2500.0, 1250.0, 80.0)),
    ("B200", (2250.0, 1125.0, 80.0)),
    ("H200", (989.4, 494.7, 66.9)),
    ("H100 PCIe", (756.0, 378.0, 51.2)),
    ("H100 NVL", (835.5, 417.5, 60.0)),
    ("H100", (989.4, 494.7, 66.9)),
    ("H800", (989.4, 494.7, 66.9)),
    ("A100", (312.0, 156.0, 19.5)),
    ("A800", (312.0, 156.0, 19.5)),
    ("L40S", (362.1, 183.2, 91.6)),
    ("A10", (125.0, 62.5, 31.2)),
    ("L4", (121.0, 60.0, 30.3)),
)


def peak_flops(device: torch.device | str, precision: str) -> float | None:
    """Peak FLOP/s of one device for matrix products in ``precision`` (``bf16`` or ``fp32``; that of ``fp8`` is taken
    as bf16's, whose products it still has).

    fp32 counts TF32 tensor cores when torch may use them. ``None`` on a CPU and for a GPU that is not in the table: no
    MFU is better than a wrong one.
    """
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return peak_flops_by_name(torch.cuda.get_device_name(device), precision, tf32=tf32)


def peak_flops_by_name(name: str, precision: str, *, tf32: bool = False) -> float | None:
    """``peak_flops`` of a GPU by its marketing name, e.g. ``NVIDIA H100 80GB HBM3``."""
    column = {"bf16": 0, "fp8": 0, "fp32": 1 if tf32 else 2}[precision]
    words = name.replace("-", " ").split()
    for known, peaks in _PEAK_TFLOPS:
        if all(part in words for part in known.split()):
            return peaks[column] * 1e12
    return None
