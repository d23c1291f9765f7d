"""A read context on disk: everything an inference engine has to know to go on with it later.

A folder with context.json (what it belongs to) and context.safetensors (memory, window buffers, the incomplete chunk,
the next token's logits). It exists whole or not at all, and is refused by any other model, tokenizer or setting.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import RunDirError
from pretrain.inference import InferenceEngine, Reading
from pretrain.model import HSAModel
from pretrain.new_folder import whole_folder

FORMAT = 1
# Of contexts that were saved before these settings.
_DEFAULTS = {"neighbours": 0, "retrieval_temperature": 1.0, "distance_decay": 0.0}
_SAMPLES = 64  # numbers of every parameter that enter the fingerprint


def model_fingerprint(model: HSAModel) -> str:
    """SHA-256 over every parameter's name, shape, dtype and 64 of its numbers: another step has another one."""
    digest = hashlib.sha256()
    for name, value in sorted([*model.named_parameters(), *model.named_buffers()]):
        flat = value.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(picked.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _belongs_to(engine: InferenceEngine, tokenizer_fingerprint: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": model_fingerprint(engine.model),
        "tokenizer": tokenizer_fingerprint,
        # What distances fall from is a matter of the weights.
        **{name: value for name, value in engine.settings.items() if name != "decay_from"},
        "fp8": engine.placement.fp8,
    }


def save_context(
    engine: InferenceEngine, folder: str | Path, *, tokenizer_fingerprint: str, logits: Tensor, seen: Tensor
) -> None:
    """Write what `engine` has read to `folder`. logits (B, V): of the next token; seen (n,) int64: ids that occurred.

    RunDirError when the folder can't be written or holds something else.
    """
    from safetensors.torch import save_file

    readings = engine.readings()
    chunks = max(engine.chunks(reading.position) for reading in readings)
    tensors = {f"memory.{name}": x for name, x in engine.store.tensors(chunks).items()}
    tensors |= {"logits": logits, "seen": seen}
    for i, reading in enumerate(readings):
        if reading.pending is not None:
            tensors[f"reading.{i}.pending"] = reading.pending
        for number, (k, v) in reading.halos.items():
            tensors |= {f"reading.{i}.{number}.k": k, f"reading.{i}.{number}.v": v}
    about = {
        "belongs_to": _belongs_to(engine, tokenizer_fingerprint),
        "chunks": chunks,
        "readings": [{"rows": reading.rows, "position": reading.position} for reading in readings],
        "model": asdict(engine.model.model),
    }
    with whole_folder(Path(folder), marker="context.json", option="--context-out") as aside:
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, aside / "context.safetensors")
        (aside / "context.json").write_text(json.dumps(about, indent=1) + "\n")


def load_context(engine: InferenceEngine, folder: str | Path, *, tokenizer_fingerprint: str) -> tuple[Tensor, Tensor]:
    """Put a saved context into `engine`, in place of what it has read. Returns logits and seen, see `save_context`.

    RunDirError when there is no context, it is damaged, or it belongs to another model, tokenizer or setting.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        about = json.loads((folder / "context.json").read_text())
        saved, chunks = {**_DEFAULTS, **about["belongs_to"]}, int(about["chunks"])
    except FileNotFoundError:
        raise RunDirError(f"--context-in: {folder} holds no saved context (no context.json)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirError(f"--context-in: cannot read {folder / 'context.json'}: {error}") from None
    now = _belongs_to(engine, tokenizer_fingerprint)
    different = [name for name in now if saved.get(name) != now[name]]
    if different:
        what = {"model": "other weights", "tokenizer": "another tokenizer", "format": "another version of this program"}
        values = [what.get(n, f"{n}={saved.get(n)} (here {now[n]})") for n in different]
        raise RunDirError(
            f"--context-in: the context in {folder} was read with {', '.join(values)}: read the text again"
        )
    try:
        tensors = load_file(folder / "context.safetensors", device=str(engine.device))
    except (OSError, SafetensorError) as error:
        raise RunDirError(f"--context-in: {folder / 'context.safetensors'} is damaged: {error}") from None
    engine.reset()
    memory = {name.removeprefix("memory."): x for name, x in tensors.items() if name.startswith("memory.")}
    engine.store.restore(memory, chunks)
    readings = []
    for i, item in enumerate(about["readings"]):
        prefix = f"reading.{i}."
        numbers = {int(name.split(".")[2]) for name in tensors if name.startswith(prefix) and name.endswith(".k")}
        halos = {number: (tensors[f"{prefix}{number}.k"], tensors[f"{prefix}{number}.v"]) for number in numbers}
        readings.append(Reading(tuple(item["rows"]), item["position"], halos, tensors.get(f"{prefix}pending")))
    engine.rewind(readings)
    return tensors["logits"], tensors["seen"]
