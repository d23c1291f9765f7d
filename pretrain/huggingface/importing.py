"""`hsa import`: a Hugging Face folder as a run directory with a checkpoint at step 0.

A folder that `hsa export` wrote comes back with the same bits. Any other Llama-like checkpoint gives its weights to the
dense parts that they fit, see `pretrain.huggingface.dense`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.model_config import Ablations, ModelConfig
from pretrain.errors import RecipeError, RunDirError
from pretrain.huggingface.dense import dense_sizes, fill_dense, read_gguf
from pretrain.huggingface.export import TRAINING_FIELDS
from pretrain.huggingface.names import from_exported, our_tensors
from pretrain.model import HSAModel
from pretrain.new_folder import whole_folder
from pretrain.recipe import LoadedRecipe, apply_override, load_recipe, recipe_from_container


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hsa import`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with safetensors, or a .gguf file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides")
    parser.add_argument("--out", required=True, type=Path, metavar="RUN", help="run directory to make")
    parser.add_argument(
        "--recipe",
        metavar="RECIPE",
        help="train with this recipe afterwards (hsa train RECIPE --run-dir RUN); without it, RUN can be evaluated, "
        "exported and asked",
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="what became of every tensor, as JSON (foreign checkpoints)"
    )


def main(args: argparse.Namespace) -> int:
    """Import; RecipeError and RunDirError for what the user can repair."""
    if args.out.exists() and any(args.out.iterdir()):
        raise RunDirError(f"--out: {args.out} is not empty: choose another run directory")
    if args.folder.suffix == ".gguf":
        return import_dense(args, *read_gguf(args.folder))
    config = read_config(args.folder)
    if "layer_kinds" not in config:
        return import_dense(args, config, read_tensors(args.folder), args.folder / "tokenizer.json")
    model = model_of(config)
    tokenizer = args.folder / "tokenizer.json"
    loaded = recipe_for(args, model, config, tokenizer)
    if not loaded.recipe.model.ablations.hsa:
        raise RecipeError(f"model.ablations.hsa: false would drop the HSA weights of {args.folder}: leave it out")
    theirs, wanted = sizes_of(model), sizes_of(loaded.recipe.model)
    different = [f"{name} {theirs[name]} (recipe: {wanted[name]})" for name in theirs if theirs[name] != wanted[name]]
    if different:
        raise RecipeError(f"--recipe: the model in {args.folder} has another shape: {', '.join(different)}")
    folder = read_tensors(args.folder)

    def fill(built: HSAModel) -> None:
        fill_model(built, folder, str(args.folder))

    write_run(args.out, loaded, fill, tokenizer)
    print(f"{args.out}: {config.get('trained', {}).get('name', args.folder.name)}, {len(folder)} tensors, at step 0")
    return 0


def import_dense(args: argparse.Namespace, config: dict[str, Any], tensors: dict[str, Tensor], tokenizer: Any) -> int:
    """Import a foreign dense checkpoint; tokenizer: the path of a tokenizer.json, or a tokenizers.Tokenizer."""
    missing = [
        name
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if name not in config
    ]
    if missing or "embed_tokens.weight" not in tensors:
        what = f"its configuration lacks {', '.join(missing)}" if missing else "it has no model.embed_tokens.weight"
        raise RunDirError(f"{args.folder} is no Llama-like checkpoint: {what}")
    reports = []
    with tempfile.TemporaryDirectory() as folder:
        if not isinstance(tokenizer, Path):
            file = Path(folder) / "tokenizer.json"
            tokenizer.save(str(file))
            tokenizer = file
        loaded = recipe_for(args, dense_sizes(config), {}, tokenizer)
        write_run(args.out, loaded, lambda built: reports.append(fill_dense(built, config, tensors)), tokenizer)
    if args.report is not None:
        args.report.write_text(json.dumps(reports[0].to_json(), indent=1) + "\n")
    print(f"{args.out}: {reports[0].summary()}")
    return 0


def read_config(folder: Path) -> dict[str, Any]:
    """config.json; RunDirError when there is none."""
    try:
        return json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise RunDirError(f"{folder} is no Hugging Face folder: there is no config.json in it") from None
    except (OSError, ValueError) as error:
        raise RunDirError(f"{folder / 'config.json'} cannot be read: {error}") from None


def model_of(config: dict[str, Any]) -> ModelConfig:
    """The sizes that an exported config.json states."""
    known = {field.name for field in fields(ModelConfig)}
    sizes = {name: value for name, value in config.items() if name in known}
    return ModelConfig(**sizes, ablations=Ablations(bypass=config.get("bypass", True)))


def sizes_of(model: ModelConfig) -> dict[str, Any]:
    """What two models must share to have the same weights and outputs."""
    sizes = {f.name: getattr(model, f.name) for f in fields(model) if f.name not in TRAINING_FIELDS}
    return {**sizes, "ablations.bypass": model.ablations.bypass}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder's safetensors files, without the prefix "model."; RunDirError names a damaged file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            found.update(load_file(file))
        except (OSError, SafetensorError) as error:
            raise RunDirError(f"{file} is damaged: {error}") from None
    if not found:
        raise RunDirError(f"{folder} holds no *.safetensors file")
    return {name.removeprefix("model."): x for name, x in found.items()}


def fill_model(built: HSAModel, folder: dict[str, Tensor], where: str) -> None:
    """Set every weight of a model from an exported folder's tensors; RunDirError names the first that is missing or
    has another shape.
    """
    with torch.no_grad():
        for name, ours in our_tensors(built.state_dict()).items():
            if name == "output_layer.weight" and built.model.tied_embeddings:
                continue
            try:
                value = from_exported(name, ours, built.model, folder)
            except KeyError as error:
                raise RunDirError(f"{where} lacks the tensor {error}") from None
            if value.shape != ours.shape:
                raise RunDirError(f"{where}: {name} has shape {list(value.shape)}, the model {list(ours.shape)}")
            ours.copy_(value)


def recipe_for(args: argparse.Namespace, model: ModelConfig, config: dict[str, Any], tokenizer: Path) -> LoadedRecipe:
    """The recipe asked for, or one that can be evaluated: the model, its tokenizer, one stage."""
    if args.recipe is not None:
        return load_recipe(args.recipe, args.overrides)
    trained = config.get("trained", {})
    window = int(config.get("window", 512))
    stage = {
        "name": str(trained.get("stage", "imported")),
        "context": int(trained.get("context", 8 * window)),
        "window": window,
        "hsa_window": int(config.get("hsa_window", window)),
        "top_k": config.get("hsa_top_k") or "full",
        "until": {"tokens": 1},
    }
    raw = {
        "name": str(trained.get("name", args.folder.stem)),
        "precision": trained.get("precision", "fp32"),
        "model": {name: value for name, value in asdict(model).items() if name != "preset"},
        "data": {"tokenizer": str((args.out / "tokenizer.json").absolute()), "lanes": 1},
        "batch": 1,
        "stages": [stage],
        "tracking": {"mlflow": {"uri": "none"}},
    }
    for override in args.overrides:
        apply_override(raw, override)
    return recipe_from_container(raw, where=str(args.folder))


def write_run(out: Path, loaded: LoadedRecipe, fill: Any, tokenizer: Path | None) -> None:
    """A run directory whose checkpoint at step 0 has the weights that `fill(model)` sets, and a fresh optimizer."""
    from parallel import mesh
    from parallel.checkpoint import save_checkpoint
    from parallel.optimizer import build_optimizer, wrap_model
    from pretrain.model import build_model
    from pretrain.run_dir import RunDir
    from pretrain.stages import Position, StageController

    recipe = loaded.recipe
    device = mesh.initialize(None, seed=recipe.seed)
    try:
        built = build_model(
            recipe.model,
            max_length=max(stage.context for stage in recipe.stages),
            seed=recipe.seed,
            bf16=recipe.stored_precision == "bf16",
            device=device,
        )
        fill(built)
        # The optimizer copies the weights when it is made, so it comes after them.
        chunks = wrap_model([built], recipe.optimizer)
        optimizer = build_optimizer(recipe.optimizer, chunks)
        with whole_folder(out, marker="run.json", option="--out") as aside:
            run_dir = RunDir(aside)
            run_dir.create()
            if tokenizer is not None and tokenizer.is_file():
                shutil.copyfile(tokenizer, aside / "tokenizer.json")
            run = run_dir.begin(loaded.frozen, name=recipe.name, plan=StageController(recipe).plan())
            extra = {"position": Position().as_dict(), "lanes": None, "run_id": run["run_id"]}
            save_checkpoint(run_dir.checkpoints, 0, chunks, optimizer, extra=extra)
            run_dir.update_run(position=Position().as_dict())
    finally:
        mesh.shutdown()
