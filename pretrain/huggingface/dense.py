"""A plain Llama-like checkpoint (Llama, Mistral, Qwen3, SmolLM ...) as initialisation of the dense parts of a model.

Layer i of the checkpoint goes to the i-th of our layers that has a sliding window: attention, norms and MLP, each where
its shape fits; embedding, final norm and output layer likewise. What a dense model has no counterpart of starts silent:
HSA's output projection, and the second MLP matrix of HSA layers that are extra layers, are 0, so that within one window
the model begins as the dense model it came from. Queries and keys are RMS-normalised here: a checkpoint that does the
same gives its gains, for any other the gains are set to the size that its queries and keys have on average, which is
close but not the same function.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.model_config import ModelConfig
from pretrain.errors import RunDirError
from pretrain.huggingface.names import from_exported, our_tensors, to_exported
from pretrain.model import HSAModel

_IN_LAYER = {
    "input_layernorm.weight": "input_norm.weight",
    "post_attention_layernorm.weight": "mlp_norm.weight",
    **{f"self_attn.{part}_proj.weight": f"attention.{part}_proj.weight" for part in "qkvo"},
    **{f"self_attn.{part}_norm.weight": f"attention.{part}_norm.weight" for part in "qk"},
    **{f"mlp.{part}_proj.weight": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
}


@dataclass
class Report:
    """What became of every tensor, ours by name and theirs where nothing took them."""

    ours: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """A few lines for people."""
        counts = Counter(what.partition(":")[0] for what in self.ours.values())
        lines = [", ".join(f"{count} tensors {what}" for what, count in counts.items())]
        reasons = Counter(what for what in self.ours.values() if what.startswith("left at its initial value"))
        lines += [f"  {count} x {reason}" for reason, count in reasons.items()]
        lines += [f"  {len(self.unused)} tensors of the checkpoint unused: {', '.join(self.unused[:4])} ..."] * bool(
            self.unused
        )
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def to_json(self) -> dict[str, Any]:
        """Everything, by tensor."""
        return {"tensors": self.ours, "unused": self.unused, "notes": self.notes}


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    """Configuration, tensors and tokenizer (a tokenizers.Tokenizer) of a GGUF file. RunDirError when transformers
    or a package it needs is missing, or the file is none.
    """
    try:
        import transformers

        options = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        model = transformers.AutoModelForCausalLM.from_pretrained(**options, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**options)
    except ImportError as error:
        raise RunDirError(f"{file}: GGUF files need the packages transformers, gguf and accelerate ({error})") from None
    except (OSError, ValueError) as error:
        raise RunDirError(f"{file} cannot be read as a GGUF model: {error}") from None
    tensors = {name.removeprefix("model."): x for name, x in model.state_dict().items()}
    return model.config.to_dict(), tensors, tokenizer.backend_tokenizer


def dense_sizes(config: dict[str, Any]) -> ModelConfig:
    """A model that all of the checkpoint fits: its layers, half of them below the memory, one HSA layer per eight."""
    heads = config["num_attention_heads"]
    hidden = config["hidden_size"]
    layers = config["num_hidden_layers"]
    head_dim = config.get("head_dim") or hidden // heads
    upper = max(1, layers // 2)
    if layers < 2:
        raise RunDirError("a model needs at least two layers, one below and one above the context memory")
    return ModelConfig(
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        ffn_hidden_size=config["intermediate_size"],
        lower_layers=layers - upper,
        upper_layers=upper,
        hsa_layers=max(1, upper // 8),
        num_heads=heads,
        head_dim=head_dim,
        swa_kv_heads=config.get("num_key_value_heads") or heads,
        hsa_kv_heads=1 if heads <= 32 else heads // 16,
        retrieval_dim=1 << max(4, (hidden - 1).bit_length() - 1),
        encoder_ffn_hidden_size=config["intermediate_size"],
        rope_base=rope_base(config),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        norm_eps=config.get("rms_norm_eps", 1e-6),
    )


def rope_base(config: dict[str, Any]) -> float:
    """The base of the rotary frequencies, wherever this version of the configuration keeps it."""
    return float((config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta") or 10000.0)


def fill_dense(built: HSAModel, config: dict[str, Any], theirs: dict[str, Tensor]) -> Report:
    """Give a model what fits of a dense checkpoint's tensors (names without "model."), and say what became of each."""
    model, report = built.model, Report()
    if rope_base(config) != model.rope_base:
        report.notes.append(f"model.rope_base is {model.rope_base:g}, the checkpoint's {rope_base(config):g}")
    if (theirs_eps := config.get("rms_norm_eps", 1e-6)) != model.norm_eps:
        report.notes.append(f"model.norm_eps is {model.norm_eps:g}, the checkpoint's {theirs_eps:g}")
    kinds = model.layer_kinds()
    windows = [i for i, kind in enumerate(kinds) if "swa" in kind]
    source = _as_exported(theirs, windows, model.tied_embeddings, report)
    if not any(name.endswith("attention.q_norm.weight") for name in source):
        report.notes.append("the checkpoint does not normalise queries and keys: their gains are estimates")
    used: set[str] = set()
    with torch.no_grad():
        for name, ours in our_tensors(built.state_dict()).items():
            if name == "output_layer.weight" and model.tied_embeddings:
                continue
            names = [exported for exported, _ in to_exported(name, ours, model)]
            shapes = {exported: part.shape for exported, part in to_exported(name, ours, model)}
            fitting = [n for n in names if n in source and source[n].shape == shapes[n]]
            if len(fitting) == len(names):
                ours.copy_(from_exported(name, ours, model, source))
                used |= set(names)
                report.ours[name] = "taken" if len(names) == 1 else "taken: fused"
            elif silent := _silent(name, kinds):
                ours.zero_()
                report.ours[name] = f"set to 0: {silent}"
            elif gain := _gain(names[0], source, model):
                ours.fill_(gain)
                report.ours[name] = "estimated: the average size of the checkpoint's queries or keys"
            else:
                report.ours[name] = f"left at its initial value: {_why(names, shapes, source)}"
    report.unused += sorted(set(source) - used)
    return report


def _as_exported(theirs: dict[str, Tensor], windows: list[int], tied: bool, report: Report) -> dict[str, Tensor]:
    """The checkpoint's tensors under the names that our model's parts have in an exported folder."""
    found = {}
    for name, x in theirs.items():
        parts = name.split(".", 2)
        if parts[0] == "layers" and parts[2] in _IN_LAYER and int(parts[1]) < len(windows):
            found[f"layers.{windows[int(parts[1])]}.{_IN_LAYER[parts[2]]}"] = x
        elif name in ("embed_tokens.weight", "norm.weight") or (name == "lm_head.weight" and not tied):
            found[name] = x
        elif name != "lm_head.weight":
            report.unused.append(name)
    if not tied and "lm_head.weight" not in found and "embed_tokens.weight" in found:
        found["lm_head.weight"] = found["embed_tokens.weight"]
    return found


def _silent(name: str, kinds: list[str]) -> str | None:
    if name.endswith("hsa_attention.linear_proj.weight"):
        return "HSA starts silent"
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"] and kinds[int(parts[2])] == "hsa" and name.endswith("mlp.linear_fc2.weight"):
        return "an extra layer starts silent"
    return None


def _gain(exported: str, source: dict[str, Tensor], model: ModelConfig) -> float | None:
    """Root mean square of a query's or key's numbers for an input whose numbers are independent and of size 1."""
    for part, heads in (("q", model.num_heads), ("k", model.swa_kv_heads)):
        before, found, rest = exported.partition(f"attention.{part}_norm.weight")
        weight, norm = source.get(f"{before}attention.{part}_proj.weight"), source.get(f"{before}input_norm.weight")
        if found and not rest and before.startswith("layers.") and weight is not None and norm is not None:
            if weight.shape != (heads * model.head_dim, model.hidden_size):
                return None
            return float((weight.float() * norm.float()).square().sum(1).mean().sqrt())
    return None


def _why(names: list[str], shapes: dict[str, torch.Size], source: dict[str, Tensor]) -> str:
    if any(".hsa" in n or n.startswith("encoder.") for n in names):
        return "HSA and the chunk encoder have no counterpart"
    other = next((n for n in names if n in source and source[n].shape != shapes[n]), None)
    if other is not None:
        return f"shape {list(shapes[other])} here, {list(source[other].shape)} there"
    return "the checkpoint has no such tensor"
