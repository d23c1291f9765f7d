"""`hsa export`: a checkpoint as a folder that transformers, or plain PyTorch, can load."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from parallel.model_config import ModelConfig
from pretrain.errors import RunDirError
from pretrain.huggingface.names import our_tensors, to_exported
from pretrain.model import HSAModel
from pretrain.new_folder import whole_folder

MODELING = "modeling_hsa_ultralong.py"
SHARD_BYTES = 4 << 30
# Fields of a model's description that say how it was trained, not what it is; of experiments only `bypass` is exported.
TRAINING_FIELDS = ("preset", "init_std", "expert_bias_update_rate", "ablations")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hsa export`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="run directory (its latest) or one step directory")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")


def main(args: argparse.Namespace) -> int:
    """Export; RunDirError for a checkpoint that is none or an --out that holds something else."""
    from pretrain.model_io import load_for_inference

    loaded = load_for_inference(args.checkpoint)
    if options := loaded.recipe.model.ablations.experiments():
        raise RunDirError(
            f"{args.checkpoint}: model.ablations.{options[0]} is an experiment, which no exported model can have: "
            "export one that was trained without it"
        )
    about = {
        "name": loaded.recipe.name,
        "step": loaded.step,
        "stage": loaded.stage.name,
        "context": loaded.stage.context,
        "precision": loaded.recipe.stored_precision,
    }
    export_model(
        loaded.model,
        args.out,
        window=loaded.stage.window,
        hsa_window=loaded.stage.hsa_window,
        top_k=loaded.stage.top_k,
        tokenizer_file=Path(loaded.tokenizer.path),
        eos_id=loaded.tokenizer.eos_id,
        pad_id=loaded.tokenizer.pad_id,
        about=about,
    )
    print(f"{args.out}: {loaded.recipe.name} at step {loaded.step:,}")
    return 0


def exported_config(model: ModelConfig, **more: Any) -> dict[str, Any]:
    """config.json: the sizes, and what transformers asks for."""
    sizes = {name: value for name, value in asdict(model).items() if name not in TRAINING_FIELDS}
    return {
        "model_type": "hsa_ultralong",
        "architectures": ["HSAUltraLongForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_hsa_ultralong.HSAUltraLongConfig",
            "AutoModelForCausalLM": "modeling_hsa_ultralong.HSAUltraLongForCausalLM",
        },
        **sizes,
        "layer_kinds": model.layer_kinds(),
        "bypass": model.ablations.bypass,
        "tie_word_embeddings": False,
        "use_cache": False,
        **more,
    }


def export_model(
    model: HSAModel,
    folder: Path,
    *,
    window: int,
    hsa_window: int,
    top_k: int | None,
    tokenizer_file: Path,
    eos_id: int,
    pad_id: int,
    about: dict[str, Any],
) -> None:
    """Write the folder: config.json, model-*.safetensors, the modelling file, the tokenizer. It exists whole or not at
    all.
    """
    from safetensors.torch import save_file

    sizes = model.model
    tensors: dict[str, torch.Tensor] = {}
    for name, value in our_tensors(model.state_dict()).items():
        if name == "output_layer.weight" and sizes.tied_embeddings:
            continue
        for exported, part in to_exported(name, value.detach().cpu(), sizes):
            # The prefix is that of the class which transformers loads.
            tensors[f"model.{exported}"] = part.contiguous().clone()
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, value in tensors.items():
        if shards[-1] and size + value.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = exported_config(
        sizes,
        window=window,
        hsa_window=hsa_window,
        hsa_top_k=top_k,
        torch_dtype=dtype,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
        trained=about,
    )
    with whole_folder(Path(folder), marker="config.json", option="--out") as aside:
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        where = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            save_file(shard, aside / file, metadata={"format": "pt"})
            where.update(dict.fromkeys(shard, file))
        if len(shards) > 1:
            total = sum(value.nbytes for value in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        shutil.copyfile(Path(__file__).with_name(MODELING), aside / MODELING)
        shutil.copyfile(tokenizer_file, aside / "tokenizer.json")
        special = _special_tokens(tokenizer_file, eos_id, pad_id)
        (aside / "tokenizer_config.json").write_text(json.dumps(special, indent=2) + "\n")
        generation = {"eos_token_id": eos_id, "pad_token_id": pad_id, "use_cache": False}
        (aside / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _special_tokens(tokenizer_file: Path, eos_id: int, pad_id: int) -> dict[str, Any]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.id_to_token(eos_id),
        "pad_token": tokenizer.id_to_token(pad_id),
        "clean_up_tokenization_spaces": False,
    }
